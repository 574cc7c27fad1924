"""Two engines with the connector and an index: hand-offs, hits at a peer, what the index says, and
peers that go away.

Both engines are real servers, started once. A third, plain one says what the answers are without a
connector.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import threading
import time
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Sequence

import psutil
import pytest
from bed import indexer as indexes
from bed.metrics import Metrics
from bed.model import prompt
from bed.process import free_port
from bed.server import BLOCK_TOKENS, MODEL_NAME, Answer, Counted, Engine, EventPorts

import kvfabric

PATIENCE = 120.0
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Prompts of this module: each test has its own seeds, so that none finds another's blocks.
TOKENS = 150
DEPTH = TOKENS // BLOCK_TOKENS
# A hand-off brings the partial last block too.
HANDED = DEPTH + 1
FETCH_DEADLINE_SECONDS = 2
PREFILL_METRICS = free_port()


def kv_transfer(
    role: str = "kv_both", policy: str = "recompute", **settings: Any
) -> Dict[str, Any]:
    """The engine's ``--kv-transfer-config``."""
    return {
        "kv_connector": "KvFabricConnector",
        "kv_connector_module_path": "kvfabric.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {
            "host": {"bytes": 32 << 20},
            "min_fetch_tokens": BLOCK_TOKENS,
            # A busy machine must not turn hits into misses; a peer that is gone is given up sooner.
            "lookup_deadline_ms": 10_000,
            "handoff_deadline_ms": 3_000,
            "fetch_deadline_ms": FETCH_DEADLINE_SECONDS * 1000,
            **settings,
        },
    }


@pytest.fixture(scope="module")
def index(logs: pathlib.Path) -> Iterator[str]:
    with indexes.running(logs) as address:
        yield address


class Pair:
    """A prefill engine, a decode engine, and the answers of one that has no connector."""

    def __init__(self, engines: Callable[[str], Engine], index: str):
        self._engines = engines
        self.index = index
        started = [engines(name) for name in ("prefill", "decode", "plain")]
        self.prefill, self.decode, self.plain = [engine.ready() for engine in started]

    def restart_prefill(self) -> None:
        self.prefill = self._engines("prefill").ready()

    def expected(self, seed: int, tokens: int = TOKENS) -> List[int]:
        return self.plain.complete(prompt(seed, tokens)).tokens

    def hand_off(self, seed: int, tokens: int = TOKENS) -> Dict[str, Any]:
        """Prefills at one engine; what its client would tell the other."""
        answer = self.prefill.complete(prompt(seed, tokens), 1, kv_transfer_params=PREFILL)
        assert answer.kv_transfer_params is not None
        return answer.kv_transfer_params

    def pinned(self) -> float:
        """Blocks that the prefill engine's node keeps for decode engines."""
        url = f"http://127.0.0.1:{PREFILL_METRICS}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
            return Metrics(reply.read().decode()).sum("kvfabric_node_pinned_blocks")


@pytest.fixture(scope="module")
def pair(tiny_model, logs, index) -> Iterator[Pair]:
    there = indexes.table(index)
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Engine:
            more: Dict[str, Any] = {}
            if name != "plain":
                settings: Dict[str, Any] = {"pod": name, "index": there}
                if name == "prefill":
                    settings.update(metrics_listen=f"127.0.0.1:{PREFILL_METRICS}", pin_ttl_s=600)
                more.update(kv_transfer=kv_transfer(**settings), events=EventPorts())
            engine = Engine(tiny_model, logs, name, **more)
            stack.callback(engine.stop)
            return engine

        yield Pair(start, index)


def found(pair: Pair, asked: Sequence[int], pod: str, by_tier: Sequence[int]) -> None:
    """Asks the index until it credits the pod with these blocks; it follows at its own pace."""
    connection = kvfabric.Index(pair.index)
    held: Sequence[int] = ()

    def is_so() -> bool:
        nonlocal held
        pods = {one.pod: one for one in connection.lookup(asked, model=MODEL_NAME)}
        held = pods[pod].by_tier if pod in pods else (0, 0, 0, 0)
        return tuple(held) == tuple(by_tier)

    try:
        # An engine that outlives all tests of the pair.
        pair.plain.wait_until(is_so, "beside an index that says so", PATIENCE)
    except AssertionError:
        raise AssertionError(f"the index says {held} of {pod}, not {by_tier}") from None


