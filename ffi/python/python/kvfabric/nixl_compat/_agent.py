"""The agent of NIXL's bindings, over one of kvfabric."""

from __future__ import annotations

import threading
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

import numpy as np

import kvfabric

from ._agent_config import nixlAgentConfig
from ._card import Card
from ._constants import (
    NIXL_INIT_AGENT,
    nixl_mem_t,
    nixl_status_t,
    nixl_xfer_op_t,
)
from ._errors import (
    nixlInvalidParamError,
    nixlNoTelemetryError,
    nixlNotFoundError,
    nixlNotSupportedError,
    translated,
    translating,
)
from ._lists import nixlRegDList, nixlXferDList, rows_of
from ._logging import logger
from ._memory import Ranges
from ._peers import Peers
from ._registry import Registry
from ._settings import BACKEND, BACKEND_MEMORY, BACKEND_PARAMS, Settings
from ._telemetry import nixlXferTelemetry
from ._transfer import Side, Transfer, core_operation

NOTIFY_SECONDS_MAX = 0.05
"""How long sending a notification waits for the peer to take it. It is on its way by then, and goes on."""

_Name = Union[str, bytes]
_Message = Union[str, bytes]
_L = TypeVar("_L", nixlRegDList, nixlXferDList)
_BACKEND_HANDLE = 1
_NO_SERVER = "kvfabric has no metadata server: pass the agent's metadata along yourself"


