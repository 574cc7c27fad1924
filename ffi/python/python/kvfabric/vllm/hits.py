"""The deepest prefix of a request that can be had: of which every cache group has what it needs.

The first group is asked for the whole prompt. What the others need depends on the depth, so they
are asked for the deepest one first, and where a block is missing, for the deepest one that does not
need it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Callable, Optional, Tuple

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from .groups import Groups
from .handoff import Handoff
from .lookup import Answer, Lookup
from .metadata import Sources

# Depths that are tried; behind that many holes nothing is had.
DEPTHS_MAX = 8

# Asks where so many named blocks are, which a prefill engine may have promised; of the time for it,
# so many seconds are over.
Ask = Callable[[bytes, int, Optional[Handoff], float], Lookup]
# Names blocks of other groups than the first.
PackOthers = Callable[[Sequence[Tuple[int, int]]], bytes]


@dataclass(frozen=True)
class Hit:
    """What can be had of a request, counted from its first block."""

    depth: int
    # Each rank's answer about the first group's blocks.
    first: tuple[Answer, ...]
    # What the other groups need at this depth, and each rank's answer about that.
    needed: tuple[tuple[int, int], ...] = ()
    others: tuple[Answer, ...] = ()

    @property
    def kept(self) -> int:
        """Blocks from the first that every rank's own memory and disk hold for all groups."""
        kept = min((_kept(answer) for answer in self.first), default=0)
        if any(_kept(answer) < len(self.needed) for answer in self.others):
            return 0
        return min(kept, self.depth)

    def sources_of_others(
        self, wanted: Sequence[tuple[int, int]]
    ) -> tuple[int, tuple[Sources, ...]]:
        """Where `wanted` blocks of the other groups are, by rank, and the position of the first of
        them among what was asked for. The sources are empty when something else was asked for.
        """
        start = len(self.needed) - len(wanted)
        if start < 0 or list(self.needed[start:]) != list(wanted):
            return 0, tuple(Sources() for _ in self.first)
        return start, tuple(answer.sources for answer in self.others)

    def expected(self, local: int, tokens: int, block_tokens: int) -> dict[CacheHitSource, int]:
        """From where so many tokens behind `local` blocks are expected, by what was said of the
        first rank and group.
        """
        answer = self.first[0]
        own = min(tokens, max(0, answer.own - local) * block_tokens)
        disk = min(own, answer.disk * block_tokens)
        other = (
            CacheHitSource.P2P if answer.sources.holders else CacheHitSource.EXTERNAL_UNSPECIFIED
        )
        counts = {
            CacheHitSource.HOST: own - disk,
            CacheHitSource.DISK: disk,
            other: tokens - own,
        }
        return {source: count for source, count in counts.items() if count}


class PrefixLookup:
    """One question about one request, to each rank's node and to the prefill engine if there is
    one.
    """

    def __init__(
        self,
        ask: Ask,
        groups: Groups,
        names: bytes,
        blocks: int,
        pack_others: PackOthers,
        handoff: Handoff | None = None,
    ) -> None:
        """`names` are those of the first group's blocks, of which there are `blocks`."""
        self._ask = ask
        self._pack_others = pack_others
        self._groups = groups
        self._handoff = handoff
        self._begun = time.monotonic()
        self._asked: list[Lookup] = []
        self._blocks = blocks
        self._first = self._send(names, blocks, handoff)
        self._answers: list[Answer] | None = None
        self._depth = blocks
        self._needed: tuple[tuple[int, int], ...] = ()
        self._others: Lookup | None = None
        self._tried = 0
        # Most often all of the prompt is there, or nothing of it: both are known in one round.
        self._try(blocks)

    @property
    def failures(self) -> int:
        """Nodes that did not answer, or not in time."""
        return sum(lookup.failures for lookup in self._asked)

    def poll(self) -> Hit | None:
        """What can be had, or None while that is being asked."""
        if self._answers is None:
            self._answers = self._first.poll()
            if self._answers is None:
                return None
            depth = min((answer.depth for answer in self._answers), default=0)
            self._try(min(depth, self._blocks))
        first = tuple(self._answers)
        while self._others is not None:
            answers = self._others.poll()
            if answers is None:
                return None
            held = min((answer.depth for answer in answers), default=0)
            if held >= len(self._needed):
                return Hit(self._depth, first, self._needed, tuple(answers))
            self._try(self._needed[held][0])
        return Hit(self._depth, first)

    def _try(self, depth: int) -> None:
        """Asks what the other groups need at this depth, unless that is being asked already."""
        if self._others is not None and depth == self._depth:
            return
        self._depth, self._others = depth, None
        self._needed = tuple(self._groups.needed(depth))
        if not self._needed:
            return
        self._tried += 1
        if self._tried > DEPTHS_MAX:
            self._depth = 0
            return
        promised = self._handoff
        if promised is not None:
            held = sum(position < promised.depth for position, _ in self._needed)
            promised = replace(promised, depth=held)
        packed = self._pack_others(self._needed)
        self._others = self._send(packed, len(self._needed), promised)

    def _send(self, names: bytes, blocks: int, handoff: Handoff | None) -> Lookup:
        spent = time.monotonic() - self._begun
        self._asked.append(self._ask(names, blocks, handoff, spent))
        return self._asked[-1]


def _kept(answer: Answer) -> int:
    """Blocks from the first that a node's own memory and disk hold: the shared store may lose what
    it has.
    """
    return answer.own if answer.own == answer.host + answer.disk else 0
