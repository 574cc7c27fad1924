"""The half of the connector in each worker: moves blocks between the engine's memory and this
rank's node.

The engine's memory is lent: a store reads it and a fetch writes it while other requests run. So
blocks are only given back, by reporting their request, once nothing reads or writes them any more,
also after a failure.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import kvfabric
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.logger import init_logger

from .config import ConnectorConfig
from .engine import EngineFacts, model_identity, node_config
from .layout import PageLayout
from .metadata import Handshake, Load, StepMetadata, Store, WorkerMetadata
from .pins import Pins
from .shared_pool import SharedPool, file_of
from .stats import ConnectorStats

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.kvfabric.worker")

# How long one wait for something that must end takes before it is waited for again, and said so.
PATIENCE_SECONDS = 10.0
# How long clearing waits for peers that are reading, and how often it tries.
CLEAR_SECONDS = 10.0
CLEAR_PAUSE_SECONDS = 0.01


class _Storing:
    """A store that reads the engine's memory."""

    def __init__(self, store: Store, operation: Any) -> None:
        self.store = store
        self.operation = operation
        self.begun = time.monotonic()


class _Fetching:
    """A fetch that writes to the engine's memory, and then what it left unsettled."""

    def __init__(self, load: Load, operation: Any) -> None:
        self.load = load
        self.operation = operation
        self.report: kvfabric.FetchReport | None = None
        self.begun = time.monotonic()


