"""What only kvfabric's stand-in for NIXL does: reasons, refusals, its own formats, cancelling and deadlines."""

import inspect
import logging
import os
import pickle
import random
import subprocess
import sys

import kvfabric
import numpy as np
import pytest
from kvfabric.nixl_compat import _api, _card, _memory, _settings
from nixl_rig import SECONDS, SOURCES, Deadline, Memory, awaited, finished, run

import nixl
from nixl import _bindings as bindings

ONLY_TCP = {"KVFABRIC_NIXL_SHM": "false", "KVFABRIC_NIXL_CMA": "false"}


@pytest.fixture
def stopped(one, new_other):
    """A process that is reached by TCP, and does not go on: (process, transfer from it in flight, target)."""
    process = new_other(**ONLY_TCP)
    one.add_remote_agent(process.metadata)
    target = Memory(one, process.length, start=7)
    local = one.get_xfer_descs([(target.address, target.length, 0)], "DRAM")
    remote = one.get_xfer_descs([(process.address, target.length, 0)], "DRAM")
    handle = one.initialize_xfer("READ", local, remote, "other", b"read")
    run(one, handle)
    target.array[:] = 7
    process.stop()
    assert one.transfer(handle) == "PROC"
    yield process, handle, target
    process.go()


def test_the_wheel_offers_what_the_package_has():
    """The modules that engines import are those of kvfabric, name by name."""
    for name in nixl._bindings.__dict__:
        if name.startswith(("nixl", "NIXL")):
            assert getattr(nixl._bindings, name).__class__ is not None
    assert nixl._api.nixl_agent is _api.nixl_agent is nixl.nixl_agent
    assert nixl.nixl_thread_sync_t is _api.nixl_thread_sync_t
    assert nixl._api.nixlBind.nixlAgent is bindings.nixlAgent


