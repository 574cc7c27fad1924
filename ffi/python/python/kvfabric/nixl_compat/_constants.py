"""The enumerations of NIXL's bindings, with the same names and numbers."""

from __future__ import annotations

import enum


class _Named(enum.IntEnum):
    """Prints as the bindings' enumerations do, on every version of Python."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class nixl_mem_t(_Named):
    """Kinds of memory."""

    DRAM_SEG = 0
    VRAM_SEG = 1
    BLK_SEG = 2
    OBJ_SEG = 3
    FILE_SEG = 4


class nixl_xfer_op_t(_Named):
    """Directions, as seen by who starts the transfer."""

    NIXL_READ = 0
    NIXL_WRITE = 1


class nixl_status_t(_Named):
    """What a call came to."""

    NIXL_IN_PROG = 1
    NIXL_SUCCESS = 0
    NIXL_ERR_NOT_POSTED = -1
    NIXL_ERR_INVALID_PARAM = -2
    NIXL_ERR_BACKEND = -3
    NIXL_ERR_NOT_FOUND = -4
    NIXL_ERR_MISMATCH = -5
    NIXL_ERR_NOT_ALLOWED = -6
    NIXL_ERR_REPOST_ACTIVE = -7
    NIXL_ERR_UNKNOWN = -8
    NIXL_ERR_NOT_SUPPORTED = -9
    NIXL_ERR_REMOTE_DISCONNECT = -10
    NIXL_ERR_CANCELED = -11
    NIXL_ERR_NO_TELEMETRY = -12


class nixl_thread_sync_t(_Named):
    """How an agent may be shared among threads: all modes are as safe as STRICT here."""

    NIXL_THREAD_SYNC_NONE = 0
    NIXL_THREAD_SYNC_STRICT = 1
    NIXL_THREAD_SYNC_RW = 2
    NIXL_THREAD_SYNC_DEFAULT = 0


class nixl_cost_t(_Named):
    """How a cost was estimated."""

    NIXL_COST_ANALYTICAL_BACKEND = 0


NIXL_INIT_AGENT = ""
"""Stands for this agent where the name of an agent is asked for."""

DEFAULT_COMM_PORT = 8888
"""Where NIXL's listener thread would listen."""
