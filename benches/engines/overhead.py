"""What a call to a node costs from Python: a store and a fetch of blocks in host memory.

The work is that of benches/src/engines/overhead.rs and of overhead.c, call by call.
"""

import statistics
import time

import numpy
from figures import tell

import kvfabric

BLOCK_BYTES = 4096
BLOCK_TOKENS = 16
CALLS = 2000
WARM_UP_CALLS = 200
BATCHES = (1, 64)
PROMPTS_MAX = 1_000_000
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
    for batch in BATCHES:
        blocks = numpy.arange(batch, dtype=numpy.uint32)
        stores, fetches = [], []
        for call in range(WARM_UP_CALLS + CALLS):
            # A prompt that no other call has, so that every store is one.
            token = batch * PROMPTS_MAX + call
            prefix = node.prefix()
            prefix.extend(numpy.full(batch * BLOCK_TOKENS, token, dtype=numpy.uint32))
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
    node.shutdown()
    region.deregister()


main()
