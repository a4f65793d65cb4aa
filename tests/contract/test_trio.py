"""What works on stock trio works as it does there: threads, processes, clocks, instruments, trio's own objects."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.helpers import Attempt, Mount, drain, fill, in_kernel_worker, manager, parked
from trio_uring import _file_ops, _trio_internals, lowlevel, statistics

if TYPE_CHECKING:
    from trio.lowlevel import Task

    from tests.helpers import Bench


async def test_threads(bench: Bench) -> None:
    a, b = bench.sockets()

    def in_thread() -> int:
        trio.from_thread.run_sync(b.send, b"hello")
        return trio.from_thread.run(lowlevel.recv, a, bytearray(9))

    assert await trio.to_thread.run_sync(in_thread) == 5
    assert await trio.to_thread.run_sync(threading.get_ident) != threading.get_ident()


async def test_other_threads_wake_the_run(bench: Bench) -> None:
    """A run that sleeps in the ring hears of run_sync_soon at once, each time."""
    token = trio.lowlevel.current_trio_token()
    rounds = 200
    woken = [trio.Event() for _ in range(rounds)]
    started = threading.Semaphore(0)

    def poke() -> None:
        for event in woken:
            started.acquire()
            token.run_sync_soon(event.set)

    thread = threading.Thread(target=poke)
    thread.start()
    for event in woken:
        started.release()
        await event.wait()
    thread.join()


async def test_force_wakeup_from_a_thread() -> None:
    """Before, while or after the run goes to sleep: it ends the wait, and only once."""
    for _ in range(50):
        thread = threading.Thread(target=manager().force_wakeup)
        before = statistics().cqes
        thread.start()
        while statistics().cqes == before:
            await trio.lowlevel.checkpoint()
        thread.join()
    await trio.testing.wait_all_tasks_blocked()


async def test_a_wakeup_ends_a_sleep(mount: Mount) -> None:
    """A forced wake-up ends one wait in the ring; the run then sleeps on."""
    ticks = trio.testing.Sequencer()
    async with trio.open_nursery() as nursery:
        sleeper = Attempt(nursery, trio.sleep_forever)
        async with ticks(0):
            manager().force_wakeup()
            await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(manager().force_wakeup)
        assert await sleeper.cancel()


async def test_processes() -> None:
    result = await trio.run_process(["cat"], stdin=b"hello" * 100_000, capture_stdout=True)
    assert result.stdout == b"hello" * 100_000
    with pytest.raises(subprocess.CalledProcessError):
        await trio.run_process(["false"])
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(trio.run_process, ["sleep", "1000"])
        nursery.cancel_scope.cancel()
    assert process.returncode is not None


def test_autojump(mount: Mount, bench: Bench) -> None:
    """Time jumps when every task is blocked, also in an operation; not while the kernel still has work in hand."""
    a, b = bench.sockets()

    async def main() -> None:
        with trio.move_on_after(1000) as scope:
            await lowlevel.recv(a, bytearray(1))
        assert scope.cancelled_caught
        assert trio.current_time() == 1000
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, lowlevel.recv, a, bytearray(9))
            await trio.sleep(1000)
            await lowlevel.send(b, b"hello")
            assert await attempt.result() == 5
        assert trio.current_time() == 2000
        with trio.move_on_after(5) as scope:
            for _ in range(1000):
                await lowlevel.nop()
        assert not scope.cancelled_caught
        assert trio.current_time() == 2000
        with pytest.raises(trio.TooSlowError), trio.fail_after(3):
            await trio.lowlevel.wait_readable(a)
        assert trio.current_time() == 2003

    mount.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_wait_all_tasks_blocked(bench: Bench) -> None:
    """A task in an operation is blocked; one whose operation is done is not."""
    a, b = bench.sockets()
    buffer = bytearray(1)
    order: list[str] = []

    async def reader() -> None:
        for name in "abc":
            await lowlevel.recv(a, buffer)
            order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            order.append("blocked")
            b.send(b"x")
    assert order == ["blocked", "a", "blocked", "b", "blocked", "c"]


class Recorder(trio.abc.Instrument):
    def __init__(self) -> None:
        self.events: list[tuple[str, Task]] = []
        self.waits = 0

    def task_scheduled(self, task: Task) -> None:
        self.events.append(("scheduled", task))

    def before_task_step(self, task: Task) -> None:
        self.events.append(("before", task))

    def after_task_step(self, task: Task) -> None:
        self.events.append(("after", task))

    def before_io_wait(self, timeout: float) -> None:
        self.waits += 1

    def after_io_wait(self, timeout: float) -> None:
        self.waits -= 1


async def test_instruments() -> None:
    """A wake-up by the ring looks like any other."""
    task = trio.lowlevel.current_task()
    recorder = Recorder()
    trio.lowlevel.add_instrument(recorder)
    await lowlevel.nop()
    trio.lowlevel.remove_instrument(recorder)
    events = [event for event, whose in recorder.events if whose is task]
    assert events == ["after", "scheduled", "before"]
    assert recorder.waits == 0


def test_instruments_may_fail(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    """trio drops one that raises; that includes raising at our wake-ups."""

    class Failing(trio.abc.Instrument):
        def task_scheduled(self, task: Task) -> None:
            raise KeyError("an instrument's own")

    async def main() -> None:
        for _ in range(3):
            await lowlevel.nop()

    mount.run(main, instruments=[Failing()])
    assert "Instrument has been disabled" in caplog.text


async def test_waking_a_task_twice_is_an_error() -> None:
    async def sleep() -> None:
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    async with trio.open_nursery() as nursery:
        sleeper = await parked(nursery, sleep)
        manager().wake(sleeper.task, outcome.Value(None))
        with pytest.raises((RuntimeError, AssertionError)):
            manager().wake(sleeper.task, outcome.Value(None))
        await sleeper.result()


def test_the_wake_is_as_the_mount_says(mount: Mount) -> None:
    async def main() -> Any:
        return manager().wake

    expected = "_wake_publicly" if mount.name == "public-wake" else "_wake_directly"
    assert mount.run(main) is getattr(_trio_internals, expected)


async def test_trio_streams_and_listeners() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)

    async with trio.open_nursery() as nursery:
        (listener, *_) = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        stream = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        data = os.urandom(1 << 20)
        async with stream:
            nursery.start_soon(stream.send_all, data)
            got = bytearray()
            while len(got) < len(data):
                got += await stream.receive_some()
        assert got == data
        nursery.cancel_scope.cancel()


async def test_half_closeable_streams() -> None:
    async def make_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
        a, b = trio.socket.socketpair()
        return trio.SocketStream(a), trio.SocketStream(b)

    async def make_clogged_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
        a, b = await make_pair()
        for stream in (a, b):
            fill(partial(stream.socket._sock.send, bytes(1 << 14)))  # type: ignore[attr-defined]
        return a, b

    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


async def test_both_directions_of_a_socket_at_once(bench: Bench) -> None:
    a, b, size = bench.full_socket()
    async with trio.open_nursery() as nursery:
        reader = await parked(nursery, trio.lowlevel.wait_readable, a)
        writer = await parked(nursery, trio.lowlevel.wait_writable, a)
        b.send(b"x")
        await reader.result()
        await trio.testing.wait_all_tasks_blocked()
        assert not writer.done
        drain(b.fileno(), size)
        await writer.result()


@pytest.mark.parametrize("end", ["room", "cancelled", "closed"])
async def test_the_end_of_the_peers_data_is_no_room(bench: Bench, end: str) -> None:
    """The peer will send no more, but has not read anything either: nothing can be sent yet."""
    a, b, size = bench.full_socket()
    b.shutdown(socket.SHUT_WR)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, trio.lowlevel.wait_writable, a)
        if end == "cancelled":
            assert await attempt.cancel()
        elif end == "closed":
            lowlevel.notify_closing(a)
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        else:
            drain(b.fileno(), size)
            await attempt.result()


async def test_readiness_of_what_is_ready(bench: Bench) -> None:
    a, b = bench.sockets()
    b.send(b"x")
    for wait in (trio.lowlevel.wait_readable, trio.lowlevel.wait_writable):
        for what in (a, a.fileno()):
            with trio.testing.assert_checkpoints():
                await wait(what)
    b.close()
    await trio.lowlevel.wait_readable(a)


@pytest.mark.native("trio's own says something else")
async def test_readiness_of_no_fd() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        await trio.lowlevel.wait_readable(-1)


async def test_results_of_kernel_workers(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """A result that comes from a kernel worker wakes a run that sleeps."""
    monkeypatch.setattr(_file_ops, "FSYNC", in_kernel_worker(_file_ops.FSYNC))
    fd = bench.file(b"x")
    for _ in range(50):
        await lowlevel.fsync(fd)
