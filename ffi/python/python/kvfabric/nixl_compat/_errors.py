"""NIXL's exception classes, one per status, and what becomes of an error of kvfabric."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, Type

import kvfabric

from ._constants import nixl_status_t


class _Refusal(Exception):
    """Puts the status before the reason, so that who looks for the name of the status finds it."""

    status: nixl_status_t

    def __init__(self, *reason: object) -> None:
        super().__init__(": ".join([self.status.name, *map(str, reason)]))


class nixlNotPostedError(_Refusal):
    """The transfer was never posted."""

    status = nixl_status_t.NIXL_ERR_NOT_POSTED


class nixlInvalidParamError(_Refusal):
    """An argument is wrong; repeating the call cannot help."""

    status = nixl_status_t.NIXL_ERR_INVALID_PARAM


class nixlBackendError(_Refusal):
    """The backend could not do it, or not within the deadline."""

    status = nixl_status_t.NIXL_ERR_BACKEND


class nixlNotFoundError(_Refusal):
    """No such agent, backend or registered memory."""

    status = nixl_status_t.NIXL_ERR_NOT_FOUND


class nixlMismatchError(_Refusal):
    """What came from elsewhere is damaged, or not for this version, or not kvfabric's."""

    status = nixl_status_t.NIXL_ERR_MISMATCH


class nixlNotAllowedError(_Refusal):
    """The other side does not allow it, or this process is a forked child."""

    status = nixl_status_t.NIXL_ERR_NOT_ALLOWED


class nixlRepostActiveError(_Refusal):
    """The transfer is in flight, or its memory is still in use."""

    status = nixl_status_t.NIXL_ERR_REPOST_ACTIVE


class nixlUnknownError(_Refusal):
    """A promise of the library was broken; please report it."""

    status = nixl_status_t.NIXL_ERR_UNKNOWN


class nixlNotSupportedError(_Refusal):
    """Not offered here."""

    status = nixl_status_t.NIXL_ERR_NOT_SUPPORTED


class nixlRemoteDisconnectError(_Refusal):
    """The peer is gone, or cannot be reached."""

    status = nixl_status_t.NIXL_ERR_REMOTE_DISCONNECT


class nixlCancelledError(_Refusal):
    """The transfer was cancelled."""

    status = nixl_status_t.NIXL_ERR_CANCELED


class nixlNoTelemetryError(_Refusal):
    """The agent was made without telemetry, or the transfer has none yet."""

    status = nixl_status_t.NIXL_ERR_NO_TELEMETRY


_BY_KIND: Dict[Type[kvfabric.KvfabricError], Type[Exception]] = {
    kvfabric.InvalidError: nixlInvalidParamError,
    kvfabric.BusyError: nixlBackendError,
    kvfabric.CorruptError: nixlMismatchError,
    kvfabric.PeerLostError: nixlRemoteDisconnectError,
    kvfabric.UnsupportedError: nixlNotSupportedError,
    kvfabric.DeadlineError: nixlBackendError,
    kvfabric.CancelledError: nixlCancelledError,
    kvfabric.VersionError: nixlMismatchError,
    kvfabric.NoSpaceError: nixlBackendError,
    kvfabric.DeniedError: nixlNotAllowedError,
    kvfabric.PoisonedError: nixlUnknownError,
    kvfabric.NotFoundError: nixlNotFoundError,
    kvfabric.IoError: nixlBackendError,
    kvfabric.ForkedError: nixlNotAllowedError,
    kvfabric.InternalError: nixlUnknownError,
}


def translated(error: kvfabric.KvfabricError) -> Exception:
    """NIXL's exception for an error of kvfabric, with the error as its cause."""
    found = _BY_KIND.get(type(error), nixlUnknownError)(error)
    found.__cause__ = error
    return found


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Raises NIXL's exceptions for those of kvfabric."""
    try:
        yield
    except kvfabric.KvfabricError as error:
        raise translated(error) from error
