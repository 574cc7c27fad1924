"""Nodes: what they store, find, bring back and refuse."""

import array
import asyncio
import hashlib
import itertools
import pathlib
import threading
import time

import numpy
import pytest

import kvfabric

LAYERS = 3
PART = 1024
BLOCK_BYTES = LAYERS * PART
BLOCK_TOKENS = 16
POOL_BLOCKS = 32
TIMEOUT = 20.0
# How long something that happens by itself may take before the test fails.
PATIENCE = 20.0
IDENTITY = hashlib.sha256(b"weights").hexdigest()
PROMPT = list(range(1000, 1000 + 8 * BLOCK_TOKENS))


def configuration(pod="node", **more):
    return {
        "pod": pod,
        "model": "m",
        "model_identity": IDENTITY,
        "block_bytes": BLOCK_BYTES,
        "block_tokens": BLOCK_TOKENS,
        "shard": {"layers": LAYERS, "kv_heads": 1},
        "host": {"bytes": 64 * BLOCK_BYTES},
        "engine": {"name": "vllm/tagged", "hash": "sha256_cbor", "seed": "0"},
        **more,
    }


class Pool:
    """An engine's memory: for each layer, the pages of all blocks."""

    def __init__(self, node):
        self.memory = numpy.zeros((LAYERS, POOL_BLOCKS, PART), dtype=numpy.uint8)
        self.region = node.agent.register(self.memory)
        layers = range(LAYERS)
        segments = [(self.region, layer * POOL_BLOCKS * PART, PART, PART) for layer in layers]
        self.pages = node.pages(segments, POOL_BLOCKS)

    def fill(self, blocks):
        for block in blocks:
            for layer in range(LAYERS):
                self.memory[layer, block] = 10 * block + layer + 1

    def holds(self, block, filled):
        """Whether a block has the bytes that `fill` gives to another one."""
        return all(
            (self.memory[layer, block] == 10 * filled + layer + 1).all() for layer in range(LAYERS)
        )


@pytest.fixture
def node():
    opened = kvfabric.Node(configuration())
    yield opened
    opened.shutdown(TIMEOUT)


@pytest.fixture
def pool(node):
    return Pool(node)


def prefix(node, tokens=PROMPT, **namespace):
    made = node.prefix(**namespace)
    made.extend(tokens)
    return made


def names(count, **more):
    chain = kvfabric.NameChain("xxh3:1337", "m", BLOCK_TOKENS, **more)
    hashes = [hashlib.sha256(b"%d" % position).digest() for position in range(count)]
    chain.extend(PROMPT[: count * BLOCK_TOKENS], hashes)
    return chain


def stored(node, pool, count=8):
    """The prompt's first blocks, stored from the pool's."""
    pool.fill(range(count))
    one = prefix(node)
    report = node.store(one, pool.pages, range(count)).wait(TIMEOUT)
    assert report == (count, 0, 0, 0)
    return one


def test_blocks_come_back_as_they_were(node, pool):
    one = stored(node, pool)
    again = node.store(one, pool.pages, range(8)).wait(TIMEOUT)
    assert (again.stored, again.already_held) == (0, 8)
    targets = numpy.arange(20, 28)
    report = node.fetch(one, pool.pages, targets).wait(TIMEOUT)
    assert report.depth == 8 and report.sources == ["dram"] * 8
    assert report.unsettled == [] and report.drained()
    assert all(pool.holds(target, block) for block, target in enumerate(targets))
    assert node.held(one).wait(TIMEOUT) == kvfabric.Held(depth=8, host=8, disk=0, expected=8)
    assert node.stats()["stored"] == 8


def test_a_run_within_a_prefix_is_stored_and_fetched(node, pool):
    pool.fill(range(8))
    one = prefix(node)
    assert node.store(one, pool.pages, [2, 3], first=2).wait(TIMEOUT).stored == 2
    assert node.held(one).wait(TIMEOUT).depth == 0
    report = node.fetch(one, pool.pages, array.array("I", [20, 21, 22]), first=2).wait(TIMEOUT)
    assert report.depth == 2 and report.sources == ["dram", "dram", "miss"]
    assert pool.holds(20, 2) and pool.holds(21, 3)


