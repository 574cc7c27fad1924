"""A pool of blocks as vLLM's own code makes it, for the connector's tests without an engine."""

import dataclasses
import pathlib
from typing import Any, Dict

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

BLOCKS, LAYERS, HEADS, TOKENS, HEAD = 6, 3, 2, 32, 32
PAGE = HEADS * TOKENS * 2 * HEAD * 2


def engine_config(model: pathlib.Path) -> Any:
    """The engine's configuration as a server would make it."""
    return EngineArgs(
        model=str(model),
        served_model_name=["tiny", "also-tiny"],
        dtype="bfloat16",
        max_model_len=512,
        block_size=TOKENS,
        enforce_eager=True,
        skip_tokenizer_init=True,
        prefix_caching_hash_algo="sha256_cbor",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvFabricConnector",
            kv_connector_module_path="kvfabric.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            engine_id="engine-1",
        ),
    ).create_engine_config()


def pool(
    engine: Any, layout: str = "LBHNC", spec: Any = None, blocks: int = BLOCKS
) -> KVCacheConfig:
    """What vLLM decides for a pool of this layout."""
    if spec is None:
        spec = FullAttentionSpec(
            block_size=TOKENS, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.bfloat16
        )
    names = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
    engine.cache_config.kv_cache_layout = layout
    cache = get_kv_cache_config_from_groups(
        engine, [KVCacheGroupSpec(names, spec)], blocks * LAYERS * spec.page_size_bytes
    )
    return dataclasses.replace(cache, kv_cache_layout=layout, hash_block_size=TOKENS)


def tensors(cache: KVCacheConfig) -> Dict[str, torch.Tensor]:
    """The pool itself."""
    layout = KVCacheLayout[str(cache.kv_cache_layout)]
    return allocate_kv_cache(cache, torch.device("cpu"), layout)
