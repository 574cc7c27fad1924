"""What callers hold of prepared lists and transfers."""

from __future__ import annotations

from typing import Any

from ._agent import nixlAgent
from ._logging import logger


class _Handle:
    """Something of an agent that is released once, at the latest when it is dropped."""

    __slots__ = ("_handle", "_agent", "_released", "__weakref__")

    def __init__(self, agent: nixlAgent, handle: Any) -> None:
        self._handle = handle
        self._agent = agent
        self._released = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(0x{id(self._handle):x}, released={self._released})"

    def _let_go(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Lets go of it; nothing happens the second time."""
        if not self._released:
            self._let_go()
            self._released = True

    def __del__(self) -> None:
        try:
            self.release()
        except Exception as error:  # At the end of the process anything may be gone by now.
            logger.debug("%r was dropped without being released: %s", self, error)


class nixl_prepped_dlist_handle(_Handle):
    """A prepared descriptor list."""

    __slots__ = ()

    def _let_go(self) -> None:
        self._agent.releasedDlistH(self._handle)


class nixl_xfer_handle(_Handle):
    """A transfer. Dropping it cancels it; its memory is kept registered until no more bytes can land."""

    __slots__ = ()

    def _let_go(self) -> None:
        self._agent.releaseXferReq(self._handle)
