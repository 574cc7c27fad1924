"""How long a decode engine needs for a prompt that a prefill engine has computed.

Two real vLLM engines on this machine's CPU, with a random model of 8,192 positions; one prompt of 4,096 tokens a round.
For each way of handing over: the time from the request to decode's first token, beside the time that the decode
engine needs to compute the prompt by itself. What is moved is checked by the answer: it must be that of an engine
without any connector.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional

from figures import say, tell

BED = pathlib.Path(__file__).resolve().parents[2] / "ffi" / "python" / "tests" / "engines"
sys.path.insert(0, str(BED))

from bed import folder, model  # noqa: E402
from bed.server import BLOCK_TOKENS, Engine  # noqa: E402

PROMPT_TOKENS = 4096
POSITIONS = 8192
BLOCKS = 3 * PROMPT_TOKENS // BLOCK_TOKENS
# 8 layers of 4 heads of 32: 256 KiB a block of 32 tokens. In bfloat16 one answer of five once differed from that without
# a connector, presumably where two tokens were nearly as likely; in float32 none did.
SHAPE = model.Shape(
    layers=8, hidden=128, heads=4, kv_heads=4, positions=POSITIONS, dtype="float32"
)
CASE = f"handover-{PROMPT_TOKENS}"


def kvfabric_connector(role: str) -> Dict[str, Any]:
    return {
        "kv_connector": "KvFabricConnector",
        "kv_connector_module_path": "kvfabric.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": {"bytes": 512 << 20}},
    }


def nixl_connector(role: str) -> Dict[str, Any]:
    return {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}


def start(
    logs: pathlib.Path, name: str, kv_transfer: Optional[Dict[str, Any]], number: int, path: Optional[str]
) -> Engine:
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + 10 * number),
    }
    if path:
        env["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    return Engine(
        model.model(folder.engines() / "models", SHAPE),
        logs,
        name,
        kv_transfer=kv_transfer,
        blocks=BLOCKS,
        max_model_len=POSITIONS,
        dtype=SHAPE.dtype,
        arguments=["--max-num-batched-tokens", str(POSITIONS)],
        env=env,
    )


def timed(engine: Engine, prompt: List[int], tokens: int, **more: Any):
    begin = time.perf_counter()
    answer = engine.complete(prompt, tokens, **more)
    return answer, (time.perf_counter() - begin) * 1000


def exchange(subject: str, prefill: Engine, decode: Engine, prompt: List[int]):
    """Prefill computes a prompt, decode fetches it and says one token; both times, and the token."""
    ask: Dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    ask.update(dict.fromkeys(["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"]))
    first, prefill_ms = timed(prefill, prompt, 1, kv_transfer_params=ask)
    if not first.kv_transfer_params:
        raise SystemExit(f"{subject}: the prefill engine handed nothing over")
    second, decode_ms = timed(decode, prompt, 1, kv_transfer_params=first.kv_transfer_params)
    return prefill_ms, decode_ms, second.tokens


def hand_over(subject: str, prefill: Engine, decode: Engine, prompts: List[List[int]]) -> List[List[int]]:
    """One round for each prompt; what decode answered."""
    # The first exchange between two engines also introduces them.
    exchange(subject, prefill, decode, model.prompt(2, PROMPT_TOKENS))
    fetched = decode.metrics().external_hits
    rounds = [exchange(subject, prefill, decode, prompt) for prompt in prompts]
    fetched = decode.metrics().external_hits - fetched
    prefills, decodes, answers = zip(*rounds)
    tell(subject, CASE, "decode_ms", "ms", decodes)
    tell(subject, CASE, "prefill_ms", "ms", prefills)
    tell(subject, CASE, "external_tokens", "tokens", [fetched / len(prompts)])
    return list(answers)


def alone(logs: pathlib.Path, prompts: List[List[int]]) -> List[List[int]]:
    """The same prompts on one engine without a connector: the right answers, and the time without any help."""
    with start(logs, "alone", None, 0, None) as engine:
        engine.complete(model.prompt(1, PROMPT_TOKENS), 1)
        times, answers = [], []
        for prompt in prompts:
            answer, took = timed(engine, prompt, 1)
            times.append(took)
            answers.append(answer.tokens)
    tell("recompute", CASE, "decode_ms", "ms", times)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nixl", help="a folder with the real NIXL")
    args = parser.parse_args()
    prompts = [model.prompt(100 + number, PROMPT_TOKENS) for number in range(args.rounds)]
    ways = [("kvfabric", kvfabric_connector, None), ("kvfabric-nixl", nixl_connector, None)]
    if args.nixl:
        ways.append(("nixl", nixl_connector, args.nixl))
    else:
        say("handover: THE REAL NIXL IS LEFT OUT: NO --nixl FOLDER WAS NAMED")
    with tempfile.TemporaryDirectory(prefix="kvfabric-") as scratch:
        logs = pathlib.Path(scratch)
        right = alone(logs, prompts)
        for subject, config, path in ways:
            say(f"handover: {subject}")
            prefill = start(logs, f"{subject}-prefill", config("kv_producer"), 0, path)
            decode = start(logs, f"{subject}-decode", config("kv_consumer"), 1, path)
            with prefill, decode:
                answers = hand_over(subject, prefill, decode, prompts)
            if answers != right:
                raise SystemExit(f"{subject}: answers {answers}, without a connector {right}")


main()
