"""Memory of GPUs: what is asked of objects, and what is said where there is none."""

import ctypes
import gc
import weakref

import pytest

import kvfabric

try:
    REPORT = kvfabric.cuda_probe()
except kvfabric.UnsupportedError as error:
    REPORT = None
    REASON = str(error)

without = pytest.mark.skipif(REPORT is not None, reason="there is a GPU here")


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# Capsules do not keep what they name, nor the text.
_KEPT = []


def capsule(shape, strides=None, *, device=(2, 0), bits=16, name=b"dltensor"):
    """One that looks as those of other packages do; its memory is nobody's."""
    numbers = ctypes.c_int64 * len(shape)
    tensor = _Tensor(0x7F0000000000, *device, len(shape), 2, bits, 1)
    tensor.shape = numbers(*shape)
    if strides is not None:
        tensor.strides = numbers(*strides)
    _KEPT.append((tensor, name))
    return _new_capsule(ctypes.addressof(tensor), name, None)


class Array:
    """What a package's array says of itself."""

    def __init__(self, **facts):
        self.__cuda_array_interface__ = {
            "shape": (4, 8),
            "typestr": "<f2",
            "data": (0x7F0000000000, False),
            "version": 3,
            **facts,
        }


class Tensor:
    def __init__(self, kind, made):
        self.kind, self.made = kind, made

    def __dlpack_device__(self):
        return (self.kind, 0)

    def __dlpack__(self):
        return self.made


@without
def test_what_is_missing_is_said():
    assert "CUDA" in REASON or "libcuda" in REASON
    with pytest.raises(kvfabric.UnsupportedError) as refused:
        kvfabric.Agent("device", cuda=kvfabric.Cuda())
    assert str(refused.value) == REASON
    agent = kvfabric.Agent("device")
    good = [
        capsule((4, 8)),
        capsule((4, 8), (8, 1)),
        capsule((4, 1, 8), (8, 77, 1)),
        Tensor(2, capsule((4, 8))),
        Array(),
        Array(strides=(16, 2)),
        Array(strides=None),
    ]
    # All that can be known of them is right: it is the driver that is missing.
    for memory in good:
        with pytest.raises(kvfabric.UnsupportedError, match="libcuda|CUDA"):
            agent.register_device(memory)
    with pytest.raises(kvfabric.UnsupportedError, match="libcuda|CUDA"):
        agent.register_device_address(0, 0x7F0000000000, 4096)


@pytest.mark.parametrize(
    ("memory", "what"),
    [
        (lambda: bytearray(8), "__dlpack__"),
        (lambda: capsule((4, 8), (1, 4)), "not contiguous"),
        (lambda: capsule((4, 8), name=b"used_dltensor"), "taken"),
        (lambda: capsule((4, -8)), "shape"),
        (lambda: capsule((0, 8)), "shape"),
        (lambda: capsule((1 << 40, 1 << 40)), "shape"),
        (lambda: capsule((3,), bits=4), "shape"),
        (lambda: capsule((1,) * 65), "dimensions"),
        (lambda: capsule((4,), device=(2, -1)), "device of the capsule"),
        (lambda: Array(strides=(2, 8)), "not contiguous"),
        (lambda: Array(strides=(16, 3)), "not contiguous"),
        (lambda: Array(typestr="<f"), "typestr"),
        (lambda: Array(shape=(-1,)), "shape"),
    ],
)
def test_what_is_no_memory_of_a_device_is_refused(memory, what):
    agent = kvfabric.Agent("device")
    with pytest.raises(kvfabric.InvalidError, match=what):
        agent.register_device(memory())


def test_memory_of_other_devices_is_refused():
    agent = kvfabric.Agent("device")
    # Of the host, and one that is asked before it makes a capsule.
    for memory in (capsule((4, 8), device=(1, 0)), Tensor(10, None)):
        with pytest.raises(kvfabric.UnsupportedError, match="DLPack's kind"):
            agent.register_device(memory)


@without
def test_an_object_that_was_refused_is_let_go():
    agent = kvfabric.Agent("device")
    array = Array()
    gone = weakref.ref(array)
    with pytest.raises(kvfabric.UnsupportedError):
        agent.register_device(array)
    with pytest.raises(kvfabric.UnsupportedError):
        agent.register_device_address(0, 1 << 40, 8, keep=array)
    del array
    gc.collect()
    assert gone() is None


def test_options_are_checked():
    with pytest.raises(kvfabric.InvalidError, match="timeout"):
        kvfabric.Agent("device", cuda=kvfabric.Cuda(polling=-1.0))
    with pytest.raises(kvfabric.InvalidError, match="cuda.storage"):
        kvfabric.Agent("device", cuda=kvfabric.Cuda(storage="fast"))


@pytest.mark.skipif(REPORT is None, reason="NO GPU HERE: memory of devices is not moved")
def test_bytes_go_up_and_down():
    torch = pytest.importorskip("torch")
    agent = kvfabric.Agent("device", cuda=kvfabric.Cuda())
    there = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    region = agent.register_device(there)
    data = bytes(range(256)) * 4096
    memory = bytearray(data)
    own = agent.register(memory)
    agent.write([(own, 0, 1 << 20)], None, [(region, 0, 1 << 20)]).wait()
    assert bytes(there.cpu().numpy()) == data
    memory[:] = bytes(1 << 20)
    agent.read([(own, 0, 1 << 20)], None, [(region, 0, 1 << 20)]).wait()
    assert bytes(memory) == data
    region.deregister()


class Stream:
    def __init__(self, **said):
        for name, value in said.items():
            setattr(self, name, value)


@pytest.fixture
def transfer():
    agent = kvfabric.Agent("streams")
    region = agent.register(bytearray(4096))
    local, remote = agent.prepare([(region, 0, 64)]), agent.prepare([(region, 64, 64)])
    return agent.request("read", local, remote)


WRONG_STREAMS = [
    ("stream", kvfabric.InvalidError, "__cuda_stream__"),
    (Stream(__cuda_stream__=lambda: (1, 8)), kvfabric.UnsupportedError, "version 1"),
    (Stream(device_index=1, cuda_stream=8), kvfabric.InvalidError, "device 1, said to be of device 0"),
]


def test_streams_are_checked_before_the_driver_is_asked(transfer):
    for stream, error, said in WRONG_STREAMS:
        for call in (
            lambda: transfer.post(after=stream, device=0),
            lambda: transfer.order_stream(stream, device=0),
        ):
            with pytest.raises(error, match=said):
                call()
    assert transfer.state == "idle"


@without
def test_no_stream_is_waited_for_without_a_driver(transfer):
    for stream in (0, Stream(__cuda_stream__=(0, 1)), Stream(cuda_stream=2, device_index=0)):
        with pytest.raises(kvfabric.UnsupportedError, match="CUDA"):
            transfer.post(after=stream)
        with pytest.raises(kvfabric.UnsupportedError, match="CUDA"):
            transfer.order_stream(stream, 0, 0.1)
    transfer.post()
    transfer.wait()


def test_what_copies_small_ranges_is_checked():
    with pytest.raises(kvfabric.InvalidError, match="cuda.fragments"):
        kvfabric.Agent("device", cuda=kvfabric.Cuda(fragments="often"))
