"""How callers configure an agent."""

from __future__ import annotations

import enum
from typing import List, Optional

from . import _bindings as nixlBind
from ._constants import DEFAULT_COMM_PORT


class nixl_thread_sync_t(enum.Enum):
    """How an agent may be shared among threads: every agent may be used from any thread."""

    NIXL_THREAD_SYNC_NONE = nixlBind.NIXL_THREAD_SYNC_NONE
    NIXL_THREAD_SYNC_STRICT = nixlBind.NIXL_THREAD_SYNC_STRICT
    NIXL_THREAD_SYNC_RW = nixlBind.NIXL_THREAD_SYNC_RW
    NIXL_THREAD_SYNC_DEFAULT = nixlBind.NIXL_THREAD_SYNC_DEFAULT


class nixl_agent_config:
    """How to make an agent.

    `backends` are created at once, `capture_telemetry` allows :meth:`nixl_agent.get_xfer_telemetry`, and a listener thread is
    refused. There is no progress thread to enable, `num_threads` sizes nothing, and every agent is as thread-safe as
    any `sync_mode` asks for.
    """

    def __init__(
        self,
        enable_prog_thread: bool = True,
        enable_listen_thread: bool = False,
        listen_port: int = DEFAULT_COMM_PORT,
        capture_telemetry: bool = False,
        num_threads: int = 0,
        backends: Optional[List[str]] = None,
        sync_mode: Optional[nixl_thread_sync_t] = None,
    ) -> None:
        if sync_mode is not None and not isinstance(sync_mode, nixl_thread_sync_t):
            kind = type(sync_mode).__name__
            raise TypeError(f"sync_mode must be a nixl_thread_sync_t (got {kind!r})")
        self.backends = ["UCX"] if backends is None else backends
        self.enable_pthread = enable_prog_thread
        self.enable_listen = enable_listen_thread
        self.port = listen_port
        self.capture_telemetry = capture_telemetry
        self.num_threads = num_threads
        self.sync_mode = sync_mode
