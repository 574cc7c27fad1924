"""Blocks that the engine may give up while stores still read them.

The engine frees what no window reaches any more while its request goes on. A store that reads such
a block would then copy what another request wrote there, under the wrong name. So each is held, as
by one more request, until the store is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class Holds:
    """The blocks held for each request."""

    def __init__(self) -> None:
        self._pool: BlockPool | None = None
        self._blocks: dict[str, list[KVCacheBlock]] = {}
        # Stores under way that read them, counted per rank.
        self._readers: dict[str, int] = {}

    def bind(self, pool: BlockPool) -> None:
        """Learns of the engine's blocks."""
        self._pool = pool

    def hold(self, request_id: str, block_ids: Iterable[int], readers: int) -> None:
        """Keeps these blocks until so many more stores of the request are over, all that were
        counted here.
        """
        assert self._pool is not None, "the engine told nothing of its blocks"
        blocks = [self._pool.blocks[number] for number in block_ids]
        self._pool.touch(blocks)
        self._blocks.setdefault(request_id, []).extend(blocks)
        self._readers[request_id] = self._readers.get(request_id, 0) + readers

    def settle(self, request_id: str, readers: int) -> None:
        """So many stores of the request are over."""
        if request_id not in self._readers:
            return
        self._readers[request_id] -= readers
        if self._readers[request_id] > 0:
            return
        assert self._pool is not None
        del self._readers[request_id]
        # What comes last in a prompt is of use to fewest, so it is the first to be given up.
        self._pool.free_blocks(reversed(self._blocks.pop(request_id)))
