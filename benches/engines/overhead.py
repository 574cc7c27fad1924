"""What a call to a node costs from Python: a store and a fetch of blocks in host memory.

The work is that of benches/src/engines/overhead.rs and of overhead.c, call by call: some calls for each line of its
input, answered by figures and an empty line.
"""

import itertools
import statistics
import sys
import time
from typing import Iterator

import numpy
from figures import tell

import kvfabric

BLOCK_BYTES = 4096
BLOCK_TOKENS = 16
CALLS = 50
WARM_UP_CALLS = 10
BATCHES = (1, 64)
HOST_BYTES = 64 << 20

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
    stores, fetches = [], []
    for call in range(WARM_UP_CALLS + CALLS):
        prefix = node.prefix()
        prefix.extend(numpy.full(batch * BLOCK_TOKENS, next(prompts), dtype=numpy.uint32))
        begin = time.perf_counter_ns()
        stored = node.store(prefix, pages, blocks).wait()
        between = time.perf_counter_ns()
        fetched = node.fetch(prefix, pages, blocks).wait()
        end = time.perf_counter_ns()
        assert stored.stored == batch and fetched.depth == batch
        if call >= WARM_UP_CALLS:
            stores.append(between - begin)
            fetches.append(end - between)
    for name, samples in (("store", stores), ("fetch", fetches)):
        middle = statistics.median(samples) / 1000
        tell("python", f"{name}-{batch}", "us_per_call", "µs", [middle])


main()
