"""What follows from the engine: how it hashes blocks, what shapes their bytes, which rank this is.

Everything here reads vLLM's own configuration, and is what changes with its versions.
`EngineFacts.of` refuses engines whose blocks cannot be named or shared safely, before anything is
opened.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.v1.core import kv_cache_utils

import kvfabric

from .config import ConfigError, ConnectorConfig
from .groups import Groups, groups_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Hash algorithms under which equal names mean equal blocks, whoever chose the prompt.
SAFE_HASHES = ("sha256", "sha256_cbor")
# From this version on, a block's hash says of each extra key what it is.
TAGGED_KEYS_SINCE = (0, 31)


@dataclass(frozen=True)
class EngineFacts:
    """What both halves of the connector need to know of their engine."""

    # Tokens of a block.
    block_tokens: int
    # The engine's hashes: the format of what is hashed, the algorithm and the seed.
    hash_format: str
    hash_name: str
    hash_seed: str
    # The model as the index knows it.
    model: str
    # Ranks of the tensor-parallel group.
    tensor_size: int
    # The name of the pod, all ranks together.
    pod: str
    # Number of this engine among its data-parallel replicas, and how many there are.
    replica: int
    replicas: int
    # Whether it computes prefixes for others; a pure consumer does not.
    produces: bool
    # The kinds of layers that have blocks of their own.
    groups: Groups

    @classmethod
    def of(cls, config: ConnectorConfig, engine: VllmConfig, cache: KVCacheConfig) -> EngineFacts:
        """Reads the engine's configuration.

        Raises `ConfigError` where blocks could not be named, addressed or recomputed.
        """
        transfer = engine.kv_transfer_config
        assert transfer is not None, "an engine without a connector loaded one"
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy: {transfer.kv_load_failure_policy!r} would end requests"
                ' whose blocks cannot be fetched; set "recompute"'
            )
        _check_parallel(engine)
        hash_name, seed = hashing(engine)
        replica, replicas = replica_of(engine)
        groups = groups_of(cache)
        _check_blocks(engine, cache, groups.block_tokens)
        return cls(
            block_tokens=groups.block_tokens,
            hash_format=hash_format(),
            hash_name=hash_name,
            hash_seed=seed,
            model=config.model or served_model(engine),
            tensor_size=engine.parallel_config.tensor_parallel_size,
            pod=pod_name(config, transfer.engine_id, replica, replicas),
            replica=replica,
            replicas=replicas,
            produces=transfer.is_kv_producer,
            groups=groups,
        )

    def rank_name(self, name: str, rank: int) -> str:
        """The name of one rank's share: the first rank goes by the plain name."""
        return name if rank == 0 else f"{name}/rank{rank}"


def model_identity(
    config: ConnectorConfig, engine: VllmConfig, layout: str, element: str, backends: list[str]
) -> str:
    """Stands for everything that shapes the bytes of this engine's blocks, as 64 hexadecimal
    digits.

    Engines of another version, processor or attention kernel arrange a page in ways of their own,
    so all of that is part of it. Raises `ConfigError` when nothing identifies the weights.
    """
    model = engine.model_config
    attributes = {
        "engine": f"vllm {vllm.__version__}",
        "attention": ",".join(sorted(backends)),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "overrides": repr(model.hf_overrides or ""),
    }
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if has_tiles is not None:
        attributes["tiles"] = str(has_tiles())
    path = _model_folder(model.model, model.revision)
    try:
        return kvfabric.model_identity(
            path,
            element=element,
            quantisation=str(model.quantization or ""),
            layout=layout,
            attributes=attributes,
            name=config.weights or None,
        )
    except kvfabric.KvfabricError as error:
        raise ConfigError(
            f"weights: nothing identifies the weights of {model.model!r} ({error}); name them with"
            ' "weights", and change that name whenever they change'
        ) from error


def node_config(
    config: ConnectorConfig,
    facts: EngineFacts,
    engine: VllmConfig,
    *,
    rank: int,
    block_bytes: int,
    identity: str,
    layers: int,
) -> dict[str, Any]:
    """The configuration of one rank's node: the operator's part, and everything that follows from
    the engine.

    Ranks and replicas of one engine get ports and disk folders of their own.
    """
    node: dict[str, Any] = {key: _copied(value) for key, value in config.node.items()}
    number = facts.replica * facts.tensor_size + rank
    for table, key in (
        (node, "peer_listen"),
        (node, "metrics_listen"),
        (node.get("fabric"), "tcp_listen"),
    ):
        if table and isinstance(table.get(key), str):
            table[key] = _port_for(table[key], number)
    if "disk" in node and facts.replicas * facts.tensor_size > 1:
        node["disk"]["path"] = os.path.join(str(node["disk"].get("path", "")), f"rank{number}")
    node.update(
        pod=facts.rank_name(facts.pod, rank),
        model=facts.rank_name(facts.model, rank),
        model_identity=identity,
        block_bytes=block_bytes,
        block_tokens=facts.block_tokens,
        key_scheme=config.key_scheme,
        shard={
            "tensor_rank": rank,
            "tensor_size": facts.tensor_size,
            "layers": layers,
            "kv_heads": engine.model_config.get_total_num_kv_heads(),
        },
        engine={"name": facts.hash_format, "hash": facts.hash_name, "seed": facts.hash_seed},
    )
    if rank == 0 and "index" in node:
        node["engine"].update(_event_sockets(engine, node["index"], facts.replica))
    return node


