"""Where the pages of SGLang's host memory pool are.

A pool says where the parts of any page begin. Pages are of one size and evenly spaced in all of its
layouts, so two pages tell where every other one is, and a third is asked to make sure. Nothing here
depends on which layout it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host import HostKVCache


class PoolError(ValueError):
    """A pool that pages cannot be read from and written to in place; the text says why."""


@dataclass(frozen=True)
class Part:
    """The bytes ``[address + page * stride, + length)`` of each page."""

    address: int
    stride: int
    length: int


@dataclass(frozen=True)
class PagePool:
    """A host memory pool as pages, each of the same parts in the same order."""

    pages: int
    page_tokens: int
    parts: Tuple[Part, ...]
    # Memory that holds all parts: address, length, and what keeps it.
    memory: Tuple[Tuple[int, int, torch.UntypedStorage], ...]
    # All of the pool's own description that shapes bytes.
    layout: Dict[str, Any]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all parts together."""
        return sum(part.length for part in self.parts)

    @classmethod
    def of(cls, pool: HostKVCache) -> PagePool:
        """Reads where the pages of `pool` are.

        Raises `PoolError` for a pool without zero-copy access, with fewer than two pages, or whose
        pages are not evenly spaced.
        """
        pages = int(pool.page_num)
        if pages < 2:
            raise PoolError(f"host pool: {pages} pages are too few, two are needed")
        parts = _parts(pool, pages)
        memory = _memory(pool)
        for part in parts:
            first = min(part.address, part.address + (pages - 1) * part.stride)
            last = max(part.address, part.address + (pages - 1) * part.stride) + part.length
            if not any(start <= first and last <= start + size for start, size, _ in memory):
                raise PoolError(
                    f"host pool: bytes [{first}, {last}) are not in the memory it names"
                )
        return cls(pages, int(pool.page_size), parts, memory, _layout(pool, parts))

    def segments(self, regions: List[Any]) -> List[Tuple[Any, int, int, int]]:
        """The parts as `Node.pages` takes them; `regions` are those of `memory`, in its order."""
        made = []
        for part in self.parts:
            for region, (start, size, _) in zip(regions, self.memory):
                if start <= part.address < start + size:
                    made.append((region, part.address - start, part.stride, part.length))
                    break
        return made


def _parts(pool: HostKVCache, pages: int) -> Tuple[Part, ...]:
    size = int(pool.page_size)
    asked = [0, 1, pages - 1]
    tokens = torch.cat([torch.arange(page * size, (page + 1) * size) for page in asked])
    try:
        addresses, lengths = pool.get_page_buffer_meta(tokens)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise PoolError(
            f"host pool: layout {pool.layout!r} has no pages in one piece: {error}"
        ) from error
    count = len(addresses) // len(asked)
    if count == 0 or len(addresses) != count * len(asked) or len(lengths) != len(addresses):
        raise PoolError(f"host pool: {len(addresses)} parts of {len(asked)} pages")
    parts = []
    for number in range(count):
        first, second, last = (addresses[number + count * page] for page in range(len(asked)))
        part = Part(first, second - first, int(lengths[number]))
        if last != first + (pages - 1) * part.stride or part.stride < part.length:
            raise PoolError(
                f"host pool: part {number} of pages 0, 1 and {pages - 1}, {part.length} bytes, is"
                f" at {first}, {second} and {last}, not evenly spaced"
            )
        parts.append(part)
    return tuple(parts)


def _memory(pool: HostKVCache) -> Tuple[Tuple[int, int, torch.UntypedStorage], ...]:
    named = getattr(pool, "get_hybrid_pool_buffer", None)
    buffers = named() if named is not None else [pool.kv_buffer]
    storages = {}
    for buffer in buffers:
        if buffer.device.type != "cpu":
            raise PoolError(f"host pool: memory of device {buffer.device} is not host memory")
        storage = buffer.untyped_storage()
        storages[storage.data_ptr()] = storage
    return tuple((address, storage.nbytes(), storage) for address, storage in storages.items())


def _layout(pool: HostKVCache, parts: Tuple[Part, ...]) -> Dict[str, Any]:
    described = {
        "pool": type(pool).__name__,
        "layout": pool.layout,
        "format": pool.storage_format_tag,
        "element": str(pool.dtype),
        "page_tokens": int(pool.page_size),
        "layers": [int(pool.start_layer), int(pool.end_layer), int(pool.layer_num)],
        "parts": [part.length for part in parts],
    }
    for name in ("head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim"):
        value = getattr(pool, name, None)
        if value is not None:
            described[name] = int(value)
    return described
