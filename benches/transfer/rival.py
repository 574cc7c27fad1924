"""What the programs of rivals have in common; it stands before each of them when it is run.

Arguments, input and answers are those of raw_ucx.c: a way, the number of blocks and their size; then the places of all blocks and
commands of one letter.
"""

import os
import socket
import struct
import sys
import time

import numpy as np

POISON = 0xA5


def words(total):
    return (np.arange(total // 8, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def cpu_us():
    return int(time.process_time() * 1e6)


def receive(channel, count):
    data = b""
    while len(data) < count:
        part = channel.recv(count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


class Memory:
    """The source's words, or poison."""

    def __init__(self, is_source, total):
        self.memory = np.full(total, POISON, dtype=np.uint8)
        if is_source:
            self.memory.view(np.uint64)[:] = words(total)
        self.base = self.memory.ctypes.data

    def wrong(self, sources, targets):
        """How many blocks of the target are not the source's."""
        blocks = len(sources)
        found = self.memory.view(np.uint64).reshape(blocks, -1)
        expected = words(self.memory.nbytes).reshape(blocks, -1)
        return int((found[targets] != expected[sources]).any(axis=1).sum())


def answer_target(side, places, command):
    """What a target says to the initiator's commands."""
    if command == b"p":
        side.memory.fill(POISON)
        return 0
    if command == b"v":
        return side.wrong(places[0], places[1])
    if command == b"c":
        return cpu_us()
    raise RuntimeError(f"command {command!r}")


class Commands:
    """Answers kv-bench; an initiator adds `move_all`, `move_one`, `side`, `places`, `channel` and `is_read`."""

    def ask(self, command):
        self.channel.sendall(command)
        return struct.unpack("Q", receive(self.channel, 8))[0]

    def answer(self, command, read):
        if command == b"a":
            return self.move_all()
        if command == b"b":
            return self.move_one(struct.unpack("=I", read(4))[0])
        if command == b"p":
            if self.is_read:
                self.side.memory.fill(POISON)
                return 0, 0
            return self.ask(b"p"), 0
        if command == b"v":
            if self.is_read:
                return self.side.wrong(self.places[1], self.places[0]), 0
            return self.ask(b"v"), 0
        if command == b"c":
            return cpu_us(), self.ask(b"c")
        raise RuntimeError(f"command {command!r}")


def main(serve, initiator_of):
    way, blocks, block_bytes = sys.argv[-3], int(sys.argv[-2]), int(sys.argv[-1])
    is_read = way == "read"
    # Libraries write to the standard output; the answers go where it was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    questions = os.fdopen(0, "rb", buffering=0)

    def read(count):
        data = b""
        while len(data) < count:
            part = questions.read(count - len(data))
            if not part:
                os._exit(0)
            data += part
        return data

    places = [np.frombuffer(read(4 * blocks), dtype=np.uint32) for _ in range(2)]
    own, other = socket.socketpair()
    if os.fork() == 0:
        own.close()
        serve(other, is_read, places, block_bytes)
    other.close()
    try:
        initiator = initiator_of(own, is_read, places, block_bytes)
        while True:
            first, second = initiator.answer(read(1), read)
            answers.write(f"ok {first} {second}\n")
            answers.flush()
    except Exception as error:
        answers.write(f"{type(error).__name__}: {error}\n")
        answers.flush()
        os._exit(1)
