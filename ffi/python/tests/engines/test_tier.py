"""The secondary tier under vLLM's own offloading, on real engines.

What an engine reports as external hits, and its output beside that of an engine that computed everything, tell whether
blocks came back, and came back right. Prompts have 150 tokens: four full blocks of 32 are stored, and 128 tokens can hit.
"""

import pathlib

import pytest
from bed.model import Shape, prompt
from bed.model import model as make_model
from bed.server import Counted, Engine

PROMPT_TOKENS = 150
FULL_TOKENS = 128
BLOCKS = 4
# A row of the host memory tier: two layers of 8,192 bytes.
ROW_BYTES = 16384
TIER = "KvFabricTier"


def transfer(**settings: object) -> dict:
    """An engine's --kv-transfer-config with this tier. Its own host memory tier has eight rows only."""
    tier = {"type": TIER, "module_path": "kvfabric.vllm.tier", "host": {"bytes": 1 << 20}}
    return {
        "kv_connector": "KvFabricOffloadingConnector",
        "kv_connector_module_path": "kvfabric.vllm.tier",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "bed.cpu_tiering",
            "cpu_bytes_to_use": 8 * ROW_BYTES,
            "secondary_tiers": [{**tier, **settings}],
        },
    }


def disk(folder: pathlib.Path) -> dict:
    return {"path": str(folder), "bytes": 1 << 23, "segment_bytes": 1 << 20}


def stored(engine: Engine) -> float:
    """Bytes that the engine counted as written to the tier."""
    return engine.metrics().sum("vllm:kv_offload_tiering_write_bytes", tier=TIER)


def objects(folder: pathlib.Path) -> set:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that stands for an object store."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder on the first engine's disk."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def first(tiny_model, logs, shared, own):
    """What an engine answered that stored three prompts and was ended as an operator would; by seed."""
    settings = transfer(object={"url": f"file://{shared}"}, disk=disk(own))
    answers, written = {}, {}
    with Engine(tiny_model, logs, "first", kv_transfer=settings) as engine:
        for number, seed in enumerate((11, 12, 13), 1):
            before = objects(shared)
            with Counted(engine) as counted:
                answers[seed] = engine.complete(prompt(seed, PROMPT_TOKENS)).tokens
            assert counted.external_hits == 0
            engine.wait_until(
                lambda: stored(engine) >= number * BLOCKS * ROW_BYTES
                and len(objects(shared) - before) >= BLOCKS,
                f"stored all blocks of prompt {number}",
            )
            written[seed] = objects(shared) - before
        assert engine.stop() == 0
    return answers, written


def test_another_engine_gets_what_the_first_one_shared(tiny_model, logs, shared, first):
    """A second engine without a disk asks for a prompt that the first one computed: all full blocks come from objects."""
    answers, written = first
    settings = transfer(object={"url": f"file://{shared}"})
    with Engine(tiny_model, logs, "second", kv_transfer=settings) as engine:
        with Counted(engine) as counted:
            assert engine.complete(prompt(11, PROMPT_TOKENS)).tokens == answers[11]
        assert counted.external_hits == FULL_TOKENS
        assert counted.grew("vllm:kv_offload_tiering_read_bytes", tier=TIER) == BLOCKS * ROW_BYTES

        # One byte of each object of another prompt is not what it was.
        for path in written[12]:
            flip(path, path.stat().st_size // 2)
        with Counted(engine) as counted:
            assert engine.complete(prompt(12, PROMPT_TOKENS)).tokens == answers[12]
        assert counted.external_hits == 0

        # A tenant's salt is in the names of its blocks.
        with Counted(engine) as counted:
            salted = engine.complete(prompt(13, PROMPT_TOKENS), cache_salt="tenant")
            assert salted.tokens == answers[13]
        assert counted.external_hits == 0


def test_a_restarted_engine_hits_its_disk_but_for_damaged_blocks(tiny_model, logs, own, first):
    """The first engine again, with its disk only, where one byte of one block was flipped while it was down."""
    answers, _ = first
    with Engine(tiny_model, logs, "again", kv_transfer=transfer(disk=disk(own))) as engine:
        with Counted(engine) as counted:
            assert engine.complete(prompt(11, PROMPT_TOKENS)).tokens == answers[11]
        assert counted.external_hits == FULL_TOKENS


def flip(path: pathlib.Path, at: int) -> None:
    """Flips one bit of one byte."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
