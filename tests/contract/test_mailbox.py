"""A mailbox: what any run sends, its run receives, each thing once, whatever becomes of the two runs."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import queue
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import (
    Attempt,
    Host,
    Mount,
    crash,
    interrupted_at_line,
    manager,
    nothing_submitted,
    only_trio_complains,
    parked,
    run_native,
    run_to_a_crash,
    run_without_ring,
    spin_until,
)
from tests.unit.by_hand import no_garbage_collection
from trio_uring import RingConfig, UnavailableError, UnsupportedOperation, lowlevel, statistics
from trio_uring._abi import Opcode
from trio_uring.lowlevel import Mailbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

LARGEST = (1 << 31) - 1


def in_run(async_fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Its result, in a run and a thread of its own, while this thread waits."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: results.put(run_native(async_fn, *args)))
    thread.start()
    thread.join()
    return results.get_nowait()


class Receiver:
    """A run in a thread of its own that has a mailbox and receives what comes, until it is told to end."""

    def __init__(self, mount: Mount | None = None, config: RingConfig | None = None) -> None:
        self.received: list[Any] = []
        self._run = mount.run if mount else run_native
        self._config = config or RingConfig(mode="require")
        self._made: queue.SimpleQueue[Mailbox[Any]] = queue.SimpleQueue()
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: self._run(self._main, config=self._config))
        self._thread.start()
        self.mailbox = self._made.get()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        mailbox: Mailbox[Any] = Mailbox()
        self._made.put(mailbox)
        with self._scope:
            async for item in mailbox:
                self.received.append(item)

    def end(self) -> list[Any]:
        """The run ends, with its mailbox left open; what it has received."""
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        return self.received


@contextmanager
def receiving(mount: Mount | None = None, config: RingConfig | None = None) -> Iterator[Receiver]:
    receiver = Receiver(mount, config)
    try:
        yield receiver
    finally:
        receiver.end()


async def send_all(mailbox: Mailbox[Any], items: list[Any]) -> None:
    for item in items:
        await mailbox.send(item)


# What arrives


async def test_to_the_own_run() -> None:
    items: list[Any] = [object(), None, 7, [1], None]
    with Mailbox[Any]() as mailbox:
        for item in items:
            await mailbox.send(item)
        received = [await mailbox.receive() for _ in items]
        assert all(a is b for a, b in zip(received, items, strict=True))
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, mailbox.receive)
            await mailbox.send("x")
            assert await attempt.result() == "x"
    assert statistics().in_flight == 0


async def test_numbers() -> None:
    with Mailbox[str]() as mailbox:
        for number in (0, 1, 12345, LARGEST):
            await lowlevel.msg_ring(mailbox, number)
            await mailbox.send("x")
            assert [await mailbox.receive(), await mailbox.receive()] == [number, "x"]
        for number in (-1, LARGEST + 1, 1 << 40):
            with pytest.raises(ValueError, match=str(number)):
                await lowlevel.msg_ring(mailbox, number)
        with pytest.raises(TypeError):
            await lowlevel.msg_ring(mailbox, 1.5)  # type: ignore[arg-type]


async def test_both_are_checkpoints() -> None:
    with Mailbox[int]() as mailbox:
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await mailbox.send(1)
        await trio.testing.wait_all_tasks_blocked()
        with trio.testing.assert_checkpoints():
            await mailbox.receive()
        async with nothing_submitted():
            for call in (mailbox.receive, lambda: mailbox.send(2)):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
        assert await mailbox.receive() == 1
        assert not mailbox._on_the_way


async def test_in_a_batch() -> None:
    with Mailbox[int]() as mailbox:
        batch = lowlevel.batch()
        batch.extend(lowlevel.msg_ring, ((mailbox, number) for number in range(100)))
        assert await batch.run() == [None] * 100
        assert [await mailbox.receive() for _ in range(100)] == list(range(100))


def test_from_other_runs(mount: Mount) -> None:
    """One after the other, and each sender's in its order."""
    with receiving(mount) as receiver:
        for first in range(0, 40, 10):
            in_run(send_all, receiver.mailbox, list(range(first, first + 10)))
        spin_until(lambda: len(receiver.received) == 40)
        assert receiver.received == list(range(40))


def test_to_a_run_that_sleeps(mount: Mount) -> None:
    """Again and again: each answer wakes the one that waits for it."""

    async def main() -> None:
        there, here = receiver.mailbox, Mailbox[Any]()
        for number in range(300):
            await there.send((number, here))
            assert await here.receive() == number
        here.close()

    class Echo(Receiver):
        async def _main(self) -> None:
            with Mailbox[Any]() as mailbox:
                self._made.put(mailbox)
                for _ in range(300):
                    number, answer_to = await mailbox.receive()  # type: ignore[misc]
                    await answer_to.send(number)

    receiver = Echo(mount)
    mount.run(main)
    receiver._thread.join()


