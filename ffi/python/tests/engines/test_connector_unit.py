"""The connector's parts that need no running engine: settings, refusals, layouts, hand-offs,
counters.

Configurations and pools are vLLM's own, made by its own code for a real model.
"""

import dataclasses
import functools
import json
from typing import Any, Dict, List

import pytest
import torch
from connector_pool import (
    BLOCKS,
    HEAD,
    HEADS,
    LAYERS,
    PAGE,
    TOKENS,
    engine_config,
    pool,
    tensors,
)

from kvfabric.vllm.config import ConfigError, ConnectorConfig
from kvfabric.vllm.engine import EngineFacts, node_config
from kvfabric.vllm.handoff import AllowList, Handoff, NotAllowedError, new_pin
from kvfabric.vllm.layout import PageLayout, Span
from kvfabric.vllm.metadata import WorkerMetadata
from kvfabric.vllm.names import AdapterDigests
from kvfabric.vllm.stats import COUNTERS, ConnectorPromMetrics, ConnectorStats

HOST = {"host": {"bytes": 1 << 24}}


@pytest.fixture(scope="module")
def engine(tiny_model):
    return engine_config(tiny_model)


def bytes_at(layout: PageLayout, views: Dict[str, torch.Tensor], block: int) -> bytes:
    """A block's bytes as a node takes them, from the spans."""
    first = next(iter(views.values()))
    whole = torch.tensor([], dtype=torch.uint8).set_(first.untyped_storage())
    parts = [span.offset + block * span.stride for span in layout.spans]
    pieces = [whole[at : at + span.length] for at, span in zip(parts, layout.spans)]
    return torch.cat(pieces).numpy().tobytes()


# Settings.


