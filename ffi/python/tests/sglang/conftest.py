"""Tests of the storage backend on SGLang's own classes. ``make test-engines`` runs them.

An SGLang engine needs a GPU. But its storage interface, the factory that loads a backend, and its
host memory pool do not: they are the real ones, of the pinned wheel, on memory that is not pinned.
Only triton, which modules on the way import, is stood in for.
"""

import importlib.util
import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def _folder() -> pathlib.Path:
    named = os.environ.get("KVFABRIC_ENGINES")
    if named:
        return pathlib.Path(named) / "sglang"
    cache = os.environ.get("CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kvfabric")
    return pathlib.Path(cache) / "engines" / "sglang"


collect_ignore_glob = []
if importlib.util.find_spec("torch") is None or not _folder().is_dir():
    # Never silently: `make test-engines` demands them, and anybody else is told on the last lines.
    if os.environ.get("KVFABRIC_ENGINES_REQUIRED"):
        raise pytest.UsageError(
            f"the tests with SGLang were demanded, but it is not in {_folder()}"
        )
    collect_ignore_glob.append("test_*.py")
else:
    # torch looks for triton when these are imported, and must not find what stands in for it.
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.utils.flop_counter  # noqa: F401

    # The index's program is started as the tests with engines start it.
    sys.path[:0] = [str(HERE), str(HERE.parent / "engines"), str(_folder())]
    import absent

    absent.stand_in_for("triton")


@pytest.fixture
def index(tmp_path):
    """The table of a fresh index whose blocks are pages."""
    from bed import indexer
    from rig import PAGE_TOKENS

    with indexer.running(tmp_path, block_tokens=PAGE_TOKENS) as address:
        yield indexer.table(address)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore_glob:
        terminalreporter.write_line(
            "SKIPPED tests/sglang: SGLang is not here; `make test-engines` runs them", yellow=True
        )
