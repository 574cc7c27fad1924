"""The secondary tier under vLLM's own offloading, on real engines.

What an engine reports as external hits, and its output beside that of an engine that computed
everything, tell whether blocks came back, and came back right. Prompts have 150 tokens: four full
blocks of 32 are stored, and 128 tokens can hit. Nodes have memory for eight blocks, so that of four
prompts the first ones have to move on, to their disk or to the object store.
"""

import pathlib
from typing import Optional

import pytest
from bed import indexer
from bed.model import Shape, prompt
from bed.model import model as make_model
from bed.server import Counted, Engine, together

from kvfabric.vllm.config import ConfigError
from kvfabric.vllm.tier import KvFabricTier

PROMPT_TOKENS = 150
FULL_TOKENS = 128
BLOCKS = 4
# A row of the engine's host memory tier: two layers of 8,192 bytes.
ROW_BYTES = 16384
TIER = "KvFabricTier"
# What vLLM's metrics call the first tier below its own host memory.
LABEL = "1:KvFabricTier"
MODULE = "kvfabric.vllm.tier"


def transfer(connector: str = "KvFabricOffloadingConnector", **settings: object) -> dict:
    """An engine's --kv-transfer-config with this tier; the engine's own host memory tier has eight
    rows only.
    """
    tier = {
        "type": TIER,
        "module_path": MODULE,
        "host": {"bytes": 8 * ROW_BYTES},
        # A busy machine must not turn hits into misses.
        "lookup_deadline_ms": indexer.DEADLINE_MS,
        "fetch_deadline_ms": 60_000,
        **settings,
    }
    config = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "bed.cpu_tiering",
            "cpu_bytes_to_use": 8 * ROW_BYTES,
            "secondary_tiers": [tier],
        },
    }
    if connector == "KvFabricOffloadingConnector":
        config["kv_connector_module_path"] = MODULE
    return config


def compute(engine: Engine, seed: int) -> list:
    """Has a prompt computed, and waits until the tier has its blocks."""

    def written() -> float:
        return engine.metrics().sum("vllm:kv_offload_tiering_write_bytes", tier=LABEL)

    before = written()
    with Counted(engine) as counted:
        tokens = engine.complete(prompt(seed, PROMPT_TOKENS)).tokens
    assert counted.external_hits == 0
    engine.wait_until(lambda: written() >= before + BLOCKS * ROW_BYTES, f"stored prompt {seed}")
    return tokens


def hits(engine: Engine, seed: int, expected: list, **more: object) -> float:
    """How many tokens of a prompt come from the tier; its output must be the expected one."""
    with Counted(engine) as counted:
        assert engine.complete(prompt(seed, PROMPT_TOKENS), **more).tokens == expected
    assert counted.local_hits == 0
    return counted.external_hits


class Rig:
    """An index, a folder that stands for an object store, and the disk of one engine; engines that
    share them.
    """

    def __init__(self, index: str, folder: pathlib.Path, model: pathlib.Path, logs: pathlib.Path):
        self.address, self.index = index, indexer.table(index)
        self.objects = folder / "objects"
        self.objects.mkdir()
        self.store = {"url": f"file://{self.objects}"}
        self.disk = folder / "disk"
        self.model, self.logs = model, logs

    def wait_for_blocks(self, engine: Engine, count: int) -> None:
        """Waits until the index knows so many blocks; it follows at its own pace."""
        engine.wait_until(
            lambda: indexer.status(self.address)["blocks"] == count, f"{count} blocks in the index"
        )

    def with_disk(self, name: str, **more: object) -> Engine:
        disk = {"path": str(self.disk), "bytes": 1 << 23, "segment_bytes": 1 << 20}
        return self._engine(name, self.model, disk=disk, **more)

    def with_objects(self, name: str, model: Optional[pathlib.Path] = None) -> Engine:
        return self._engine(name, model or self.model, object=self.store)

    def _engine(self, name: str, model: pathlib.Path, **settings: object) -> Engine:
        config = transfer(index=self.index, **settings)
        return Engine(model, self.logs, name, kv_transfer=config)


