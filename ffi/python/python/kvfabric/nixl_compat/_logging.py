"""The log of the NIXL interface: the logger ``kvfabric.nixl``."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("kvfabric.nixl")

_LEVELS = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
    "FATAL": logging.CRITICAL,
}


def configure() -> None:
    """Prints what is logged to the standard error if NIXL_LOG_LEVEL says from which level on; else nothing is changed."""
    wanted = os.environ.get("NIXL_LOG_LEVEL", "")
    if not wanted or logger.handlers:
        return
    level = _LEVELS.get(wanted.upper())
    if level is None:
        logger.warning("NIXL_LOG_LEVEL = %r is none of %s", wanted, ", ".join(_LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s kvfabric.nixl %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
