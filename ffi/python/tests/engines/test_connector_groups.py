"""The connector on an engine with several cache groups: a model with layers of full attention and
layers of windows, of which vLLM makes three groups.

A window is two blocks. Answers are compared with those of an engine without a connector.
"""

import contextlib
import json
import pathlib
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import pytest
from bed import single
from bed.model import HYBRID, model, prompt
from bed.server import BLOCK_TOKENS, Counted, Engine

SCRIPT = pathlib.Path(__file__).with_name("connector_steps.py")
# A block of any group has the bytes of two layers.
BLOCK_BYTES = HYBRID.kv_bytes(BLOCK_TOKENS) * 2 // HYBRID.layers
GROUPS = 3
WINDOW_BLOCKS = HYBRID.window // BLOCK_TOKENS
# (seed, tokens), and how many blocks may be claimed: never the last token.
PROMPTS = [[201, 150], [202, 128], [203, 400], [204, 45]]
CLAIMABLE = [(tokens - 1) // BLOCK_TOKENS for _, tokens in PROMPTS]
STORED = GROUPS * sum(tokens // BLOCK_TOKENS for _, tokens in PROMPTS)
FORGOTTEN, HANDED = [205, 300], [206, 300]
WIDE = [[seed, 400] for seed in (211, 212, 213, 214)]
LONG_TOKENS = 60
# Steps of the engine before its requests are aborted.
ABORTED_AFTER = [1, 2, 3, 5, 9, 20]


def needed(blocks: int) -> int:
    """Blocks of all groups that a prefix of this many blocks takes."""
    return blocks + (GROUPS - 1) * min(blocks, WINDOW_BLOCKS)


def settings(**more: Any) -> Dict[str, Any]:
    """The connector's settings for these tests."""
    return {
        "host": {"bytes": 512 * BLOCK_BYTES},
        "min_fetch_tokens": BLOCK_TOKENS,
        # A busy machine must not turn hits into misses.
        "lookup_deadline_ms": 20_000,
        "fetch_deadline_ms": 60_000,
        **more,
    }


@pytest.fixture(scope="module")
def hybrid(models: pathlib.Path) -> pathlib.Path:
    return model(models, HYBRID)


@pytest.fixture(scope="module")
def run(hybrid, logs) -> Callable[..., List[Dict[str, Any]]]:
    """Runs steps in an engine's process; what each said."""

    def run(steps: Sequence[Sequence[Any]], **job: Any) -> List[Dict[str, Any]]:
        job = {"model": str(hybrid), **job, "steps": steps}
        said = single.run(SCRIPT, logs, json.dumps(job))
        assert [one["step"] for one in said] == [step[0] for step in steps]
        return list(said)

    return run


def completions(prompts: Sequence[Sequence[int]] = PROMPTS) -> List[List[Any]]:
    return [["complete", *one] for one in prompts]


@pytest.fixture(scope="module")
def plain(run) -> Dict[str, List[int]]:
    """The answers of an engine without a connector, by prompt."""
    prompts = [*PROMPTS, FORGOTTEN, HANDED]
    said = run([*completions(prompts), ["together", WIDE, LONG_TOKENS]])
    answers = {json.dumps(one): found["tokens"] for one, found in zip(prompts, said)}
    wide = zip(WIDE, said[-1]["answers"])
    return {**answers, **{json.dumps(one): found["tokens"] for one, found in wide}}


def same_as(plain: Dict[str, List[int]], said: Any, prompts: Any = PROMPTS) -> bool:
    return [one["tokens"] for one in said] == [plain[json.dumps(one)] for one in prompts]


def test_every_groups_blocks_come_back_and_a_missing_one_shortens_the_hit(run, plain):
    """Offload, a reset of the engine's own cache, and hits; then one block of one group is taken
    away, and in the end what all windows of the prompt need. The engine's pool is shared memory.
    """
    count, blocks = len(PROMPTS), FORGOTTEN[1] // BLOCK_TOKENS
    said = run(
        [
            *completions(),
            ["counters"],
            ["reset"],
            *completions(),
            ["counters"],
            ["pool"],
            ["complete", *FORGOTTEN],
            ["forget", *FORGOTTEN, 1, blocks - 2],
            ["reset"],
            ["complete", *FORGOTTEN],
            ["forget", *FORGOTTEN, 0, 1],
            ["reset"],
            ["complete", *FORGOTTEN],
            *[["forget", *FORGOTTEN, 0, at] for at in range(blocks)],
            ["reset"],
            ["complete", *FORGOTTEN],
        ],
        connector=settings(shared_pool=True),
    )
    assert same_as(plain, said[:count])
    assert said[count]["stored_blocks"] == STORED
    again = said[count + 2 : 2 * count + 2]
    assert same_as(plain, again)
    assert [one["cached"] for one in again] == [most * BLOCK_TOKENS for most in CLAIMABLE]
    counted = said[2 * count + 2]
    assert counted["fetched_blocks_dram"] == sum(needed(most) for most in CLAIMABLE)
    assert "fetches_failed" not in counted
    pool = said[2 * count + 3]
    assert pool["permissions"] == "rw-s" and pool["file"].startswith("/memfd:kvfabric"), pool
    rest = said[2 * count + 4 :]
    answers = [one for one in rest if one["step"] == "complete"]
    assert same_as(plain, answers, [FORGOTTEN] * len(answers))
    assert [one["removed"] for one in rest if one["step"] == "forget"][:2] == [1, 1]
    # What was computed again was stored again; what no window reaches is not missed.
    cached = [one["cached"] // BLOCK_TOKENS for one in answers]
    assert cached == [0, blocks - 2, blocks, 0]


def test_chunks_aborts_and_windows_given_up_never_mix_blocks(run, plain):
    """A pool too small for four long prompts, computed in chunks: the engine gives up blocks of
    windows at once and uses them again while stores go on; all that was stored is right afterwards,
    and aborted requests leave nothing behind.
    """
    engine = {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 44}
    said = run(
        [
            ["together", WIDE, LONG_TOKENS],
            ["counters"],
            ["reset"],
            *completions(WIDE[:1]),
            ["reset"],
            ["together", WIDE, LONG_TOKENS],
            ["counters"],
            ["reset"],
            *[["abort", WIDE, steps] for steps in ABORTED_AFTER],
            ["reset"],
            *completions(WIDE[:1]),
            ["tiers"],
        ],
        connector=settings(offload="all"),
        engine=engine,
    )
    first, again = said[0]["answers"], said[5]["answers"]
    assert same_as(plain, first, WIDE)
    assert same_as(plain, again, WIDE)
    assert said[1]["stored_blocks"] > 0
    assert said[3]["tokens"] == plain[json.dumps(WIDE[0])][:8]
    assert said[6]["fetched_blocks_dram"] > 0
    assert "fetches_failed" not in said[6]
    # Nothing is left of what was aborted while blocks were looked up, fetched and stored.
    nothing = {"step": "abort", "used": 0, "tracked": 0, "held": 0}
    assert said[8 : 8 + len(ABORTED_AFTER)] == [nothing] * len(ABORTED_AFTER)
    assert said[-2]["tokens"] == plain[json.dumps(WIDE[0])][:8]
    tiers = said[-1]
    assert tiers["pins"] == tiers["leases"] == 0


def transfer(role: str) -> Dict[str, Any]:
    return {
        "kv_connector": "KvFabricConnector",
        "kv_connector_module_path": "kvfabric.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings(),
    }


@pytest.fixture(scope="module")
def pair(hybrid, plain, logs) -> Iterator[Tuple[Engine, Engine]]:
    """A prefill engine and a decode engine."""
    with contextlib.ExitStack() as stack:
        started = []
        for name, role in (("hybrid-prefill", "kv_producer"), ("hybrid-decode", "kv_consumer")):
            started.append(Engine(hybrid, logs, name, kv_transfer=transfer(role)))
            stack.callback(started[-1].stop)
        prefill, decode = [engine.ready() for engine in started]
        yield prefill, decode


def test_a_hand_over_brings_every_groups_blocks(pair, plain):
    """Prefill at one engine, its reply's parameters to the other."""
    prefill, decode = pair
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    params = prefill.complete(prompt(*HANDED), 1, kv_transfer_params=asked).kv_transfer_params
    assert params is not None
    with Counted(decode) as counted:
        answer = decode.complete(prompt(*HANDED), kv_transfer_params=params)
    blocks = HANDED[1] // BLOCK_TOKENS
    assert answer.tokens == plain[json.dumps(HANDED)]
    assert counted.external_hits == blocks * BLOCK_TOKENS
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == needed(blocks)
    assert counted.grew("vllm:kvfabric_fetches_failed") == 0


def test_a_hand_over_that_is_cut_off_is_computed_from_the_beginning(pair, plain):
    """The prefill engine is gone; the engine takes no failed blocks of several groups, so that the
    request starts over.
    """
    prefill, decode = pair
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    tokens = prompt(*FORGOTTEN)
    params = prefill.complete(tokens, 1, kv_transfer_params=asked).kv_transfer_params
    prefill.kill()
    with Counted(decode) as counted:
        answer = decode.complete(tokens, kv_transfer_params=params)
    assert answer.tokens == plain[json.dumps(FORGOTTEN)]
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == 0