@contextlib.contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """The engine's processes are halted, as by a hypervisor, and go on afterwards if they still
    live.
    """
    family = engine.child.freeze()
    try:
        yield
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def test_a_handed_off_prefill_is_fetched_and_answers_as_without_a_connector(pair):
    """Prefill at one engine, its reply's parameters to the other: every token is fetched, those in
    the partial last block too.
    """
    params = pair.hand_off(101)
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    assert (params["kvfabric"]["depth"], params["kvfabric"]["tokens"]) == (HANDED, TOKENS)
    with Counted(pair.decode) as counted:
        answer = pair.decode.complete(prompt(101, TOKENS), kv_transfer_params=params)
    assert answer.tokens == pair.expected(101)
    assert answer.kv_transfer_params is None
    assert counted.external_hits == TOKENS
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == HANDED
    assert counted.grew("vllm:kvfabric_fetches_failed") == 0
    by_source = "vllm:prompt_tokens_by_source"
    assert counted.grew(by_source, source="external_kv_transfer") == TOKENS


def test_a_prefill_engine_keeps_blocks_until_they_were_fetched(pair):
    """Long before the time to live is over, its node has let go of a prompt that was fetched, and
    of one that turned out to be of no use.
    """
    pair.prefill.wait_until(lambda: pair.pinned() == 0, "done with earlier hand-offs")
    for seed, asked in ((103, 103), (104, 105)):
        params = pair.hand_off(seed)
        pair.prefill.wait_until(lambda: pair.pinned() == HANDED, "keeping the blocks")
        answer = pair.decode.complete(prompt(asked, TOKENS), kv_transfer_params=params)
        assert answer.tokens == pair.expected(asked)
        pair.prefill.wait_until(lambda: pair.pinned() == 0, "letting go of the blocks")


def test_a_partial_block_is_no_prefix_of_anything_else(pair):
    """A prompt that ends within the other's partial block, and one that goes on behind it: each
    gets the full blocks, and computes the rest.
    """
    for seed, tokens in ((106, TOKENS - 3), (107, TOKENS + 3)):
        params = pair.hand_off(seed)
        params["kvfabric"]["tokens"] = tokens
        with Counted(pair.decode) as counted:
            answer = pair.decode.complete(prompt(seed, tokens), kv_transfer_params=params)
        assert answer.tokens == pair.expected(seed, tokens)
        assert counted.external_hits == DEPTH * BLOCK_TOKENS
        assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == DEPTH


def test_a_hand_off_of_whole_blocks_only_leaves_one_token_to_compute(pair):
    """The prompt ends with a block: all of it is fetched, and the last token computed again."""
    params = pair.hand_off(102, 4 * BLOCK_TOKENS)
    with Counted(pair.decode) as counted:
        answer = pair.decode.complete(prompt(102, 4 * BLOCK_TOKENS), kv_transfer_params=params)
    assert answer.tokens == pair.expected(102, 4 * BLOCK_TOKENS)
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == 4


def test_many_hand_offs_at_once_all_answer_right(pair):
    """Eight clients, each with a hand-off of its own."""
    seeds = list(range(110, 118))
    answers: Dict[int, Answer] = {}

    def client(seed: int) -> None:
        params = pair.hand_off(seed, 300)
        answers[seed] = pair.decode.complete(prompt(seed, 300), kv_transfer_params=params)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in seeds]
    with Counted(pair.decode) as counted:
        for one in clients:
            one.start()
        for one in clients:
            one.join(PATIENCE)
    assert {seed: answers[seed].tokens for seed in seeds} == {
        seed: pair.expected(seed, 300) for seed in seeds
    }
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") > 0


def test_parameters_that_are_not_ours_are_computed_and_counted(pair):
    """What another connector's prefill engine says, and a hand-off of another model."""
    params = pair.hand_off(120)
    params["kvfabric"]["model_identity"] = "00" * 32
    foreign = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1]]}
    for seed, sent in ((121, foreign), (122, params)):
        with Counted(pair.decode) as counted:
            answer = pair.decode.complete(prompt(seed, TOKENS), kv_transfer_params=sent)
        assert answer.tokens == pair.expected(seed)
        assert counted.external_hits == 0
        assert counted.grew("vllm:kvfabric_handoffs_refused") == 1


