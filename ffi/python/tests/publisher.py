"""An engine's publisher of KV events, as vLLM has it: a PUB socket for what is new, a ROUTER socket that replays what was.

`publisher.py POD MODEL` binds both to free ports of 127.0.0.1 and says which, as one JSON object. Then each line on standard
input is a JSON array of events, which is published as one batch; the answer is the batch's sequence number. It ends when its
input does.
"""

import json
import sys
import threading
import time

import msgpack
import zmq

HOST = "tcp://127.0.0.1"
# What ends a replay, in place of a sequence number.
END = b"\xff" * 8
RANK = 0


def replay(router, topic, batches):
    """Answers each request, a sequence number, with all batches from there on."""
    while True:
        peer, _, start = router.recv_multipart()
        first = int.from_bytes(start, "big")
        for sequence, batch in enumerate(batches[first:], first):
            router.send_multipart([peer, b"", topic, sequence.to_bytes(8, "big"), batch])
        router.send_multipart([peer, b"", b"", END, b""])


def main():
    pod, model = sys.argv[1:]
    topic = f"kv@{pod}@{model}".encode()
    context = zmq.Context()
    live = context.socket(zmq.PUB)
    router = context.socket(zmq.ROUTER)
    ports = live.bind_to_random_port(HOST), router.bind_to_random_port(HOST)
    batches = []
    # Only this thread touches the router from here on, and batches are only ever appended.
    threading.Thread(target=replay, args=(router, topic, batches), daemon=True).start()
    say({"endpoint": f"{HOST}:{ports[0]}", "replay_endpoint": f"{HOST}:{ports[1]}"})
    for line in sys.stdin:
        sequence = len(batches)
        batches.append(msgpack.packb([time.time(), json.loads(line), RANK]))
        live.send_multipart([topic, sequence.to_bytes(8, "big"), batches[sequence]])
        say(sequence)


def say(answer):
    print(json.dumps(answer), flush=True)


main()
