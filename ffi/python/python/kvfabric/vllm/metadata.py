"""What the scheduler's half of the connector and the workers' halves tell each other.

All of it is pickled by the engine on its way, so it is plain data: blocks go by packed names and by
the engine's block numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True)
class Handshake(KVConnectorHandshakeMetadata):
    """Where one rank's node answers."""

    pod: str
    peer_address: str
    model_identity: str


@dataclass(frozen=True)
class Sources:
    """Where blocks may be had besides a node's own tiers: pods with their depth and address, and
    runs of shared objects.
    """

    holders: tuple[tuple[str, int, str], ...] = ()
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Load:
    """Blocks ``first..first + len(block_ids)`` of a named run, to be fetched into the engine's
    blocks.
    """

    request_id: str
    names: bytes
    first: int
    block_ids: list[int]
    # By rank.
    sources: tuple[Sources, ...]


@dataclass(frozen=True)
class Store:
    """A named run of blocks that the step about to run completes, to be copied out of the engine's
    blocks.
    """

    request_id: str
    names: bytes
    block_ids: list[int]
    # Another engine waits for these blocks: they wait for room instead of being skipped.
    awaited: bool


@dataclass(frozen=True)
class Pin:
    """A named run of blocks to be kept for a decode engine, as soon as the request's stores are
    done.
    """

    request_id: str
    names: bytes
    # The number by which whoever knows it lets go of them.
    pin: int


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the workers do in one step, in the order of the fields."""

    # Requests whose blocks the engine is about to give to others.
    preempted: set[str] = field(default_factory=set)
    # Forget what the node's own tiers hold.
    clear: bool = False
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    # Finished requests whose blocks the engine keeps until their stores are reported done.
    releases: list[str] = field(default_factory=list)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """What the workers did: summed over the ranks."""

    # Stores that no longer read the engine's memory, by request.
    settled: dict[str, int] = field(default_factory=dict)
    # Ranks that have cleared their tiers.
    cleared: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Adds what another rank did."""
        assert isinstance(other, WorkerMetadata)
        for request_id, count in other.settled.items():
            self.settled[request_id] = self.settled.get(request_id, 0) + count
        self.cleared += other.cleared
        return self
