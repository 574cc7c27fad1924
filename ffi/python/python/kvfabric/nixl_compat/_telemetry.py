"""What a transfer's telemetry looks like to NIXL's callers."""

from __future__ import annotations

from typing import Optional

import kvfabric

_MICROSECONDS = 1_000_000


class nixlXferTelemetry:
    """How a post of a transfer went; times are microseconds. `startTime` counts from the start of the agent."""

    __slots__ = ("_measured",)

    def __init__(self) -> None:
        self._measured: Optional[kvfabric.Telemetry] = None

    @classmethod
    def of(cls, measured: kvfabric.Telemetry) -> "nixlXferTelemetry":
        """From kvfabric's."""
        made = cls()
        made._measured = measured
        return made

    def _microseconds(self, field: str) -> int:
        return round(getattr(self._measured, field) * _MICROSECONDS) if self._measured else 0

    @property
    def startTime(self) -> int:
        """When it was posted."""
        return self._microseconds("posted")

    @property
    def postDuration(self) -> int:
        """How long posting took the caller."""
        return self._microseconds("post")

    @property
    def xferDuration(self) -> int:
        """From the post until it was finished."""
        return self._microseconds("transfer")

    @property
    def totalBytes(self) -> int:
        """Bytes moved."""
        return self._measured.bytes if self._measured else 0

    @property
    def descCount(self) -> int:
        """Pairs of ranges that it moved them as."""
        return self._measured.descriptors if self._measured else 0

    def __repr__(self) -> str:
        return (
            f"nixlXferTelemetry(startTime={self.startTime}, postDuration={self.postDuration},"
            f" xferDuration={self.xferDuration}, totalBytes={self.totalBytes}, descCount={self.descCount})"
        )