def test_a_peer_that_the_operator_does_not_trust_is_not_asked(pair):
    """A client names an address on the internet; the blocks are computed."""
    params = pair.hand_off(125)
    params["kvfabric"]["peer_addresses"] = ["203.0.113.7:80"]
    with Counted(pair.decode) as counted:
        for seed in (126, 127):
            answer = pair.decode.complete(prompt(seed, TOKENS), kv_transfer_params=params)
            assert answer.tokens == pair.expected(seed)
    assert counted.external_hits == 0
    assert counted.grew("vllm:kvfabric_peers_refused") == 2
    log = pair.decode.child.log.read_text(encoding="utf-8", errors="replace")
    assert log.count("'203.0.113.7' is not in peers_allow") == 1


def test_the_index_follows_the_engine_and_its_tiers(pair):
    """Depth and tier after a store, after a reset of the engine, and after one of the tiers."""
    asked = prompt(130, TOKENS)
    pair.prefill.complete(asked)
    found(pair, asked, "prefill", (DEPTH, 0, 0, 0))
    pair.prefill.reset_prefix_cache()
    # The engine tells of its reset in its next step.
    pair.prefill.complete(prompt(131, 40))
    found(pair, asked, "prefill", (0, DEPTH, 0, 0))
    pair.prefill.reset_prefix_cache(external=True)
    pair.prefill.complete(prompt(132, 40))
    found(pair, asked, "prefill", (0, 0, 0, 0))
    # What came after the reset is known.
    found(pair, prompt(132, 40), "prefill", (1, 0, 0, 0))


def test_an_evicted_block_stays_with_the_pod_in_its_slower_tier(pair):
    """Other prompts push the blocks out of the engine; the index then credits memory."""
    asked = prompt(140, TOKENS)
    pair.prefill.complete(asked)
    found(pair, asked, "prefill", (DEPTH, 0, 0, 0))
    for seed in range(141, 148):
        pair.prefill.complete(prompt(seed, 450))
    found(pair, asked, "prefill", (0, DEPTH, 0, 0))
    with Counted(pair.prefill) as counted:
        assert pair.prefill.complete(asked).tokens == pair.expected(140)
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="dram") == DEPTH
    found(pair, asked, "prefill", (DEPTH, 0, 0, 0))


def test_an_engine_finds_a_peers_blocks_through_the_index(pair):
    """No hand-off: the second engine asks the index, and reads from the first."""
    asked = prompt(150, TOKENS)
    pair.prefill.complete(asked)
    pair.prefill.reset_prefix_cache()
    pair.prefill.complete(prompt(151, 40))
    found(pair, asked, "prefill", (0, DEPTH, 0, 0))
    with Counted(pair.decode) as counted:
        assert pair.decode.complete(asked).tokens == pair.expected(150)
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == DEPTH
    assert counted.external_hits == DEPTH * BLOCK_TOKENS


def test_a_peer_that_stops_answering_costs_a_deadline_and_no_wrong_token(pair):
    """The prefill engine is halted after its hand-off; the blocks are computed."""
    # One that never served is left alone for a while when it does not answer.
    served = pair.hand_off(162)
    pair.decode.complete(prompt(162, TOKENS), kv_transfer_params=served)
    params = pair.hand_off(160)
    with stopped(pair.prefill), Counted(pair.decode) as counted:
        answer = pair.decode.complete(prompt(160, TOKENS), kv_transfer_params=params)
    assert answer.tokens == pair.expected(160)
    assert counted.external_hits == 0 or counted.grew("vllm:kvfabric_fetches_failed") == 1
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == 0
    # It serves again as soon as it goes on.
    params = pair.hand_off(161)
    with Counted(pair.decode) as counted:
        answer = pair.decode.complete(prompt(161, TOKENS), kv_transfer_params=params)
    assert answer.tokens == pair.expected(161)
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="peer") == HANDED


