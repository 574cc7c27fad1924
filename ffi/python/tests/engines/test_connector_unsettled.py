"""A fetch whose time is over while its peer has not sent what it was asked for: the connector's
half in a worker, with a real pool, and a real node of another process behind TCP.

TCP never leaves memory that may still be written to: what comes late is thrown away. Fabrics that
do leave some are stood in for by an operation of that kind.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Iterator, Tuple

import pytest
from bed.process import freeze
from connector_pool import LAYERS, PAGE, engine_config
from test_connector import Gate
from test_connector_worker import Worker, names

from kvfabric.vllm.engine import node_config
from kvfabric.vllm.metadata import Load, Sources, StepMetadata
from kvfabric.vllm.worker import _Fetching

SCRIPT = pathlib.Path(__file__).with_name("holder_of_blocks.py")
PATIENCE = 30.0
BLOCKS = 3
FETCH_DEADLINE_MS = 1_000
ONLY_TCP = {"shm": False, "cma": False}


@pytest.fixture(scope="module")
def engine(tiny_model):
    return engine_config(tiny_model)


@pytest.fixture
def worker(engine) -> Iterator[Worker]:
    made = Worker(engine, fetch_deadline_ms=FETCH_DEADLINE_MS, fabric=ONLY_TCP)
    yield made
    made.side.shutdown()


@pytest.fixture
def holder(worker: Worker) -> Iterator[Tuple[subprocess.Popen, Gate]]:
    """The other node's process, and the gate through which it answers."""
    side = worker.side
    config = node_config(
        side._config,
        side._facts,
        side._engine,
        rank=0,
        block_bytes=LAYERS * PAGE,
        identity=side._identity,
        layers=LAYERS,
    )
    config.update(pod="holder")
    job = {"config": config, "names": names(BLOCKS).hex(), "blocks": BLOCKS}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    gate = Gate(process.stdout.readline().strip())
    gate.opened.set()
    try:
        yield process, gate
    finally:
        gate.close()
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        process.wait(PATIENCE)
        process.stdout.close()


@contextlib.contextmanager
def closed(gate: Gate) -> Iterator[None]:
    """Answers are held back, unless the gate is opened again."""
    gate.opened.clear()
    gate.answered.clear()
    try:
        yield
    finally:
        gate.opened.set()


def from_holder(request: str, first: int, block_ids: list, address: str) -> Load:
    stop = first + len(block_ids)
    return Load(
        request, names(stop), first, block_ids, (Sources(holders=(("holder", stop, address),)),)
    )


def test_what_a_halted_peer_sends_late_never_lands(worker, holder):
    """The peer grants a lease and is halted before it sends. The fetch ends in time as a miss, and
    its blocks are the engine's, also when the peer goes on.
    """
    process, gate = holder
    # The connection that the second fetch reads over.
    assert worker.load(from_holder("warm", 0, [1], gate.address)) == set()
    assert worker.read(1) != {0.0}
    with closed(gate):
        worker.step(loads=[from_holder("late", 1, [2, 3], gate.address)])
        assert gate.answered.wait(PATIENCE), "no lease was asked for"
        freeze(process.pid)
        gate.opened.set()
        worker.until(lambda: "late" in worker.received)
        assert worker.side.take_failed_blocks() == {2, 3}
        worker.received.clear()
        for block in (2, 3):
            worker.fill(block, 9)
        os.kill(process.pid, signal.SIGCONT)
        # It has sent what it owed before it sends this.
        worker.until(lambda: worker.load(from_holder("next", 0, [4], gate.address)) == set())
    assert worker.read(4) == worker.read(1)
    assert (worker.read(2), worker.read(3)) == ({9.0}, {9.0})
    assert worker.side.stats.data["fetches_failed"] >= 1


class Lingering:
    """A fetch that is over, and that may still write until it is let go."""

    depth, sources, unsettled = 0, ["miss", "miss"], [0, 1]

    def __init__(self) -> None:
        self.settled = False

    def done(self) -> bool:
        return True

    def wait(self, timeout: float) -> "Lingering":
        return self

    def drained(self, timeout: float) -> bool:
        return self.settled


def test_blocks_that_may_still_be_written_to_are_withheld_until_they_are_not(worker):
    """However often the engine asks, it is not told of the request before; then all at once."""
    lingering = Lingering()
    load = Load("late", names(2), 0, [2, 3], (Sources(),))
    worker.side._loading["late"] += 1
    worker.side._fetching.append(_Fetching(load, lingering))
    for _ in range(10):
        worker.step()
        assert not worker.received and worker.side.take_failed_blocks() == set()
    assert worker.side.stats.data["fetches_unsettled"] == 1
    lingering.settled = True
    worker.step()
    assert worker.received == {"late"}
    assert worker.side.take_failed_blocks() == {2, 3}
    assert worker.side.stats.data["fetches_unsettled"] == 1


def test_a_clear_waits_for_nothing_that_hangs(worker, holder):
    """The engine resets its caches while such a fetch is under way."""
    process, gate = holder
    assert worker.load(from_holder("warm", 0, [1], gate.address)) == set()
    with closed(gate):
        worker.step(loads=[from_holder("late", 1, [2, 3], gate.address)])
        assert gate.answered.wait(PATIENCE), "no lease was asked for"
        freeze(process.pid)
        gate.opened.set()
        worker.side.before_step(StepMetadata(clear=True))
        told = worker.side.take_metadata()
        assert told is not None and told.cleared == 1
        os.kill(process.pid, signal.SIGCONT)
        worker.until(lambda: "late" in worker.received)
    assert worker.side.take_failed_blocks() == {2, 3}
    assert worker.side._node is not None
