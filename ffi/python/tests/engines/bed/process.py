"""Processes that a test starts: shown when they fail, and gone with their children when the test
ends.
"""

import collections
import contextlib
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import time
from typing import List, Set, Union

import psutil

from . import folder, warm

LOG_LINES_SHOWN = 60
STOP_SECONDS = 40.0
FREEZE_SECONDS = 60.0
# States of a thread that does nothing any more: stopped, or dead.
STILL = frozenset("TtZX")
# Not of those that the system gives to whoever wants any: it could give them away before they are
# listened on.
PORTS = range(20_000, 32_000)
_ports = itertools.chain.from_iterable(
    itertools.repeat([*PORTS[os.getpid() * 64 % len(PORTS) :], *PORTS])
)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that was not asked for before."""
    for port in itertools.islice(_ports, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Child:
    """A process in a group of its own, whose output goes to a file.

    `command` are the arguments of the engines' Python. With `cold` it is started by itself, also
    where others are forked (:func:`bed.warm.forking`).
    """

    process: Union[subprocess.Popen, warm.Forked]

    def __init__(self, command: List[str], env: dict, log: pathlib.Path, cold: bool = False):
        self.log = log
        forks = None if cold else warm.interpreter()
        if forks is not None:
            self.process = forks.fork(command, env, log)
            return
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [folder.python(), *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        """The end of what it wrote."""
        with open(self.log, encoding="utf-8", errors="replace") as written:
            return "".join(collections.deque(written, lines))

    def explain(self, what: str) -> str:
        """What happened, and the end of the log, for a failure's message."""
        return f"{what}; {self.log} ends with:\n{self.tail()}"

    def family(self) -> List[psutil.Process]:
        """The process and all its descendants that are alive."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def spread(self) -> None:
        """Lets all threads of it and its children run on all cores again, whatever they chose."""
        cores = os.sched_getaffinity(0)
        for member in self.family():
            for thread in pathlib.Path(f"/proc/{member.pid}/task").glob("*"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), cores)

    def freeze(self) -> List[psutil.Process]:
        """Stops it and its children, and returns them once all of their threads stand still."""
        family = self.family()
        for member in family:
            freeze(member.pid, self.explain("it does not stand still"))
        return family

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Asks it to end, waits, then ends what is left of it and its children; returns the exit
        status.
        """
        family = self.family()
        shared = _shared_memory(family)
        if self.process.poll() is None:
            os.kill(self.pid, how)
        try:
            status = self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(timeout=STOP_SECONDS)
        _, alive = psutil.wait_procs(family, timeout=5.0)
        _kill(alive)
        _remove(shared)
        return status

    def kill(self) -> None:
        """Ends it and its children at once, without a chance to tidy up."""
        family = self.family()
        shared = _shared_memory(family)
        _kill(family)
        self.process.wait(timeout=STOP_SECONDS)
        _remove(shared)


def _kill(family: List[psutil.Process]) -> None:
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=STOP_SECONDS)


def _shared_memory(family: List[psutil.Process]) -> Set[pathlib.Path]:
    """Shared memory of these processes that has a name, which stays when they are killed."""
    found = set()
    for member in family:
        try:
            mapped = pathlib.Path(f"/proc/{member.pid}/maps").read_text(encoding="utf-8")
        except OSError:
            continue
        for line in mapped.splitlines():
            path = line.partition("/dev/shm/")[2]
            if path and not path.endswith(" (deleted)"):
                found.add(pathlib.Path("/dev/shm") / path)
    return found


def _remove(files: Set[pathlib.Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def freeze(pid: int, otherwise: str = "it does not stand still") -> None:
    """Stops a process, and returns once all of its threads stand still: a signal is only on its way
    when it has been sent.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = Deadline(FREEZE_SECONDS)
    while not STILL.issuperset(thread_states(pid)):
        assert not deadline.passed(), otherwise
        time.sleep(0.01)


def thread_states(pid: int) -> List[str]:
    """The state of each thread of a process, as `proc_pid_stat(5)` names them; none once it is gone."""
    states = []
    for stat in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return states


class Deadline:
    """A point in time by which something must have happened."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, never negative."""
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        return self.left() == 0.0
