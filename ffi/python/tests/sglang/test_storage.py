"""`KvFabricStorage` under SGLang's factory, on SGLang's host memory pool, with keys that SGLang
made.
"""

import contextlib
import hashlib
import struct
import time

import pytest
import torch
from rig import (
    KEYS,
    LAYOUTS,
    PAGE_BYTES,
    PAGE_TOKENS,
    VECTORS,
    backend,
    config,
    indices,
    page,
    pool,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import storage_namespace_seed

from kvfabric.sglang.pool import PoolError
from kvfabric.sglang.settings import SettingError


@pytest.fixture
def opened():
    """Opens backends that are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def open_one(*arguments, **named):
            made = backend(*arguments, **named)
            stack.callback(made.close)
            return made

        yield open_one


@pytest.fixture
def shared(tmp_path, index):
    """Settings with an index, and a folder that stands for an object store."""
    folder = tmp_path / "objects"
    folder.mkdir()
    return {"object": {"url": f"file://{folder}"}, "index": index}


def small(table: dict) -> dict:
    """The same with memory for two pages: all others have to go elsewhere."""
    return {**table, "host": {"bytes": 2 * PAGE_BYTES}}


def pushed_out(storage, keys) -> None:
    """Stores other pages until these have left the memory of the node."""
    node, names = storage._node, [storage._prefix([key], True) for key in keys]
    for number in range(1000):
        if not any(node.held(name).wait(60.0).depth for name in names):
            return
        other = hashlib.sha256(b"other" + bytes([number % 256])).hexdigest()
        assert storage.batch_set_v1([other], indices(11)) == [True]
    raise AssertionError("the pages stay in memory")


def comes_true(holds, seconds: float = 60.0) -> bool:
    """Whether it holds in the end: what the index learns of takes a moment."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
    return True


def test_keys_are_what_sglang_makes_of_tokens():
    """The golden hashes, which SGLang's compiled code made, against its rule, and its seed against
    its own function.
    """

    def chain(tokens, prior):
        for start in range(0, len(tokens), PAGE_TOKENS):
            packed = struct.pack(f"<{PAGE_TOKENS}I", *tokens[start : start + PAGE_TOKENS])
            prior = hashlib.sha256(prior + packed).digest()
            yield prior.hex()

    plain, salted = VECTORS["plain"], VECTORS["salted"]
    assert list(chain(plain["tokens"], b"")) == plain["hashes"]
    assert storage_namespace_seed(None, salted["cache_salt"]) == salted["seed"]
    assert list(chain(salted["tokens"], bytes.fromhex(salted["seed"]))) == salted["hashes"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_into_another_pool_byte_for_byte(opened, shared, layout):
    """Four pages stored out of one pool, and fetched into other places of a second one: first by
    way of objects, as their writer has forgotten them, then from the memory of the pod that fetched
    them.
    """
    source, target = pool(layout, seed=1), pool(layout)
    writer = opened(source, small(shared))
    assert isinstance(writer, HiCacheStorage)
    assert writer.batch_exists(KEYS) == 0
    assert writer.batch_set_v1(KEYS, indices(3, 1, 7, 4)) == [True] * 4
    pushed_out(writer, KEYS)

    reader = opened(target, shared)
    assert comes_true(lambda: reader.batch_exists(KEYS) == 4)
    assert reader.exists(KEYS[2]) and not reader.exists(VECTORS["salted"]["hashes"][0])
    assert reader.batch_get_v1(KEYS, indices(0, 2, 9, 5)) == [True] * 4
    for fetched, stored in zip((0, 2, 9, 5), (3, 1, 7, 4)):
        assert torch.equal(page(target, fetched), page(source, stored))
    for untouched in (1, 3, 4, 6, 7, 8, 10, 11):
        assert not page(target, untouched).any()


def test_pages_that_are_not_there_are_misses_and_so_is_what_follows(opened):
    """Of four pages the third was never stored: two are found and fetched, and nothing else is
    written to.
    """
    source = pool("page_first", seed=2)
    storage = opened(source, {})
    assert storage.batch_set_v1([KEYS[0], KEYS[1], KEYS[3]], indices(0, 1, 3)) == [True] * 3
    before = [page(source, number).clone() for number in range(8)]
    assert storage.batch_exists(KEYS) == 2
    assert storage.batch_get_v1(KEYS, indices(4, 5, 6, 7)) == [True, True, False, False]
    assert torch.equal(page(source, 4), before[0]) and torch.equal(page(source, 5), before[1])
    assert torch.equal(page(source, 6), before[6])


def test_a_flipped_byte_of_an_object_is_a_miss(opened, shared, tmp_path):
    """The second of four pages is damaged in the object store: only the first comes back."""
    source, target = pool("layer_first", seed=3), pool("layer_first")
    writer = opened(source, small(shared))
    assert writer.batch_set_v1(KEYS, indices(0, 1, 2, 3)) == [True] * 4
    pushed_out(writer, KEYS)
    needle = page(source, 1)[:64].numpy().tobytes()
    objects = [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]
    (damaged,) = [path for path in objects if needle in path.read_bytes()]
    content = bytearray(damaged.read_bytes())
    content[content.index(needle) + len(needle) // 2] ^= 1
    damaged.write_bytes(content)

    reader = opened(target, shared)
    assert comes_true(lambda: reader.batch_exists(KEYS) == 4)
    assert reader.batch_get_v1(KEYS, indices(0, 1, 2, 3)) == [True, False, False, False]
    assert torch.equal(page(target, 0), page(source, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_come_back_as_they_were(opened, layout):
    """The interface that copies: as SGLang's controller uses it, with flat pages of its pool; ten
    pages, past the staging.
    """
    source, target = pool(layout, seed=4), pool(layout)
    storage = opened(source, {}, in_place=False)
    keys = KEYS + [hashlib.sha256(bytes([n])).hexdigest() for n in range(6)]
    values = [source.get_data_page(number * PAGE_TOKENS) for number in range(10)]
    assert storage.batch_set(keys, values)
    assert storage.batch_exists(keys) == 10
    places = [target.get_dummy_flat_data_page() for _ in keys]
    for number, got in enumerate(storage.batch_get(keys, places)):
        target.set_from_flat_data_page(number * PAGE_TOKENS, got)
        assert torch.equal(page(target, number), page(source, number))
    one = target.get_dummy_flat_data_page()
    assert storage.get("00" * 32, one) is None and not one.any()
    assert storage.set("00" * 32, values[3])
    assert storage.get("00" * 32, one) is one
    assert torch.equal(one.view(torch.uint8), values[3].view(torch.uint8))


def test_tensors_are_never_taken_for_pages_in_place(opened, shared):
    """The same key through either interface: layer-first pools and tensors have other orders of
    bytes.
    """
    source = pool("layer_first", seed=5)
    tensors = opened(source, shared, in_place=False)
    assert tensors.set(KEYS[0], source.get_data_page(0))
    other = opened(pool("layer_first"), shared, in_place=False)
    assert comes_true(lambda: other.batch_exists(KEYS) == 1)
    places = opened(pool("layer_first"), shared)
    assert places.batch_exists(KEYS) == 0
    assert places.batch_get_v1(KEYS[:1], indices(0)) == [False]


def test_ranks_layouts_and_weights_do_not_see_each_others_pages(opened, shared):
    """One page of rank 0 of 2, with one index; the other rank, another layout and other weights
    find nothing.
    """
    first = opened(pool("page_first", seed=6), shared, tp_size=2)
    assert first.batch_set_v1(KEYS[:1], indices(0)) == [True]
    same = opened(pool("page_first"), shared, tp_size=2)
    assert comes_true(lambda: same.batch_exists(KEYS) == 1)
    for other in (
        opened(pool("page_first"), shared, tp_size=2, tp_rank=1),
        opened(pool("page_head"), shared, tp_size=2),
        opened(pool("page_first"), {**shared, "weights": "others"}, tp_size=2),
    ):
        assert other.batch_exists(KEYS) == 0


def test_a_restarted_node_finds_pages_on_its_disk(opened, tmp_path):
    """Stored, closed, opened anew on the same folder, fetched."""
    disk = {"path": str(tmp_path / "disk"), "bytes": 1 << 23, "segment_bytes": 1 << 20}
    table = small({"disk": disk})
    source, target = pool("page_first_direct", seed=7), pool("page_first_direct")
    writer = backend(source, table)
    assert writer.batch_set_v1(KEYS, indices(0, 1, 2, 3)) == [True] * 4
    # Two more than there is memory for: those go to the disk.
    others = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]
    assert writer.batch_set_v1(others, indices(4, 5, 6, 7)) == [True] * 4
    writer.close()
    writer.close()
    reader = opened(target, table)
    assert reader.batch_get_v1(KEYS, indices(3, 2, 1, 0)) == [True] * 4
    assert torch.equal(page(target, 3), page(source, 0))


def test_clearing_removes_pages(opened):
    """Stored, cleared, gone."""
    storage = opened(pool("page_first", seed=8), {})
    assert storage.batch_set_v1(KEYS, indices(0, 1, 2, 3)) == [True] * 4
    storage.clear()
    assert storage.batch_exists(KEYS) == 0


def test_figures_are_told_once(opened):
    """Pages of each batch, for SGLang's metrics; nothing where they are off."""
    storage = opened(pool("page_first", seed=9), {})
    storage.batch_set_v1(KEYS, indices(0, 1, 2, 3))
    storage.batch_get_v1(KEYS[:2], indices(4, 5))
    figures = storage.get_stats()
    assert (figures.backup_pgs, figures.prefetch_pgs) == ([4], [2])
    assert figures.backup_bandwidth[0] > 0 and figures.prefetch_bandwidth[0] > 0
    assert storage.get_stats().backup_pgs == []
    assert opened(pool("page_first"), {}, enable_storage_metrics=False).get_stats() is None


def test_indices_that_are_no_whole_pages_are_refused(opened):
    """A page that begins in the middle of one, and too few indices."""
    storage = opened(pool("page_first"), {})
    with pytest.raises(PoolError, match="not 1 whole pages of 16"):
        storage.batch_set_v1(KEYS[:1], torch.arange(8, 8 + PAGE_TOKENS))
    with pytest.raises(PoolError, match="17 indices"):
        storage.batch_get_v1(KEYS[:1], torch.arange(PAGE_TOKENS + 1))
    with pytest.raises(PoolError, match=f"2 bytes is no page of {PAGE_BYTES}"):
        storage.set(KEYS[0], torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "extra, why",
    [
        ({}, "kvfabric: missing"),
        ({"kvfabric": {"weights": "w"}}, "kvfabric.host.bytes: missing"),
        ({"kvfabric": {"host": {"bytes": 1}, "hots": {}}}, "kvfabric.hots: unknown key"),
        ({"kvfabric": {"host": {"bytes": 1}, "disk": "/d"}}, "kvfabric.disk: '/d' is no table"),
        ({"kvfabric": {"host": {"bytes": 1}, "fetch_deadline_ms": "1"}}, "'1' is a str, not a int"),
        ({"kvfabric": {"host": {"bytes": 1}, "fetch_deadline_ms": 0}}, "0 is not within 1..="),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(extra, why):
    """Each before anything is opened."""
    with pytest.raises(SettingError, match=why):
        StorageBackendFactory.create_backend("dynamic", config(extra), pool("page_first"))


def test_what_cannot_be_stored_whole_fails_the_attach(opened):
    """No name for the weights outside of an engine, a pool without pages in one piece, pools of
    hybrid models.
    """
    with pytest.raises(SettingError, match="kvfabric.weights: SGLang does not tell"):
        backend(pool("page_first"), {"weights": ""})
    odd = pool("page_first")
    odd.layout = "scattered"
    with pytest.raises(PoolError, match="'scattered' has no pages in one piece"):
        backend(odd, {})
    storage = opened(pool("page_first"), {})
    storage.register_mem_host_pool_v2(pool("page_first"), PoolName.KV)
    with pytest.raises(PoolError, match="mamba"):
        storage.register_mem_host_pool_v2(pool("page_first"), PoolName.MAMBA)


def test_a_closed_backend_misses(opened):
    """SGLang may still ask while it detaches."""
    storage = opened(pool("page_first", seed=10), {})
    assert storage.batch_set_v1(KEYS, indices(0, 1, 2, 3)) == [True] * 4
    storage._node.shutdown(3.0)
    assert storage.batch_exists(KEYS) == 0
    assert storage.batch_get_v1(KEYS, indices(0, 1, 2, 3)) == [False] * 4
    assert storage.batch_set_v1(KEYS, indices(0, 1, 2, 3)) == [False] * 4
