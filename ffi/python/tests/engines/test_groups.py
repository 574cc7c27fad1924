"""Cache groups without an engine: configurations, block tables and pools are made by vLLM's own
code, nodes are real.
"""

import time
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest
import torch
from bed.model import HYBRID, model
from connector_pool import BLOCKS, HEAD, HEADS, PAGE, TOKENS, engine_config, tensors
from vllm.config import set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

import kvfabric
from kvfabric.vllm.config import ConfigError
from kvfabric.vllm.groups import NULL_BLOCK, CacheGroup, Groups, groups_of
from kvfabric.vllm.hits import DEPTHS_MAX, Hit, PrefixLookup
from kvfabric.vllm.holds import Holds
from kvfabric.vllm.layout import PageLayout, Span
from kvfabric.vllm.lookup import Lookup, Peers
from kvfabric.vllm.metadata import Sources

SHAPE = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": HEAD, "dtype": torch.bfloat16}
PATIENCE = 60.0
IDENTITY = "ab" * 32


def full(**more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{**SHAPE, **more})


def sliding(window: int, **more: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(**{**SHAPE, **more}, sliding_window=window)


def chunked(chunk: int) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=chunk)


@pytest.fixture(scope="module")
def engine(models):
    return engine_config(model(models, HYBRID))


def pool(engine: Any, *layers: Any, layout: str = "LBHNC", blocks: int = BLOCKS) -> KVCacheConfig:
    """What vLLM decides for these layers."""
    register_all_kvcache_specs(engine)
    engine.cache_config.kv_cache_layout = layout
    specs = {f"model.layers.{number}.self_attn.attn": one for number, one in enumerate(layers)}
    with set_current_vllm_config(engine):
        groups = get_kv_cache_groups(engine, specs)
    widest = max(len(group.layer_names) for group in groups)
    page = max(spec.page_size_bytes for spec in specs.values())
    cache = get_kv_cache_config_from_groups(engine, groups, blocks * widest * page)
    cache.kv_cache_layout, cache.hash_block_size = layout, TOKENS
    return cache


# Which groups there are.


def test_groups_follow_from_the_layers(engine):
    """Two layers of full attention and three of windows, which vLLM parts into three groups."""
    window, whole = sliding(64), full()
    groups = groups_of(pool(engine, window, whole, window, window, whole))
    windows = (CacheGroup(0, window=64), CacheGroup(1, window=64))
    assert groups == Groups(TOKENS, (*windows, CacheGroup(2)))
    # Routers know the blocks of the group that keeps whole prefixes.
    assert groups.first == 2
    assert [group.number for group in groups.others] == [0, 1]


@pytest.mark.parametrize("spec", [full(), MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1})])
def test_one_kind_of_whole_prefixes_is_one_group(engine, spec):
    """Full attention, and latent attention with one head."""
    assert groups_of(pool(engine, spec, spec)) == Groups(TOKENS)


def test_kinds_whose_blocks_are_no_prefix_are_refused(engine):
    """The state of a recurrent layer."""
    state = MambaSpec(block_size=TOKENS, shapes=((64, 64),), dtypes=(torch.bfloat16,))
    with pytest.raises(ConfigError, match=r"cache group 0 \(mamba\): not supported"):
        groups_of(pool(engine, state, state))


def test_groups_with_blocks_of_different_sizes_are_refused(engine):
    """Twice the tokens in half the heads, so that pages are of one size."""
    cache = pool(engine, full(), sliding(64, block_size=2 * TOKENS, num_kv_heads=1))
    with pytest.raises(ConfigError, match=r"cache groups: blocks of \[32, 64\] tokens"):
        groups_of(cache)


def test_windows_of_a_drafter_are_refused(engine):
    """They reach one block further than they say."""
    cache = pool(engine, full(), sliding(64))
    cache.kv_cache_groups[1].is_eagle_group = True
    with pytest.raises(ConfigError, match="windows of speculative decoding"):
        groups_of(cache)


# Which blocks a prefix needs: as vLLM's own tables say.