def test_only_the_same_tokens_adapter_and_salt_name_a_block(node, pool):
    one = stored(node, pool)
    others = [
        prefix(node, PROMPT[1:]),
        prefix(node, lora="adapter"),
        prefix(node, cache_salt="tenant"),
        node.prefix_of(names(7).pack(0, 7)),
    ]
    for other in others:
        assert len(other) == 8 or len(other) == 7
        assert other.key(0) != one.key(0)
        assert node.held(other).wait(TIMEOUT).depth == 0
        assert node.fetch(other, pool.pages, [30]).wait(TIMEOUT).sources == ["miss"]
    assert prefix(node).key(7) == one.key(7)


def test_a_prefix_grows_by_any_steps(node):
    one, grown = prefix(node), node.prefix()
    for tokens in (PROMPT[:5], PROMPT[5:40], numpy.array(PROMPT[40:])):
        grown.extend(tokens)
    assert len(grown) == len(one) == 8
    assert [grown.key(b) for b in range(8)] == [one.key(b) for b in range(8)]
    assert grown.extend([1]) == 8
    with pytest.raises(kvfabric.InvalidError, match="position"):
        one.key(8)
    with pytest.raises(kvfabric.InvalidError, match="tokens"):
        grown.extend(array.array("q", [-5]))


def test_an_engines_names_store_and_fetch(node, pool):
    chain = names(4)
    pool.fill(range(4))
    whole = node.prefix_of(chain.pack(0, 4))
    assert node.store(whole, pool.pages, range(4)).wait(TIMEOUT).stored == 4
    tail = node.prefix_of(chain.pack(2, 4))
    assert [tail.key(0), tail.key(1)] == [whole.key(2), whole.key(3)]
    assert node.fetch(tail, pool.pages, [20, 21]).wait(TIMEOUT).depth == 2
    assert pool.holds(20, 2) and pool.holds(21, 3)
    with pytest.raises(kvfabric.UnsupportedError, match="extend"):
        tail.extend([1])
    adapted = node.prefix_of(chain.pack(0, 4), adapter_identity=bytes(32))
    assert adapted.key(0) != whole.key(0)
    with pytest.raises(kvfabric.InvalidError, match="adapter_identity"):
        node.prefix_of(chain.pack(0, 4), adapter_identity=b"")
    for broken in (b"", chain.pack(0, 4)[:-1], chain.pack(0, 4) + b"x"):
        with pytest.raises(kvfabric.InvalidError, match="names"):
            node.prefix_of(broken)
    with pytest.raises(kvfabric.VersionError):
        node.prefix_of(b"\x02" + chain.pack(0, 4)[1:])


def test_hashes_without_tokens_store_and_fetch(node, pool):
    pool.fill(range(3))
    hashes = [hashlib.sha256(b"%d" % position).digest() for position in range(3)]
    pages = node.prefix_of(kvfabric.pack_hashes(b"root", hashes))
    assert node.store(pages, pool.pages, range(3)).wait(TIMEOUT).stored == 3
    # What came before a block is no part of its name.
    backwards = node.prefix_of(kvfabric.pack_hashes(b"root", hashes[::-1]))
    assert node.fetch(backwards, pool.pages, [20, 21, 22]).wait(TIMEOUT).depth == 3
    assert all(pool.holds(20 + position, 2 - position) for position in range(3))


def test_names_mean_nothing_to_a_node_without_an_engine():
    config = configuration()
    del config["engine"]
    node = kvfabric.Node(config)
    with pytest.raises(kvfabric.UnsupportedError, match="engine"):
        node.prefix_of(names(1).pack(0, 1))
    node.shutdown(TIMEOUT)


def test_operations_are_awaited(node, pool):
    one = prefix(node)
    pool.fill(range(8))

    async def both():
        assert (await node.store(one, pool.pages, range(8))).stored == 8
        first, second = await asyncio.gather(
            waited(node.fetch(one, pool.pages, range(16, 24))),
            waited(node.fetch(one, pool.pages, range(24, 32))),
        )
        assert first.depth == second.depth == 8

    async def waited(operation):
        return await operation

    asyncio.run(both())
    operation = node.held(one)
    assert operation.wait(TIMEOUT) == operation.wait(0.0) and operation.done()
    assert operation.fileno() == operation.fileno()


def test_an_operation_goes_on_when_it_is_dropped(node, pool):
    one = prefix(node)
    pool.fill(range(8))
    node.store(one, pool.pages, range(8))
    until = time.monotonic() + PATIENCE
    while node.held(one).wait(TIMEOUT).depth < 8:
        assert time.monotonic() < until, node.stats()


