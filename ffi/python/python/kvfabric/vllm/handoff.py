"""What a prefill engine tells the decode engine through their client, and whom of it a decode
engine believes.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

# Of what is put into ``kv_transfer_params``.
VERSION = 2
BLOCKS_MAX = 1 << 20
PIN_DIGITS = 16
_PIN = re.compile(f"[0-9a-f]{{{PIN_DIGITS}}}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Handoff:
    """What a prefill engine said to its client for the decode engine: whom to ask for what."""

    pod: str
    # Peer services of its ranks, in order.
    addresses: tuple[str, ...]
    # Stands for everything that shapes the bytes of its blocks.
    model_identity: str
    # Blocks of the prompt that it computed, the partial last one included if it keeps it.
    depth: int
    # Tokens in these blocks.
    tokens: int
    # Under which number each rank keeps them until it is told that they were fetched.
    pin: int

    def to_params(self) -> dict[str, Any]:
        """What is put into ``kv_transfer_params``."""
        return {
            "version": VERSION,
            "pod": self.pod,
            "peer_addresses": list(self.addresses),
            "model_identity": self.model_identity,
            "depth": self.depth,
            "tokens": self.tokens,
            # As text: not everyone's JSON has whole numbers of 64 bits.
            "pin": f"{self.pin:0{PIN_DIGITS}x}",
        }

    @classmethod
    def parse(
        cls, params: object, ranks: int, model_identity: str, block_tokens: int, allowed: AllowList
    ) -> Handoff:
        """Reads what a client sent along; raises `ValueError` that names what is wrong with it, as
        when the blocks are of another model than `model_identity`, or `NotAllowedError` when they
        are at an address that the operator does not trust.
        """
        if not isinstance(params, Mapping):
            raise ValueError(f"kvfabric: {params!r} is no table of keys")
        if params.get("version") != VERSION:
            raise ValueError(f"kvfabric.version: {params.get('version')!r} is not {VERSION}")
        pod, addresses = params.get("pod"), params.get("peer_addresses")
        if not isinstance(pod, str) or not pod:
            raise ValueError(f"kvfabric.pod: {pod!r} is no name")
        if not isinstance(addresses, list) or not all(isinstance(one, str) for one in addresses):
            raise ValueError(f"kvfabric.peer_addresses: {addresses!r} is no list of addresses")
        if len(addresses) != ranks:
            raise ValueError(
                f"kvfabric.peer_addresses: {len(addresses)} ranks cannot hand off to {ranks}"
            )
        identity, depth = params.get("model_identity"), params.get("depth")
        if identity != model_identity:
            raise ValueError(f"kvfabric.model_identity: {identity!r} is not {model_identity!r}")
        if type(depth) is not int or not 0 <= depth <= BLOCKS_MAX:
            raise ValueError(f"kvfabric.depth: {depth!r} is not within 0..={BLOCKS_MAX}")
        tokens, pin = params.get("tokens"), params.get("pin")
        if type(tokens) is not int or -(-tokens // block_tokens) != depth:
            raise ValueError(
                f"kvfabric.tokens: {tokens!r} do not fill {depth} blocks of {block_tokens}"
            )
        if not isinstance(pin, str) or not _PIN.fullmatch(pin):
            raise ValueError(f"kvfabric.pin: {pin!r} is not of {PIN_DIGITS} hexadecimal digits")
        for address in addresses:
            allowed.check(address)
        return cls(pod, tuple(addresses), model_identity, depth, tokens, int(pin, 16))


def new_pin() -> int:
    """A number that nobody guesses: whoever knows it can let go of the blocks."""
    return secrets.randbits(4 * PIN_DIGITS)


def others_pin(pin: int) -> int:
    """Under which number the blocks of other cache groups than the first are kept."""
    return pin ^ 1


class NotAllowedError(ValueError):
    """An address that the operator does not trust."""

    def __init__(self, host: str) -> None:
        super().__init__(f"kvfabric.peer_addresses: {host!r} is not in peers_allow")
        self.host = host


class AllowList:
    """From which hosts blocks are taken on a client's word."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Raises `ValueError` that names an entry which is neither host, address nor network."""
        self._networks: list[Network] = []
        self._hosts: set[str] = set()
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError as error:
                # What has only digits and dots, or a mask, was meant as a number.
                if not _HOST.fullmatch(entry) or not any(one.isalpha() for one in entry):
                    raise ValueError(
                        f"{entry!r} is neither a host, an address nor a network ({error})"
                    ) from error
                self._hosts.add(entry.lower())

    def check(self, address: str) -> None:
        """Raises `NotAllowedError` for a peer service at "host:port" that is not on the list."""
        host = address.rpartition(":")[0].strip("[]").lower()
        if host in self._hosts:
            return
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            raise NotAllowedError(host) from None
        mapped = getattr(number, "ipv4_mapped", None)
        number = mapped or number
        if not any(number in network for network in self._networks):
            raise NotAllowedError(host)
