"""Lists that are checked once, and transfers over them that are posted again."""

import array

import pytest

import kvfabric

BLOCK = 64
BLOCKS = 16
TIMEOUT = 20.0


@pytest.fixture
def agent():
    return kvfabric.Agent("one")


@pytest.fixture
def source(agent):
    """A region whose byte is the number of its block."""
    return agent.register(bytearray(b for b in range(BLOCKS) for _ in range(BLOCK)))


@pytest.fixture
def memory():
    return bytearray(BLOCKS * BLOCK)


def rows(*lines):
    """Rows of numbers as a two-dimensional buffer, made without numpy."""
    flat = array.array("Q", [number for line in lines for number in line])
    return memoryview(flat).cast("B").cast("Q", (len(lines), len(lines[0])))


def firsts(memory):
    return list(memory[::BLOCK])


def test_a_list_has_the_ranges_of_tuples_rows_or_steps(agent, source):
    tuples = [(source, b * BLOCK, BLOCK) for b in range(BLOCKS)]
    numbers = [(source.id, b * BLOCK, BLOCK) for b in range(BLOCKS)]
    steps = rows((source.id, 0, BLOCK, BLOCK, BLOCKS))
    for descriptors in (tuples, numbers, tuple(tuples), rows(*numbers), steps):
        prepared = agent.prepare(descriptors)
        assert len(prepared) == BLOCKS and prepared.bytes == BLOCKS * BLOCK


def test_positions_choose_ranges_and_pair_them_in_order(agent, source, memory):
    target = agent.register(memory)
    local = agent.prepare(rows((target.id, 0, BLOCK, BLOCK, BLOCKS)))
    remote = agent.prepare(rows((source.id, 0, BLOCK, BLOCK, BLOCKS)))
    transfer = agent.request(
        "read",
        local,
        remote,
        local_positions=[0, 1, 2],
        remote_positions=array.array("q", [9, 3, 7]),
    )
    assert transfer.bytes == 3 * BLOCK
    assert transfer.state == "idle" and transfer.telemetry is None and transfer.error is None
    with pytest.raises(kvfabric.InvalidError, match="post"):
        transfer.wait(0.0)
    assert memory == bytes(len(memory))
    transfer.post()
    transfer.wait(TIMEOUT)
    assert transfer.state == "done" and firsts(memory)[:4] == [9, 3, 7, 0]


def test_one_side_without_positions_takes_part_whole(agent, source, memory):
    target = agent.register(memory)
    local = agent.prepare([(target, 0, BLOCK), (target, BLOCK, BLOCK)])
    remote = agent.prepare(rows((source.id, 0, BLOCK, BLOCK, BLOCKS)))
    transfer = agent.request("read", local, remote, remote_positions=range(14, 16))
    transfer.post()
    transfer.wait(TIMEOUT)
    assert firsts(memory)[:3] == [14, 15, 0]


def test_a_transfer_is_posted_any_number_of_times(agent, memory):
    constant = bytearray(BLOCK)
    source, target = agent.register(constant), agent.register(memory)
    transfer = agent.request(
        "write", agent.prepare([(source, 0, BLOCK)]), agent.prepare([(target, 0, BLOCK)])
    )
    for byte in (1, 2, 3):
        constant[:] = bytes([byte]) * BLOCK
        transfer.post()
        transfer.wait(TIMEOUT)
        assert memory[:BLOCK] == constant
    telemetry = transfer.telemetry
    assert (telemetry.bytes, telemetry.descriptors, telemetry.path) == (BLOCK, 1, "memcpy")
    assert telemetry.posted > 0 and telemetry.post > 0 and telemetry.transfer > 0


@pytest.mark.parametrize(
    "wrong",
    [
        memoryview(b"x" * 24).cast("B", (1, 24)),
        array.array("Q", [1, 2, 3]),
        rows((1, 2, 3, 4)),
        memoryview(array.array("d", [1, 2, 3])).cast("B").cast("d", (1, 3)),
        memoryview(array.array("H", [1, 2, 3])).cast("B").cast("H", (1, 3)),
        rows((1, 2, 3), (1, 2, 3), (1, 2, 3))[::2],
        rows((1, 0, 8, 8, 1 << 32)),
    ],
)
def test_arrays_that_are_no_descriptors_are_refused(agent, wrong):
    with pytest.raises(kvfabric.InvalidError, match="descriptors|count"):
        agent.prepare(wrong)


