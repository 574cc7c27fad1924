"""An agent's metadata: kvfabric's own, in an envelope that adds the addresses that NIXL's callers name memory by."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

from ._errors import nixlMismatchError

_MAGIC = b"KVFNIXL\0"
_VERSION = 1
# Magic, version, length of the name, number of ranges, length of the inner metadata.
_HEAD = struct.Struct("<8sHHII")
_CHECKSUM = struct.Struct("<I")
_ROW_BYTES = 32

_REAL_NIXL = b"nixlSerDes|"


class Card(NamedTuple):
    """What a peer says of itself."""

    name: str
    ranges: np.ndarray
    """Rows of (address, length, device, region number)."""
    inner: bytes
    """For `kvfabric.Agent.load_peer`."""

    def encode(self) -> bytes:
        """The envelope's bytes."""
        name = self.name.encode()
        head = _HEAD.pack(_MAGIC, _VERSION, len(name), len(self.ranges), len(self.inner))
        body = b"".join([head, name, self.ranges.astype("<u8").tobytes(), self.inner])
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @staticmethod
    def decode(metadata: bytes) -> "Card":
        """Reads an envelope; `nixlMismatchError` says what else it is."""
        if metadata.startswith(_REAL_NIXL):
            raise nixlMismatchError(
                "the metadata is of an agent of the real NIXL (it starts with 'nixlSerDes|'); kvfabric's stand-in"
                " does not speak its protocol: install kvfabric-nixl, or the real NIXL, on both sides"
            )
        if len(metadata) < _HEAD.size + _CHECKSUM.size or not metadata.startswith(_MAGIC):
            raise nixlMismatchError(
                f"{len(metadata)} bytes that start with {metadata[:12]!r} are no agent metadata of kvfabric"
            )
        body, checksum = metadata[: -_CHECKSUM.size], metadata[-_CHECKSUM.size :]
        if zlib.crc32(body) != _CHECKSUM.unpack(checksum)[0]:
            raise nixlMismatchError("the agent metadata is damaged: its checksum is wrong")
        _, version, name_bytes, count, inner_bytes = _HEAD.unpack_from(body)
        if version != _VERSION:
            raise nixlMismatchError(
                f"agent metadata of version {version}; this build reads version {_VERSION}"
            )
        names_end = _HEAD.size + name_bytes
        ranges_end = names_end + count * _ROW_BYTES
        if ranges_end + inner_bytes != len(body):
            raise nixlMismatchError(
                f"agent metadata of {len(body)} bytes says that it has {ranges_end + inner_bytes}"
            )
        try:
            name = body[_HEAD.size : names_end].decode()
        except UnicodeDecodeError:
            raise nixlMismatchError("the name in the agent metadata is not UTF-8") from None
        rows = np.frombuffer(body, "<u8", count * 4, names_end).reshape(count, 4)
        _check(rows)
        return Card(name, rows.astype(np.uint64), body[ranges_end:])


def _check(rows: np.ndarray) -> None:
    """No range may wrap around the end of the address space: the search relies on it."""
    wraps = rows[:, 0] + rows[:, 1] < rows[:, 0]
    if wraps.any():
        address, length = rows[int(np.argmax(wraps)), :2]
        raise nixlMismatchError(f"agent metadata with a range of {length} bytes at {address:#x}")
