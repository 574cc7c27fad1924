"""Files and objects as regions."""

import pytest

import kvfabric

LEN = 1 << 20
DATA = bytes(range(256)) * (LEN // 256)


def written_and_read(agent, place):
    """Whether what is written to a place is read back from it."""
    memory = bytearray(DATA)
    own = agent.register(memory)
    agent.write([(own, 0, LEN)], None, [(place, 0, LEN)]).wait()
    memory[:] = bytes(LEN)
    agent.read([(own, 0, LEN)], None, [(place, 0, LEN)]).wait()
    own.deregister()
    return memory == DATA


def test_a_file_is_a_place(tmp_path):
    agent = kvfabric.Agent("files")
    with pytest.raises(kvfabric.InvalidError, match="file engine"):
        agent.start_files("pigeon")
    assert "threads" in agent.start_files("threads")
    path = tmp_path / "blocks"
    with pytest.raises(kvfabric.NotFoundError, match="blocks"):
        agent.open_file(path)
    with pytest.raises(kvfabric.InvalidError, match="directory"):
        agent.open_file(tmp_path)
    file = agent.open_file(path, len=LEN, create=True, preallocate=True)
    assert written_and_read(agent, file)
    file.sync()
    assert path.read_bytes() == DATA
    assert (file.len, len(file), file.address) == (LEN, LEN, 0)
    with pytest.raises(kvfabric.UnsupportedError, match="no memory to look at"):
        file.view()
    file.deregister()
    # Of its length now, and not to be written to.
    file = agent.open_file(str(path), read_only=True, direct=False)
    own = agent.register(bytearray(DATA))
    with pytest.raises(kvfabric.DeniedError):
        agent.write([(own, 0, LEN)], None, [(file, 0, LEN)]).wait()
    with pytest.raises(kvfabric.UnsupportedError, match="no file"):
        own.sync()


def test_an_object_is_a_place(tmp_path):
    store = kvfabric.ObjectStore(f"file://{tmp_path}/store")
    agent = kvfabric.Agent("objects", object_stores={"blocks": store})
    with pytest.raises(kvfabric.NotFoundError, match="others"):
        agent.open_object("others", "a/b")
    with pytest.raises(kvfabric.InvalidError, match="when_there"):
        agent.open_object("blocks", "a/b", when_there="pigeon")
    first = agent.open_object("blocks", "a/b")
    assert written_and_read(agent, first)
    with pytest.raises(OverflowError):
        len(first)
    own = agent.register(bytearray(LEN))
    create = agent.open_object("blocks", "a/b", when_there="create")
    with pytest.raises(kvfabric.DeniedError):
        agent.write([(own, 0, LEN)], None, [(create, 0, LEN)]).wait()
    # One of the same size stays.
    keep = agent.open_object("blocks", "a/b", when_there="keep")
    agent.write([(own, 0, LEN)], None, [(keep, 0, LEN)]).wait()
    assert (tmp_path / "store" / "a" / "b").read_bytes() == DATA
    agent.remove_object("blocks", "a/b")
    agent.remove_object("blocks", "a/b")
    with pytest.raises(kvfabric.NotFoundError):
        agent.read([(own, 0, LEN)], None, [(first, 0, LEN)]).wait()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"checksum": "md5"}, "object store checksum"),
        ({"part_bytes": 1}, "part_bytes"),
        ({"parts_in_flight": 65}, "parts_in_flight"),
        ({"requests_in_flight": 0}, "concurrency"),
        ({"attempt_timeout": -1.0}, "timeout"),
    ],
)
def test_what_a_store_is_told_is_checked_and_secrets_stay(options, what):
    good = kvfabric.ObjectStore("s3://bucket", region="r", access_key="id", secret_key="hush")
    store = good._replace(**options)
    assert "hush" not in repr(store) and "hush" not in str(store) and "id" in repr(store)
    with pytest.raises(kvfabric.InvalidError, match=what) as refused:
        kvfabric.Agent("objects", object_stores={"s": store})
    assert "hush" not in str(refused.value)


def test_a_store_of_an_unknown_kind_is_refused():
    with pytest.raises(kvfabric.UnsupportedError, match="pigeon"):
        kvfabric.Agent("objects", object_stores={"s": kvfabric.ObjectStore("pigeon://bucket")})
