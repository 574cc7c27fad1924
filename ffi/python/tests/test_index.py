"""The index client, against a real index."""

import pytest

import kvfabric


def test_an_empty_index_knows_no_pods(indexer):
    index = kvfabric.Index(indexer)
    assert index.lookup(range(256)) == []
    assert (
        index.lookup([1, 2, 3], lora="adapter", cache_salt="tenant", pods_max=4, deadline=2) == []
    )


def test_tokens_must_be_numbers_of_32_bits(indexer):
    index = kvfabric.Index(indexer)
    with pytest.raises((OverflowError, TypeError)):
        index.lookup([1 << 32])
    with pytest.raises(TypeError):
        index.lookup(["token"])


def test_a_closed_port_is_named():
    with pytest.raises(kvfabric.PeerLostError, match="127.0.0.1:1"):
        kvfabric.Index("127.0.0.1:1")


def test_a_malformed_address_is_named():
    with pytest.raises(kvfabric.InvalidError, match="not an address"):
        kvfabric.Index("not an address")
