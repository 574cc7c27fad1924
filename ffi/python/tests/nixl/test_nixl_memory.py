"""What engines rely on before they move bytes: names, backends, registered memory, descriptor lists, peers' metadata."""

import numpy as np
import pytest
from nixl._api import DEFAULT_COMM_PORT, nixl_agent, nixl_agent_config, nixl_thread_sync_t
from nixl_rig import Memory, prepared

from nixl import _bindings as bindings


def test_the_constants_and_names_that_engines_import_are_there():
    """What vLLM and SGLang import or look up by name."""
    assert DEFAULT_COMM_PORT == bindings.DEFAULT_COMM_PORT == 8888
    assert bindings.NIXL_INIT_AGENT == ""
    assert int(bindings.DRAM_SEG) == 0 and bindings.DRAM_SEG.name == "DRAM_SEG"
    assert str(bindings.VRAM_SEG) == "nixl_mem_t.VRAM_SEG"
    assert bindings.NIXL_SUCCESS == bindings.nixl_status_t(0) and int(bindings.NIXL_IN_PROG) == 1
    assert int(bindings.NIXL_READ) == 0 and int(bindings.NIXL_WRITE) == 1
    for name in ("Backend", "Cancelled", "InvalidParam", "Mismatch", "NoTelemetry", "NotAllowed"):
        assert issubclass(getattr(bindings, f"nixl{name}Error"), Exception)
    for name in ("NotFound", "NotPosted", "NotSupported", "RemoteDisconnect", "RepostActive"):
        assert issubclass(getattr(bindings, f"nixl{name}Error"), Exception)


def test_a_config_has_the_defaults_that_engines_count_on():
    """The attributes that SGLang reads; a sync mode of another type is refused."""
    config = nixl_agent_config()
    assert config.backends == ["UCX"] and config.port == DEFAULT_COMM_PORT
    assert config.enable_pthread and not config.enable_listen and not config.capture_telemetry
    assert config.sync_mode is None and config.num_threads == 0
    with pytest.raises(TypeError, match="sync_mode"):
        nixl_agent_config(sync_mode=1)
    bound = bindings.nixlAgentConfig()
    bound.useProgThread, bound.captureTelemetry = True, True
    assert bound.useListenThread is False and bound.listenPort == DEFAULT_COMM_PORT


def test_a_backend_is_created_once_and_by_its_name(new_agent):
    """As SGLang does it: no backend at first, then one with parameters."""
    agent = new_agent(
        "late", backends=[], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT, num_threads=8
    )
    assert agent.name == "late" and agent.backends == {}
    assert "UCX" in agent.get_plugin_list()
    assert agent.get_plugin_params("none such") == {}
    assert agent.get_plugin_mem_types("none such") == []
    assert agent.get_backend_params("UCX") == {} and agent.get_backend_mem_types("UCX") == []
    agent.create_backend("UCX", {"num_threads": "8"})
    assert list(agent.backends) == ["UCX"]
    assert "DRAM_SEG" in agent.get_backend_mem_types("UCX")
    assert "DRAM_SEG" in agent.get_plugin_mem_types("UCX")
    assert isinstance(agent.get_backend_params("UCX"), dict)
    assert all(isinstance(value, str) for value in agent.get_plugin_params("UCX").values())
    with pytest.raises(bindings.nixlInvalidParamError):
        agent.create_backend("UCX")
    with pytest.raises(bindings.nixlNotFoundError):
        agent.create_backend("none such")


def test_a_missing_backend_of_the_config_is_skipped(new_agent):
    """vLLM passes what the operator names on to the config, and then names it when it registers."""
    agent = new_agent("skips", backends=["UCX", "none such"])
    assert list(agent.backends) == ["UCX"]
    array = np.zeros(64, np.uint8)
    with pytest.raises(KeyError):
        agent.register_memory([(array.ctypes.data, 64, 0, "")], "DRAM", backends=["none such"])


