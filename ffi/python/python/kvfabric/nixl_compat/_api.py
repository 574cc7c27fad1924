"""What engines import from ``nixl._api``: the agent with which they move memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from . import _bindings as nixlBind
from ._config import nixl_agent_config, nixl_thread_sync_t
from ._descs import reg_descs, remote_descs, xfer_descs
from ._handles import nixl_prepped_dlist_handle, nixl_xfer_handle
from ._lists import _DList, decode, encode
from ._logging import configure, logger

if TYPE_CHECKING:
    from ._lists import nixlRegDList, nixlRemoteDList, nixlXferDList

__all__ = [
    "DEFAULT_COMM_PORT",
    "nixlBind",
    "nixl_agent",
    "nixl_agent_config",
    "nixl_backend_handle",
    "nixl_prepped_dlist_handle",
    "nixl_thread_sync_t",
    "nixl_xfer_handle",
]


configure()

DEFAULT_COMM_PORT = nixlBind.DEFAULT_COMM_PORT

nixl_backend_handle = int

_Name = Union[str, bytes]
_Message = Union[str, bytes]
_Indices = Union[Sequence[int], np.ndarray]

_LOCAL_NAMES = ("NIXL_INIT_AGENT", "", b"NIXL_INIT_AGENT", b"")

_STATES = {nixlBind.NIXL_SUCCESS: "DONE", nixlBind.NIXL_IN_PROG: "PROC"}


class nixl_agent:
    """Moves bytes between registered memory of this process and its peers. Safe to use from any thread."""

    def __init__(
        self,
        agent_name: str,
        nixl_conf: Optional[nixl_agent_config] = None,
        instantiate_all: bool = False,
    ) -> None:
        conf = nixl_conf or nixl_agent_config()
        bound = nixlBind.nixlAgentConfig()
        bound.useProgThread = conf.enable_pthread
        bound.useListenThread = conf.enable_listen
        bound.listenPort = conf.port
        bound.captureTelemetry = conf.capture_telemetry
        self.agent = nixlBind.nixlAgent(agent_name, bound)
        self.name = agent_name
        self.notifs: Dict[str, List[bytes]] = {}
        self._notifs_lock = threading.Lock()
        self.backends: Dict[str, nixl_backend_handle] = {}
        self.backend_mems: Dict[str, List[str]] = {}
        self.backend_options: Dict[str, Dict[str, str]] = {}
        self.plugin_list = self.agent.getAvailPlugins()
        self.nixl_mems = {
            "DRAM": nixlBind.DRAM_SEG,
            "VRAM": nixlBind.VRAM_SEG,
            "FILE": nixlBind.FILE_SEG,
            "BLOCK": nixlBind.BLK_SEG,
            "OBJ": nixlBind.OBJ_SEG,
            "cpu": nixlBind.DRAM_SEG,
            "cuda": nixlBind.VRAM_SEG,
        }
        self.nixl_ops = {"WRITE": nixlBind.NIXL_WRITE, "READ": nixlBind.NIXL_READ}
        wanted = self.plugin_list if instantiate_all and nixl_conf is None else conf.backends
        for backend in wanted:
            if backend in self.plugin_list:
                self.create_backend(backend)
            else:
                logger.warning("backend %r is skipped: there is only %s", backend, self.plugin_list)

    # Backends.

    def get_plugin_list(self) -> List[str]:
        """The names of the backends that can be created."""
        return self.plugin_list

    def get_plugin_mem_types(self, backend: str) -> List[str]:
        """The kinds of memory that a backend would move; none for an unknown one."""
        return self.agent.getPluginParams(backend)[1] if backend in self.plugin_list else []

    def get_plugin_params(self, backend: str) -> Dict[str, str]:
        """A backend's parameters and their defaults; none for an unknown one."""
        return self.agent.getPluginParams(backend)[0] if backend in self.plugin_list else {}

    def get_backend_mem_types(self, backend: str) -> List[str]:
        """The kinds of memory that a backend moves; none for one that was not created."""
        return self.backend_mems.get(backend, [])

    def get_backend_params(self, backend: str) -> Dict[str, str]:
        """The parameters of a backend; none for one that was not created."""
        return self.backend_options.get(backend, {})

    def create_backend(self, backend: str, initParams: Optional[Dict[str, str]] = None) -> None:
        """Starts a backend."""
        handle = self.agent.createBackend(backend, initParams or {})
        self.backends[backend] = handle
        self.backend_options[backend], self.backend_mems[backend] = self.agent.getBackendParams(
            handle
        )

    def _handles(self, backends: Sequence[str]) -> List[nixl_backend_handle]:
        return [self.backends[backend] for backend in backends]

    # Memory.

    def register_memory(
        self, reg_list: object, mem_type: Optional[str] = None, backends: Sequence[str] = ()
    ) -> nixlRegDList:
        """Registers memory, which must stay mapped until it is deregistered; returns what deregisters it."""
        descs = self.get_reg_descs(reg_list, mem_type)
        self.agent.registerMem(descs, self._handles(backends))
        assert descs is not None, "registering refuses None"
        return descs

    def deregister_memory(self, dereg_list: nixlRegDList, backends: Sequence[str] = ()) -> None:
        """Takes memory back; waits for transfers that still use it."""
        self.agent.deregisterMem(dereg_list, self._handles(backends))

    def query_memory(
        self, reg_list: object, backend: str, mem_type: Optional[str] = None
    ) -> List[Optional[Dict[str, str]]]:
        """Refused: only storage backends answer this."""
        descs = self.get_reg_descs(reg_list, mem_type)
        if backend not in self.backends:
            raise ValueError(
                f"Backend '{backend}' not found. Available backends: {list(self.backends)}"
            )
        return self.agent.queryMem(descs, self.backends[backend])

    # Transfers.

    def make_connection(self, remote_agent: _Name, backends: Sequence[str] = ()) -> None:
        """Connects to a peer ahead of the first transfer."""
        self.agent.makeConnection(remote_agent, self._handles(backends))

    def prep_xfer_dlist(
        self,
        agent_name: _Name,
        xfer_list: object,
        mem_type: Optional[str] = None,
        backends: Sequence[str] = (),
    ) -> nixl_prepped_dlist_handle:
        """Prepares descriptors for any number of transfers.

        `agent_name` is "NIXL_INIT_AGENT" or "" for the initiator's side, a peer's name for the other side, or this agent's own
        name for the other side of a copy within it. Rows of an Nx5 array are (address, length, device, stride, count).
        """
        if agent_name in _LOCAL_NAMES:
            agent_name = nixlBind.NIXL_INIT_AGENT
        handles = self._handles(backends)
        if isinstance(xfer_list, np.ndarray) and xfer_list.ndim == 2 and xfer_list.shape[1] == 5:
            if mem_type is None:
                raise ValueError("Please specify a mem type for strided descriptors")
            memory = self.nixl_mems[mem_type]
            side = self.agent.prepXferDlist(agent_name, memory, xfer_list, handles)
        else:
            descs = self.get_xfer_descs(xfer_list, mem_type)
            side = self.agent.prepXferDlist(agent_name, descs, handles)
        return nixl_prepped_dlist_handle(self.agent, side)

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: nixl_prepped_dlist_handle,
        local_indices: _Indices,
        remote_xfer_side: nixl_prepped_dlist_handle,
        remote_indices: _Indices,
        notif_msg: _Message = b"",
        backends: Sequence[str] = (),
        skip_desc_merge: bool = False,
    ) -> nixl_xfer_handle:
        """A transfer of some descriptors of two prepared lists, paired in order; `operation` is "READ" or "WRITE".

        `notif_msg` reaches the peer once all bytes are there.
        """
        made = self.agent.makeXferReq(
            self.nixl_ops[operation],
            local_xfer_side._handle,
            local_indices,
            remote_xfer_side._handle,
            remote_indices,
            notif_msg,
            self._handles(backends),
            skip_desc_merge,
        )
        return nixl_xfer_handle(self.agent, made)

    def initialize_xfer(
        self,
        operation: str,
        local_descs: nixlXferDList,
        remote_descs: nixlXferDList,
        remote_agent: _Name,
        notif_msg: _Message = b"",
        backends: Sequence[str] = (),
    ) -> nixl_xfer_handle:
        """A transfer of two lists, paired in order."""
        made = self.agent.createXferReq(
            self.nixl_ops[operation],
            local_descs,
            remote_descs,
            remote_agent,
            notif_msg,
            self._handles(backends),
        )
        return nixl_xfer_handle(self.agent, made)

    def transfer(self, handle: nixl_xfer_handle, notif_msg: _Message = b"") -> str:
        """Starts a transfer, again if it is done: "DONE" if it is by now, "PROC" if it is in flight; raises why it cannot."""
        return _STATES.get(self.agent.postXferReq(handle._handle, notif_msg), "ERR")

    def check_xfer_state(self, handle: nixl_xfer_handle) -> str:
        """ "DONE" or "PROC"; raises why the transfer failed."""
        return _STATES.get(self.agent.getXferStatus(handle._handle), "ERR")

    def get_xfer_telemetry(self, handle: nixl_xfer_handle) -> nixlBind.nixlXferTelemetry:
        """How the last finished post of a transfer went."""
        return self.agent.getXferTelemetry(handle._handle)

    def query_xfer_backend(self, handle: nixl_xfer_handle) -> str:
        """The name of a transfer's backend."""
        used = self.agent.queryXferBackend(handle._handle)
        return next(name for name, backend in self.backends.items() if backend == used)

    def estimate_xfer_cost(self, req_handle: nixl_xfer_handle) -> Tuple[int, int, str]:
        """No estimate: (0, 0, "UNKNOWN")."""
        duration, margin, _ = self.agent.estimateXferCost(req_handle._handle)
        return duration, margin, "UNKNOWN"

    def release_xfer_handle(self, handle: nixl_xfer_handle) -> None:
        """Lets go of a transfer, and cancels it. `nixlRepostActiveError` while bytes may still land."""
        handle.release()

    def release_dlist_handle(self, handle: nixl_prepped_dlist_handle) -> None:
        """Lets go of a prepared list; transfers that were made of it stay valid."""
        handle.release()

    def prep_mem_view(self, dlist: object, *, backends: Optional[Sequence[str]] = None) -> int:
        """Refused: there is no device memory."""
        return self.agent.prepMemView(dlist, self._handles(backends or ()))

    def release_mem_view(self, mvh: int) -> None:
        """Refused: there is no device memory."""
        self.agent.releaseMemView(mvh)

    # Notifications.

    def get_new_notifs(self, backends: Sequence[str] = ()) -> Dict[str, List[bytes]]:
        """The messages that have come since the last call, by sender, oldest first."""
        return self.agent.getNotifs({}, self._handles(backends))

    def update_notifs(self, backends: Sequence[str] = ()) -> Dict[str, List[bytes]]:
        """All messages that have come and were not looked up by :meth:`check_remote_xfer_done`."""
        with self._notifs_lock:
            self.notifs = self.agent.getNotifs(self.notifs, self._handles(backends))
            return self.notifs

    def check_remote_xfer_done(
        self,
        remote_agent_name: _Name,
        lookup_tag: bytes,
        backends: Sequence[str] = (),
        tag_is_prefix: bool = True,
    ) -> bool:
        """Whether a message of a peer with this prefix, or part, has come; takes that message."""
        name = (
            remote_agent_name.decode()
            if isinstance(remote_agent_name, bytes)
            else remote_agent_name
        )
        with self._notifs_lock:
            self.notifs = self.agent.getNotifs(self.notifs, self._handles(backends))
            messages = self.notifs.get(name, [])
            for position, message in enumerate(messages):
                if message.startswith(lookup_tag) if tag_is_prefix else lookup_tag in message:
                    del messages[position]
                    return True
        return False

    def send_notif(
        self, remote_agent_name: _Name, notif_msg: _Message, backend: Optional[str] = None
    ) -> None:
        """Sends a message; raises if the peer is known to be gone."""
        backends = () if backend is None else (backend,)
        self.agent.genNotif(remote_agent_name, notif_msg, self._handles(backends))

    # Metadata.

    def get_agent_metadata(self) -> bytes:
        """What a peer needs to reach this agent and all memory that is registered now. Whoever has it may use that."""
        return self.agent.getLocalMD()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Learns of a peer, or what is new about it, and returns its name."""
        return self.agent.loadRemoteMD(metadata)

    def remove_remote_agent(self, agent: _Name) -> None:
        """Forgets a peer: transfers in flight fail, its handles become useless."""
        self.agent.invalidateRemoteMD(agent)

    def check_remote_metadata(self, agent: _Name, descs: Optional[nixlXferDList] = None) -> bool:
        """Whether a peer is loaded, and its memory at `descs` known. Says nothing of whether it is alive."""
        if descs is None:
            descs = nixlBind.nixlXferDList(nixlBind.DRAM_SEG)
        return self.agent.checkRemoteMD(agent, descs) == nixlBind.NIXL_SUCCESS

    def get_partial_agent_metadata(
        self, descs: nixlRegDList, inc_conn_info: bool = False, backends: Sequence[str] = ()
    ) -> bytes:
        """Refused: metadata is always whole."""
        return self.agent.getLocalPartialMD(descs, inc_conn_info, self._handles(backends))

    def send_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Refused: there is no metadata server."""
        self.agent.sendLocalMD(ip_addr, port)

    def send_partial_agent_metadata(self, *arguments: object, **named: object) -> None:
        """Refused: there is no metadata server."""
        self.agent.sendLocalPartialMD(*arguments, **named)

    def fetch_remote_metadata(
        self, remote_agent: _Name, ip_addr: str = "", port: int = DEFAULT_COMM_PORT, label: str = ""
    ) -> None:
        """Refused: there is no metadata server."""
        self.agent.fetchRemoteMD(remote_agent, ip_addr, port, label)

    def invalidate_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Refused: there is no metadata server."""
        self.agent.invalidateLocalMD(ip_addr, port)

    # Descriptor lists.

    def get_xfer_descs(
        self, descs: object, mem_type: Optional[str] = None
    ) -> Optional[nixlXferDList]:
        """A list to transfer, of (address, length, device) tuples or an Nx3 array, with a kind of memory, or of
        tensors. None, and a line in the log, for anything else.
        """
        return xfer_descs(descs, self._memory(mem_type))

    def get_reg_descs(
        self, descs: object, mem_type: Optional[str] = None
    ) -> Optional[nixlRegDList]:
        """A list to register, of (address, length, device, metadata) tuples or an Nx3 array, with a kind of memory, or
        of tensors. None, and a line in the log, for anything else.
        """
        return reg_descs(descs, self._memory(mem_type))

    def get_remote_descs(
        self, descs: object, mem_type: Optional[str] = None
    ) -> Optional[nixlRemoteDList]:
        """A list of (address, length, device, agent) tuples with a kind of memory."""
        return remote_descs(descs, self._memory(mem_type))

    def _memory(self, mem_type: Optional[str]) -> Optional[nixlBind.nixl_mem_t]:
        return None if mem_type is None else self.nixl_mems[mem_type]

    def get_serialized_descs(self, descs: _DList) -> bytes:
        """A list as bytes, in kvfabric's own format."""
        return encode(descs)

    def deserialize_descs(self, serialized_descs: bytes) -> _DList:
        """The list that :meth:`get_serialized_descs` made into bytes."""
        return decode(serialized_descs)
