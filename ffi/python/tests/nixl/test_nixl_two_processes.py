"""The same with an agent of another process: data, notifications, and its death."""

import base64

import numpy as np
import pytest
from nixl_rig import Deadline, Memory, awaited, finished, run

from nixl import _bindings as bindings

LENGTH = 1 << 20


@pytest.fixture
def mine(one):
    return Memory(one, LENGTH, start=7)


@pytest.fixture
def remote(one, other):
    """The other process's memory, in 16 blocks."""
    assert one.add_remote_agent(other.metadata) == b"other"
    size = LENGTH // 16
    rows = [(other.address + number * size, size, 0) for number in range(16)]
    return one.prep_xfer_dlist("other", rows, "DRAM")


@pytest.fixture
def local(one, mine):
    """Own memory, in 16 blocks."""
    rows = np.array([mine.block(number, LENGTH // 16) for number in range(16)], np.uint64)
    return one.prep_xfer_dlist("NIXL_INIT_AGENT", rows, "DRAM")


def test_bytes_are_read_from_another_process(one, mine, local, remote, other):
    """All blocks in reverse, into private memory of this process from private memory of that one."""
    blocks = np.arange(16)
    run(one, one.make_prepped_xfer("READ", local, blocks, remote, blocks[::-1], b"read"))
    expected = (np.arange(LENGTH) % 251).astype(np.uint8).reshape(16, -1)[::-1].reshape(-1)
    assert (mine.array == expected).all()
    assert other.ask("notifs", count=1) == {"notifs": {"one": ["read"]}}


def test_bytes_are_written_into_another_process(one, mine, local, remote, other):
    handle = one.make_prepped_xfer("WRITE", local, [3], remote, [0], b"written")
    for times in range(3):
        mine.array[:] = times
        run(one, handle)
        assert other.ask("notifs", count=1) == {"notifs": {"one": ["written"]}}
        assert other.ask("bytes", start=65534, stop=65537)["bytes"] == [times, times, 65536 % 251]


def test_the_other_process_reads_from_this_one(one, mine, other):
    """This one only registers and hands out its metadata; it takes the notification."""
    metadata = base64.b64encode(one.get_agent_metadata()).decode()
    said = other.ask("read", metadata=metadata, address=mine.address, length=4096)
    assert said == {"state": "DONE", "name": "one"}
    assert other.ask("bytes", start=0, stop=4096)["bytes"] == mine.array[:4096].tolist()
    assert awaited(one, 1) == {"other": [b"read by the other"]}


def test_a_dead_peer_is_a_remote_disconnect_on_every_call_that_needs_it(one, local, remote, other):
    """Killed while connected: posting, the state afterwards, and messages say so; handles can still be let go."""
    handle = one.make_prepped_xfer("READ", local, [0], remote, [0], b"first")
    run(one, handle)
    other.kill()
    disconnected = bindings.nixlRemoteDisconnectError
    deadline = Deadline()
    with pytest.raises(disconnected):
        # What is on its way when a peer dies may still be taken for delivered.
        while True:
            deadline.check("a dead peer is not noticed")
            finished(one, handle, one.transfer(handle))
    with pytest.raises(disconnected):
        one.check_xfer_state(handle)
    with pytest.raises(disconnected):
        one.get_xfer_telemetry(handle)
    with pytest.raises(disconnected):
        one.send_notif("other", b"lost")
    # Metadata is known whether or not the peer lives.
    assert one.check_remote_metadata("other") is True
    another = one.make_prepped_xfer("WRITE", local, [0], remote, [0])
    with pytest.raises(disconnected):
        one.transfer(another)
    for each in (handle, another):
        one.release_xfer_handle(each)
    one.release_dlist_handle(remote)
    one.remove_remote_agent("other")
    assert one.check_remote_metadata("other") is False


def test_other_peers_are_not_affected_by_a_dead_one(one, two, mine, local, remote, other):
    memory = Memory(two, 4096, start=3)
    one.add_remote_agent(two.get_agent_metadata())
    run(one, one.make_prepped_xfer("READ", local, [0], remote, [0]))
    other.kill()
    source = one.get_xfer_descs([(memory.address, 4096, 0)], "DRAM")
    target = one.get_xfer_descs([(mine.address, 4096, 0)], "DRAM")
    run(one, one.initialize_xfer("READ", target, source, "two", b"alive"))
    assert (mine.array[:4096] == memory.array).all()
    assert awaited(two, 1) == {"one": [b"alive"]}