class WorkerSide:
    """One rank's node, and what it does for the engine. Called from the worker's thread only."""

    def __init__(
        self, config: ConnectorConfig, facts: EngineFacts, engine: VllmConfig, rank: int
    ) -> None:
        self._config = config
        self._facts = facts
        self._engine = engine
        self._rank = rank
        self._node: kvfabric.Node | None = None
        self._pages: kvfabric.Pages | None = None
        self._region: kvfabric.Region | None = None
        self._layout: PageLayout | None = None
        self._pool_file: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._identity = ""
        self._block_bytes = 0
        self._storing: deque[_Storing] = deque()
        self._storing_bytes = 0
        self._fetching: list[_Fetching] = []
        # Loads of a request that are not over.
        self._loading: Counter[str] = Counter()
        # Finished requests whose blocks the engine keeps until their stores are done.
        self._releasing: set[str] = set()
        self._settled: dict[str, int] = {}
        self._cleared = 0
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._received: set[str] = set()
        self.stats = ConnectorStats()
        self._pins = Pins(config.pin_ttl_s, self.stats)

    def pool_context(self) -> SharedPool | None:
        """Where the engine allocates its pool; None for wherever it likes."""
        return SharedPool() if self._config.shared_pool else None

    def register(self, cache: KVCacheConfig, tensors: dict[str, torch.Tensor]) -> None:
        """Reads where the engine's blocks are, and what identifies them.

        Raises `ConfigError` for memory that cannot be shared block by block, and for a model that
        nothing identifies.
        """
        self._layout = PageLayout.of(cache, tensors)
        # They keep the allocation alive for as long as the node may move its bytes.
        self._tensors = dict(tensors)
        if self._config.shared_pool:
            self._pool_file = file_of(self._layout.address, self._layout.length)
        layers = [name for group in cache.kv_cache_groups for name in group.layer_names]
        backends = [
            backend.full_cls_name() for backend in get_current_attn_backends(self._engine, layers)
        ]
        self._identity = model_identity(
            self._config,
            self._engine,
            self._layout.name,
            self._layout.element,
            [name if isinstance(name, str) else ".".join(name) for name in backends],
        )

    def open(self) -> Handshake:
        """Opens this rank's node over the engine's memory; tells where it answers.

        Not before the engine's scheduler is there: the index wants to hear the engine's events as
        soon as the node has registered. Raises what the node says of its configuration.
        """
        layout = self._layout
        assert layout is not None, "the engine's memory is registered first"
        if self._node is None:
            self._node = self._open_over(layout)
        assert self._node.peer_address is not None
        return Handshake(self._node.pod, self._node.peer_address, self._identity)

    def _open_over(self, layout: PageLayout) -> kvfabric.Node:
        node = kvfabric.Node(
            node_config(
                self._config,
                self._facts,
                self._engine,
                rank=self._rank,
                block_bytes=layout.block_bytes,
                identity=self._identity,
                layers=layout.layers,
            )
        )
        if self._pool_file is not None:
            region = node.agent.register_file(self._pool_file, readable=False)
        else:
            region = node.agent.register_address(
                layout.address, layout.length, readable=False, writable=False, keep=self._tensors
            )
        self._region = region
        self._pages = node.pages(
            [(region, span.offset, span.stride, span.length) for span in layout.spans],
            layout.blocks,
        )
        self._block_bytes = layout.block_bytes
        assert self._pages.block_bytes == layout.block_bytes
        logger.info(
            "node %s at %s: %d blocks of %d bytes, model identity %s",
            node.pod,
            node.peer_address,
            layout.blocks,
            layout.block_bytes,
            self._identity,
        )
        return node

    # One step, in the order in which the engine calls.

    def before_step(self, step: StepMetadata) -> None:
        """Waits until no store reads blocks that this step may overwrite."""
        if step.clear:
            self._clear()
        if step.preempted:
            for storing in [s for s in self._storing if s.store.request_id in step.preempted]:
                self._finish(storing)

    def load(self, step: StepMetadata) -> None:
        """Starts the fetches of this step."""
        self._loading.update(load.request_id for load in step.loads)
        for load in step.loads:
            if not load.block_ids:
                self._loaded(load.request_id)
                continue
            try:
                sources = load.sources[self._rank]
                node, pages = self._opened()
                operation = node.fetch(
                    node.prefix_of(load.names),
                    pages,
                    load.block_ids,
                    first=load.first,
                    holders=sources.holders,
                    shared=sources.shared,
                    deadline=self._config.fetch_deadline_ms / 1000,
                )
            except kvfabric.KvfabricError as error:
                logger.warning("fetch for request %s: %s", load.request_id, error)
                self._fetched(load, 0)
                continue
            self._fetching.append(_Fetching(load, operation))

    def store(self, step: StepMetadata) -> None:
        """Starts the stores of blocks that this step completed, and the pins that wait for them."""
        for store in step.stores:
            size = len(store.block_ids) * self._block_bytes
            if not self._room_for(size, store.awaited):
                self.stats.add("skipped_blocks", len(store.block_ids))
                self._settle(store.request_id)
                continue
            try:
                node, pages = self._opened()
                operation = node.store(
                    node.prefix_of(store.names),
                    pages,
                    store.block_ids,
                    deadline=self._config.store_deadline_ms / 1000,
                )
            except kvfabric.KvfabricError as error:
                logger.warning("store for request %s: %s", store.request_id, error)
                self.stats.add("store_failed_blocks", len(store.block_ids))
                self._settle(store.request_id)
                continue
            self._storing.append(_Storing(store, operation))
            self._storing_bytes += size
        self._releasing.update(step.releases)
        self._pins.add(step.pins)

    def poll(self) -> tuple[set[str], set[str]]:
        """Requests whose stores are done and whose blocks may be freed, and those whose fetch is
        over.
        """
        for storing in [s for s in self._storing if s.operation.done()]:
            self._finish(storing)
        self._poll_fetches()
        busy = {storing.store.request_id for storing in self._storing}
        if self._node is not None:
            self._pins.poll(self._node, busy)
        sent = self._releasing - busy
        self._releasing &= busy
        received, self._received = self._received, set()
        return sent, received

    def take_failed_blocks(self) -> set[int]:
        """Engine blocks of this step's finished fetches that hold nothing of use."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self, received: set[str]) -> set[str]:
        """Which of these fetches did not bring every block. Where the engine has several cache
        groups, its block numbers do not say of which one a block is.
        """
        failed = self._failed_requests & received
        self._failed_requests -= failed
        return failed

    def take_metadata(self) -> WorkerMetadata | None:
        """What the scheduler is to know of this step."""
        if not self._settled and not self._cleared:
            return None
        told = WorkerMetadata(settled=self._settled, cleared=self._cleared)
        self._settled, self._cleared = {}, 0
        return told

    def shutdown(self) -> None:
        """Lets what is in flight end, and closes the node."""
        if self._node is None:
            return
        deadline = self._config.shutdown_deadline_ms / 1000
        try:
            self._node.shutdown(deadline)
        except kvfabric.KvfabricError as error:
            logger.warning("shutting down: %s", error)
        self._node = self._pages = None

    # Stores.

    def _opened(self) -> tuple[kvfabric.Node, kvfabric.Pages]:
        if self._node is None or self._pages is None:
            raise kvfabric.CancelledError("the connector was shut down")
        return self._node, self._pages

    def _room_for(self, size: int, awaited: bool) -> bool:
        limit = self._config.store_inflight_max
        ends = time.monotonic() + self._config.store_deadline_ms / 1000
        # A decode engine waits for these blocks, so they wait for room; others are dropped.
        while awaited and self._storing and self._storing_bytes + size > limit:
            if time.monotonic() >= ends:
                return False
            self._finish(self._storing[0])
        return not self._storing or self._storing_bytes + size <= limit

    def _finish(self, storing: _Storing) -> None:
        """Waits for a store, for as long as it reads the engine's memory, and counts what became of
        it.
        """
        blocks = len(storing.store.block_ids)
        try:
            report = _ended(storing.operation, "store", storing.store.request_id)
            self.stats.add("stored_blocks", report.stored)
            self.stats.add("stored_bytes", report.stored * self._block_bytes)
            self.stats.add("held_blocks", report.already_held)
            self.stats.add("refused_blocks", report.refused)
            self.stats.add("store_failed_blocks", report.failed)
        except kvfabric.KvfabricError as error:
            logger.warning("store for request %s: %s", storing.store.request_id, error)
            self.stats.add("store_failed_blocks", blocks)
        self.stats.add("store_seconds", time.monotonic() - storing.begun)
        self._storing.remove(storing)
        self._storing_bytes -= blocks * self._block_bytes
        self._settle(storing.store.request_id)

    def _settle(self, request_id: str) -> None:
        self._settled[request_id] = self._settled.get(request_id, 0) + 1

    # Fetches.

    def _poll_fetches(self) -> None:
        waiting = []
        for fetching in self._fetching:
            if fetching.report is None and fetching.operation.done():
                self._take_report(fetching)
            if fetching.operation is None and (
                fetching.report is None or fetching.report.drained(0.0)
            ):
                depth = fetching.report.depth if fetching.report else 0
                self.stats.add("fetch_seconds", time.monotonic() - fetching.begun)
                self._fetched(fetching.load, depth)
            else:
                waiting.append(fetching)
        self._fetching = waiting

    def _take_report(self, fetching: _Fetching) -> None:
        try:
            fetching.report = fetching.operation.wait(0.0)
        except kvfabric.KvfabricError as error:
            logger.warning("fetch for request %s: %s", fetching.load.request_id, error)
        fetching.operation = None
        if fetching.report is not None:
            self.stats.add_sources(list(fetching.report.sources))
            if fetching.report.unsettled:
                self.stats.add("fetches_unsettled")

    def _fetched(self, load: Load, depth: int) -> None:
        """The engine may use the blocks before `depth`, computes the others, and owns all of them
        again.
        """
        self.stats.add("fetches")
        self.stats.add("fetched_bytes", depth * self._block_bytes)
        if depth < len(load.block_ids):
            self.stats.add("fetches_failed")
            if len(self._facts.groups.groups) == 1:
                self._failed_blocks.update(load.block_ids[depth:])
            else:
                self._failed_requests.add(load.request_id)
        self._loaded(load.request_id)

    def _loaded(self, request_id: str) -> None:
        self._loading[request_id] -= 1
        if self._loading[request_id] == 0:
            del self._loading[request_id]
            self._received.add(request_id)

    # Forgetting.

    def _clear(self) -> None:
        """Forgets everything, after what is on its way: nothing older may come back afterwards."""
        while self._storing:
            self._finish(self._storing[0])
        for fetching in self._fetching:
            if fetching.operation is not None:
                try:
                    _ended(fetching.operation, "fetch", fetching.load.request_id)
                except kvfabric.KvfabricError:
                    # It is reported by the next poll.
                    continue
        try:
            self._forget(self._opened()[0])
        except kvfabric.KvfabricError as error:
            # What could not be forgotten must not be served: go on without a node.
            logger.error("clearing failed, nothing is offloaded or fetched any more: %s", error)
            self.shutdown()
        self._cleared += 1

    def _forget(self, node: kvfabric.Node) -> None:
        self._pins.drop(node)
        ends = time.monotonic() + CLEAR_SECONDS
        while node.clear().wait().kept:
            # Blocks that peers are reading stay until their leases end.
            if time.monotonic() >= ends:
                raise kvfabric.DeadlineError(f"peers still read blocks after {CLEAR_SECONDS} s")
            time.sleep(CLEAR_PAUSE_SECONDS)


def _ended(operation: Any, what: str, request_id: str) -> Any:
    """The result of an operation that uses the engine's memory: it has a deadline of its own, and
    until it ends there is nothing better to do than to wait.
    """
    while True:
        try:
            return operation.wait(PATIENCE_SECONDS)
        except kvfabric.DeadlineError:
            if operation.done():
                raise
            logger.warning("still waiting for the %s of request %s", what, request_id)