def test_a_bad_row_is_named(agent, source):
    good = (source.id, 0, BLOCK)
    with pytest.raises(kvfabric.InvalidError, match="descriptor 1"):
        agent.prepare(rows(good, (source.id, BLOCKS * BLOCK, 1)))
    with pytest.raises(kvfabric.NotFoundError, match="region"):
        agent.prepare(rows(good, (source.id ^ 1, 0, 1)))
    with pytest.raises(kvfabric.InvalidError, match="row 0|descriptor 0"):
        agent.prepare(rows((source.id, 0, BLOCK, BLOCK, BLOCKS + 1)))
    with pytest.raises(kvfabric.InvalidError, match="another agent"):
        kvfabric.Agent("two").prepare([(source, 0, 1)])
    with pytest.raises(ValueError):
        agent.prepare([(source, 0)])
    with pytest.raises(TypeError):
        agent.prepare([("region", 0, 1)])
    with pytest.raises(OverflowError):
        agent.prepare([(source, -1, 1)])


def test_lists_and_positions_that_do_not_pair_are_refused(agent, source, memory):
    target = agent.register(memory)
    local = agent.prepare(rows((target.id, 0, BLOCK, BLOCK, BLOCKS)))
    remote = agent.prepare([(source, 0, BLOCK)])
    with pytest.raises(kvfabric.InvalidError):
        agent.request("read", local, remote)
    with pytest.raises(kvfabric.InvalidError):
        agent.request("read", local, remote, local_positions=[BLOCKS])
    with pytest.raises(kvfabric.InvalidError, match="-1"):
        agent.request("read", local, remote, local_positions=array.array("i", [-1]))
    with pytest.raises(kvfabric.InvalidError, match="local_positions"):
        agent.request("read", local, remote, local_positions=array.array("d", [0]))
    with pytest.raises(kvfabric.InvalidError, match="copy"):
        agent.request("copy", local, remote)
    with pytest.raises(kvfabric.InvalidError, match="prepared by agent"):
        kvfabric.Agent("two").request("read", local, remote)


def test_read_only_memory_is_no_target_whatever_names_it(agent, memory):
    constant = agent.register(bytes(BLOCK))
    other = agent.prepare([(agent.register(memory), 0, BLOCK)])
    named = (
        [(constant, 0, BLOCK)],
        rows((constant.id, 0, BLOCK)),
        rows((constant.id, 0, BLOCK, 1, 1)),
    )
    for descriptors in named:
        prepared = agent.prepare(descriptors)
        with pytest.raises(kvfabric.DeniedError, match="read-only"):
            agent.request("read", prepared, other)
        with pytest.raises(kvfabric.DeniedError, match="read-only"):
            agent.request("write", other, prepared)


def test_a_list_keeps_the_memory_of_regions_that_it_names_by_number(agent, memory):
    target = agent.register(memory)
    local = agent.prepare(rows((target.id, 0, BLOCK)))
    source = agent.register(b"\x05" * BLOCK)
    remote = agent.prepare(rows((source.id, 0, BLOCK)))
    del target, source
    transfer = agent.request("read", local, remote)
    del local, remote
    transfer.post()
    transfer.wait(TIMEOUT)
    assert memory[:BLOCK] == b"\x05" * BLOCK
    with pytest.raises(BufferError):
        memory.append(0)


def test_a_deregistered_region_ends_transfers_over_it(agent, source, memory):
    target = agent.register(memory)
    transfer = agent.request(
        "read", agent.prepare([(target, 0, BLOCK)]), agent.prepare([(source, BLOCK, BLOCK)])
    )
    source.deregister()
    with pytest.raises(kvfabric.NotFoundError):
        transfer.post()
    assert memory == bytes(len(memory))


