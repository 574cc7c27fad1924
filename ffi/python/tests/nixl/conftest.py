"""Tests of the NIXL interface: ``test_conformance.py`` and ``test_two_processes.py`` say what NIXL does, and pass on the
real one too; ``test_drop_in.py`` is about kvfabric's alone.

    pytest tests/nixl                                                          # kvfabric
    KVFABRIC_NIXL_REAL=1 pytest --confcutdir tests/nixl tests/nixl             # the real NIXL, where it is installed
"""

import base64
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "nixl" / "src"
IS_REAL = os.environ.get("KVFABRIC_NIXL_REAL") == "1"
SECONDS = 30.0

collect_ignore = []

if importlib.util.find_spec("numpy") is None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py")]
elif IS_REAL:
    collect_ignore = ["test_drop_in.py"]
elif importlib.util.find_spec("nixl") is None:
    sys.path.insert(0, str(SOURCES))


def pytest_terminal_summary(terminalreporter):
    if len(collect_ignore) > 1:
        terminalreporter.write_line("SKIPPED tests/nixl: this Python has no numpy", yellow=True)


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


class Memory:
    """Numbered bytes that are registered with an agent."""

    def __init__(self, agent, length, start=0):
        import numpy as np

        self.array = ((np.arange(length) + start) % 251).astype(np.uint8)
        self.address = self.array.ctypes.data
        self.length = length
        self.agent = agent
        self.registered = agent.register_memory([(self.address, length, 0, "")], "DRAM")

    def block(self, number, size=64):
        """The descriptor of one of its blocks."""
        return (self.address + number * size, size, 0)


class Deadline:
    """A point in time by which something must have happened."""

    def __init__(self):
        self.end = time.monotonic() + SECONDS

    def check(self, what):
        assert time.monotonic() < self.end, f"{what} after {SECONDS} s"


def finished(agent, handle, state):
    """The last state of a transfer that was posted with this state."""
    deadline = Deadline()
    while state == "PROC":
        deadline.check("still in flight")
        state = agent.check_xfer_state(handle)
    return state


def run(agent, handle, message=b""):
    """Posts a transfer and waits until it is done."""
    assert finished(agent, handle, agent.transfer(handle, message)) == "DONE"


def awaited(agent, count):
    """The next `count` notifications of an agent, by sender."""
    taken, deadline = {}, Deadline()
    while sum(map(len, taken.values())) < count:
        deadline.check(f"only {taken}")
        for sender, messages in agent.get_new_notifs().items():
            taken.setdefault(sender, []).extend(messages)
    return taken


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


class OtherProcess:
    """A process that runs other.py: an agent of name "other" with numbered bytes."""

    def __init__(self, **env):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "other.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        )
        hello = self._answer()
        self.metadata = base64.b64decode(hello["metadata"])
        self.address, self.length = hello["address"], hello["length"]

    def ask(self, what, **more):
        """What it answers to a command."""
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        while True:
            line = self.process.stdout.readline()
            assert line, "the other process has ended"
            # The real one logs to the standard output.
            if line.startswith("{"):
                return json.loads(line)

    def kill(self):
        """Ends it at once."""
        self.process.kill()
        self.process.wait(SECONDS)

    def end(self):
        """Ends it, also if it was stopped."""
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        finally:
            self.kill()
            self.process.stdout.close()


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
