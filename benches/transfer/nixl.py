"""What NIXL does with the blocks of a plan, over UCX: two processes without its progress threads, which would cost two cores.

rival.py stands before it. UCX_TLS chooses the transports, as always.
"""

import select

# Requests of one block each, made before.
SINGLES_MAX = 64


class Side(Memory):
    """Memory that is registered with an agent."""

    def __init__(self, name, is_source, total):
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        super().__init__(is_source, total)
        self.agent.register_memory([(self.base, total, 0, "")], "DRAM")


def send_bytes(channel, data):
    channel.sendall(struct.pack("Q", len(data)) + data)


def receive_bytes(channel):
    return receive(channel, struct.unpack("Q", receive(channel, 8))[0])


def serve(channel, is_read, places, block_bytes):
    """Works for the initiator until that is gone: looks for work while it moves, and sleeps between its moves, so that others
    have the core then.
    """
    total = len(places[0]) * block_bytes
    side = Side("target", is_read, total)
    send_bytes(channel, side.agent.get_agent_metadata())
    channel.sendall(struct.pack("Q", side.base))
    side.agent.add_remote_agent(receive_bytes(channel))
    is_moving = False
    while True:
        if is_moving:
            side.agent.get_new_notifs()
        if not select.select([channel], [], [], 0 if is_moving else None)[0]:
            continue
        command = receive(channel, 1)
        is_moving = command == b"g"
        answer = 0 if command in (b"g", b"s") else answer_target(side, places, command)
        channel.sendall(struct.pack("Q", answer))


class Initiator(Commands):
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
        self.ask(b"g")
        begin = time.perf_counter_ns()
        state = self.side.agent.transfer(request)
        while state == "PROC":
            state = self.side.agent.check_xfer_state(request)
        took = time.perf_counter_ns() - begin
        self.ask(b"s")
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")
        return count * self.block_bytes, took

    def move_all(self):
        return self.move(self.all, len(self.places[0]))

    def move_one(self, position):
        return self.move(self.singles[position % len(self.singles)], 1)


main(serve, Initiator)
