import base64
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import kvfabric

PEER = pathlib.Path(__file__).with_name("peer.py")
PUBLISHER = pathlib.Path(__file__).with_name("publisher.py")


class OtherProcess:
    """A process that runs peer.py."""

    def __init__(self, transport):
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), transport],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._answer()
        self.metadata = base64.b64decode(hello["metadata"])
        self.region = hello["region"]
        self.hidden = hello["hidden"]

    def ask(self, what, **more):
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the other process has ended"
        return json.loads(line)

    def stop(self):
        """Lets it do nothing any more, until `go`."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait(timeout=20)

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.stdout.close()


# Whether processes of one user may read each other's memory; there is no such file where they always may.
PTRACE = pathlib.Path("/proc/sys/kernel/yama/ptrace_scope")


@pytest.fixture(params=["shm", "cma", "tcp", "ucx"])
def transport(request):
    """How bytes are to go to the other process; "cma" is for memory that is not shared."""
    if request.param == "cma" and PTRACE.exists() and PTRACE.read_text().strip() != "0":
        pytest.skip(f"{PTRACE} keeps processes out of each other's memory")
    return request.param


@pytest.fixture
def other(transport):
    process = OtherProcess(transport)
    yield process
    process.end()


@pytest.fixture
def reaching(transport):
    """An agent that reaches the other process this way."""
    tcp = "127.0.0.1:0" if transport == "tcp" else None
    ucx = {} if transport == "ucx" else None
    return kvfabric.Agent("tester", shm=transport in ("shm", "cma"), tcp=tcp, ucx=ucx)


@pytest.fixture
def agent(reaching):
    return reaching


@pytest.fixture
def refused_in_a_fork():
    """Makes calls in a forked child, which also drops what it was forked with, and names those
    that raise `ForkedError`.
    """

    def refused(calls):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            names = []
            try:
                for name, call in calls.items():
                    try:
                        call()
                    except kvfabric.ForkedError:
                        names.append(name)
            finally:
                os.write(write_end, " ".join(sorted(names)).encode())
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            names = pipe.read().decode().split()
        os.waitpid(child, 0)
        return names

    return refused


@pytest.fixture
def indexer():
    """The address of a fresh, empty index."""
    with running_indexer() as address:
        yield address


@contextlib.contextmanager
def running_indexer(*arguments):
    program = os.environ.get("KVFABRIC_INDEXER")
    if not program:
        pytest.skip("KVFABRIC_INDEXER does not name the kv-indexer program")
    command = [program, "serve", "--grpc-listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = json.loads(process.stdout.readline())
        yield said["grpc"]
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


class Publisher:
    """A process that runs publisher.py, in place of the engine of a pod."""

    model = "m"
    peer_address = "127.0.0.1:9"

    def __init__(self, pod):
        self.pod = pod
        self.process = subprocess.Popen(
            [sys.executable, str(PUBLISHER), pod, self.model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoints = self._answer()
        self.published = 0

    def publish(self, events):
        self.process.stdin.write(json.dumps(events) + "\n")
        self.process.stdin.flush()
        assert self._answer() == self.published
        self.published += 1

    def source(self):
        """This publisher, as an entry of the index's configuration."""
        entry = {
            "pod": self.pod,
            "model": self.model,
            "peer_address": self.peer_address,
            **self.endpoints,
        }
        # Strings of plain text are the same in TOML and JSON.
        lines = (f"{key} = {json.dumps(value)}" for key, value in entry.items())
        return "\n".join(["[[sources]]", *lines, ""])

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the publisher has ended"
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def publisher():
    """Makes publishers by the names of their pods."""
    with contextlib.ExitStack() as stack:

        def start(pod):
            started = Publisher(pod)
            stack.callback(started.end)
            return started

        yield start


@pytest.fixture
def index_of(tmp_path):
    """Makes an index that follows publishers, and gives its address."""
    with contextlib.ExitStack() as stack:

        def start(*publishers):
            config = tmp_path / "indexer.toml"
            config.write_text("\n".join(publisher.source() for publisher in publishers))
            return stack.enter_context(running_indexer("--config", str(config)))

        yield start
