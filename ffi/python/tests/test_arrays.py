"""Arrays of numpy and tensors of torch, as memory and as descriptors. Torch is not needed: without it, its tests are skipped."""

import importlib.util
import subprocess
import sys
import types

import numpy
import pytest

import kvfabric

TIMEOUT = 20.0


@pytest.fixture
def agent():
    return kvfabric.Agent("one")


def test_numpy_rows_describe_ranges(agent):
    source = numpy.arange(1024, dtype=numpy.uint32)
    target = numpy.zeros_like(source)
    ids = agent.register(source).id, agent.register(target).id
    with pytest.raises(kvfabric.NotFoundError):
        agent.prepare(numpy.array([[ids[0], 0, 4]], dtype=numpy.uint64))
    regions = agent.register(source), agent.register(target)
    offsets = numpy.arange(0, 4096, 64, dtype=numpy.uint64)
    plain = numpy.stack(
        [numpy.full_like(offsets, regions[0].id), offsets, numpy.full_like(offsets, 32)], axis=1
    )
    remote = agent.prepare(plain)
    local = agent.prepare(numpy.array([[regions[1].id, 0, 32, 64, 64]], dtype=numpy.uint64))
    assert len(remote) == len(local) == 64 and remote.bytes == local.bytes == 2048
    chosen = numpy.arange(0, 64, 2)
    for positions in (
        chosen,
        chosen.astype(numpy.int32),
        chosen.astype(numpy.uint64),
        chosen.tolist(),
    ):
        target[:] = 0
        transfer = agent.request(
            "read", local, remote, local_positions=positions, remote_positions=positions
        )
        transfer.post()
        transfer.wait(TIMEOUT)
        expected = numpy.zeros_like(source).reshape(64, 16)
        expected[::2, :8] = source.reshape(64, 16)[::2, :8]
        assert (target.reshape(64, 16) == expected).all()


def test_signed_numbers_name_the_same_regions(agent):
    region = agent.shared_memory(64)
    rows = numpy.array([[region.id, 0, 64]], dtype=numpy.uint64)
    assert len(agent.prepare(rows.astype(numpy.int64))) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        numpy.zeros((4, 3)),
        numpy.zeros((4, 4), dtype=numpy.uint64),
        numpy.zeros(3, dtype=numpy.uint64),
        numpy.zeros((1, 1, 3), dtype=numpy.uint64),
        numpy.zeros((4, 3), dtype=numpy.uint64)[::2],
        numpy.zeros((3, 4), dtype=numpy.uint64).T,
        numpy.zeros((4, 3), dtype=">u8"),
        numpy.zeros((4, 3), dtype=numpy.uint8),
    ],
)
def test_other_arrays_are_refused(agent, wrong):
    with pytest.raises(kvfabric.InvalidError, match="descriptors"):
        agent.prepare(wrong)


def test_an_empty_array_is_an_empty_list(agent):
    assert len(agent.prepare(numpy.zeros((0, 3), dtype=numpy.uint64))) == 0


def test_part_of_an_array_is_memory_if_it_is_contiguous(agent):
    pool = numpy.zeros((4, 1024), dtype=numpy.float32)
    region = agent.register(pool[1:3])
    assert region.address == pool.ctypes.data + 4096 and len(region) == 8192
    with pytest.raises(kvfabric.InvalidError, match="contiguous"):
        agent.register(pool[:, ::2])
    pool.flags.writeable = False
    with pytest.raises(kvfabric.DeniedError):
        agent.register(pool, writable=True)


class Stand:
    """What is asked of a tensor."""

    def __init__(self, device="cpu", contiguous=True):
        self.memory = numpy.zeros(16, dtype=numpy.uint16)
        self.device = types.SimpleNamespace(type=device)
        self.contiguous = contiguous

    def data_ptr(self):
        return self.memory.ctypes.data

    def element_size(self):
        return 2

    def numel(self):
        return 16

    def is_contiguous(self):
        return self.contiguous


def test_what_looks_like_a_tensor_is_one(agent):
    tensor = Stand()
    region = agent.register(tensor)
    assert region.address == tensor.data_ptr() and len(region) == 32
    with pytest.raises(kvfabric.UnsupportedError, match="cuda"):
        agent.register(Stand(device="cuda"))
    with pytest.raises(kvfabric.InvalidError, match="contiguous"):
        agent.register(Stand(contiguous=False))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_tensors_are_memory_without_importing_torch():
    """In a process of its own, which looks at what was imported before it imports torch."""
    script = """
import sys
import kvfabric
agent = kvfabric.Agent("one")
agent.register(bytearray(8))
assert "torch" not in sys.modules and "numpy" not in sys.modules
import torch
source = torch.arange(256, dtype=torch.bfloat16).reshape(16, 16)
target = torch.zeros_like(source)
regions = agent.register(target), agent.register(source[4:8])
assert regions[1].address == source.data_ptr() + 128 and len(regions[1]) == 128
agent.read([(regions[0], 0, 128)], None, [(regions[1], 0, 128)]).wait(20)
assert torch.equal(target[:4], source[4:8])
for wrong, error in ((source.T, kvfabric.InvalidError), (source.to("meta"), kvfabric.UnsupportedError)):
    try:
        agent.register(wrong)
    except error:
        continue
    raise AssertionError(wrong)
regions[0].deregister()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
