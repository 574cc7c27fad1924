"""Memory moves between two processes, over shared memory and over TCP."""

import array
import base64

import pytest

import kvfabric

LENGTH = 1 << 16
BLOCK = 4096


def blocks(region):
    """All blocks, last first, so that the ranges matter."""
    return [(region, offset, BLOCK) for offset in reversed(range(0, LENGTH, BLOCK))]


def test_the_path_is_the_one_that_was_asked_for(agent, other, transport):
    peer = agent.load_peer(other.metadata)
    assert peer.name == "peer"
    assert peer.path == transport
    assert peer.explain_path().startswith(transport)
    assert peer.regions[other.region] == LENGTH


def test_what_is_read_is_what_the_peer_holds(agent, other):
    peer = agent.load_peer(other.metadata)
    memory = bytearray(LENGTH)
    region = agent.register(memory)
    transfer = agent.read(blocks(region), peer, blocks(other.region))
    transfer.wait(20)
    assert transfer.done() and transfer.settled()
    assert memory == b"\x11" * LENGTH


def test_what_is_written_arrives_with_its_notification(agent, other):
    peer = agent.load_peer(other.metadata)
    memory = array.array("Q", [0x2222222222222222] * (LENGTH // 8))
    region = agent.register(memory, readable=False)
    transfer = agent.write(blocks(region), peer, blocks(other.region), notification=b"written")
    transfer.wait(20)
    answer = other.ask("receive")
    assert answer["messages"] == [["tester", base64.b64encode(b"written").decode()]]
    assert other.ask("check", byte=0x22)["holds"]


def test_messages_go_both_ways(agent, other):
    peer = agent.load_peer(other.metadata)
    agent.notify(peer, b"hello", 20)
    assert other.ask("receive")["messages"] == [["tester", base64.b64encode(b"hello").decode()]]
    assert agent.notifications() == []
    other.ask("load", metadata=base64.b64encode(agent.metadata()).decode())
    other.ask("notify", text="hello yourself")
    assert agent.notifications(20) == [("peer", b"hello yourself")]


def test_a_region_that_is_not_exported_is_out_of_reach(agent, other):
    peer = agent.load_peer(other.metadata)
    region = agent.shared_memory(LENGTH)
    assert other.hidden not in peer.regions
    with pytest.raises((kvfabric.NotFoundError, kvfabric.DeniedError)):
        agent.read(blocks(region), peer, blocks(other.hidden)).wait(20)


def test_stale_metadata_names_nothing_of_a_new_process(agent, other, transport):
    """The key of a region that a process had means nothing to a process that took its place."""
    peer = agent.load_peer(other.metadata)
    region = agent.shared_memory(LENGTH)
    agent.read(blocks(region), peer, blocks(other.region)).wait(20)
    other.kill()
    with pytest.raises(kvfabric.KvfabricError) as caught:
        for _ in range(2):
            # The first may still be served from memory that is mapped here.
            agent.read(blocks(region), peer, blocks(other.region), deadline=5).wait(20)
            agent.notify(peer, b"anyone?", 5)
    assert isinstance(caught.value, (kvfabric.PeerLostError, kvfabric.DeadlineError))


def test_ranges_outside_the_peers_region_are_refused(agent, other):
    peer = agent.load_peer(other.metadata)
    region = agent.shared_memory(LENGTH)
    with pytest.raises(kvfabric.InvalidError, match="remote: descriptor 0"):
        agent.read([(region, 0, 2)], peer, [(other.region, LENGTH - 1, 2)])
    with pytest.raises(kvfabric.InvalidError, match="local: descriptor 0"):
        agent.read([(region, LENGTH, 1)], peer, [(other.region, 0, 1)])
    with pytest.raises(kvfabric.NotFoundError):
        agent.read([(region, 0, 1)], peer, [(other.region ^ 1, 0, 1)])