@pytest.mark.parametrize(
    "settings, named",
    [
        ({**HOST, "fetch_deadline": 5}, "fetch_deadline: unknown key"),
        ({**HOST, "block_bytes": 5}, "block_bytes: follows from the engine"),
        ({**HOST, "model_identity": "00" * 32}, "model_identity: follows from the engine"),
        ({**HOST, "fetch_deadline_ms": 0}, "fetch_deadline_ms: 0 is not within"),
        ({**HOST, "fetch_deadline_ms": "5"}, "fetch_deadline_ms: '5' is a str, not a int"),
        ({**HOST, "min_fetch_tokens": True}, "min_fetch_tokens: True is a bool, not a int"),
        ({**HOST, "store_inflight_max": 0}, "store_inflight_max: 0 is not within"),
        ({**HOST, "offload": "everything"}, "offload: 'everything' is none of"),
        ({**HOST, "peer_listen": "off"}, "peer_listen: cannot be off"),
        ({**HOST, "handoff_deadline_ms": 0}, "handoff_deadline_ms: 0 is not within"),
        ({**HOST, "peers_allow": "10.0.0.1"}, "peers_allow: '10.0.0.1' is no list"),
        ({**HOST, "peers_allow": ["10.0.0.1/8"]}, "peers_allow: '10.0.0.1/8' is neither"),
        ({**HOST, "peers_allow": ["10.0.0"]}, "peers_allow: '10.0.0' is neither"),
        ({**HOST, "peers_allow": ["host:80"]}, "peers_allow: 'host:80' is neither"),
        ({**HOST, "disk": "/tmp"}, "disk: '/tmp' is no table"),
        ({"host": {}}, "host.bytes: missing"),
        ({}, "host.bytes: missing"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, named):
    """Each wrong setting alone; the message names the key."""
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        ConnectorConfig.parse(settings)


def test_settings_are_read_and_node_tables_are_kept_apart():
    """Own keys, a whole number for a time in seconds, and a node's tables."""
    parsed = ConnectorConfig.parse({**HOST, "pod": "p", "pin_ttl_s": 5, "offload": "all"})
    assert parsed.node == {**HOST, "pod": "p"}
    assert parsed.pin_ttl_s == 5.0
    assert parsed.offload_for(produces=False) == "all"


def test_a_pure_consumer_offloads_nothing_unless_told_to():
    """The default follows the role."""
    parsed = ConnectorConfig.parse(HOST)
    assert parsed.offload_for(produces=True) == "prompt"
    assert parsed.offload_for(produces=False) == "none"


# What the engine says of itself.


def facts_of(engine: Any, cache: Any = None, **settings: Any) -> EngineFacts:
    config = ConnectorConfig.parse({**HOST, **settings})
    return EngineFacts.of(config, engine, cache if cache is not None else pool(engine))


def test_facts_follow_from_the_engine(engine, monkeypatch):
    """Block size, hash, seed, names and roles of a plain engine."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    facts = facts_of(engine)
    assert facts.block_tokens == TOKENS
    assert (facts.hash_name, facts.hash_seed) == ("sha256_cbor", "7")
    assert facts.hash_format == "vllm/tagged"
    assert facts.model == "tiny"
    assert facts.pod.endswith("/engine-1")
    assert facts.tensor_size == 1
    assert facts.produces
    assert facts_of(engine, model="routers-name").model == "routers-name"
    assert facts_of(engine, pod="10.0.0.1:8000").pod == "10.0.0.1:8000"


def test_without_a_seed_the_fixed_one_of_the_engine_is_used(engine, monkeypatch):
    """Cryptographic hashes have a fixed seed in this version, so restarts find their blocks."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert facts_of(engine).hash_seed == "vllm-none-hash"


def test_a_version_that_seeds_hashes_at_random_is_refused(engine, monkeypatch):
    """As versions before the fixed seed do."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.delattr("vllm.v1.core.kv_cache_utils.DEFAULT_NONE_HASH_SEED")
    with pytest.raises(ConfigError, match="PYTHONHASHSEED: not set"):
        facts_of(engine)


def changed(target: Any, monkeypatch: Any, **fields: Any) -> None:
    for name, value in fields.items():
        monkeypatch.setattr(target, name, value)


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_hashes_that_can_collide_are_refused(engine, monkeypatch, algorithm):
    """Another's blocks could be served for a prompt that was made to collide."""
    changed(engine.cache_config, monkeypatch, prefix_caching_hash_algo=algorithm)
    with pytest.raises(ConfigError, match="prefix_caching_hash_algo: 'xxhash"):
        facts_of(engine)


def test_an_engine_that_fails_requests_instead_of_recomputing_is_refused(engine, monkeypatch):
    """The engine's default policy would turn a miss into an error."""
    changed(engine.kv_transfer_config, monkeypatch, kv_load_failure_policy="fail")
    with pytest.raises(ConfigError, match="kv_load_failure_policy: 'fail'"):
        facts_of(engine)


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "decode_context_parallel_size"])
def test_ranks_that_hold_parts_of_blocks_are_refused(engine, monkeypatch, name):
    """A rank must hold all layers of whole blocks."""
    changed(engine.parallel_config, monkeypatch, **{name: 2})
    with pytest.raises(ConfigError, match=f"{name}: 2"):
        facts_of(engine)


