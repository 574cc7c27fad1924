"""What NIXL does with the blocks of a plan, over UCX: two processes without its progress threads, which would cost two cores.

Arguments, input and answers are those of raw_ucx.c: a way, the number of blocks and their size; then the places of all blocks and
commands of one letter. UCX_TLS chooses the transports, as always.
"""

import os
import select
import socket
import struct
import sys
import time

import numpy as np

POISON = 0xA5
# The target looks for work during a move and for so long after it; then it sleeps.
AWAKE_SECONDS = 0.05
# Requests of one block each, made before.
SINGLES_MAX = 64


class Side:
    """Memory with the source's words or poison, registered with an agent."""

    def __init__(self, name, is_source, total):
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.memory = np.full(total, POISON, dtype=np.uint8)
        if is_source:
            self.memory.view(np.uint64)[:] = words(total)
        self.base = self.memory.ctypes.data
        self.agent.register_memory([(self.base, total, 0, "")], "DRAM")

    def wrong(self, sources, targets, block_bytes):
        """How many blocks of the target are not the source's."""
        blocks = len(sources)
        found = self.memory.view(np.uint64).reshape(blocks, -1)
        expected = words(self.memory.nbytes).reshape(blocks, -1)
        return int((found[targets] != expected[sources]).any(axis=1).sum())


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


def send_bytes(channel, data):
    channel.sendall(struct.pack("Q", len(data)) + data)


def receive_bytes(channel):
    return receive(channel, struct.unpack("Q", receive(channel, 8))[0])


def serve(channel, is_read, places, block_bytes):
    """Works for the initiator until that is gone."""
    total = len(places[0]) * block_bytes
    side = Side("target", is_read, total)
    send_bytes(channel, side.agent.get_agent_metadata())
    channel.sendall(struct.pack("Q", side.base))
    side.agent.add_remote_agent(receive_bytes(channel))
    is_moving, active = False, time.monotonic()
    while True:
        side.agent.get_new_notifs()
        is_asleep = not is_moving and time.monotonic() - active > AWAKE_SECONDS
        if not select.select([channel], [], [], None if is_asleep else 0)[0]:
            continue
        active = time.monotonic()
        command = receive(channel, 1)
        if command in (b"g", b"s"):
            is_moving = command == b"g"
            continue
        answer = 0
        if command == b"p":
            side.memory.fill(POISON)
        elif command == b"v":
            answer = side.wrong(places[0], places[1], block_bytes)
        elif command == b"c":
            answer = cpu_us()
        channel.sendall(struct.pack("Q", answer))


class Initiator:
    """Reads or writes the blocks with requests that are made before."""

    def __init__(self, channel, is_read, places, block_bytes):
        self.channel, self.is_read, self.places, self.block_bytes = channel, is_read, places, block_bytes
        blocks = len(places[0])
        self.side = Side("initiator", not is_read, blocks * block_bytes)
        agent = self.side.agent
        metadata = receive_bytes(channel)
        there = struct.unpack("Q", receive(channel, 8))[0]
        send_bytes(channel, agent.get_agent_metadata())
        target = agent.add_remote_agent(metadata)
        lists = []
        for base, of, name in ((self.side.base, places[0], "NIXL_INIT_AGENT"), (there, places[1], target)):
            descriptors = np.zeros((blocks, 3), dtype=np.uint64)
            descriptors[:, 0] = np.uint64(base) + of.astype(np.uint64) * np.uint64(block_bytes)
            descriptors[:, 1] = block_bytes
            lists.append(agent.prep_xfer_dlist(name, descriptors, "DRAM"))
        way = "READ" if is_read else "WRITE"

        def request(first, count):
            chosen = np.arange(first, first + count, dtype=np.int32)
            return agent.make_prepped_xfer(way, lists[0], chosen, lists[1], chosen)

        self.all = request(0, blocks)
        self.singles = [request(position, 1) for position in range(min(blocks, SINGLES_MAX))]

    def move(self, request, count):
        self.channel.sendall(b"g")
        begin = time.perf_counter_ns()
        state = self.side.agent.transfer(request)
        while state == "PROC":
            state = self.side.agent.check_xfer_state(request)
        took = time.perf_counter_ns() - begin
        self.channel.sendall(b"s")
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")
        return count * self.block_bytes, took

    def ask(self, command):
        self.channel.sendall(command)
        return struct.unpack("Q", receive(self.channel, 8))[0]

    def answer(self, command, read):
        if command == b"a":
            return self.move(self.all, len(self.places[0]))
        if command == b"b":
            position = struct.unpack("=I", read(4))[0]
            return self.move(self.singles[position % len(self.singles)], 1)
        if command == b"p":
            if self.is_read:
                self.side.memory.fill(POISON)
                return 0, 0
            return self.ask(b"p"), 0
        if command == b"v":
            if self.is_read:
                return self.side.wrong(self.places[1], self.places[0], self.block_bytes), 0
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
