"""What Mooncake's transfer engine does with the blocks of a plan, over TCP: two processes that find each other without a server.

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
# More operations at once than about 2,000 are refused with the default queues.
BATCH = 512


def words(total):
    return (np.arange(total // 8, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def cpu_us():
    return int(time.process_time() * 1e6)


class Side:
    """Memory with the source's words or poison, registered with an engine."""

    def __init__(self, is_source, total):
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        check(self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), "initialize")
        self.memory = np.full(total, POISON, dtype=np.uint8)
        if is_source:
            self.memory.view(np.uint64)[:] = words(total)
        self.base = self.memory.ctypes.data
        check(self.engine.register_memory(self.base, total), "register memory")

    def wrong(self, sources, targets):
        """How many blocks of the target are not the source's."""
        blocks = len(sources)
        found = self.memory.view(np.uint64).reshape(blocks, -1)
        expected = words(self.memory.nbytes).reshape(blocks, -1)
        return int((found[targets] != expected[sources]).any(axis=1).sum())


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: {code}")


def receive(channel, count):
    data = b""
    while len(data) < count:
        part = channel.recv(count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def serve(channel, is_read, places, block_bytes):
    """Works for the initiator until that is gone."""
    side = Side(is_read, len(places[0]) * block_bytes)
    channel.sendall(struct.pack("QQ", side.engine.get_rpc_port(), side.base))
    while True:
        command = receive(channel, 1)
        answer = 0
        if command == b"p":
            side.memory.fill(POISON)
        elif command == b"v":
            answer = side.wrong(places[0], places[1])
        elif command == b"c":
            answer = cpu_us()
        channel.sendall(struct.pack("Q", answer))


class Initiator:
    """Reads or writes the blocks in batches that the engine's queues take."""

    def __init__(self, channel, is_read, places, block_bytes):
        self.channel, self.is_read, self.places, self.block_bytes = channel, is_read, places, block_bytes
        self.side = Side(not is_read, len(places[0]) * block_bytes)
        port, there = struct.unpack("QQ", receive(channel, 16))
        self.target = f"127.0.0.1:{port}"
        engine = self.side.engine
        self.call = engine.batch_transfer_sync_read if is_read else engine.batch_transfer_sync_write
        self.single = engine.transfer_sync_read if is_read else engine.transfer_sync_write
        self.local = (places[0].astype(np.uint64) * np.uint64(block_bytes) + np.uint64(self.side.base)).tolist()
        self.remote = (places[1].astype(np.uint64) * np.uint64(block_bytes) + np.uint64(there)).tolist()

    def move_all(self):
        blocks = len(self.local)
        batches = [
            (self.local[first : first + BATCH], self.remote[first : first + BATCH], [self.block_bytes] * min(BATCH, blocks - first))
            for first in range(0, blocks, BATCH)
        ]
        begin = time.perf_counter_ns()
        for local, remote, lengths in batches:
            check(self.call(self.target, local, remote, lengths), "transfer")
        return blocks * self.block_bytes, time.perf_counter_ns() - begin

    def move_one(self, position):
        begin = time.perf_counter_ns()
        code = self.single(self.target, self.local[position], self.remote[position], self.block_bytes)
        took = time.perf_counter_ns() - begin
        check(code, "transfer")
        return self.block_bytes, took

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


def main():
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
        initiator = Initiator(own, is_read, places, block_bytes)
        while True:
            first, second = initiator.answer(read(1), read)
            answers.write(f"ok {first} {second}\n")
            answers.flush()
    except Exception as error:
        answers.write(f"{type(error).__name__}: {error}\n")
        answers.flush()
        os._exit(1)


main()