@pytest.mark.parametrize("name", ["nixl", "nixl-cu12", "nixl-cu13", "nixl-rocm"])
def test_the_wheel_refuses_to_be_imported_beside_the_real_one(tmp_path, name):
    """A distribution of that name is made up; the reason names it and its version."""
    info = tmp_path / f"{name.replace('-', '_')}-1.5.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5.1\n")
    paths = [str(tmp_path), str(SOURCES), *sys.path]
    tried = subprocess.run(
        [sys.executable, "-c", "import nixl._api"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert tried.returncode == 1
    assert (
        tried.stderr.splitlines()[-1].startswith("ImportError: ")
        and f"{name} 1.5.1" in tried.stderr
    )


def test_metadata_of_the_real_nixl_is_refused_by_name(one):
    """The first bytes of what nixl 1.5.1 hands out."""
    with pytest.raises(bindings.nixlMismatchError, match="real NIXL.*nixlSerDes"):
        one.add_remote_agent(b"nixlSerDes|Agent\x03\0\0\0\0\0\0\0two|Conns\x08\0\0\0\0\0\0\0")


def test_damaged_metadata_is_refused_wherever_it_is_damaged(one, two, theirs):
    """Every byte flipped, every length cut; what was known of the peer stays."""
    metadata = two.get_agent_metadata()
    for position in range(len(metadata)):
        damaged = bytearray(metadata)
        damaged[position] ^= 1 << (position % 8)
        for wrong in (bytes(damaged), metadata[:position]):
            with pytest.raises(bindings.nixlMismatchError):
                one.add_remote_agent(wrong)
    assert one.check_remote_metadata("two", one.get_xfer_descs([theirs.block(0)], "DRAM")) is True


def test_metadata_that_contradicts_itself_is_refused(one, two, new_agent):
    """With a right checksum: another version, a wrong count, a range that wraps around, a name that is not the agent's."""
    inner = two.agent._core.metadata()
    good = _card.Card("two", np.zeros((1, 4), np.uint64), inner)
    assert _card.Card.decode(good.encode()).inner == inner
    wraps = np.array([[2**64 - 8, 9, 0, 1]], np.uint64)
    for card, reason in (
        (good._replace(ranges=wraps), "range of 9 bytes"),
        (good._replace(name="three"), "says it is 'three'"),
        (good._replace(inner=b"junk"), "agent metadata"),
    ):
        with pytest.raises(bindings.nixlMismatchError, match=reason):
            one.add_remote_agent(card.encode())
    for position, value, reason in (
        (8, 2, "version 2"),
        (12, 2, "says that it has"),
        (20, 0xFF, "UTF-8"),
    ):
        wrong = bytearray(good.encode()[:-4])
        wrong[position] = value
        with pytest.raises(bindings.nixlMismatchError, match=reason):
            one.add_remote_agent(bytes(wrong) + _card._CHECKSUM.pack(_card.zlib.crc32(wrong)))


def brute_force(ranges, address, length, device, stride=0, count=1):
    """Whether one range contains all of it, by trying each."""
    last = address + (count - 1) * stride
    return any(
        device == its and start <= address and last + length <= start + size
        for start, size, its, _ in ranges
    )


@pytest.mark.parametrize("seed", range(20))
def test_addresses_are_found_as_by_trying_every_range(seed):
    """Random ranges that overlap, nest and touch, some at the end of the address space; random descriptors."""
    chance = random.Random(seed)
    bases = [0, 2**32, 2**64 - 1000]
    ranges = []
    for number in range(chance.randint(1, 12)):
        start = chance.choice(bases) + chance.randint(0, 500)
        ranges.append((start, chance.randint(1, 400), chance.randint(0, 1), number))
    index = _memory.Ranges(np.array(ranges, np.uint64), "test")
    by_region = {region: (start, size, device) for start, size, device, region in ranges}
    for _ in range(300):
        address = chance.choice(bases) + chance.randint(0, 999)
        length, device = chance.randint(1, 120), chance.randint(0, 2)
        stride, count = chance.choice([(length, 3), (length + 7, 2), (2**63, 3), (1, 1), (900, 1)])
        plain = np.array([[address, length, device]], np.uint64)
        if brute_force(ranges, address, length, device):
            region, offset, found = index.resolve(plain)[0].tolist()
            start, size, its = by_region[region]
            assert (start + offset, found, its) == (address, length, device)
            assert offset + length <= size
        else:
            with pytest.raises(bindings.nixlNotFoundError):
                index.resolve(plain)
        strided = np.array([[address, length, device, stride, count]], np.uint64)
        fits = brute_force(ranges, address, length, device, stride, count)
        if fits and stride >= length:
            region, offset, *rest = index.resolve_strided(strided)[0].tolist()
            assert by_region[region][0] + offset == address and rest == [length, stride, count]
        else:
            with pytest.raises(bindings.nixlNotFoundError):
                index.resolve_strided(strided)


def test_the_first_descriptor_that_is_not_registered_is_named(one, mine):
    rows = [mine.block(0), mine.block(1), (mine.address + mine.length, 64, 0)]
    with pytest.raises(
        bindings.nixlNotFoundError, match="NIXL_ERR_NOT_FOUND: descriptor 2: 64 bytes at 0x"
    ):
        one.prep_xfer_dlist("", rows, "DRAM")
    with pytest.raises(bindings.nixlInvalidParamError, match="descriptor 1"):
        one.prep_xfer_dlist("", [mine.block(0), (mine.address, 0, 0)], "DRAM")


def test_serialised_lists_are_no_pickles_and_damage_is_noticed(one):
    """Own format: each byte flipped and each cut is refused. Pickling a list uses it too."""
    descs = one.get_reg_descs([(1, 2, 3, "name"), (4, 5, 6, b"")], "DRAM")
    serialised = one.get_serialized_descs(descs)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(serialised)
    for position in range(len(serialised)):
        damaged = bytearray(serialised)
        damaged[position] ^= 1 << (position % 8)
        for wrong in (bytes(damaged), serialised[:position]):
            with pytest.raises(bindings.nixlMismatchError):
                one.deserialize_descs(wrong)
    assert pickle.loads(pickle.dumps(descs)) == descs
    remote = one.get_remote_descs([(1, 2, 3, "two")], "DRAM")
    assert one.deserialize_descs(one.get_serialized_descs(remote)) == remote


def test_settings_come_from_parameters_then_from_the_environment(monkeypatch, caplog):
    """Those of UCX are taken without a word, unknown ones with a warning, wrong ones not at all."""
    assert _settings.Settings.of({}) == ("127.0.0.1:0", None, True, True, 60.0)
    monkeypatch.setenv("KVFABRIC_NIXL_LISTEN", "off")
    monkeypatch.setenv("KVFABRIC_NIXL_DEADLINE", "5")
    assert _settings.Settings.of({"num_threads": "8", "cma": "false"}) == (
        None,
        None,
        True,
        False,
        5.0,
    )
    assert _settings.Settings.of({"deadline": "7"}).deadline == 7.0
    assert caplog.records == []
    _settings.Settings.of({"lisen": "127.0.0.1:1"})
    assert [record.levelno for record in caplog.records] == [
        logging.WARNING
    ] and "lisen" in caplog.text
    for wrong in ({"shm": "yes"}, {"deadline": "0"}, {"deadline": "soon"}, {"deadline": "1e9"}):
        with pytest.raises(bindings.nixlInvalidParamError, match=next(iter(wrong))):
            _settings.Settings.of(wrong)


def test_a_wrong_address_to_listen_on_is_named(new_agent):
    agent = new_agent("wrong", backends=[])
    with pytest.raises(bindings.nixlInvalidParamError, match="localhost"):
        agent.create_backend("UCX", {"listen": "localhost"})
    agent.create_backend("UCX", {"listen": "off"})


def test_what_is_not_offered_is_refused_with_the_reason(one, mine, new_agent):
    """Device memory, files, the metadata server, the listener, partial metadata, memory views."""
    unsupported = bindings.nixlNotSupportedError
    with pytest.raises(unsupported, match="device memory.*kv_buffer_device"):
        one.register_memory([(mine.address, 64, 0, "")], "VRAM")
    with pytest.raises(bindings.nixlNotFoundError, match="FILE_SEG"):
        one.register_memory([(0, 64, 1, "rw:/tmp/x")], "FILE")
    with pytest.raises(bindings.nixlNotFoundError, match="LIBFABRIC.*'UCX'"):
        one.create_backend("LIBFABRIC")
    with pytest.raises(unsupported, match="listener"):
        new_agent("listens", enable_listen_thread=True)
    with pytest.raises(unsupported, match="partial"):
        one.get_partial_agent_metadata(mine.registered)
    with pytest.raises(unsupported, match="memory views"):
        one.prep_mem_view(one.get_xfer_descs([mine.block(0)], "DRAM"))
    for call in (
        one.send_local_metadata,
        one.invalidate_local_metadata,
        lambda: one.fetch_remote_metadata("two"),
        lambda: one.send_partial_agent_metadata(mine.registered),
    ):
        with pytest.raises(unsupported, match="no metadata server"):
            call()


def test_without_telemetry_there_is_none(new_agent, two, theirs):
    agent = new_agent("silent", capture_telemetry=False)
    memory = Memory(agent, 64)
    agent.add_remote_agent(two.get_agent_metadata())
    descs = agent.get_xfer_descs([(memory.address, 64, 0)], "DRAM")
    handle = agent.initialize_xfer(
        "WRITE", descs, agent.get_xfer_descs([theirs.block(0)], "DRAM"), "two"
    )
    run(agent, handle)
    with pytest.raises(bindings.nixlNoTelemetryError, match="capture_telemetry"):
        agent.get_xfer_telemetry(handle)


def test_the_log_says_once_which_way_a_peer_is_reached(one, two, mine, theirs, caplog):
    with caplog.at_level(logging.INFO, "kvfabric.nixl"):
        for number in range(3):
            local = one.get_xfer_descs([mine.block(number)], "DRAM")
            run(
                one,
                one.initialize_xfer(
                    "READ", local, one.get_xfer_descs([theirs.block(0)], "DRAM"), "two"
                ),
            )
    said = [
        record.getMessage() for record in caplog.records if "is reached by" in record.getMessage()
    ]
    assert len(said) == 1 and "two" in said[0] and "memcpy" in said[0]


def test_every_error_of_kvfabric_becomes_one_of_nixl_with_its_reason(one, mine, theirs):
    """No kind is left out, and what happened underneath is the cause."""
    from kvfabric.nixl_compat._errors import translated

    for kind in kvfabric.KvfabricError.__subclasses__():
        found = translated(kind("why"))
        assert type(found).__name__ in dir(bindings), kind
        assert type(found) is not bindings.nixlUnknownError or kind.__name__ in (
            "PoisonedError",
            "InternalError",
        )
        assert str(found) == f"{found.status.name}: why" and isinstance(found.__cause__, kind)


def test_a_transfer_in_flight_is_not_posted_again_and_has_no_telemetry(one, stopped):
    _, handle, _ = stopped
    assert one.check_xfer_state(handle) == "PROC"
    with pytest.raises(bindings.nixlRepostActiveError):
        one.transfer(handle)
    with pytest.raises(bindings.nixlNoTelemetryError):
        one.get_xfer_telemetry(handle)


def test_no_byte_lands_once_a_transfer_in_flight_could_be_released(one, stopped):
    """Released as often as it takes while the peer goes on; then the memory is the caller's."""
    process, handle, target = stopped
    deadline, is_stopped = Deadline(), True
    while True:
        try:
            one.release_xfer_handle(handle)
            break
        except bindings.nixlRepostActiveError:
            deadline.check("never settled")
            if is_stopped:
                process.go()
                is_stopped = False
    target.array[:] = 99
    process.go()
    # It has read everything that was sent to it before it answers this.
    assert process.ask("notifs", count=1)["notifs"]["one"][0] == "read"
    assert (target.array == 99).all()
    with pytest.raises(bindings.nixlInvalidParamError, match="released"):
        one.check_xfer_state(handle)


def test_a_transfer_ends_by_its_deadline(new_agent, new_other):
    """The peer never goes on, so nothing but the deadline can end it."""
    agent = new_agent("one", backends=[])
    agent.create_backend("UCX", {"deadline": "1"})
    process = new_other(**ONLY_TCP)
    agent.add_remote_agent(process.metadata)
    target = Memory(agent, process.length)
    local = agent.get_xfer_descs([(target.address, target.length, 0)], "DRAM")
    remote = agent.get_xfer_descs([(process.address, target.length, 0)], "DRAM")
    handle = agent.initialize_xfer("READ", local, remote, "other")

    def run_in_time():
        deadline = Deadline()
        while True:
            try:
                return run(agent, handle)
            # A busy machine needs longer now and then; a transfer that failed may take a while to end.
            except (bindings.nixlRepostActiveError, bindings.nixlBackendError):
                deadline.check("no transfer is done in time")

    run_in_time()
    process.stop()
    with pytest.raises(bindings.nixlBackendError) as caught:
        finished(agent, handle, agent.transfer(handle))
    assert isinstance(caught.value.__cause__, kvfabric.DeadlineError)
    target.array[:] = 99
    process.go()
    run_in_time()
    assert (target.array == (np.arange(target.length) % 251)).all()


def test_messages_to_a_peer_that_is_stopped_do_not_stop_the_sender(one, stopped):
    """They are taken once it goes on, in order."""
    process, handle, _ = stopped
    for number in range(3):
        one.send_notif("other", f"beat {number}".encode())
    process.go()
    assert finished(one, handle, "PROC") == "DONE"
    taken = process.ask("notifs", count=5)["notifs"]["one"]
    # The message of the transfer, which was posted first, has to wait for its bytes.
    assert taken.count("read") == 2
    assert [each for each in taken if each != "read"] == ["beat 0", "beat 1", "beat 2"]


def test_a_peer_that_was_started_again_is_reached_by_its_new_metadata(one, new_other):
    """Under the same name: what was prepared for the old process does not touch the new one."""
    first = new_other()
    one.add_remote_agent(first.metadata)
    target = Memory(one, 4096, start=7)
    local = one.prep_xfer_dlist("", [(target.address, 64, 0)], "DRAM")
    old = one.prep_xfer_dlist("other", [(first.address + 64, 64, 0)], "DRAM")
    old_handle = one.make_prepped_xfer("READ", local, [0], old, [0])
    run(one, old_handle)
    first.kill()
    second = new_other()
    assert one.add_remote_agent(second.metadata) == b"other"
    target.array[:] = 0
    with pytest.raises(bindings.nixlNotAllowedError, match="key is wrong"):
        finished(one, old_handle, one.transfer(old_handle))
    assert (target.array == 0).all()
    remote = one.prep_xfer_dlist("other", [(second.address + 64, 64, 0)], "DRAM")
    run(one, one.make_prepped_xfer("READ", local, [0], remote, [0], b"again"))
    assert target.array[:64].tolist() == list(range(64, 128))
    assert second.ask("notifs", count=1) == {"notifs": {"one": ["again"]}}


def test_an_agent_starts_no_threads_that_python_knows_of(one, mine):
    """Nothing of this package polls: there is no thread to do it, and no callback into Python."""
    import threading

    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    sources = inspect.getsource(inspect.getmodule(type(one)))
    assert "Thread(" not in sources and "sleep(" not in sources


def test_a_forked_child_is_told(one, mine):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            one.register_memory([(mine.address, 64, 0, "")], "DRAM")
        except bindings.nixlNotAllowedError:
            said = b"not allowed"
        finally:
            os.write(write_end, said)
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"not allowed"
    os.waitpid(child, 0)


def test_a_loopback_message_is_delivered_when_nobody_asks_for_the_state(one, mine):
    """Large enough not to be done at once: the message comes by asking for messages alone."""
    big = Memory(one, 32 << 20)
    half = big.length // 2
    source = one.get_xfer_descs([(big.address, half, 0)], "DRAM")
    target = one.get_xfer_descs([(big.address + half, half, 0)], "DRAM")
    handle = one.initialize_xfer("WRITE", source, target, "one", b"copied")
    one.transfer(handle)
    assert awaited(one, 1) == {"one": [b"copied"]}
    assert (big.array[:half] == big.array[half:]).all()
