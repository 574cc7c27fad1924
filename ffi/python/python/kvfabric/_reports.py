"""What operations report: plain tuples with names, which compare, print and pickle."""

from typing import List, NamedTuple, Optional, Tuple


class Telemetry(NamedTuple):
    """How the last finished post of a transfer went. Times are seconds."""

    posted: float
    """When it was posted, counted from the start of the agent."""
    post: float
    """How long posting took the caller."""
    transfer: float
    """From the post until it was finished."""
    bytes: int
    """Bytes moved."""
    descriptors: int
    """Pairs of ranges that it moved them as."""
    path: str
    """The backend that moved them, such as "shm"."""
    failovers: int = 0
    """How often it, or a piece of it, was tried again after a failure."""


class Estimate(NamedTuple):
    """What a post of a transfer would take now, by what others took."""

    backend: str
    """The backend that would move it, such as "shm"."""
    seconds: float
    """From the post until it is finished, if nothing else is in its way."""
    measured: bool
    """Whether transfers of about this size have shown it; else it is what the backend usually costs."""
    refused: List[Tuple[str, str]]
    """Backends that go before this one, with what kept them from being chosen."""


class StoreReport(NamedTuple):
    """What became of the blocks of a store: each counts once."""

    stored: int
    """Kept now."""
    already_held: int
    """Kept before."""
    refused: int
    """Not kept, for want of room or time."""
    failed: int
    """Not kept, because copying them failed."""


class PromoteReport(NamedTuple):
    """What became of the blocks of a promotion into the HBM tier: each counts once."""

    promoted: int
    """Came up."""
    already_held: int
    """Were up before."""
    missed: int
    """Could not be had in time, or come after one that could not."""
    refused: int
    """Not up, because there was no slot."""
    failed: int
    """Not up, because copying them failed."""


class Held(NamedTuple):
    """How many blocks from the first a node could supply by itself."""

    depth: int
    """Without a hole, in host memory and on disk together."""
    host: int
    """How many of those are in host memory."""
    disk: int
    """How many of those are only on disk."""
    expected: int
    """Blocks from the first that are there or that stores under way are bringing: not less than
    `depth`. While it is more, a store is worth waiting for.
    """


class Removed(NamedTuple):
    """What became of blocks that were to be removed."""

    removed: int
    """No longer in this node's own tiers."""
    kept: int
    """Still there, because somebody uses them: pinned, lent to a peer, or on their way."""


class Pin(NamedTuple):
    """Blocks that stay in host memory until they are unpinned or the pin's time is over."""

    id: int
    """What `Node.unpin` and `PeerService.unpin` take."""
    depth: int
    """How many blocks from the first are pinned; without any, `id` names nothing."""


class Reach(NamedTuple):
    """How many blocks from the first could be had, and where: what `Node.fetch` takes as hints."""

    depth: int
    """From this node's own tiers, its peers and shared objects together."""
    own: int
    """From this node's own tiers."""
    host: int
    """How many of `own` are in host memory."""
    disk: int
    """How many of `own` are on its disk."""
    holders: List[Tuple[str, int, Optional[str]]]
    """Other pods: (pod, blocks from the first, address of its peer service), deepest first."""
    shared: List[Tuple[int, int]]
    """Positions (start, stop) of blocks that are in a shared tier: ascending, apart from each
    other.
    """
    expected: int
    """Blocks from the first that this node's own tiers have or that stores under way are bringing:
    not less than `own`.
    """
