"""Runs as ``python -m bed.forking FD``: imports vLLM, and then forks a process for each line that
comes from the socket FD. See :mod:`bed.warm`.

A line is a JSON object with `command` (``["-m", module, …]`` or ``[script, …]``), `env`, `log`. The
replies are lines too: `pid` and `command` once it runs, `pid` and `status` once it is over.
"""

import gc
import json
import multiprocessing.context
import os
import runpy
import select
import socket
import sys
from typing import Dict, List, Optional


def import_engine() -> None:
    """What a server's three processes import; none of it starts a thread."""
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a process of {len(threads)} threads cannot be forked"


def serve(link: socket.socket) -> Optional[List[str]]:
    """Forks until the other side is gone. In a forked process, gives its command."""
    running: Dict[int, int] = {}
    held = b""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != link.fileno():
                poll.unregister(fd)
                os.close(fd)
                pid = running.pop(fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                say(link, pid=pid, status=status)
                continue
            came = link.recv(1 << 16)
            if not came:
                return None
            *lines, held = (held + came).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    for other in running:
                        os.close(other)
                    link.close()
                    become(job)
                    return job["command"]
                fd = os.pidfd_open(pid)
                running[fd] = pid
                poll.register(fd, select.POLLIN)
                say(link, pid=pid, command=job["command"])


def say(link: socket.socket, **found: object) -> None:
    link.sendall(json.dumps(found).encode() + b"\n")


def become(job: Dict[str, object]) -> None:
    """Makes this process as good as a fresh one."""
    os.setsid()
    output = os.open(str(job["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    env: Dict[str, str] = dict(job["env"])  # type: ignore[call-overload]
    os.environ.clear()
    os.environ.update(env)
    for path in reversed(env.get("PYTHONPATH", "").split(os.pathsep)):
        if path and path not in sys.path:
            sys.path.insert(1, path)
    # vLLM spawns its processes on CPUs, whatever it is told; elsewhere it forks them.
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]


def main() -> None:
    import_engine()
    # What is there now stays: forked processes need not look for garbage in it, nor copy it.
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    command = serve(socket.socket(fileno=int(sys.argv[1])))
    # From here on this is a forked process, or nothing is left to do.
    if command is None:
        os._exit(0)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
