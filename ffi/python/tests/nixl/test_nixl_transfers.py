"""What engines rely on when they move bytes and send messages, call by call, with two agents in one process."""

import threading

import numpy as np
import pytest
from nixl._api import nixl_thread_sync_t
from nixl_rig import Memory, awaited, finished, prepared, run

from nixl import _bindings as bindings


@pytest.fixture
def sides(one, mine, theirs):
    """Both sides of 64 blocks each."""
    return prepared(one, mine), prepared(one, theirs, "two")


@pytest.fixture
def transfer(one, sides):
    """A transfer of two blocks to the peer, with a notification."""
    return one.make_prepped_xfer("WRITE", sides[0], [0, 1], sides[1], [8, 9], b"written")


def test_only_registered_memory_can_be_prepared(one, mine, theirs):
    """Beside it, past it, of another device, of another kind, or of an agent that is not known."""
    address, length = mine.address, mine.length
    outside = [
        (address + length, 64, 0),
        (address - 64, 64, 0),
        (address, length + 1, 0),
        (address, 64, 1),
    ]
    for row in outside:
        with pytest.raises(bindings.nixlNotFoundError):
            one.prep_xfer_dlist("NIXL_INIT_AGENT", [row], "DRAM")
    with pytest.raises(bindings.nixlNotFoundError):
        one.prep_xfer_dlist("", [mine.block(0)], "VRAM")
    with pytest.raises(bindings.nixlNotFoundError):
        one.prep_xfer_dlist("two", [mine.block(0)], "DRAM")
    with pytest.raises(bindings.nixlNotFoundError):
        one.prep_xfer_dlist("none such", [theirs.block(0)], "DRAM")
    with pytest.raises(TypeError):
        one.prep_xfer_dlist("", None)


def test_strided_lists_are_checked_to_their_last_block(one, mine):
    """SGLang's Nx5 rows: (address, length, device, stride, count)."""

    def prepare(length, stride, count, memory="DRAM", kind=np.uint64):
        rows = np.array([[mine.address, length, 0, stride, count]], kind)
        return one.prep_xfer_dlist("", rows, memory)

    prepare(64, 128, 32)
    prepare(64, 64, 64, kind=np.int64)
    for wrong in ((64, 128, 33), (64, 128, 0), (64, 32, 4), (64, 0, 4)):
        with pytest.raises(bindings.nixlNotFoundError):
            prepare(*wrong)
    with pytest.raises(ValueError):
        prepare(64, 128, 32, memory=None)
    with pytest.raises(ValueError):
        one.prep_xfer_dlist("", np.zeros((1, 5), np.int32), "DRAM")


@pytest.mark.parametrize(
    "local, remote",
    [([0], [1, 2]), ([0, 64], [1, 2]), ([0, -1], [1, 2]), ([], [])],
    ids=["lengths", "too-large", "negative", "none"],
)
def test_indices_that_do_not_pair_are_refused(one, sides, local, remote):
    with pytest.raises(bindings.nixlInvalidParamError):
        one.make_prepped_xfer("READ", sides[0], local, sides[1], remote)


def test_wrong_transfers_are_refused_when_they_are_made(one, mine, sides):
    local, remote = sides
    with pytest.raises(KeyError):
        one.make_prepped_xfer("MOVE", local, [0], remote, [0])
    with pytest.raises(ValueError, match="1D"):
        one.make_prepped_xfer("READ", local, np.array([[0]]), remote, np.array([0]))
    for first, second in ((remote, remote), (local, local)):
        with pytest.raises(bindings.nixlInvalidParamError):
            one.make_prepped_xfer("READ", first, [0], second, [0])
    shorter = prepared(one, mine, size=32)
    with pytest.raises(bindings.nixlInvalidParamError):
        one.make_prepped_xfer("READ", shorter, [0], remote, [0])
    for message in (5, None):
        with pytest.raises(TypeError):
            one.make_prepped_xfer("READ", local, [0], remote, [0], message)


def test_a_transfer_that_was_not_posted_has_no_state(one, transfer):
    with pytest.raises(bindings.nixlNotPostedError):
        one.check_xfer_state(transfer)
    with pytest.raises(bindings.nixlNotPostedError):
        one.get_xfer_telemetry(transfer)
    assert one.query_xfer_backend(transfer) == "UCX"


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint64])
def test_indices_choose_the_blocks_and_their_order(one, mine, theirs, sides, kind):
    """A read of scattered blocks, with every type of indices that engines use."""

    def indices(*numbers):
        return kind(numbers) if kind in (list, tuple) else np.array(numbers, kind)

    before, source = mine.array.copy(), theirs.array.copy()
    run(one, one.make_prepped_xfer("READ", sides[0], indices(5, 0, 63), sides[1], indices(1, 2, 9)))
    expected = before.reshape(64, 64)
    expected[[5, 0, 63]] = source.reshape(64, 64)[[1, 2, 9]]
    assert (mine.array == expected.reshape(-1)).all()
    assert (theirs.array == source).all()