def test_hashes_finer_than_pages_are_refused(engine):
    """A hash must stand for a page."""
    cache = dataclasses.replace(pool(engine), hash_block_size=TOKENS // 2)
    with pytest.raises(ConfigError, match="block size: pages of 32 tokens, hashes of 16"):
        facts_of(engine, cache)


def node_of(engine: Any, rank: int = 0, facts: Any = None, **settings: Any) -> Dict[str, Any]:
    config = ConnectorConfig.parse({**HOST, **settings})
    facts = facts or EngineFacts.of(config, engine, pool(engine))
    return node_config(
        config, facts, engine, rank=rank, block_bytes=64, identity="00" * 32, layers=LAYERS
    )


def test_ranks_and_replicas_have_names_ports_and_folders_of_their_own(engine):
    """Two ranks of two replicas: nothing that a node owns is the same."""
    settings: Dict[str, Any] = {
        "pod": "p",
        "peer_listen": "127.0.0.1:7000",
        "metrics_listen": "127.0.0.1:0",
        "fabric": {"tcp_listen": "127.0.0.1:7100"},
        "disk": {"path": "/d", "bytes": 1, "segment_bytes": 1},
    }
    plain = facts_of(engine, pod="p")
    nodes: List[Dict[str, Any]] = []
    for replica in range(2):
        facts = dataclasses.replace(
            plain, tensor_size=2, replica=replica, replicas=2, pod=f"p/dp{replica}"
        )
        nodes += [node_of(engine, rank, facts, **settings) for rank in range(2)]
    for key in ("pod", "peer_listen"):
        assert len({node[key] for node in nodes}) == 4, key
    assert len({node["disk"]["path"] for node in nodes}) == 4
    assert len({node["fabric"]["tcp_listen"] for node in nodes}) == 4
    assert [node["peer_listen"] for node in nodes][3] == "127.0.0.1:7003"
    assert {node["metrics_listen"] for node in nodes} == {"127.0.0.1:0"}
    assert [node["model"] for node in nodes] == ["tiny", "tiny/rank1"] * 2
    assert [node["shard"]["tensor_rank"] for node in nodes] == [0, 1, 0, 1]
    assert {node["shard"]["tensor_size"] for node in nodes} == {2}
    assert {node["shard"]["kv_heads"] for node in nodes} == {2}


def test_only_the_first_rank_tells_the_index_of_the_engines_own_events(engine, monkeypatch):
    """The engine has one publisher for all ranks; what it binds is told as what can be reached."""
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint="tcp://*:5557",
        replay_endpoint="tcp://*:5558",
    )
    changed(engine, monkeypatch, kv_events_config=events)
    index = {"index": {"address": "http://127.0.0.1:1", "publish_host": "10.0.0.1"}}
    told = node_of(engine, **index)["engine"]
    assert told["events"] == "tcp://10.0.0.1:5557"
    assert told["events_replay"] == "tcp://10.0.0.1:5558"
    assert "events" not in node_of(engine, rank=1, **index)["engine"]
    assert "events" not in node_of(engine)["engine"]
    changed(events, monkeypatch, endpoint="tcp://*:0")
    with pytest.raises(ConfigError, match="kv_events_config: the index cannot find"):
        node_of(engine, **index)


# Where the pages are.


@pytest.mark.parametrize("name, spans", [("LBHNC", LAYERS), ("LBNHC", LAYERS), ("BLHNC", 1)])
def test_spans_hold_exactly_the_bytes_of_every_page(engine, name, spans):
    """Each page gets bytes of its own; the spans give them back in the order of the layers."""
    cache = pool(engine, name)
    views = tensors(cache)
    for layer, view in enumerate(views.values()):
        for block in range(BLOCKS):
            raw = view[block].view(torch.uint8)
            raw.copy_(torch.full(raw.shape, layer * BLOCKS + block + 1, dtype=torch.uint8))
    layout = PageLayout.of(cache, views)
    assert len(layout.spans) == spans
    assert layout.block_bytes == LAYERS * PAGE
    assert (layout.blocks, layout.layers, layout.element) == (BLOCKS, LAYERS, "bfloat16")
    for block in range(BLOCKS):
        expected = b"".join(bytes([layer * BLOCKS + block + 1]) * PAGE for layer in range(LAYERS))
        assert bytes_at(layout, views, block) == expected


def test_layouts_that_scatter_a_page_are_refused(engine):
    """Heads outside of blocks: a page is not one run of bytes."""
    cache = pool(engine, "LHBNC")
    with pytest.raises(ConfigError, match="a page of .* bytes is scattered"):
        PageLayout.of(cache, tensors(cache))


def test_layouts_are_told_apart_by_name(engine):
    """The name goes into the model's identity, so that engines of two layouts share nothing."""
    names = set()
    for name in ("LBHNC", "LBNHC", "BLHNC"):
        cache = pool(engine, name)
        names.add(PageLayout.of(cache, tensors(cache)).name)
    assert len(names) == 3


def test_tensors_that_contradict_the_configuration_are_refused(engine):
    """A pool that begins elsewhere, one of another size, two allocations, and a missing one."""
    cache = pool(engine)
    views = tensors(cache)
    first = next(iter(views))
    with pytest.raises(ConfigError, match="blocks are at"):
        PageLayout.of(cache, {**views, first: list(views.values())[1]})
    with pytest.raises(ConfigError, match="does not begin with"):
        PageLayout.of(cache, {**views, first: views[first][1:]})
    with pytest.raises(ConfigError, match="2 allocations"):
        PageLayout.of(cache, {**views, first: views[first].clone()})
    with pytest.raises(ConfigError, match="registered no tensor"):
        PageLayout.of(cache, {name: view for name, view in views.items() if name != first})


