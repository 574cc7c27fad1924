"""The class that vLLM loads: hands each of its calls to the scheduler's or the worker's half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from .config import ConnectorConfig
from .engine import EngineFacts
from .metadata import Handshake, StepMetadata
from .scheduler import SchedulerSide
from .stats import ConnectorPromMetrics, ConnectorStats
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class KvFabricConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps the engine's prefixes in kvfabric's tiers, fetches them back, and hands prefills to
    decode engines.

    Its settings are described at `kvfabric.vllm.config.ConnectorConfig`. All loads and stores are
    asynchronous; whatever goes wrong with them is a miss, which the engine computes.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        config = ConnectorConfig.parse(transfer.kv_connector_extra_config)
        facts = EngineFacts.of(config, vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(config, facts)
        else:
            self._worker = WorkerSide(config, facts, vllm_config, _tensor_rank())

    @property
    def requires_kv_delivery(self) -> bool:
        """False: blocks are handed off as copies, so a preemption takes nothing from a decode
        engine.
        """
        return False

    # Worker.

    def get_mem_pool_context(self) -> AbstractContextManager | None:
        """Where the engine allocates its pool; None for wherever it likes."""
        return self._at_worker.pool_context()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learns where the engine's memory is, and refuses what cannot be shared."""
        self._at_worker.register(self._kv_cache_config, kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Opens this rank's node and tells the scheduler where it answers: the engine asks once, at
        the end of its start.
        """
        return self._at_worker.open()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Waits for stores of blocks that this step may overwrite."""
        self._at_worker.before_step(_step(kv_connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts fetches; requests wait for them outside of steps."""
        self._at_worker.load(_step(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no step runs over blocks that are being fetched."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        """Starts the stores of what this step completed."""
        self._at_worker.store(_step(self._get_connector_metadata()))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose blocks are no longer read, requests whose fetch is over, and those of
        them that must be computed from the beginning.
        """
        sent, received = self._at_worker.poll()
        failed = self._at_worker.take_failed_requests(received)
        return KVConnectorTransferResults(sent, received, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that must be computed because they were not, or not surely, fetched."""
        return self._at_worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's half is to know of this step."""
        return self._at_worker.take_metadata()

    # Scheduler.

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Learns where each rank's node answers."""
        handshakes: Mapping[int, Handshake] = {
            rank: told for rank, told in metadata.items() if isinstance(told, Handshake)
        }
        self._at_scheduler.connect(handshakes)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Learns of the engine's blocks."""
        self._at_scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """Begins to keep track of a request."""
        self._at_scheduler.track(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens can be fetched, or None until that is known."""
        return self._at_scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plans the fetch into the blocks that the engine reserved."""
        self._at_scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """From which tiers the tokens of a fetch are expected."""
        return self._at_scheduler.hit_sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do in the step that is about to run."""
        return self._at_scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learns what the workers did."""
        self._at_scheduler.reported(connector_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks are still being read, and what its client is told."""
        return self._at_scheduler.finished(request)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, for an engine whose hybrid cache manager is off."""
        return self._at_scheduler.finished(request)

    def has_pending_push_work(self) -> bool:
        """Whether the engine must run a step although no request needs one."""
        return self._at_scheduler.has_work()

    def take_events(self) -> Iterable[KVCacheEvent]:
        """None: the node tells the index of its tiers itself."""
        return ()

    def reset_cache(self) -> bool | None:
        """Empties the tiers of this engine's own nodes; objects that others share stay."""
        return self._at_scheduler.reset()

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was counted since the last step."""
        side = self._scheduler or self._worker
        assert side is not None
        return side.stats.take()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """The counters that travelled as plain data."""
        return ConnectorStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The same counters for the engine's ``/metrics``."""
        return ConnectorPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Closes what this half opened; doing it twice is fine."""
        side = self._scheduler or self._worker
        assert side is not None
        side.shutdown()

    @property
    def _at_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler's call in a worker"
        return self._scheduler

    @property
    def _at_worker(self) -> WorkerSide:
        assert self._worker is not None, "a worker's call in the scheduler"
        return self._worker


def _step(metadata: KVConnectorMetadata) -> StepMetadata:
    assert isinstance(metadata, StepMetadata)
    return metadata


def _tensor_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
