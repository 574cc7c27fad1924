"""What Mooncake's transfer engine does with the blocks of a plan, over TCP: two processes that find each other without a server.

rival.py stands before it.
"""

# More operations at once than about 2,000 are refused with the default queues.
BATCH = 512


class Side(Memory):
    """Memory that is registered with an engine."""

    def __init__(self, is_source, total):
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        check(self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), "initialize")
        super().__init__(is_source, total)
        check(self.engine.register_memory(self.base, total), "register memory")


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: {code}")


def serve(channel, is_read, places, block_bytes):
    """Works for the initiator until that is gone."""
    side = Side(is_read, len(places[0]) * block_bytes)
    channel.sendall(struct.pack("QQ", side.engine.get_rpc_port(), side.base))
    while True:
        answer = answer_target(side, places, receive(channel, 1))
        channel.sendall(struct.pack("Q", answer))


class Initiator(Commands):
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


main(serve, Initiator)