class Tables:
    """vLLM's block tables for these layers."""

    def __init__(self, engine: Any, *layers: Any):
        self.cache = pool(engine, *layers, blocks=256)
        self.groups = groups_of(self.cache)
        hash_function = get_hash_fn_by_name("sha256_cbor")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(TOKENS, hash_function)
        self.manager = KVCacheManager(self.cache, 4096, TOKENS, TOKENS)

    def request(self, name: str, tokens: int) -> Request:
        made = Request(
            name, list(range(tokens)), SamplingParams(max_tokens=8), None, block_hasher=self._hasher
        )
        self.manager.get_computed_blocks(made)
        return made

    def fetched(self, name: str, blocks: int) -> Tuple[List[int], ...]:
        """The tables of a request whose first blocks are about to be fetched."""
        made = self.request(name, blocks * TOKENS + 5)
        fetched = blocks * TOKENS
        assert self.manager.allocate_slots(
            made, 0, num_external_computed_tokens=fetched, delay_cache_blocks=True
        )
        return self.manager.get_block_ids(name)


HYBRIDS = {
    "windows": [sliding(64), full(), sliding(64), sliding(64), full()],
    "a window of a block and a bit": [sliding(33), full()],
    "a window of a token": [sliding(1), full()],
    "two windows": [sliding(64), full(), sliding(150)],
    "longer than any prompt": [sliding(4000), full()],
    "chunks": [chunked(96), full()],
    "retained past the window": [sliding(64, extra_retained_tokens=40), full()],
    "windows alone": [sliding(64), sliding(64)],
}


@pytest.mark.parametrize("layers", HYBRIDS.values(), ids=HYBRIDS.keys())
def test_what_a_prefix_needs_is_what_the_engine_reserves_blocks_for(engine, layers):
    """Each depth up to twelve blocks: the others' needs, asked for before the engine reserves
    anything, and what must be fetched, read off its tables.
    """
    tables = Tables(engine, *layers)
    groups = tables.groups
    for depth in range(1, 13):
        found = tables.fetched(f"request {depth}", depth)
        first, others = groups.present(found, 0, depth)
        assert others == groups.needed(depth), depth
        skipped = groups.groups[groups.first].skipped(depth * TOKENS) // TOKENS
        assert first == list(range(skipped, depth))
        assert [found[groups.first][position] for position in first].count(NULL_BLOCK) == 0


def test_a_shorter_prefix_needs_what_slack_adds(engine):
    """A decode engine may claim a block less than was handed off."""
    groups = Tables(engine, *HYBRIDS["two windows"]).groups
    for depth in range(2, 13):
        both = set(groups.needed(depth)) | set(groups.needed(depth - 1))
        assert set(groups.needed(depth, slack=1)) == both


def test_only_whole_prefixes_may_be_claimed_to_the_last_token(engine):
    """The engine computes the last token again, whose window begins a token earlier."""
    whole = Groups(TOKENS)
    windows = Tables(engine, *HYBRIDS["windows"]).groups
    assert [whole.claimable(tokens) for tokens in (31, 32, 64, 65)] == [0, 1, 2, 2]
    assert [windows.claimable(tokens) for tokens in (31, 32, 64, 65)] == [0, 0, 1, 2]


def test_blocks_of_a_window_stay_until_their_stores_are_over(engine):
    """The engine gives up what no window reaches; held blocks are nobody else's until settled."""
    tables = Tables(engine, *HYBRIDS["a window of a token"])
    request = tables.request("a", 4 * TOKENS)
    tables.manager.allocate_slots(request, 4 * TOKENS)
    windows = tables.manager.get_block_ids("a")[0]
    assert windows.count(NULL_BLOCK) == 0
    holds = Holds()
    holds.bind(tables.manager.block_pool)
    holds.hold("a", windows, 2)
    holds.hold("a", [], 1)
    request.num_computed_tokens = 4 * TOKENS
    free = tables.manager.block_pool.get_num_free_blocks()
    tables.manager.free(request)
    pool_blocks = tables.manager.block_pool.blocks
    for settled in (1, 1):
        holds.settle("a", settled)
        assert [pool_blocks[number].ref_cnt for number in windows] == [1] * 4
    holds.settle("a", 1)
    assert [pool_blocks[number].ref_cnt for number in windows] == [0] * 4
    assert tables.manager.block_pool.get_num_free_blocks() == free + 8
    # Nothing is held twice, or for requests that nobody knows.
    holds.settle("a", 1)
    holds.settle("b", 1)


