"""Descriptor lists, and how they are serialised."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

import numpy as np

from ._constants import nixl_mem_t
from ._errors import nixlInvalidParamError, nixlMismatchError, nixlNotFoundError

# Magic, version, kind of list, kind of memory, one byte for later, count.
_HEAD = struct.Struct("<4sBBBxI")
_MAGIC = b"KVFD"
_VERSION = 1
_LENGTH = struct.Struct("<I")
_CHECKSUM = struct.Struct("<I")
_ROW_BYTES = 24
_BITS_64 = 1 << 64


def rows_of(array: np.ndarray, columns: int) -> np.ndarray:
    """The array as rows of unsigned 64-bit numbers; `ValueError` if it is of another shape or type."""
    if array.ndim != 2 or array.shape[1] != columns or array.dtype not in (np.uint64, np.int64):
        raise ValueError(f"descs must be a Nx{columns} numpy array of uint64 or int64")
    return np.ascontiguousarray(array).view(np.uint64)


class _DList:
    """Descriptors of one kind of memory: (address, length, device) each, perhaps with something more."""

    __slots__ = ("_type", "_rows", "_extras")
    __hash__ = None  # type: ignore[assignment]

    KIND: int
    COLUMNS = 3

    def __init__(
        self,
        type: nixl_mem_t,
        descs: Union[Sequence[Tuple[Any, ...]], np.ndarray, int] = 0,
        *,
        init_size: int = 0,
    ) -> None:
        if not isinstance(type, nixl_mem_t):
            raise TypeError(f"type must be a nixl_mem_t, not {type!r}")
        self._type = type
        self._extras: List[Any] = []
        if isinstance(descs, np.ndarray):
            self._rows = rows_of(descs, 3).copy()
            self._extras = [self._no_extra()] * len(self._rows)
        elif isinstance(descs, int):
            count = init_size or descs
            self._rows = np.zeros((count, 3), np.uint64)
            self._extras = [self._no_extra()] * count
        else:
            self._fill(descs)

    def _fill(self, descs: Sequence[Tuple[Any, ...]]) -> None:
        for desc in descs:
            if not isinstance(desc, tuple):
                raise TypeError("Each descriptor must be a tuple when provided as a list")
            if len(desc) != self.COLUMNS:
                raise ValueError(f"Each descriptor tuple must have exactly {self.COLUMNS} elements")
        self._rows = np.empty((len(descs), 3), np.uint64)
        for position, desc in enumerate(descs):
            self._rows[position] = _numbers(desc)
        self._extras = [self._extra(desc) for desc in descs]

    def _no_extra(self) -> Any:
        return None

    def _extra(self, desc: Tuple[Any, ...]) -> Any:
        return None

    @property
    def rows(self) -> np.ndarray:
        """Addresses, lengths and devices; not to be written to."""
        return self._rows

    @property
    def extras(self) -> List[Any]:
        """What a descriptor has besides."""
        return self._extras

    def getType(self) -> nixl_mem_t:
        """The kind of memory."""
        return self._type

    def descCount(self) -> int:
        """How many descriptors."""
        return len(self._rows)

    def isEmpty(self) -> bool:
        """Whether there are none."""
        return len(self._rows) == 0

    def __getitem__(self, position: int) -> Tuple[Any, ...]:
        if not 0 <= position < len(self._rows):
            raise IndexError(f"descriptor {position} of {len(self._rows)}")
        numbers = tuple(int(number) for number in self._rows[position])
        return numbers if self.COLUMNS == 3 else (*numbers, self._extras[position])

    def __setitem__(self, position: int, desc: Tuple[Any, ...]) -> None:
        if not 0 <= position < len(self._rows):
            raise IndexError(f"descriptor {position} of {len(self._rows)}")
        numbers, extra = _numbers(desc), self._extra(desc)
        self._rows[position] = numbers
        self._extras[position] = extra

    def append(self, desc: Tuple[Any, ...]) -> None:
        """Adds a descriptor."""
        row, extra = np.array([_numbers(desc)], np.uint64), self._extra(desc)
        self._rows = np.concatenate([self._rows, row])
        self._extras.append(extra)

    addDesc = append

    def remDesc(self, position: int) -> None:
        """Removes a descriptor."""
        if not 0 <= position < len(self._rows):
            raise IndexError(f"descriptor {position} of {len(self._rows)}")
        self._rows = np.delete(self._rows, position, axis=0)
        del self._extras[position]

    def clear(self) -> None:
        """Removes all descriptors."""
        self._rows = self._rows[:0]
        self._extras = []

    def index(self, desc: Tuple[Any, ...]) -> int:
        """Where a descriptor is; `nixlNotFoundError` if it is not there."""
        wanted = (*_numbers(desc), self._extra(desc))
        for position in np.flatnonzero((self._rows == np.array(wanted[:3], np.uint64)).all(axis=1)):
            if self._extras[position] == wanted[3]:
                return int(position)
        raise nixlNotFoundError(f"no descriptor {desc!r} in the list")

    def print(self) -> None:
        """Prints the list."""
        print(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return False
        same_kind = self._type == other._type and len(self._rows) == len(other._rows)
        return (
            same_kind and bool((self._rows == other._rows).all()) and self._extras == other._extras
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._type}, {[self[i] for i in range(len(self._rows))]})"

    def __reduce__(self) -> Tuple[Callable[[bytes], "_DList"], Tuple[bytes]]:
        return decode, (encode(self),)


class nixlXferDList(_DList):
    """What a transfer moves: (address, length, device) each."""

    __slots__ = ()
    KIND = 0


class nixlRegDList(_DList):
    """What is registered: (address, length, device, metadata) each."""

    __slots__ = ()
    KIND = 1
    COLUMNS = 4

    def _no_extra(self) -> bytes:
        return b""

    def _extra(self, desc: Tuple[Any, ...]) -> bytes:
        meta = desc[3]
        return meta.encode() if isinstance(meta, str) else bytes(meta)

    def trim(self) -> nixlXferDList:
        """The same ranges without metadata."""
        return nixlXferDList(self._type, self._rows)


class nixlRemoteDList(_DList):
    """Ranges of several agents: (address, length, device, name of the agent) each."""

    __slots__ = ()
    KIND = 2
    COLUMNS = 4

    def _no_extra(self) -> str:
        return ""

    def _extra(self, desc: Tuple[Any, ...]) -> str:
        return str(desc[3])


_BY_KIND: Dict[int, Type[_DList]] = {
    kind.KIND: kind for kind in (nixlXferDList, nixlRegDList, nixlRemoteDList)
}


def _numbers(desc: Tuple[Any, ...]) -> Tuple[int, int, int]:
    numbers = (int(desc[0]), int(desc[1]), int(desc[2]))
    for number in numbers:
        if not 0 <= number < _BITS_64:
            raise nixlInvalidParamError(f"{number} in descriptor {desc!r} is not below 2^64")
    return numbers


def encode(descs: _DList) -> bytes:
    """Serialises a list: a head, the rows, what each row has besides, a CRC-32."""
    parts = [_HEAD.pack(_MAGIC, _VERSION, descs.KIND, descs.getType(), descs.descCount())]
    parts.append(descs.rows.astype("<u8").tobytes())
    if descs.COLUMNS > 3:
        for extra in descs.extras:
            text = extra.encode() if isinstance(extra, str) else extra
            parts += [_LENGTH.pack(len(text)), text]
    body = b"".join(parts)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(serialised: bytes) -> _DList:
    """Reads what :func:`encode` wrote; `nixlMismatchError` for anything else."""
    if len(serialised) < _HEAD.size + _CHECKSUM.size or serialised[:4] != _MAGIC:
        raise nixlMismatchError(
            f"{len(serialised)} bytes that start with {serialised[:8]!r} are no descriptor list of kvfabric"
        )
    body, checksum = serialised[: -_CHECKSUM.size], serialised[-_CHECKSUM.size :]
    if zlib.crc32(body) != _CHECKSUM.unpack(checksum)[0]:
        raise nixlMismatchError("the descriptor list is damaged: its checksum is wrong")
    _, version, kind, memory, count = _HEAD.unpack_from(body)
    if version != _VERSION or kind not in _BY_KIND or memory not in set(nixl_mem_t):
        raise nixlMismatchError(
            f"a descriptor list of version {version}, kind {kind}, memory {memory};"
            f" this build reads version {_VERSION}"
        )
    rest = body[_HEAD.size :]
    if len(rest) < count * _ROW_BYTES:
        raise nixlMismatchError(f"a descriptor list of {count} rows ends after {len(rest)} bytes")
    rows = np.frombuffer(rest, "<u8", count * 3).reshape(count, 3).astype(np.uint64)
    made = _BY_KIND[kind](nixl_mem_t(memory), rows)
    extras = _extras(rest[count * _ROW_BYTES :], count if made.COLUMNS > 3 else 0)
    if extras is None:
        raise nixlMismatchError("a descriptor list ends within its rows' metadata")
    for position, text in enumerate(extras):
        made.extras[position] = (
            text if kind == nixlRegDList.KIND else text.decode("utf-8", "replace")
        )
    return made


def _extras(rest: bytes, count: int) -> Optional[List[bytes]]:
    """The texts that follow the rows, or None if they do not fill the bytes exactly."""
    found, at = [], 0
    for _ in range(count):
        if at + _LENGTH.size > len(rest):
            return None
        (length,) = _LENGTH.unpack_from(rest, at)
        at += _LENGTH.size
        if at + length > len(rest):
            return None
        found.append(rest[at : at + length])
        at += length
    return found if at == len(rest) else None
