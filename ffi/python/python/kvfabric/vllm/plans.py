"""Which blocks a load or a store moves, and under which names: of every cache group at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

from .groups import Groups
from .hits import Hit
from .metadata import Load, Store

if TYPE_CHECKING:
    from .names import RequestNames
    from .partial import PromptNames

    FirstNames = Union[RequestNames, PromptNames]


def loads(
    request_id: str,
    hit: Hit,
    groups: Groups,
    names: FirstNames,
    named: RequestNames,
    tables: Sequence[Sequence[int]],
    start: int,
    stop: int,
) -> list[Load]:
    """Fetches blocks [start, stop) of the engine's tables: one load for the first group, whose
    names are `names`, one for all others.
    """
    first, others = groups.present(tables, start, stop)
    begin = first[0] if first else stop
    mine = list(tables[groups.first][begin:stop])
    sources = tuple(answer.sources for answer in hit.first)
    planned = [Load(request_id, names.pack(0, stop), begin, mine, sources)]
    if others:
        skipped, sources = hit.sources_of_others(others)
        ids = [tables[group][position] for position, group in others]
        packed = named.pack_others([*hit.needed[:skipped], *others])
        planned.append(Load(request_id, packed, skipped, ids, sources))
    return planned


def stores(
    request_id: str,
    groups: Groups,
    names: FirstNames,
    named: RequestNames,
    tables: Sequence[Sequence[int]],
    start: int,
    stop: int,
    awaited: bool,
) -> list[Store]:
    """Stores blocks [start, stop) of the engine's tables, as `loads` fetches them; what the engine
    has given up is not there to be stored.
    """
    first, others = groups.present(tables, start, stop)
    planned = []
    if first:
        mine = list(tables[groups.first][first[0] : stop])
        planned.append(Store(request_id, names.pack(first[0], stop), mine, awaited))
    if others:
        ids = [tables[group][position] for position, group in others]
        planned.append(Store(request_id, named.pack_others(others), ids, awaited))
    return planned