@pytest.fixture(scope="module")
def rig(tiny_model, logs, tmp_path_factory):
    with indexer.running(logs) as index:
        yield Rig(index, tmp_path_factory.mktemp("tiers"), tiny_model, logs)


@pytest.fixture(scope="module")
def answers(rig):
    """What two engines answered to prompts that they computed, by seed: 1x by one with a disk, 2x
    by one with objects.

    Before they are ended, each gets a prompt from the other, which is alive, and which holds some
    of it in memory.
    """
    with together(rig.with_disk("disk"), rig.with_objects("objects")) as (disk, objects):
        answered = {seed: compute(disk, seed) for seed in (11, 12, 13, 14)}
        answered.update({seed: compute(objects, seed) for seed in (21, 22, 23, 24)})
        rig.wait_for_blocks(disk, len(answered) * BLOCKS)
        shared = hits(objects, 13, answered[13]), hits(disk, 23, answered[23])
        salted = hits(objects, 12, answered[12], cache_salt="tenant")
        assert disk.stop() == 0
        assert objects.stop() == 0
    answered["shared"], answered["salted"] = shared, salted
    return answered


def test_engines_get_each_others_blocks(answers):
    """All full blocks of a prompt come from the engine that computed it, which is alive: from its
    memory, its disk, or shared objects.
    """
    assert answers["shared"] == (FULL_TOKENS, FULL_TOKENS)


def test_a_tenants_blocks_are_not_another_ones(answers):
    """A prompt that is stored, asked for with a salt: nothing of it is taken, and the output is the
    same.
    """
    assert answers["salted"] == 0


def test_blocks_outlive_their_engine(rig, answers):
    """The engine with the disk again: blocks come from there, and those of the other from objects.
    Then every block on the disk is damaged.
    """
    other_weights = make_model(rig.model.parent, Shape(seed=1))
    with together(
        rig.with_disk("again", object=rig.store), rig.with_objects("other", other_weights)
    ) as (
        again,
        other,
    ):
        assert hits(again, 11, answers[11]) == FULL_TOKENS
        assert hits(again, 21, answers[21]) == FULL_TOKENS
        with Counted(again) as counted:
            damage(rig.disk)
            assert hits(again, 12, answers[12]) == 0
        assert counted.grew("vllm:kv_offload_tiering_promotion_job_failures", tier=LABEL) >= 1

        with Counted(other) as counted:
            assert other.complete(prompt(21, PROMPT_TOKENS)).tokens != answers[21]
        assert counted.external_queries > 0 and counted.external_hits == 0


def test_a_tier_that_cannot_see_its_engine_is_refused_at_start(tiny_model, logs):
    """vLLM's own connector, under which nobody knows what shapes a block's bytes."""
    engine = Engine(tiny_model, logs, "refused", kv_transfer=transfer("OffloadingConnector"))
    assert "ConfigError: kv_connector: a tier cannot see" in engine.refused()


@pytest.mark.parametrize(
    "settings, why",
    [
        ({}, "host.bytes: missing"),
        ({"host": {"bytes": 1}, "offload": "all"}, "offload: not for a secondary tier"),
        ({"host": {"bytes": 1}, "model_identity": "00"}, "model_identity: follows from the engine"),
        ({"host": {"bytes": 1}, "hots": 1}, "hots: unknown key"),
        ({"host": {"bytes": 1}, "fetch_deadline_ms": 0}, "fetch_deadline_ms: 0 is not within"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, why):
    """Before anything is opened."""
    with pytest.raises(ConfigError, match=why):
        KvFabricTier(None, memoryview(bytearray(8)).cast("B", (2, 4)), TIER, **settings)


def damage(folder: pathlib.Path) -> None:
    """Flips a bit in each 4,096 bytes of every segment: each block has four of them."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size >= ROW_BYTES:
            with open(path, "r+b") as file:
                for at in range(2048, path.stat().st_size, 4096):
                    file.seek(at)
                    (byte,) = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte ^ 1]))
