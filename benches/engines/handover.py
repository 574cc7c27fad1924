"""How long a decode engine needs for a prompt that a prefill engine has computed.

Two real vLLM engines on this machine's CPU, with a random model of 8,192 positions; one prompt of 4,096 tokens a round.
For each way of handing over: the time from the request to decode's first token, beside the time that the decode
engine needs to compute the prompt by itself.

What is moved is checked by what the model says after it: the likeliest next tokens must be as likely as at an engine
without any connector, which computes as a decode engine does: the prompt's last token by itself. Together with the others
its sums are rounded in another order. That one other block among the prompt's 128 would be seen is checked as well.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

from figures import say, tell

BED = pathlib.Path(__file__).resolve().parents[2] / "ffi" / "python" / "tests" / "engines"
sys.path.insert(0, str(BED))

from bed import folder, model  # noqa: E402
from bed.server import BLOCK_TOKENS, Answer, Engine  # noqa: E402

PROMPT_TOKENS = 4096
POSITIONS = 8192
BLOCKS = 3 * PROMPT_TOKENS // BLOCK_TOKENS
CASE = f"handover-{PROMPT_TOKENS}"
# So many of the likeliest tokens are compared; answers name a few more, as two may change places.
COMPARED, ASKED = 3, 6
# By how much a logarithm of a likelihood may differ. None has been seen to; other blocks make a hundred times as much.
ROUNDING = 1e-5
DTYPES = ("float32", "bfloat16")

# Likeliest tokens with the logarithms of their likelihoods.
Likely = Dict[str, float]


def shape(dtype: str) -> model.Shape:
    """8 layers of 4 heads of 32: 256 KiB a block of 32 tokens in float32."""
    return model.Shape(layers=8, hidden=128, heads=4, kv_heads=4, positions=POSITIONS, dtype=dtype)


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


class Runs:
    """Starts engines of one model."""

    def __init__(self, logs: pathlib.Path, dtype: str):
        self.logs = logs
        self.shape = shape(dtype)

    def start(
        self,
        name: str,
        kv_transfer: Optional[Dict[str, Any]] = None,
        number: int = 0,
        path: Optional[str] = None,
    ) -> Engine:
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + 10 * number),
        }
        if path:
            env["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
        return Engine(
            model.model(folder.engines() / "models", self.shape),
            self.logs,
            name,
            kv_transfer=kv_transfer,
            blocks=BLOCKS,
            max_model_len=POSITIONS,
            dtype=self.shape.dtype,
            arguments=["--max-num-batched-tokens", str(POSITIONS)],
            env=env,
        )


def timed(engine: Engine, prompt: List[int], **more: Any) -> Tuple[Answer, float]:
    """One token after the prompt, and how many milliseconds that took."""
    begin = time.perf_counter()
    answer = engine.complete(prompt, 1, logprobs=ASKED, return_tokens_as_token_ids=True, **more)
    return answer, (time.perf_counter() - begin) * 1000


def likely(answer: Answer, at: int = 0) -> Likely:
    """What might have been the answer's token at this position."""
    return answer.body["choices"][0]["logprobs"]["top_logprobs"][at]


def difference(right: Likely, found: Likely) -> float:
    """By how much the likeliest tokens of one differ in the other."""
    first = sorted(right, key=lambda token: -right[token])[:COMPARED]
    return max(abs(right[token] - found.get(token, float("inf"))) for token in first)


def split(engine: Engine, prompt: List[int]) -> Likely:
    """What comes after the prompt, with its last token computed by itself."""
    engine.reset_prefix_cache()
    # The first token that is answered is made the prompt's last; likelihoods are those before that.
    answer = engine.complete(
        prompt[:-1],
        2,
        allowed_token_ids=prompt[-1:],
        logprobs=ASKED,
        return_tokens_as_token_ids=True,
    )
    return likely(answer, 1)


def alone(runs: Runs, prompts: List[List[int]]) -> List[Likely]:
    """The same prompts on one engine without a connector: what is right, and the time without any help."""
    with runs.start("alone") as engine:
        engine.complete(model.prompt(1, PROMPT_TOKENS), 1)
        times = [timed(engine, prompt)[1] for prompt in prompts]
        right = [split(engine, prompt) for prompt in prompts]
        middle, changed = PROMPT_TOKENS // 2, list(prompts[0])
        changed[middle : middle + BLOCK_TOKENS] = prompts[0][:BLOCK_TOKENS]
        seen = difference(right[0], split(engine, changed))
    if seen <= 100 * ROUNDING:
        raise SystemExit(f"handover: another block in the prompt makes a difference of {seen} only")
    say(f"handover: another block in the prompt makes a difference of {seen:.3g}")
    tell("recompute", CASE, "decode_ms", "ms", times)
    return right


def exchange(subject: str, prefill: Engine, decode: Engine, prompt: List[int]) -> Tuple[float, float, float, Likely]:
    """Prefill computes a prompt, decode fetches it and says one token: both times, how many tokens were fetched, and
    what the token might have been.
    """
    ask: Dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    ask.update(dict.fromkeys(["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"]))
    first, prefill_ms = timed(prefill, prompt, kv_transfer_params=ask)
    if not first.kv_transfer_params:
        raise SystemExit(f"{subject}: the prefill engine handed nothing over")
    before = decode.metrics().external_hits
    second, decode_ms = timed(decode, prompt, kv_transfer_params=first.kv_transfer_params)
    return prefill_ms, decode_ms, decode.metrics().external_hits - before, likely(second)


def hand_over(subject: str, engines: Tuple[Engine, Engine], prompts: List[List[int]], right: List[Likely]) -> None:
    """One round for each prompt."""
    # The first exchange between two engines also introduces them.
    exchange(subject, *engines, model.prompt(2, PROMPT_TOKENS))
    rounds = [exchange(subject, *engines, prompt) for prompt in prompts]
    prefills, decodes, fetched, found = zip(*rounds)
    tell(subject, CASE, "decode_ms", "ms", decodes)
    tell(subject, CASE, "prefill_ms", "ms", prefills)
    tell(subject, CASE, "external_tokens", "tokens", fetched)
    differences = [difference(*pair) for pair in zip(right, found)]
    say(f"handover: {subject}: differences {', '.join(f'{one:.3g}' for one in differences)}")
    if max(differences) > ROUNDING:
        raise SystemExit(f"{subject}: after a hand-over the model says {found}, without {right}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nixl", help="a folder with the real NIXL")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    prompts = [model.prompt(100 + number, PROMPT_TOKENS) for number in range(args.rounds)]
    ways = [("kvfabric", kvfabric_connector, None), ("kvfabric-nixl", nixl_connector, None)]
    if args.nixl:
        ways.append(("nixl", nixl_connector, args.nixl))
    else:
        say("handover: THE REAL NIXL IS LEFT OUT: NO --nixl FOLDER WAS NAMED")
    with tempfile.TemporaryDirectory(prefix="kvfabric-") as scratch:
        runs = Runs(pathlib.Path(scratch), args.dtype)
        right = alone(runs, prompts)
        for subject, config, path in ways:
            say(f"handover: {subject}")
            prefill = runs.start(f"{subject}-prefill", config("kv_producer"), 0, path)
            decode = runs.start(f"{subject}-decode", config("kv_consumer"), 1, path)
            with prefill, decode:
                # vLLM's NIXL connectors keep to the last core of a CPU, so that both engines would share it.
                for engine in (prefill, decode):
                    engine.child.spread()
                hand_over(subject, (prefill, decode), prompts, right)


main()
