"""Lookups of what pods really hold: publishers that speak as vLLM does, an index that follows them, and the client."""

import time

import pytest

import kvfabric

BLOCK = 16
PROMPT = list(range(1000, 1000 + 6 * BLOCK))
# vLLM's hashes are any 64 bits; the index takes them as names.
HASHES = [(1 << 64) - 1 - position for position in range(6)]
# How long the index may take to follow before the test fails.
PATIENCE = 30.0


def stored(first, end, medium):
    """The blocks of the prompt from `first` up to `end`."""
    return {
        "type": "BlockStored",
        "block_hashes": HASHES[first:end],
        "parent_block_hash": HASHES[first - 1] if first else None,
        "token_ids": PROMPT[first * BLOCK : end * BLOCK],
        "block_size": BLOCK,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
    }


def removed(position, medium):
    return {"type": "BlockRemoved", "block_hashes": [HASHES[position]], "medium": medium}


def found(pods):
    return [(pod.pod, pod.depth, pod.by_tier) for pod in pods]


def eventually(index, expected):
    """Asks until the index answers what is expected: it follows its sources at its own pace."""
    deadline = time.monotonic() + PATIENCE
    while True:
        pods = index.lookup(PROMPT)
        if found(pods) == expected:
            return pods
        assert time.monotonic() < deadline, f"the index says {pods}, not {expected}"


def test_a_lookup_follows_what_a_pod_stores_and_removes(publisher, index_of):
    engine = publisher("pod-0")
    # Before the index is there, so that it comes by replay; the rest comes as it happens.
    engine.publish([stored(0, 3, "GPU")])
    index = kvfabric.Index(index_of(engine))
    (pod,) = eventually(index, [("pod-0", 3, (3, 0, 0, 0))])
    assert pod.score == 3.0
    assert pod.peer_address == engine.peer_address

    # vLLM offloads blocks that it still has, one an event: the faster tier counts until it lets go.
    engine.publish([stored(3, 6, "GPU"), stored(5, 6, "CPU"), stored(4, 5, "CPU")])
    eventually(index, [("pod-0", 6, (6, 0, 0, 0))])
    engine.publish([removed(5, "GPU"), removed(4, "GPU")])
    (pod,) = eventually(index, [("pod-0", 6, (4, 2, 0, 0))])
    assert pod.score == pytest.approx(4 * 1.0 + 2 * 0.8)

    # A hole ends the prefix, whatever the pod holds behind it.
    engine.publish([removed(4, "CPU")])
    (pod,) = eventually(index, [("pod-0", 4, (4, 0, 0, 0))])
    assert pod.score == 4.0
    engine.publish([removed(2, "GPU")])
    (pod,) = eventually(index, [("pod-0", 2, (2, 0, 0, 0))])
    assert pod.score == 2.0
    engine.publish([{"type": "AllBlocksCleared"}])
    eventually(index, [])


def test_only_the_same_prefix_of_the_same_model_and_tenant_is_found(publisher, index_of):
    engine = publisher("pod-0")
    engine.publish([stored(0, 6, "GPU")])
    index = kvfabric.Index(index_of(engine))
    whole = eventually(index, [("pod-0", 6, (6, 0, 0, 0))])

    assert found(index.lookup(PROMPT, model=engine.model)) == found(whole)
    assert found(index.lookup(PROMPT + [1, 2, 3])) == found(whole)
    assert found(index.lookup(PROMPT[: 4 * BLOCK - 1])) == [("pod-0", 3, (3, 0, 0, 0))]
    branch = PROMPT[: 2 * BLOCK] + [7] * BLOCK + PROMPT[3 * BLOCK :]
    assert found(index.lookup(branch)) == [("pod-0", 2, (2, 0, 0, 0))]
    assert index.lookup(PROMPT[BLOCK:]) == []
    assert index.lookup(PROMPT, model="another") == []
    assert index.lookup(PROMPT, lora="adapter") == []
    assert index.lookup(PROMPT, cache_salt="tenant") == []


def test_the_deepest_pod_comes_first(publisher, index_of):
    engines = [publisher("pod-0"), publisher("pod-1")]
    engines[0].publish([stored(0, 2, "GPU")])
    engines[1].publish([stored(0, 5, "GPU")])
    index = kvfabric.Index(index_of(*engines))
    eventually(index, [("pod-1", 5, (5, 0, 0, 0)), ("pod-0", 2, (2, 0, 0, 0))])
    assert found(index.lookup(PROMPT, pods_max=1)) == [("pod-1", 5, (5, 0, 0, 0))]

    engines[1].publish([removed(1, "GPU")])
    eventually(index, [("pod-0", 2, (2, 0, 0, 0)), ("pod-1", 1, (1, 0, 0, 0))])
