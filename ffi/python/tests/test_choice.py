"""Checksums of what arrives, the ways that are wanted, and what transfers are expected to take."""

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