def test_memory_of_a_device_is_refused(engine):
    """Only host memory can be registered; a tensor without memory stands for a device's."""
    cache = pool(engine)
    views = {name: view.to("meta") for name, view in tensors(cache).items()}
    with pytest.raises(ConfigError, match="memory of device meta cannot be registered"):
        PageLayout.of(cache, views)


def test_a_configuration_with_other_strides_than_the_pool_is_refused(engine):
    """The same pool, described with its blocks further apart."""
    cache = pool(engine)
    views = tensors(cache)
    for tensor in cache.kv_cache_tensors:
        tensor.block_stride += 1
    with pytest.raises(ConfigError, match="blocks are at"):
        PageLayout.of(cache, views)
    assert PageLayout.of(pool(engine), views).spans[0] == Span(0, PAGE, PAGE)


# Hand-offs.

IDENTITY = "ab" * 32
HERE = AllowList(["127.0.0.0/8"])
# Three full blocks, and one token in a fourth.
HANDOFF = Handoff("pod", ("127.0.0.1:1", "127.0.0.1:2"), IDENTITY, 4, 3 * TOKENS + 1, (1 << 64) - 2)


def parsed(params: Any, ranks: int = 2, allowed: AllowList = HERE) -> Handoff:
    return Handoff.parse(params, ranks, IDENTITY, TOKENS, allowed)


def test_a_handoff_survives_the_trip_through_the_client():
    """What one engine says is what the other reads."""
    assert parsed(json.loads(json.dumps(HANDOFF.to_params()))) == HANDOFF
    assert parsed(dataclasses.replace(HANDOFF, pin=5).to_params()).pin == 5


@pytest.mark.parametrize(
    "change, named",
    [
        ({"version": 1}, "version: 1 is not 2"),
        ({"pod": ""}, "pod: ''"),
        ({"peer_addresses": "127.0.0.1:1"}, "peer_addresses: '127.0.0.1:1'"),
        ({"peer_addresses": ["127.0.0.1:1"]}, "1 ranks cannot hand off to 2"),
        ({"peer_addresses": ["127.0.0.1:1", 5]}, "is no list of addresses"),
        ({"depth": -1}, "depth: -1"),
        ({"depth": True}, "depth: True"),
        ({"depth": 1 << 40}, "depth: "),
        ({"tokens": 3 * TOKENS}, f"tokens: {3 * TOKENS} do not fill 4 blocks of {TOKENS}"),
        ({"tokens": 4 * TOKENS + 1}, "tokens: .* do not fill 4 blocks"),
        ({"tokens": None}, "tokens: None"),
        ({"pin": 5}, "pin: 5"),
        ({"pin": "5"}, "pin: '5' is not of 16 hexadecimal digits"),
        ({"pin": "-" + "0" * 15}, "pin: '-0"),
        ({"model_identity": "cd" * 32}, "model_identity: 'cdcd.*' is not 'abab"),
        ({"model_identity": None}, "model_identity: None"),
    ],
)
def test_handoffs_that_were_tampered_with_are_refused(change, named):
    """Clients and routers send anything."""
    with pytest.raises(ValueError, match=named):
        parsed({**HANDOFF.to_params(), **change})


def test_params_of_another_connector_are_no_handoff():
    """As NixlConnector's, which have no table of ours."""
    with pytest.raises(ValueError, match="kvfabric: None"):
        parsed({"remote_host": "h"}.get("kvfabric"), ranks=1)


def test_pins_are_not_guessed():
    """A number of 64 bits each time, the high ones used."""
    pins = {new_pin() for _ in range(64)}
    assert len(pins) == 64
    assert max(pins).bit_length() > 48


@pytest.mark.parametrize(
    "entries, address, allowed",
    [
        (["10.0.0.0/8"], "10.1.2.3:80", True),
        (["10.0.0.0/8"], "11.1.2.3:80", False),
        (["10.1.2.3"], "10.1.2.3:80", True),
        (["10.1.2.3"], "10.1.2.4:80", False),
        (["fc00::/7"], "[fd00::1]:80", True),
        (["fc00::/7"], "[2001:db8::1]:80", False),
        # One address in two notations.
        (["10.0.0.0/8"], "[::ffff:10.1.2.3]:80", True),
        (["prefill.example", "10.0.0.0/8"], "Prefill.Example:80", True),
        (["prefill.example"], "evil.example:80", False),
        (["prefill.example"], "prefill.example.evil.example:80", False),
        # What a URL would read in another way.
        (["10.0.0.0/8"], "10.1.2.3#@evil.example:80", False),
        (["10.0.0.0/8"], "10.1.2.3", False),
        ([], "127.0.0.1:80", False),
    ],
)
def test_addresses_are_believed_from_listed_hosts_only(entries, address, allowed):
    """Networks, addresses and names; the port does not matter."""
    if allowed:
        AllowList(entries).check(address)
    else:
        with pytest.raises(NotAllowedError, match="is not in peers_allow"):
            AllowList(entries).check(address)