def _check_parallel(engine: VllmConfig) -> None:
    parallel = engine.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ConfigError(
                f"{name}: {size} is not supported, a rank must hold all layers of whole blocks"
            )


def _check_blocks(engine: VllmConfig, cache: KVCacheConfig, tokens: int) -> None:
    hashed = cache.hash_block_size or tokens
    if not tokens == hashed == engine.cache_config.block_size:
        raise ConfigError(
            f"block size: pages of {tokens} tokens, hashes of {hashed} and blocks of"
            f" {engine.cache_config.block_size} do not match; leave prefix_match_unit unset"
        )


def hashing(engine: VllmConfig) -> tuple[str, str]:
    """The engine's hash algorithm and seed; `ConfigError` if others could not rely on them."""
    name = engine.cache_config.prefix_caching_hash_algo
    if name not in SAFE_HASHES:
        raise ConfigError(
            f"prefix_caching_hash_algo: {name!r} can collide, so another's blocks could be served;"
            f" use {' or '.join(SAFE_HASHES)}"
        )
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        seed = getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None)
    if seed is None:
        raise ConfigError(
            "PYTHONHASHSEED: not set, and this version of vLLM then seeds its hashes at random, so"
            " that no other run would find a block; set the same value at each engine"
        )
    return name, seed


def hash_format() -> str:
    """Names what this version of the engine puts into a block's hash."""
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    return "vllm/tagged" if version >= TAGGED_KEYS_SINCE else "vllm/untagged"


def served_model(engine: VllmConfig) -> str:
    """The first name under which the engine serves its model."""
    served = engine.model_config.served_model_name
    if isinstance(served, (list, tuple)):
        served = served[0] if served else None
    return str(served or engine.model_config.model)


def replica_of(engine: VllmConfig) -> tuple[int, int]:
    """The engine's number among its data-parallel replicas, and how many there are."""
    parallel = engine.parallel_config
    return int(parallel.data_parallel_index), int(parallel.data_parallel_size)


def pod_name(config: ConnectorConfig, engine_id: str | None, replica: int, replicas: int) -> str:
    """The configured name of the pod, or one that no other engine has."""
    named = config.node.get("pod")
    if named is None:
        # The engine's own id differs at each start and at each replica, which is what a name needs.
        return f"{socket.gethostname()}/{engine_id}"
    if not isinstance(named, str):
        raise ConfigError(f"pod: {named!r} is no text")
    return named if replicas == 1 else f"{named}/dp{replica}"


def _model_folder(model: str, revision: str | None) -> str:
    """The folder of a model that may be named by its place on the hub; the name itself if there is
    none.
    """
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return model


def _copied(value: Any) -> Any:
    return (
        {key: _copied(inner) for key, inner in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def _port_for(address: str, number: int) -> str:
    """The address for the n-th node of an engine: ports count on from the configured one, unless
    the system chooses.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) == 0:
        return address
    return f"{host}:{int(port) + number}"


def _event_sockets(engine: VllmConfig, index: Mapping[str, Any], replica: int) -> dict[str, str]:
    """Where the engine itself publishes KV events, for the index to follow; empty if not."""
    events = engine.kv_events_config
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        return {}
    host = str(index.get("publish_host", "127.0.0.1"))
    sockets = {"events": _reachable(events.endpoint, host, replica)}
    if events.replay_endpoint:
        sockets["events_replay"] = _reachable(events.replay_endpoint, host, replica)
    return sockets


def _reachable(endpoint: str, host: str, replica: int) -> str:
    """The address at which others reach what the engine binds; each replica has the next port."""
    scheme, _, rest = endpoint.partition("://")
    if scheme != "tcp":
        return endpoint
    bound, _, port = rest.rpartition(":")
    if not port.isdigit() or int(port) == 0:
        raise ConfigError(f"kv_events_config: the index cannot find {endpoint!r}, name its port")
    name = host if bound in ("*", "0.0.0.0", "[::]", "::") else bound
    return f"tcp://{name}:{int(port) + replica}"