def test_strided_lists_move_the_same_bytes(one, mine, theirs):
    """Every second block, written to every third."""
    rows = np.array([[mine.address, 64, 0, 128, 20]], np.uint64)
    local = one.prep_xfer_dlist("NIXL_INIT_AGENT", rows, "DRAM")
    rows = np.array(
        [[theirs.address, 64, 0, 192, 10], [theirs.address + 64, 64, 0, 192, 10]], np.uint64
    )
    remote = one.prep_xfer_dlist("two", rows, "DRAM")
    expected = theirs.array.copy().reshape(64, 64)
    blocks = mine.array.reshape(64, 64)
    expected[[3, 4, 27]] = blocks[[2, 4, 38]]
    run(one, one.make_prepped_xfer("WRITE", local, [1, 2, 19], remote, [1, 11, 9]))
    assert (theirs.array == expected.reshape(-1)).all()


def test_a_notification_arrives_once_the_bytes_are_there(one, two, mine, theirs, transfer):
    run(one, transfer)
    assert awaited(two, 1) == {"one": [b"written"]}
    assert (theirs.array[512:640] == mine.array[:128]).all()
    assert two.get_new_notifs() == {} and two.get_new_notifs(["UCX"]) == {}


def test_a_transfer_is_posted_again_with_the_last_notification_or_another(
    one, two, mine, theirs, transfer
):
    """The message of a post stays until another one is given."""
    run(one, transfer)
    mine.array[:] = 7
    run(one, transfer, b"again")
    run(one, transfer)
    run(one, transfer, "text")
    assert awaited(two, 4) == {"one": [b"written", b"again", b"again", b"text"]}
    assert (theirs.array[512:640] == 7).all()
    assert one.check_xfer_state(transfer) == "DONE"


def test_telemetry_has_what_vllm_records(one, transfer):
    run(one, transfer)
    measured = one.get_xfer_telemetry(transfer)
    assert isinstance(measured, bindings.nixlXferTelemetry)
    assert measured.totalBytes == 128 and 1 <= measured.descCount <= 2
    for field in ("startTime", "postDuration", "xferDuration", "totalBytes", "descCount"):
        value = getattr(measured, field)
        assert isinstance(value, int) and value >= 0
        with pytest.raises(AttributeError):
            setattr(measured, field, 1)


def test_handles_are_released_once_and_lists_before_their_transfers(one, two, sides, transfer):
    for side in sides:
        one.release_dlist_handle(side)
        one.release_dlist_handle(side)
    run(one, transfer)
    assert awaited(two, 1) == {"one": [b"written"]}
    one.release_xfer_handle(transfer)
    transfer.release()


def test_lists_are_transferred_without_being_prepared(one, two, mine, theirs):
    """initialize_xfer, as SGLang uses it for what it sends once; named by both kinds of string."""

    def descs(*rows):
        return one.get_xfer_descs(list(rows), "DRAM")

    local, remote = descs(mine.block(0), mine.block(2)), descs(theirs.block(5), theirs.block(4))
    expected = theirs.array[256:384].copy()
    run(one, one.initialize_xfer("READ", local, remote, b"two", b"read"))
    assert (mine.array[128:192] == expected[:64]).all() and (mine.array[:64] == expected[64:]).all()
    assert awaited(two, 1) == {"one": [b"read"]}
    shorter = one.get_xfer_descs([(theirs.address, 32, 0), (theirs.address, 32, 0)], "DRAM")
    for wrong in (shorter, descs(theirs.block(0))):
        with pytest.raises(bindings.nixlInvalidParamError):
            one.initialize_xfer("READ", local, wrong, "two")
    with pytest.raises(bindings.nixlNotFoundError):
        one.initialize_xfer("READ", local, local, "two")
    with pytest.raises(bindings.nixlNotFoundError):
        one.initialize_xfer("READ", local, remote, "none such")
    with pytest.raises(TypeError):
        one.initialize_xfer("READ", None, None, "two")


def test_an_agent_copies_within_itself_and_notifies_itself(one, mine):
    """Under its own name, by both ways of making a transfer."""
    expected = mine.array[640:704].copy()
    loop = one.prep_xfer_dlist("one", [mine.block(10)], "DRAM")
    local = one.prep_xfer_dlist("", [mine.block(0)], "DRAM")
    run(one, one.make_prepped_xfer("READ", local, [0], loop, [0], b"first"))
    assert (mine.array[:64] == expected).all()
    target = one.get_xfer_descs([mine.block(20)], "DRAM")
    source = one.get_xfer_descs([mine.block(0)], "DRAM")
    run(one, one.initialize_xfer("WRITE", source, target, "one", b"second"))
    assert (mine.array[1280:1344] == expected).all()
    assert awaited(one, 2) == {"one": [b"first", b"second"]}


