"""SGLang's NIXL connector code, of the pinned wheel, on the drop-in for NIXL.

Its engine needs a GPU; the class that moves its KV cache does not, if the pool is in host memory, as with its HiSparse. It is
run in two processes, one of which is killed in the end. Only triton, which modules on the way import, is stood in for.
"""

import pathlib

import nixl_path
import pytest
from bed import folder, single

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def said(logs):
    """What the run said, line by line."""
    env = {**nixl_path.environment(), "KVFABRIC_ENGINES": str(folder.engines())}
    return single.run(HERE / "sglang_pair.py", logs, env=env, cold=True)


@pytest.mark.parametrize("case, prepared", [(0, True), (1, False)])
def test_slots_of_all_layers_and_their_metadata_reach_the_decode_process(said, case, prepared):
    """By prepared Nx5 lists with indices, and by lists of grouped slots that are made for one transfer."""
    assert said[case] == {
        "prepared": prepared,
        "settled": [True, False],
        "same": True,
        "untouched": True,
        "aux": True,
    }


def test_a_dead_decode_process_is_a_transport_error_to_sglang(said):
    """The classes of exceptions that it sorts failures by; strided lists were used, not the way around them."""
    assert said[2] == {"failed": True, "transport": True}
    assert said[3] == {"known": True, "strided": True}
