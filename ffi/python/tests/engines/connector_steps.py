"""Runs in an engine's own process (see :func:`bed.single.run`): does the steps that a test wrote
down, with the connector.

Arguments: a JSON object with `model`, optionally `connector` (its settings; without them the engine
has no connector), `adapters` (folders) and `engine` (more settings of the engine), and `steps`,
each a list with a name and arguments. Every step says what it found.
"""

import json
import shutil
import sys
import time
from typing import Any, Dict, List, Optional

from bed import single
from bed.model import prompt


PATIENCE = 120.0


class Steps:
    """The steps by name."""

    def __init__(self, job: Dict[str, Any]):
        more: Dict[str, Any] = {"disable_log_stats": False, **job.get("engine", {})}
        if "connector" in job:
            from vllm.config import KVTransferConfig

            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="KvFabricConnector",
                kv_connector_module_path="kvfabric.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=job["connector"],
            )
        if job.get("adapters"):
            more.update(enable_lora=True, max_lora_rank=8, max_loras=1)
        self.adapters: List[str] = job.get("adapters", [])
        self.llm = single.engine(job["model"], **more)
        self.counted: Dict[str, float] = {}

    def complete(
        self, seed: int, tokens: int, salt: Optional[str] = None, adapter: Optional[int] = None
    ) -> Dict[str, Any]:
        """One prompt; its answer, and how many of its tokens were not computed."""
        return self.together([[seed, tokens, salt, adapter]])["answers"][0]

    def together(self, prompts: List[List[Any]], max_tokens: int = 8) -> Dict[str, Any]:
        """Several prompts at once. An adapter goes by its place in `adapters`; all share a name."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        asked, loras = [], []
        for seed, tokens, *rest in prompts:
            salt, adapter = [*rest, None, None][:2]
            one: Dict[str, Any] = {"prompt_token_ids": prompt(seed, tokens)}
            if salt is not None:
                one["cache_salt"] = salt
            asked.append(one)
            lora = None
            if adapter is not None:
                lora = LoRARequest("adapter", adapter + 1, self.adapters[adapter])
            loras.append(lora)
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        said = self.llm.generate(
            asked, sampling, lora_request=loras if any(loras) else None, use_tqdm=False
        )
        answers = [
            {"tokens": list(one.outputs[0].token_ids), "cached": one.num_cached_tokens}
            for one in said
        ]
        return {"answers": answers}

    def abort(self, prompts: List[List[Any]], steps: int) -> Dict[str, Any]:
        """Aborts several requests after some steps of the engine. Says what is left of them once it
        is idle: blocks in use, requests that are tracked, and blocks held for stores.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, detokenize=False)
        names = [f"abort-{steps}-{number}" for number in range(len(prompts))]
        for name, (seed, tokens) in zip(names, prompts):
            engine.add_request(name, {"prompt_token_ids": prompt(seed, tokens)}, sampling)
        for _ in range(steps):
            engine.step()
        engine.abort_request(names)
        core = engine.engine_core.engine_core
        ends = time.monotonic() + PATIENCE
        while core.scheduler.has_requests():
            assert time.monotonic() < ends, "aborted requests do not end"
            core.step_fn()
        side, pool = core.scheduler.connector._scheduler, core.scheduler.kv_cache_manager.block_pool
        return {
            # One block is nobody's.
            "used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "tracked": len(side._tracked),
            "held": len(side._holds._readers),
        }

    def settle(self) -> Dict[str, Any]:
        """Runs the engine until it was told of every store, and keeps no blocks for one."""
        engine = self.llm.llm_engine
        ends = time.monotonic() + PATIENCE
        while engine.engine_core.engine_core.scheduler.has_requests():
            assert time.monotonic() < ends, "stores do not end"
            engine.step()
        return {}

    def reset(self) -> Dict[str, Any]:
        """Empties the engine's own prefix cache."""
        self.settle()
        assert self.llm.reset_prefix_cache()
        return {}

    def clear(self) -> Dict[str, Any]:
        """Empties the tiers too."""
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=True)
        return {}

    def replace(self, adapter: int, source: str) -> Dict[str, Any]:
        """Puts other weights into an adapter's folder."""
        shutil.copytree(source, self.adapters[adapter], dirs_exist_ok=True)
        return {}

    def flush(self) -> Dict[str, Any]:
        """Waits until what is on its way to the disk and the object store is there."""
        self.settle()
        self._node().flush().wait()
        return {}

    def forget(self, seed: int, tokens: int, group: int, position: int) -> Dict[str, Any]:
        """Takes one block of a prompt, of one of the other cache groups, out of the tiers."""
        from kvfabric.vllm.names import RequestNames
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.settle()
        core = self.llm.llm_engine.engine_core.engine_core
        side = core.scheduler.connector._scheduler
        request = Request(
            "forget",
            prompt(seed, tokens),
            SamplingParams(),
            None,
            block_hasher=core.request_block_hasher,
        )
        named = RequestNames(side._config, side._facts, request, None, side._model_identity)
        node = self._node()
        names = named.pack_others([(position, group)])
        return {"removed": node.remove(node.prefix_of(names)).wait().removed}

    def counters(self) -> Dict[str, float]:
        """By how much counters grew since this was asked last: the connector's, and preemptions."""
        self.settle()
        now: Dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if metric.name == "vllm:num_preemptions":
                now["preemptions"] = metric.value
            if metric.name.startswith("vllm:kvfabric_"):
                source = metric.labels.get("source")
                name = metric.name.removeprefix("vllm:kvfabric_").removesuffix("_total")
                now[f"{name}_{source}" if source else name] = metric.value
        grown = {name: value - self.counted.get(name, 0) for name, value in now.items()}
        self.counted = now
        return {name: value for name, value in grown.items() if value}

    def pool(self) -> Dict[str, Any]:
        """How the memory of the engine's blocks is mapped: permissions, and the file if there is
        one.
        """
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        tensor = next(iter(get_kv_transfer_group()._worker._tensors.values()))
        with open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                span, permissions, _, _, _, *path = line.split()
                start, stop = (int(one, 16) for one in span.split("-"))
                if start <= tensor.data_ptr() < stop:
                    return {"permissions": permissions, "file": " ".join(path)}
        raise AssertionError("the pool is not mapped")

    def tiers(self) -> Dict[str, int]:
        """The node's own counters."""
        self.settle()
        return dict(self._node().stats())

    def _node(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker._node


def main() -> None:
    job = json.loads(sys.argv[1])
    steps = Steps(job)
    for name, *arguments in job["steps"]:
        single.say(step=name, **getattr(steps, name)(*arguments))
    steps.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
