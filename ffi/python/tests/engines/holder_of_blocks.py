"""Runs in a process of its own: a node that holds blocks, which its peers can only reach over TCP.

Arguments: a JSON object with the node's configuration and, in hexadecimal digits, the names of its
blocks. It says where its peer service is, and ends with its standard input.
"""

import json
import sys

import kvfabric


def main() -> None:
    job = json.loads(sys.argv[1])
    size, names = job["config"]["block_bytes"], bytes.fromhex(job["names"])
    node = kvfabric.Node(job["config"])
    blocks = job["blocks"]
    memory = bytearray(b"\x05" * (blocks * size))
    region = node.agent.register(memory, writable=True)
    pages = node.pages([(region, 0, size, size)], blocks)
    report = node.store(node.prefix_of(names), pages, range(blocks)).wait()
    assert report.stored == blocks, report
    print(node.peer_address, flush=True)
    sys.stdin.read()
    node.shutdown()


if __name__ == "__main__":
    main()