def test_what_does_not_fit_is_refused_before_anything_moves(node, pool):
    one = prefix(node)
    for blocks, first, said in (([POOL_BLOCKS], 0, "block"), ([0], 8, "blocks"), ([-1], 0, None)):
        error = OverflowError if said is None else kvfabric.InvalidError
        with pytest.raises(error, match=said):
            node.store(one, pool.pages, blocks, first=first)
    with pytest.raises(kvfabric.InvalidError, match="blocks"):
        node.fetch(one, pool.pages, numpy.array([-1]))
    with pytest.raises(kvfabric.InvalidError, match="deadline|timeout"):
        node.fetch(one, pool.pages, [0], deadline=-1.0)
    with pytest.raises(kvfabric.InvalidError, match="shared"):
        node.fetch(one, pool.pages, [0], shared=[(3, 3)])
    with pytest.raises(kvfabric.InvalidError, match="holders"):
        node.fetch(one, pool.pages, [0], holders=[("two words", 3, None)])
    region = pool.region
    for segments, blocks in (
        ([], 1),
        ([(region, 0, PART, PART)], 0),
        ([(region, 0, PART - 1, PART)], 2),
    ):
        with pytest.raises(kvfabric.InvalidError):
            node.pages(segments, blocks)
    with pytest.raises(kvfabric.InvalidError, match="segment 0"):
        node.pages([(region, 0, PART, PART)], LAYERS * POOL_BLOCKS + 1)
    with pytest.raises(kvfabric.DeniedError, match="read-only"):
        node.pages([(node.agent.register(bytes(BLOCK_BYTES)), 0, BLOCK_BYTES, BLOCK_BYTES)], 1)
    with pytest.raises(kvfabric.InvalidError, match="another agent"):
        stranger = kvfabric.Agent("stranger").register(bytearray(BLOCK_BYTES))
        node.pages([(stranger, 0, BLOCK_BYTES, BLOCK_BYTES)], 1)


def test_pages_are_of_a_blocks_size(node, pool):
    assert len(pool.pages) == POOL_BLOCKS and pool.pages.block_bytes == BLOCK_BYTES
    region = node.agent.register(bytearray(PART))
    with pytest.raises(kvfabric.InvalidError, match=str(PART)):
        node.pages([(region, 0, PART, PART)], 1)


def test_objects_of_another_node_are_refused(node, pool):
    other = kvfabric.Node(configuration("other"))
    with pytest.raises(kvfabric.InvalidError, match="another node"):
        node.store(prefix(other), pool.pages, [0])
    with pytest.raises(kvfabric.InvalidError, match="another node"):
        node.fetch(prefix(node), Pool(other).pages, [0])
    with pytest.raises(kvfabric.InvalidError, match="another node"):
        node.held(prefix(other))
    other.shutdown(TIMEOUT)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"block_bytes": 0}, "block_bytes"),
        ({"block_tokens": "many"}, "block_tokens"),
        ({"model_identity": "abc"}, "model_identity"),
        ({"hosts": {"bytes": 1}}, "hosts"),
        ({"host": {"bites": 1}}, "bites"),
        ({"host": None}, "host"),
        ({"pod": object()}, "pod"),
        ({"host": {"bytes": 1 << 64}}, "host.bytes"),
        ({"key_scheme": "md5"}, "md5"),
        ({"peer_listen": "somewhere"}, "somewhere"),
    ],
)
def test_a_wrong_configuration_names_its_key(change, said):
    with pytest.raises(kvfabric.InvalidError, match=said):
        kvfabric.Node(configuration(**change))


def test_an_engine_whose_hashes_may_collide_is_refused():
    engine = {"name": "vllm/tagged", "hash": "xxhash", "seed": "0"}
    with pytest.raises(kvfabric.UnsupportedError, match="engine.*xxhash"):
        kvfabric.Node(configuration(engine=engine))


def test_a_configuration_is_a_file_too_and_can_be_overridden(tmp_path):
    file = tmp_path / "node.toml"
    lines = [
        f'{key} = "{value}"' for key, value in configuration().items() if isinstance(value, str)
    ]
    numbers = [
        f"{key} = {value}" for key, value in configuration().items() if isinstance(value, int)
    ]
    file.write_text("\n".join([*lines, *numbers, "[host]", f"bytes = {4 * BLOCK_BYTES}", ""]))
    overrides = {"pod": "over", "host.bytes": 8 * BLOCK_BYTES, "fabric.shm": False, "index": None}
    for path in (file, str(file)):
        node = kvfabric.Node(path, overrides=overrides)
        assert node.pod == "over" and node.agent.name == "over"
        assert node.stats()["host_vacant"] == 8
        node.shutdown(TIMEOUT)
    with pytest.raises(kvfabric.NotFoundError, match="nowhere"):
        kvfabric.Node(pathlib.Path("nowhere"))
    with pytest.raises(kvfabric.InvalidError, match="host"):
        kvfabric.Node(file, overrides={"host": {"bytes": 1}})
    with pytest.raises(TypeError):
        kvfabric.Node(5)


