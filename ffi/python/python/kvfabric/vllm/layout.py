"""Where the pages of a block are in the engine's memory.

vLLM keeps all layers in one allocation; the page of block ``b`` of the ``l``-th layer of a tensor
begins at ``offset + l * layer_stride + b * block_stride``. Pages are copied whole, because
attention kernels arrange their inside in ways of their own. What is not made of whole pages at
these places is refused.

Cache groups lie over each other: a block belongs to one of them at a time, whose layers then have
the bytes. So a block is the same bytes whichever group has it, those of the largest one; what a
smaller group leaves of them means nothing, and is copied along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ConfigError
from .groups import describe

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor


@dataclass(frozen=True)
class Span:
    """The bytes ``[offset + b * stride, + length)`` of each block b."""

    offset: int
    stride: int
    length: int


@dataclass(frozen=True)
class PageLayout:
    """The engine's pool of blocks: one allocation, and where in it a block's bytes are, in the
    order of the layers of the largest group.
    """

    address: int
    length: int
    blocks: int
    spans: tuple[Span, ...]
    # Says how bytes are arranged, as far as the engine tells.
    name: str
    # The type of an element, like "bfloat16".
    element: str
    layers: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers together."""
        return sum(span.length for span in self.spans)

    @classmethod
    def of(cls, cache: KVCacheConfig, tensors: dict[str, torch.Tensor]) -> PageLayout:
        """Reads the layout, and checks every tensor that the engine will use against it.

        Raises `ConfigError` for memory that cannot be registered and for layouts that are not made
        of whole pages.
        """
        elements: set[str] = set()
        storages: dict[int, torch.UntypedStorage] = {}
        groups: list[_Group] = []
        for number, group in enumerate(cache.kv_cache_groups):
            found = _Group([], [])
            for tensor in cache.kv_cache_tensors:
                if tensor.layers[0] in group.layer_names:
                    _add(found, tensor, tensors, cache.num_blocks)
            if not found.spans:
                raise ConfigError(f"cache group {number}: the engine has no memory for its layers")
            groups.append(found)
        for name in [name for group in groups for name in group.names]:
            storage = _storage(name, tensors[name])
            storages[storage.data_ptr()] = storage
            elements.add(str(tensors[name].dtype).removeprefix("torch."))
        if len(storages) != 1:
            raise ConfigError(f"cache: {len(storages)} allocations are not supported, only one is")
        (storage,) = storages.values()
        return cls(
            address=storage.data_ptr(),
            length=storage.nbytes(),
            blocks=cache.num_blocks,
            spans=_covering([_merged(group.spans) for group in groups]),
            name=f"{cache.kv_cache_layout or 'unnamed'} {_order(cache, groups)}",
            element=",".join(sorted(elements)),
            layers=sum(len(group.names) for group in groups),
        )


@dataclass(frozen=True)
class _Group:
    """The layers of one cache group, and where their pages are."""

    names: list[str]
    spans: list[Span]


def _add(
    group: _Group, tensor: KVCacheTensor, tensors: dict[str, torch.Tensor], blocks: int
) -> None:
    if getattr(tensor, "host_resident", False):
        raise ConfigError(f"cache of {tensor.layers[0]}: pools in host memory are not supported")
    for number, layer in enumerate(tensor.layers):
        if layer not in tensors:
            raise ConfigError(f"cache of {layer}: the engine registered no tensor for it")
        _storage(layer, tensors[layer])
        offset = tensor.offset + number * tensor.layer_stride
        group.names.append(layer)
        group.spans.append(_span(layer, tensors[layer], offset, tensor.block_stride, blocks))


def _storage(layer: str, view: torch.Tensor) -> torch.UntypedStorage:
    if view.device.type != "cpu":
        raise ConfigError(
            f"cache of {layer}: memory of device {view.device} cannot be registered yet; kvfabric"
            " moves host memory only"
        )
    return view.untyped_storage()


def _span(layer: str, view: torch.Tensor, offset: int, stride: int, blocks: int) -> Span:
    item = view.element_size()
    if view.dim() < 2 or view.shape[0] != blocks:
        raise ConfigError(
            f"cache of {layer}: shape {list(view.shape)} does not begin with {blocks} blocks"
        )
    length = view[0].numel() * item
    # A page is whole when its elements, in whatever order, fill one run of bytes.
    reach = sum((size - 1) * step for size, step in zip(view.shape[1:], view.stride()[1:])) + 1
    if reach * item != length:
        raise ConfigError(
            f"cache of {layer}: a page of {length} bytes is scattered over {reach * item}"
        )
    found = view.data_ptr() - view.untyped_storage().data_ptr()
    if found != offset or view.stride(0) * item != stride:
        raise ConfigError(
            f"cache of {layer}: blocks are at {found} + {view.stride(0) * item} b, not at {offset}"
            f" + {stride} b as the engine's configuration says"
        )
    return Span(offset, stride, length)


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    """Pages that follow each other in every block are one span, so that a block-outermost pool is a
    single copy.
    """
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.stride == span.stride and last.offset + last.length == span.offset:
            if last.length + span.length <= span.stride:
                merged[-1] = Span(last.offset, last.stride, last.length + span.length)
                continue
        merged.append(span)
    return tuple(merged)


def _covering(groups: list[tuple[Span, ...]]) -> tuple[Span, ...]:
    """The spans that hold a block of any group: those of the largest."""
    largest = max(groups, key=lambda spans: sum(span.length for span in spans))
    for number, spans in enumerate(groups):
        for span in spans:
            if not any(_within(span, other) for other in largest):
                raise ConfigError(
                    f"cache group {number}: its bytes at {span.offset} + {span.stride} b are not"
                    " among those of the largest group's blocks"
                )
    return largest


def _within(span: Span, other: Span) -> bool:
    return (
        span.stride == other.stride
        and other.offset <= span.offset
        and span.offset + span.length <= other.offset + other.length
    )


def _order(cache: KVCacheConfig, groups: list[_Group]) -> str:
    """The layers in the order of a block's bytes, with their pages' sizes, and for each group what
    sets it apart: part of what the bytes mean.
    """
    orders = [
        ",".join(f"{name}:{span.length}" for name, span in zip(group.names, group.spans))
        for group in groups
    ]
    if len(orders) == 1:
        return orders[0]
    return "; ".join(f"{describe(cache, number)} {one}" for number, one in enumerate(orders))
