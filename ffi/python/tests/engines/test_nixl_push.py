"""vLLM's own NixlPushConnector, unmodified, on the drop-in for NIXL: the prefilling engine writes into the decoding one.

A module of its own, so that its engines do not run beside those of the connector that reads.
"""

import concurrent.futures
import contextlib
import pathlib
from typing import Iterator, List, Tuple

import nixl_path
import pytest
from bed.model import prompt
from bed.process import free_port
from bed.server import Answer, Counted, Engine, together

PROMPT_TOKENS = 150
OUTPUT_TOKENS = 8
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
# The engines introduce themselves with the first request. vLLM gives that five seconds, which a busy machine may need for
# something else, and does not try again: the request then never ends.
INTRODUCTIONS, INTRODUCTION_SECONDS = 4, 30.0


@pytest.fixture(scope="module")
def pair(tiny_model: pathlib.Path, logs: pathlib.Path) -> Iterator[Tuple[Engine, Engine]]:
    """A prefilling engine and a decoding one."""

    def start(name: str, role: str) -> Engine:
        config = {
            "kv_connector": "NixlPushConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "recompute",
            # Blocks are kept for so long; a busy machine must not make a failure of it.
            "kv_connector_extra_config": {"kv_lease_duration": 120},
        }
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            **nixl_path.environment(),
        }
        return Engine(tiny_model, logs, name, kv_transfer=config, env=env)

    with together(start("pushing", "kv_producer"), start("receiving", "kv_consumer")) as engines:
        for each in engines:
            # Or their workers would share the last core; see test_nixl_connector.py.
            each.child.spread()
        introduce(*engines)
        yield engines[0], engines[1]


def push(pushing: Engine, receiving: Engine, tokens: List[int], name: str) -> Answer:
    """Computes a prompt at one engine and completes it at the other. Both requests have one name, by which the pushing
    engine finds out where its blocks go.
    """
    first = pushing.complete(tokens, 1, kv_transfer_params=PREFILL, request_id=name)
    params = first.kv_transfer_params
    assert params is not None and params["transfer_mode"] == "push", params
    return receiving.complete(tokens, OUTPUT_TOKENS, kv_transfer_params=params, request_id=name)


def introduce(pushing: Engine, receiving: Engine) -> None:
    """Has one engine push to the other until that works."""
    pool = concurrent.futures.ThreadPoolExecutor(INTRODUCTIONS)
    try:
        for number in range(INTRODUCTIONS):
            tokens = prompt(70 + number, PROMPT_TOKENS)
            answer = pool.submit(push, pushing, receiving, tokens, f"introduction-{number}")
            with contextlib.suppress(concurrent.futures.TimeoutError):
                answer.result(INTRODUCTION_SECONDS)
                return
    finally:
        # Requests that wait forever end with their engine.
        pool.shutdown(wait=False)
    raise AssertionError(receiving.child.explain("the engines did not get to know each other"))


def test_every_token_is_pushed_and_the_answer_is_the_same(pair):
    """150 tokens of 150. The pushing engine goes on by itself afterwards, for comparison."""
    pushing, receiving = pair
    tokens = prompt(61, PROMPT_TOKENS)
    with Counted(pushing) as sent, Counted(receiving) as received:
        answer = push(pushing, receiving, tokens, "pushed")
        # The engine that wrote counts it with its next step.
        alone = pushing.complete(tokens, OUTPUT_TOKENS)
    assert answer.tokens == alone.tokens
    assert received.external_hits == PROMPT_TOKENS
    assert sent.grew("vllm:nixl_num_failed_transfers") == 0
    assert sent.grew("vllm:nixl_bytes_transferred_sum") > 0
    assert received.grew("vllm:nixl_bytes_transferred_sum") == 0
