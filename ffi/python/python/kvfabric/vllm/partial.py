"""The name of a prompt's last block when the prompt ends within it.

The engine itself hashes full blocks only. A prefill engine has computed the rest of the prompt as
well, so for a hand-off that rest gets a name in the engine's own way: the hash of what comes before
it and of its tokens. It cannot be that of a full block, which has more tokens. What depends on the
version of vLLM is all here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens

import kvfabric

from .config import ConnectorConfig
from .engine import EngineFacts

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Stands for a token that is not there. No vocabulary has it, so no router asks for such a block.
NO_TOKEN = (1 << 32) - 1


def partial_tokens(request: Request, block_tokens: int) -> int:
    """Tokens in the prompt's last block if that can be named and is not full, else 0.

    Prompts shorter than a block are not worth handing off, and pictures may begin in the last block
    and end anywhere.
    """
    if request.mm_features or request.num_prompt_tokens < block_tokens:
        return 0
    return int(request.num_prompt_tokens % block_tokens)


class PromptNames:
    """Names all blocks of a request's prompt, the partial last one included."""

    def __init__(
        self, config: ConnectorConfig, facts: EngineFacts, request: Request, adapter: bytes | None
    ) -> None:
        size = facts.block_tokens
        count = partial_tokens(request, size)
        assert count > 0, "the prompt ends with a full block"
        stop = request.num_prompt_tokens
        start = stop - count
        lora = request.lora_request
        self._chain = kvfabric.NameChain(
            config.key_scheme,
            facts.model,
            size,
            lora=lora.lora_name if lora else "",
            cache_salt=request.cache_salt or "",
            adapter_identity=adapter,
        )
        hashes = list(request.block_hashes[: start // size])
        self._chain.extend(request.all_token_ids[:start], hashes)
        tokens = list(request.all_token_ids[start:stop])
        extra, _ = generate_block_hash_extra_keys(request, start, stop, 0)
        digest = hash_block_tokens(_hash(facts.hash_name), hashes[-1], tokens, extra)
        self._chain.extend(tokens + [NO_TOKEN] * (size - count), [bytes(digest)])

    def __len__(self) -> int:
        return len(self._chain)

    def pack(self, start: int, stop: int) -> bytes:
        """The names of the blocks at [start, stop)."""
        return self._chain.pack(start, stop)


@lru_cache(maxsize=8)
def _hash(name: str) -> Callable[[Any], bytes]:
    return get_hash_fn_by_name(name)
