import os
from typing import (
    Any,
    ClassVar,
    Dict,
    Generator,
    Generic,
    List,
    Literal,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
    final,
)

from ._options import Cuda as Cuda
from ._options import CudaDevice as CudaDevice
from ._options import CudaReport as CudaReport
from ._options import ObjectStore as ObjectStore
from ._options import Tls as Tls
from ._options import Verbs as Verbs
from ._options import cuda_probe as cuda_probe
from ._reports import Held as Held
from ._reports import Pin as Pin
from ._reports import Reach as Reach
from ._reports import Removed as Removed
from ._reports import PromoteReport as PromoteReport
from ._reports import StoreReport as StoreReport
from ._reports import Estimate as Estimate
from ._reports import Telemetry as Telemetry

__version__: str

_T = TypeVar("_T")

# `bytes` also names a property below.
_Bytes = bytes

# A range of an own region: (region, offset, length). A peer's region goes by its number.
_Local = Tuple["Region", int, int]
_Remote = Tuple[Union["Region", int], int, int]

# What `Agent.prepare` takes: ranges as above, or rows of 64-bit integers, N×3 (region number,
# offset, length) or N×5 (region number, offset, length, stride, count), as an object with a
# C-contiguous buffer, like a numpy array.
_Descriptors = Union[Sequence[_Remote], Any]

# Whole numbers below 2^32: a sequence, or an object with a contiguous one-dimensional buffer of 32
# or 64-bit integers, like a numpy array, which is read without making a Python object of each.
_Integers = Union[Sequence[int], Any]

class KvfabricError(Exception):
    """What every error of this package is; the classes below it have their number as `code`, the
    same as in C.
    """

class InvalidError(KvfabricError):
    """An argument is malformed; repeating the call cannot help."""

    code: ClassVar[int]

class BusyError(KvfabricError):
    """A limit is reached, or something is still in flight; try again after completions."""

    code: ClassVar[int]

class CorruptError(KvfabricError):
    """Bytes do not match their checksum, length or version; drop this copy."""

    code: ClassVar[int]

class PeerLostError(KvfabricError):
    """The peer is gone; other holders may do."""

    code: ClassVar[int]

class UnsupportedError(KvfabricError):
    """This backend or build cannot do it, here or ever."""

    code: ClassVar[int]

class DeadlineError(KvfabricError):
    """The deadline passed first."""

    code: ClassVar[int]

class CancelledError(KvfabricError):
    """The caller withdrew the request, or the node was shut down."""

    code: ClassVar[int]

class VersionError(KvfabricError):
    """The other side speaks another version; both are named."""

    code: ClassVar[int]

class NoSpaceError(KvfabricError):
    """A disk, arena or store is full."""

    code: ClassVar[int]

class DeniedError(KvfabricError):
    """The other side does not allow it: a wrong key, a stranger, read-only memory."""

    code: ClassVar[int]

class PoisonedError(KvfabricError):
    """Something that this depends on became unusable."""

    code: ClassVar[int]

class NotFoundError(KvfabricError):
    """What was named does not exist."""

    code: ClassVar[int]

class IoError(KvfabricError):
    """The operating system or a store refused."""

    code: ClassVar[int]

class ForkedError(KvfabricError):
    """The call was made in a forked child."""

    code: ClassVar[int]

class InternalError(KvfabricError):
    """A promise of the library was broken; please report it."""

    code: ClassVar[int]

