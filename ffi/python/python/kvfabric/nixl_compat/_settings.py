"""What the backend can be told, by NIXL's backend parameters or by the environment."""

from __future__ import annotations

import os
from typing import Dict, Mapping, NamedTuple, Optional

from ._errors import nixlInvalidParamError
from ._logging import logger

BACKEND = "UCX"
"""The one backend. Engines ask for this name by default, so this is what it is called."""

BACKEND_MEMORY = ["DRAM_SEG"]
"""What it moves."""

BACKEND_PARAMS: Dict[str, str] = {
    # "ip:port" to listen on, port 0 for any, or "off". Agents on other hosts reach this one there: name an interface of
    # a trusted network.
    "listen": "127.0.0.1:0",
    # "ip:port" that peers are told, where it differs: needed when listening on 0.0.0.0.
    "advertise": "",
    # Whether peers on this host share memory with this agent, and whether memory that cannot be shared is copied straight
    # from process to process.
    "shm": "true",
    "cma": "true",
    # Seconds after which a transfer that is not finished fails.
    "deadline": "60",
}
"""The backend's parameters and their defaults. The environment's `KVFABRIC_NIXL_LISTEN`, and so on, go over these: engines
do not let everybody set backend parameters.
"""

# What engines pass for the sake of UCX: nothing here depends on it.
_OF_UCX = {
    "device_list",
    "engine_config",
    "num_threads",
    "num_workers",
    "split_batch_size",
    "ucx_devices",
    "ucx_error_handling_mode",
    "ucx_num_device_channels",
}

_DEADLINE_SECONDS_MAX = 3600.0


class Settings(NamedTuple):
    """How to start an agent of kvfabric."""

    listen: Optional[str]
    advertise: Optional[str]
    shm: bool
    cma: bool
    deadline: float

    @staticmethod
    def of(params: Mapping[str, str]) -> "Settings":
        """Reads backend parameters; those that only mean something to UCX are ignored, unknown ones with a warning."""
        chosen = {
            name: os.environ.get(f"KVFABRIC_NIXL_{name.upper()}", default)
            for name, default in BACKEND_PARAMS.items()
        }
        for name, value in params.items():
            if name in BACKEND_PARAMS:
                chosen[name] = value
            elif name not in _OF_UCX:
                logger.warning("backend parameter %r = %r is not known, and ignored", name, value)
        return Settings(
            listen=None if chosen["listen"] == "off" else chosen["listen"],
            advertise=chosen["advertise"] or None,
            shm=_flag("shm", chosen["shm"]),
            cma=_flag("cma", chosen["cma"]),
            deadline=_seconds(chosen["deadline"]),
        )


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise nixlInvalidParamError(f"backend parameter {name} = {text!r} is not true or false")
    return text == "true"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= _DEADLINE_SECONDS_MAX:
        raise nixlInvalidParamError(
            f"backend parameter deadline = {text!r} is not within (0, {_DEADLINE_SECONDS_MAX}] seconds"
        )
    return seconds