def test_to_a_guest_whose_worker_sleeps() -> None:
    """It waits for an eventfd in place of the ring, and nothing else will wake it."""
    received: list[Any] = []
    mailboxes: list[Mailbox[str]] = []

    async def main() -> None:
        with Mailbox[str]() as mailbox:
            mailboxes.append(mailbox)
            while len(received) < 3:
                received.append(await mailbox.receive())

    host = Host()
    host.start(main)
    the_manager = manager()
    for n in range(3):
        while not (the_manager._worker_waits and mailboxes and mailboxes[0]._waiting):
            if not host.todo.empty():
                host.step()
        in_run(mailboxes[0].send, f"hello {n}")
        while len(received) == n:
            host.step()
    host.finish()
    assert received == ["hello 0", "hello 1", "hello 2"]


def test_to_a_guest_that_has_just_started() -> None:
    """Its first steps run before its first tick: the ring is to be enabled by then."""
    host = Host()
    received: list[Any] = []

    async def main() -> None:
        with Mailbox[str]() as mailbox:
            in_run(mailbox.send, "hello")
            received.append(await mailbox.receive())

    host.start(main)
    host.finish()
    assert received == ["hello"]


@pytest.mark.parametrize("polled", ["sender", "receiver"])
def test_with_a_thread_that_polls(polled: str) -> None:
    config = RingConfig(mode="require", sqpoll=True)
    with receiving(config=config if polled == "receiver" else None) as receiver:
        if polled == "sender":
            run_native(send_all, receiver.mailbox, list(range(20)), config=config)
        else:
            in_run(send_all, receiver.mailbox, list(range(20)))
        spin_until(lambda: len(receiver.received) == 20)
        assert receiver.received == list(range(20))


# Cancelling


async def test_a_send_that_is_taken_back() -> None:
    with Mailbox[str]() as mailbox:
        async with nothing_submitted(), trio.open_nursery() as nursery:

            def cancel() -> None:
                attempt.scope.cancel()

            attempt = Attempt(nursery, mailbox.send, "no", once_parked=cancel)
            await attempt.settled()
            assert attempt.cancelled
        await mailbox.send("yes")
        assert await mailbox.receive() == "yes"
        assert not mailbox._on_the_way
        assert not mailbox._queue


async def test_a_send_that_is_cancelled_too_late() -> None:
    def submit_and_cancel() -> None:
        manager().ring.flush()
        attempt.scope.cancel()

    with Mailbox[str]() as mailbox:
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, mailbox.send, "yes", once_parked=submit_and_cancel)
            await attempt.result()
        assert await mailbox.receive() == "yes"


async def test_a_cancelled_receive_takes_nothing() -> None:
    with Mailbox[int]() as mailbox:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, mailbox.receive)
            assert await attempt.cancel()
        async with trio.open_nursery() as nursery:  # it comes and is cancelled in the same tick, in both orders
            for number in range(2):
                attempt = await parked(nursery, mailbox.receive)
                first, second = attempt.scope.cancel, lambda n=number: mailbox.deliver(n)
                for act in (first, second) if number else (second, first):
                    act()
                await attempt.settled()
                assert attempt.cancelled is bool(number)
                assert (attempt.value if not number else await mailbox.receive()) == number


async def test_one_task_receives() -> None:
    with Mailbox[int]() as mailbox:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, mailbox.receive)
            with pytest.raises(trio.BusyResourceError):
                await mailbox.receive()
            mailbox.deliver(1)
            with pytest.raises(trio.BusyResourceError):  # it is awake, but has not got it yet
                await mailbox.receive()
            assert await attempt.result() == 1
            mailbox.deliver(2)
            attempts = [Attempt(nursery, mailbox.receive) for _ in range(3)]
            for each in attempts:
                await each.settled()
            assert sorted(getattr(each, "value", 0) for each in attempts) == [0, 0, 2]
            assert sum(isinstance(each.error, trio.BusyResourceError) for each in attempts) == 2
            attempt = await parked(nursery, mailbox.receive)
            assert await attempt.cancel()
            mailbox.deliver(3)
            assert await mailbox.receive() == 3


# The end of a mailbox


