"""Memory of this process that is a file's, so that peers on the host can map it."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from typing import Dict, NamedTuple, Optional, Tuple

# Linux, <fcntl.h>: Python 3.9 has no names for these.
_F_ADD_SEALS = 1033
_SEAL, _SHRINK, _GROW = 1, 2, 4


class Shared(NamedTuple):
    """Zeroed shared memory of a size that cannot change."""

    fd: int
    memory: mmap.mmap


_lock = threading.Lock()
_pools: Dict[Tuple[int, int], Shared] = {}


def create(length: int) -> Shared:
    """Makes shared memory that has no name."""
    fd = os.memfd_create("kvfabric", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL | _SHRINK | _GROW)
        return Shared(fd, mmap.mmap(fd, length))
    except BaseException:
        os.close(fd)
        raise


def announce(address: int, shared: Shared) -> None:
    """Says where this memory is; it stays there, mapped and open, until the process ends."""
    with _lock:
        _pools[address, len(shared.memory)] = shared


def file_of(address: int, length: int) -> Optional[int]:
    """The file that these bytes are all of; None for any others."""
    with _lock:
        shared = _pools.get((address, length))
        return shared.fd if shared else None
