"""kvfabric in SGLang: `KvFabricStorage`, a storage backend for its hierarchical cache.

::

    --enable-hierarchical-cache --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{
      "backend_name": "kvfabric", "module_path": "kvfabric.sglang",
      "class_name": "KvFabricStorage", "interface_v1": 1,
      "kvfabric": {"host": {"bytes": 8589934592},
                   "object": {"url": "file:///mnt/shared/kvfabric"},
                   "index": {"address": "http://127.0.0.1:50051"}}}'

With an index the ranks of a fleet find each other's pages, and those in a shared object store;
without, each has its own memory and disk.

SGLang is imported with the backend, not with the package.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KvFabricStorage"]


def __getattr__(name: str) -> Any:
    if name == "KvFabricStorage":
        from .storage import KvFabricStorage

        return KvFabricStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