class nixlAgent:
    """Moves bytes between registered memory of this process and its peers. Safe to use from any thread."""

    def __init__(self, name: str, config: Optional[nixlAgentConfig] = None) -> None:
        config = config or nixlAgentConfig()
        if config.useListenThread:
            raise nixlNotSupportedError(f"there is no listener thread: {_NO_SERVER}")
        self._name = name
        self._has_telemetry = config.captureTelemetry
        self._core: Optional[kvfabric.Agent] = None
        self._deadline = 0.0
        self._own = Registry(f"agent {name!r}")
        self._lock = threading.Lock()
        self._peers = Peers(name)
        # Messages to itself, and transfers within this agent that have one to deliver.
        self._letters: List[bytes] = []
        self._delivering: List[Transfer] = []

    # Backends.

    def getAvailPlugins(self) -> List[str]:
        """The names of the backends that can be created."""
        return [BACKEND]

    def getPluginParams(self, plugin: str) -> Tuple[Dict[str, str], List[str]]:
        """A backend's parameters with their defaults, and the kinds of memory that it moves."""
        _check_backend(plugin)
        return dict(BACKEND_PARAMS), list(BACKEND_MEMORY)

    def createBackend(self, backend: str, params: Mapping[str, str]) -> int:
        """Starts the backend; the handle is for the calls that limit themselves to some backends."""
        _check_backend(backend)
        settings = Settings.of(params)
        with self._lock:
            if self._core is not None:
                raise nixlInvalidParamError(f"backend {backend} was created before")
            with translating():
                self._core = kvfabric.Agent(
                    self._name,
                    shm=settings.shm,
                    cma=settings.cma,
                    tcp=settings.listen,
                    tcp_advertise=settings.advertise,
                )
            self._deadline = settings.deadline
        return _BACKEND_HANDLE

    def getBackendParams(self, backend: int) -> Tuple[Dict[str, str], List[str]]:
        """As :meth:`getPluginParams`, for a backend that was created."""
        self._started([backend])
        return dict(BACKEND_PARAMS), list(BACKEND_MEMORY)

    def _started(self, backends: Sequence[int] = ()) -> kvfabric.Agent:
        for backend in backends:
            if backend != _BACKEND_HANDLE:
                raise nixlInvalidParamError(f"no backend has the handle {backend}")
        if self._core is None:
            raise nixlNotFoundError(
                f"agent {self._name!r} has no backend: create_backend({BACKEND!r}) first"
            )
        return self._core

    # Memory.

    def registerMem(
        self, descs: Optional[nixlRegDList], backends: Sequence[int] = ()
    ) -> nixl_status_t:
        """Registers memory, which must stay mapped until it is deregistered. Peers may read and write it."""
        self._own.register(self._started(backends), _list(descs, nixlRegDList))
        return nixl_status_t.NIXL_SUCCESS

    def deregisterMem(
        self, descs: Optional[nixlRegDList], backends: Sequence[int] = ()
    ) -> nixl_status_t:
        """Takes memory back; waits for transfers that still use it."""
        self._started(backends)
        self._own.deregister(_list(descs, nixlRegDList))
        return nixl_status_t.NIXL_SUCCESS

    def queryMem(
        self, descs: Optional[nixlRegDList], backend: int
    ) -> List[Optional[Dict[str, str]]]:
        """Refused: only storage backends answer this."""
        raise nixlNotSupportedError(f"backend {BACKEND} has no storage to query")

    # Peers.

    def getLocalMD(self) -> bytes:
        """What a peer needs to reach this agent and all memory that is registered now. Whoever has it may use that."""
        if self._core is None:
            raise nixlInvalidParamError(f"agent {self._name!r} has no backend to be reached by")
        # In this order, so that each range's region is in the inner metadata, unless it is gone by now.
        rows = self._own.ranges().rows
        return Card(self._name, rows, self._core.metadata()).encode()

    def loadRemoteMD(self, metadata: _Message) -> bytes:
        """Learns of a peer, or what is new about it. On an error, what was known of it stays."""
        return self._peers.load(self._started(), Card.decode(_bytes(metadata))).encode()

    def invalidateRemoteMD(self, name: _Name) -> nixl_status_t:
        """Forgets a peer: transfers in flight fail, its handles become useless. Nothing happens for an unknown one."""
        self._peers.forget(_text(name))
        return nixl_status_t.NIXL_SUCCESS

    def checkRemoteMD(self, name: _Name, descs: nixlXferDList) -> nixl_status_t:
        """Whether a peer is loaded, and its memory at `descs` known. Says nothing of whether it is alive."""
        try:
            ranges = self._ranges_of(_text(name))
            if not descs.isEmpty():
                _check_type(descs.getType())
                ranges.resolve(descs.rows)
        except nixlNotFoundError:
            return nixl_status_t.NIXL_ERR_NOT_FOUND
        return nixl_status_t.NIXL_SUCCESS

    def makeConnection(self, name: _Name, backends: Sequence[int] = ()) -> nixl_status_t:
        """Connects to a peer ahead of the first transfer."""
        self._started(backends)
        self._peers.find(_text(name)).connect()
        return nixl_status_t.NIXL_SUCCESS

    def _ranges_of(self, name: str) -> Ranges:
        return self._own.ranges() if name == self._name else self._peers.find(name).ranges

    # Transfers.

    def prepXferDlist(self, name: _Name, *args: Any) -> Side:
        """Prepares a list: `(name, descs, backends)`, or `(name, memory, rows, backends)` for Nx5 strided rows.

        The name is `NIXL_INIT_AGENT` for the initiator's side, else a peer's, or this agent's in place of a peer's.
        """
        if len(args) > 1 and isinstance(args[0], nixl_mem_t):
            memory, rows = args[0], rows_of(args[1], 5)
            backends = args[2] if len(args) > 2 else ()
        else:
            descs = _list(args[0], nixlXferDList)
            memory, rows = descs.getType(), descs.rows
            backends = args[1] if len(args) > 1 else ()
        self._started(backends)
        return self._side(_text(name), memory, rows)

    def _side(self, name: str, memory: nixl_mem_t, rows: np.ndarray) -> Side:
        core = self._started()
        _check_type(memory)
        peer = None if name in (NIXL_INIT_AGENT, self._name) else self._peers.find(name)
        ranges = self._own.ranges() if peer is None else peer.ranges
        found = ranges.resolve(rows) if rows.shape[1] == 3 else ranges.resolve_strided(rows)
        with translating():
            prepared = core.prepare(found, peer.core if peer else None)
        return Side(prepared, peer, name != NIXL_INIT_AGENT)

    def makeXferReq(
        self,
        operation: nixl_xfer_op_t,
        local_side: Side,
        local_indices: Union[Sequence[int], np.ndarray],
        remote_side: Side,
        remote_indices: Union[Sequence[int], np.ndarray],
        notif_msg: _Message = b"",
        backend: Sequence[int] = (),
        skip_desc_merge: bool = False,
    ) -> Transfer:
        """A transfer of some descriptors of two prepared lists, paired in order."""
        self._started(backend)
        if local_side.is_target or not remote_side.is_target:
            raise nixlInvalidParamError(
                "the local list must be prepared for NIXL_INIT_AGENT, and the remote one for an agent by name"
            )
        if local_side.is_released or remote_side.is_released:
            raise nixlInvalidParamError("a prepared list was released")
        local = local_side.positions(local_indices, "local")
        remote = remote_side.positions(remote_indices, "remote")
        if len(local) != len(remote):
            raise nixlInvalidParamError(f"{len(local)} local and {len(remote)} remote indices")
        return self._transfer(operation, local_side, local, remote_side, remote, _bytes(notif_msg))

    def createXferReq(
        self,
        operation: nixl_xfer_op_t,
        local_descs: nixlXferDList,
        remote_descs: nixlXferDList,
        remote_agent: _Name,
        notif_msg: _Message = b"",
        backend: Sequence[int] = (),
    ) -> Transfer:
        """A transfer of two lists, paired in order."""
        self._started(backend)
        local_descs = _list(local_descs, nixlXferDList)
        remote_descs = _list(remote_descs, nixlXferDList)
        local = self._side(NIXL_INIT_AGENT, local_descs.getType(), local_descs.rows)
        remote = self._side(_text(remote_agent), remote_descs.getType(), remote_descs.rows)
        return self._transfer(operation, local, None, remote, None, _bytes(notif_msg))

    def _transfer(
        self,
        operation: nixl_xfer_op_t,
        local: Side,
        local_positions: Optional[np.ndarray],
        remote: Side,
        remote_positions: Optional[np.ndarray],
        message: bytes,
    ) -> Transfer:
        core, peer = self._started(), remote.peer
        if peer is not None and peer.is_forgotten:
            raise nixlNotFoundError(f"agent {peer.name!r} was removed")

        def make(notification: Optional[bytes]) -> kvfabric.Transfer:
            return core.request(
                core_operation(operation),
                local.prepared,
                remote.prepared,
                local_positions=local_positions,
                remote_positions=remote_positions,
                notification=notification,
                deadline=self._deadline,
            )

        with translating():
            made = Transfer(make, peer, message, self._letters.append)
        if peer is not None and made.is_connected:
            peer.explain()
        return made

    def postXferReq(self, transfer: Transfer, notif_msg: _Message = b"") -> nixl_status_t:
        """Starts a transfer; raises why it cannot be."""
        status = transfer.post(_bytes(notif_msg))
        if transfer.peer is None and status == nixl_status_t.NIXL_IN_PROG:
            with self._lock:
                self._delivering.append(transfer)
        return status

    def getXferStatus(self, transfer: Transfer) -> nixl_status_t:
        """Where a transfer stands; raises why it failed."""
        return transfer.status()

    def getXferTelemetry(self, transfer: Transfer) -> nixlXferTelemetry:
        """How the last finished post went."""
        if not self._has_telemetry:
            raise nixlNoTelemetryError(f"agent {self._name!r} was made without capture_telemetry")
        return nixlXferTelemetry.of(transfer.telemetry())

    def queryXferBackend(self, transfer: Transfer) -> int:
        """The backend of a transfer."""
        return _BACKEND_HANDLE

    def estimateXferCost(self, transfer: Transfer) -> Tuple[int, int, int]:
        """No estimate: zero, of no method."""
        return 0, 0, -1

    def releaseXferReq(self, transfer: Transfer) -> nixl_status_t:
        """Lets go of a transfer, and cancels it."""
        transfer.release()
        return nixl_status_t.NIXL_SUCCESS

    def releasedDlistH(self, side: Side) -> nixl_status_t:
        """Lets go of a prepared list; transfers that were made of it stay valid."""
        side.is_released = True
        return nixl_status_t.NIXL_SUCCESS

    # Notifications.

    def genNotif(
        self, name: _Name, message: _Message, backends: Sequence[int] = ()
    ) -> nixl_status_t:
        """Sends a message; raises if the peer is known to be gone."""
        core, name, message = self._started(backends), _text(name), _bytes(message)
        if name == self._name:
            self._letters.append(message)
            return nixl_status_t.NIXL_SUCCESS
        peer = self._peers.find(name)
        try:
            core.notify(peer.core, message, NOTIFY_SECONDS_MAX)
        except kvfabric.DeadlineError:
            logger.debug("agent %s has not yet taken a notification", name)
        except kvfabric.KvfabricError as error:
            raise translated(error) from error
        return nixl_status_t.NIXL_SUCCESS

    def getNotifs(
        self, notif_map: Mapping[str, Sequence[bytes]], backends: Sequence[int] = ()
    ) -> Dict[str, List[bytes]]:
        """The map with the messages that have come since the last call, by sender, oldest first."""
        core = self._started(backends)
        grown = {name: list(messages) for name, messages in notif_map.items()}
        with translating():
            arrived = core.notifications()
        for name, message in arrived:
            grown.setdefault(name, []).append(message)
        letters = self._take_letters()
        if letters:
            grown.setdefault(self._name, []).extend(letters)
        return grown

    def _take_letters(self) -> List[bytes]:
        with self._lock:
            self._delivering = [each for each in self._delivering if not each.sweep()]
            letters = self._letters[:]
            del self._letters[: len(letters)]
        return letters

    # What NIXL offers besides.

    def _no_server(self, *_: object, **__: object) -> None:
        """Refused: there is no metadata server."""
        raise nixlNotSupportedError(_NO_SERVER)

    sendLocalMD = fetchRemoteMD = invalidateLocalMD = sendLocalPartialMD = _no_server

    def getLocalPartialMD(self, *_: object, **__: object) -> bytes:
        """Refused: metadata is small, and always whole."""
        raise nixlNotSupportedError("there is no partial metadata: use get_agent_metadata")

    def prepMemView(self, *_: object, **__: object) -> int:
        """Refused: there is no device memory."""
        raise nixlNotSupportedError("there are no memory views: device memory is not supported yet")

    releaseMemView = prepMemView


def _check_backend(name: str) -> None:
    if name != BACKEND:
        raise nixlNotFoundError(f"no backend {name!r}: kvfabric's only one is called {BACKEND!r}")


def _check_type(memory: nixl_mem_t) -> None:
    if memory != nixl_mem_t.DRAM_SEG:
        raise nixlNotFoundError(f"no {memory.name} is registered: kvfabric moves host memory only")


def _list(descs: object, kind: Type[_L]) -> _L:
    if not isinstance(descs, kind):
        raise TypeError(f"a {kind.__name__} is needed, not {type(descs).__name__}")
    return descs


def _text(name: _Name) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _bytes(message: _Message) -> bytes:
    if isinstance(message, str):
        return message.encode()
    if not isinstance(message, (bytes, bytearray, memoryview)):
        raise TypeError(f"a message is bytes or str, not {type(message).__name__}")
    return bytes(message)
