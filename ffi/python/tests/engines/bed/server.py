"""A real vLLM server, as a user would start it."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

from . import folder
from .metrics import Metrics
from .process import Child, Deadline, free_port

MODEL_NAME = "tiny"
# The CPU backend's attention takes multiples of 32 only.
BLOCK_TOKENS = 32
READY_SECONDS = 240.0
ANSWER_SECONDS = 120.0


@dataclasses.dataclass
class Answer:
    """What an engine said to one prompt."""

    tokens: List[int]
    # What the connector wants told to the next engine, if anything.
    kv_transfer_params: Optional[Dict[str, Any]]
    body: Dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EventPorts:
    """Where an engine publishes its KV events; both are free ports of this host."""

    live: int = dataclasses.field(default_factory=free_port)
    replay: int = dataclasses.field(default_factory=free_port)
    topic: str = ""

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.live}"

    @property
    def replay_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.replay}"

    def config(self) -> Dict[str, object]:
        """The engine's own configuration of its publisher."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            # Only an endpoint with a wildcard is bound; any other would be connected to.
            "endpoint": f"tcp://*:{self.live}",
            "replay_endpoint": f"tcp://*:{self.replay}",
            "topic": self.topic,
        }


class Engine:
    """A running vLLM OpenAI server. Use it in a ``with``, or call :meth:`stop`.

    `kv_transfer` is the engine's ``--kv-transfer-config``; `events` makes it publish KV events;
    `begin` is what its Python executes and with which model; `arguments` and `env` come last, so
    that they win. With `cold` all its processes import vLLM themselves, as a user's do.
    """

    def __init__(
        self,
        model: pathlib.Path,
        logs: pathlib.Path,
        name: str = "engine",
        *,
        kv_transfer: Optional[Mapping[str, object]] = None,
        events: Optional[EventPorts] = None,
        blocks: int = 64,
        max_model_len: int = 512,
        dtype: str = "bfloat16",
        begin: Optional[Sequence[str]] = None,
        arguments: Sequence[str] = (),
        env: Optional[Mapping[str, str]] = None,
        cold: bool = False,
    ):
        self.name = name
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.model = model
        self.events = events
        # The module that `vllm serve` calls: interpreters that have imported it already are forked.
        command = list(begin or ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)])
        command += ["--served-model-name", MODEL_NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype]
        command += ["--max-model-len", str(max_model_len), "--block-size", str(BLOCK_TOKENS)]
        command += ["--num-gpu-blocks-override", str(blocks), "--enforce-eager"]
        command += ["--enable-prefix-caching", "--prefix-caching-hash-algo", "sha256_cbor"]
        command += ["--max-num-seqs", "4", "--disable-uvicorn-access-log"]
        # Without a timeout the engine's processes are killed before connectors can close anything.
        command += ["--shutdown-timeout", "10"]
        if kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(kv_transfer)]
        if events is not None:
            command += ["--kv-events-config", json.dumps(events.config())]
        command += list(arguments)
        number = sum(1 for _ in logs.glob(f"{name}*.log"))
        log = logs / f"{name}-{number}.log"
        self.child = Child(command, folder.environment(**(env or {})), log, cold)

    def ready(self, seconds: float = READY_SECONDS) -> "Engine":
        """Waits until it serves; fails with the end of its log if it does not get there."""
        deadline = Deadline(seconds)
        while True:
            try:
                self.get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                pass
            try:
                # The pause between two tries, which ends at once when the engine does.
                status = self.child.process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                status = None
            if status is not None:
                raise AssertionError(self.child.explain(f"{self.name} ended with status {status}"))
            if deadline.passed():
                self.child.kill()
                raise AssertionError(self.child.explain(f"{self.name} not ready in {seconds} s"))

    def refused(self, seconds: float = READY_SECONDS) -> str:
        """Waits until it ends by itself, as it must with a configuration that cannot work, and
        returns its log.
        """
        try:
            status = self.child.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise AssertionError(self.child.explain(f"{self.name} is still running")) from None
        assert status != 0, self.child.explain(f"{self.name} ended as if all were well")
        return self.child.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        """The body of a GET."""
        with urllib.request.urlopen(self.address + path, timeout=ANSWER_SECONDS) as reply:
            return reply.read()

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """The parsed body of a POST, or None if it is empty. Refusals are shown with what the
        server said.
        """
        request = urllib.request.Request(
            self.address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                content = reply.read()
        except urllib.error.HTTPError as refused:
            said = refused.read().decode(errors="replace")
            raise AssertionError(
                self.child.explain(f"{self.name}: POST {path}: {refused.code} {said}")
            ) from None
        return json.loads(content) if content else None

    def complete(self, prompt: Sequence[int], max_tokens: int = 8, **more: object) -> Answer:
        """Greedily completes a prompt of token ids with exactly `max_tokens` tokens."""
        body: Dict[str, object] = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        body.update(more)
        said = self.post("/v1/completions", body)
        return Answer(said["choices"][0]["token_ids"], said.get("kv_transfer_params"), said)

    def metrics(self) -> Metrics:
        """What it counts right now."""
        return Metrics(self.get("/metrics").decode())

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Waits until something holds that this engine brings about; fails if it ends before, or
        does not.
        """
        deadline = Deadline(seconds)
        while not holds():
            try:
                # The pause between two tries, which ends at once when the engine does.
                self.child.process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                if deadline.passed():
                    raise AssertionError(self.child.explain(f"{self.name}: not {what}")) from None
            else:
                raise AssertionError(self.child.explain(f"{self.name} ended, not {what}"))

    def reset_prefix_cache(self, *, external: bool = False) -> None:
        """Empties its own prefix cache; with `external`, also what its connector holds. The engine
        does not while blocks are in use, as of a store that is still under way.
        """
        path = "/reset_prefix_cache?reset_external=" + str(external).lower()
        self.wait_until(lambda: self.post(path, {})["success"], "resetting its cache")

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends it as an operator would, children included."""
        return self.child.stop(how)

    def kill(self) -> None:
        """Ends it at once, children included."""
        self.child.kill()

    def __enter__(self) -> "Engine":
        try:
            return self.ready()
        except BaseException:
            self.child.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.child.stop()


@contextlib.contextmanager
def together(*engines: Engine) -> Iterator[Sequence[Engine]]:
    """Waits until all serve, less than one after the other would take; stops all in the end."""
    try:
        for engine in engines:
            engine.ready()
        yield engines
    finally:
        for engine in engines:
            engine.stop()


class Counted:
    """What an engine's counters grew by during a ``with``."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.external_hits = 0.0
        self.external_queries = 0.0
        self.local_hits = 0.0

    def __enter__(self) -> "Counted":
        self._before = self.engine.metrics()
        return self

    def __exit__(self, *_: object) -> None:
        self._after = self.engine.metrics()
        for name in ("external_hits", "external_queries", "local_hits"):
            setattr(self, name, getattr(self._after, name) - getattr(self._before, name))

    def grew(self, name: str, **labels: str) -> float:
        """By how much the samples of this name, with these labels, grew together."""
        return self._after.sum(name, **labels) - self._before.sum(name, **labels)
