"""Names of blocks as engines hash them, and identities of models."""

import array
import hashlib
import json
import os
import pathlib
import pickle

import pytest

import kvfabric

SCHEME = "xxh3:1337"
MODEL = "m"
BLOCK = 16
GOLDEN = pathlib.Path(__file__).parents[2] / "node" / "tests" / "golden" / "names.json"


def hashes(count):
    return [hashlib.sha256(b"%d" % position).digest() for position in range(count)]


def chain(**more):
    return kvfabric.NameChain(SCHEME, MODEL, BLOCK, **more)


def parsed(packed):
    """(adapter, parent, names) of a packed run, as the node's module `names` documents it; each name is (hash, index key)."""
    version, flags = packed[0], packed[1]
    assert version == 1 and flags < 4
    size = int.from_bytes(packed[2:4], "little")
    count = int.from_bytes(packed[4:8], "little")
    rest = packed[8:]
    adapter = None
    if flags & 2:
        adapter, rest = rest[:32], rest[32:]
    entries = [rest[at : at + size + 8] for at in range(0, len(rest), size + 8)]
    names = [(entry[:size], int.from_bytes(entry[size:], "little")) for entry in entries]
    parent = names.pop(0) if flags & 1 else None
    assert len(names) == count
    return adapter, parent, names


def test_a_chain_names_each_block_by_both_its_hashes():
    grown, whole = chain(), chain()
    tokens = list(range(5 * BLOCK))
    assert whole.extend(tokens, hashes(5)) == len(whole) == 5
    for position, name in enumerate(hashes(5)):
        some = array.array("I", tokens[position * BLOCK : (position + 1) * BLOCK])
        assert grown.extend(some, [name]) == position + 1
    assert grown.pack(0, 5) == whole.pack(0, 5)
    adapter, parent, names = parsed(whole.pack(0, 5))
    assert adapter is None and parent is None and [name for name, _ in names] == hashes(5)
    assert parsed(whole.pack(2, 4)) == (None, names[1], names[2:4])
    assert parsed(whole.pack(5, 5))[2] == []


def test_adapters_and_salts_have_other_names():
    keys = set()
    adapter = bytes(range(32))
    for more in (
        {},
        {"lora": "a"},
        {"cache_salt": "a"},
        {"lora": "a", "adapter_identity": adapter},
    ):
        one = chain(**more)
        one.extend(range(BLOCK), hashes(1))
        carried, _, ((_, key),) = parsed(one.pack(0, 1))
        keys.add((carried, key))
    assert len(keys) == 4


def test_golden_names_are_packed_to_the_byte():
    golden = json.loads(GOLDEN.read_text())
    names = [bytes.fromhex(name) for name in golden["hashes"]]
    assert golden["cases"]
    for case in golden["cases"]:
        one = kvfabric.NameChain(
            SCHEME,
            MODEL,
            golden["block_tokens"],
            lora=case["lora"],
            cache_salt=case["cache_salt"],
            adapter_identity=bytes.fromhex(case["adapter"]) if case["adapter"] else None,
        )
        one.extend(golden["tokens"], names)
        assert one.pack(case["start"], case["stop"]).hex() == case["packed"]


def test_what_does_not_fit_a_chain_is_refused():
    one = chain()
    with pytest.raises(kvfabric.InvalidError, match="tokens"):
        one.extend(range(BLOCK + 1), hashes(1))
    with pytest.raises(kvfabric.InvalidError, match="hash"):
        one.extend(range(2 * BLOCK), [b"x" * 32, b"x" * 31])
    with pytest.raises(kvfabric.InvalidError, match="hash"):
        one.extend(range(BLOCK), [b""])
    with pytest.raises(kvfabric.InvalidError, match="tokens"):
        one.extend(array.array("q", [-1] * BLOCK), hashes(1))
    assert len(one) == 0
    one.extend(range(BLOCK), hashes(1))
    for start, stop in ((0, 2), (1, 0)):
        with pytest.raises(kvfabric.InvalidError, match="blocks"):
            one.pack(start, stop)
    with pytest.raises(kvfabric.InvalidError, match="scheme"):
        kvfabric.NameChain("md5", MODEL, BLOCK)
    with pytest.raises(kvfabric.InvalidError):
        kvfabric.NameChain(SCHEME, MODEL, 0)
    with pytest.raises(kvfabric.InvalidError, match="adapter_identity"):
        chain(adapter_identity=b"short")


def test_golden_hashes_without_tokens_are_packed_to_the_byte():
    golden = json.loads(GOLDEN.read_text())
    names = [bytes.fromhex(name) for name in golden["hashes"]]
    assert golden["without_tokens"]
    for case in golden["without_tokens"]:
        packed = kvfabric.pack_hashes(bytes.fromhex(case["root"]), names[: case["count"]])
        assert packed == bytes.fromhex(case["packed"])
    with pytest.raises(kvfabric.InvalidError, match="31"):
        kvfabric.pack_hashes(b"root", [names[0], names[0][:31]])
    with pytest.raises(TypeError):
        kvfabric.pack_hashes("root", names)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Digests of weights are remembered here, not in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def identity(path, **more):
    return kvfabric.model_identity(path, **{"element": "bfloat16", "layout": "pages", **more})


def test_an_identity_is_of_the_weights_and_of_what_shapes_their_cache(home):
    folder = home / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    first = identity(folder)
    assert len(bytes.fromhex(first)) == 32 and first == identity(str(folder))
    others = [
        identity(folder, element="float16"),
        identity(folder, layout="rows"),
        identity(folder, quantisation="fp8"),
        identity(folder, attributes={"heads": "8"}),
    ]
    weights.write_bytes(b"Weights")
    others.append(identity(folder))
    assert len({first, *others}) == 6


def test_a_snapshot_is_known_by_its_commit_alone(home):
    def snapshot(place, weights):
        folder = home / place / "models--org--name" / "snapshots" / ("0123456789" * 4)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
        return folder

    assert identity(snapshot("here", b"one")) == identity(snapshot("there", b"two"))


def test_weights_that_nothing_names_are_refused(home):
    with pytest.raises(kvfabric.InvalidError, match="weights"):
        identity(None)
    with pytest.raises(kvfabric.InvalidError, match=str(home)):
        identity(home)
    with pytest.raises(kvfabric.NotFoundError, match="nowhere"):
        identity(os.fspath(home / "nowhere"))
    assert identity(None, name="mine") != identity(None, name="yours")
    with pytest.raises(TypeError):
        kvfabric.model_identity(None, name="mine")


def test_reports_travel_between_processes():
    reach = kvfabric.Reach(3, 1, 1, 0, [("pod", 3, None)], [(1, 3)], 2)
    assert pickle.loads(pickle.dumps(reach)) == reach
    assert pickle.loads(pickle.dumps(kvfabric.Pin(7, 3))).id == 7
    error = pickle.loads(pickle.dumps(kvfabric.BusyError("full")))
    assert isinstance(error, kvfabric.BusyError) and str(error) == "full"
