"""A forked child cannot touch the ring of its parent, and does it no harm; it may have one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import REQUIRED, Attempt, fork, in_child, manager, parked
from trio_uring import RingError, lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from socket import socket

    from tests.helpers import Bench, Mount


async def _sum_of_a_file() -> int:
    """Some work on a ring."""
    fd = await lowlevel.openat("/proc/self/stat", os.O_RDONLY)
    buffer = bytearray(9)
    count = await lowlevel.read(fd, buffer)
    await lowlevel.close(fd)
    assert trio_uring.statistics().sqes > 0
    return count


def _run_in_a_thread() -> int:
    results = []
    thread = threading.Thread(target=lambda: results.append(trio_uring.run(_sum_of_a_file, config=REQUIRED)))
    thread.start()
    thread.join()
    return results[0]


TOUCHES: dict[str, Callable[[int], object]] = {
    "tick": lambda fd: manager().get_events(0),
    "flush": lambda fd: manager().ring.flush(),
    "pending": lambda fd: manager().ring.pending(),
    "enable": lambda fd: manager().ring.enable(),
    "eventfd": lambda fd: manager().ring.register_eventfd(0),
    "close an fd": lowlevel.notify_closing,
}


@pytest.mark.parametrize("touch", TOUCHES)
async def test_the_child_gets_a_clear_error(bench: Bench, touch: str) -> None:
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        with pytest.raises(RingError, match=r"belongs to the parent process.*run of its own"):
            in_child(lambda: TOUCHES[touch](a.fileno()))
        b.send(b"hello")
        assert await attempt.result() == 5


async def test_what_the_child_may_do(bench: Bench) -> None:
    """It may look, and let go; nothing of that reaches the parent."""
    a, b = bench.sockets()

    def child() -> int:
        in_flight, current = statistics().in_flight, manager()
        current.force_wakeup()
        attempt.scope.cancel()
        current.close()
        current.close()
        return in_flight

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        assert in_child(child) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert not attempt.done
        b.send(b"hello")
        assert await attempt.result() == 5
    assert statistics().cancels_asked == 0


async def test_what_is_staged_is_submitted_once(bench: Bench) -> None:
    """The fork comes between staging and submission."""
    _, write_end = bench.pipe()

    def flush_in_child() -> None:
        with pytest.raises(RingError):
            in_child(manager().ring.flush)

    await trio.testing.wait_all_tasks_blocked()
    before = statistics().sqes
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, lowlevel.write, write_end, b"hello", once_parked=flush_in_child)
        assert await attempt.result() == 5
    assert statistics().sqes == before + 1


async def test_the_child_runs_in_a_thread_of_its_own(bench: Bench) -> None:
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        assert in_child(_run_in_a_thread) == 9
        b.send(b"hello")
        assert await attempt.result() == 5


def test_forks_outside_of_runs() -> None:
    def run() -> int:
        return trio_uring.run(_sum_of_a_file, config=REQUIRED)

    assert in_child(run) == 9
    assert run() == 9
    assert in_child(lambda: in_child(run)) == 9


async def _fail(_: object) -> None:
    raise KeyError


async def _wait(_: object) -> None:
    await trio.sleep(5)


async def _close(sock: socket) -> None:
    lowlevel.notify_closing(sock)


WAYS_TO_GO_ON: dict[str, Callable[[socket], Awaitable[object]]] = {
    "an operation": lambda _: lowlevel.nop(),
    "a wait": _wait,
    "a close": _close,
    "an error": _fail,
}


def _fork_in_a_run(mount: Mount, bench: Bench, go_on: Callable[[socket], Awaitable[object]]) -> bytes:
    """What ends the run in the child. The parent's goes on, with tasks that waited for the ring and for trio."""
    results, result = bench.pipe()
    parent = os.getpid()

    async def main() -> int:
        (a, b), (c, d) = bench.sockets(), bench.sockets()
        async with trio.open_nursery() as nursery:
            receives = await parked(nursery, lowlevel.recv, a, bytearray(9))
            waits = await parked(nursery, trio.lowlevel.wait_readable, c)
            pid = fork()
            if pid == 0:
                signal.alarm(20)
                await go_on(c)
            await lowlevel.nop()
            b.send(b"hello")
            d.send(b"hello")
            assert await receives.result() == 5
            await waits.result()
            assert await trio.to_thread.run_sync(os.getpid) == parent
        return pid

    try:
        child = mount.run(main)
    except BaseException as exc:
        if os.getpid() == parent:
            raise
        while exc.__cause__ is not None:
            exc = exc.__cause__
        os.write(result, repr(exc).encode())
        os._exit(0)
    if os.getpid() != parent:
        os._exit(1)
    os.waitpid(child, 0)
    return os.read(results, 999)


@pytest.mark.parametrize("way", WAYS_TO_GO_ON)
def test_the_child_that_goes_on_with_the_run(mount: Mount, bench: Bench, way: str) -> None:
    """It does not get beyond its next wait, and takes nothing of what the parent waits for."""
    for _ in range(20):
        end = _fork_in_a_run(mount, bench, WAYS_TO_GO_ON[way])
        assert end.startswith(b"RingError('this ring belongs to the parent process; ")


async def test_subprocesses(bench: Bench) -> None:
    """exec, with operations in flight: the ring is not inherited."""
    a, b = bench.sockets()
    code = "import os; print(*[os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')[:-1]])"
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        listed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        assert b"io_uring" not in listed.stdout
        assert b"eventfd" not in listed.stdout
        b.send(b"hello")
        assert await attempt.result() == 5
