"""How agents are made: TLS, connections, addresses, RDMA, and for how long something is waited for."""

import pathlib
import re
import socket

import pytest

import kvfabric

# Certificates for the agents "initiator" and "target", of two authorities.
CERTIFICATES = pathlib.Path(__file__).parents[3] / "transfer" / "tests" / "tls"


def tls(authority="own-ca", who="member"):
    return kvfabric.Tls(
        authorities=CERTIFICATES / f"{authority}.pem",
        certificates=str(CERTIFICATES / f"{who}.pem"),
        key=CERTIFICATES / f"{who}.key",
    )


def agent(name, **options):
    """An agent that is reached over TCP alone, though it is in the same process."""
    return kvfabric.Agent(name, **{"tcp": "127.0.0.1:0", "shm": False, "memcpy": False, **options})


def path(initiator, target):
    """The way between them, and what is said of it."""
    peer = initiator.load_peer(target.metadata())
    return peer.path, peer.explain_path()


def test_bytes_go_over_several_encrypted_connections():
    target = agent("target", tls=tls())
    memory = bytearray(4 << 20)
    region = target.register(memory, writable=True)
    initiator = agent("initiator", tls=tls(), tcp_connections=2)
    peer = initiator.load_peer(target.metadata())
    data = bytes(range(256)) * (len(memory) // 256)
    own = initiator.register(bytearray(data))
    initiator.write([(own, 0, len(data))], peer, [(region.id, 0, len(data))]).wait()
    assert memory == data
    assert peer.path == "tcp"
    assert "TLS 1.3" in peer.explain_path() and "2 of 2 connections" in peer.explain_path()


@pytest.mark.parametrize(
    ("initiator", "target", "why"),
    [
        (tls("other-ca"), tls(), "UnknownIssuer"),
        (tls(), tls(who="stranger"), "UnknownIssuer"),
        (tls(), tls(who="expired"), "expired"),
        (None, tls(), "speaks TLS only"),
        (tls(), None, "does not answer in TLS"),
    ],
)
def test_who_is_not_believed_is_turned_away(initiator, target, why):
    backend, said = path(agent("initiator", tls=initiator), agent("target", tls=target))
    assert backend is None and why in said


def test_a_file_that_cannot_be_used_is_named():
    missing = tls()._replace(key=CERTIFICATES / "nobody.key")
    with pytest.raises(kvfabric.NotFoundError, match="nobody.key"):
        agent("initiator", tls=missing)
    with pytest.raises(kvfabric.InvalidError, match="TLS certificates"):
        agent("initiator", tls=tls()._replace(certificates=CERTIFICATES / "member.key"))
    with pytest.raises(kvfabric.InvalidError, match="certificates and key"):
        agent("initiator", tls=tls()._replace(key=CERTIFICATES / "stranger.key"))


def test_connections_go_to_all_addresses_of_a_peer():
    target = agent("target", tcp_rails=["127.0.0.2:0", "127.0.0.3:0"])
    backend, said = path(agent("initiator"), target)
    assert backend == "tcp" and "3 of 3 connections" in said
    with pytest.raises(kvfabric.InvalidError, match="tcp_rails"):
        agent("target", tcp_rails=["127.0.0.2"])
    for count in (0, 17):
        with pytest.raises(kvfabric.InvalidError, match="connections"):
            agent("target", tcp_connections=count)


def test_agents_of_a_process_copy_unless_told_not_to():
    target = agent("target", memcpy=True)
    assert path(agent("initiator", memcpy=True), target)[0] == "memcpy"
    assert path(agent("initiator"), target)[0] == "tcp"


def test_times_are_told():
    quick = agent("initiator", look=0.0, slow_after=None)
    assert path(quick, agent("target", look=0.001, slow_after=0.1))[0] == "tcp"
    with pytest.raises(kvfabric.InvalidError, match="look"):
        agent("target", look=0.01)
    with pytest.raises(kvfabric.InvalidError, match="timeout"):
        agent("target", slow_after=-1.0)
    with pytest.raises(kvfabric.InvalidError, match="connect within"):
        agent("target", connect_within=61.0)
    with pytest.raises(kvfabric.InvalidError, match="connect within"):
        agent("target", connect_within=0.0)


def test_a_peer_that_does_not_answer_is_waited_for_as_long_as_said():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        target = agent("target", tcp_advertise=f"127.0.0.1:{port}")
        backend, said = path(agent("initiator", connect_within=0.05), target)
        assert backend is None and re.search(r"within \d+ms", said)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mtu": 1500}, "verbs mtu"),
        ({"retries": 8}, "verbs retries"),
        ({"timeout": 0}, "verbs timeout"),
        ({"service_level": 16}, "verbs service level"),
        ({"rails": 0}, "verbs rails"),
        ({"near": "pigeon"}, "verbs near"),
        ({"connect": "pigeon"}, "verbs connect"),
        ({"connect": "rdma_cm", "service_level": 1}, "verbs service level by rdma_cm"),
        ({"listen": "pigeon"}, "verbs.listen"),
    ],
)
def test_what_rdma_is_told_is_checked(options, what):
    with pytest.raises(kvfabric.InvalidError, match=what):
        agent("initiator", verbs=kvfabric.Verbs(**options))


def test_rdma_without_such_a_device_is_refused():
    """There is no library, no device at all, or not this one."""
    with pytest.raises(kvfabric.UnsupportedError):
        agent("initiator", verbs=kvfabric.Verbs(device="pigeon0", listen="127.0.0.1:0"))
