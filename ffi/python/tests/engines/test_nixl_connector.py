"""vLLM's own NixlConnector, unmodified, on the drop-in for NIXL: prefill in one engine, decode in another.

Four engines are shared by all cases: a decoding one, a prefilling one that it reaches by the best way on this host, one whose
pool is shared memory, and one that it can only reach by TCP, whose transfers can be held up and cut off by stopping and killing
it.
"""

import concurrent.futures
import contextlib
import pathlib
from typing import Any, Dict, Iterator, List, NamedTuple

import msgspec
import nixl_path
import pytest
import zmq
from bed.model import prompt
from bed.process import free_port
from bed.server import BLOCK_TOKENS, Answer, Counted, Engine

PROMPT_TOKENS = 150
OUTPUT_TOKENS = 8
SECONDS = 120.0
WAYS = ("near", "shared", "by_tcp")
# How often the engines may try to get to know each other; their prompts are no other's.
INTRODUCTIONS = 10

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}

# One prompt for each case, so that none finds another one's blocks in the engine's own cache.
PROMPTS = [prompt(seed, PROMPT_TOKENS) for seed in range(31, 38)]
NEAR, LOCAL, BY_TCP, CUT, AFTER, LATER, SHARED = PROMPTS


class Prefiller(NamedTuple):
    """An engine that prefills, and the port of its connector's handshake."""

    engine: Engine
    handshake: int


class Fleet(NamedTuple):
    """What all cases share."""

    decoder: Engine
    near: Prefiller
    shared: Prefiller
    by_tcp: Prefiller


def nixl_engine(
    model: pathlib.Path, logs: pathlib.Path, name: str, role: str, module: str = "", **env: str
) -> Prefiller:
    """An engine with NixlConnector, vLLM's or that of a module; it is starting."""
    handshake = free_port()
    config: Dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
    }
    if module:
        config["kv_connector_module_path"] = module
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(handshake),
        # The way that bytes take is in the engine's log then.
        "NIXL_LOG_LEVEL": "INFO",
        **nixl_path.environment(),
        **env,
    }
    return Prefiller(Engine(model, logs, name, kv_transfer=config, env=env), handshake)


@pytest.fixture(scope="module")
def computed(tiny_model: pathlib.Path, logs: pathlib.Path) -> List[List[int]]:
    """What an engine without any connector answers to each prompt."""
    with Engine(tiny_model, logs, "alone") as engine:
        return [engine.complete(each, OUTPUT_TOKENS).tokens for each in PROMPTS]


@pytest.fixture(scope="module")
def fleet(
    computed: List[List[int]], tiny_model: pathlib.Path, logs: pathlib.Path
) -> Iterator[Fleet]:
    """The three engines. The engine alone is over by then: this machine may be small."""
    with contextlib.ExitStack() as stack:
        started = [
            nixl_engine(tiny_model, logs, "decoder", "kv_consumer"),
            nixl_engine(tiny_model, logs, "near", "kv_producer"),
            # Nothing may be copied from process to process.
            nixl_engine(
                tiny_model,
                logs,
                "shared",
                "kv_producer",
                "kvfabric.vllm.nixl",
                KVFABRIC_NIXL_CMA="false",
            ),
            nixl_engine(
                tiny_model,
                logs,
                "by-tcp",
                "kv_producer",
                KVFABRIC_NIXL_SHM="false",
                KVFABRIC_NIXL_CMA="false",
            ),
        ]
        for each in started:
            stack.callback(each.engine.stop)
        for each in started:
            # vLLM's NIXL connectors keep to the last core of a CPU. The workers of several engines, which wait by
            # spinning, starve each other there.
            each.engine.ready().child.spread()
        fleet = Fleet(started[0].engine, *started[1:])
        for number, which in enumerate(WAYS):
            introduce(fleet, getattr(fleet, which), number)
        yield fleet


def introduce(fleet: Fleet, prefiller: Prefiller, number: int) -> None:
    """Has the decoder get to know an engine. vLLM gives that five seconds, which a busy machine may need for something else,
    and computes the request otherwise; the next one tries again.
    """
    for attempt in range(INTRODUCTIONS):
        tokens = prompt(INTRODUCTIONS * number + attempt, PROMPT_TOKENS)
        with Counted(fleet.decoder) as counted:
            decode(fleet, tokens, prefill(prefiller, tokens))
        if counted.grew("vllm:nixl_bytes_transferred_sum") > 0:
            return
    raise AssertionError(fleet.decoder.child.explain("the engines do not get to know each other"))


def prefill(prefiller: Prefiller, tokens: List[int]) -> Dict[str, Any]:
    """Computes a prompt and says where its blocks are."""
    params = prefiller.engine.complete(tokens, 1, kv_transfer_params=PREFILL).kv_transfer_params
    assert params is not None and params["do_remote_prefill"], params
    return params


