"""What kv-bench has PyTorch do beside its copies to GPUs, on the processor: the blocks get where they belong, and a wrong one is told."""

import os
import pathlib
import struct
import subprocess
import sys

import numpy
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[4] / "benches/transfer"
BLOCKS, BLOCK_BYTES = 24, 4096


class Copies:
    """The program, as kv-bench runs it, but for the device."""

    def __init__(self, way, other, places):
        script = "\n\n".join((FOLDER / name).read_text() for name in ("rival.py", "torch_copies.py"))
        arguments = ["cpu", other, way, str(BLOCKS), str(BLOCK_BYTES)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for side in places:
            self.process.stdin.write(numpy.asarray(side, dtype=numpy.uint32).tobytes())

    def ask(self, command):
        self.process.stdin.write(command)
        self.process.stdin.flush()
        word, *numbers = self.process.stdout.readline().split()
        assert word == b"ok", numbers
        return [int(number) for number in numbers]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def scattered(seed):
    return numpy.random.default_rng(seed).permutation(BLOCKS)


IN_ORDER = range(BLOCKS)


@pytest.mark.parametrize("way", ["read", "write"])
@pytest.mark.parametrize("other", ["host", "within"])
@pytest.mark.parametrize(
    "places",
    [(scattered(1), scattered(2)), (IN_ORDER, scattered(3)), (scattered(4), IN_ORDER), (IN_ORDER, IN_ORDER)],
    ids=["scattered", "remote", "local", "in_order"],
)
def test_blocks_get_where_they_belong(way, other, places):
    with Copies(way, other, places) as copies:
        assert len(copies.ask(b"c")) == 2
        copies.ask(b"p")
        assert copies.ask(b"v")[0] == BLOCKS
        moved, nanoseconds = copies.ask(b"a")
        assert moved == BLOCKS * BLOCK_BYTES
        assert nanoseconds > 0
        assert copies.ask(b"v")[0] == 0
        copies.ask(b"p")
        assert copies.ask(b"b" + struct.pack("=I", 5))[0] == BLOCK_BYTES
        assert copies.ask(b"v")[0] == BLOCKS - 1