async def test_close() -> None:
    mailbox: Mailbox[int] = Mailbox()
    await mailbox.send(1)
    await trio.testing.wait_all_tasks_blocked()
    assert list(mailbox._queue) == [1]
    in_run(mailbox.send, 2)
    assert list(mailbox._on_the_way.values()) == [2]
    assert mailbox._ring is not None
    duplicate = mailbox._ring.fd
    mailbox.close()
    mailbox.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(duplicate)
    for _ in range(3):
        with pytest.raises(trio.ClosedResourceError):
            await mailbox.receive()
        with pytest.raises(trio.BrokenResourceError):
            await mailbox.send(3)
        with pytest.raises(trio.BrokenResourceError):
            await lowlevel.msg_ring(mailbox, 3)
        await trio.testing.wait_all_tasks_blocked()
    assert [item async for item in mailbox] == []
    assert not mailbox._on_the_way
    assert not mailbox._queue


async def test_close_ends_a_receive() -> None:
    received: list[Any] = []

    async def receive_all(mailbox: Mailbox[int]) -> None:
        received.extend([item async for item in mailbox])

    with Mailbox[int]() as mailbox:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, mailbox.receive)
            mailbox.close()
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        assert mailbox._waiting is None
    with Mailbox[int]() as mailbox:
        async with trio.open_nursery() as nursery:
            receiver = await parked(nursery, receive_all, mailbox)
            await mailbox.send(1)
            await trio.testing.wait_all_tasks_blocked()
            mailbox.close()
            await receiver.result()
    assert received == [1]


async def test_close_before_the_receiver_has_got_it() -> None:
    mailbox: Mailbox[int] = Mailbox()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, mailbox.receive)
        mailbox.deliver(1)
        mailbox.close()
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()


async def test_what_comes_late_is_nobodys() -> None:
    """Not the next mailbox's either."""
    mailboxes: list[Mailbox[str]] = []

    def replace() -> None:
        assert [op.state for op in statistics().operations if op.operation == "msg_ring"] == ["STAGED"]
        mailboxes[0].close()
        mailboxes.append(Mailbox())

    calls = (lambda: mailboxes[0].send("late"), lambda: lowlevel.msg_ring(mailboxes[0], 5))
    for call in calls:
        mailboxes[:] = [Mailbox()]
        async with trio.open_nursery() as nursery:
            await Attempt(nursery, call, once_parked=replace).result()
        await trio.testing.wait_all_tasks_blocked()
        assert not mailboxes[0]._on_the_way
        assert not mailboxes[0]._queue
        with mailboxes[1] as new:
            await new.send("in time")
            assert await new.receive() == "in time"
            assert not new._queue


def test_left_open_at_the_end_of_its_run(mount: Mount) -> None:
    made: list[Mailbox[int]] = []
    duplicates: list[int] = []

    async def first() -> None:
        made.append(Mailbox())
        await made[0].send(1)
        assert made[0]._ring is not None
        duplicates.append(made[0]._ring.fd)

    async def second() -> None:
        (mailbox,) = made
        with pytest.raises(trio.BrokenResourceError):
            await mailbox.send(2)
        with pytest.raises(trio.ClosedResourceError):
            await mailbox.receive()
        mailbox.close()

    mount.run(first)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(*duplicates)
    mount.run(second)
    in_run(second)
    made[0].close()


def test_the_receiver_ends_while_something_is_staged(mount: Mount) -> None:
    """Whatever has the number of its ring's fd by then: it gets nothing."""
    receivers: list[Receiver] = []

    def replace() -> None:
        receivers[0].end()
        receivers.append(Receiver())
        assert receivers[1].mailbox._token == receivers[0].mailbox._token

    async def main() -> None:
        for call in (
            lambda: lowlevel.msg_ring(receivers[0].mailbox, 7),
            lambda: receivers[0].mailbox.send("for the old"),
        ):
            receivers[:] = [Receiver()]
            async with trio.open_nursery() as nursery:
                await Attempt(nursery, call, once_parked=replace).settled()
            old, new = receivers
            await new.mailbox.send("for the new")
            spin_until(lambda: receivers[1].received)
            assert new.end() == ["for the new"]
            assert old.received == []
            assert not old.mailbox._on_the_way

    mount.run(main)


def test_a_receiver_crashes(mount: Mount) -> None:
    """With mail on the way, and a task that waits for some."""
    made: list[Mailbox[int]] = []

    async def main() -> None:
        made.extend(Mailbox() for _ in range(2))
        trio.lowlevel.spawn_system_task(made[0].receive)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            trio.lowlevel.spawn_system_task(made[0].send, number)
            trio.lowlevel.spawn_system_task(made[1].send, number)
        await trio.lowlevel.checkpoint()
        manager().ring.flush()
        await crash()

    run_to_a_crash(mount, main)
    for mailbox in made:
        mailbox.close()
        assert not mailbox._on_the_way
        assert mailbox._waiting is None


