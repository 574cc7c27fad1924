"""What the tests of the NIXL interface share: memory, patience, and a second process."""

import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
# Where nothing is installed, the sources of the wheel are used.
SOURCES = HERE.parents[2] / "nixl" / "src"
SECONDS = 60.0


class Memory:
    """Numbered bytes that are registered with an agent."""

    def __init__(self, agent, length, start=0):
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


def prepared(agent, memory, name="NIXL_INIT_AGENT", size=64, count=64):
    """The first blocks of a memory, prepared."""
    blocks = np.array([memory.block(number, size) for number in range(count)], np.uint64)
    return agent.prep_xfer_dlist(name, agent.get_xfer_descs(blocks, "DRAM"))


class OtherProcess:
    """A process that runs nixl_peer.py: an agent of name "other" with numbered bytes."""

    def __init__(self, **env):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "nixl_peer.py")],
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

    def stop(self):
        """Lets it do nothing any more, until `go`: returns once all of its threads stand still."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go(self):
        """Lets it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        """Ends it at once."""
        self.process.kill()
        self.process.wait(SECONDS)

    def end(self):
        """Ends it, also if it was stopped."""
        self.go()
        self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        finally:
            self.kill()
            self.process.stdout.close()
