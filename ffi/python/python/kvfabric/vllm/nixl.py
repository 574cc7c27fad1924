"""vLLM's NixlConnector with the engine's pool in shared memory, for the drop-in for NIXL.

::

    --kv-transfer-config '{"kv_connector": "NixlConnector",
      "kv_connector_module_path": "kvfabric.vllm.nixl",
      "kv_role": "kv_producer", "kv_buffer_device": "cpu"}'

It is vLLM's NixlConnector in all else, and has its name because vLLM knows that. Peers on this host
then map the pool and read it in one copy, where they would otherwise need the kernel's leave to
copy from process to process, which containers often lack, or take the way over TCP. With the real
NIXL the pool is shared memory that NIXL makes nothing of.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from vllm.distributed.kv_transfer.kv_connector.v1 import nixl

from .shared_pool import SharedPool


class NixlConnector(nixl.NixlConnector):
    """vLLM's NixlConnector over a shared pool."""

    def get_mem_pool_context(self) -> AbstractContextManager | None:
        """Where the engine's pool is allocated."""
        return SharedPool()