@pytest.mark.parametrize(
    "address, allowed",
    [
        ("127.0.0.1:80", True),
        ("192.168.1.1:80", True),
        ("100.64.1.1:80", True),
        ("[::1]:80", True),
        ("8.8.8.8:80", False),
        ("169.254.169.254:80", False),
        ("0.0.0.0:80", False),
        ("localhost:80", False),
    ],
)
def test_only_private_networks_are_believed_unless_told_otherwise(address, allowed):
    """The default list, with a hand-off from there."""
    params = dataclasses.replace(HANDOFF, addresses=(address,)).to_params()
    default = AllowList(ConnectorConfig.parse(HOST).peers_allow)
    if allowed:
        assert parsed(params, 1, default).addresses == (address,)
    else:
        with pytest.raises(NotAllowedError):
            parsed(params, 1, default)


# Adapters.


@dataclasses.dataclass
class Adapter:
    """As much of a LoRARequest as is looked at."""

    lora_path: str


def test_an_adapter_is_told_by_its_files_not_by_its_folder(tmp_path):
    """A copy elsewhere has the same digest, another weight another one, and a replaced file is
    seen.
    """
    digests = AdapterDigests()

    def digest(folder: str) -> bytes:
        return digests.digest(Adapter(str(tmp_path / folder))).result(timeout=30)

    for folder, weights in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(weights)
    first = digest("a")
    assert len(first) == 32
    assert digest("b") == first
    assert digest("c") != first
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"another")
    assert digest("a") != first
    with pytest.raises(OSError):
        digest("missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError):
        digest("empty")
    digests.shutdown()


# Counters, and what ranks report together.


def test_counters_of_ranks_and_steps_add_up():
    """Two ranks' counters, and an interval that was taken begins anew."""
    one, two = ConnectorStats(), ConnectorStats()
    one.add("stored_blocks", 3)
    two.add("stored_blocks", 4)
    two.add_sources(["dram", "miss", "dram"])
    taken = one.take()
    assert taken is not None and one.take() is None
    assert taken.aggregate(two).reduce() == {
        "stored_blocks": 7,
        "fetched_blocks_dram": 2,
        "fetched_blocks_miss": 1,
    }
    assert ConnectorStats().is_empty()


def test_every_counter_reaches_the_metrics_page(engine):
    """A registry as the engine's: each counter is there, and grows by what is observed."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()

    types = {
        prometheus_client.Counter: functools.partial(prometheus_client.Counter, registry=registry),
        prometheus_client.Gauge: prometheus_client.Gauge,
        prometheus_client.Histogram: prometheus_client.Histogram,
    }
    metrics = ConnectorPromMetrics(engine, types, ["engine"], {0: ["0"], 1: ["1"]})
    metrics.observe({name: 2 for name in COUNTERS}, engine_idx=1)
    metrics.observe({"fetched_blocks_nvme": 5}, engine_idx=0)
    for name in COUNTERS:
        sample = f"vllm:kvfabric_{name}_total"
        assert registry.get_sample_value(sample, {"engine": "1"}) == 2, name
        assert registry.get_sample_value(sample, {"engine": "0"}) == 0, name
    fetched = "vllm:kvfabric_fetched_blocks_total"
    assert registry.get_sample_value(fetched, {"engine": "0", "source": "nvme"}) == 5


def test_what_ranks_settle_is_summed():
    """A store counts once per rank, and the scheduler waits for all of them."""
    one = WorkerMetadata(settled={"a": 1, "b": 2}, cleared=1)
    total = one.aggregate(WorkerMetadata(settled={"b": 1, "c": 1}, cleared=1))
    assert total == WorkerMetadata(settled={"a": 1, "b": 3, "c": 1}, cleared=2)
