"""What an agent has registered, by the ranges that its callers name."""

from __future__ import annotations

import threading
from typing import Dict, List, Optional, Tuple

import numpy as np

import kvfabric
from kvfabric import _pools

from ._constants import nixl_mem_t
from ._errors import nixlInvalidParamError, nixlNotFoundError, nixlNotSupportedError, translating
from ._lists import nixlRegDList
from ._memory import Ranges

DEREGISTER_SECONDS_MAX = 30.0
"""How long deregistering waits for transfers that still use the memory."""

_Range = Tuple[int, int, int]


class Registry:
    """The registered ranges of host memory. The same range may be registered more than once, and ranges may overlap."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._regions: Dict[_Range, List[kvfabric.Region]] = {}
        self._ranges: Optional[Ranges] = None

    def register(self, core: kvfabric.Agent, descs: nixlRegDList) -> None:
        """Registers all descriptors or none. Peers may read and write them, as with NIXL."""
        _check_host_memory(descs.getType())
        made: List[Tuple[_Range, kvfabric.Region]] = []
        try:
            for row in descs.rows.tolist():
                address, length, _ = row
                if length == 0 or address + length >= 1 << 64:
                    raise nixlInvalidParamError(
                        f"{length} bytes at {address:#x} cannot be registered"
                    )
                fd = _pools.file_of(address, length)
                with translating():
                    if fd is not None:
                        region = core.register_file(fd, readable=True, writable=True)
                    else:
                        region = core.register_address(
                            address, length, readable=True, writable=True
                        )
                made.append((tuple(row), region))
        except BaseException:
            for _, region in made:
                region.deregister()
            raise
        with self._lock:
            for row, region in made:
                self._regions.setdefault(row, []).append(region)
            self._ranges = None

    def deregister(self, descs: nixlRegDList) -> None:
        """Takes back one registration of each descriptor, or of none if one is not registered."""
        wanted = [tuple(row) for row in descs.rows.tolist()]
        taken: List[Tuple[_Range, kvfabric.Region]] = []
        with self._lock:
            try:
                for row in wanted:
                    taken.append((row, self._take(row)))
            except nixlNotFoundError:
                self._put_back(taken)
                raise
            self._ranges = None
        while taken:
            row, region = taken[-1]
            try:
                with translating():
                    region.deregister(DEREGISTER_SECONDS_MAX)
            except BaseException:
                # Still in use: it stays registered, so that deregistering it can be tried again.
                with self._lock:
                    self._put_back(taken)
                    self._ranges = None
                raise
            taken.pop()

    def _take(self, row: _Range) -> kvfabric.Region:
        regions = self._regions.get(row)
        if not regions:
            address, length, device = row
            raise nixlNotFoundError(
                f"{length} bytes at {address:#x} of device {device} are not registered"
            )
        region = regions.pop()
        if not regions:
            del self._regions[row]
        return region

    def _put_back(self, taken: List[Tuple[_Range, kvfabric.Region]]) -> None:
        for row, region in taken:
            self._regions.setdefault(row, []).append(region)

    def ranges(self) -> Ranges:
        """What is registered now."""
        with self._lock:
            if self._ranges is None:
                rows = [(*row, regions[-1].id) for row, regions in self._regions.items()]
                self._ranges = Ranges(np.array(rows, np.uint64).reshape(len(rows), 4), self._owner)
            return self._ranges


def _check_host_memory(memory: nixl_mem_t) -> None:
    if memory == nixl_mem_t.VRAM_SEG:
        raise nixlNotSupportedError(
            "device memory cannot be registered yet; keep the engine's transfer buffers in host memory"
            ' (vLLM: "kv_buffer_device": "cpu")'
        )
    if memory != nixl_mem_t.DRAM_SEG:
        raise nixlNotFoundError(f"no backend for {memory.name}: kvfabric moves host memory only")
