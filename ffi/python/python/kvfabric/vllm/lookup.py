"""Where a request's blocks are: asked at the workers' nodes, without holding up the scheduler."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import kvfabric

from .handoff import Handoff
from .metadata import Sources

# Nodes of other engines to which connections are kept.
PEERS_MAX = 1024
# A prefill engine whose blocks are not all there yet is asked again after so long, in seconds: soon,
# because stores mostly take a few milliseconds, and then less and less often.
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.002, 0.032


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
        handoff_deadline: float,
    ) -> None:
        """Nodes may take `deadline` to answer; the prefill engine, `handoff_deadline` to have
        stored what it promised.
        """
        now = time.monotonic()
        self.ends, self.handoff_ends = now + deadline, now + handoff_deadline
        self.failures = 0
        self._ranks = [
            _RankLookup(self, peers, address, names, blocks, handoff, rank)
            for rank, address in enumerate(nodes)
        ]

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
        self._own = _Question(lookup, peers, address, names, lookup.ends)
        self._remote: _Question | None = None
        # What the prefill engine promised of these blocks, and what it holds so far.
        self._promised = min(handoff.depth, blocks) if handoff else 0
        self._held = 0
        self._ask_at = 0.0
        self._pause = RETRY_SECONDS_MIN

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
        ends = self._lookup.handoff_ends
        if self._remote is None:
            now = time.monotonic()
            if now >= ends or now < self._ask_at:
                return now >= ends
            address = self._handoff.addresses[self._rank]
            self._remote = _Question(self._lookup, self._peers, address, self._names, ends)
        reach = self._remote.poll()
        if self._remote.pending:
            return False
        self._remote = None
        self._ask_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS_MAX)
        if reach is None:
            return True
        self._held = reach.own
        return self._held >= self._promised or time.monotonic() >= ends


class _Question:
    """One call of a peer service, given up when its time is over."""

    def __init__(
        self, lookup: Lookup, peers: Peers, address: str, names: bytes, ends: float
    ) -> None:
        self._lookup = lookup
        self._ends = ends
        self._operation: Any = None
        self._reach: kvfabric.Reach | None = None
        try:
            deadline = max(ends - time.monotonic(), 0.001)
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
        elif time.monotonic() >= self._ends:
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
