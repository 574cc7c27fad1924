"""Prepared lists and transfers, as their handles hold them."""

from __future__ import annotations

import threading
from typing import Callable, Dict, Literal, Optional, Sequence, Union

import numpy as np

import kvfabric

from ._constants import nixl_status_t, nixl_xfer_op_t
from ._errors import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlNoTelemetryError,
    nixlNotFoundError,
    nixlNotPostedError,
    nixlRepostActiveError,
    translated,
    translating,
)
from ._peers import Peer

RELEASE_SECONDS_MAX = 0.05
"""How long releasing a transfer in flight waits for its memory to be settled before it refuses."""

_Operation = Literal["read", "write"]

_OPERATIONS: Dict[nixl_xfer_op_t, _Operation] = {
    nixl_xfer_op_t.NIXL_READ: "read",
    nixl_xfer_op_t.NIXL_WRITE: "write",
}


class Side:
    """A prepared list: of this agent as the initiator, of this agent in place of a peer, or of a peer."""

    def __init__(self, prepared: kvfabric.Prepared, peer: Optional[Peer], is_target: bool) -> None:
        self.prepared = prepared
        self.peer = peer
        self.is_target = is_target
        self.is_released = False

    def positions(self, indices: Union[Sequence[int], np.ndarray], which: str) -> np.ndarray:
        """What `kvfabric.Agent.request` takes for these indices."""
        if isinstance(indices, np.ndarray) and indices.ndim != 1:
            raise ValueError("indices numpy array must be 1D")
        positions = np.ascontiguousarray(indices, np.int64)
        if positions.size == 0:
            raise nixlInvalidParamError(f"no {which} indices")
        outside = (positions < 0) | (positions >= len(self.prepared))
        if outside.any():
            at = int(np.argmax(outside))
            raise nixlInvalidParamError(
                f"{which} index {positions[at]} at position {at}: the list has {len(self.prepared)} descriptors"
            )
        return positions


class Transfer:
    """A transfer that can be posted any number of times. Safe to use from any thread."""

    def __init__(
        self,
        make: Callable[[Optional[bytes]], kvfabric.Transfer],
        peer: Optional[Peer],
        message: bytes,
        deliver: Callable[[bytes], None],
    ) -> None:
        """`make` makes the transfer with a notification. Without a peer there is nobody to deliver that to, so
        `deliver` is called with it once the bytes are there.
        """
        self._lock = threading.Lock()
        self._make = make
        self.peer = peer
        self._message = message
        self._deliver = deliver
        self._core: Optional[kvfabric.Transfer] = None
        self._failure: Optional[Exception] = None
        self._is_posted = False
        self._is_released = False
        # A message to this agent itself that is due when the bytes are there.
        self._due: Optional[bytes] = None
        try:
            self._core = self._made()
        except kvfabric.PeerLostError:
            # NIXL's callers expect to be told when they post, which connects anew.
            pass

    @property
    def is_connected(self) -> bool:
        """Whether its peer could be reached when it was made."""
        return self._core is not None

    def _made(self) -> kvfabric.Transfer:
        return self._make(self._message or None if self.peer else None)

    def post(self, message: bytes) -> nixl_status_t:
        """Starts it. A message replaces the one that was given before."""
        with self._lock:
            self._check_usable()
            if self._core is not None and self._core.state == "in_flight":
                raise nixlRepostActiveError("the transfer is in flight")
            if self.peer is not None and self.peer.is_forgotten:
                raise nixlNotFoundError(f"agent {self.peer.name!r} was removed")
            self._message = message or self._message
            self._is_posted = True
            self._failure = None
            try:
                if self._core is None:
                    self._core = self._made()
                self._core.post((message or None) if self.peer else None)
            except kvfabric.BusyError as error:
                settled = self._core is None or self._core.settled()
                kind = nixlBackendError if settled else nixlRepostActiveError
                self._failure = kind(error)
                raise self._failure from error
            except kvfabric.KvfabricError as error:
                self._failure = translated(error)
                raise self._failure from error
            self._due = self._message if self.peer is None and self._message else None
            return self._status()

    def status(self) -> nixl_status_t:
        """Where it stands; raises why it failed."""
        with self._lock:
            self._check_usable()
            if not self._is_posted:
                raise nixlNotPostedError("the transfer was never posted")
            return self._status()

    def _status(self) -> nixl_status_t:
        if self._failure is not None:
            raise type(self._failure)(self._failure.__cause__) from self._failure.__cause__
        assert self._core is not None, "a post that did not fail has a transfer"
        state, error = self._core.state, self._core.error
        if state == "in_flight":
            return nixl_status_t.NIXL_IN_PROG
        if error is not None:
            raise translated(error)
        self._deliver_due()
        return nixl_status_t.NIXL_SUCCESS

    def _deliver_due(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            self._deliver(due)

    def sweep(self) -> bool:
        """Delivers a message to this agent itself if the bytes are there; whether that is over."""
        with self._lock:
            if self._due is None or self._core is None:
                return True
            state = self._core.state
            if state == "done":
                self._deliver_due()
            return state != "in_flight"

    def telemetry(self) -> kvfabric.Telemetry:
        """How the last finished post went."""
        with self._lock:
            self._check_usable()
            if not self._is_posted:
                raise nixlNotPostedError("the transfer was never posted")
            is_finished = self._status() == nixl_status_t.NIXL_SUCCESS
            measured = self._core.telemetry if self._core and is_finished else None
            if measured is None:
                raise nixlNoTelemetryError("the transfer is not finished")
            return measured

    def release(self) -> None:
        """Cancels it if it is in flight. `nixlRepostActiveError` while bytes may still land: it stays valid then."""
        with self._lock:
            if self._is_released:
                return
            if self._core is not None:
                with translating():
                    self._core.cancel()
                    settled = self._core.settled(RELEASE_SECONDS_MAX)
                if not settled:
                    raise nixlRepostActiveError(
                        "bytes of the cancelled transfer may still land; release it again later"
                    )
            self._is_released = True
            self._core = None

    def _check_usable(self) -> None:
        if self._is_released:
            raise nixlInvalidParamError("the transfer was released")


def core_operation(operation: nixl_xfer_op_t) -> _Operation:
    """kvfabric's name of a direction."""
    return _OPERATIONS[operation]
