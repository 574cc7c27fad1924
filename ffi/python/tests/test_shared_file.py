"""Shared memory that its owner made, registered by its file."""

import fcntl
import os

import pytest

import kvfabric

# Linux, <fcntl.h>.
ADD_SEALS, SEAL, SHRINK, GROW = 1033, 1, 2, 4
BYTES = 8192


def memory(seals: int) -> int:
    """A file in memory with these seals."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, BYTES)
    fcntl.fcntl(fd, ADD_SEALS, seals)
    return fd


def test_a_peer_maps_what_the_owner_writes() -> None:
    """The descriptor is closed before; the owner's own view of the file stays the same memory."""
    owner, peer = kvfabric.Agent("owner", cma=False), kvfabric.Agent("peer", cma=False)
    fd = memory(SEAL | SHRINK | GROW)
    view = os.fdopen(os.dup(fd), "r+b", buffering=0)
    region = owner.register_file(fd)
    os.close(fd)
    assert region.len == BYTES
    os.pwrite(view.fileno(), b"written by its owner", 64)
    assert bytes(region.view()[64:84]) == b"written by its owner"
    known = peer.load_peer(owner.metadata())
    assert known.regions == {region.id: BYTES}
    copy = peer.shared_memory(32)
    peer.read([(copy, 0, 20)], known, [(region.id, 64, 20)]).wait()
    assert bytes(copy.view()[:20]) == b"written by its owner"
    region.deregister()
    view.close()


@pytest.mark.parametrize("seals", [0, SHRINK | SEAL, GROW | SEAL, SHRINK | GROW])
def test_memory_whose_size_may_change_is_refused(seals: int) -> None:
    """Each seal that is missing."""
    fd = memory(seals)
    with pytest.raises(kvfabric.InvalidError, match="size may change"):
        kvfabric.Agent("owner").register_file(fd)
    os.close(fd)


def test_what_is_no_open_file_is_refused() -> None:
    """A number that no file has, and one that none can have."""
    agent = kvfabric.Agent("owner")
    with pytest.raises(kvfabric.IoError):
        agent.register_file(1 << 20)
    with pytest.raises(kvfabric.InvalidError):
        agent.register_file(-1)
