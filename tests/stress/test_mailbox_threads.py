"""Many threads send at once, are cancelled, and outlive the receiver: each thing arrives once, or its sender knows."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.helpers import MOUNTS, Mount, give_way, run_native
from trio_uring import statistics
from trio_uring.lowlevel import Mailbox, msg_ring

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

THREADS = 4
TASKS = 3
ITEMS = 400

Item = tuple[int, int, int]  # thread, task, number


def start(run: Callable[..., Any], *args: Any) -> tuple[threading.Thread, list[Any]]:
    """Runs it in a thread; what is in the list afterwards is its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run(*args)))
    thread.start()
    return thread, results


def finish(started: Sequence[tuple[threading.Thread, list[Any]]]) -> list[Any]:
    for thread, _ in started:
        thread.join()
    assert all(results for _, results in started), "a run failed"
    return [results[0] for _, results in started]


async def receive(n: int, made: queue.SimpleQueue[Mailbox[Item]]) -> list[Any]:
    with Mailbox[Item]() as mailbox:
        made.put(mailbox)
        received = [await mailbox.receive() for _ in range(n)]
        assert not mailbox._on_the_way
        assert not mailbox._queue
    assert statistics().in_flight == 0
    return received


@pytest.mark.parametrize("senders", MOUNTS)
def test_everything_arrives_once(mount: Mount, senders: str) -> None:
    """Objects and numbers; and what one task sends arrives in its order."""

    async def send(thread: int) -> None:
        async def send_objects(task: int) -> None:
            for number in range(ITEMS):
                await mailbox.send((thread, task, number))

        async def send_numbers() -> None:
            for number in range(ITEMS):
                await msg_ring(mailbox, thread * ITEMS + number)

        async with trio.open_nursery() as nursery:
            for task in range(1, TASKS):
                nursery.start_soon(send_objects, task)
            nursery.start_soon(send_numbers)

    made: queue.SimpleQueue[Mailbox[Item]] = queue.SimpleQueue()
    receiver = start(mount.run, receive, THREADS * TASKS * ITEMS, made)
    mailbox = made.get()
    finish([start(MOUNTS[senders].run, send, thread) for thread in range(THREADS)])
    (received,) = finish([receiver])
    streams: dict[tuple[int, int], list[int]] = {}
    for item in received:
        thread, task, number = item if isinstance(item, tuple) else (item // ITEMS, 0, item % ITEMS)
        streams.setdefault((thread, task), []).append(number)
    assert len(streams) == THREADS * TASKS
    assert all(numbers == list(range(ITEMS)) for numbers in streams.values())


def test_everybody_sends_to_everybody(mount: Mount) -> None:
    made: queue.SimpleQueue[tuple[int, Mailbox[int]]] = queue.SimpleQueue()
    mailboxes: dict[int, Mailbox[int]] = {}
    all_made = threading.Event()

    async def main(me: int) -> Counter[Any]:
        async def send(to: int) -> None:
            for _ in range(ITEMS // 2):
                await mailboxes[to].send(me)

        with Mailbox[int]() as mailbox:
            made.put((me, mailbox))
            await trio.to_thread.run_sync(all_made.wait)
            async with trio.open_nursery() as nursery:
                for to in range(THREADS):
                    nursery.start_soon(send, to)
                return Counter([await mailbox.receive() for _ in range(THREADS * (ITEMS // 2))])

    started = [start(mount.run, main, me) for me in range(THREADS)]
    mailboxes.update(made.get() for _ in range(THREADS))
    all_made.set()
    for received in finish(started):
        assert received == dict.fromkeys(range(THREADS), ITEMS // 2)


def test_cancelled_or_sent(mount: Mount) -> None:
    """A send that was cancelled is never received, one that was not is, once."""

    async def send(thread: int) -> tuple[list[Item], int]:
        sent: list[Item] = []
        cancelled = 0
        choices = random.Random(thread)

        async def send_one(item: Item, scope: trio.CancelScope) -> None:
            with scope:
                await mailbox.send(item)
                sent.append(item)

        async with trio.open_nursery() as nursery:
            for number in range(ITEMS):
                scope = trio.CancelScope()
                nursery.start_soon(send_one, (thread, 0, number), scope)
                for _ in range(choices.randrange(3)):
                    await trio.lowlevel.checkpoint()
                if choices.randrange(2):
                    scope.cancel()
                    cancelled += 1
        return sent, cancelled

    async def receive_to_the_end() -> list[Any]:
        received: list[Any] = []
        with Mailbox[Any]() as mailbox:
            made.put(mailbox)
            while (item := await mailbox.receive()) != "the end":
                received.append(item)
            assert not mailbox._on_the_way
        return received

    made: queue.SimpleQueue[Mailbox[Any]] = queue.SimpleQueue()
    receiver = start(mount.run, receive_to_the_end)
    mailbox = made.get()
    results = finish([start(run_native, send, thread) for thread in range(THREADS)])
    run_native(mailbox.send, "the end")
    (received,) = finish([receiver])
    sent = [item for items, _ in results for item in items]
    assert sorted(received) == sorted(sent)
    assert THREADS * ITEMS // 4 < len(sent) < THREADS * ITEMS
    assert all(cancelled for _, cancelled in results)


@pytest.mark.parametrize("close", [True, False], ids=["closed", "left open"])
def test_receivers_come_and_go(mount: Mount, close: bool) -> None:
    """Nobody receives what is not for it, nothing twice, and whoever sends too late is told. No fd is left."""

    async def receive_some(n: int) -> list[Any]:
        mailbox: Mailbox[Any] = Mailbox()
        current.append(mailbox)
        received = [await mailbox.receive() for _ in range(n)]
        if close:
            mailbox.close()
        return received

    async def send(thread: int) -> int:
        refused = 0
        for number in range(1 << 62):
            if over.is_set():
                return refused
            which = len(current) - 1
            try:
                await current[which].send((which, thread, number))
            except trio.BrokenResourceError:
                refused += 1
                give_way()
        raise AssertionError

    current: list[Mailbox[Any]] = []
    over = threading.Event()
    senders: list[tuple[threading.Thread, list[Any]]] = []
    everything: list[Any] = []
    try:
        for which in range(40):
            receiver = start(mount.run, receive_some, which * 3)
            if not senders:
                while not current:
                    give_way()
                senders = [start(run_native, send, thread) for thread in range(2)]
            (received,) = finish([receiver])
            assert all(item[0] == which for item in received)
            everything += received
    finally:
        over.set()
    assert sum(finish(senders)) > 0
    assert len(everything) == len(set(everything)) == sum(which * 3 for which in range(40))
    assert all(mailbox._ring is None and not mailbox._on_the_way for mailbox in current)
