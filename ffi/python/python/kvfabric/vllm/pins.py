"""Prefixes that a prefill engine keeps for a decode engine, from the end of their request on.

A decode engine fetches soon, and lets go of the pin then; or never, so each has a time to live. Its
number is chosen before it is asked for, by the scheduler that tells the client of it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import kvfabric
from vllm.logger import init_logger

from .metadata import Pin
from .stats import ConnectorStats

logger = init_logger("vllm.kvfabric.pins")

# Pins in force that are remembered; the node has a limit of its own for what they keep.
PINS_MAX = 4096


class Pins:
    """The pins of one rank's node."""

    def __init__(self, ttl: float, stats: ConnectorStats) -> None:
        self._ttl = ttl
        self._stats = stats
        self._waiting: deque[Pin] = deque()
        self._asked: deque[Any] = deque()
        # What is pinned, by the time at which that ends by itself.
        self._held: deque[tuple[float, int]] = deque()

    def add(self, pins: list[Pin]) -> None:
        """Pins these as soon as their requests' stores are done."""
        self._waiting.extend(pins)

    def poll(self, node: kvfabric.Node, busy: set[str]) -> None:
        """Asks for the pins of requests that have no store in flight, and learns what became of
        others.
        """
        for _ in range(len(self._waiting)):
            pin = self._waiting.popleft()
            if pin.request_id in busy:
                self._waiting.append(pin)
                continue
            try:
                prefix = node.prefix_of(pin.names)
                self._asked.append(node.pin(prefix, ttl=self._ttl, id=pin.pin))
            except kvfabric.KvfabricError as error:
                self._failed(error)
        while self._asked and self._asked[0].done():
            self._learn(self._asked.popleft())

    def drop(self, node: kvfabric.Node) -> None:
        """Lets go of all pins; what was asked for is awaited, so that none is left in force."""
        self._waiting.clear()
        while self._asked:
            self._learn(self._asked.popleft())
        while self._held:
            node.unpin(self._held.popleft()[1]).wait()

    def _learn(self, asked: Any) -> None:
        try:
            pinned = asked.wait()
        except kvfabric.KvfabricError as error:
            self._failed(error)
            return
        now = time.monotonic()
        while self._held and (self._held[0][0] <= now or len(self._held) >= PINS_MAX):
            self._held.popleft()
        if pinned.depth > 0:
            self._held.append((now + self._ttl, pinned.id))
        else:
            self._stats.add("pins_failed")

    def _failed(self, error: kvfabric.KvfabricError) -> None:
        logger.warning("keeping a prefix for a decode engine: %s", error)
        self._stats.add("pins_failed")
