import base64
import json
import os
import pathlib
import subprocess
import sys

import pytest

import kvfabric

PEER = pathlib.Path(__file__).with_name("peer.py")


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


@pytest.fixture(params=["shm", "tcp"])
def transport(request):
    return request.param


@pytest.fixture
def other(transport):
    process = OtherProcess(transport)
    yield process
    process.end()


@pytest.fixture
def agent(transport):
    tcp = "127.0.0.1:0" if transport == "tcp" else None
    return kvfabric.Agent("tester", shm=transport == "shm", tcp=tcp)


@pytest.fixture
def indexer():
    """The address of a fresh, empty index."""
    program = os.environ.get("KVFABRIC_INDEXER")
    if not program:
        pytest.skip("KVFABRIC_INDEXER does not name the kv-indexer program")
    process = subprocess.Popen(
        [program, "serve", "--grpc-listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    )
    try:
        said = json.loads(process.stdout.readline())
        yield said["grpc"]
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()