def test_blocks_on_disk_survive_the_node(tmp_path):
    """Host memory holds the blocks of one prompt, so those of the first are on disk after the second."""
    disk = {"path": tmp_path / "disk", "bytes": 1 << 20, "segment_bytes": 1 << 18, "direct": "off"}
    config = configuration(host={"bytes": 8 * BLOCK_BYTES}, disk=disk)
    first = kvfabric.Node(config)
    pool = Pool(first)
    stored(first, pool)
    other = prefix(first, PROMPT[::-1])
    assert first.store(other, pool.pages, range(8), deadline=TIMEOUT).wait(TIMEOUT).stored == 8
    first.flush(TIMEOUT).wait(TIMEOUT)
    with pytest.raises(kvfabric.BusyError, match="disk"):
        kvfabric.Node(dict(config, pod="second"))
    first.shutdown(TIMEOUT)
    del first, pool, other
    second = kvfabric.Node(config)
    pool = Pool(second)
    one = prefix(second)
    assert second.held(one).wait(TIMEOUT) == (8, 0, 8, 8)
    report = second.fetch(one, pool.pages, range(20, 28)).wait(TIMEOUT)
    assert report.sources == ["nvme"] * 8 and all(pool.holds(20 + b, b) for b in range(8))
    second.shutdown(TIMEOUT)


def test_a_restart_finds_what_only_host_memory_had(tmp_path):
    """Host memory has room to spare, so nothing is on disk before the shutdown."""
    disk = {"path": tmp_path / "disk", "bytes": 1 << 20, "segment_bytes": 1 << 18, "direct": "off"}
    config = configuration(disk=disk)
    first = kvfabric.Node(config)
    one = stored(first, Pool(first))
    first.flush(TIMEOUT).wait(TIMEOUT)
    assert first.held(one).wait(TIMEOUT) == (8, 8, 0, 8)
    first.shutdown(TIMEOUT)
    del first, one
    second = kvfabric.Node(config)
    pool = Pool(second)
    one = prefix(second)
    assert second.held(one).wait(TIMEOUT) == (8, 0, 8, 8)
    report = second.fetch(one, pool.pages, range(20, 28)).wait(TIMEOUT)
    assert report.sources == ["nvme"] * 8 and all(pool.holds(20 + b, b) for b in range(8))
    second.shutdown(TIMEOUT)


def test_blocks_come_from_the_holder_that_a_hint_names(node, pool):
    holder = kvfabric.Node(configuration("holder"))
    stored(holder, Pool(holder))
    one = prefix(node)
    assert node.fetch(one, pool.pages, range(8)).wait(TIMEOUT).depth == 0
    hints = [("holder", 8, holder.peer_address)]
    report = node.fetch(one, pool.pages, range(2, 8), first=2, holders=hints).wait(TIMEOUT)
    assert report.sources == ["peer"] * 6 and all(pool.holds(b, b) for b in range(2, 8))
    holder.shutdown(TIMEOUT)


def test_a_scheduler_locates_by_names_without_a_node(node, pool):
    chain = names(6)
    pool.fill(range(4))
    held = node.prefix_of(chain.pack(0, 4))
    assert node.store(held, pool.pages, range(4)).wait(TIMEOUT).stored == 4
    service = kvfabric.PeerService(node.peer_address, deadline=TIMEOUT)

    async def ask():
        return await service.locate(chain.pack(0, 6))

    reach = asyncio.run(ask())
    found = {"depth": 4, "own": 4, "host": 4, "disk": 0, "expected": 4}
    assert reach == kvfabric.Reach(**found, holders=[], shared=[])
    assert node.locate(node.prefix_of(chain.pack(0, 6))).wait(TIMEOUT) == reach
    assert service.locate(chain.pack(4, 6)).wait(TIMEOUT).depth == 0
    with pytest.raises(kvfabric.InvalidError, match="names"):
        service.locate(chain.pack(0, 6)[:-1]).wait(TIMEOUT)
    node.shutdown(TIMEOUT)
    with pytest.raises((kvfabric.PeerLostError, kvfabric.DeadlineError, kvfabric.CancelledError)):
        service.locate(chain.pack(0, 6), deadline=2.0).wait(TIMEOUT)


