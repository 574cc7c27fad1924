"""A secondary tier for vLLM's own offloading: blocks that vLLM keeps in host memory go on to
kvfabric's tiers, and come back.

::

    --kv-transfer-config '{
      "kv_connector": "KvFabricOffloadingConnector",
      "kv_connector_module_path": "kvfabric.vllm.tier",
      "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "secondary_tiers": [{
          "type": "KvFabricTier", "module_path": "kvfabric.vllm.tier",
          "host": {"bytes": 1073741824}, "object": {"url": "file:///mnt/shared/kvfabric"},
          "index": {"address": "http://127.0.0.1:50051"}}]}}'

`KvFabricOffloadingConnector` is vLLM's OffloadingConnector, which otherwise keeps the engine's
configuration from its tiers. A tier must know it: what shapes the bytes of a block is part of the
block's name, so that no other engine takes it for its own.

A tier runs in the engine's scheduler, sees rows of the host memory tier, and is never told their
tokens. With an index the tiers of a fleet find each other's blocks, by keys made of the engine's
hashes and under a model name of their own: routers, which ask by tokens, see nothing of them.
`kvfabric.vllm.KvFabricConnector` tells routers. This module is what changes with vLLM's
experimental tier interface.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import kvfabric
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from . import engine as engines
from .config import ConfigError, ConnectorConfig
from .groups import Groups
from .tier_blocks import Lookups, Namer

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadKey, ReqContext, ScheduleEndContext
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import TransferJob

logger = init_logger("vllm.kvfabric.tier")

# Settings of the connector that mean nothing to a tier, and why.
USELESS = {
    "offload": "offload_prompt_only in kv_connector_extra_config decides it",
    "min_fetch_tokens": "vLLM decides what is fetched",
    "pin_ttl_s": "a tier pins nothing",
}
# How long one wait for a transfer that must end takes before it is waited for again, and said so.
PATIENCE_SECONDS = 10.0


class KvFabricOffloadingConnector(OffloadingConnector):
    """vLLM's OffloadingConnector, whose tiers can see the configuration of their engine while they
    are made.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        with set_current_vllm_config(vllm_config):
            super().__init__(vllm_config, role, kv_cache_config)


