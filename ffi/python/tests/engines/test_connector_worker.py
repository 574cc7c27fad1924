"""The connector's half in a worker, with a real node over a real pool, and steps as the scheduler's
half writes them.
"""

import time
from typing import Any, Callable, Iterator, List, Set

import pytest
import torch
from connector_pool import BLOCKS, LAYERS, PAGE, TOKENS, engine_config, pool, tensors

import kvfabric
from kvfabric.vllm.config import ConnectorConfig
from kvfabric.vllm.engine import EngineFacts
from kvfabric.vllm.metadata import Load, Pin, Sources, StepMetadata, Store
from kvfabric.vllm.worker import WorkerSide

PATIENCE = 30.0
BLOCK_BYTES = LAYERS * PAGE


@pytest.fixture(scope="module")
def engine(tiny_model):
    return engine_config(tiny_model)


class Worker:
    """One rank and its pool, whose blocks are filled with numbers."""

    def __init__(self, engine: Any, **settings: Any):
        config = ConnectorConfig.parse({"host": {"bytes": 64 * BLOCK_BYTES}, **settings})
        cache = pool(engine)
        self.views = tensors(cache)
        self.side = WorkerSide(config, EngineFacts.of(config, engine, cache), engine, 0)
        self.side.register(cache, self.views)
        self.side.open()
        self.sent: Set[str] = set()
        self.received: Set[str] = set()

    def fill(self, block: int, number: int) -> None:
        for view in self.views.values():
            view[block].fill_(number)

    def read(self, block: int) -> Set[float]:
        return {float(one) for view in self.views.values() for one in torch.unique(view[block])}

    def step(self, **step: Any) -> None:
        """One step of the engine, in its order."""
        metadata = StepMetadata(**step)
        self.side.before_step(metadata)
        self.side.load(metadata)
        self.side.store(metadata)
        sent, received = self.side.poll()
        assert not self.sent & sent and not self.received & received, "reported twice"
        self.sent |= sent
        self.received |= received

    def until(self, done: Callable[[], bool]) -> None:
        """Empty steps until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"sent {self.sent}, received {self.received}"
            self.step()

    def store(self, stored: Store) -> None:
        """Stores blocks, and goes on until that is done."""
        self.step(stores=[stored], releases=[stored.request_id])
        self.until(lambda: stored.request_id in self.sent)
        self.sent.remove(stored.request_id)

    def load(self, loaded: Load) -> Set[int]:
        """Loads blocks, and goes on until that is over; the blocks that were not loaded."""
        self.step(loads=[loaded])
        self.until(lambda: loaded.request_id in self.received)
        self.received.remove(loaded.request_id)
        failed = self.side.take_failed_blocks()
        assert self.side.take_failed_blocks() == set(), "told twice"
        return failed


@pytest.fixture
def worker(engine) -> Iterator[Callable[..., Worker]]:
    made: List[Worker] = []

    def make(**settings: Any) -> Worker:
        made.append(Worker(engine, **settings))
        return made[-1]

    yield make
    for one in made:
        one.side.shutdown()


def names(blocks: int, prompt: int = 0) -> bytes:
    chain = kvfabric.NameChain("xxh3:1337", "tiny", TOKENS)
    hashes = [bytes([prompt, number]) * 16 for number in range(blocks)]
    chain.extend(range(blocks * TOKENS), hashes)
    return chain.pack(0, blocks)


def store(request: str, block_ids: List[int], prompt: int = 0, awaited: bool = False) -> Store:
    return Store(request, names(len(block_ids), prompt), block_ids, awaited)


def load(request: str, block_ids: List[int], prompt: int = 0, first: int = 0) -> Load:
    stop = first + len(block_ids)
    return Load(request, names(stop, prompt), first, block_ids, (Sources(),))


def test_the_engines_memory_is_exported_to_nobody(worker):
    """Peers read what was copied into the tiers, never the engine's own pool."""
    side = worker().side
    peer = kvfabric.Agent("stranger").load_peer(side._node.agent.metadata())
    assert peer.regions, "not even the host tier is exported"
    assert side._region.id not in peer.regions


def test_stored_blocks_come_back_into_other_blocks(worker):
    """Two blocks out of the pool and back into two others."""
    one = worker()
    one.fill(1, 11)
    one.fill(2, 12)
    one.store(store("a", [1, 2]))
    assert one.load(load("b", [4, 5])) == set()
    assert (one.read(4), one.read(5)) == ({11.0}, {12.0})
    counted = one.side.stats.data
    assert counted["stored_blocks"] == counted["fetched_blocks_dram"] == 2
    assert counted["fetched_bytes"] == 2 * BLOCK_BYTES


