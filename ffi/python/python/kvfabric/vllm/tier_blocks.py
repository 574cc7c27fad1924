"""How a secondary tier names blocks, and what it remembers of the answers about them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import kvfabric
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadKey

logger = init_logger("vllm.kvfabric.tier")

# Of one lookup, as many holes are looked behind; what is behind further ones counts as missing.
# Prefixes end at the first hole, only sliding windows look further.
HOLES_MAX = 8


class Namer:
    """Names blocks by vLLM's keys: the engine's hash, which covers all blocks before it, and the
    cache group's number.

    Engines whose blocks differ meet in one index, so what shapes the bytes is in the keys there,
    too.
    """

    def __init__(self, node: kvfabric.Node, identity: str) -> None:
        self._node = node
        self._identity = identity.encode()

    def prefix(self, keys: Collection[OffloadKey]) -> kvfabric.Prefix:
        """The blocks of these keys, in order."""
        hashes = [hashlib.sha256(b"vllm offload key " + key).digest() for key in keys]
        return self._node.prefix_of(kvfabric.pack_hashes(self._identity, hashes))


@dataclass
class _Verdict:
    """Whether a block can be had, as long as a request that asked is there."""

    # None until the node has answered.
    found: bool | None = None
    asked_by: set[str] = field(default_factory=set)


@dataclass
class _Asking:
    """One question to the node: how many of these blocks it could get, from the first on."""

    keys: Sequence[OffloadKey]
    operation: kvfabric.Operation[kvfabric.Reach]
    holes: int


class Lookups:
    """Asks the node for all blocks that one request looks up in one step at once, and remembers its
    answers.

    A request's answers stay the same until it is finished: the scheduler counts on what it was
    told.
    """

    def __init__(self, node: kvfabric.Node, namer: Namer, deadline: float) -> None:
        self._node = node
        self._namer = namer
        self._deadline = deadline
        self._verdicts: dict[OffloadKey, _Verdict] = {}
        self._keys_of: dict[str, set[OffloadKey]] = {}
        self._wanted: dict[str, list[OffloadKey]] = {}
        self._asking: list[_Asking] = []

    def ask(self, key: OffloadKey, request: str) -> bool | None:
        """Whether the block can be had; None until that is known."""
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = _Verdict()
            self._wanted.setdefault(request, []).append(key)
        verdict.asked_by.add(request)
        self._keys_of.setdefault(request, set()).add(key)
        return verdict.found

    def flush(self) -> None:
        """Sends what was asked since the last time."""
        self.collect()
        wanted, self._wanted = self._wanted, {}
        for keys in wanted.values():
            self._send(keys, 0)

    def collect(self) -> None:
        """Takes the answers that have arrived."""
        arrived = [asking for asking in self._asking if asking.operation.done()]
        if not arrived:
            return
        self._asking = [asking for asking in self._asking if not asking.operation.done()]
        for asking in arrived:
            try:
                depth = min(asking.operation.wait(0.0).depth, len(asking.keys))
            except kvfabric.KvfabricError as error:
                logger.debug("lookup of %d blocks: %s", len(asking.keys), error)
                self._decide(asking.keys, found=False)
                continue
            self._decide(asking.keys[:depth], found=True)
            self._decide(asking.keys[depth : depth + 1], found=False)
            self._send(asking.keys[depth + 1 :], asking.holes + 1)

    def mark_missing(self, keys: Iterable[OffloadKey]) -> None:
        """From now on these cannot be had, whatever the node said."""
        for key in keys:
            verdict = self._verdicts.get(key)
            if verdict is not None:
                verdict.found = False

    def forget(self, request: str) -> None:
        """The request is finished."""
        self._wanted.pop(request, None)
        for key in self._keys_of.pop(request, ()):
            verdict = self._verdicts[key]
            verdict.asked_by.discard(request)
            if not verdict.asked_by:
                del self._verdicts[key]

    def _send(self, keys: Sequence[OffloadKey], holes: int) -> None:
        if not keys:
            return
        if holes > HOLES_MAX:
            self._decide(keys, found=False)
            return
        try:
            operation = self._node.locate(self._namer.prefix(keys), deadline=self._deadline)
        except kvfabric.KvfabricError as error:
            logger.debug("lookup of %d blocks: %s", len(keys), error)
            self._decide(keys, found=False)
            return
        self._asking.append(_Asking(keys, operation, holes))

    def _decide(self, keys: Iterable[OffloadKey], *, found: bool) -> None:
        for key in keys:
            verdict = self._verdicts.get(key)
            if verdict is not None and verdict.found is None:
                verdict.found = found