def test_a_sender_crashes_when_it_has_sent(mount: Mount) -> None:
    """It never hears that it has; the receiver, which hears of something that is gone, does not mind."""

    async def main(mailbox: Mailbox[str]) -> None:
        trio.lowlevel.spawn_system_task(mailbox.send, "lost")
        await trio.lowlevel.checkpoint()
        manager().ring.flush()
        await crash()

    async def receive() -> None:
        with Mailbox[str]() as mailbox:
            sender = threading.Thread(target=run_to_a_crash, args=(mount, main, mailbox))
            sender.start()
            sender.join()
            await mailbox.send("x")
            assert await mailbox.receive() == "x"
            assert not mailbox._on_the_way

    with only_trio_complains():
        run_native(receive)


# In the wrong place


async def test_only_its_own_run_receives_and_closes() -> None:
    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="belongs to the trio run"):
            await mailbox.receive()
        with pytest.raises(RuntimeError, match="belongs to the trio run"):
            mailbox.close()

    with Mailbox[int]() as mailbox:
        await mailbox.send(1)
        await trio.testing.wait_all_tasks_blocked()
        in_run(elsewhere)
        assert await mailbox.receive() == 1


def test_a_run_without_a_ring() -> None:
    async def plain() -> None:
        with pytest.raises(UnavailableError):
            await receiver.mailbox.send(1)
        with pytest.raises(UnavailableError):
            Mailbox()
        assert not receiver.mailbox._on_the_way

    with receiving() as receiver:
        run_without_ring(plain)


async def test_a_kernel_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager(), "_missing", frozenset({Opcode.MSG_RING}))
    with pytest.raises(UnsupportedOperation, match=r"msg_ring.*5\.18"):
        Mailbox()


async def test_no_more_fds(monkeypatch: pytest.MonkeyPatch) -> None:
    def dup(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", dup)
        with pytest.raises(OSError, match="Too many open files"):
            Mailbox()
    with Mailbox[int]() as mailbox:
        await mailbox.send(1)
        assert await mailbox.receive() == 1


# Ctrl-C, and what is left


def test_interrupted_at_every_line(mount: Mount) -> None:
    """Sent or not, received or not: never half."""
    ends = set()
    for n in itertools.count(1):
        lines, end = _run_interrupted_at(mount, n)
        ends.add(end)
        if lines < n:
            break
    assert n > 20
    assert {"sent", "received"} <= ends


def _run_interrupted_at(mount: Mount, n: int) -> tuple[int, str]:
    lines, end = 0, "nothing"

    async def main() -> None:
        nonlocal lines, end
        mailbox: Mailbox[str] = Mailbox()
        with interrupted_at_line(n) as stop:
            try:
                await mailbox.send("x")
                end = "sent"
                assert await mailbox.receive() == "x"
                end = "received"
                await trio.lowlevel.checkpoint()
            finally:
                lines = stop()
                with trio.CancelScope(shield=True):
                    if end == "sent":
                        assert await mailbox.receive() == "x"
                    await trio.testing.wait_all_tasks_blocked()
                    assert not mailbox._queue
                    assert not mailbox._on_the_way
                    assert statistics().in_flight == 0
        mailbox.close()

    try:
        mount.run(main)
    except KeyboardInterrupt:
        assert lines >= n
    else:
        assert lines < n
    return lines, end


def test_nothing_is_left_for_the_garbage_collector(mount: Mount) -> None:
    class Item:
        pass

    gone: list[weakref.ref[Any]] = []

    async def main() -> None:
        for close in (True, False):
            mailbox: Mailbox[Item] = Mailbox()
            gone.append(weakref.ref(mailbox))
            items = [Item() for _ in range(3)]
            gone.extend(map(weakref.ref, items))
            for item in items:
                await mailbox.send(item)
            assert await mailbox.receive() is items[0]
            await trio.testing.wait_all_tasks_blocked()
            del item, items
            if close:
                mailbox.close()
                with pytest.raises(trio.ClosedResourceError):
                    await mailbox.receive()

    gc.collect()
    with no_garbage_collection():
        mount.run(main)
        assert [each() for each in gone if each() is not None] == []


def test_the_manager_goes_with_its_run() -> None:
    managers: list[weakref.ref[Any]] = []
    made: list[Mailbox[int]] = []

    async def main() -> None:
        managers.append(weakref.ref(manager()))
        made.append(Mailbox())
        await made[0].send(1)

    gc.collect()
    trio_uring.run(main)
    made.clear()
    gc.collect()
    assert managers[0]() is None
