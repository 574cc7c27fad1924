"""The connector on an engine with latent attention: a model like DeepSeek's, whose cache has one
head of a latent and a position for each token. vLLM's own prefix cache is off there on the CPU.
"""

import json
import pathlib

from bed import single
from bed.model import DEEPSEEK, model

SCRIPT = pathlib.Path(__file__).with_name("connector_steps.py")
# The CPU's kernel for latents takes no others.
BLOCK_TOKENS = 16
PROMPTS = [[301, 150], [302, 128]]


def test_latent_pages_come_back_whole(models, logs):
    """Two prompts twice: the second time their blocks are fetched, and the answers are the same."""
    steps = [["complete", *one] for one in PROMPTS]
    job = {
        "model": str(model(models, DEEPSEEK)),
        "engine": {"block_size": BLOCK_TOKENS},
        "connector": {
            "host": {"bytes": 64 * DEEPSEEK.kv_bytes(BLOCK_TOKENS)},
            "min_fetch_tokens": BLOCK_TOKENS,
            "lookup_deadline_ms": 20_000,
            "fetch_deadline_ms": 60_000,
        },
        "steps": [*steps, ["counters"], *steps, ["counters"]],
    }
    said = single.run(SCRIPT, logs, json.dumps(job))
    first, stored, again, fetched = said[:2], said[2], said[3:5], said[5]
    assert [one["cached"] for one in first] == [0, 0]
    assert first[0]["tokens"] != first[1]["tokens"]
    assert [one["tokens"] for one in again] == [one["tokens"] for one in first]
    blocks = sum(tokens // BLOCK_TOKENS for _, tokens in PROMPTS)
    assert stored["stored_blocks"] == blocks
    assert stored["stored_bytes"] == blocks * DEEPSEEK.kv_bytes(BLOCK_TOKENS)
    assert fetched["fetched_blocks_dram"] == blocks
    # All of the second prompt is there.
    assert [one["cached"] for one in again] == [144, 128]
