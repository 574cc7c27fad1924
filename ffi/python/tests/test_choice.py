"""Checksums of what arrives, the ways that are wanted, and what transfers are expected to take."""

import ctypes

import pytest

import kvfabric


def pair(**options):
    """An agent, a peer of it with two regions, and the peer's handle, by metadata of the first region."""
    target = kvfabric.Agent("target", tcp="127.0.0.1:0")
    regions = [target.shared_memory(4096), target.shared_memory(4096)]
    agent = kvfabric.Agent("initiator", tcp="127.0.0.1:0", **options)
    return agent, target, regions, agent.load_peer(target.metadata_of(regions[:1]))


def test_metadata_of_some_regions_adds_to_what_is_known():
    agent, target, regions, peer = pair()
    assert dict(peer.regions) == {regions[0].id: 4096}
    agent.load_peer(target.metadata_of(regions[1:]))
    assert set(dict(peer.regions)) == {region.id for region in regions}
    with pytest.raises(kvfabric.NotFoundError):
        agent.metadata_of(regions)


def test_what_differs_from_what_was_sent_is_named():
    agent, _target, regions, peer = pair()
    regions[0].view()[:64] = b"a" * 64
    own = agent.register(bytearray(4096))
    remote = agent.prepare([(regions[0].id, 0, 64), (regions[0].id, 64, 64)], peer)
    local = agent.prepare([(own, 0, 64), (own, 64, 64)])
    transfer = agent.request("read", local, remote, checksum=True)
    transfer.post()
    transfer.wait()
    assert transfer.telemetry.failovers == 0
    # Both for one place, so one of them does not find its bytes there.
    torn = agent.prepare([(own, 0, 64), (own, 0, 64)])
    transfer = agent.request("read", torn, remote, checksum=True, backends=["shm"])
    transfer.post()
    with pytest.raises(kvfabric.CorruptError, match="descriptor 0"):
        transfer.wait()


def test_the_way_that_is_wanted_is_taken_and_told():
    agent, _target, regions, peer = pair(prefer=["tcp"], tcp_congestion="reno", copy_threads=2)
    own = agent.register(bytearray(4096))
    remote = agent.prepare([(regions[0].id, 0, 64)], peer)
    local = agent.prepare([(own, 0, 64)])

    def moved_over(**options):
        transfer = agent.request("read", local, remote, **options)
        transfer.post()
        transfer.wait()
        return transfer.telemetry.path, transfer.estimate()

    path, estimate = moved_over()
    assert path == estimate.backend == "tcp"
    assert estimate.seconds > 0 and estimate.measured and estimate.refused == []
    path, estimate = moved_over(backends=["shm"])
    assert path == "shm"
    assert ("tcp", "the request wants other backends") in estimate.refused
    with pytest.raises(kvfabric.InvalidError, match="ucx"):
        agent.request("read", local, remote, backends=["ucx"])


def test_a_way_that_an_agent_does_not_have_cannot_be_preferred():
    with pytest.raises(kvfabric.InvalidError, match="preferred backend"):
        kvfabric.Agent("initiator", prefer=["tcp"])
    with pytest.raises(kvfabric.InvalidError, match="copy threads"):
        kvfabric.Agent("initiator", copy_threads=0)
    with pytest.raises(kvfabric.UnsupportedError, match="no such control"):
        kvfabric.Agent("initiator", tcp="127.0.0.1:0", tcp_congestion="no such control")


def test_ranges_of_one_pool_share_a_region():
    target = kvfabric.Agent("target")
    pool = bytearray(b"a" * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pool))
    whole = target.register_range(address, 4096, keep=pool)
    part = target.register_range(address + 1024, 64, keep=pool)
    apart = target.register_range(address + 1024, 64, writable=True, keep=pool)
    assert (part.id, part.offset, len(part)) == (whole.id, 1024, 64)
    assert part.address == address + 1024 and apart.id != whole.id

    pool[1024 : 1024 + 64] = b"b" * 64
    agent = kvfabric.Agent("initiator")
    own = agent.register(bytearray(128))
    peer = agent.load_peer(target.metadata())
    agent.read([(own, 0, 64)], peer, [(part.id, part.offset, 64)]).wait()
    copy = bytearray(64)
    beside = target.register(copy)
    moved = target.request("write", target.prepare([(part, 0, 64)]), target.prepare([(beside, 0, 64)]))
    moved.post()
    moved.wait()
    assert copy == b"b" * 64

    with pytest.raises(kvfabric.BusyError, match="other ranges"):
        whole.deregister(timeout=0)
    part.deregister()
    whole.deregister()
    with pytest.raises(kvfabric.NotFoundError):
        target.prepare([(whole.id, 0, 64)])


def test_a_cost_is_taken_for_granted_until_it_was_seen():
    agent, _target, regions, peer = pair()
    agent.assume_cost("memcpy", latency=5.0, bytes_per_second=64)
    remote = agent.prepare([(regions[0].id, 0, 64)], peer)
    own = agent.register(bytearray(64))
    transfer = agent.request("read", agent.prepare([(own, 0, 64)]), remote, backends=["memcpy"])
    assert (transfer.estimate().seconds, transfer.estimate().measured) == (6.0, False)
    with pytest.raises(kvfabric.InvalidError, match="pigeon"):
        agent.assume_cost("pigeon", latency=5.0, bytes_per_second=64)
    with pytest.raises(kvfabric.InvalidError, match="bytes a second"):
        agent.assume_cost("memcpy", latency=5.0, bytes_per_second=0)
