"""The other agents that an agent knows."""

from __future__ import annotations

import threading
from typing import Dict

import kvfabric

from ._card import Card
from ._errors import (
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotFoundError,
    nixlRemoteDisconnectError,
    translating,
)
from ._logging import logger
from ._memory import Ranges


class Peer:
    """Another agent, as it was loaded. Loading it again changes what it exports; forgetting it ends it."""

    def __init__(self, name: str, core: kvfabric.Peer, ranges: Ranges) -> None:
        self.name = name
        self.core = core
        self.ranges = ranges
        self.is_forgotten = False
        self._is_explained = False

    def explain(self) -> None:
        """Says once, in the log, which way bytes to it go, and why not another: a slow one should not be a surprise."""
        if not self._is_explained:
            self._is_explained = True
            with translating():
                logger.info("agent %s is reached by %s", self.name, self.core.explain_path())

    def connect(self) -> None:
        """Connects; `nixlRemoteDisconnectError` says why it cannot."""
        with translating():
            if self.core.path is None:
                raise nixlRemoteDisconnectError(f"agent {self.name!r}: {self.core.explain_path()}")
        self.explain()


class Peers:
    """The peers of the agent with this name. Safe to use from any thread."""

    def __init__(self, own_name: str) -> None:
        self._own_name = own_name
        self._lock = threading.Lock()
        self._known: Dict[str, Peer] = {}

    def load(self, core: kvfabric.Agent, card: Card) -> str:
        """Learns of a peer, or what is new about it, and returns its name. On an error what was known of it stays."""
        if card.name == self._own_name:
            raise nixlInvalidParamError(
                f"the metadata is of an agent with this one's name, {card.name!r}"
            )
        ranges = Ranges(card.ranges, f"agent {card.name!r}")
        with self._lock, translating():
            loaded = core.load_peer(card.inner)
            if loaded.name != card.name:
                raise nixlMismatchError(
                    f"metadata of agent {loaded.name!r} says it is {card.name!r}"
                )
            known = self._known.get(card.name)
            if known is None:
                self._known[card.name] = Peer(card.name, loaded, ranges)
            else:
                known.core, known.ranges = loaded, ranges
        return card.name

    def find(self, name: str) -> Peer:
        """The peer of this name; `nixlNotFoundError` if it was not loaded."""
        with self._lock:
            peer = self._known.get(name)
        if peer is None:
            raise nixlNotFoundError(f"agent {name!r} is not loaded: add_remote_agent first")
        return peer

    def forget(self, name: str) -> None:
        """Ends the connections to a peer, if there is one of this name."""
        with self._lock:
            peer = self._known.pop(name, None)
        if peer is not None:
            peer.is_forgotten = True
            with translating():
                peer.core.forget()