def test_an_address_is_registered_with_what_keeps_it(agent, memory):
    lent = agent.register(memory)
    assert lent.len == len(lent) == len(memory)
    keep = []
    region = agent.register_address(lent.address + BLOCK, BLOCK, writable=True, keep=keep)
    assert region.address == lent.address + BLOCK and region.len == BLOCK
    source = agent.register(b"\x07" * BLOCK)
    agent.read([(region, 0, BLOCK)], None, [(source, 0, BLOCK)]).wait(TIMEOUT)
    assert firsts(memory)[:3] == [0, 7, 0]
    with pytest.raises(kvfabric.InvalidError):
        agent.register_address(0, 1)
    with pytest.raises(kvfabric.InvalidError):
        agent.register_address(lent.address, 0)


@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_a_transfer_in_flight_is_not_posted_again_and_keeps_its_memory(agent, other, memory):
    """The peer is stopped, so that the transfer cannot end by itself."""
    agent = kvfabric.Agent("tester", shm=False, tcp="127.0.0.1:0")
    peer = agent.load_peer(other.metadata)
    assert peer.path == "tcp"
    region = agent.register(memory)
    transfer = agent.request(
        "read",
        agent.prepare([(region, 0, len(memory))]),
        agent.prepare([(other.region, 0, len(memory))], peer),
    )
    other.stop()
    try:
        transfer.post()
        assert transfer.state == "in_flight" and not transfer.done()
        for notification in (None, b"again"):
            with pytest.raises(kvfabric.BusyError):
                transfer.post(notification)
        with pytest.raises(kvfabric.DeadlineError):
            transfer.wait(0.0)
        with pytest.raises(kvfabric.BusyError):
            region.deregister(0.0)
        transfer.cancel()
        assert transfer.state == "failed"
        assert isinstance(transfer.error, kvfabric.CancelledError)
        with pytest.raises(kvfabric.CancelledError):
            transfer.wait(TIMEOUT)
    finally:
        other.go()
    assert transfer.settled(TIMEOUT)
    region.deregister(TIMEOUT)


def test_a_notification_comes_with_its_post(reaching, other):
    agent = reaching
    peer = agent.load_peer(other.metadata)
    source = agent.register(bytes(8))
    transfer = agent.request(
        "write",
        agent.prepare([(source, 0, 8)]),
        agent.prepare([(other.region, 0, 8)], peer),
        notification=b"first",
    )
    for notification, expected in ((None, "Zmlyc3Q="), (b"second", "c2Vjb25k")):
        transfer.post(notification)
        transfer.wait(TIMEOUT)
        assert other.ask("receive")["messages"] == [["tester", expected]]


def test_parts_are_waited_for_one_after_the_other(agent, source, memory):
    target = agent.register(memory)
    local = agent.prepare(rows((target.id, 0, BLOCK, BLOCK, BLOCKS)))
    remote = agent.prepare(rows((source.id, 0, BLOCK, BLOCK, BLOCKS)))
    transfer = agent.request("read", local, remote, parts=[BLOCKS // 4] * 4, background=True)
    assert transfer.parts == 4
    transfer.post()
    for part in range(4):
        transfer.wait_part(part, TIMEOUT)
        assert firsts(memory)[: BLOCKS // 4 * (part + 1)] == list(range(BLOCKS // 4 * (part + 1)))
    transfer.wait(TIMEOUT)
    with pytest.raises(kvfabric.InvalidError, match="part"):
        transfer.wait_part(4, TIMEOUT)
    with pytest.raises(kvfabric.InvalidError, match="have 3 pairs together"):
        agent.request("read", local, remote, parts=[1, 2])


def test_a_rate_holds_transfers_back_until_it_is_lifted(agent, source, memory):
    target = agent.register(memory)
    local = agent.prepare(rows((target.id, 0, BLOCK, BLOCK, BLOCKS)))
    remote = agent.prepare(rows((source.id, 0, BLOCK, BLOCK, BLOCKS)))
    agent.set_rate(1, background=True)
    first, held = (agent.request("read", local, remote, background=True) for _ in range(2))
    first.post()
    first.wait(TIMEOUT)
    held.post()
    free = agent.request("read", local, remote)
    free.post()
    free.wait(TIMEOUT)
    assert held.state == "in_flight"
    held.cancel()
    assert held.settled(TIMEOUT)
    agent.set_rate(None, background=True)
    held.post()
    held.wait(TIMEOUT)
    with pytest.raises(kvfabric.InvalidError):
        agent.set_rate(0)
