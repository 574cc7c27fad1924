"""Tests with real engines. ``make test-engines`` runs them, in an environment that
``scripts/engines`` made.

A model, a folder for logs, and an index are fixtures here; engines are started with
:class:`bed.server.Engine`, best once per module, because each takes half a minute. What fails shows
the end of the engine's log.
"""

import importlib.util
import os
import pathlib
from typing import Iterator

import pytest

collect_ignore_glob = []

if importlib.util.find_spec("vllm") is None:
    # Never silently: `make test-engines` demands them, and anybody else is told on the last lines.
    if os.environ.get("KVFABRIC_ENGINES_REQUIRED"):
        raise pytest.UsageError("the tests with engines were demanded, but this Python has no vLLM")
    collect_ignore_glob.append("test_*.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore_glob:
        terminalreporter.write_line(
            "SKIPPED tests/engines: this Python has no vLLM; `make test-engines` runs them",
            yellow=True,
        )


@pytest.fixture(scope="session")
def models() -> pathlib.Path:
    """The folder of the models; see :mod:`bed.model`."""
    from bed import folder

    return folder.engines() / "models"


@pytest.fixture(scope="session")
def tiny_model(models: pathlib.Path) -> pathlib.Path:
    """A folder with a model that has random weights."""
    from bed import model

    return model.model(models)


@pytest.fixture(scope="session")
def tiny_adapter(models: pathlib.Path) -> pathlib.Path:
    """A folder with a LoRA adapter for `tiny_model`."""
    from bed import model

    return model.adapter(models)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where engines and indexes of this run write what they have to say."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session", autouse=True)
def forked(logs: pathlib.Path) -> Iterator[None]:
    """Engines are forked from one interpreter, which imports vLLM for all of them."""
    from bed import warm

    with warm.forking(logs):
        yield


@pytest.fixture
def indexer(logs: pathlib.Path) -> Iterator[str]:
    """The address of a fresh, empty index with the engines' block size."""
    from bed import indexer

    with indexer.running(logs) as address:
        yield address
