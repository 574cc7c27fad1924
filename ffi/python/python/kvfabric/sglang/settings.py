"""The backend's settings: the table ``kvfabric`` of ``--hicache-storage-backend-extra-config``, and
what follows from SGLang.

The table holds the keys of a node's configuration that only an operator can know, as for vLLM's
connector, and deadlines.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

import kvfabric

from .pool import PagePool

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

NODE_KEYS = frozenset(
    {
        "host",
        "disk",
        "object",
        "index",
        "fabric",
        "peer_listen",
        "pod",
        "metrics_listen",
        "key_scheme",
    }
)
DEADLINE_MS_MAX = 600_000
# Arguments of SGLang, beside the weights, that change the bytes of its pages.
SHAPING_ARGUMENTS = (
    "kv_cache_dtype",
    "quantization",
    "dtype",
    "json_model_override_args",
    "revision",
)


class SettingError(ValueError):
    """A setting that the backend cannot work with; the text names the key, the value and what would
    do.
    """


@dataclass(frozen=True)
class Settings:
    """Settings of the backend itself."""

    # Settings of the node, by the names of docs/configuration.md.
    node: Mapping[str, Any]
    # The operator's name for the weights, and for whatever else shapes bytes and cannot be derived.
    # Must change when any of it does. Empty: all is derived.
    weights: str = ""
    # A question whether pages are there, and a fetch of them, that takes longer is a miss.
    lookup_deadline_ms: int = 500
    fetch_deadline_ms: int = 2_000
    # A store that takes longer is given up.
    store_deadline_ms: int = 30_000
    # How long closing may take.
    shutdown_deadline_ms: int = 3_000

    @classmethod
    def parse(cls, extra: Optional[Mapping[str, Any]]) -> Settings:
        """Reads the table ``kvfabric`` of the extra configuration.

        Raises `SettingError` for one that is missing, a key that is not known, and a value that
        does not fit.
        """
        table = (extra or {}).get("kvfabric")
        if not isinstance(table, Mapping):
            raise SettingError(
                'kvfabric: missing; a table like {"host": {"bytes": 8589934592}} is needed'
            )
        own = {field.name: field.default for field in fields(cls) if field.name != "node"}
        values: Dict[str, Any] = {}
        for key, value in table.items():
            if key in own:
                values[key] = _checked(key, value, own[key])
            elif key not in NODE_KEYS:
                known = ", ".join(sorted(NODE_KEYS | own.keys()))
                raise SettingError(f"kvfabric.{key}: unknown key; known: {known}")
        node = {key: value for key, value in table.items() if key in NODE_KEYS}
        for key in ("host", "disk", "object", "index", "fabric"):
            if key in node and not isinstance(node[key], Mapping):
                raise SettingError(f"kvfabric.{key}: {node[key]!r} is no table")
        if "bytes" not in node.get("host", {}):
            raise SettingError("kvfabric.host.bytes: missing; the DRAM tier needs a size")
        return cls(node=node, **values)


def node_config(
    settings: Settings, storage: HiCacheStorageConfig, pool: PagePool
) -> Dict[str, Any]:
    """The configuration of one rank's node. Ranks of one engine get disk folders and ports of their
    own.
    """
    ranks = storage.tp_size * storage.pp_size * storage.attn_cp_size
    number = (
        (storage.dp_rank * storage.pp_size + storage.pp_rank) * storage.attn_cp_size
        + storage.attn_cp_rank
    ) * storage.tp_size + storage.tp_rank
    node = {key: dict(v) if isinstance(v, Mapping) else v for key, v in settings.node.items()}
    for table, key in (
        (node, "peer_listen"),
        (node, "metrics_listen"),
        (node.get("fabric"), "tcp_listen"),
    ):
        if table and isinstance(table.get(key), str):
            table[key] = _port_for(str(table[key]), number)
    if "disk" in node and (ranks > 1 or storage.dp_rank > 0):
        node["disk"]["path"] = os.path.join(str(node["disk"].get("path", "")), f"rank{number}")
    # Ranks that hold the same latent are one shard.
    tensor = (0, 1) if storage.is_mla_model else (storage.tp_rank, storage.tp_size)
    layers = pool.layout["layers"]
    heads = pool.layout.get("head_num", 1) * tensor[1]
    # Without a name of its own it has another one at each start.
    pod = node.get("pod") or f"{socket.gethostname()}/sglang-{uuid.uuid4().hex[:12]}"
    node.update(
        pod=f"{pod}/{number}",
        # Routers ask by tokens, of which SGLang tells a backend nothing: in the index these pages
        # are another model's.
        model=f"{storage.model_name or 'unnamed'}/pages",
        model_identity=_identity(settings, storage, pool),
        block_bytes=pool.page_bytes,
        block_tokens=pool.page_tokens,
        shard={
            "tensor_rank": tensor[0],
            "tensor_size": tensor[1],
            "first_layer": layers[0],
            "layers": layers[2],
            "kv_heads": 1 if storage.is_mla_model else heads,
        },
        # A page's hash covers all pages before it, from a fixed start.
        engine={"name": "sglang/page", "hash": "sha256", "seed": ""},
    )
    return node


def _identity(settings: Settings, storage: HiCacheStorageConfig, pool: PagePool) -> str:
    arguments = _arguments()
    # The name counts beside a digest of the weights, too: it may stand for what the digest does not
    # cover.
    attributes = {"engine": f"sglang {version('sglang')}", "named": settings.weights}
    if arguments is None:
        if not settings.weights:
            raise SettingError(
                "kvfabric.weights: SGLang does not tell which model it serves; name the weights,"
                " the type of the cache and whatever else shapes it, and change that name whenever"
                " they change"
            )
        folder = None
    else:
        folder = _model_folder(arguments.model_path, getattr(arguments, "revision", None))
        for name in SHAPING_ARGUMENTS:
            attributes[name] = str(getattr(arguments, name, None))
    layout = {
        **pool.layout,
        "cp": [storage.attn_cp_rank, storage.attn_cp_size],
        "dcp": [storage.dcp_rank, storage.dcp_size],
    }
    try:
        return kvfabric.model_identity(
            folder,
            element=pool.layout["element"],
            quantisation=attributes.get("quantization", ""),
            layout=json.dumps(layout, sort_keys=True),
            attributes=attributes,
            name=settings.weights or None,
        )
    except kvfabric.KvfabricError as error:
        raise SettingError(
            f"kvfabric.weights: nothing identifies the weights ({error}); name them, and change"
            " that name whenever they change"
        ) from error


def _arguments() -> Any:
    """The arguments that SGLang was started with; None outside of an engine."""
    from sglang.srt.runtime_context import get_server_args

    try:
        return get_server_args()
    except (RuntimeError, ValueError):
        return None


def _model_folder(model: str, revision: Optional[str]) -> Optional[str]:
    """Where the model is; None if it is not on this machine's disk."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None


def _checked(key: str, value: Any, default: Any) -> Any:
    if type(value) is not type(default):
        raise SettingError(
            f"kvfabric.{key}: {value!r} is a {type(value).__name__}, not a {type(default).__name__}"
        )
    if isinstance(value, int) and not 1 <= value <= DEADLINE_MS_MAX:
        raise SettingError(f"kvfabric.{key}: {value} is not within 1..={DEADLINE_MS_MAX}")
    return value


def _port_for(address: str, number: int) -> str:
    """Ports count on from the configured one, unless the system chooses."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) == 0:
        return address
    return f"{host}:{int(port) + number}"
