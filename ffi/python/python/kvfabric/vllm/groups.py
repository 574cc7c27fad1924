"""Cache groups: which layers share a table of blocks, and which blocks each of them needs.

A model whose layers look back differently far has several groups. All of them cut a sequence into
blocks at the same places, but each has blocks of its own for them, and a group of windows gives
back what no window reaches any more: the engine's tables have its null block there. A prefix can
be had when every group's part of it can. This module reads vLLM's own configuration, and is what
changes with its versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    KVCacheGroupRole,
    KVCacheSpecKind,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from .config import ConfigError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

# The engine's number of the block that stands for none.
NULL_BLOCK = 0
WHOLE_PREFIX_KINDS = (KVCacheSpecKind.FULL_ATTENTION, KVCacheSpecKind.MLA_ATTENTION)


@dataclass(frozen=True)
class CacheGroup:
    """One kind of layers, by its number among the engine's groups."""

    number: int = 0
    # How many tokens, itself included, a token looks back on; 0: on all.
    window: int = 0
    # Tokens look back to the beginning of their chunk of so many; 0: there are no chunks.
    chunk: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether its layers look back on everything."""
        return not self.window and not self.chunk

    def skipped(self, tokens: int) -> int:
        """How many tokens from the first nobody looks at any more who comes after `tokens`."""
        if self.window:
            return max(0, tokens + 1 - self.window)
        return tokens // self.chunk * self.chunk if self.chunk else 0


@dataclass(frozen=True)
class Groups:
    """The groups of one engine."""

    block_tokens: int
    groups: tuple[CacheGroup, ...] = (CacheGroup(),)

    @property
    def first(self) -> int:
        """The group whose blocks go by the names that routers know: the first that keeps whole
        prefixes, if there is one.
        """
        whole = (group.number for group in self.groups if group.is_whole)
        return next(whole, self.groups[0].number)

    @property
    def is_plain(self) -> bool:
        """Whether there is one group only, of whole prefixes."""
        return len(self.groups) == 1 and self.groups[0].is_whole

    @property
    def has_windows(self) -> bool:
        """Whether the engine gives up blocks of requests that go on."""
        return any(not group.is_whole for group in self.groups)

    @property
    def others(self) -> tuple[CacheGroup, ...]:
        """All groups but that one."""
        return tuple(group for group in self.groups if group.number != self.first)

    def claimable(self, tokens: int) -> int:
        """Blocks of a sequence of so many tokens that may be claimed.

        The engine computes the last token again when all of them can be had; its window must
        then begin one token earlier than it kept blocks for.
        """
        if self.has_windows:
            tokens -= 1
        return max(0, tokens) // self.block_tokens

    def needed(self, depth: int, slack: int = 0) -> list[tuple[int, int]]:
        """What the other groups need of a prefix of `depth` blocks: (position, group), in order of
        position. With `slack`, also what prefixes of so many blocks less need.
        """
        shortest = max(0, depth - slack) * self.block_tokens
        begins = [(group.skipped(shortest) // self.block_tokens, group) for group in self.others]
        return [
            (position, group.number)
            for position in range(min((begin for begin, _ in begins), default=depth), depth)
            for begin, group in begins
            if position >= begin
        ]

    def present(
        self, tables: Sequence[Sequence[int]], start: int, stop: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """What there is at [start, stop) of the engine's tables, one per group: positions of the
        first group, and (position, group) of the others, in order of position.

        A group's null blocks are none: they are neither stored nor fetched. Everything else the
        engine takes for fetched once it was told so.
        """
        mine = tables[self.first]
        return (
            [position for position in range(start, stop) if mine[position] != NULL_BLOCK],
            [
                (position, group.number)
                for position in range(start, stop)
                for group in self.others
                if tables[group.number][position] != NULL_BLOCK
            ],
        )


def groups_of(cache: KVCacheConfig) -> Groups:
    """Reads the engine's groups.

    Raises `ConfigError` for groups whose blocks could not be kept apart or put together again.
    """
    groups = tuple(_group(number, group) for number, group in enumerate(cache.kv_cache_groups))
    if not groups:
        raise ConfigError("cache groups: there are none, the model keeps no cache of its prefixes")
    sizes = sorted({group.kv_cache_spec.block_size for group in cache.kv_cache_groups})
    if len(sizes) > 1:
        raise ConfigError(
            f"cache groups: blocks of {sizes} tokens are not supported, only of one size"
        )
    return Groups(int(sizes[0]), groups)


def describe(cache: KVCacheConfig, number: int) -> str:
    """What sets the blocks of one group apart, as far as it shapes their bytes."""
    group = cache.kv_cache_groups[number]
    read = _group(number, group)
    kind = get_kv_cache_spec_kind(group.kv_cache_spec).value
    return f"{kind} window {read.window} chunk {read.chunk}"


def _group(number: int, group: KVCacheGroupSpec) -> CacheGroup:
    spec = group.kv_cache_spec
    kind = get_kv_cache_spec_kind(spec)
    where = f"cache group {number} ({kind.value})"
    if group.host_resident or not group.enable_kv_transfer or not spec.prefix_cacheable:
        raise ConfigError(f"{where}: the engine does not share its blocks")
    if group.role != KVCacheGroupRole.DEFAULT:
        raise ConfigError(f"{where}: the role {group.role.value!r} is not supported")
    if kind in WHOLE_PREFIX_KINDS:
        return CacheGroup(number)
    # A drafter's layers look one block further than their window says.
    if group.is_eagle_group:
        raise ConfigError(f"{where}: windows of speculative decoding are not supported")
    layers = iter_layer_specs(spec)
    if kind == KVCacheSpecKind.SLIDING_WINDOW:
        windows = {layer.sliding_window + layer.extra_retained_tokens for layer in layers}
        if len(windows) == 1:
            return CacheGroup(number, window=int(windows.pop()))
    if kind == KVCacheSpecKind.CHUNKED_LOCAL_ATTENTION:
        chunks = {layer.attention_chunk_size for layer in layers}
        if len(chunks) == 1:
            return CacheGroup(number, chunk=int(chunks.pop()))
    raise ConfigError(
        f"{where}: not supported; full attention, sliding windows and chunked local attention are"
    )
