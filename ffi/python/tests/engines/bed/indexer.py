"""The index that a fleet of engines shares."""

import contextlib
import json
import os
import pathlib
import subprocess
from typing import Any, Dict, Iterator, Optional

from .server import BLOCK_TOKENS

# How long the index is given to answer, by an engine and by a test: a busy machine must not turn
# hits into misses.
DEADLINE_MS = 20_000


@contextlib.contextmanager
def running(
    logs: pathlib.Path,
    *,
    key_scheme: Optional[str] = None,
    block_tokens: int = BLOCK_TOKENS,
    config: str = "",
) -> Iterator[str]:
    """A fresh index; gives the address of its gRPC service. `config` is more TOML, like
    ``[[sources]]``.

    The program is the one that ``KVFABRIC_INDEXER`` names.
    """
    program = os.environ.get("KVFABRIC_INDEXER")
    assert program, "KVFABRIC_INDEXER does not name the kv-indexer program"
    number = sum(1 for _ in logs.glob("indexer*.log"))
    command = [program, "serve", "--grpc-listen", "127.0.0.1:0", "--block-size", str(block_tokens)]
    if key_scheme is not None:
        command += ["--key-scheme", key_scheme]
    if config:
        path = logs / f"indexer-{number}.toml"
        path.write_text(config, encoding="utf-8")
        command += ["--config", str(path)]
    with open(logs / f"indexer-{number}.log", "ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        assert line, f"the indexer ended; see {errors.name}"
        yield json.loads(line)["grpc"]
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def table(address: str) -> Dict[str, Any]:
    """The table of a node that uses the index."""
    return {"address": f"http://{address}", "lookup_deadline_ms": DEADLINE_MS}


def status(address: str) -> Dict[str, Any]:
    """What the index says of itself and of its pods: ``kv-indexer pods --json``."""
    program = os.environ["KVFABRIC_INDEXER"]
    command = [program, "pods", "--json", "--address", address, "--deadline-ms", str(DEADLINE_MS)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout)
