"""From absolute addresses to regions: searched for all descriptors of a list at once."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

import numpy as np

from ._errors import nixlNotFoundError

_ONE = np.uint64(1)


class _Device(NamedTuple):
    """The registered ranges of one device, by their start.

    `reach` and `of` hold, for each range, the furthest end among it and those before it, and where that is: whatever
    starts at or before an address and contains the descriptor, that one does too.
    """

    starts: np.ndarray
    bases: np.ndarray
    reach: np.ndarray
    regions: np.ndarray


class Ranges:
    """Registered ranges: rows of (address, length, device, region number). They may overlap."""

    def __init__(self, rows: np.ndarray, owner: str) -> None:
        self.rows = rows
        self._owner = owner
        self._devices: Dict[int, _Device] = {}
        for device in np.unique(rows[:, 2]):
            self._devices[int(device)] = _sorted(rows[rows[:, 2] == device])

    def resolve(self, descs: np.ndarray) -> np.ndarray:
        """Rows of (region, offset, length) for rows of (address, length, device).

        `nixlNotFoundError` names the first descriptor that is not within one registered range.
        """
        bases, room, regions = self._find(descs)
        inside = (room > 0) & (descs[:, 1] <= room)
        self._check(descs, inside, descs[:, 1])
        return np.stack([regions, descs[:, 0] - bases, descs[:, 1]], axis=1)

    def resolve_strided(self, descs: np.ndarray) -> np.ndarray:
        """Rows of (region, offset, length, stride, count) for rows of (address, length, device, stride, count)."""
        lengths, strides, counts = descs[:, 1], descs[:, 3], descs[:, 4]
        bases, room, regions = self._find(descs)
        inside = (room > 0) & (lengths <= room) & (counts > 0) & (strides >= lengths)
        # Divided instead of multiplied, because a product of what callers say could wrap around.
        spare = np.where(inside, room - lengths, 0) // np.maximum(strides, _ONE)
        inside &= np.where(counts > 0, counts - _ONE, 0) <= spare
        self._check(descs, inside, lengths)
        return np.stack([regions, descs[:, 0] - bases, lengths, strides, counts], axis=1)

    def _find(self, descs: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per descriptor: the base of the best range, the bytes from the address to its end (0: none), its region."""
        bases, room, regions = (np.zeros(len(descs), np.uint64) for _ in range(3))
        for device, ranges in self._devices.items():
            mine = np.flatnonzero(descs[:, 2] == device)
            addresses = descs[mine, 0]
            at = np.searchsorted(ranges.starts, addresses, side="right")
            mine, addresses, at = mine[at > 0], addresses[at > 0], at[at > 0] - 1
            reach = ranges.reach[at]
            bases[mine] = ranges.bases[at]
            regions[mine] = ranges.regions[at]
            room[mine] = np.where(addresses < reach, reach - addresses, 0)
        return bases, room, regions

    def _check(self, descs: np.ndarray, inside: np.ndarray, lengths: np.ndarray) -> None:
        if inside.all():
            return
        position = int(np.argmin(inside))
        address, device = int(descs[position, 0]), int(descs[position, 2])
        shape = f"{int(lengths[position])} bytes"
        if descs.shape[1] == 5:
            shape = f"{int(descs[position, 4])} times {shape}, {int(descs[position, 3])} apart,"
        raise nixlNotFoundError(
            f"descriptor {position}: {shape} at {address:#x} of device {device} are not within one"
            f" registered range of {self._owner}"
        )


def _sorted(rows: np.ndarray) -> _Device:
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    ends = rows[:, 0] + rows[:, 1]
    reach = np.maximum.accumulate(ends)
    furthest = np.maximum.accumulate(np.where(ends == reach, np.arange(len(rows)), 0))
    return _Device(rows[:, 0], rows[furthest, 0], reach, rows[furthest, 3])
