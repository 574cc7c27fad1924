"""The configuration of NIXL's bindings."""

from __future__ import annotations

from ._constants import DEFAULT_COMM_PORT, nixl_thread_sync_t


class nixlAgentConfig:
    """How to make an agent. Only `captureTelemetry` matters; `useListenThread` is refused."""

    def __init__(
        self,
        useProgThread: bool = False,
        useListenThread: bool = False,
        listenPort: int = DEFAULT_COMM_PORT,
        syncMode: nixl_thread_sync_t = nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE,
        *ignored: object,
    ) -> None:
        self.useProgThread = useProgThread
        self.useListenThread = useListenThread
        self.listenPort = listenPort
        self.syncMode = syncMode
        self.pthrDelay = 0
        self.lthrDelay = 100_000
        self.captureTelemetry = False
