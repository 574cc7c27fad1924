"""The other process of the tests: offers memory, answers commands on standard input, one JSON object a line.

Commands: {"do": "receive"} answers the messages that came; {"do": "check", "byte": B} answers whether all bytes are B;
{"do": "fill", "byte": B}; {"do": "notify", "text": T}. It ends when its input does.
"""

import base64
import json
import sys

import kvfabric

LENGTH = 1 << 16
TIMEOUT = 20.0


def main():
    transport = sys.argv[1]
    tcp = "127.0.0.1:0" if transport == "tcp" else None
    ucx = {} if transport == "ucx" else None
    agent = kvfabric.Agent("peer", shm=transport in ("shm", "cma"), tcp=tcp, ucx=ucx)
    if transport == "cma":
        view = memoryview(bytearray(LENGTH))
        region = agent.register(view, writable=True)
        hidden = agent.register(bytearray(LENGTH), readable=False)
    else:
        region = agent.shared_memory(LENGTH, writable=True)
        hidden = agent.shared_memory(LENGTH, readable=False)
        view = region.view()
    view[:] = b"\x11" * LENGTH
    say({"metadata": encode(agent.metadata()), "region": region.id, "hidden": hidden.id})
    other = None
    for line in sys.stdin:
        command = json.loads(line)
        what = command["do"]
        if what == "load":
            other = agent.load_peer(base64.b64decode(command["metadata"]))
            say({})
        elif what == "receive":
            messages = agent.notifications(TIMEOUT)
            say({"messages": [[name, encode(message)] for name, message in messages]})
        elif what == "check":
            say({"holds": bytes(view) == bytes([command["byte"]]) * LENGTH})
        elif what == "fill":
            view[:] = bytes([command["byte"]]) * LENGTH
            say({})
        elif what == "notify":
            agent.notify(other, command["text"].encode(), TIMEOUT)
            say({})


def encode(raw):
    return base64.b64encode(raw).decode()


def say(answer):
    print(json.dumps(answer), flush=True)


main()