def test_what_a_store_is_bringing_is_expected(tmp_path):
    """Stores of more than host memory has room for wait for the disk; one is met on its way."""
    disk = {"path": tmp_path / "disk", "bytes": 1 << 24, "segment_bytes": 1 << 20, "direct": "off"}
    node = kvfabric.Node(configuration(host={"bytes": 8 * BLOCK_BYTES}, disk=disk))
    pool = Pool(node)
    until = time.monotonic() + PATIENCE
    seeds = itertools.count()

    def met(ask, own):
        while time.monotonic() < until:
            tokens = [next(seeds)] * (POOL_BLOCKS * BLOCK_TOKENS)
            one = prefix(node, tokens)
            store = node.store(one, pool.pages, range(POOL_BLOCKS), deadline=PATIENCE)
            answer = ask(one).wait(TIMEOUT)
            assert store.wait(2 * PATIENCE).stored == POOL_BLOCKS
            assert own(answer) <= answer.expected <= POOL_BLOCKS
            if own(answer) < answer.expected:
                return answer.expected
        raise AssertionError("no store was met on its way")

    assert met(node.held, lambda held: held.depth) == POOL_BLOCKS
    assert met(node.locate, lambda reach: reach.own) == POOL_BLOCKS
    node.shutdown(TIMEOUT)


def test_a_node_without_an_engine_cannot_locate_by_names():
    config = configuration()
    del config["engine"]
    node = kvfabric.Node(config)
    service = kvfabric.PeerService(node.peer_address, deadline=TIMEOUT)
    with pytest.raises(kvfabric.UnsupportedError):
        service.locate(names(1).pack(0, 1)).wait(TIMEOUT)
    node.shutdown(TIMEOUT)
    with pytest.raises(kvfabric.InvalidError, match="two words"):
        kvfabric.PeerService("two words")


def test_pinned_blocks_stay_until_they_are_let_go(node, pool):
    one = stored(node, pool)
    pin = node.pin(one, first=2).wait(TIMEOUT)
    assert pin.depth == 6
    assert node.clear().wait(TIMEOUT) == kvfabric.Removed(removed=2, kept=6)
    assert node.unpin(pin.id).wait(TIMEOUT) is None
    node.unpin(pin.id).wait(TIMEOUT)
    assert node.clear().wait(TIMEOUT) == (6, 0)
    assert node.pin(one).wait(TIMEOUT).depth == 0
    with pytest.raises(kvfabric.InvalidError, match="blocks"):
        node.pin(one, first=9)


def test_a_pin_has_the_number_that_it_is_given(node, pool):
    one = stored(node, pool)
    number = (1 << 64) - 17
    pin = node.pin(one, id=number, ttl=TIMEOUT).wait(TIMEOUT)
    assert pin == (number, 8)
    with pytest.raises(kvfabric.InvalidError, match=str(number)):
        node.pin(one, id=number).wait(TIMEOUT)
    assert node.clear().wait(TIMEOUT) == (0, 8)
    node.unpin(number).wait(TIMEOUT)
    # Let go of before it comes.
    node.unpin(0).wait(TIMEOUT)
    assert node.pin(one, id=0).wait(TIMEOUT) == (0, 0)
    assert node.clear().wait(TIMEOUT) == (8, 0)
    with pytest.raises(OverflowError):
        node.pin(one, id=1 << 64)


def test_another_node_lets_go_of_a_pin(node, pool):
    one = stored(node, pool)
    stranger = hashlib.sha256(b"other weights").hexdigest()
    service = kvfabric.PeerService(node.peer_address, deadline=TIMEOUT)
    other = kvfabric.Node(configuration("other"))
    for let_go in (
        lambda pin: service.unpin(pin, IDENTITY),
        lambda pin: other.unpin(pin, at=node.peer_address, deadline=TIMEOUT),
    ):
        pin = node.pin(one, ttl=TIMEOUT).wait(TIMEOUT)
        with pytest.raises(kvfabric.DeniedError):
            service.unpin(pin.id, stranger).wait(TIMEOUT)
        assert node.remove(one).wait(TIMEOUT) == (0, 8)
        let_go(pin.id).wait(TIMEOUT)
        assert node.remove(one).wait(TIMEOUT) == (8, 0)
        assert node.store(one, pool.pages, range(8)).wait(TIMEOUT).stored == 8
    with pytest.raises(kvfabric.InvalidError, match="identity"):
        service.unpin(1, "short")
    other.shutdown(TIMEOUT)


