"""The half of the connector in the engine's scheduler: decides what is fetched, stored, kept and
let go of.

It moves no bytes. It names blocks, asks the workers' nodes where they are, and tells the workers
what to do in the step that is about to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from . import plans
from .config import ConnectorConfig
from .engine import EngineFacts
from .handoff import AllowList, Handoff, NotAllowedError, new_pin, others_pin
from .hits import Hit, PrefixLookup
from .holds import Holds
from .lookup import Lookup, Peers
from .metadata import Handshake, Load, Pin, StepMetadata, Store, WorkerMetadata
from .names import AdapterDigests, RequestNames
from .partial import PromptNames, partial_tokens
from .releases import Releases
from .stats import ConnectorStats

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvfabric.scheduler")

PARAMS_KEY = "kvfabric"
DELIVERED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
# Refused hosts that are remembered, so that each is logged once.
REFUSED_MAX = 1024


class _Tracked:
    """What is known of one request between its arrival and its end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.names: RequestNames | None = None
        # The names of its prompt with the partial last block, which only a hand-off has.
        self.prompt_names: PromptNames | None = None
        self.adapter: Future[bytes] | None = None
        # Its blocks cannot be named, so it is left to the engine alone.
        self.unnamed = request.prompt_embeds is not None or request.resumable
        # A fetch that went wrong is not tried again: what is missing is computed.
        self.fetchable = True
        self.lookup: PrefixLookup | None = None
        self.hit: Hit | None = None
        # Blocks that the engine had itself when it was asked last.
        self.local = 0
        # Engine blocks that a load writes to; empty when none is in flight.
        self.loading: list[int] = []
        # Blocks from the first that were handed to the workers, or that their tiers hold.
        self.stored = 0
        # Stores, counted per rank, that still read the engine's memory.
        self.unsettled = 0
        # Another engine will ask for the blocks, the partial last one too, once it is stored.
        self.awaited = False
        self.stored_partial = False
        self.handoff: Handoff | None = None
        # The prefill engine still keeps the blocks for this request.
        self.kept = False


