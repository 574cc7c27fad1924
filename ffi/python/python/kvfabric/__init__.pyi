from typing import ClassVar, List, Mapping, Optional, Sequence, Tuple, Union, final

__version__: str

# A range of an own region: (region, offset, length). A peer's region goes by its number.
_Local = Tuple["Region", int, int]
_Remote = Tuple[Union["Region", int], int, int]

class KvfabricError(Exception):
    """What every error of this package is; the classes below it have their number as `code`, the same as in C."""

class InvalidError(KvfabricError):
    code: ClassVar[int]

class BusyError(KvfabricError):
    code: ClassVar[int]

class CorruptError(KvfabricError):
    code: ClassVar[int]

class PeerLostError(KvfabricError):
    code: ClassVar[int]

class UnsupportedError(KvfabricError):
    code: ClassVar[int]

class DeadlineError(KvfabricError):
    code: ClassVar[int]

class CancelledError(KvfabricError):
    code: ClassVar[int]

class VersionError(KvfabricError):
    code: ClassVar[int]

class NoSpaceError(KvfabricError):
    code: ClassVar[int]

class DeniedError(KvfabricError):
    code: ClassVar[int]

class PoisonedError(KvfabricError):
    code: ClassVar[int]

class NotFoundError(KvfabricError):
    code: ClassVar[int]

class IoError(KvfabricError):
    code: ClassVar[int]

class ForkedError(KvfabricError):
    code: ClassVar[int]

class InternalError(KvfabricError):
    code: ClassVar[int]

@final
class Agent:
    """Moves bytes between registered memory of this process and its peers. Safe to use from any thread."""

    def __init__(self, name: str, *, shm: bool = True, tcp: Optional[str] = None) -> None: ...
    @property
    def name(self) -> str: ...
    def register(self, memory: object, *, readable: bool = True, writable: bool = False) -> Region: ...
    def shared_memory(self, len: int, *, readable: bool = True, writable: bool = False) -> Region: ...
    def metadata(self) -> bytes: ...
    def load_peer(self, metadata: bytes) -> Peer: ...
    def read(
        self,
        local: Sequence[_Local],
        peer: Optional[Peer],
        remote: Sequence[_Remote],
        *,
        notification: Optional[bytes] = None,
        deadline: float = 30.0,
    ) -> Transfer: ...
    def write(
        self,
        local: Sequence[_Local],
        peer: Optional[Peer],
        remote: Sequence[_Remote],
        *,
        notification: Optional[bytes] = None,
        deadline: float = 30.0,
    ) -> Transfer: ...
    def notify(self, peer: Peer, message: bytes, timeout: float = 30.0) -> None: ...
    def notifications(self, timeout: float = 0.0) -> List[Tuple[str, bytes]]: ...

@final
class Peer:
    """Another agent, as its metadata describes it."""

    @property
    def name(self) -> str: ...
    @property
    def regions(self) -> Mapping[int, int]: ...
    @property
    def path(self) -> Optional[str]: ...
    def explain_path(self) -> str: ...
    def forget(self) -> None: ...

@final
class Region:
    """Memory that transfers may name. It is let go when the region is deregistered."""

    @property
    def id(self) -> int: ...
    def __len__(self) -> int: ...
    def view(self) -> memoryview: ...
    def deregister(self, timeout: float = 30.0) -> None: ...

@final
class Transfer:
    """Bytes on their way. Its regions are kept alive until it is finished, also when it is dropped before."""

    def wait(self, timeout: float = 30.0) -> None: ...
    def done(self) -> bool: ...
    def cancel(self) -> None: ...
    def settled(self, timeout: float = 0.0) -> bool: ...

@final
class Index:
    """A connection to an index."""

    def __init__(self, address: str, *, deadline: float = 2.0) -> None: ...
    def lookup(
        self,
        tokens: Sequence[int],
        *,
        model: str = "",
        lora: str = "",
        cache_salt: str = "",
        pods_max: int = 0,
        deadline: Optional[float] = None,
    ) -> List[PodDepth]: ...

@final
class PodDepth:
    """What one pod holds of a prompt."""

    @property
    def pod(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def by_tier(self) -> Tuple[int, int, int, int]: ...
    @property
    def score(self) -> float: ...
    @property
    def peer_address(self) -> Optional[str]: ...