def decode(fleet: Fleet, tokens: List[int], params: Dict[str, Any]) -> Answer:
    """Completes a prompt whose blocks are elsewhere."""
    return fleet.decoder.complete(tokens, OUTPUT_TOKENS, kv_transfer_params=params)


def test_the_connector_speaks_to_the_drop_in_and_not_to_nixl(fleet):
    """The handshake that a decoder makes: the agent's metadata in it is kvfabric's."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(SECONDS * 1000))
        socket.connect(f"tcp://127.0.0.1:{fleet.near.handshake}")
        socket.send(msgspec.msgpack.encode((b"get_meta_msg", 0, 0)))
        payload = msgspec.msgpack.decode(socket.recv_multipart()[0])
    agent = msgspec.msgpack.decode(payload["agent_metadata_bytes"])
    assert agent["agent_metadata"].startswith(b"KVFNIXL\0")


@pytest.mark.parametrize("which, case", [("near", 0), ("shared", 6), ("by_tcp", 2)])
def test_every_token_comes_from_the_prefiller_and_the_answer_is_the_same(
    fleet, computed, which, case
):
    """150 tokens of 150, the last, partial block included, by each path."""
    params = prefill(getattr(fleet, which), PROMPTS[case])
    with Counted(fleet.decoder) as counted:
        answer = decode(fleet, PROMPTS[case], params)
    assert answer.tokens == computed[case]
    assert counted.external_hits == PROMPT_TOKENS
    assert counted.grew("vllm:nixl_bytes_transferred_sum") > 0
    assert counted.grew("vllm:nixl_num_failed_transfers") == 0
    assert counted.grew("vllm:nixl_num_failed_notifications") == 0
    reached = [line for line in log_of(fleet.decoder) if " is reached by " in line]
    # One line for each engine, in the order of their introductions.
    assert len(reached) == len(WAYS)
    way = {"near": "", "shared": "shm: ", "by_tcp": "tcp: "}[which]
    assert f" is reached by {way}" in reached[WAYS.index(which)]
    print(reached[WAYS.index(which)])
    print(f"{which}: {how_long(counted)}")


def test_only_what_is_not_local_is_transferred(fleet, computed):
    """The same prompt twice: the second time the decoder has all full blocks, and reads the partial one."""
    for expected in (PROMPT_TOKENS, PROMPT_TOKENS % BLOCK_TOKENS):
        params = prefill(fleet.near, LOCAL)
        with Counted(fleet.decoder) as counted:
            assert decode(fleet, LOCAL, params).tokens == computed[1]
        assert counted.external_hits == expected
        assert counted.grew("vllm:nixl_num_failed_notifications") == 0


def test_a_prefiller_killed_during_a_transfer_costs_time_but_no_token(fleet, computed):
    """The prefiller is stopped, so that the transfer hangs, and then killed; after that it cannot even be reached."""
    params = prefill(fleet.by_tcp, CUT)
    after = prefill(fleet.by_tcp, AFTER)
    fleet.by_tcp.engine.child.freeze()
    with Counted(fleet.decoder) as counted:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(decode, fleet, CUT, params)
            wait_until_it_waits(fleet.decoder)
            assert not answer.done()
            fleet.by_tcp.engine.kill()
            assert answer.result(SECONDS).tokens == computed[3]
    assert counted.grew("vllm:nixl_num_failed_transfers") >= 1
    assert decode(fleet, AFTER, after).tokens == computed[4]
    # The other one is served as before.
    params = prefill(fleet.near, LATER)
    with Counted(fleet.decoder) as counted:
        assert decode(fleet, LATER, params).tokens == computed[5]
    assert counted.external_hits == PROMPT_TOKENS


def log_of(engine: Engine) -> List[str]:
    """The lines that an engine has written so far."""
    return engine.child.log.read_text(encoding="utf-8", errors="replace").splitlines()


def how_long(counted: Counted) -> str:
    """What vLLM says of the transfers that it counted."""
    post, whole = (
        counted.grew(f"vllm:nixl_{name}_time_seconds_sum") * 1e6 for name in ("post", "xfer")
    )
    moved = counted.grew("vllm:nixl_bytes_transferred_sum")
    ranges = counted.grew("vllm:nixl_num_descriptors_sum")
    return f"{moved:.0f} bytes, {ranges:.0f} ranges, post {post:.0f} us, all {whole:.0f} us"


def wait_until_it_waits(decoder: Engine) -> None:
    """Returns once a request of the decoder waits for blocks of another engine."""
    decoder.wait_until(
        lambda: decoder.metrics().sum("vllm:num_requests_waiting") > 0, "waiting", SECONDS
    )