@final
class Agent:
    """Moves bytes between registered memory of this process and its peers. Safe to use from any
    thread.
    """

    def __new__(
        cls,
        name: str,
        *,
        shm: bool = True,
        tcp: Optional[str] = None,
        cma: Optional[bool] = None,
        ucx: Optional[Mapping[str, str]] = None,
        tcp_advertise: Optional[str] = None,
        allow_peers: Optional[Sequence[str]] = None,
        tcp_congestion: Optional[str] = None,
        prefer: Optional[Sequence[str]] = None,
        copy_threads: Optional[int] = None,
        memcpy: bool = True,
        tcp_rails: Optional[Sequence[str]] = None,
        tcp_connections: int = 1,
        tls: Optional[Tls] = None,
        verbs: Optional[Verbs] = None,
        look: Optional[float] = None,
        slow_after: Optional[float] = 2.0,
        connect_within: float = 2.0,
        object_stores: Optional[Mapping[str, ObjectStore]] = None,
        cuda: Optional[Cuda] = None,
    ) -> Agent:
        """Starts an agent that peers know by `name`.

        `shm` shares memory with peers on this host; `cma` has memory that cannot be shared copied
        straight from process to process, where the system allows it, and is on when `shm` is;
        `tcp` is the "ip:port" to listen on, port 0 for any, and `tcp_advertise` what peers are told
        where that differs. `ucx` has peers reached over UCX, if that is in the system
        (`UnsupportedError` otherwise): settings by their names without "UCX_", {} for those of the
        environment alone. Use it in trusted networks only. Without `allow_peers` every peer that
        knows a region's key may connect.

        `tcp_rails` are further addresses to serve TCP on, those of other network cards;
        `tcp_connections` is how many connections are made to a peer, at most 16, over which large
        transfers are striped. `tls` encrypts all of them with TLS 1.3 and has both sides show
        certificates: `NotFoundError` for a file that is not there, `InvalidError` for one that is of
        no use. `tcp_congestion` is their congestion control, such as "bbr".

        `verbs` has peers reached by RDMA, with libibverbs and a device of this system
        (`UnsupportedError` otherwise), in trusted networks only; `memcpy=False` has agents of this
        process reached as those of other processes are. `prefer` names the ways to peers that go
        first; `copy_threads` is how many threads share a copy of 8 MiB or more within the process.

        `look` is how many seconds those who wait for a transfer or a message look for it before they
        sleep, at most 0.001 and as long as that pays, 50 µs otherwise; with 0 they sleep at once. A
        way to a peer that stands still for `slow_after` seconds is left for another one, where what
        moves can be repeated; None: never. `connect_within` is how many seconds each way to a peer
        may take to connect, and over RDMA and UCX the peer to hand out a region, at most 60; ways
        are tried one after the other.

        `object_stores` are known by their names to `open_object`. `cuda` has memory of GPUs moved by
        the CUDA driver of this system (`UnsupportedError` otherwise, with the reason; `cuda_probe`
        tells it without an agent).
        """

    @property
    def name(self) -> str:
        """How peers know it."""

    @property
    def tcp_address(self) -> Optional[str]:
        """The "ip:port" that it listens on; None without TCP."""

    def register(self, memory: object, *, readable: bool = True, writable: bool = False) -> Region:
        """Registers the memory of an object with a contiguous buffer (bytearray, mmap, numpy
        array), or of a contiguous torch tensor on the CPU, and keeps it alive until the region is
        deregistered. `readable` and `writable` say what peers may do.

        A tensor's storage must not be resized meanwhile: unlike a buffer it cannot be locked.
        `UnsupportedError` for a tensor of another device, `DeniedError` for `writable` over
        read-only memory.
        """

    def register_address(
        self,
        address: int,
        len: int,
        *,
        readable: bool = True,
        writable: bool = False,
        keep: object = None,
    ) -> Region:
        """Registers `len` bytes at `address` of this process.

        The caller promises that they are mapped, readable and writable until the region is
        deregistered: `keep` is an object to be kept alive until then. A wrong address ends the
        process, or damages its memory.
        """

    def register_range(
        self,
        address: int,
        len: int,
        *,
        readable: bool = True,
        writable: bool = False,
        keep: Optional[object] = None,
    ) -> Region:
        """As `register_address`, for memory that is registered piece by piece, such as a pool and
        the tensors in it: what lies in a range that was registered in this way, and still is, with
        the same permissions, shares its region (`Region.id`, and `Region.offset` in it). Its
        memory is let go when all that share it are deregistered.
        """

    def register_device(
        self,
        memory: object,
        *,
        device: Optional[int] = None,
        readable: bool = True,
        writable: bool = False,
    ) -> Region:
        """Registers memory of a GPU, and keeps the object alive until the region is deregistered: a
        contiguous array that has `__dlpack__` (torch, CuPy, JAX) or `__cuda_array_interface__`, or a
        DLPack capsule, whose tensor nobody else may take then. `device` is the GPU's number in this
        process for those of the second kind, which do not tell it; 0 otherwise.

        Transfers move it from and to host memory of this agent, and within the GPU; they begin at
        once: what computes the bytes must be done before. `readable` and `writable` say what peers
        may do: on the same machine they open it, from others they reach it over network cards, or
        through host memory of this agent. `UnsupportedError`
        for memory of other devices, without CUDA, and for an agent without `cuda`; `InvalidError`
        for what the driver does not know as memory of this GPU.
        """

    def register_device_address(
        self,
        device: int,
        address: int,
        len: int,
        *,
        readable: bool = True,
        writable: bool = False,
        keep: object = None,
    ) -> Region:
        """The same of `len` bytes at `address` of the GPU with this number, which the caller promises
        to leave allocated and mapped until the region is deregistered: `keep` is an object to be kept
        alive until then. The driver is asked whether all of it is there.
        """

    def assume_cost(self, backend: str, *, latency: float, bytes_per_second: int) -> None:
        """What a way such as "tcp" is taken to cost in `Transfer.estimate` until transfers have
        shown it: seconds for one that moves next to nothing, and the bandwidth of long ones.
        """

    def shared_memory(self, len: int, *, readable: bool = True, writable: bool = False) -> Region:
        """Allocates zeroed memory that peers on this host can map, and registers it."""

    def register_file(self, fd: int, *, readable: bool = True, writable: bool = False) -> Region:
        """Registers shared memory that someone else made, so that peers on this host can map it:
        all of a memfd whose size is sealed (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL). It is mapped
        anew; the descriptor may be closed afterwards. `InvalidError` for any other file.
        """

    def open_file(
        self,
        path: Union[str, "os.PathLike[str]"],
        *,
        len: Optional[int] = None,
        create: bool = False,
        read_only: bool = False,
        preallocate: bool = False,
        direct: Optional[bool] = None,
    ) -> Region:
        """Opens a file as a region, for the remote side of transfers without a peer. `len` is its
        length as a region, to which a shorter file is extended; its length now otherwise.
        `preallocate` reserves the space at once, so that a full disk shows here (`NoSpaceError`).
        With `direct` the page cache is passed by, or `UnsupportedError`; with False it never is,
        otherwise where file system and alignment allow it.
        """

    def start_files(self, engine: str = "auto") -> str:
        """Starts what reads and writes files, unless a file was opened before: "io_uring",
        "threads", or the first and where the system refuses it the second. Says how it talks to the
        system, and why.
        """

    def open_object(self, store: str, key: str, *, when_there: str = "replace") -> Region:
        """An object of one of the agent's `object_stores` as a region, for the remote side of
        transfers without a peer; it need not be there. A write puts the whole object, so its ranges
        must cover it from 0 on without a gap; a read gets ranges. When the object is there a write
        replaces it, or with "create" fails with `DeniedError`, or with "keep" is done without
        sending anything if it is of the same size. The region's `len` is more than any object has,
        because only the store can tell; `len()` of it is an `OverflowError`.
        """

    def remove_object(self, store: str, key: str, timeout: float = 30.0) -> None:
        """Removes an object; that there is none is fine. After `DeadlineError` it may still be
        removed.
        """

    def metadata(self) -> bytes:
        """What peers need to reach this agent and the regions that it exports now, keys
        included.
        """

    def metadata_of(self, regions: Sequence[Region]) -> bytes:
        """The same of these regions alone. A peer that has loaded metadata of this agent before
        keeps the regions that it knows: so regions can be added, or shown to some peers only.
        """

    def load_peer(self, metadata: bytes) -> Peer:
        """Learns of a peer from its metadata, or what is new about one."""

    def prepare(self, descriptors: _Descriptors, peer: Optional[Peer] = None) -> Prepared:
        """Checks ranges once, for any number of requests: of own regions, or of the peer's if one
        is given.

        `descriptors` is a sequence of (region, offset, length), or rows of 64-bit integers in a
        C-contiguous buffer such as a numpy array: N×3 (region number, offset, length), or N×5
        (region number, offset, length, stride, count), where a row stands for `count` ranges,
        `stride` bytes from one's start to the next one's. `InvalidError` names the row.
        """

    def request(
        self,
        operation: Literal["read", "write"],
        local: Prepared,
        remote: Prepared,
        *,
        local_positions: Optional[_Integers] = None,
        remote_positions: Optional[_Integers] = None,
        notification: Optional[bytes] = None,
        deadline: float = 30.0,
        parts: Optional[Sequence[int]] = None,
        background: bool = False,
        checksum: bool = False,
        backends: Optional[Sequence[str]] = None,
    ) -> Transfer:
        """Makes a transfer of the ranges of both lists, paired in order, without posting it. It can
        be posted any number of times, one after the other.

        With positions only those ranges of a list take part, in their order. "read" moves bytes
        from `remote` to `local`, "write" the other way. `notification` is delivered to the peer
        once all bytes are there. `deadline` is counted from each post. Connects to the peer if
        there is no connection.

        `parts` says how many ranges each part has, such as those of a layer: parts move in order,
        and each can be waited for with `Transfer.wait_part`. What is in the `background`, such as
        an offload, gives way to other transfers.

        With `checksum` the CRC-32C of each range is compared, in the memory where it was and in
        that where it arrived, before the transfer counts as done: `CorruptError` names the range
        that differs. `backends` are the ways that may be used, such as ["shm"]; all if there are
        none.
        """

    def set_rate(
        self,
        bytes_per_second: Optional[int],
        *,
        background: bool = False,
        peer: Optional[Peer] = None,
    ) -> None:
        """Limits how fast transfers move, or no longer (None): those with a peer, if one is given,
        else all in the `background`, or all others. For what is made from now on.
        """

    def read(
        self,
        local: Sequence[_Local],
        peer: Optional[Peer],
        remote: Sequence[_Remote],
        *,
        notification: Optional[bytes] = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Starts to move bytes from `remote` ranges into `local` ones, which pair in order."""

    def write(
        self,
        local: Sequence[_Local],
        peer: Optional[Peer],
        remote: Sequence[_Remote],
        *,
        notification: Optional[bytes] = None,
        deadline: float = 30.0,
    ) -> Transfer:
        """Starts to move bytes from `local` ranges into `remote` ones, which pair in order."""

    def notify(self, peer: Peer, message: bytes, timeout: float = 30.0) -> None:
        """Sends a message and waits, at most `timeout` seconds, until the peer's agent has taken
        it.
        """

    def notifications(self, timeout: float = 0.0) -> List[Tuple[str, bytes]]:
        """Takes the messages that wait, oldest first, as (peer name, bytes); waits for one at
        most `timeout` seconds.
        """

    def notification_fileno(self) -> int:
        """A file descriptor that is readable while a message waits: for poll, select and event
        loops, which must neither read nor close it. It lives as long as the agent.
        """

@final
class Peer:
    """Another agent, as its metadata describes it."""

    @property
    def name(self) -> str:
        """Its agent's name."""

    @property
    def regions(self) -> Dict[int, int]:
        """The regions that it exported: their sizes in bytes, by number."""

    @property
    def path(self) -> Optional[str]:
        """The backend that bytes to it go through, such as "shm"; None if it cannot be reached.
        Connects if need be.
        """

    def explain_path(self) -> str:
        """Why that path was taken, and what kept better ones from being used, as a sentence."""

    def forget(self) -> None:
        """Ends the connections to it and forgets it; transfers in flight fail with
        `PeerLostError`.
        """

@final
class Region:
    """Memory that transfers may name. It is let go when the region is deregistered."""

    @property
    def id(self) -> int:
        """The number that names the region in descriptors, here and at peers."""

    @property
    def offset(self) -> int:
        """Where it begins in the region that `id` names: 0, except of `Agent.register_range`.
        Descriptors with this object count from here, those with the number from the region's start.
        """

    @property
    def address(self) -> int:
        """Where it begins in this process; 0 for files and objects."""

    @property
    def len(self) -> int:
        """Its size in bytes; the same as `len()` of it."""

    def __len__(self) -> int: ...
    def view(self) -> memoryview:
        """The memory as a writable memoryview, which keeps it mapped; only of
        `Agent.shared_memory` and `Agent.register_file`.
        """

    def sync(self, timeout: float = 30.0) -> None:
        """Has everything that was written to a file before brought to its device. `DeadlineError`
        when it is not there after `timeout` seconds, `UnsupportedError` when it is no file.
        """

    def deregister(self, timeout: float = 30.0) -> None:
        """Refuses new transfers over the region at once, waits for those in flight, and lets the
        memory go. `BusyError` when some are still in flight after `timeout` seconds: the memory
        is kept, call again.
        """

@final
class Prepared:
    """Checked ranges, for any number of requests. It keeps the memory of its regions alive."""

    def __len__(self) -> int:
        """How many ranges there are; one N×5 row counts as many as it stands for."""

    @property
    def bytes(self) -> int:
        """Bytes of all ranges together."""

@final
class Transfer:
    """Bytes on their way. Its regions are kept alive until it is finished, also when it is
    dropped before. `await` waits for it without a thread.
    """

    def post(
        self,
        notification: Optional[_Bytes] = None,
        *,
        after: Optional[Any] = None,
        device: Optional[int] = None,
    ) -> None:
        """Starts it; small copies within this host are finished when this returns.
        `notification` replaces the one that was given before. `BusyError` while it is in flight,
        or while work of a failed post may still land.

        With `after`, nothing of it moves before the GPU has done all that this stream was given so
        far: an object with `__cuda_stream__` or `cuda_stream`, such as a `torch.cuda.Stream`, or a
        handle; 0 and 1 are the default stream, 2 the calling thread's. `device` is the number of its
        device, for those without `device_index`. Nothing but the GPU waits. `UnsupportedError` for a
        transfer without memory of a GPU, and for a stream that is captured into a graph. The stream
        must live, and no capture begin on it, during the call.
        """

    def order_stream(
        self,
        stream: Any,
        part: Optional[int] = None,
        timeout: float = 30.0,
        *,
        device: Optional[int] = None,
    ) -> None:
        """Has a stream, as in `post`, wait for a part, counted from 0, or for all: what it is given
        after this call is done after the copies. Waits until these are queued, at most `timeout`
        seconds, not until they are made.

        After a success the stream goes on whatever becomes of the transfer, and finds the bytes in
        memory of the GPU. When this raises, the stream waits for nothing: do not use the part. Memory
        of the host is in place when `wait_part` says so.
        """

    @property
    def state(self) -> Literal["idle", "in_flight", "done", "failed"]:
        """Where the last post stands; "idle" before the first."""

    @property
    def error(self) -> Optional[KvfabricError]:
        """Why the last post failed."""

    @property
    def telemetry(self) -> Optional[Telemetry]:
        """How the last finished post went; None before."""

    def estimate(self) -> Estimate:
        """What a post would take now, by what others took, and which way it would go. Connects to
        the peer if there is no connection.
        """

    @property
    def bytes(self) -> int:
        """Bytes that it moves."""

    def wait(self, timeout: float = 30.0) -> None:
        """Waits until it is finished, at most `timeout` seconds, and raises why it failed.
        `DeadlineError` also when `timeout` ran out, which does not end the transfer: `done()`
        tells the two apart.
        """

    @property
    def parts(self) -> int:
        """How many parts it has, at least one."""

    def wait_part(self, part: int, timeout: float = 30.0) -> None:
        """Waits until all bytes of a part, counted from 0, are in place, at most `timeout` seconds,
        and raises why the transfer failed before. `DeadlineError` also when `timeout` ran out.
        """

    def done(self) -> bool:
        """Whether it is finished, successfully or not."""

    def cancel(self) -> None:
        """Asks it to end: it fails with `CancelledError` now, unless it is finished."""

    def settled(self, timeout: float = 0.0) -> bool:
        """Whether its memory may be used again: not while work may still land, even after it has
        failed. Waits for that at most `timeout` seconds.
        """

    def fileno(self) -> int:
        """A file descriptor that is readable while the last post is finished: for poll, select
        and event loops, which must neither read nor close it. It lives as long as the transfer.
        """

    def __await__(self) -> Generator[Any, None, None]: ...

@final
class Node:
    """One pod's tiers, fabric and connection to the index. Safe to use from any thread."""

    def __new__(
        cls,
        config: Union[Mapping[str, object], str, os.PathLike[str]],
        *,
        overrides: Optional[Mapping[str, object]] = None,
    ) -> Node:
        """Opens everything: the agent, the tiers (with what the disk still holds), the peer service
        and the registration with the index.

        `config` is a nested mapping with the keys of docs/configuration.md, or the path of a TOML
        file; `overrides` go over it, with dotted keys such as "host.bytes". Anything wrong is an
        error that names the key or the address.
        """

    @property
    def pod(self) -> str:
        """The name by which routers and peers know this pod."""

    @property
    def agent(self) -> Agent:
        """The fabric: where an engine registers its memory."""

    @property
    def peer_address(self) -> Optional[str]:
        """The "ip:port" at which peers ask; None without a peer service."""

    @property
    def metrics_address(self) -> Optional[str]:
        """The "ip:port" at which Prometheus scrapes; None without."""

    def pages(self, segments: Sequence[Tuple[Region, int, int, int]], blocks: int) -> Pages:
        """Describes an engine's pool of `blocks` blocks: its segments, each (region, offset,
        stride, length) for the bytes [offset + b * stride, + length) of block number b. A
        block's bytes are its segments one after the other. The regions are of `Node.agent`.
        """

    def prefix(self, *, lora: str = "", cache_salt: str = "") -> Prefix:
        """An empty sequence of blocks, to be extended by tokens. Sequences with another adapter
        or salt never share a block.
        """

    def prefix_of(self, names: bytes, *, adapter_identity: Optional[bytes] = None) -> Prefix:
        """The blocks that an engine names by its own hashes: what `NameChain.pack` or `pack_hashes`
        made. `adapter_identity` is 32 bytes that stand for the adapter's weights. The names must be of
        the node's `[engine]`, and only hashes that cannot collide or change from run to run are
        taken: else `InvalidError` or `UnsupportedError`.
        """

    def store(
        self,
        prefix: Prefix,
        pages: Pages,
        blocks: _Integers,
        *,
        first: int = 0,
        deadline: float = 30.0,
    ) -> Operation[StoreReport]:
        """Copies blocks out of the engine's memory into the tiers: `blocks` are numbers in
        `pages`, for the positions of `prefix` from `first` on. Their memory must stay as it is
        until the operation is done.
        """

    def hbm_open(self, memory: object, *, device: Optional[int] = None) -> None:
        """Opens the HBM tier in memory of a GPU: an array there, as `Agent.register_device` takes
        it, or a number of bytes, which are allocated on `device` (0 if it is not given). The
        array's content is lost, and it is kept until `hbm_close`. From then on `fetch` looks there
        first, and the index is told of what is there. The settings `hbm.bytes` and `hbm.device` do
        the same when the node is opened. `UnsupportedError` without the setting `fabric.cuda`.
        """

    def hbm_promote(
        self,
        prefix: Prefix,
        *,
        first: int = 0,
        count: Optional[int] = None,
        deadline: float = 5.0,
    ) -> Operation[PromoteReport]:
        """Brings `count` blocks of `prefix` (all, if it is not given), from position `first` on, up
        into the HBM tier, from wherever they are. Those that nobody has wanted for the longest time
        make room, and go down into the other tiers if those do not have them.
        """

    def hbm_store(
        self,
        prefix: Prefix,
        pages: Pages,
        blocks: _Integers,
        *,
        first: int = 0,
        deadline: float = 30.0,
    ) -> Operation[StoreReport]:
        """As `store`, into the HBM tier, within the GPU; the other tiers get a block when it leaves
        its slot. Where the GPU does not compute checksums, and for other memory, blocks are stored
        in the other tiers and promoted.
        """

    def hbm_offload(
        self,
        prefix: Prefix,
        *,
        first: int = 0,
        count: Optional[int] = None,
        deadline: float = 30.0,
    ) -> Operation[StoreReport]:
        """Takes `count` blocks of `prefix` (all, if it is not given), from position `first` on, out
        of the HBM tier, down into the others. Those that find no room stay up.
        """

    def hbm_close(self, timeout: float = 30.0) -> None:
        """Ends the HBM tier: what is only there is lost, and the index is told. An array that was
        lent is let go of. `DeadlineError` when something still uses the memory: call it again.
        """

    def fetch(
        self,
        prefix: Prefix,
        pages: Pages,
        blocks: _Integers,
        *,
        first: int = 0,
        holders: Sequence[Tuple[str, int, Optional[str]]] = (),
        shared: Sequence[Tuple[int, int]] = (),
        deadline: float = 5.0,
    ) -> Operation[FetchReport]:
        """Brings blocks into the engine's memory, from wherever they are: `blocks` are numbers
        in `pages`, for the positions of `prefix` from `first` on. `holders` and `shared` are
        hints as in `Reach`, with depths and positions counted from the first block of `prefix`;
        without any, the index is asked. The memory must not be used until the operation is done;
        blocks before the report's `depth` hold verified bytes then, others any.
        """

    def locate(self, prefix: Prefix, *, deadline: float = 0.5) -> Operation[Reach]:
        """How many blocks from the first could be had, and where: own tiers, shared objects and
        peers.
        """

    def held(self, prefix: Prefix) -> Operation[Held]:
        """How many blocks from the first this node's own tiers hold."""

    def pin(
        self, prefix: Prefix, *, first: int = 0, ttl: float = 30.0, id: Optional[int] = None
    ) -> Operation[Pin]:
        """Keeps blocks of this node, from position `first` of `prefix` on, in host memory until
        `unpin`, at most `ttl` seconds.

        `id` is the pin's number, below 2^64; without it the node draws one. Whoever is told it
        beforehand may `unpin` the blocks, even before they are pinned: the depth is 0 then. Draw it
        at random, and use it once; `InvalidError` for the number of a pin that is in force.
        """

    def unpin(
        self,
        pin: int,
        *,
        at: Optional[str] = None,
        deadline: float = 2.0,
    ) -> Operation[None]:
        """Lets go of what this node pinned, or the node whose peer service is at "ip:port" `at`;
        nothing happens for a pin that is over. `DeniedError` from a node of another model.
        """

    def remove(self, prefix: Prefix) -> Operation[Removed]:
        """Removes the blocks of `prefix` from this node's own tiers, and tells the index. Shared
        objects stay, and so do blocks that somebody uses.
        """

    def clear(self) -> Operation[Removed]:
        """Removes all blocks from this node's own tiers, as `remove` does."""

    def flush(self, deadline: float = 30.0) -> Operation[None]:
        """Waits until what is on its way to the disk and to the shared store is there."""

    def stats(self) -> Dict[str, int]:
        """The tiers' counters and levels, by name; docs/metrics.md explains each."""

    def shutdown(self, deadline: float = 10.0) -> None:
        """Stops leasing, withdraws what was announced, and writes down to the disk what only host
        memory has, the most recently used blocks first, as far as there is room and `deadline`
        seconds allow: what a restart finds again. `DeadlineError` when not all of it was written.
        Everything asked afterwards fails with `CancelledError`; doing it twice is fine.
        """

@final
class Pages:
    """An engine's pool of blocks. It keeps its regions."""

    def __len__(self) -> int:
        """How many blocks."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all segments together."""

@final
class Prefix:
    """The blocks of a token sequence from its first on, as a node names them."""

    def extend(self, tokens: _Integers) -> int:
        """Goes on with more tokens and returns how many full blocks there are; what does not
        fill a block waits for more. `UnsupportedError` for a prefix of `Node.prefix_of`, which
        has no tokens.
        """

    def __len__(self) -> int:
        """How many full blocks."""

    def key(self, position: int) -> bytes:
        """The data key of the block at `position`: 32 bytes that name its content and where it
        belongs.
        """

@final
class Operation(Generic[_T]):
    """Something that a node does. It goes on, and is not lost, when this object is dropped.
    `await` waits for it without a thread.
    """

    def done(self) -> bool:
        """Whether it is finished, successfully or not."""

    def wait(self, timeout: float = 30.0) -> _T:
        """Its result, for which this waits at most `timeout` seconds; raises why it failed.
        `DeadlineError` also when `timeout` ran out, which does not end it: `done()` tells the
        two apart. May be called again.
        """

    def fileno(self) -> int:
        """A file descriptor that is readable once it is done: for poll, select and event loops,
        which must neither read nor close it. It lives as long as this object.
        """

    def __await__(self) -> Generator[Any, None, _T]: ...

@final
class FetchReport:
    """What became of the blocks of a fetch."""

    @property
    def depth(self) -> int:
        """How many blocks from the first are there, verified."""

    @property
    def sources(self) -> List[Literal["hbm", "dram", "nvme", "peer", "object", "miss"]]:
        """Where each block came from."""

    @property
    def unsettled(self) -> List[int]:
        """Positions, in the `blocks` of the fetch, whose memory may still be written to."""

    def drained(self, timeout: float = 0.0) -> bool:
        """Whether nothing writes to the memory of `unsettled` blocks any more. Waits for that at
        most `timeout` seconds.
        """

@final
class NameChain:
    """Names the blocks of one sequence as an engine hashes them, in a form that any node
    understands. Needs no node.
    """

    def __new__(
        cls,
        scheme: str,
        model: str,
        block_tokens: int,
        *,
        lora: str = "",
        cache_salt: str = "",
        adapter_identity: Optional[bytes] = None,
    ) -> NameChain:
        """`scheme` is the indexer's key scheme, such as "xxh3:1337"; `model` the name that the
        index knows the model by.
        """

    def extend(self, tokens: _Integers, hashes: Sequence[bytes]) -> int:
        """Appends full blocks: exactly their tokens, and the engine's hash of each; returns how many
        blocks there are. All hashes are of one length.
        """

    def pack(self, start: int, stop: int) -> bytes:
        """The names of the blocks at positions [start, stop): what `Node.prefix_of` and
        `PeerService.locate` take.
        """

    def __len__(self) -> int:
        """How many full blocks."""

@final
class PeerService:
    """A connection to a node's peer service, for who has no node: a scheduler that asks what a
    worker's node could get.
    """

    def __new__(cls, address: str, *, deadline: float = 2.0) -> PeerService:
        """Connects on first use to the node at "ip:port". `deadline` seconds bound connecting,
        and each call that names none.
        """

    def locate(self, names: bytes, *, deadline: Optional[float] = None) -> Operation[Reach]:
        """As `Node.locate` there, for blocks that `NameChain.pack` named. `UnsupportedError`
        from a node without `[engine]`.
        """

    def unpin(
        self,
        pin: int,
        model_identity: str,
        *,
        deadline: Optional[float] = None,
    ) -> Operation[None]:
        """As `Node.unpin` there; `model_identity` is that node's, 64 hexadecimal digits."""

@final
class Index:
    """A connection to an index."""

    def __new__(cls, address: str, *, deadline: float = 2.0) -> Index:
        """Connects to the index at "host:port". `deadline` seconds bound this, and each lookup
        that names none.
        """

    def lookup(
        self,
        tokens: Sequence[int],
        *,
        model: str = "",
        lora: str = "",
        cache_salt: str = "",
        pods_max: int = 0,
        deadline: Optional[float] = None,
    ) -> List[PodDepth]:
        """Asks who holds the blocks of a prompt, deepest first; a tail that does not fill a
        block is ignored.
        """

@final
class PodDepth:
    """What one pod holds of a prompt."""

    @property
    def pod(self) -> str:
        """The pod's name."""

    @property
    def depth(self) -> int:
        """Blocks from the first, without a hole, in tiers that the pod reaches by itself."""

    @property
    def by_tier(self) -> Tuple[int, int, int, int]:
        """For how many of those each tier is the fastest: accelerator, host memory, local disk,
        object store.
        """

    @property
    def score(self) -> float:
        """The sum of weight times `by_tier`, with the index's weights."""

    @property
    def peer_address(self) -> Optional[str]:
        """Where its peer service listens, if it has one."""

def pack_hashes(root: bytes, hashes: Sequence[bytes]) -> bytes:
    """Names blocks of which only the engine's hashes are known, each of them by itself: what
    `Node.prefix_of` and `PeerService.locate` take. All hashes are of one length.

    The index finds such a block by its hash and by `root`, which stands for whatever else shapes
    its bytes. Routers ask by tokens and do not find it: give such nodes a model name of their own.
    """

def model_identity(
    path: Union[str, os.PathLike[str], None],
    *,
    element: str,
    quantisation: str = "",
    layout: str,
    attributes: Optional[Mapping[str, str]] = None,
    name: Optional[str] = None,
) -> str:
    """What stands for all that shapes the bytes of a model's blocks, as 64 hexadecimal digits: a
    node's `model_identity`.

    From a model's folder: a hub snapshot's commit, else the hash of the weight files (remembered in
    $XDG_CACHE_HOME/kvfabric), else the operator's `name`. `element` is the KV cache's type, such as
    "bfloat16"; `layout` and `attributes` name whatever else shapes bytes. `InvalidError` or
    `NotFoundError` when there is nothing to derive it from.
    """
