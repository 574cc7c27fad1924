"""Where blocks are, and that they are not needed any more: what the scheduler tells nodes, without an
engine.
"""

import dataclasses
import socket
import time
from typing import Any, Callable, Iterator, List

import pytest

import kvfabric
from kvfabric.vllm.handoff import Handoff, new_pin
from kvfabric.vllm.lookup import PEERS_MAX, Answer, Lookup, Peers
from kvfabric.vllm.releases import Releases
from kvfabric.vllm.stats import ConnectorStats

TOKENS, BLOCK_BYTES, BLOCKS = 4, 4096, 6
IDENTITY = "ab" * 32
PATIENCE = 60.0


class Rank:
    """One rank's node, with a pool of blocks."""

    def __init__(self, pod: str, rank: int = 0, ranks: int = 1):
        self.node = kvfabric.Node(
            {
                "pod": pod,
                "model": "m",
                "model_identity": IDENTITY,
                "block_bytes": BLOCK_BYTES,
                "block_tokens": TOKENS,
                "host": {"bytes": 64 * BLOCK_BYTES},
                "shard": {"tensor_rank": rank, "tensor_size": ranks, "kv_heads": ranks},
                "engine": {"name": "vllm/tagged", "hash": "sha256_cbor", "seed": "0"},
            }
        )
        self.region = self.node.agent.register(bytearray(BLOCKS * BLOCK_BYTES), writable=True)
        self.pages = self.node.pages([(self.region, 0, BLOCK_BYTES, BLOCK_BYTES)], BLOCKS)

    @property
    def address(self) -> str:
        assert self.node.peer_address is not None
        return self.node.peer_address

    def store(self, names: bytes, blocks: int) -> None:
        report = self.node.store(self.node.prefix_of(names), self.pages, range(blocks)).wait()
        assert report.stored == blocks


