"""What the connector counts, and how it reaches the engine's log and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

PREFIX = "vllm:kvfabric_"
SOURCES = ("dram", "nvme", "peer", "object", "miss")
# Counters without a label: name and meaning.
COUNTERS = {
    "stored_blocks": "Blocks copied out of the engine into the tiers.",
    "held_blocks": "Blocks that were to be stored and were in the tiers already.",
    "refused_blocks": "Blocks that the tiers did not take, for want of room or time.",
    "store_failed_blocks": "Blocks whose copy into the tiers failed.",
    "skipped_blocks": "Blocks not offloaded because too many bytes were on their way.",
    "stored_bytes": "Bytes copied out of the engine into the tiers.",
    "store_seconds": "Seconds from handing a store to the node until it was done.",
    "fetched_bytes": "Bytes brought into the engine, verified.",
    "fetch_seconds": "Seconds from handing a fetch to the node until it was done.",
    "fetches": "Fetches, one per request and rank.",
    "fetches_failed": "Fetches that did not bring every block; the engine computes the rest.",
    "fetches_unsettled": "Fetches whose blocks were withheld until nothing wrote to them.",
    "pins_failed": "Handed-off prefixes that were not kept: no room, or fetched before.",
    "lookups": "Questions where the blocks of a request are.",
    "lookups_failed": "Nodes that did not answer such a question, or not in time.",
    "handoffs": "Prefixes offered to a decode engine.",
    "handoffs_refused": "Requests whose kv_transfer_params came from no matching prefill engine.",
    "peers_refused": "Requests whose kv_transfer_params named an address outside of peers_allow.",
    "releases_failed": "Prefill engines that were not told that their blocks were fetched.",
    "adapters_unreadable": "Requests of adapters with unreadable files: not stored, not fetched.",
}
FETCHED = "fetched_blocks"


class ConnectorStats(KVConnectorStats):
    """Counters of one interval: sums, so that ranks and steps add up."""

    def add(self, name: str, count: float = 1) -> None:
        """Counts one of `COUNTERS`."""
        if count:
            self.data[name] = self.data.get(name, 0) + count

    def add_sources(self, sources: list[str]) -> None:
        """Counts where each block of a fetch came from."""
        for source in sources:
            self.add(f"{FETCHED}_{source}")

    def reset(self) -> None:
        """Begins a new interval."""
        self.data = {}

    def take(self) -> ConnectorStats | None:
        """What was counted since the last time; None for nothing."""
        if self.is_empty():
            return None
        taken = ConnectorStats(data=self.data)
        self.data = {}
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds what others counted."""
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval's counters, for the engine's log."""
        return {
            name: round(count, 6) if isinstance(count, float) else count
            for name, count in sorted(self.data.items())
        }

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class ConnectorPromMetrics(KVConnectorPromMetrics):
    """The same counters on the engine's ``/metrics``, with its labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter(name, meaning, labelnames, per_engine_labelvalues)
            for name, meaning in COUNTERS.items()
        }
        fetched = self._counter_cls(
            name=PREFIX + FETCHED,
            documentation="Blocks of fetches, by where they came from; a miss is computed.",
            labelnames=[*labelnames, "source"],
        )
        for source in SOURCES:
            labelvalues = {
                engine: [*values, source] for engine, values in per_engine_labelvalues.items()
            }
            self._counters[f"{FETCHED}_{source}"] = create_metric_per_engine(fetched, labelvalues)

    def _counter(
        self,
        name: str,
        meaning: str,
        labelnames: list[str],
        labelvalues: dict[int, list[object]],
    ) -> dict[int, Any]:
        counter = self._counter_cls(
            name=PREFIX + name, documentation=meaning, labelnames=labelnames
        )
        return create_metric_per_engine(counter, labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval's counters."""
        for name, count in transfer_stats_data.items():
            counter = self._counters.get(name)
            if counter is not None:
                counter[engine_idx].inc(count)
