"""What a call to a node costs from Python: a store and a fetch of blocks in host memory.

The work is that of benches/src/engines/overhead.rs, which says what the figures mean, and of overhead.c, call by call:
some calls for each line of its input, answered by figures and an empty line.
"""

import itertools
import statistics
import sys
import time
from typing import Callable, Iterator, List, TypeVar

import numpy
from figures import tell

import kvfabric

BLOCK_BYTES = 4096
BLOCK_TOKENS = 16
CALLS = 50
WARM_UP_CALLS = 10
BATCHES = (1, 64)
HOST_BYTES = 64 << 20

Report = TypeVar("Report")

CONFIG = {
    "pod": "overhead",
    "model": "overhead",
    "model_identity": "00" * 32,
    "block_bytes": BLOCK_BYTES,
    "block_tokens": BLOCK_TOKENS,
    "host": {"bytes": HOST_BYTES},
    "fabric": {"tcp_listen": "off"},
    "peer_listen": "off",
}


def main() -> None:
    node = kvfabric.Node(CONFIG)
    memory = numpy.zeros(max(BATCHES) * BLOCK_BYTES, dtype=numpy.uint8)
    region = node.agent.register(memory)
    pages = node.pages([(region, 0, BLOCK_BYTES, BLOCK_BYTES)], max(BATCHES))
    # Prompts that no call has had, so that every store is one.
    prompts = itertools.count()
    for _ in sys.stdin:
        for batch in BATCHES:
            measure(node, pages, batch, prompts)
        print(flush=True)
    node.shutdown()
    region.deregister()


def measure(
    node: kvfabric.Node, pages: kvfabric.Pages, batch: int, prompts: Iterator[int]
) -> None:
    blocks = numpy.arange(batch, dtype=numpy.uint32)
    stores, fetches = Times(), Times()

    def store_and_fetch(is_whole: bool, stores: Times, fetches: Times) -> None:
        prefix = node.prefix()
        prefix.extend(numpy.full(batch * BLOCK_TOKENS, next(prompts), dtype=numpy.uint32))
        stored = stores.call(is_whole, lambda: node.store(prefix, pages, blocks))
        fetched = fetches.call(is_whole, lambda: node.fetch(prefix, pages, blocks))
        assert stored.stored == batch and fetched.depth == batch

    for _ in range(WARM_UP_CALLS):
        store_and_fetch(True, Times(), Times())
    for _ in range(CALLS):
        for is_whole in (True, False):
            store_and_fetch(is_whole, stores, fetches)
    stores.tell(f"store-{batch}")
    fetches.tell(f"fetch-{batch}")


class Times:
    """The times of one kind of calls, in nanoseconds."""

    def __init__(self) -> None:
        self.whole: List[int] = []
        self.own: List[int] = []
        self.cpu: List[int] = []

    def call(self, is_whole: bool, begin: Callable[[], kvfabric.Operation[Report]]) -> Report:
        """Makes a call and adds its times."""
        cpu = time.process_time_ns()
        start = time.perf_counter_ns()
        operation = begin()
        over = begun = time.perf_counter_ns()
        if not is_whole:
            operation.wait()
            over = time.perf_counter_ns()
        report = operation.wait()
        del operation
        end = time.perf_counter_ns()
        if is_whole:
            self.whole.append(end - start)
            self.cpu.append(time.process_time_ns() - cpu)
        else:
            self.own.append(begun - start + end - over)
        return report

    def tell(self, case: str) -> None:
        for metric, samples in (
            ("us_per_call", self.whole),
            ("own_us_per_call", self.own),
            ("cpu_us_per_call", self.cpu),
        ):
            tell("python", case, metric, "µs", [statistics.median(samples) / 1000])


main()
