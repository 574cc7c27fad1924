"""kvfabric in vLLM: `KvFabricConnector`, to be named in ``--kv-transfer-config``.

::

    --kv-transfer-config '{"kv_connector": "KvFabricConnector",
      "kv_connector_module_path": "kvfabric.vllm",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"host": {"bytes": 8589934592}}}'

vLLM is imported with the connector, not with the package.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KvFabricConnector"]


def __getattr__(name: str) -> Any:
    if name == "KvFabricConnector":
        from .connector import KvFabricConnector

        return KvFabricConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