def test_blocks_past_the_first_miss_are_told_with_their_request(worker):
    """Two of three are there; the third is told in the pass in which the request is."""
    one = worker()
    one.store(store("a", [1, 2]))
    assert one.load(load("b", [3, 4, 5])) == {5}
    assert one.side.stats.data["fetches_failed"] == 1


def test_a_fetch_may_begin_behind_the_engines_own_blocks(worker):
    """The engine has the first block itself."""
    one = worker()
    one.fill(2, 7)
    one.store(store("a", [1, 2]))
    assert one.load(load("b", [5], first=1)) == set()
    assert one.read(5) == {7.0}


def test_a_preempted_requests_blocks_are_not_read_any_more_when_the_step_begins(worker):
    """What the engine writes then is not what was stored. Many times, so that a race would show."""
    one = worker()
    for turn in range(20):
        one.fill(1, turn)
        one.step(stores=[store("a", [1], prompt=turn)])
        one.side.before_step(StepMetadata(preempted={"a"}))
        one.fill(1, 100)
        assert one.load(load("b", [2], prompt=turn)) == set()
        assert one.read(2) == {float(turn)}


def test_the_scheduler_is_told_how_many_stores_of_a_request_are_over(worker):
    """Two stores of one request and one of another."""
    one = worker()
    settled = {"a": 0, "b": 0}

    def told() -> bool:
        metadata = one.side.take_metadata()
        for request, count in (metadata.settled if metadata else {}).items():
            settled[request] += count
        return settled == {"a": 2, "b": 1}

    one.step(stores=[store("a", [1]), store("a", [1, 2]), store("b", [3], prompt=1)])
    one.until(told)
    assert one.side.take_metadata() is None


def test_a_clear_forgets_what_came_before_it_and_not_what_comes_after(worker):
    """A store under way, a pinned prefix and a load in the same step; then a store again."""
    one = worker()
    one.step(stores=[store("a", [1, 2])], pins=[Pin("a", names(2), 1)])
    one.step(clear=True, loads=[load("b", [3, 4])])
    one.until(lambda: "b" in one.received)
    assert one.side.take_failed_blocks() == {3, 4}
    metadata = one.side.take_metadata()
    assert metadata is not None and metadata.cleared == 1
    one.fill(1, 9)
    one.store(store("c", [1]))
    assert one.load(load("d", [5])) == set()
    assert one.read(5) == {9.0}


def test_stores_past_the_bound_are_skipped_unless_another_engine_waits(worker):
    """A bound of one block: the first store of a step goes, one that is awaited waits for room."""
    one = worker(store_inflight_max=BLOCK_BYTES)
    stores = [store("a", [1]), store("b", [2], 1), store("c", [3], 2, awaited=True)]
    one.step(stores=stores, releases=["a", "b", "c"])
    one.until(lambda: one.sent == {"a", "b", "c"})
    counted = one.side.stats.data
    assert (counted["stored_blocks"], counted["skipped_blocks"]) == (2, 1)
    assert one.load(load("d", [5], 0)) == set()
    assert one.load(load("e", [5], 1)) == {5}
    assert one.load(load("f", [5], 2)) == set()


def test_after_a_shutdown_everything_is_a_miss_and_is_reported(worker):
    """Late steps of an engine that is ending."""
    one = worker()
    one.side.shutdown()
    one.step(pins=[Pin("b", names(1), 2)])
    one.store(store("b", [3]))
    assert one.load(load("a", [1, 2])) == {1, 2}
    assert one.side.stats.data["store_failed_blocks"] == 1
    one.side.shutdown()


def test_a_pinned_prefix_stays_when_others_need_the_room(worker):
    """A tier of few blocks, a pinned prefix, and more stores than fit."""
    one = worker(host={"bytes": 8 * BLOCK_BYTES})
    for request, prompt in (("pinned", 200), ("plain", 201)):
        one.fill(1, prompt - 195)
        one.store(store(request, [1], prompt))
    one.step(pins=[Pin("pinned", names(1, prompt=200), 3)])
    # In force once the worker heard of it.
    one.until(lambda: bool(one.side._pins._held))
    for turn in range(4):
        one.store(store("b", list(range(BLOCKS)), prompt=turn))
    assert one.load(load("c", [2], prompt=200)) == set()
    assert one.read(2) == {5.0}
    assert one.load(load("d", [2], prompt=201)) == {2}
