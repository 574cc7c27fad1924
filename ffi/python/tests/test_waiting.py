"""Waiting in event loops, by file descriptors, and in threads."""

import asyncio
import base64
import os
import select
import signal
import threading

import pytest

import kvfabric

TIMEOUT = 20.0
LENGTH = 1 << 16


def is_readable(descriptor, timeout=0.0):
    return bool(select.select([descriptor], [], [], timeout)[0])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class Stopped:
    """A transfer from a peer that is stopped, so that it is in flight until the end of the context."""

    def __init__(self, agent, other):
        self.other = other
        peer = agent.load_peer(other.metadata)
        assert peer.path is not None
        self.memory = bytearray(LENGTH)
        local = agent.prepare([(agent.register(self.memory), 0, LENGTH)])
        self.transfer = agent.request(
            "read", local, agent.prepare([(other.region, 0, LENGTH)], peer), deadline=TIMEOUT
        )

    def __enter__(self):
        self.other.stop()
        return self

    def __exit__(self, *_):
        self.other.go()


@pytest.fixture
def transport():
    """Only with TCP the other side takes part in a read."""
    return "tcp"


@pytest.fixture
def stopped(agent, other):
    return Stopped(agent, other)


def test_a_descriptor_is_readable_while_a_transfer_is_finished(stopped):
    transfer = stopped.transfer
    descriptor = transfer.fileno()
    assert descriptor == transfer.fileno() and not is_readable(descriptor)
    for _ in range(2):
        with stopped:
            transfer.post()
            assert not is_readable(descriptor) and transfer.state == "in_flight"
        assert is_readable(descriptor, TIMEOUT)
        assert transfer.state == "done" and is_readable(descriptor)
    assert stopped.memory == b"\x11" * LENGTH


def test_a_transfer_is_awaited_by_any_number_of_tasks(stopped):
    async def wait():
        with stopped:
            stopped.transfer.post()
            tasks = [asyncio.ensure_future(wait_for(stopped.transfer)) for _ in range(3)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
        await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)

    async def wait_for(transfer):
        await transfer

    asyncio.run(wait())
    assert stopped.memory == b"\x11" * LENGTH


def test_who_stops_awaiting_leaves_nothing_behind(stopped):
    async def give_up():
        with stopped:
            stopped.transfer.post()
            task = asyncio.ensure_future(wait_for(stopped.transfer))
            await asyncio.sleep(0)
            before = descriptors()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert descriptors() == before - 1 and not stopped.transfer.done()
        await stopped.transfer

    async def wait_for(transfer):
        await transfer

    asyncio.run(give_up())


def test_awaiting_raises_why_it_failed(stopped):
    async def wait():
        with stopped:
            stopped.transfer.post()
            asyncio.get_running_loop().call_soon(stopped.transfer.cancel)
            with pytest.raises(kvfabric.CancelledError):
                await stopped.transfer

    asyncio.run(wait())


def test_a_finished_transfer_is_awaited_without_a_descriptor(agent):
    source, target = agent.register(b"12345678"), agent.register(bytearray(8))

    async def wait():
        transfer = agent.read([(target, 0, 8)], None, [(source, 0, 8)])
        transfer.wait(TIMEOUT)
        before = descriptors()
        await transfer
        assert descriptors() == before

    asyncio.run(wait())


def test_a_wait_lets_other_threads_run(stopped):
    """Only this thread lets the peer go on, and it can only if the waiting one has released the GIL."""
    waiting = threading.Event()
    ended = []

    def wait():
        waiting.set()
        stopped.transfer.wait(TIMEOUT)
        ended.append(stopped.transfer.state)

    with stopped:
        stopped.transfer.post()
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(TIMEOUT)
        stopped.other.go()
        thread.join(TIMEOUT)
    assert ended == ["done"]


def test_a_signal_interrupts_a_wait(stopped):
    class Told(Exception):
        pass

    def tell(*_):
        raise Told

    before = signal.signal(signal.SIGALRM, tell)
    try:
        with stopped:
            stopped.transfer.post()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Told):
                stopped.transfer.wait(TIMEOUT)
            assert not stopped.transfer.done()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_descriptor_is_readable_while_a_message_waits(agent, other):
    descriptor = agent.notification_fileno()
    assert not is_readable(descriptor)
    other.ask("load", metadata=encode(agent.metadata()))
    other.ask("notify", text="hello")
    assert is_readable(descriptor, TIMEOUT)
    assert agent.notifications() == [("peer", b"hello")]
    assert not is_readable(descriptor)


def test_a_forked_child_is_told_by_lists_and_transfers(agent, stopped, refused_in_a_fork):
    region = agent.shared_memory(8)
    prepared = agent.prepare([(region, 0, 8)])
    calls = {
        "prepare": lambda: agent.prepare([(region, 0, 8)]),
        "request": lambda: agent.request("read", prepared, prepared),
        "post": stopped.transfer.post,
        "state": lambda: stopped.transfer.state,
        "fileno": stopped.transfer.fileno,
        "wait": stopped.transfer.wait,
        "await": stopped.transfer.__await__,
        "deregister": region.deregister,
        "notification_fileno": agent.notification_fileno,
    }
    assert refused_in_a_fork(calls) == sorted(calls)


def encode(raw):
    return base64.b64encode(raw).decode()