class KvFabricTier(SecondaryTierManager):
    """Stores blocks of vLLM's host memory tier in a node of its own, and loads them from wherever
    that node finds them.

    Its settings are those of `ConnectorConfig`, but for `USELESS`. All methods return at once but
    `drain_jobs` and `shutdown`. A block that cannot be had, in time and with the right checksum, is
    a miss.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = _parse(settings)
        engine = get_current_vllm_config_or_none()
        if engine is None:
            raise ConfigError(
                "kv_connector: a tier cannot see what shapes the bytes of its engine's blocks; use"
                ' "KvFabricOffloadingConnector" of kv_connector_module_path "kvfabric.vllm.tier"'
            )
        rows, row_bytes = primary_kv_view.shape
        self._config = config
        node = _node_config(config, engine, offloading_spec.config, row_bytes)
        self._node = kvfabric.Node(node)
        self._namer = Namer(self._node, str(node["model_identity"]))
        self._region = self._node.agent.register(primary_kv_view, readable=False)
        self._pages = self._node.pages([(self._region, 0, row_bytes, row_bytes)], rows)
        self._lookups = Lookups(self._node, self._namer, config.lookup_deadline_ms / 1000)
        self._jobs: dict[int, _Job] = {}
        # Results that were known when the job was submitted.
        self._refused: list[JobResult] = []
        self._storing_bytes = 0
        logger.info("node %s: %d rows of %d bytes", self._node.pod, rows, row_bytes)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Has no wish: each block is stored when vLLM has it."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether the block can be had; RETRY until the node has answered, which is asked at the
        end of the step.
        """
        found = self._lookups.ask(key, req_context.req_id)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Starts to copy rows into the node; fails at once when too much is on its way already."""
        size = len(job_metadata.keys) * self._pages.block_bytes
        if self._storing_bytes + size > self._config.store_inflight_max:
            self._refused.append(JobResult(job_metadata.job_id, success=False))
            return
        try:
            operation = self._node.store(
                self._namer.prefix(job_metadata.keys),
                self._pages,
                job_metadata.chunk_ids,
                deadline=self._config.store_deadline_ms / 1000,
            )
        except kvfabric.KvfabricError as error:
            self._refuse(job_metadata, error)
            return
        self._storing_bytes += size
        self._jobs[job_metadata.job_id] = _Job(job_metadata, operation, size)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Starts to bring blocks into rows."""
        try:
            operation = self._node.fetch(
                self._namer.prefix(job_metadata.keys),
                self._pages,
                job_metadata.chunk_ids,
                deadline=self._config.fetch_deadline_ms / 1000,
            )
        except kvfabric.KvfabricError as error:
            self._refuse(job_metadata, error)
            return
        size = len(job_metadata.keys) * self._pages.block_bytes
        self._jobs[job_metadata.job_id] = _Job(job_metadata, operation, size)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that have ended, and whose rows nothing reads or writes any more."""
        self._lookups.collect()
        results, self._refused = self._refused, []
        for job in [job for job in self._jobs.values() if job.ended()]:
            results.append(self._result(job))
        return results

    def has_pending_work(self) -> bool:
        """Whether results are still to come, so that vLLM goes on asking."""
        return bool(self._jobs or self._refused)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forgets what the request asked for."""
        self._lookups.forget(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Asks the node for all that this step looked up."""
        self._lookups.flush()

    def drain_jobs(self) -> None:
        """Waits until no job reads or writes rows any more. Each has a deadline of its own."""
        for job in self._jobs.values():
            while not job.wait(PATIENCE_SECONDS):
                logger.warning("job %d is still going on after its deadline", job.what.job_id)

    def shutdown(self) -> None:
        """Closes the node, waits for what it still moves, and lets go of vLLM's memory.

        Raises `BusyError` if some of it may still be read or written: vLLM then keeps it.
        """
        deadline = self._config.shutdown_deadline_ms / 1000
        self._node.shutdown(deadline)
        self._region.deregister(deadline)

    def _refuse(self, what: TransferJob, error: Exception) -> None:
        logger.warning("job %d of %d blocks not started: %s", what.job_id, len(what.keys), error)
        if what.is_promotion:
            self._lookups.mark_missing(what.keys)
        self._refused.append(JobResult(what.job_id, success=False))

    def _result(self, job: _Job) -> JobResult:
        what = job.what
        del self._jobs[what.job_id]
        if not what.is_promotion:
            self._storing_bytes -= job.bytes
            stored = job.stored()
            return JobResult(what.job_id, success=stored, transfer_bytes=job.bytes if stored else 0)
        keys = list(what.keys)
        depth = job.depth()
        # Or the request would find them again, and wait for them, for ever.
        self._lookups.mark_missing(keys[depth:])
        return JobResult(
            what.job_id,
            success=depth == len(keys),
            successful_keys=keys[:depth] or None,
            transfer_bytes=depth * self._pages.block_bytes,
        )


@dataclass
class _Job:
    """A transfer between rows and the node."""

    what: TransferJob
    operation: kvfabric.Operation[Any]
    bytes: int

    def ended(self) -> bool:
        return self.wait(0.0)

    def wait(self, seconds: float) -> bool:
        """Whether the rows are free again; waits for that."""
        if not self.operation.done():
            if seconds == 0.0:
                return False
            try:
                self.operation.wait(seconds)
            except kvfabric.KvfabricError:
                if not self.operation.done():
                    return False
        if not self.what.is_promotion:
            return True
        report = self._report()
        return report is None or not report.unsettled or report.drained(seconds)

    def stored(self) -> bool:
        """Of a finished store: whether the node has all blocks."""
        report = self._report()
        return report is not None and report.refused + report.failed == 0

    def depth(self) -> int:
        """Of a finished load: how many blocks from the first are there."""
        report = self._report()
        return 0 if report is None else report.depth

    def _report(self) -> Any:
        try:
            return self.operation.wait(0.0)
        except kvfabric.KvfabricError as error:
            logger.debug("job %d: %s", self.what.job_id, error)
            return None


def _parse(settings: dict[str, Any]) -> ConnectorConfig:
    for key, why in USELESS.items():
        if key in settings:
            raise ConfigError(f"{key}: not for a secondary tier: {why}")
    return ConnectorConfig.parse(settings)


def _node_config(
    config: ConnectorConfig, engine: VllmConfig, offloading: OffloadingConfig, row_bytes: int
) -> dict[str, Any]:
    """The configuration of the tier's node. A row holds the bytes of all workers, so there is one
    node per replica.
    """
    if engine.lora_config is not None and not config.weights:
        raise ConfigError(
            'weights: a tier is not told which adapter a block belongs to; set "weights" to a name'
            " that changes whenever the model's weights or an adapter's do"
        )
    hash_name, seed = engines.hashing(engine)
    replica, replicas = engines.replica_of(engine)
    pod = engines.pod_name(config, offloading.engine_id, replica, replicas)
    tokens = offloading.groups[0].tokens_per_block * offloading.cache.blocks_per_chunk
    facts = engines.EngineFacts(
        block_tokens=tokens,
        hash_format=engines.hash_format(),
        hash_name=hash_name,
        hash_seed=seed,
        model=f"{config.model or engines.served_model(engine)}/offload",
        tensor_size=1,
        pod=f"{pod}/offload",
        replica=replica,
        replicas=replicas,
        produces=True,
        # vLLM's keys tell groups apart, and vLLM knows what each of them needs.
        groups=Groups(tokens),
    )
    # The engine's own events speak of tokens: they are none of this model's.
    others = {key: value for key, value in config.node.items() if key != "index"}
    made = engines.node_config(
        replace(config, node=others),
        facts,
        engine,
        rank=0,
        block_bytes=row_bytes,
        identity=engines.model_identity(
            config,
            engine,
            _layout(config, offloading, row_bytes),
            offloading.model.dtype,
            _kernels(engine),
        ),
        layers=sum(len(group.layer_names) for group in offloading.groups),
    )
    if "index" in config.node:
        made["index"] = dict(config.node["index"])
    return made


def _layout(config: ConnectorConfig, offloading: OffloadingConfig, row_bytes: int) -> str:
    """How the bytes of a row are arranged, as far as the engine tells."""
    parallel = asdict(offloading.parallel)
    # Which replica or worker wrote a row changes nothing about it.
    for number in ("rank", "data_parallel_index", "data_parallel_size", "data_parallel_rank_local"):
        parallel.pop(number, None)
    return json.dumps(
        {
            "kind": "vllm offloading rows",
            "layout": offloading.kv_cache_layout,
            "row_bytes": row_bytes,
            "groups": [asdict(group) for group in offloading.groups],
            "cache": asdict(offloading.cache),
            "parallel": parallel,
            "replicated": offloading.replicated_layout,
            "canonical": offloading.canonical_layout,
            # Counts beside a digest of the weights, too: it may stand for adapters, which the
            # digest does not cover.
            "named": config.weights,
        },
        sort_keys=True,
    )


def _kernels(engine: VllmConfig) -> list[str]:
    """What arranges the inside of a page: the scheduler knows no more of it than the device and
    what was asked for.
    """
    asked = engine.attention_config
    return [
        f"device {current_platform.get_device_name()}",
        f"asked {asked.backend} {asked.backend_per_kind}",
    ]