def test_without_a_backend_there_is_nothing_to_register_with(new_agent):
    agent = new_agent("bare", backends=[])
    array = np.zeros(64, np.uint8)
    with pytest.raises(bindings.nixlNotFoundError):
        agent.register_memory([(array.ctypes.data, 64, 0, "")], "DRAM")


def test_memory_is_registered_from_tuples_arrays_and_lists(one):
    """Each form gives a list that deregisters it."""
    array = np.zeros(4096, np.uint8)
    row = (array.ctypes.data, 4096, 0)
    listed = bindings.nixlRegDList(bindings.DRAM_SEG, [(*row, "")])
    for form in ([(*row, "")], np.array([row], np.uint64), np.array([row], np.int64), listed):
        registered = one.register_memory(form, None if form is listed else "DRAM")
        assert isinstance(registered, bindings.nixlRegDList)
        assert registered.descCount() == 1 and registered[0] == (*row, b"")
        one.deregister_memory(registered)
    assert one.register_memory(listed, backends=["UCX"]) is listed


@pytest.mark.parametrize(
    "form, memory, error",
    [
        ([(4096, 64, 0)], "DRAM", TypeError),
        ([(4096, 64, 0, "")], None, TypeError),
        ([(4096, 64, 0, "")], "none such", KeyError),
        ([], "DRAM", IndexError),
        (np.zeros((1, 3), np.int32), "DRAM", ValueError),
        (np.zeros((1, 4), np.uint64), "DRAM", TypeError),
    ],
)
def test_what_is_no_list_to_register_is_refused(one, form, memory, error):
    with pytest.raises(error):
        one.register_memory(form, memory)


def test_device_memory_is_refused_without_a_device(one):
    """The real one has another reason here: there is no GPU."""
    array = np.zeros(64, np.uint8)
    with pytest.raises((bindings.nixlBackendError, bindings.nixlNotSupportedError)):
        one.register_memory([(array.ctypes.data, 64, 0, "")], "VRAM")


def test_memory_is_deregistered_as_often_as_it_was_registered(one, mine):
    """The same range twice, and one that lies within it."""
    one.register_memory(mine.registered)
    inner = one.register_memory([(mine.address + 100, 100, 0, "")], "DRAM")
    one.deregister_memory(mine.registered)
    prepared(one, mine)
    one.deregister_memory(mine.registered)
    one.prep_xfer_dlist("", [(mine.address + 100, 100, 0)], "DRAM")
    for descs in (mine.registered, one.get_reg_descs([(mine.address, 8, 0, "")], "DRAM")):
        with pytest.raises(bindings.nixlNotFoundError):
            one.deregister_memory(descs)
    one.deregister_memory(inner)
    with pytest.raises(bindings.nixlNotFoundError):
        prepared(one, mine)


def test_only_storage_can_be_queried(one, mine):
    with pytest.raises(bindings.nixlNotSupportedError):
        one.query_memory(mine.registered, "UCX")
    with pytest.raises(ValueError, match="none such"):
        one.query_memory(mine.registered, "none such")


def test_descriptor_lists_are_none_for_what_they_cannot_be(one, mine):
    """Engines see None, and a reason in the log."""
    row = mine.block(0)
    assert one.get_xfer_descs([(*row, "")], "DRAM") is None
    assert one.get_xfer_descs([row]) is None
    assert one.get_xfer_descs(np.zeros((2, 4), np.uint64), "DRAM") is None
    assert one.get_xfer_descs(np.zeros((2, 3), np.uint64)) is None
    assert one.get_xfer_descs(mine.registered) is None
    assert one.get_reg_descs(one.get_xfer_descs([row], "DRAM")) is None
    assert one.get_reg_descs([row], "DRAM") is None
    with pytest.raises(IndexError):
        one.get_xfer_descs([], "DRAM")
    with pytest.raises(ValueError):
        one.get_xfer_descs(np.zeros((2, 3), np.float64), "DRAM")


