"""Run by test_nixl_sglang.py: SGLang's own NIXL connector code, on host memory, with this process or its child as decode.

The class that prefill and decode run is SGLang's. Its constructor wants a server, so what it sets up is set up here, with the
same calls; everything that moves bytes is the class's.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any, Dict, List

# torch looks for triton when these are imported, and must not find what stands in for it.
import torch._dynamo
import torch._inductor.compile_fx
import torch.utils.flop_counter  # noqa: F401

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE.parent / "sglang"),
    str(pathlib.Path(os.environ["KVFABRIC_ENGINES"]) / "sglang"),
]

import absent  # noqa: E402

absent.stand_in_for("triton")

import numpy as np  # noqa: E402
from bed import single  # noqa: E402
from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t  # noqa: E402
from sglang.srt.disaggregation.base.conn import KVArgs  # noqa: E402
from sglang.srt.disaggregation.nixl import conn  # noqa: E402

LAYERS = 3
SLOTS = 40
SLOT_BYTES = 1536
AUX_BYTES = 64
REGIONS = 2 * LAYERS


class Side:
    """One side: SGLang's manager over numbered host memory, one region for keys and one for values of each layer."""

    def __init__(self, start: int):
        count = REGIONS * SLOTS * SLOT_BYTES
        self.kv = (
            ((np.arange(count) + start) % 241).astype(np.uint8).reshape(REGIONS, SLOTS, SLOT_BYTES)
        )
        self.aux = ((np.arange(4 * AUX_BYTES) + start) % 239).astype(np.uint8).reshape(4, AUX_BYTES)
        args = KVArgs()
        args.kv_data_ptrs = [region.ctypes.data for region in self.kv]
        args.kv_data_lens = [SLOTS * SLOT_BYTES] * REGIONS
        args.kv_item_lens = [SLOT_BYTES] * REGIONS
        args.kv_data_mem_kinds = ["DRAM"] * REGIONS
        args.aux_data_ptrs, args.aux_data_lens = [self.aux.ctypes.data], [self.aux.nbytes]
        args.aux_item_lens = [AUX_BYTES]
        args.state_data_ptrs, args.state_data_lens = [], []
        args.gpu_id = args.prefill_start_layer = 0
        manager = object.__new__(conn.NixlKVManager)
        manager.kv_args, manager.is_mla_backend = args, False
        manager.agent = nixl_agent(
            f"side-{start}",
            nixl_agent_config(
                backends=[],
                num_threads=8,
                sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            ),
        )
        manager.agent.create_backend("UCX", {"num_threads": "8"})
        manager.prep_handles, manager.decode_kv_args_table = {}, {}
        manager.prep_handles_slice_dst, manager._prepared_state_plans = {}, {}
        manager._num_slots_src = SLOTS
        manager._peer_reload_lock, manager._peer_reload_times = threading.Lock(), {}
        manager.register_buffer_to_engine()
        self.manager = manager

    def card(self) -> Dict[str, Any]:
        """What decode tells prefill."""
        args = self.manager.kv_args
        return {
            "name": self.manager.agent.name,
            "metadata": self.manager.agent.get_agent_metadata().hex(),
            "kv": args.kv_data_ptrs,
            "aux": args.aux_data_ptrs,
        }


def decode() -> None:
    """The decode side in a process of its own: answers with its bytes until its input ends."""
    side = Side(100)
    print(json.dumps(side.card()), flush=True)
    for line in sys.stdin:
        region, slot = json.loads(line)
        rows = side.aux if region is None else side.kv[region]
        print(json.dumps(rows[slot].tolist()), flush=True)


class Decode:
    """That process, as prefill sees it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.card = json.loads(self.process.stdout.readline())

    def row(self, region: Any, slot: int) -> List[int]:
        """The bytes of one of its slots, or of its metadata buffer without a region."""
        self.process.stdin.write(json.dumps([region, slot]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def introduce(prefill: Side, card: Dict[str, Any]) -> str:
    """What prefill does with a decode peer when it registers."""
    manager, name = prefill.manager, card["name"]
    manager.decode_kv_args_table[name] = conn.KVArgsRegisterInfo(
        room="None",
        endpoint="",
        dst_port=0,
        agent_name=name,
        agent_metadata=bytes.fromhex(card["metadata"]),
        dst_kv_ptrs=card["kv"],
        dst_kv_mem_kinds=["DRAM"] * REGIONS,
        dst_aux_ptrs=card["aux"],
        dst_state_data_ptrs=[],
        gpu_id=0,
        decode_tp_size=1,
        decode_tp_rank=0,
        dst_kv_item_len=SLOT_BYTES,
        dst_kv_item_lens=[SLOT_BYTES] * REGIONS,
        dst_num_slots=SLOTS,
    )
    manager.agent.add_remote_agent(bytes.fromhex(card["metadata"]))
    manager._init_equal_tp_prep_handle("", manager.kv_args.kv_data_ptrs, 0, mem_kind="DRAM")
    manager._init_equal_tp_prep_handle(name, card["kv"], 0, num_slots=SLOTS, mem_kind="DRAM")
    return name


def send(
    prefill: Side, card: Dict[str, Any], sources: List[int], targets: List[int], prepared: bool
) -> Any:
    """The connector's transfer of some slots of all layers."""
    args = prefill.manager.kv_args
    return prefill.manager._send_kvcache_generic(
        card["name"],
        args.kv_data_ptrs,
        card["kv"],
        args.kv_item_lens,
        np.array(sources, np.int32),
        np.array(targets, np.int32),
        0,
        src_mem_kind="DRAM",
        dst_mem_kind="DRAM",
        bypass_prepped=not prepared,
    )


def main() -> None:
    prefill, other = Side(0), Decode()
    manager, card = prefill.manager, other.card
    name = introduce(prefill, card)
    for prepared, sources, targets in (
        (True, [3, 4, 9], [7, 8, 1]),
        (False, [5, 6, 30], [20, 21, 39]),
    ):
        handles = [send(prefill, card, sources, targets, prepared)]
        handles.append(manager.send_aux(name, 2, card["aux"], 3))
        settled = manager._await_handles(handles, failure_seen=False)
        same = all(
            other.row(region, target) == prefill.kv[region, source].tolist()
            for region in range(REGIONS)
            for source, target in zip(sources, targets)
        )
        untouched = other.row(0, 15) == [
            (100 + 15 * SLOT_BYTES + n) % 241 for n in range(SLOT_BYTES)
        ]
        aux = other.row(None, 3) == prefill.aux[2].tolist()
        single.say(prepared=prepared, settled=settled, same=same, untouched=untouched, aux=aux)
    # Decode dies: the next post fails as a transport error, and what is known of it can be loaded again.
    other.process.kill()
    other.process.wait()
    try:
        handle = send(prefill, card, [0], [0], True)
        settled, failed = manager._await_handles([handle], failure_seen=False)
        error = None
    except conn._NixlPostError as post_error:
        settled, failed, error = None, True, post_error.__cause__
    single.say(
        failed=failed, transport=error is None or isinstance(error, conn._NIXL_TRANSPORT_ERRORS)
    )
    manager._reload_invalidated_peers({name: None})
    single.say(known=manager.agent.check_remote_metadata(name), strided=manager._use_strided_descs)


if __name__ == "__main__":
    decode() if sys.argv[1:] == ["decode"] else main()
