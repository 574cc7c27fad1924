"""Moves and finds the KV cache of LLM inference engines.

An :class:`Agent` registers memory and moves bytes to and from the registered memory of its peers; a
:class:`Node` keeps an engine's blocks in its tiers, serves them to peers and brings them back; an
:class:`Index` tells which pods hold a prompt. Every error is a :class:`KvfabricError`, one class per
kind.
"""

from ._kvfabric import (
    Agent,
    BusyError,
    CancelledError,
    CorruptError,
    DeadlineError,
    DeniedError,
    ForkedError,
    Index,
    InternalError,
    InvalidError,
    IoError,
    KvfabricError,
    NoSpaceError,
    NotFoundError,
    Peer,
    PeerLostError,
    PodDepth,
    PoisonedError,
    Prepared,
    Region,
    Transfer,
    UnsupportedError,
    VersionError,
    __version__,
)
from ._reports import Telemetry

__all__ = [
    "Agent",
    "BusyError",
    "CancelledError",
    "CorruptError",
    "DeadlineError",
    "DeniedError",
    "ForkedError",
    "Index",
    "InternalError",
    "InvalidError",
    "IoError",
    "KvfabricError",
    "NoSpaceError",
    "NotFoundError",
    "Peer",
    "PeerLostError",
    "PodDepth",
    "PoisonedError",
    "Prepared",
    "Region",
    "Telemetry",
    "Transfer",
    "UnsupportedError",
    "VersionError",
    "__version__",
]
