"""Descriptor lists of what engines have: tuples, arrays, tensors."""

from __future__ import annotations

import sys
from typing import Any, List, Optional, Sequence, Tuple, Type, TypeVar

import numpy as np

from ._constants import nixl_mem_t
from ._lists import _DList, nixlRegDList, nixlRemoteDList, nixlXferDList
from ._logging import logger

_L = TypeVar("_L", bound=_DList)


def xfer_descs(descs: Any, memory: Optional[nixl_mem_t]) -> Optional[nixlXferDList]:
    """A list to transfer."""
    return _made(nixlXferDList, 3, descs, memory)


def reg_descs(descs: Any, memory: Optional[nixl_mem_t]) -> Optional[nixlRegDList]:
    """A list to register."""
    return _made(nixlRegDList, 4, descs, memory)


def remote_descs(descs: Any, memory: Optional[nixl_mem_t]) -> Optional[nixlRemoteDList]:
    """A list of ranges of several agents, which only tuples can name."""
    if isinstance(descs, nixlRemoteDList):
        return descs
    if not isinstance(descs[0], tuple):
        return _refused(f"tuples (address, length, device, agent) are needed, not {type(descs[0])}")
    return _of_tuples(nixlRemoteDList, 4, descs, memory)


def _made(kind: Type[_L], columns: int, descs: Any, memory: Optional[nixl_mem_t]) -> Optional[_L]:
    if isinstance(descs, kind):
        return descs
    if isinstance(descs, _DList):
        return _refused(f"a {kind.__name__} is needed, not a {type(descs).__name__}")
    if _is_tensor(descs):
        return _of_tensors(kind, [descs])
    if isinstance(descs[0], tuple):
        return _of_tuples(kind, columns, descs, memory)
    if isinstance(descs, np.ndarray):
        if memory is None:
            return _refused("a kind of memory is needed with an array")
        if descs.ndim != 2 or descs.shape[1] != 3:
            return _refused(f"an Nx3 array is needed, not one of shape {descs.shape}")
        return kind(memory, descs)
    if _is_tensor(descs[0]):
        return _of_tensors(kind, descs)
    return _refused(f"tuples, an array or tensors are needed, not {type(descs[0])}")


def _of_tuples(
    kind: Type[_L], columns: int, descs: Sequence[Tuple[Any, ...]], memory: Optional[nixl_mem_t]
) -> Optional[_L]:
    if memory is None:
        return _refused("a kind of memory is needed with tuples")
    if len(descs[0]) != columns:
        return _refused(f"tuples of {columns} are needed, not of {len(descs[0])}")
    return kind(memory, descs)


def _of_tensors(kind: Type[_L], tensors: Sequence[Any]) -> Optional[_L]:
    rows: List[Tuple[int, int, int]] = []
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            return _refused(f"tensors of {tensors[0].device} and {tensor.device} in one list")
        if not tensor.is_contiguous():
            return _refused("a tensor is not contiguous")
        # The CPU counts as device -1 to torch, and as 0 here.
        device = max(0, tensor.get_device())
        rows.append((tensor.data_ptr(), tensor.numel() * tensor.element_size(), device))
    is_host = tensors[0].get_device() == -1
    memory = nixl_mem_t.DRAM_SEG if is_host else nixl_mem_t.VRAM_SEG
    return kind(memory, np.array(rows, np.uint64))


def _is_tensor(value: object) -> bool:
    # Whoever has a tensor has imported torch: importing it here would take a second.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _refused(reason: str) -> Any:
    """None, as NIXL's callers expect, and the reason in the log."""
    logger.error("no descriptor list: %s", reason)
    return None
