"""What a process costs that is attached and does nothing: CPU time over a quiet while.

With --real-nixl the agent is the real NIXL's, in its default configuration; else the drop-in's, and a node beside it.
"""

import argparse
import contextlib
import os
import sys
import time

from figures import tell

QUIET_SECONDS = 10.0
SETTLE_SECONDS = 2.0


def cpu_percent(subject: str, case: str) -> None:
    # Idle is what comes after the start: threads that begin, and a node's first pages.
    time.sleep(SETTLE_SECONDS)
    before = time.process_time()
    begin = time.monotonic()
    time.sleep(QUIET_SECONDS)
    percent = (time.process_time() - before) / (time.monotonic() - begin) * 100
    tell(subject, case, "cpu_percent", "%", [percent])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--real-nixl", action="store_true")
    if parser.parse_args().real_nixl:
        # It logs to where the figures go.
        with contextlib.redirect_stdout(sys.stderr):
            from nixl._api import nixl_agent, nixl_agent_config

            agent = nixl_agent("idle", nixl_agent_config())
        cpu_percent("nixl", "idle-agent")
        # NIXL 1.5.1 crashes when such a process ends in the usual way.
        os._exit(0)
    import kvfabric
    from kvfabric.nixl_compat._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("idle", nixl_agent_config())
    cpu_percent("kvfabric-nixl", "idle-agent")
    del agent
    config = {
        "pod": "idle",
        "model": "idle",
        "model_identity": "00" * 32,
        "block_bytes": 4096,
        "block_tokens": 16,
        "host": {"bytes": 64 << 20},
    }
    node = kvfabric.Node(config)
    cpu_percent("kvfabric", "idle-node")
    node.shutdown()


main()
