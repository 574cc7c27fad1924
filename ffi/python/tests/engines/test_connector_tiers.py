"""One engine with the connector: what it offloads comes back from every tier, and nothing else
does.

Each test is one or two runs of an engine in a process of its own; all answers are compared with
those of an engine without a connector. A block of the small model has 16 KiB.
"""

import json
import pathlib
import shutil
from typing import Any, Dict, List, Optional, Sequence

import pytest
from bed import indexer as indexes
from bed import single
from bed.model import Shape, adapter, model
from bed.server import BLOCK_TOKENS

SCRIPT = pathlib.Path(__file__).with_name("connector_steps.py")
BLOCK_BYTES = Shape().kv_bytes(BLOCK_TOKENS)
# (seed, tokens): together 40 blocks.
PROMPTS = [[11, 150], [12, 128], [13, 400], [14, 320], [15, 300], [16, 45]]
BLOCKS = sum(tokens // BLOCK_TOKENS for _, tokens in PROMPTS)
# Less than that, so that blocks must move on to the disk.
HOST_BLOCKS = 16
SEGMENT_BLOCKS = 8


def run(logs: pathlib.Path, steps: Sequence[Sequence[Any]], **job: Any) -> List[Dict[str, Any]]:
    """What each step said."""
    said = single.run(SCRIPT, logs, json.dumps({**job, "steps": steps}))
    assert [one["step"] for one in said] == [step[0] for step in steps]
    return list(said)


def settings(
    disk: Optional[pathlib.Path] = None, host_blocks: int = HOST_BLOCKS, **more: Any
) -> Dict[str, Any]:
    """The connector's settings for these tests."""
    settings: Dict[str, Any] = {
        "host": {"bytes": host_blocks * BLOCK_BYTES},
        "min_fetch_tokens": BLOCK_TOKENS,
        # A busy machine must not turn hits into misses.
        "lookup_deadline_ms": 20_000,
        "fetch_deadline_ms": 60_000,
        **more,
    }
    if disk is not None:
        segment = (SEGMENT_BLOCKS + 1) * BLOCK_BYTES
        settings["disk"] = {"path": str(disk), "bytes": 32 * segment, "segment_bytes": segment}
    return settings


def whole_blocks(tokens: int) -> int:
    """The tokens of a prompt that fill blocks."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def completions(prompts: Sequence[Sequence[Any]] = PROMPTS) -> List[List[Any]]:
    return [["complete", *one] for one in prompts]


LONG, LONG_TOKENS = [[seed, 100] for seed in range(51, 55)], 120
WIDE = [[61, 400], [62, 400]]


@pytest.fixture(scope="module")
def plain(tiny_model, logs) -> Dict[str, List[int]]:
    """The answers of an engine without a connector, by prompt."""
    prompts = [*PROMPTS, *WIDE]
    said = run(
        logs, [*completions(prompts), ["together", LONG, LONG_TOKENS]], model=str(tiny_model)
    )
    answers = {json.dumps(one): found["tokens"] for one, found in zip(prompts, said)}
    for one, found in zip(LONG, said[-1]["answers"]):
        answers[json.dumps(one)] = found["tokens"]
    return answers


def same_as(
    plain: Dict[str, List[int]],
    said: Sequence[Dict[str, Any]],
    prompts: Sequence[Sequence[Any]] = PROMPTS,
) -> bool:
    return [one["tokens"] for one in said] == [plain[json.dumps(one)] for one in prompts]


@pytest.fixture(scope="module")
def filled(tiny_model, plain, logs, tmp_path_factory) -> pathlib.Path:
    """A disk tier that an engine left behind, after it was seen to hit memory and disk."""
    disk = tmp_path_factory.mktemp("tiers") / "disk"
    first = completions()
    said = run(
        logs,
        [*first, ["flush"], ["counters"], ["reset"], *first, ["counters"], ["flush"]],
        model=str(tiny_model),
        connector=settings(disk),
    )
    assert same_as(plain, said[: len(first)])
    stored = said[len(first) + 1]
    assert stored["stored_blocks"] == BLOCKS
    assert stored["stored_bytes"] == BLOCKS * BLOCK_BYTES
    assert "fetches" not in stored
    again = said[len(first) + 3 : 2 * len(first) + 3]
    assert same_as(plain, again)
    assert [one["cached"] for one in again] == [whole_blocks(tokens) for _, tokens in PROMPTS]
    fetched = said[2 * len(first) + 3]
    assert fetched["fetched_bytes"] == BLOCKS * BLOCK_BYTES
    assert fetched.get("fetched_blocks_dram", 0) + fetched["fetched_blocks_nvme"] == BLOCKS
    assert fetched["fetched_blocks_nvme"] >= BLOCKS - HOST_BLOCKS
    assert "fetches_failed" not in fetched
    return disk


def test_blocks_come_back_from_memory_and_a_clear_forgets_them(tiny_model, plain, logs):
    """One engine: a reset of its own cache leaves the tiers, a reset of both leaves nothing."""
    said = run(
        logs,
        [
            *completions(),
            ["reset"],
            *completions(),
            ["counters"],
            ["clear"],
            *completions(),
            ["counters"],
        ],
        model=str(tiny_model),
        connector=settings(host_blocks=64),
    )
    count = len(PROMPTS)
    for start in (0, count + 1, 2 * count + 3):
        assert same_as(plain, said[start : start + count])
    again, cleared = said[count + 1 : 2 * count + 1], said[2 * count + 3 : 3 * count + 3]
    assert [one["cached"] for one in again] == [whole_blocks(tokens) for _, tokens in PROMPTS]
    assert said[2 * count + 1]["fetched_blocks_dram"] == BLOCKS
    assert [one["cached"] for one in cleared] == [0] * count
    assert said[-1]["stored_blocks"] == BLOCKS
    assert "fetches" not in said[-1]


def successor(model: pathlib.Path, disk: pathlib.Path, logs: pathlib.Path) -> List[Dict[str, Any]]:
    """All prompts, on another process with an empty memory tier; last come the counters."""
    steps = [*completions(), ["counters"]]
    return run(logs, steps, model=str(model), connector=settings(disk))


@pytest.fixture(scope="module")
def restarted(tiny_model, filled, logs, tmp_path_factory) -> List[Dict[str, Any]]:
    """What an engine said over an unharmed copy of the disk tier."""
    disk = tmp_path_factory.mktemp("unharmed") / "disk"
    return successor(tiny_model, pathlib.Path(shutil.copytree(filled, disk)), logs)


def test_a_restarted_engine_hits_what_its_predecessor_left_on_disk(plain, restarted):
    """All of it: what was only in memory was written down when the first engine ended."""
    said, counted = restarted[:-1], restarted[-1]
    assert same_as(plain, said)
    assert counted["fetched_blocks_nvme"] == BLOCKS
    assert [one["cached"] for one in said] == [whole_blocks(tokens) for _, tokens in PROMPTS]
    assert "fetches_failed" not in counted


def segments(disk: pathlib.Path) -> List[pathlib.Path]:
    found = sorted(file for file in disk.iterdir() if file.stat().st_size > SEGMENT_BLOCKS * 1024)
    assert found, f"no segments among {list(disk.iterdir())}"
    return found


def test_a_flipped_byte_on_disk_is_a_miss_and_never_wrong_text(
    tiny_model, plain, filled, restarted, logs, tmp_path
):
    """One byte in the middle of the first block of every segment; the rest of each still serves."""
    disk = pathlib.Path(shutil.copytree(filled, tmp_path / "disk"))
    for segment in segments(disk):
        with open(segment, "r+b") as file:
            file.seek(BLOCK_BYTES)
            (byte,) = file.read(1)
            file.seek(BLOCK_BYTES)
            file.write(bytes([byte ^ 1]))
    said = successor(tiny_model, disk, logs)
    assert same_as(plain, said[:-1])
    assert said[-1]["fetched_blocks_nvme"] < restarted[-1]["fetched_blocks_nvme"]
    assert said[-1]["fetched_blocks_nvme"] > 0
    assert said[-1]["fetched_blocks_miss"] > 0
    assert said[-1]["fetches_failed"] > 0


def test_a_truncated_segment_is_a_miss_and_never_wrong_text(
    tiny_model, plain, filled, restarted, logs, tmp_path
):
    """Each segment loses its second half."""
    disk = pathlib.Path(shutil.copytree(filled, tmp_path / "disk"))
    for segment in segments(disk):
        with open(segment, "r+b") as file:
            file.truncate(segment.stat().st_size // 2)
    said = successor(tiny_model, disk, logs)
    assert same_as(plain, said[:-1])
    assert said[-1].get("fetched_blocks_nvme", 0) < restarted[-1]["fetched_blocks_nvme"]


@pytest.mark.parametrize("other", ["weights", "dtype"])
def test_an_engine_with_other_weights_or_elements_hits_nothing(
    tiny_model, models, filled, logs, tmp_path, other
):
    """The same folder and prompts; block sizes are equal where they can be."""
    disk = shutil.copytree(filled, tmp_path / "disk")
    shape = Shape(seed=1) if other == "weights" else Shape()
    more: Dict[str, Any] = {} if other == "weights" else {"engine": {"dtype": "float16"}}
    said = run(
        logs,
        # What is still on its way to the tiers is not counted yet.
        [*completions(), ["flush"], ["counters"]],
        model=str(model(models, shape)),
        connector=settings(disk),
        **more,
    )
    assert [one["cached"] for one in said[: len(PROMPTS)]] == [0] * len(PROMPTS)
    assert "fetches" not in said[-1]
    assert said[-1]["stored_blocks"] == BLOCKS


def test_engines_share_an_object_store(tiny_model, plain, indexer, logs, tmp_path):
    """Memory tiers too small for the prompts, no disks, one folder for both: the index says what is
    in it, and the second engine hits what the first one put there.
    """
    (tmp_path / "objects").mkdir()
    shared = {
        "object": {"url": f"file://{tmp_path / 'objects'}"},
        "index": indexes.table(indexer),
    }
    steps = [*completions(), ["flush"], ["counters"]]
    for name in ("one", "two"):
        said = run(logs, steps, model=str(tiny_model), connector=settings(pod=name, **shared))
        assert same_as(plain, said[: len(PROMPTS)])
    assert said[-1]["fetched_blocks_object"] > 0


def test_salts_and_adapters_never_share_blocks(tiny_model, models, logs, tmp_path):
    """The same tokens plain, under two salts, with an adapter, and with another one under its name:
    each hits its own blocks only, although the engine's hashes of the last two are the same.
    """
    folder = tmp_path / "adapter"
    one, other = (adapter(models, seed=seed) for seed in (1, 2))
    job: Dict[str, Any] = {"model": str(tiny_model), "adapters": [str(folder), str(folder)]}
    kinds = {"plain": [], "salt a": ["a"], "salt b": ["b"], "one": [None, 0], "other": [None, 1]}

    def steps_of(kind: str) -> List[List[Any]]:
        prompts = [[seed, 150, *kinds[kind]] for seed in (32, 33)]
        return [["together", prompts, 16], ["reset"]]

    def steps(again: bool) -> List[List[Any]]:
        once = 2 if again else 1
        made = [step for kind in list(kinds)[:-1] for step in steps_of(kind) * once]
        return [*made, ["replace", 0, str(other)], *steps_of("other") * once]

    def answers(said: Sequence[Dict[str, Any]]) -> List[List[Dict[str, Any]]]:
        return [found["answers"] for found in said if found["step"] == "together"]

    shutil.copytree(one, folder)
    expected = [
        [found["tokens"] for found in both] for both in answers(run(logs, steps(False), **job))
    ]
    assert expected[0] == expected[1] == expected[2]
    assert len({str(tokens) for tokens in expected}) == 3, "adapters must change the answers"
    shutil.copytree(one, folder, dirs_exist_ok=True)
    said = answers(run(logs, steps(True), connector=settings(host_blocks=64), **job))
    for number, tokens in enumerate(expected):
        before, after = said[2 * number : 2 * number + 2]
        assert before == [{"tokens": found, "cached": 0} for found in tokens]
        assert after == [{"tokens": found, "cached": 128} for found in tokens]


def test_preempted_requests_are_stored_and_restored_without_a_wrong_block(tiny_model, plain, logs):
    """A pool too small for four long answers, so that the engine preempts."""
    said = run(
        logs,
        [["together", LONG, LONG_TOKENS], ["counters"]],
        model=str(tiny_model),
        engine={"max_model_len": 256, "num_gpu_blocks_override": 10},
        connector=settings(host_blocks=128, offload="all"),
    )
    assert same_as(plain, said[0]["answers"], LONG)
    assert said[1]["preemptions"] > 0
    # Blocks of what was generated, too; and some came back after a preemption.
    assert said[1]["stored_blocks"] > len(LONG) * (100 // BLOCK_TOKENS)
    assert said[1]["fetched_blocks_dram"] > 0


def test_offloading_skips_what_would_exceed_its_bound(tiny_model, plain, logs):
    """A bound below a block: of two long prompts at once, one store goes, one is counted."""
    said = run(
        logs,
        [["together", WIDE], ["counters"]],
        model=str(tiny_model),
        connector=settings(host_blocks=64, store_inflight_max=1),
    )
    assert same_as(plain, said[0]["answers"], WIDE)
    assert said[1]["skipped_blocks"] > 0
    assert said[1]["stored_blocks"] > 0
