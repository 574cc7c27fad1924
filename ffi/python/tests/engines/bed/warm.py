"""An interpreter that has vLLM imported already, and forks a process for each engine.

Importing vLLM takes ten seconds of a core, in each of the three processes of a server: four fifths
of a start. Forked processes have the environment, the arguments and the output of a fresh one.
Their own processes are forked as well, as vLLM does by itself except on CPUs.

The side of the tests is here; what forks is :mod:`bed.forking`.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
from typing import Dict, Iterator, List, Optional

from . import folder

READY_SECONDS = 240.0
FORK_SECONDS = 60.0
STOP_SECONDS = 40.0


class Forked:
    """A process that the interpreter forked; to be used like a :class:`subprocess.Popen`."""

    def __init__(self, args: List[str], pid: int):
        self.args, self.pid = args, pid
        self.returncode: Optional[int] = None
        self._over = threading.Event()

    def poll(self) -> Optional[int]:
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        if not self._over.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def ended(self, status: int) -> None:
        """Says that it is over."""
        self.returncode = status
        self._over.set()


class Interpreter:
    """The interpreter; it ends with this process at the latest."""

    def __init__(self, log: pathlib.Path):
        self._log = log
        self._socket, theirs = socket.socketpair()
        with theirs, open(log, "ab") as output:
            self._process = subprocess.Popen(
                [folder.python(), "-m", "bed.forking", str(theirs.fileno())],
                env=folder.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._changed = threading.Condition()
        self._gone = False
        # Only the latest question can be waited for, because one is asked at a time.
        self._asking = threading.Lock()
        self._started: Optional[Forked] = None
        self._forked: Dict[int, Forked] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def fork(self, command: List[str], env: Dict[str, str], log: pathlib.Path) -> Forked:
        """A process that runs ``-m module …`` or ``script …``; what it says goes to a file."""
        asked = json.dumps({"command": command, "env": env, "log": str(log)})
        with self._asking, self._changed:
            self._started = None
            self._socket.sendall(asked.encode() + b"\n")
            # The first question waits for the imports.
            seconds = READY_SECONDS + FORK_SECONDS
            self._changed.wait_for(lambda: self._started is not None or self._gone, seconds)
            assert self._started is not None, f"nothing forks; see {self._log}"
            return self._started

    def stop(self) -> None:
        """Ends it; what it forked goes on."""
        self._socket.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
        self._socket.close()

    def _listen(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                with self._changed:
                    if "status" in said:
                        self._forked.pop(said["pid"]).ended(said["status"])
                    else:
                        self._started = Forked(said["command"], said["pid"])
                        self._forked[said["pid"]] = self._started
                    self._changed.notify_all()
        with self._changed:
            self._gone = True
            for one in self._forked.values():
                # Whether and how they end is not known any more.
                one.ended(-signal.SIGHUP)
            self._changed.notify_all()


_logs: Optional[pathlib.Path] = None
_interpreter: Optional[Interpreter] = None


@contextlib.contextmanager
def forking(logs: pathlib.Path) -> Iterator[None]:
    """Meanwhile processes of engines are forked; what forks is started on first use."""
    global _logs, _interpreter
    _logs = logs
    try:
        yield
    finally:
        _logs = None
        if _interpreter is not None:
            _interpreter.stop()
            _interpreter = None


def interpreter() -> Optional[Interpreter]:
    """What forks, if anything does."""
    global _interpreter
    if _interpreter is None and _logs is not None:
        _interpreter = Interpreter(_logs / "forking.log")
    return _interpreter
