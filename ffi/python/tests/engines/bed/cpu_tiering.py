"""vLLM's tiered offloading on a CPU.

The scheduler's half is vLLM's own. Only the worker's half is here, because vLLM's copies with CUDA:
a copy of each page between the engine's memory and its host memory tier, done at once.
"""

from typing import List, Set

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """To be named as ``spec_name``, with ``spec_module_path`` "bed.cpu_tiering"."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = CopyingWorker(self, kv_caches)
        return self._worker


class CopyingWorker(OffloadingWorker):
    """Copies pages of one cache group."""

    def __init__(self, spec: TieringOffloadingSpec, caches: CanonicalKVCaches):
        assert len(caches.group_data_refs) == 1, "one cache group only"
        self._blocks_per_row = spec.blocks_per_chunk
        self._region = SharedOffloadRegion(
            engine_id=spec.config.engine_id,
            num_chunks=spec.num_chunks,
            rank=spec.config.parallel.rank,
            kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
            cpu_page_size=spec.cpu_page_size_per_worker,
        )
        self._page_bytes = [cache.page_size_bytes for cache in caches.tensors]
        self._pages = [cache.tensor for cache in caches.tensors]
        self._rows = [
            self._region.create_next_worker_view(size * self._blocks_per_row)
            for size in self._page_bytes
        ]
        self._finished: List[TransferResult] = []

    def submit_store(self, job_id, src_spec, dst_spec) -> bool:
        for page, row in self._pairs(src_spec, dst_spec):
            row.copy_(page)
        return self._done(job_id, len(src_spec.block_ids))

    def submit_load(self, job_id, src_spec, dst_spec) -> bool:
        for page, row in self._pairs(dst_spec, src_spec):
            page.copy_(row)
        return self._done(job_id, len(dst_spec.block_ids))

    def get_finished(self) -> List[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: Set[int]) -> None:
        """Nothing is ever on its way."""

    def shutdown(self) -> None:
        self._rows.clear()
        self._region.cleanup()

    def _pairs(self, blocks, rows):
        """Each page of the engine's memory with its place in a row."""
        first = int(blocks.block_indices[0]) % self._blocks_per_row
        for number, block in enumerate(blocks.block_ids.tolist(), first):
            row = int(rows.block_ids[number // self._blocks_per_row])
            place = number % self._blocks_per_row
            for pages, size, view in zip(self._pages, self._page_bytes, self._rows):
                page = pages[block].reshape(-1).view(torch.int8)
                yield page, view[row, place * size : (place + 1) * size]

    def _done(self, job_id: int, blocks: int) -> bool:
        moved = blocks * sum(self._page_bytes)
        self._finished.append(TransferResult(job_id, True, moved, 0.0))
        return True
