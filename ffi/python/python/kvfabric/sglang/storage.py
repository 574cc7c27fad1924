"""The class that SGLang loads: keeps pages of its host memory pool in a node's tiers."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Deque, List, Optional, Sequence, Tuple

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName

import kvfabric

from .pool import PagePool, PoolError
from .settings import Settings, node_config

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
    )
    from sglang.srt.mem_cache.pool_host import HostKVCache

logger = logging.getLogger(__name__)

# How long one wait for memory that must come free takes before it is waited for again, and said so.
PATIENCE_SECONDS = 10.0
# Pages that tensors go through, at once, when they are not in the pool.
STAGING_PAGES = 8
# Batches whose figures are kept until SGLang asks for them.
FIGURES_MAX = 1024


class KvFabricStorage(HiCacheStorage):
    """Stores pages in a node of its own, and fetches them from wherever that node finds them.

    With ``interface_v1`` SGLang has pages moved between its pool and the node in place; without, it
    hands over tensors. A tensor's bytes need not be in the order of the pool's, so the two never
    see each other's pages. Safe to use from any thread. Of a batch, whatever is behind the first
    page that cannot be had counts as missing as well: without it nothing behind is of use.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Optional[dict] = None) -> None:
        extra = storage_config.extra_config or {}
        self._settings = Settings.parse(extra)
        self._config = storage_config
        self._in_place = bool(extra.get("interface_v1", 0))
        self._pool: Optional[PagePool] = None
        self._staging_lock = threading.Lock()
        self._fetched: Deque[Tuple[int, float]] = deque(maxlen=FIGURES_MAX)
        self._stored: Deque[Tuple[int, float]] = deque(maxlen=FIGURES_MAX)

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        """Reads where the pool's pages are and opens the node.

        Raises `PoolError` for a pool that cannot be used in place, `SettingError` and what the node
        says otherwise.
        """
        super().register_mem_pool_host(mem_pool_host)
        pool = PagePool.of(mem_pool_host)
        config = node_config(self._settings, self._config, pool)
        node = kvfabric.Node(config)
        # Ranks whose pages differ meet in one index: what tells their pages apart is in the keys
        # there, too.
        self._root = f"{config['model_identity']} {config['shard']} ".encode()
        self._regions = [
            node.agent.register_address(address, size, readable=False, keep=storage)
            for address, size, storage in pool.memory
        ]
        self._pages = node.pages(pool.segments(self._regions), pool.pages)
        staging = node.agent.shared_memory(STAGING_PAGES * pool.page_bytes)
        self._staging = torch.frombuffer(staging.view(), dtype=torch.uint8)
        size = pool.page_bytes
        self._staging_pages = node.pages([(staging, 0, size, size)], STAGING_PAGES)
        self._node = node
        self._pool = pool
        logger.info("node %s: %d pages of %d bytes", node.pod, pool.pages, size)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: Any) -> None:
        """Refuses pools beside the KV cache's: pages without them would be restored by halves."""
        if host_pool_name != PoolName.KV:
            raise PoolError(
                f"host pool {host_pool_name}: only KV pages are stored, not those of hybrid models"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def exists(self, key: str) -> bool:
        """Whether the page can be had."""
        return self.batch_exists([key]) == 1

    def batch_exists(
        self, keys: List[str], extra_info: Optional[HiCacheStorageExtraInfo] = None
    ) -> int:
        """How many pages can be had, from the first on."""
        if not keys:
            return 0
        try:
            deadline = self._settings.lookup_deadline_ms / 1000
            asked = self._node.locate(self._prefix(keys, self._in_place), deadline=deadline)
            return min(asked.wait(deadline + PATIENCE_SECONDS).depth, len(keys))
        except kvfabric.KvfabricError as error:
            logger.warning("lookup of %d pages: %s", len(keys), error)
            return 0

    def batch_get_v1(
        self,
        keys: List[str],
        host_indices: torch.Tensor,
        extra_info: Optional[HiCacheStorageExtraInfo] = None,
    ) -> List[bool]:
        """Fetches pages into the pool, in place; which are there."""
        numbers = self._numbers(keys, host_indices)
        depth = self._fetch(keys, self._pages, numbers, in_place=True)
        return [position < depth for position in range(len(keys))]

    def batch_set_v1(
        self,
        keys: List[str],
        host_indices: torch.Tensor,
        extra_info: Optional[HiCacheStorageExtraInfo] = None,
    ) -> List[bool]:
        """Stores pages out of the pool, in place; which are kept."""
        numbers = self._numbers(keys, host_indices)
        depth = self._store(keys, self._pages, numbers, in_place=True)
        return [position < depth for position in range(len(keys))]

    def get(
        self,
        key: str,
        target_location: Optional[torch.Tensor] = None,
        target_sizes: Optional[Any] = None,
    ) -> Optional[torch.Tensor]:
        """Fetches a page into a tensor, which is returned; None if it cannot be had."""
        assert target_location is not None, "there is no tensor to fetch into"
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self,
        keys: List[str],
        target_locations: Optional[List[torch.Tensor]] = None,
        target_sizes: Optional[Any] = None,
    ) -> List[Optional[torch.Tensor]]:
        """Fetches pages into tensors, one each; None for each that cannot be had."""
        assert target_locations is not None, "there are no tensors to fetch into"
        targets = [self._bytes_of(target) for target in target_locations]
        got: List[Optional[torch.Tensor]] = [None] * len(keys)
        with self._staging_lock:
            for start in range(0, len(keys), STAGING_PAGES):
                batch = keys[start : start + STAGING_PAGES]
                numbers = list(range(len(batch)))
                depth = self._fetch(batch, self._staging_pages, numbers, in_place=False)
                for position in range(depth):
                    targets[start + position].copy_(self._staged(position))
                    got[start + position] = target_locations[start + position]
                if depth < len(batch):
                    break
        return got

    def set(
        self,
        key: str,
        value: Optional[torch.Tensor] = None,
        target_location: Optional[Any] = None,
        target_sizes: Optional[Any] = None,
    ) -> bool:
        """Stores a page that a tensor holds; whether it is kept."""
        assert value is not None, "there is no tensor to store"
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: List[str],
        values: Optional[List[torch.Tensor]] = None,
        target_locations: Optional[Any] = None,
        target_sizes: Optional[Any] = None,
    ) -> bool:
        """Stores pages that tensors hold, one each; whether all are kept."""
        assert values is not None, "there are no tensors to store"
        sources = [self._bytes_of(value.contiguous()) for value in values]
        with self._staging_lock:
            for start in range(0, len(keys), STAGING_PAGES):
                batch = keys[start : start + STAGING_PAGES]
                for position in range(len(batch)):
                    self._staged(position).copy_(sources[start + position])
                numbers = list(range(len(batch)))
                if self._store(batch, self._staging_pages, numbers, in_place=False) < len(batch):
                    return False
        return True

    def clear(self) -> None:
        """Removes all pages from the node's own tiers; shared objects stay."""
        self._node.clear().wait(self._settings.store_deadline_ms / 1000)

    def get_stats(self) -> Any:
        """Pages and GB/s of each batch since the last call, as SGLang's metrics have it; None if it
        does not want them.
        """
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        figures = StorageMetrics()
        for taken, pages, bandwidth in (
            (self._fetched, figures.prefetch_pgs, figures.prefetch_bandwidth),
            (self._stored, figures.backup_pgs, figures.backup_bandwidth),
        ):
            for _ in range(len(taken)):
                count, rate = taken.popleft()
                pages.append(count)
                bandwidth.append(rate)
        return figures

    def close(self) -> None:
        """Closes the node and lets go of the pool's memory; doing it twice is fine."""
        if self._pool is None:
            return
        self._pool = None
        deadline = self._settings.shutdown_deadline_ms / 1000
        self._node.shutdown(deadline)
        for region in self._regions:
            region.deregister(deadline)
        # The folder on disk is let go with the last of these.
        del self._node, self._pages, self._staging_pages, self._staging, self._regions

    def _prefix(self, keys: Sequence[str], in_place: bool) -> kvfabric.Prefix:
        """The blocks of these keys, each by itself: a page's hash covers all pages before it."""
        form = b"sglang page in place " if in_place else b"sglang page as tensor "
        hashes = [hashlib.sha256(form + key.encode()).digest() for key in keys]
        return self._node.prefix_of(kvfabric.pack_hashes(self._root, hashes))

    def _numbers(self, keys: List[str], host_indices: torch.Tensor) -> List[int]:
        """The numbers of the pages that begin at every page's first token."""
        assert self._pool is not None
        size = self._pool.page_tokens
        starts = host_indices[::size].tolist()
        if len(host_indices) != len(keys) * size or any(start % size for start in starts):
            raise PoolError(
                f"{len(host_indices)} indices are not {len(keys)} whole pages of {size} tokens"
            )
        return [start // size for start in starts]

    def _fetch(
        self, keys: List[str], pages: kvfabric.Pages, numbers: List[int], *, in_place: bool
    ) -> int:
        """Fetches, and waits until nothing writes to the pages any more; how many are there."""
        begun = time.monotonic()
        try:
            deadline = self._settings.fetch_deadline_ms / 1000
            prefix = self._prefix(keys, in_place)
            report = _finished(self._node.fetch(prefix, pages, numbers, deadline=deadline))
        except kvfabric.KvfabricError as error:
            logger.warning("fetch of %d pages: %s", len(keys), error)
            return 0
        while report.unsettled and not report.drained(PATIENCE_SECONDS):
            logger.warning("%d pages may still be written to", len(report.unsettled))
        self._note(self._fetched, report.depth, begun)
        return report.depth

    def _store(
        self, keys: List[str], pages: kvfabric.Pages, numbers: List[int], *, in_place: bool
    ) -> int:
        """Stores, and waits until nothing reads the pages any more; how many from the first are
        kept.
        """
        begun = time.monotonic()
        try:
            deadline = self._settings.store_deadline_ms / 1000
            prefix = self._prefix(keys, in_place)
            report = _finished(self._node.store(prefix, pages, numbers, deadline=deadline))
            depth = len(keys)
            if report.refused + report.failed > 0:
                depth = min(self._node.held(prefix).wait(deadline).depth, depth)
        except kvfabric.KvfabricError as error:
            logger.warning("store of %d pages: %s", len(keys), error)
            return 0
        self._note(self._stored, depth, begun)
        return depth

    def _note(self, figures: Deque[Tuple[int, float]], pages: int, begun: float) -> None:
        if pages > 0 and self._pool is not None:
            seconds = max(time.monotonic() - begun, 1e-9)
            figures.append((pages, pages * self._pool.page_bytes / seconds / 1e9))

    def _bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._pool is not None
        flat = tensor.view(-1).view(torch.uint8)
        if flat.numel() != self._pool.page_bytes:
            raise PoolError(
                f"a tensor of {flat.numel()} bytes is no page of {self._pool.page_bytes}"
            )
        return flat

    def _staged(self, position: int) -> torch.Tensor:
        assert self._pool is not None
        size = self._pool.page_bytes
        return self._staging[position * size : (position + 1) * size]


def _finished(operation: Any) -> Any:
    """What an operation with a deadline of its own reports; until then the memory is its own."""
    while True:
        try:
            return operation.wait(PATIENCE_SECONDS)
        except kvfabric.DeadlineError:
            if operation.done():
                raise
            logger.warning("a transfer is still going on after %d s", PATIENCE_SECONDS)
