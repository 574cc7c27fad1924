"""Tells prefill engines that what they keep for a decode engine has been fetched.

Nothing depends on it but their memory: what is not released ends by itself.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import kvfabric
from vllm.logger import init_logger

from .handoff import Handoff
from .stats import ConnectorStats

if TYPE_CHECKING:
    from .lookup import Peers

logger = init_logger("vllm.kvfabric.releases")

# Answers that are awaited at once; the oldest is done without when there are more.
ANSWERS_MAX = 1024


class Releases:
    """The releases that one engine sends. Called from its scheduling loop; never waits."""

    def __init__(self, peers: Peers, deadline: float, stats: ConnectorStats) -> None:
        self._peers = peers
        self._deadline = deadline
        self._stats = stats
        self._asked: deque[Any] = deque()

    def send(self, handoff: Handoff) -> None:
        """Has each rank of the prefill engine let go of the handed-off blocks."""
        self.poll()
        for address in handoff.addresses:
            try:
                service = self._peers.at(address)
                asked = service.unpin(handoff.pin, handoff.model_identity, deadline=self._deadline)
            except kvfabric.KvfabricError as error:
                self._failed(error)
                continue
            if len(self._asked) >= ANSWERS_MAX:
                self._asked.popleft()
            self._asked.append(asked)

    def poll(self) -> None:
        """Learns what became of earlier ones."""
        while self._asked and self._asked[0].done():
            try:
                self._asked.popleft().wait(0.0)
            except kvfabric.KvfabricError as error:
                self._failed(error)

    def _failed(self, error: kvfabric.KvfabricError) -> None:
        logger.debug("a prefill engine keeps a prefix for longer than needed: %s", error)
        self._stats.add("releases_failed")