def test_a_node_that_was_shut_down_answers_so(node, pool):
    one = stored(node, pool)
    node.shutdown(TIMEOUT)
    node.shutdown(TIMEOUT)
    for ask in (
        lambda: node.store(one, pool.pages, range(8)).wait(TIMEOUT),
        lambda: node.fetch(one, pool.pages, range(8)).wait(TIMEOUT),
        lambda: node.held(one).wait(TIMEOUT),
        lambda: node.locate(one).wait(TIMEOUT),
        lambda: node.pin(one).wait(TIMEOUT),
        lambda: node.clear().wait(TIMEOUT),
        lambda: node.flush().wait(TIMEOUT),
        node.stats,
    ):
        with pytest.raises(kvfabric.CancelledError):
            ask()
    pool.region.deregister(TIMEOUT)


def test_a_shutdown_ends_what_others_ask_at_that_time(node, pool):
    """Threads ask without a pause; each is answered to the end, or told that the node has ended."""
    one = stored(node, pool)
    told = []
    busy = threading.Barrier(4)

    def ask():
        busy.wait(TIMEOUT)
        try:
            while True:
                node.fetch(one, pool.pages, range(8, 16)).wait(TIMEOUT)
        except kvfabric.KvfabricError as error:
            told.append(type(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    busy.wait(TIMEOUT)
    node.shutdown(TIMEOUT)
    for thread in threads:
        thread.join(TIMEOUT)
    assert told and set(told) <= {kvfabric.CancelledError, kvfabric.BusyError} and len(told) == 3


def test_an_object_of_a_dropped_node_still_answers():
    node = kvfabric.Node(configuration())
    pool, one, agent = Pool(node), prefix(node), node.agent
    del node
    assert len(one) == 8 and agent.name == "node"
    pool.region.deregister(TIMEOUT)


def test_a_forked_child_is_told_by_nodes(node, pool, refused_in_a_fork):
    one = prefix(node)
    operation = node.held(one)
    operation.wait(TIMEOUT)
    calls = {
        "store": lambda: node.store(one, pool.pages, [0]),
        "fetch": lambda: node.fetch(one, pool.pages, [0]),
        "held": lambda: node.held(one),
        "locate": lambda: node.locate(one),
        "pin": lambda: node.pin(one),
        "unpin": lambda: node.unpin(1),
        "remove": lambda: node.remove(one),
        "clear": node.clear,
        "flush": node.flush,
        "stats": node.stats,
        "shutdown": node.shutdown,
        "prefix": node.prefix,
        "extend": lambda: one.extend([1]),
        "key": lambda: one.key(0),
        "pages": lambda: node.pages([(pool.region, 0, PART, PART)], 1),
        "metadata": node.agent.metadata,
        "done": operation.done,
        "wait": operation.wait,
    }
    assert refused_in_a_fork(calls) == sorted(calls)


def test_what_needs_an_hbm_tier_is_refused_without_one(node, pool):
    one = stored(node, pool)
    for operation in (
        node.hbm_promote(one),
        node.hbm_promote(one, first=2, count=3, deadline=1.0),
        node.hbm_offload(one),
        node.hbm_store(one, pool.pages, [0], first=1),
    ):
        with pytest.raises(kvfabric.UnsupportedError, match="no HBM tier"):
            operation.wait(TIMEOUT)
    with pytest.raises(kvfabric.UnsupportedError, match="no HBM tier"):
        node.hbm_close()
    for wrong in ({"first": len(one) + 1, "count": 1}, {"count": len(one) + 1}):
        with pytest.raises(kvfabric.InvalidError):
            node.hbm_promote(one, **wrong)
    with pytest.raises(kvfabric.InvalidError):
        node.hbm_store(one, pool.pages, [POOL_BLOCKS])
    # Whether there is a driver or none: this is no memory of a device.
    with pytest.raises(kvfabric.InvalidError, match="__dlpack__"):
        node.hbm_open(b"bytes")
    # The node was not told to use CUDA, or there is none.
    with pytest.raises(kvfabric.UnsupportedError):
        node.hbm_open(BLOCK_BYTES)
    stats = node.stats()
    assert (stats["hbm_slots"], stats["hbm_promoted"], stats["device_landed"]) == (0, 0, 0)