# Where the pages are.


@pytest.mark.parametrize("name", ["LBHNC", "BLHNC"])
def test_a_block_is_the_bytes_of_whichever_group_has_it(engine, name):
    """Every group fills a block of its own; the spans give back its pages, and only those."""
    window, whole = sliding(64), full()
    cache = pool(engine, window, whole, window, window, whole, layout=name)
    views = tensors(cache)
    layout = PageLayout.of(cache, views)
    assert (layout.block_bytes, layout.blocks, layout.layers) == (2 * PAGE, BLOCKS, 5)
    storage = torch.tensor([], dtype=torch.uint8).set_(next(iter(views.values())).untyped_storage())
    for number, group in enumerate(cache.kv_cache_groups):
        for place, layer in enumerate(group.layer_names):
            views[layer][number + 1].view(torch.uint8).fill_(16 * number + place + 1)
    for number, group in enumerate(cache.kv_cache_groups):
        at = [(span.offset + (number + 1) * span.stride, span.length) for span in layout.spans]
        block = torch.cat([storage[start : start + length] for start, length in at])
        pages = [bytes([16 * number + place + 1]) * PAGE for place in range(len(group.layer_names))]
        expected = b"".join(pages).ljust(2 * PAGE, b"\0")
        assert block.numpy().tobytes() == expected


def test_groups_are_part_of_a_layouts_name(engine):
    """Engines whose layers look back differently far share nothing."""
    names = set()
    for layers in ([sliding(64), full()], [sliding(96), full()], [full(), sliding(64)]):
        cache = pool(engine, *layers)
        names.add(PageLayout.of(cache, tensors(cache)).name)
    assert len(names) == 3


def test_latent_pages_are_whole(engine):
    """One head of latent and position, without a half for values."""
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    cache = pool(engine, spec, spec)
    layout = PageLayout.of(cache, tensors(cache))
    page = TOKENS * 576 * 2
    assert layout.spans == (Span(0, page, page), Span(BLOCKS * page, page, page))


# How deep a prefix can be had.

WINDOWS = Groups(TOKENS, (CacheGroup(0, window=64), CacheGroup(1, window=64), CacheGroup(2)))
DEPTH = 8


class Rank:
    """A node that holds some blocks."""

    def __init__(self, pod: str):
        self.node = kvfabric.Node(
            {
                "pod": pod,
                "model": "m",
                "model_identity": IDENTITY,
                "block_bytes": 4096,
                "block_tokens": TOKENS,
                "host": {"bytes": 256 * 4096},
                "engine": {"name": "vllm/tagged", "hash": "sha256_cbor", "seed": "0"},
            }
        )
        region = self.node.agent.register(bytearray(64 * 4096), writable=True)
        self.pages = self.node.pages([(region, 0, 4096, 4096)], 64)

    def store(self, names: bytes, blocks: int) -> None:
        report = self.node.store(self.node.prefix_of(names), self.pages, range(blocks)).wait()
        assert report.stored == blocks


@pytest.fixture
def rank() -> Iterator[Callable[[str], Rank]]:
    made: List[Rank] = []

    def make(pod: str) -> Rank:
        made.append(Rank(pod))
        return made[-1]

    yield make
    for one in made:
        one.node.shutdown()


def first_names(blocks: int) -> bytes:
    chain = kvfabric.NameChain("xxh3:1337", "m", TOKENS)
    chain.extend(range(blocks * TOKENS), [bytes([250, number]) * 16 for number in range(blocks)])
    return chain.pack(0, blocks)


def other_names(blocks: Sequence[Tuple[int, int]]) -> bytes:
    return kvfabric.pack_hashes(b"m", [bytes([1 + group, at]) * 16 for at, group in blocks])


