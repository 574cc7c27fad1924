"""The other process of the tests: an agent with numbered bytes that answers commands, one line of JSON each."""

import base64
import json
import os
import sys

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

LENGTH = 1 << 20


def say(**answer):
    print(json.dumps(answer), flush=True)


def main():
    agent = nixl_agent("other", nixl_agent_config())
    memory = (np.arange(LENGTH) % 251).astype(np.uint8)
    agent.register_memory([(memory.ctypes.data, LENGTH, 0, "")], "DRAM")
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    say(metadata=metadata, address=memory.ctypes.data, length=LENGTH)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "notifs":
            taken = {}
            while sum(map(len, taken.values())) < command["count"]:
                for sender, messages in agent.get_new_notifs().items():
                    taken.setdefault(sender, []).extend(each.decode() for each in messages)
            say(notifs=taken)
        elif command["do"] == "bytes":
            say(bytes=memory[command["start"] : command["stop"]].tolist())
        elif command["do"] == "read":
            # The other way round: this process starts the transfer, and says how it went.
            name = agent.add_remote_agent(base64.b64decode(command["metadata"])).decode()
            local = agent.get_xfer_descs([(memory.ctypes.data, command["length"], 0)], "DRAM")
            remote = agent.get_xfer_descs([(command["address"], command["length"], 0)], "DRAM")
            handle = agent.initialize_xfer("READ", local, remote, name, b"read by the other")
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            say(state=state, name=name)
        else:
            raise ValueError(command)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # The real one crashes in its libraries' destructors.
    os._exit(0)
