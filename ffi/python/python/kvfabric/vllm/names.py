"""What the blocks of a request are called.

A block goes by the engine's own hash, which covers everything before it, the salt and the adapter's
name. An adapter can be replaced under its name, so the digest of its files goes along. The engine's
cache groups share its hashes, so the blocks of all but the first go by digests of hash and group;
routers ask by tokens, and see nothing of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import kvfabric

from .config import ConnectorConfig
from .engine import EngineFacts

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

READ_BYTES = 1 << 20
# Digests that are remembered; an engine serves far fewer adapters at once.
ADAPTERS_MAX = 4096


class RequestNames:
    """Names the full blocks of one request, as far as the engine has hashed them."""

    def __init__(
        self,
        config: ConnectorConfig,
        facts: EngineFacts,
        request: Request,
        adapter: bytes | None,
        model_identity: str = "",
    ) -> None:
        lora = request.lora_request
        self._request = request
        self._adapter = adapter or b""
        self._model_identity = model_identity.encode()
        self._block_tokens = facts.block_tokens
        self._chain = kvfabric.NameChain(
            config.key_scheme,
            facts.model,
            facts.block_tokens,
            lora=lora.lora_name if lora else "",
            cache_salt=request.cache_salt or "",
            adapter_identity=adapter,
        )

    def pack(self, start: int, stop: int) -> bytes:
        """The names of the blocks at [start, stop), all of which the engine has hashed."""
        known = len(self._chain)
        if known < stop:
            tokens = self._request.all_token_ids[
                known * self._block_tokens : stop * self._block_tokens
            ]
            self._chain.extend(tokens, self._request.block_hashes[known:stop])
        return self._chain.pack(start, stop)

    def pack_others(self, blocks: Sequence[tuple[int, int]]) -> bytes:
        """The names of blocks of other cache groups than the first: (position, group) each."""
        hashes = self._request.block_hashes
        return kvfabric.pack_hashes(
            self._model_identity,
            [_group_name(group, self._adapter, hashes[position]) for position, group in blocks],
        )


def _group_name(group: int, adapter: bytes, block_hash: bytes) -> bytes:
    domain = b"kvfabric/vllm cache group\0" + group.to_bytes(4, "little")
    return hashlib.sha256(domain + bytes([len(adapter)]) + adapter + block_hash).digest()


class AdapterDigests:
    """Digests of adapters' files. They are read once, not on the scheduler's thread."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvfabric-adapters")
        self._digests: dict[tuple[object, ...], Future[bytes]] = {}

    def digest(self, lora: LoRARequest) -> Future[bytes]:
        """The 32 bytes that stand for the adapter's weights; fails with `OSError` if its files
        cannot be read.
        """
        try:
            files = _files(lora.lora_path)
        except OSError as error:
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed
        known = self._digests.get(files)
        if known is None:
            if len(self._digests) >= ADAPTERS_MAX:
                self._digests.pop(next(iter(self._digests)))
            known = self._reader.submit(_digest, [str(file[0]) for file in files])
            self._digests[files] = known
        return known

    def shutdown(self) -> None:
        """Ends the thread; digests that nobody waits for any more are dropped."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def _files(folder: str) -> tuple[tuple[object, ...], ...]:
    """The files that make an adapter, each with what tells that it was replaced."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_file():
            stat = entry.stat()
            found.append((entry.path, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    if not found:
        raise FileNotFoundError(f"no files in {folder}")
    return tuple(sorted(found))


def _digest(paths: list[str]) -> bytes:
    whole = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                one.update(piece)
        # The path itself says nothing: another engine has the adapter in another folder.
        whole.update(os.path.basename(path).encode() + b"\0" + one.digest())
    return whole.digest()