def hit(*ranks: Rank, groups: Groups = WINDOWS) -> Tuple[Hit, PrefixLookup]:
    """Polls as the scheduler does, once a step."""
    peers = Peers(PATIENCE)
    nodes = [str(one.node.peer_address) for one in ranks]

    def ask(names: bytes, blocks: int, handoff: Any, spent: float) -> Lookup:
        return Lookup(peers, nodes, names, blocks, handoff, PATIENCE - spent, PATIENCE - spent)

    lookup = PrefixLookup(ask, groups, first_names(DEPTH), DEPTH, other_names)
    deadline = time.monotonic() + PATIENCE
    while True:
        found = lookup.poll()
        if found is not None:
            return found, lookup
        assert time.monotonic() < deadline, "the lookup does not end"


def windows(holder: Rank, missing: Sequence[Tuple[int, int]] = ()) -> None:
    """Stores what two groups of windows have of all depths, but for some blocks."""
    everything = [(at, group) for at in range(DEPTH) for group in (0, 1)]
    there = [one for one in everything if one not in missing]
    holder.store(other_names(there), len(there))


def test_a_prefix_is_as_deep_as_every_group_has_it(rank):
    """All of it; then only what two ranks have in common."""
    one, two = rank("one"), rank("two")
    for holder in (one, two):
        windows(holder)
    one.store(first_names(DEPTH), DEPTH)
    two.store(first_names(5), 5)
    found, lookup = hit(one)
    assert (found.depth, found.kept, lookup.failures) == (DEPTH, DEPTH, 0)
    assert found.needed == tuple((at, group) for at in (6, 7) for group in (0, 1))
    found, _ = hit(one, two)
    assert (found.depth, found.kept) == (5, 5)
    assert found.needed == tuple((at, group) for at in (3, 4) for group in (0, 1))


@pytest.mark.parametrize(
    "missing, depth",
    [([(7, 1)], 7), ([(6, 0)], 6), ([(3, 0)], DEPTH), ([(6, 0), (5, 1)], 5), ([(7, 0), (6, 1)], 6)],
)
def test_a_block_that_one_group_lacks_makes_the_prefix_shorter(rank, missing, depth):
    """What no window of the prefix reaches is not missed."""
    one = rank("one")
    one.store(first_names(DEPTH), DEPTH)
    windows(one, missing)
    assert hit(one)[0].depth == depth


def test_a_group_without_any_block_is_no_hit(rank):
    """Nor is what its own node holds of the others any use."""
    one = rank("one")
    one.store(first_names(DEPTH), DEPTH)
    windows(one, [(at, 1) for at in range(DEPTH)])
    found, _ = hit(one)
    assert (found.depth, found.kept) == (0, 0)


def test_lookups_behind_holes_are_bounded(rank):
    """Every other block of a group is missing, in more places than are tried."""
    groups = Groups(TOKENS, (CacheGroup(0, window=2 * TOKENS + 1), CacheGroup(1)))
    one = rank("one")
    one.store(first_names(DEPTH), DEPTH)
    holes = [(at, 0) for at in range(0, DEPTH, 2)]
    windows(one, holes)
    asked = []

    def ask(names: bytes, blocks: int, handoff: Any, spent: float) -> Lookup:
        asked.append(blocks)
        address = str(one.node.peer_address)
        return Lookup(Peers(PATIENCE), [address], names, blocks, handoff, PATIENCE, PATIENCE)

    lookup = PrefixLookup(ask, groups, first_names(DEPTH), DEPTH, other_names)
    deadline = time.monotonic() + PATIENCE
    while (found := lookup.poll()) is None:
        assert time.monotonic() < deadline, "the lookup does not end"
    assert found.depth == 0
    assert len(asked) <= DEPTHS_MAX + 1


def test_hints_are_only_of_what_was_asked_for(rank):
    """A load of the end of what was asked for knows where that is; any other asks again."""
    one = rank("one")
    one.store(first_names(DEPTH), DEPTH)
    windows(one)
    found, _ = hit(one)
    needed = list(found.needed)
    assert found.sources_of_others(needed) == (0, (Sources(),))
    start, sources = found.sources_of_others(needed[2:])
    assert (start, len(sources)) == (2, 1)
    assert found.sources_of_others([(5, 0), *needed]) == (0, (Sources(),))
    assert found.sources_of_others(needed[:2]) == (0, (Sources(),))