class SchedulerSide:
    """Decides for all ranks of one engine. Called from the engine's scheduling loop only."""

    def __init__(self, config: ConnectorConfig, facts: EngineFacts) -> None:
        self._config = config
        self._facts = facts
        self._offload = config.offload_for(facts.produces)
        self._peers = Peers(config.lookup_deadline_ms / 1000)
        self._allowed = AllowList(config.peers_allow)
        self._refused: set[str] = set()
        self._adapters = AdapterDigests()
        self._nodes: tuple[str, ...] = ()
        self._model_identity = ""
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        self._pins: list[Pin] = []
        self._releases: list[str] = []
        self._holds = Holds()
        self._clear = False
        # Ranks that have still to confirm that they cleared their tiers.
        self._clearing = 0
        self.stats = ConnectorStats()
        self._prefill_releases = Releases(self._peers, config.lookup_deadline_ms / 1000, self.stats)

    def connect(self, handshakes: Mapping[int, Handshake]) -> None:
        """Learns where each rank's node answers."""
        missing = sorted(set(range(self._facts.tensor_size)) - handshakes.keys())
        if missing:
            raise RuntimeError(f"kvfabric: ranks {missing} did not say where their nodes are")
        self._nodes = tuple(
            handshakes[rank].peer_address for rank in range(self._facts.tensor_size)
        )
        identities = {told.model_identity for told in handshakes.values()}
        if len(identities) != 1:
            raise RuntimeError(f"kvfabric: ranks of one model have identities {sorted(identities)}")
        (self._model_identity,) = identities

    def bind(self, pool: BlockPool) -> None:
        """Learns of the engine's blocks."""
        self._holds.bind(pool)

    # Requests come in.

    def track(self, request: Request) -> None:
        """A request arrived; it may bring along where its prefill was computed."""
        tracked = _Tracked(request)
        self._tracked[request.request_id] = tracked
        params = request.kv_transfer_params or {}
        tracked.awaited = bool(params.get("do_remote_decode"))
        if params.get("do_remote_prefill"):
            tracked.handoff = self._handed_off(request)
            tracked.kept = tracked.handoff is not None
        if request.lora_request is not None and not tracked.unnamed:
            tracked.adapter = self._adapters.digest(request.lora_request)

    def _handed_off(self, request: Request) -> Handoff | None:
        """What the request brings along from its prefill engine; None if it cannot be used."""
        params = request.kv_transfer_params or {}
        try:
            return Handoff.parse(
                params.get(PARAMS_KEY),
                len(self._nodes),
                self._model_identity,
                self._facts.block_tokens,
                self._allowed,
            )
        except NotAllowedError as error:
            self.stats.add("peers_refused")
            if error.host not in self._refused and len(self._refused) < REFUSED_MAX:
                self._refused.add(error.host)
                logger.warning("requests prefilled there are prefilled here again: %s", error)
        except ValueError as error:
            self.stats.add("handoffs_refused")
            logger.warning("request %s is prefilled here: %s", request.request_id, error)
        return None

    def matched(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens past the engine's own can be fetched; None while that is being asked."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.fetchable or self._clearing:
            return 0, False
        named = self._named(tracked)
        if named is None:
            return (0, False) if tracked.unnamed else (None, False)
        size = self._facts.block_tokens
        tracked.local = local_tokens // size
        names, total = self._wanted(tracked, named)
        most = min(total * size, request.num_tokens) - tracked.local * size
        if not self._worth_it(most):
            return 0, False
        if tracked.hit is None:
            tracked.hit = self._ask(tracked, names, named, total)
            if tracked.hit is None:
                return None, False
        found = min(tracked.hit.depth * size, request.num_tokens) - tracked.local * size
        if not self._worth_it(found):
            return 0, False
        return found, True

    def _worth_it(self, tokens: int) -> bool:
        return tokens > 0 and tokens >= self._config.min_fetch_tokens

    def _wanted(
        self, tracked: _Tracked, named: RequestNames
    ) -> tuple[RequestNames | PromptNames, int]:
        """Whose names of how many blocks are asked for: full ones, and of a hand-off the prompt's
        partial last one.
        """
        request, size = tracked.request, self._facts.block_tokens
        handoff = tracked.handoff
        if (
            handoff is not None
            and self._facts.groups.is_plain
            and request.num_tokens == request.num_prompt_tokens == handoff.tokens
            and partial_tokens(request, size)
        ):
            prompt = self._prompt_names(tracked)
            return prompt, len(prompt)
        most = self._facts.groups.claimable(request.num_tokens)
        return named, min(len(request.block_hashes), most)

    def _prompt_names(self, tracked: _Tracked) -> PromptNames:
        if tracked.prompt_names is None:
            digest = tracked.adapter.result() if tracked.adapter is not None else None
            tracked.prompt_names = PromptNames(self._config, self._facts, tracked.request, digest)
        return tracked.prompt_names

    def _ask(
        self,
        tracked: _Tracked,
        names: RequestNames | PromptNames,
        named: RequestNames,
        total: int,
    ) -> Hit | None:
        if tracked.lookup is None:
            tracked.lookup = PrefixLookup(
                self._lookup,
                self._facts.groups,
                names.pack(0, total),
                total,
                named.pack_others,
                tracked.handoff,
            )
            self.stats.add("lookups")
        hit = tracked.lookup.poll()
        if hit is not None:
            self.stats.add("lookups_failed", tracked.lookup.failures)
            tracked.lookup = None
            # What its own tiers hold needs no second store.
            full = tracked.request.num_tokens // self._facts.block_tokens
            tracked.stored = min(full, hit.kept)
        return hit

    def _lookup(self, names: bytes, blocks: int, handoff: Handoff | None, spent: float) -> Lookup:
        config = self._config
        return Lookup(
            self._peers,
            self._nodes,
            names,
            blocks,
            handoff,
            config.lookup_deadline_ms / 1000 - spent,
            config.handoff_deadline_ms / 1000 - spent,
        )

    def _named(self, tracked: _Tracked) -> RequestNames | None:
        """The request's names; None while its adapter is being read, and if it has none."""
        if tracked.unnamed or tracked.names is not None:
            return tracked.names
        digest = None
        if tracked.adapter is not None:
            if not tracked.adapter.done():
                return None
            error = tracked.adapter.exception()
            if error is not None:
                logger.warning("an adapter's requests are neither offloaded nor fetched: %s", error)
                self.stats.add("adapters_unreadable")
                tracked.unnamed = True
                return None
            digest = tracked.adapter.result()
        tracked.names = RequestNames(
            self._config, self._facts, tracked.request, digest, self._model_identity
        )
        return tracked.names

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """The engine reserved blocks for what is to be fetched."""
        tracked = self._tracked.get(request.request_id)
        if external_tokens == 0 or tracked is None:
            return
        assert tracked.names is not None and tracked.hit is not None
        names, _ = self._wanted(tracked, tracked.names)
        stop = tracked.local - (-external_tokens // self._facts.block_tokens)
        planned = plans.loads(
            request.request_id,
            tracked.hit,
            self._facts.groups,
            names,
            tracked.names,
            blocks.get_block_ids(),
            tracked.local,
            stop,
        )
        tracked.loading = [number for load in planned for number in load.block_ids]
        self._loads += planned

    def hit_sources(self, request: Request, external_tokens: int) -> dict[CacheHitSource, int]:
        """From where a load's tokens are expected, by what the lookup said of the first rank."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.hit is None or external_tokens == 0:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: external_tokens} if external_tokens else {}
        return tracked.hit.expected(tracked.local, external_tokens, self._facts.block_tokens)

    # Steps go out.

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """What the workers do in the step that is about to run."""
        preempted = set(output.preempted_req_ids or ())
        for request_id in preempted:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                # The workers wait for its stores before the step, and it starts over later.
                tracked.lookup = tracked.hit = None
        for request_id in output.num_scheduled_tokens:
            # It computes what is left, so its fetch is over.
            self._let_go(self._tracked.get(request_id))
        self._prefill_releases.poll()
        metadata = StepMetadata(
            preempted=preempted,
            clear=self._clear,
            loads=self._loads,
            stores=self._stores(output),
            pins=self._pins,
            releases=self._releases,
        )
        self._loads, self._pins, self._releases, self._clear = [], [], [], False
        return metadata

    def _stores(self, output: SchedulerOutput) -> list[Store]:
        stores: list[Store] = []
        if self._clearing:
            return stores
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            stop = self._storable(tracked, scheduled)
            partial = self._completes_partial(tracked, scheduled)
            named = self._named(tracked) if stop > tracked.stored or partial else None
            if named is None:
                continue
            assert output.kv_connector_block_state is not None
            tables = output.kv_connector_block_state.get_block_ids(request_id) or ()
            length = min((len(table) for table in tables), default=0)
            stop = min(stop, length)
            partial = partial and stop < length
            start, tracked.stored = tracked.stored, max(tracked.stored, stop)
            stop = tracked.stored + partial
            if stop <= start:
                continue
            tracked.stored_partial = tracked.stored_partial or partial
            names = self._prompt_names(tracked) if partial else named
            planned = plans.stores(
                request_id,
                self._facts.groups,
                names,
                named,
                tables,
                start,
                stop,
                tracked.awaited,
            )
            readers = self._facts.tensor_size * len(planned)
            tracked.unsettled += readers
            if self._facts.groups.has_windows:
                read = [number for store in planned for number in store.block_ids]
                self._holds.hold(request_id, read, readers)
            stores += planned
        return stores

    def _storable(self, tracked: _Tracked, scheduled: int) -> int:
        """How many blocks from the first are complete after the step and to be kept."""
        if self._offload == "none" and not tracked.awaited:
            return 0
        request = tracked.request
        tokens = request.num_computed_tokens + scheduled
        if self._offload != "all":
            tokens = min(tokens, request.num_prompt_tokens)
        return min(tokens // self._facts.block_tokens, len(request.block_hashes))

    def _completes_partial(self, tracked: _Tracked, scheduled: int) -> bool:
        """Whether the step computes the end of a prompt that another engine waits for, and that
        ends within a block. Nothing is written there afterwards but what comes after the prompt.
        """
        request = tracked.request
        return (
            tracked.awaited
            and self._facts.groups.is_plain
            and not tracked.stored_partial
            and request.num_computed_tokens + scheduled >= request.num_prompt_tokens
            and request.num_computed_tokens < request.num_prompt_tokens
            and partial_tokens(request, self._facts.block_tokens) > 0
        )

    # Reports come back.

    def reported(self, output: KVConnectorOutput) -> None:
        """What the workers did in a step."""
        failed = set(output.invalid_block_ids or ())
        for loading in self._tracked.values() if failed else ():
            if failed.intersection(loading.loading):
                loading.fetchable = False
        for request_id in output.failed_recving:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.fetchable = False
        for request_id in output.finished_recving or ():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                tracked.loading = []
        told = output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            for request_id, count in told.settled.items():
                self._holds.settle(request_id, count)
                tracked = self._tracked.get(request_id)
                if tracked is not None:
                    tracked.unsettled -= count
            self._clearing = max(0, self._clearing - told.cleared)

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """A request ended: whether its blocks are still being read, and what its client is told."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False, None
        self._let_go(tracked)
        params = self._hand_off(tracked)
        # A request that waits for a load has no store in flight: they were waited for when it was
        # preempted, and the engine itself keeps its blocks until the load is over.
        keep = tracked.unsettled > 0 and not tracked.loading
        if keep:
            self._releases.append(request.request_id)
        return keep, params

    def _let_go(self, tracked: _Tracked | None) -> None:
        """Tells the prefill engine that its blocks are not needed any more."""
        if tracked is not None and tracked.kept and tracked.handoff is not None:
            tracked.kept = False
            self._prefill_releases.send(tracked.handoff)
            if self._facts.groups.others:
                pin = others_pin(tracked.handoff.pin)
                self._prefill_releases.send(replace(tracked.handoff, pin=pin))

    def _hand_off(self, tracked: _Tracked) -> dict[str, Any] | None:
        request = tracked.request
        if not tracked.awaited or request.status not in DELIVERED or tracked.names is None:
            return None
        size = self._facts.block_tokens
        full = request.num_prompt_tokens // size
        depth, tokens = min(tracked.stored, full), min(tracked.stored, full) * size
        names: RequestNames | PromptNames = tracked.names
        if tracked.stored_partial and depth == full:
            names, depth, tokens = self._prompt_names(tracked), full + 1, request.num_prompt_tokens
        if depth == 0:
            return None
        handoff = Handoff(
            self._facts.pod, self._nodes, self._model_identity, depth, tokens, new_pin()
        )
        self._pins.append(Pin(request.request_id, names.pack(0, depth), handoff.pin))
        # A decode engine may claim a block less than that.
        others = self._facts.groups.needed(depth, slack=1)
        if others:
            packed = tracked.names.pack_others(others)
            self._pins.append(Pin(request.request_id, packed, others_pin(handoff.pin)))
        self.stats.add("handoffs")
        host, _, port = self._nodes[0].rpartition(":")
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            PARAMS_KEY: handoff.to_params(),
            # For routers that log or check where a prefill ran; the decode engine reads only what
            # is above.
            "remote_engine_id": self._facts.pod,
            "remote_request_id": request.request_id,
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": self._facts.tensor_size,
        }

    # The engine's life.

    def reset(self) -> bool:
        """Has the workers forget what their nodes' own tiers hold; nothing is fetched or stored
        until they have.
        """
        self._clear = True
        self._clearing = self._facts.tensor_size
        for tracked in self._tracked.values():
            tracked.lookup = tracked.hit = None
        return True

    def has_work(self) -> bool:
        """Whether a step must run although no request needs one."""
        return self._clear or bool(self._clearing)

    def shutdown(self) -> None:
        """Ends its thread. Stores and fetches are the workers' to finish."""
        self._adapters.shutdown()
