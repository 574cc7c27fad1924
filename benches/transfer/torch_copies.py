"""What PyTorch does with the blocks of a plan: it selects them into one piece, copies that piece, and puts its rows where they belong.

rival.py stands before it. The last arguments but three are the device ("cuda:0", or "cpu" to try it without a GPU) and whether
both sides lie there ("within") or one in pinned memory of the host ("host").
"""


def serve(channel, is_read, places, block_bytes):
    """There is no second process that works; what is asked of it costs nothing."""
    while True:
        receive(channel, 1)
        channel.sendall(struct.pack("Q", 0))


class Copies(Commands):
    """Both sides, as rows of 8-byte words."""

    def __init__(self, channel, is_read, places, block_bytes):
        import torch

        self.torch, self.channel, self.is_read = torch, channel, is_read
        self.device, is_within = torch.device(sys.argv[-5]), sys.argv[-4] == "within"
        blocks, row = len(places[0]), block_bytes // 8
        local, remote = (torch.from_numpy(of.astype(np.int64)) for of in places)
        sides = {
            "local": self.side_of(is_within, not is_read, blocks, row, local),
            "remote": self.side_of(True, is_read, blocks, row, remote),
        }
        self.source, self.target = (sides["remote"], sides["local"]) if is_read else (sides["local"], sides["remote"])
        # What one piece is copied from and to; a side whose blocks lie in order is one already.
        self.pieces = [self.memory(is_on_device, blocks, row) for is_on_device in (self.source[2], self.target[2])]
        self.synchronize()

    def memory(self, is_on_device, blocks, row):
        if is_on_device:
            return self.torch.zeros((blocks, row), dtype=self.torch.int64, device=self.device)
        is_pinned = self.device.type == "cuda"
        return self.torch.zeros((blocks, row), dtype=self.torch.int64, pin_memory=is_pinned)

    def side_of(self, is_on_device, is_source, blocks, row, places):
        """Its memory, the rows of its blocks (none where they are in order), and whether it is on the device."""
        memory = self.memory(is_on_device, blocks, row)
        if is_source:
            content = self.torch.from_numpy(words(blocks * row * 8).view(np.int64).reshape(blocks, row))
            memory.copy_(content)
        is_ordered = bool((places == self.torch.arange(blocks)).all())
        rows = None if is_ordered else places.to(memory.device)
        return memory, rows, is_on_device, places

    def synchronize(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def moved(self, first, count):
        torch, (source, target) = self.torch, (self.source, self.target)
        until = first + count
        begin = time.perf_counter_ns()
        if source[1] is None:
            piece = source[0][first:until]
        else:
            piece = self.pieces[0][:count]
            torch.index_select(source[0], 0, source[1][first:until], out=piece)
        if target[1] is None:
            target[0][first:until].copy_(piece, non_blocking=True)
        else:
            if source[2] != target[2]:
                arrived = self.pieces[1][:count]
                arrived.copy_(piece, non_blocking=True)
                if not target[2]:
                    # The processor puts rows in their places: they have to be there.
                    self.synchronize()
                piece = arrived
            target[0].index_copy_(0, target[1][first:until], piece)
        self.synchronize()
        nanoseconds = time.perf_counter_ns() - begin
        return count * source[0].shape[1] * 8, nanoseconds

    def wrong(self):
        """How many blocks of the target are not the source's."""
        found = self.target[0].cpu().numpy().view(np.uint64)
        expected = words(found.nbytes).reshape(found.shape)
        sources, targets = self.source[3].numpy(), self.target[3].numpy()
        return int((found[targets] != expected[sources]).any(axis=1).sum())

    def answer(self, command, read):
        if command == b"a":
            return self.moved(0, len(self.source[3]))
        if command == b"b":
            return self.moved(struct.unpack("=I", read(4))[0], 1)
        if command == b"p":
            self.target[0].fill_(np.uint64(POISON * 0x0101010101010101).astype(np.int64).item())
            self.synchronize()
            return 0, 0
        if command == b"v":
            return self.wrong(), 0
        if command == b"c":
            return cpu_us(), 0
        raise RuntimeError(f"command {command!r}")


main(serve, Copies)
