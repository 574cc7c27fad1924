"""Where a request's blocks are: asked at the workers' nodes, without holding up the scheduler."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import kvfabric

from .metadata import Sources

# Nodes of other engines to which connections are kept.
PEERS_MAX = 1024
# A prefill engine whose blocks are not all there yet is asked again after so long, in seconds.
RETRY_SECONDS = 0.01
BLOCKS_MAX = 1 << 20


@dataclass(frozen=True)
class Handoff:
    """What a prefill engine said to its client for the decode engine: whom to ask for what."""

    pod: str
    # Peer services of its ranks, in order.
    addresses: tuple[str, ...]
    # Stands for everything that shapes the bytes of its blocks.
    model_identity: str
    # Blocks of the prompt that it computed.
    depth: int

    def to_params(self) -> dict[str, Any]:
        """What is put into ``kv_transfer_params``."""
        return {
            "version": 1,
            "pod": self.pod,
            "peer_addresses": list(self.addresses),
            "model_identity": self.model_identity,
            "depth": self.depth,
        }

    @classmethod
    def parse(cls, params: object, ranks: int, model_identity: str) -> Handoff:
        """Reads what a client sent along; raises `ValueError` that names what is wrong with it, as
        when the blocks are of another model than `model_identity`.
        """
        if not isinstance(params, Mapping):
            raise ValueError(f"kvfabric: {params!r} is no table of keys")
        if params.get("version") != 1:
            raise ValueError(f"kvfabric.version: {params.get('version')!r} is not 1")
        pod, addresses = params.get("pod"), params.get("peer_addresses")
        if not isinstance(pod, str) or not pod:
            raise ValueError(f"kvfabric.pod: {pod!r} is no name")
        if not isinstance(addresses, list) or not all(isinstance(one, str) for one in addresses):
            raise ValueError(f"kvfabric.peer_addresses: {addresses!r} is no list of addresses")
        if len(addresses) != ranks:
            raise ValueError(
                f"kvfabric.peer_addresses: {len(addresses)} ranks cannot hand off to {ranks}"
            )
        identity, depth = params.get("model_identity"), params.get("depth")
        if identity != model_identity:
            raise ValueError(f"kvfabric.model_identity: {identity!r} is not {model_identity!r}")
        if type(depth) is not int or not 0 <= depth <= BLOCKS_MAX:
            raise ValueError(f"kvfabric.depth: {depth!r} is not within 0..={BLOCKS_MAX}")
        return cls(pod, tuple(addresses), model_identity, depth)


@dataclass(frozen=True)
class Answer:
    """What one rank could have of a request's blocks, counted from the first."""

    depth: int = 0
    # How many its own tiers hold, and how many of those are in host memory and on disk.
    own: int = 0
    host: int = 0
    disk: int = 0
    sources: Sources = Sources()


class Peers:
    """Connections to peer services, of which the ones not used for longest are let go."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._services: OrderedDict[str, kvfabric.PeerService] = OrderedDict()

    def at(self, address: str) -> kvfabric.PeerService:
        """The service at this address; raises `KvfabricError` if it is no address."""
        service = self._services.get(address)
        if service is None:
            service = kvfabric.PeerService(address, deadline=self._deadline)
            self._services[address] = service
            if len(self._services) > PEERS_MAX:
                self._services.popitem(last=False)
        self._services.move_to_end(address)
        return service


class Lookup:
    """One question about one request, to each rank's node and to the prefill engine if there is
    one.
    """

    def __init__(
        self,
        peers: Peers,
        nodes: Sequence[str],
        names: bytes,
        blocks: int,
        handoff: Handoff | None,
        deadline: float,
    ) -> None:
        self._ends = time.monotonic() + deadline
        self.failures = 0
        self._ranks = [
            _RankLookup(self, peers, address, names, blocks, handoff, rank)
            for rank, address in enumerate(nodes)
        ]

    def left(self) -> float:
        """Seconds until the answers that are there must do."""
        return self._ends - time.monotonic()

    def poll(self) -> list[Answer] | None:
        """Each rank's answer, or None while some are awaited."""
        answers = [rank.poll() for rank in self._ranks]
        if any(answer is None for answer in answers):
            return None
        return [answer for answer in answers if answer is not None]


class _RankLookup:
    """The question to one rank: its own node, and the one that computed its share of blocks."""

    def __init__(
        self,
        lookup: Lookup,
        peers: Peers,
        address: str,
        names: bytes,
        blocks: int,
        handoff: Handoff | None,
        rank: int,
    ) -> None:
        self._lookup = lookup
        self._peers = peers
        self._names = names
        self._handoff = handoff
        self._rank = rank
        self._own = _Question(lookup, peers, address, names)
        self._remote: _Question | None = None
        # What the prefill engine promised of these blocks, and what it holds so far.
        self._promised = min(handoff.depth, blocks) if handoff else 0
        self._held = 0
        self._ask_at = 0.0

    def poll(self) -> Answer | None:
        own = self._own.poll()
        settled = self._poll_remote()
        if self._own.pending or not settled:
            return None
        answer = _answer(own)
        if self._handoff is None or self._held == 0:
            return answer
        holder = (
            self._handoff.pod if self._rank == 0 else f"{self._handoff.pod}/rank{self._rank}",
            self._held,
            self._handoff.addresses[self._rank],
        )
        others = tuple(other for other in answer.sources.holders if other[0] != holder[0])
        sources = Sources((holder, *others), answer.sources.shared)
        return replace(answer, depth=max(answer.depth, self._held), sources=sources)

    def _poll_remote(self) -> bool:
        """Asks until the prefill engine has stored what it promised; whether that is so, or is no
        longer waited for.
        """
        if self._handoff is None or self._held >= self._promised:
            return True
        if self._remote is None:
            if time.monotonic() < self._ask_at:
                return self._lookup.left() <= 0
            address = self._handoff.addresses[self._rank]
            self._remote = _Question(self._lookup, self._peers, address, self._names)
        reach = self._remote.poll()
        if self._remote.pending:
            return False
        self._remote = None
        self._ask_at = time.monotonic() + RETRY_SECONDS
        if reach is None:
            return True
        self._held = reach.own
        return self._held >= self._promised or self._lookup.left() <= 0


class _Question:
    """One call of a peer service, given up when the lookup's time is over."""

    def __init__(self, lookup: Lookup, peers: Peers, address: str, names: bytes) -> None:
        self._lookup = lookup
        self._operation: Any = None
        self._reach: kvfabric.Reach | None = None
        try:
            deadline = max(lookup.left(), 0.001)
            self._operation = peers.at(address).locate(names, deadline=deadline)
        except kvfabric.KvfabricError:
            lookup.failures += 1

    @property
    def pending(self) -> bool:
        return self._operation is not None

    def poll(self) -> kvfabric.Reach | None:
        """What was answered; None while that is awaited, and if there will be no answer."""
        if self._operation is None:
            return self._reach
        if self._operation.done():
            try:
                self._reach = self._operation.wait(0.0)
            except kvfabric.KvfabricError:
                self._lookup.failures += 1
            self._operation = None
        elif self._lookup.left() <= 0:
            self._lookup.failures += 1
            self._operation = None
        return self._reach


def _answer(reach: kvfabric.Reach | None) -> Answer:
    if reach is None:
        return Answer()
    holders = tuple(
        (pod, depth, address) for pod, depth, address in reach.holders if address is not None
    )
    shared = tuple((start, stop) for start, stop in reach.shared)
    return Answer(reach.depth, reach.own, reach.host, reach.disk, Sources(holders, shared))
