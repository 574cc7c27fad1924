"""A rank of SGLang as far as a storage backend sees it: its host memory pool, its configuration,
its factory.
"""

import json
import pathlib
from typing import List

import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

VECTORS = json.loads((pathlib.Path(__file__).parent / "golden" / "page_hashes.json").read_text())
# Names of four pages that follow each other, as SGLang makes them.
KEYS: List[str] = VECTORS["plain"]["hashes"]
PAGE_TOKENS: int = VECTORS["page_tokens"]
LAYERS, HEADS, HEAD_DIM, PAGES = 3, 2, 16, 12
# Keys and values of two bytes each.
PAGE_BYTES = 2 * LAYERS * HEADS * HEAD_DIM * 2 * PAGE_TOKENS
LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


def pool(layout: str, seed: int = 0) -> MHATokenToKVPoolHost:
    """SGLang's host memory pool, full of random bytes; zeros with seed 0."""
    device = [
        torch.zeros(PAGE_TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(LAYERS)
    ]
    pointers = torch.tensor([buffer.data_ptr() for buffer in device], dtype=torch.uint64)
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=tuple(device),
            v=tuple(device),
            k_data_ptrs=pointers,
            v_data_ptrs=pointers,
            layout=KVBufferLayout.NHD,
        ),
        page_size=PAGE_TOKENS,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    made = MHATokenToKVPoolHost(
        info,
        host_to_device_ratio=1.0,
        host_size=0,
        page_size=PAGE_TOKENS,
        layout=layout,
        pin_memory=False,
        device_capacity_tokens=PAGE_TOKENS,
        start_layer=0,
        end_layer=LAYERS,
        host_token_capacity=PAGES * PAGE_TOKENS,
    )
    bits = made.kv_buffer.view(torch.int16)
    if seed:
        random = torch.Generator().manual_seed(seed)
        bits.copy_(torch.randint(-(2**15), 2**15, bits.shape, generator=random, dtype=torch.int16))
    else:
        bits.zero_()
    return made


def page(of: MHATokenToKVPoolHost, number: int) -> torch.Tensor:
    """The bytes of one page, in the order in which the pool itself hands them out."""
    return of.get_data_page(number * PAGE_TOKENS).view(torch.uint8)


def indices(*numbers: int) -> torch.Tensor:
    """The token indices of whole pages."""
    return torch.cat([torch.arange(n * PAGE_TOKENS, (n + 1) * PAGE_TOKENS) for n in numbers])


def config(extra: dict, **more: object) -> HiCacheStorageConfig:
    """What SGLang tells a backend of one rank of one."""
    told = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "tiny",
        "extra_config": {
            "backend_name": "kvfabric",
            "module_path": "kvfabric.sglang",
            "class_name": "KvFabricStorage",
            **extra,
        },
    }
    return HiCacheStorageConfig(**{**told, **more})


def backend(host_pool: MHATokenToKVPoolHost, table: dict, *, in_place: bool = True, **more: object):
    """The backend as SGLang makes and attaches one. The table's least is added, and deadlines that
    do not turn hits into misses on a busy machine.
    """
    patient = {f"{what}_deadline_ms": 60_000 for what in ("lookup", "fetch", "store")}
    table = {"host": {"bytes": 64 * PAGE_BYTES}, "weights": "random", **patient, **table}
    told = config({"interface_v1": int(in_place), "kvfabric": table}, **more)
    made = StorageBackendFactory.create_backend("dynamic", told, host_pool)
    made.register_mem_pool_host(host_pool)
    made.on_host_pools_registered()
    return made
