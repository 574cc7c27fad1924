"""A node with a disk tier, in a process of its own: `disk.py ENGINE FOLDER [forbidden]`.

It stores blocks, restarts the node on the folder and fetches them. One line of JSON says what came of it. With
"forbidden" the system refuses io_uring to the process first, as container runtimes do.
"""

import ctypes
import json
import os
import struct
import sys

import numpy

import kvfabric

BLOCK_BYTES = 4096
BLOCK_TOKENS = 16
BLOCKS = 4
TIMEOUT = 30.0

IO_URING_SETUP = 425
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
SECCOMP_ERRNO_EPERM, SECCOMP_ALLOW = 0x0005_0001, 0x7FFF_0000


def forbid_io_uring():
    """Installs a filter for this process: io_uring_setup fails with EPERM, everything else is allowed."""
    instructions = [
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 0, 1, IO_URING_SETUP),  # skip one unless it is this
        (0x06, 0, 0, SECCOMP_ERRNO_EPERM),
        (0x06, 0, 0, SECCOMP_ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    program = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for option, value, more in (
        (PR_SET_NO_NEW_PRIVS, 1, zero),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(option, ctypes.c_ulong(value), more, zero, zero) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def opened(engine, folder):
    node = kvfabric.Node(
        {
            "pod": "disk",
            "model": "m",
            "model_identity": "ab" * 32,
            "block_bytes": BLOCK_BYTES,
            "block_tokens": BLOCK_TOKENS,
            "peer_listen": "off",
            "host": {"bytes": 2 * BLOCKS * BLOCK_BYTES},
            "disk": {
                "path": folder,
                "bytes": 1 << 20,
                "segment_bytes": 1 << 17,
                "engine": engine,
            },
            "fabric": {"tcp_listen": "off"},
        }
    )
    memory = numpy.zeros(BLOCKS * BLOCK_BYTES, dtype=numpy.uint8)
    pages = node.pages([(node.agent.register(memory), 0, BLOCK_BYTES, BLOCK_BYTES)], BLOCKS)
    prefix = node.prefix()
    prefix.extend(range(BLOCKS * BLOCK_TOKENS))
    return node, memory, pages, prefix


def has_ring():
    """Whether this process has an io_uring."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            # The one of the listing itself.
            continue
    return any("io_uring" in name for name in names)


def main():
    engine, folder, *forbidden = sys.argv[1:]
    if forbidden:
        forbid_io_uring()
    contents = numpy.arange(BLOCKS * BLOCK_BYTES) % 251
    try:
        node, memory, pages, prefix = opened(engine, folder)
    except kvfabric.KvfabricError as error:
        print(json.dumps({"error": type(error).__name__, "said": str(error)}))
        return
    memory[:] = contents
    stored = node.store(prefix, pages, range(BLOCKS)).wait(TIMEOUT).stored
    node.shutdown(TIMEOUT)
    # The folder belongs to the first node as long as there is anything of it.
    del node, memory, pages, prefix
    node, memory, pages, prefix = opened(engine, folder)
    sources = node.fetch(prefix, pages, range(BLOCKS), deadline=TIMEOUT).wait(TIMEOUT).sources
    same = bool((memory == contents).all())
    print(json.dumps({"stored": stored, "sources": sources, "same": same, "ring": has_ring()}))
    node.shutdown(TIMEOUT)


main()