class Gate:
    """A relay in front of a peer service, which holds back the first answer until it is opened: so
    a test can do something between the answer where blocks are and the fetch of them. It knows as
    much of HTTP/2 as that takes.
    """

    END_STREAM = 0x1
    DATA, HEADERS = 0, 1

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.answered = threading.Event()
        self.opened = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return "127.0.0.1:%d" % self._listener.getsockname()[1]

    def close(self) -> None:
        self.opened.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                threading.Thread(target=self._questions, args=(near, far), daemon=True).start()
                threading.Thread(target=self._answers, args=(far, near), daemon=True).start()

    @staticmethod
    def _questions(near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)

    def _answers(self, far: socket.socket, near: socket.socket) -> None:
        held = b""
        with contextlib.suppress(OSError), far.makefile("rb") as frames:
            while head := frames.read(9):
                kind, flags = head[3], head[4]
                held += head + frames.read(int.from_bytes(head[:3], "big"))
                if kind in (self.DATA, self.HEADERS):
                    if not flags & self.END_STREAM:
                        continue
                    self.answered.set()
                    self.opened.wait()
                near.sendall(held)
                held = b""


@contextlib.contextmanager
def fetch_from_halted(pair: Pair, seed: int) -> Iterator[Callable[[], Answer]]:
    """The decode engine was told where blocks are, and fetches them from an engine that is halted
    meanwhile; gives what waits for its answer.
    """
    params = pair.hand_off(seed)
    gate = Gate(params["kvfabric"]["peer_addresses"][0])
    params["kvfabric"]["peer_addresses"] = [gate.address]
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        answer = client.submit(
            pair.decode.complete, prompt(seed, TOKENS), kv_transfer_params=params
        )
        try:
            assert gate.answered.wait(PATIENCE), "nobody asked where the blocks are"
            with stopped(pair.prefill):
                gate.opened.set()
                yield lambda: answer.result(PATIENCE)
        finally:
            gate.close()


def test_a_peer_killed_during_a_fetch_costs_a_deadline_and_no_wrong_token(pair):
    """The prefill engine says where the blocks are, is halted, and dies while they are fetched."""
    with Counted(pair.decode) as counted, fetch_from_halted(pair, 170) as answer:
        pair.prefill.kill()
        assert answer().tokens == pair.expected(170)
    assert counted.grew("vllm:kvfabric_fetches_failed") == 1
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="miss") == HANDED
    # The decode engine goes on, and the index forgets who is gone.
    assert pair.decode.complete(prompt(171, TOKENS)).tokens == pair.expected(171)
    found(pair, prompt(170, TOKENS), "prefill", (0, 0, 0, 0))


def test_an_engine_that_is_told_to_end_during_a_fetch_ends(pair):
    """SIGTERM to the decode engine while its fetch is under way: it ends by itself, and so do its
    children.
    """
    pair.restart_prefill()
    # What the client of the fetch is told does not matter here.
    with fetch_from_halted(pair, 180):
        family = pair.decode.child.family()
        os.kill(pair.decode.child.pid, signal.SIGTERM)
        gone, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive, pair.decode.child.explain("still running after SIGTERM")
    assert pair.decode.child.process.wait(PATIENCE) == 0
    assert pair.prefill.complete(prompt(181, TOKENS)).tokens == pair.expected(181)


def test_an_engine_whose_policy_fails_requests_does_not_start(tiny_model, logs):
    """The reason is in its log."""
    engine = Engine(tiny_model, logs, "refused", kv_transfer=kv_transfer(policy="fail"))
    assert "kv_load_failure_policy: 'fail' would end requests" in engine.refused()


def test_two_tensor_parallel_ranks_keep_their_own_halves(tiny_model, logs, index):
    """Two ranks of an engine: each stores and fetches its share, and answers stay the same."""
    settings = kv_transfer(pod="ranks", index=indexes.table(index))
    arguments = ["--tensor-parallel-size", "2"]
    with Engine(tiny_model, logs, "ranks", kv_transfer=settings, arguments=arguments) as engine:
        computed = [engine.complete(prompt(seed, TOKENS)).tokens for seed in (190, 191)]
        engine.reset_prefix_cache()
        with Counted(engine) as counted:
            again = [engine.complete(prompt(seed, TOKENS)).tokens for seed in (190, 191)]
    assert again == computed
    assert counted.external_hits == 2 * DEPTH * BLOCK_TOKENS
    # Both ranks count.
    assert counted.grew("vllm:kvfabric_fetched_blocks", source="dram") == 2 * 2 * DEPTH
    assert counted.grew("vllm:kvfabric_fetches_failed") == 0