@pytest.mark.parametrize("kind, extra", [("nixlXferDList", ()), ("nixlRegDList", (b"m",))])
def test_a_descriptor_list_can_be_edited(kind, extra):
    make = getattr(bindings, kind)
    rows = [(1, 2, 3, *extra), (4, 5, 6, *extra)]
    descs = make(bindings.DRAM_SEG, rows)
    assert descs.getType() == bindings.DRAM_SEG and not descs.isEmpty()
    assert [descs[0], descs[1]] == rows and descs.index(rows[1]) == 1
    with pytest.raises(bindings.nixlNotFoundError):
        descs.index((7, 8, 9, *extra))
    descs.append((7, 8, 9, *extra))
    descs.addDesc((7, 8, 9, *extra))
    descs.remDesc(3)
    descs[0] = (7, 7, 7, *extra)
    assert descs.descCount() == 3 and descs[0] == (7, 7, 7, *extra)
    assert descs == descs and descs != make(bindings.DRAM_SEG, rows)
    with pytest.raises(TypeError):
        hash(descs)
    descs.clear()
    assert descs.isEmpty() and make(bindings.DRAM_SEG).isEmpty()
    with pytest.raises(ValueError):
        make(bindings.DRAM_SEG, [(1, 2)])
    with pytest.raises(TypeError):
        make(bindings.DRAM_SEG, ["text"])


def test_descriptor_lists_survive_being_serialised(one, mine):
    """Both kinds, in the form that goes over the wire."""
    blocks = one.get_xfer_descs([mine.block(0), mine.block(3)], "DRAM")
    for descs in (blocks, one.get_reg_descs([(1, 2, 3, "name")], "VRAM"), mine.registered.trim()):
        serialised = one.get_serialized_descs(descs)
        assert isinstance(serialised, bytes)
        restored = one.deserialize_descs(serialised)
        assert type(restored) is type(descs) and restored == descs
        assert restored.getType() == descs.getType()


def test_a_peer_is_known_by_its_metadata(one, two, mine, theirs):
    """Loaded twice, under both kinds of string; only memory that it had registered is known."""
    assert one.add_remote_agent(two.get_agent_metadata()) == b"two"
    assert one.check_remote_metadata("two") is True
    assert one.check_remote_metadata(b"two") is True
    assert one.check_remote_metadata("one") is True
    assert one.check_remote_metadata("none such") is False
    known = one.get_xfer_descs([theirs.block(0)], "DRAM")
    assert one.check_remote_metadata("two", known) is True
    unknown = one.get_xfer_descs([(theirs.address + theirs.length, 8, 0)], "DRAM")
    assert one.check_remote_metadata("two", unknown) is False
    one.make_connection("two")
    with pytest.raises(bindings.nixlNotFoundError):
        one.make_connection("none such")


def test_metadata_that_is_none_is_refused_and_changes_nothing(one, theirs):
    for junk in (b"", b"junk", "junk"):
        with pytest.raises(bindings.nixlMismatchError):
            one.add_remote_agent(junk)
    with pytest.raises(bindings.nixlInvalidParamError):
        one.add_remote_agent(one.get_agent_metadata())
    assert one.check_remote_metadata("two") is True


def test_whoever_makes_the_bindings_agent_itself_can_use_it():
    """SGLang's HiCache replaces the inner agent by one of its own making."""
    config = nixl_agent_config(backends=[])
    agent = nixl_agent("outer", config)
    bound = bindings.nixlAgentConfig()
    bound.useProgThread, bound.useListenThread = config.enable_pthread, config.enable_listen
    bound.listenPort, bound.captureTelemetry = config.port, config.capture_telemetry
    agent.agent = bindings.nixlAgent("outer", bound)
    assert "UCX" in agent.agent.getAvailPlugins()
    agent.create_backend("UCX", {})
    Memory(agent, 64)