@pytest.fixture
def rank() -> Iterator[Callable[..., Rank]]:
    made: List[Rank] = []

    def make(*arguments: Any) -> Rank:
        made.append(Rank(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.node.shutdown()


def names(start: int = 0, stop: int = BLOCKS) -> bytes:
    """Names of a sequence's blocks, as an engine would hash them."""
    chain = kvfabric.NameChain("xxh3:1337", "m", TOKENS)
    chain.extend(range(BLOCKS * TOKENS), [bytes([number]) * 32 for number in range(BLOCKS)])
    return chain.pack(start, stop)


def answers(lookup: Lookup) -> List[Answer]:
    """Polls as the scheduler does, once a step."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = lookup.poll()
        if found is not None:
            return found
        assert time.monotonic() < deadline, "the lookup does not end"


def promise(address: str, depth: int = BLOCKS) -> Handoff:
    """What a prefill engine at this address says of the sequence."""
    return Handoff("prefill", (address,), IDENTITY, depth, depth * TOKENS, 1)


def asked(decode: Rank, handoff: Handoff, wait: float = PATIENCE) -> Lookup:
    """A decode engine's question; its own node may take as long as it likes."""
    return Lookup(Peers(PATIENCE), [decode.address], names(), BLOCKS, handoff, PATIENCE, wait)


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1:%d" % probe.getsockname()[1]


def test_each_rank_is_asked_and_answers_for_itself(rank):
    """Two ranks of which one lacks the last blocks."""
    ranks = [rank("p", 0, 2), rank("p/rank1", 1, 2)]
    ranks[0].store(names(), BLOCKS)
    ranks[1].store(names(0, 2), 2)
    lookup = Lookup(
        Peers(PATIENCE), [one.address for one in ranks], names(), BLOCKS, None, PATIENCE, PATIENCE
    )
    found = answers(lookup)
    assert [(one.depth, one.own, one.host, one.disk) for one in found] == [
        (BLOCKS, BLOCKS, BLOCKS, 0),
        (2, 2, 2, 0),
    ]
    assert lookup.failures == 0


def test_a_handoff_is_waited_for_until_the_prefill_engine_holds_it(rank):
    """The prefill engine stores after the question was asked; until then there is no answer."""
    prefill, decode = rank("prefill"), rank("decode")
    handoff = promise(prefill.address)
    lookup = asked(decode, handoff)
    # It was asked at least once before there is anything.
    assert prefill.node.held(prefill.node.prefix_of(names())).wait().depth == 0
    assert lookup.poll() is None
    prefill.store(names(), BLOCKS)
    (found,) = answers(lookup)
    assert found.depth == BLOCKS
    assert found.own == 0
    assert found.sources.holders[0] == ("prefill", BLOCKS, prefill.address)


def test_a_handoff_is_waited_for_longer_than_an_answer(rank):
    """The time that nodes have to answer is over before the prefill engine has stored anything."""
    prefill, decode = rank("prefill"), rank("decode")
    lookup = Lookup(
        Peers(PATIENCE),
        [decode.address],
        names(),
        BLOCKS,
        promise(prefill.address),
        0.05,
        PATIENCE,
    )
    while time.monotonic() <= lookup.ends:
        assert lookup.poll() is None
    assert lookup.poll() is None
    prefill.store(names(), BLOCKS)
    assert answers(lookup)[0].depth == BLOCKS


def test_a_promise_past_the_prompt_is_not_waited_for(rank):
    """The client's parameters promise more blocks than the prompt has."""
    prefill, decode = rank("prefill"), rank("decode")
    prefill.store(names(), BLOCKS)
    handoff = promise(prefill.address, 1000)
    lookup = asked(decode, handoff, 1000.0)
    (found,) = answers(lookup)
    assert found.depth == BLOCKS


def test_what_a_prefill_engine_lacks_at_the_deadline_is_done_without(rank):
    """It promised more than it ever holds."""
    prefill, decode = rank("prefill"), rank("decode")
    prefill.store(names(0, 2), 2)
    handoff = promise(prefill.address)
    lookup = asked(decode, handoff, 1.0)
    (found,) = answers(lookup)
    assert found.depth == 2


def test_a_prefill_engine_that_is_gone_is_a_miss_and_counted(rank):
    """Nobody listens at the address that the client brought."""
    decode = rank("decode")
    decode.store(names(0, 1), 1)
    handoff = promise(nobody())
    lookup = asked(decode, handoff, 2.0)
    (found,) = answers(lookup)
    assert (found.depth, found.own, found.sources.holders) == (1, 1, ())
    assert lookup.failures > 0


def test_addresses_that_are_none_are_a_miss_and_counted(rank):
    """The client's parameters are text from outside."""
    decode = rank("decode")
    handoff = promise("no address at all")
    lookup = asked(decode, handoff, 2.0)
    assert answers(lookup)[0].depth == 0
    assert lookup.failures > 0


def test_a_node_that_does_not_answer_costs_the_deadline(rank):
    """A listener that accepts and says nothing stands for a rank that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:%d" % listener.getsockname()[1]
        lookup = Lookup(Peers(PATIENCE), [address], names(), BLOCKS, None, 0.5, PATIENCE)
        assert answers(lookup) == [Answer()]
    assert lookup.failures == 1


def test_connections_to_peers_are_bounded():
    """The one not used for longest is let go; one in use is kept."""
    peers = Peers(1.0)
    first = peers.at("127.0.0.1:1")
    for port in range(2, PEERS_MAX + 1):
        peers.at(f"127.0.0.1:{port}")
    assert peers.at("127.0.0.1:1") is first
    second = peers.at("127.0.0.1:2")
    peers.at("127.0.0.1:1")
    peers.at(f"127.0.0.1:{PEERS_MAX + 1}")
    assert peers.at("127.0.0.1:1") is first
    assert peers.at("127.0.0.1:2") is second


def test_every_rank_is_told_that_its_blocks_were_fetched(rank):
    """Two ranks that keep blocks under the number that their scheduler chose, and one between them
    that is gone: that one is counted.
    """
    ranks, pin = [rank("p"), rank("p/rank2")], new_pin()
    for one in ranks:
        one.store(names(), BLOCKS)
        one.node.pin(one.node.prefix_of(names()), ttl=600.0, id=pin).wait()
        assert one.node.stats()["pinned_blocks"] == BLOCKS
    stats = ConnectorStats()
    releases = Releases(Peers(PATIENCE), PATIENCE, stats)
    addresses = (ranks[0].address, nobody(), ranks[1].address)
    releases.send(dataclasses.replace(promise(nobody()), addresses=addresses, pin=pin))
    deadline = time.monotonic() + PATIENCE
    while any(one.node.stats()["pinned_blocks"] for one in ranks) or stats.is_empty():
        assert time.monotonic() < deadline, "blocks are still kept, or a rank was not counted"
        releases.poll()
    assert stats.data == {"releases_failed": 1}


def test_blocks_that_were_fetched_before_they_were_kept_are_not_kept(rank):
    """The decode engine is done before the prefill engine's worker has asked for the pin."""
    prefill, pin = rank("prefill"), new_pin()
    prefill.store(names(), BLOCKS)
    service = kvfabric.PeerService(prefill.address, deadline=PATIENCE)
    service.unpin(pin, IDENTITY).wait()
    pinned = prefill.node.pin(prefill.node.prefix_of(names()), ttl=600.0, id=pin).wait()
    assert pinned.depth == 0
    assert prefill.node.stats()["pinned_blocks"] == 0
