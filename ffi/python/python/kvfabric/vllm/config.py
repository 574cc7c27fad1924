"""The connector's settings: what an operator writes into ``kv_connector_extra_config``.

The mapping holds the keys of a node's configuration that only an operator can know (where its tiers
are, how large they may be, which addresses it has) and the connector's own keys, which are the
fields of `ConnectorConfig`. Everything else follows from the engine and is refused when it is
given, so that a typed value cannot contradict the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .handoff import AllowList

# Tables and keys of docs/configuration.md that are handed to the node as they are.
NODE_KEYS = frozenset(
    {"host", "disk", "object", "index", "fabric", "peer_listen", "pod", "metrics_listen"}
)
# Keys of a node that the engine decides.
DERIVED_KEYS = frozenset(
    {"model_identity", "block_bytes", "block_tokens", "shard", "engine", "hash", "seed"}
)
OFFLOAD_CHOICES = ("prompt", "all", "none")
DEADLINE_MS_MAX = 600_000
# This host and networks that are not routed on the internet, as a fleet's pods have them. Link-local
# addresses are left out: clouds answer there with secrets.
PRIVATE_NETWORKS = (
    "127.0.0.0/8",
    "::1/128",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "fc00::/7",
)


class ConfigError(ValueError):
    """A setting that the connector cannot work with; the text names the key, the value and what
    would do.
    """


@dataclass(frozen=True)
class ConnectorConfig:
    """Settings of the connector itself. Times are milliseconds unless the name says otherwise."""

    # Settings of the node, by the names of docs/configuration.md.
    node: Mapping[str, Any] = field(default_factory=dict)
    # How index keys are made; must be the indexer's.
    key_scheme: str = "xxh3:1337"
    # The model as routers name it; empty: the first name under which the engine serves it.
    model: str = ""
    # The operator's own name for the weights, for a model folder from which none can be derived.
    # Must change when they do.
    weights: str = ""
    # Which blocks are offloaded: those of the prompt, those of decoding too, or none. Empty:
    # "prompt", and "none" for a kv_consumer.
    offload: str = ""
    # A fetch that takes longer is given up, and what is missing is computed.
    fetch_deadline_ms: int = 2_000
    # Fewer tokens than this are computed, not fetched.
    min_fetch_tokens: int = 128
    # How long a request may wait for the answer where its blocks are.
    lookup_deadline_ms: int = 200
    # How long a decode engine waits for the blocks that its prefill engine is still storing.
    handoff_deadline_ms: int = 1_000
    # From where a decode engine takes blocks on the word of a request's kv_transfer_params: hosts,
    # addresses and networks. Requests that name others are computed.
    peers_allow: tuple[str, ...] = PRIVATE_NETWORKS
    # A store that takes longer is given up.
    store_deadline_ms: int = 30_000
    # Bytes on their way from the engine's memory to the tiers, per rank. What would exceed it is
    # not offloaded, and counted as skipped.
    store_inflight_max: int = 256 << 20
    # How long a prefill engine keeps blocks for a decode engine that does not fetch them, in
    # seconds.
    pin_ttl_s: float = 30.0
    # The engine's pool is shared memory, which the node maps by itself.
    shared_pool: bool = False
    # How long shutting down may take.
    shutdown_deadline_ms: int = 3_000

    @classmethod
    def parse(cls, extra: Mapping[str, Any] | None) -> ConnectorConfig:
        """Reads ``kv_connector_extra_config``.

        Raises `ConfigError` for a key that is not known, one that the engine decides, and a value
        that does not fit.
        """
        own = {f.name: f for f in fields(cls) if f.name != "node"}
        node: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for key, value in (extra or {}).items():
            if key in NODE_KEYS:
                node[key] = value
            elif key in own:
                values[key] = _typed(key, value, own[key].default)
            elif key in DERIVED_KEYS:
                raise ConfigError(f"{key}: follows from the engine and cannot be set")
            else:
                known = ", ".join(sorted(NODE_KEYS | own.keys()))
                raise ConfigError(
                    f"{key}: unknown key of kv_connector_extra_config; known: {known}"
                )
        config = cls(node=node, **values)
        config._check()
        return config

    def _check(self) -> None:
        for key in (
            "fetch_deadline_ms",
            "lookup_deadline_ms",
            "handoff_deadline_ms",
            "store_deadline_ms",
            "shutdown_deadline_ms",
        ):
            _in_range(key, getattr(self, key), 1, DEADLINE_MS_MAX)
        _in_range("min_fetch_tokens", self.min_fetch_tokens, 0, 1 << 30)
        _in_range("store_inflight_max", self.store_inflight_max, 1, 1 << 50)
        _in_range("pin_ttl_s", self.pin_ttl_s, 0.001, DEADLINE_MS_MAX / 1000)
        if self.offload not in ("", *OFFLOAD_CHOICES):
            raise ConfigError(f"offload: {self.offload!r} is none of {', '.join(OFFLOAD_CHOICES)}")
        try:
            AllowList(self.peers_allow)
        except ValueError as error:
            raise ConfigError(f"peers_allow: {error}") from error
        host = self.node.get("host")
        if not isinstance(host, Mapping) or "bytes" not in host:
            raise ConfigError(
                'host.bytes: missing; the DRAM tier needs a size: {"host": {"bytes": 8589934592}}'
            )
        for key in ("disk", "object", "index", "fabric"):
            if key in self.node and not isinstance(self.node[key], Mapping):
                raise ConfigError(f"{key}: {self.node[key]!r} is no table of keys")
        if self.node.get("peer_listen") == "off":
            raise ConfigError(
                "peer_listen: cannot be off, the engine's scheduler asks the node there"
            )

    def offload_for(self, produces: bool) -> str:
        """What is offloaded by an engine that does or does not have the role of a producer."""
        return self.offload or ("prompt" if produces else "none")


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{key}: {value!r} is no list of texts")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"{key}: {value!r} is a {type(value).__name__}, not a {type(default).__name__}"
        )
    return value


def _in_range(key: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{key}: {value} is not within {least}..={most}")
