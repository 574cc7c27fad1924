"""Waiting in an event loop for what the native part does, without a thread."""

import asyncio
import os


async def finished(operation):
    """The result of something with `done`, `fileno` and `wait`; raises why it failed."""
    loop = asyncio.get_running_loop()
    while not operation.done():
        # A descriptor of its own, because an event loop knows each number only once, and any number of tasks may wait.
        descriptor = os.dup(operation.fileno())
        readable = loop.create_future()
        try:
            loop.add_reader(descriptor, _tell, readable)
            await readable
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return operation.wait(0.0)


def _tell(readable):
    if not readable.done():
        readable.set_result(None)