def test_messages_arrive_as_bytes_in_order(one, two, theirs):
    """Text, nothing, and bytes that are no text."""
    for message in (b"first", "second", b"", b"\x00\xff\x80"):
        one.send_notif("two", notif_msg=message)
    assert awaited(two, 4) == {"one": [b"first", b"second", b"", b"\x00\xff\x80"]}
    one.send_notif(b"two", b"third")
    assert awaited(two, 1) == {"one": [b"third"]}
    one.send_notif("one", b"to itself")
    assert awaited(one, 1) == {"one": [b"to itself"]}
    with pytest.raises(bindings.nixlNotFoundError):
        one.send_notif("none such", b"lost")
    for call in (
        lambda: one.send_notif("two", b"lost", "none such"),
        lambda: one.get_new_notifs(["none such"]),
    ):
        with pytest.raises(KeyError):
            call()


def test_messages_are_kept_until_they_are_looked_up(one, two, theirs):
    """update_notifs gathers, check_remote_xfer_done takes one by its beginning or a part."""
    for message in (b"done:1", b"done:2", b"other"):
        one.send_notif("two", message)
    gathered = {}
    while sum(map(len, gathered.values())) < 3:
        gathered = two.update_notifs()
    assert two.update_notifs() == {"one": [b"done:1", b"done:2", b"other"]}
    assert two.check_remote_xfer_done("one", b"done:2") is True
    assert two.check_remote_xfer_done("one", b"done:2") is False
    assert two.check_remote_xfer_done("one", b"her") is False
    assert two.check_remote_xfer_done("one", b"her", tag_is_prefix=False) is True
    assert two.check_remote_xfer_done("none such", b"done") is False
    assert two.update_notifs() == {"one": [b"done:1"]}


def test_a_removed_peer_is_unknown_until_it_is_added_again(one, two, mine, theirs, sides, transfer):
    run(one, transfer)
    awaited(two, 1)
    one.remove_remote_agent("two")
    assert one.check_remote_metadata("two") is False
    with pytest.raises(bindings.nixlNotFoundError):
        one.transfer(transfer)
    with pytest.raises(bindings.nixlNotFoundError):
        prepared(one, theirs, "two")
    with pytest.raises(bindings.nixlNotFoundError):
        one.send_notif("two", b"lost")
    one.release_xfer_handle(transfer)
    one.release_dlist_handle(sides[1])
    one.remove_remote_agent("two")
    one.remove_remote_agent("none such")
    one.add_remote_agent(two.get_agent_metadata())
    remote = prepared(one, theirs, "two")
    run(one, one.make_prepped_xfer("READ", sides[0], [0], remote, [1], b"back"))
    assert (mine.array[:64] == theirs.array[64:128]).all()
    assert awaited(two, 1) == {"one": [b"back"]}


def test_new_memory_is_known_after_adding_the_peer_again(one, two, mine, theirs):
    """vLLM registers once; SGLang's staging buffers come later."""
    later = Memory(two, 256, start=9)
    with pytest.raises(bindings.nixlNotFoundError):
        one.prep_xfer_dlist("two", [(later.address, 64, 0)], "DRAM")
    one.add_remote_agent(two.get_agent_metadata())
    remote = one.prep_xfer_dlist("two", [(later.address, 64, 0)], "DRAM")
    run(one, one.make_prepped_xfer("READ", prepared(one, mine), [0], remote, [0]))
    assert (mine.array[:64] == later.array[:64]).all()


def test_an_agent_is_shared_by_threads(new_agent):
    """Each thread posts its own transfers and sends messages, while one more takes notifications, all on two agents."""
    strict = {"sync_mode": nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT}
    one, two = new_agent("one", **strict), new_agent("two", **strict)
    mine, theirs = Memory(one, 4096), Memory(two, 4096, start=100)
    one.add_remote_agent(two.get_agent_metadata())
    sides = prepared(one, mine), prepared(one, theirs, "two")
    threads, rounds, failures = 4, 20, []

    def work(thread):
        try:
            for number in range(rounds):
                blocks = [thread * 8 + number % 8]
                handle = one.make_prepped_xfer(
                    "WRITE", sides[0], blocks, sides[1], blocks, b"transfer"
                )
                assert finished(one, handle, one.transfer(handle)) == "DONE"
                one.release_xfer_handle(handle)
                one.send_notif("two", b"message")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    taken = awaited(two, 2 * threads * rounds)["one"]
    for worker in workers:
        worker.join()
    assert failures == []
    assert sorted(taken) == [b"message"] * (threads * rounds) + [b"transfer"] * (threads * rounds)
    assert (theirs.array[:2048] == mine.array[:2048]).all()


def test_torch_tensors_are_taken_as_they_are(one, two):
    """One tensor, a list of them, and what is not contiguous."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    source = torch.arange(256, dtype=torch.int32)
    targets = [torch.zeros(128, dtype=torch.int32) for _ in range(2)]
    two.register_memory(source)
    one.register_memory(targets)
    one.add_remote_agent(two.get_agent_metadata())
    halves = one.get_xfer_descs([source[:128], source[128:]])
    assert halves.descCount() == 2 and halves[1] == (source.data_ptr() + 512, 512, 0)
    run(one, one.initialize_xfer("READ", one.get_xfer_descs(targets), halves, "two"))
    assert torch.equal(torch.cat(targets), source)
    assert one.get_xfer_descs(source[::2]) is None
    assert one.get_reg_descs([source, source[::2]]) is None
