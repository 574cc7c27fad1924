"""Tests of the NIXL interface: ``test_nixl_memory.py``, ``test_nixl_transfers.py`` and ``test_nixl_two_processes.py`` say what
NIXL does, and pass on the real one too; ``test_nixl_drop_in.py`` is about kvfabric's alone.

    pytest tests/nixl                                                          # kvfabric
    KVFABRIC_NIXL_REAL=1 pytest --confcutdir tests/nixl tests/nixl             # the real NIXL, where it is installed
"""

import importlib.util
import os
import sys

import pytest
from nixl_rig import SOURCES, Memory, OtherProcess

IS_REAL = os.environ.get("KVFABRIC_NIXL_REAL") == "1"

collect_ignore = []

if IS_REAL:
    collect_ignore.append("test_nixl_drop_in.py")
else:
    spec = importlib.util.find_spec("nixl")
    # This folder itself looks like a package of that name, but one of no file.
    if spec is None or spec.origin is None:
        sys.path.insert(0, str(SOURCES))


_status = 0


def pytest_sessionfinish(session, exitstatus):
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if IS_REAL:
        # The real one crashes in its libraries' destructors: see to it that the tests' own status is what counts.
        sys.stdout.flush()
        os._exit(_status)


@pytest.fixture
def new_agent():
    """Makes agents as vLLM does."""
    from nixl._api import nixl_agent, nixl_agent_config

    def make(name, **config):
        config.setdefault("capture_telemetry", True)
        return nixl_agent(name, nixl_agent_config(**config))

    return make


@pytest.fixture
def one(new_agent):
    return new_agent("one")


@pytest.fixture
def two(new_agent):
    return new_agent("two")


@pytest.fixture
def mine(one):
    """Memory of the agent that starts transfers."""
    return Memory(one, 4096)


@pytest.fixture
def theirs(one, two):
    """Memory of its peer, which it knows."""
    memory = Memory(two, 4096, start=100)
    assert one.add_remote_agent(two.get_agent_metadata()) == b"two"
    return memory


@pytest.fixture
def new_other():
    """Makes other processes."""
    made = []

    def make(**env):
        made.append(OtherProcess(**env))
        return made[-1]

    yield make
    for process in made:
        process.end()


@pytest.fixture
def other(new_other):
    return new_other()
