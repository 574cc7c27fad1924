"""The agent and its regions within one process."""

import gc
import os
import threading
import weakref

import pytest

import kvfabric


@pytest.fixture
def agent():
    return kvfabric.Agent("one")


class Memory(bytearray):
    """A bytearray that can be referred to weakly."""


def test_every_error_kind_has_a_class_with_its_number():
    classes = kvfabric.KvfabricError.__subclasses__()
    assert sorted(c.code for c in classes) == list(range(1, 16))
    assert all(c.__name__ in kvfabric.__all__ for c in classes)
    assert kvfabric.InvalidError.code == 1 and kvfabric.InternalError.code == 15


def test_bytes_are_copied_between_own_regions(agent):
    source = agent.register(b"0123456789")
    memory = bytearray(10)
    target = agent.register(memory)
    agent.read([(target, 0, 5)], None, [(source, 5, 5)]).wait()
    assert memory == b"56789" + bytes(5)
    agent.write([(source, 0, 5)], None, [(target, 5, 5)]).wait()
    assert memory == b"5678901234"


def test_read_only_memory_is_never_written_to(agent):
    constant = b"constant"
    region = agent.register(constant)
    other = agent.register(bytearray(8))
    with pytest.raises(kvfabric.DeniedError, match="read-only"):
        agent.read([(region, 0, 8)], None, [(other, 0, 8)])
    with pytest.raises(kvfabric.DeniedError, match="read-only"):
        agent.write([(other, 0, 8)], None, [(region, 0, 8)])
    with pytest.raises(kvfabric.DeniedError, match="read-only"):
        agent.register(constant, writable=True)
    assert constant == b"constant"


def test_a_registered_object_lives_until_it_is_deregistered(agent):
    memory = Memory(64)
    alive = weakref.ref(memory)
    region = agent.register(memory)
    del memory
    gc.collect()
    assert alive() is not None
    with pytest.raises(BufferError):
        alive().append(1)
    region.deregister()
    gc.collect()
    assert alive() is None
    region.deregister()
    with pytest.raises(kvfabric.NotFoundError):
        agent.read([(region, 0, 1)], None, [(region, 1, 1)])


def test_a_dropped_region_lets_its_object_go(agent):
    memory = Memory(64)
    alive = weakref.ref(memory)
    region = agent.register(memory)
    del memory, region
    gc.collect()
    assert alive() is None


def test_a_transfer_keeps_its_regions_alive(agent):
    memory = Memory(b"x" * 64)
    alive = weakref.ref(memory)
    transfer = agent.read(
        [(agent.register(bytearray(64)), 0, 64)], None, [(agent.register(memory), 0, 64)]
    )
    del memory
    gc.collect()
    assert alive() is not None
    transfer.wait()
    del transfer
    gc.collect()
    assert alive() is None


def test_a_view_outlives_its_region(agent):
    region = agent.shared_memory(4096)
    view = region.view()
    assert len(view) == len(region) == 4096 and not view.readonly and view[4095] == 0
    region.deregister()
    del region
    gc.collect()
    view[4095] = 7
    assert view[4095] == 7


def test_only_own_memory_has_a_view(agent):
    with pytest.raises(kvfabric.UnsupportedError):
        agent.register(bytearray(8)).view()


@pytest.mark.parametrize(
    "memory", [object(), 5, "text", memoryview(bytearray(8))[::2], bytearray()]
)
def test_what_is_no_memory_is_refused(agent, memory):
    with pytest.raises(kvfabric.InvalidError):
        agent.register(memory)


def test_bad_arguments_are_named():
    with pytest.raises(kvfabric.InvalidError, match="localhost"):
        kvfabric.Agent("one", tcp="localhost")
    with pytest.raises(kvfabric.InvalidError, match="name"):
        kvfabric.Agent("")
    agent = kvfabric.Agent("one")
    region = agent.shared_memory(8)
    for timeout in (-1.0, float("nan"), float("inf"), 1e8):
        with pytest.raises(kvfabric.InvalidError, match="timeout"):
            agent.notifications(timeout)
    with pytest.raises(kvfabric.InvalidError, match="another agent"):
        kvfabric.Agent("two").read([(region, 0, 1)], None, [(region, 1, 1)])
    with pytest.raises(kvfabric.InvalidError, match="pair|lengths|len"):
        agent.read([(region, 0, 1)], None, [(region, 1, 2)])
    with pytest.raises(kvfabric.NotFoundError, match="region"):
        agent.read([(region, 0, 1)], None, [(region.id ^ 1, 1, 1)])


def test_damaged_metadata_is_refused(agent):
    metadata = bytearray(agent.metadata())
    metadata[-1] ^= 1
    with pytest.raises(kvfabric.CorruptError):
        agent.load_peer(bytes(metadata))
    with pytest.raises(kvfabric.KvfabricError):
        agent.load_peer(b"")


def test_a_wait_lets_other_threads_run(agent):
    """The other thread can only send if the waiting one has released the GIL."""
    sender = kvfabric.Agent("sender")
    peer = sender.load_peer(agent.metadata())
    assert peer.path == "memcpy"
    waiting = threading.Event()
    taken = []

    def wait():
        waiting.set()
        taken.extend(agent.notifications(20))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(20)
    sender.notify(peer, b"now", 20)
    thread.join(20)
    assert taken == [("sender", b"now")]


def test_a_forked_child_is_told(agent):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            agent.metadata()
        except kvfabric.ForkedError:
            said = b"forked"
        finally:
            os.write(write_end, said)
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"forked"
    os.waitpid(child, 0)
