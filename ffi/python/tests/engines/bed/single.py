"""An engine in one process, for tests that need its inside: it starts in half the time."""

import json
import pathlib
import subprocess
from typing import Mapping, Optional, Sequence

from . import folder
from .process import Child

RUN_SECONDS = 300.0


def run(
    script: pathlib.Path,
    logs: pathlib.Path,
    *arguments: str,
    env: Optional[Mapping[str, str]] = None,
    seconds: float = RUN_SECONDS,
    status: int = 0,
    cold: bool = False,
) -> Sequence[dict]:
    """Runs a Python script on the engines' interpreter, with the engine in the script's own
    process.

    The script says what it found as lines that begin with ``RESULT`` and go on in JSON; they are
    returned in order. Any other exit status than `status` fails with the end of the log. The script
    needs its ``if __name__ == "__main__"``. With `cold` it imports vLLM itself, or does not at all.
    """
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
    number = sum(1 for _ in logs.glob(f"{script.stem}*.log"))
    log = logs / f"{script.stem}-{number}.log"
    child = Child([str(script), *arguments], folder.environment(**own), log, cold)
    try:
        ended = child.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError(child.explain(f"{script.name} ran for {seconds} s")) from None
    finally:
        child.stop()
    if ended != status:
        raise AssertionError(child.explain(f"{script.name} ended with status {ended}"))
    with open(log, encoding="utf-8", errors="replace") as written:
        return [
            json.loads(line[len("RESULT ") :]) for line in written if line.startswith("RESULT ")
        ]


def say(**found: object) -> None:
    """In such a script: one line that :func:`run` returns."""
    print("RESULT", json.dumps(found), flush=True)


def engine(model: str, **more: object):
    """In such a script: the engine itself, with the settings that the servers of the other tests
    have.
    """
    from vllm import LLM

    settings = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "block_size": 32,
        "enforce_eager": True,
        "num_gpu_blocks_override": 64,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256_cbor",
        "distributed_executor_backend": "uni",
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
    }
    settings.update(more)
    return LLM(model=model, **settings)


def complete(llm, prompt: Sequence[int], max_tokens: int = 8):
    """In such a script: the output token ids of one prompt, and how many tokens were cached."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    said = llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)[0]
    return list(said.outputs[0].token_ids), said.num_cached_tokens
