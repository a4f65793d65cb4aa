"""Worker threads, runs in them, and runs in many threads at once: each run has its own ring, or none."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.helpers import MOUNTS, Attempt, manager, manager_or_none, parked
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from tests.helpers import Bench, Mount


async def receive(sock: socket) -> bytes:
    buffer = bytearray(9)
    return bytes(buffer[: await lowlevel.recv(sock, buffer)])


async def until_receiving() -> None:
    """Until a receive is with the kernel."""
    while not any(op.operation == "recv" and op.state == "IN_FLIGHT" for op in statistics().operations):
        await trio.lowlevel.checkpoint()


class Thread(threading.Thread):
    """One that trio has not started, and what comes of it."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        super().__init__()
        self._function = function, args
        self.start()

    def run(self) -> None:
        function, args = self._function
        self._outcome: outcome.Outcome[Any] = outcome.capture(function, *args)

    def result(self) -> Any:
        self.join()
        return self._outcome.unwrap()


# What a thread asks of a run


async def test_a_cancel_reaches_what_a_thread_waits_for(bench: Bench) -> None:
    """It has asked for it from where it was started, so their scopes hold. Nothing is lost."""
    a, b = bench.sockets()

    def in_thread() -> bytes:
        with pytest.raises(trio.Cancelled):
            trio.from_thread.run(receive, a)
        trio.from_thread.check_cancelled()
        raise AssertionError

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, trio.to_thread.run_sync, in_thread)
        await until_receiving()
        assert await attempt.cancel()
    assert statistics().cancels_won == 1
    b.send(b"hello")
    assert await receive(a) == b"hello"


async def test_a_thread_that_trio_has_not_started(bench: Bench) -> None:
    a, b = bench.sockets()
    token = trio.lowlevel.current_trio_token()

    def in_thread() -> tuple[bytes, object]:
        received = trio.from_thread.run(receive, a, trio_token=token)
        return received, trio.from_thread.run_sync(manager, trio_token=token)

    thread = Thread(in_thread)
    await until_receiving()
    b.send(b"hello")
    received, found = await trio.to_thread.run_sync(thread.result)
    assert received == b"hello"
    assert found is manager()


def test_the_end_of_the_run_ends_what_a_thread_waits_for(mount: Mount, bench: Bench) -> None:
    """As on stock trio."""
    a, b = bench.sockets()
    threads = []

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()
        threads.append(Thread(lambda: trio.from_thread.run(receive, a, trio_token=token)))
        await until_receiving()

    mount.run(main)
    with pytest.raises(trio.Cancelled):
        threads[0].result()
    b.send(b"hello")
    assert a.recv(9) == b"hello"


async def test_many_threads_ask_at_once(bench: Bench) -> None:
    pairs = [bench.sockets() for _ in range(8)]

    def in_thread(a: socket, b: socket) -> None:
        for i in range(20):
            trio.from_thread.run(lowlevel.send, b, b"%d" % i)
            assert trio.from_thread.run(receive, a) == b"%d" % i

    async with trio.open_nursery() as nursery:
        for a, b in pairs:
            nursery.start_soon(trio.to_thread.run_sync, in_thread, a, b)
    assert statistics().in_flight == 0


# Runs in the threads of runs


@pytest.mark.parametrize("inner", MOUNTS)
async def test_a_run_in_a_thread_of_a_run_in_a_thread_of_a_run(bench: Bench, inner: str) -> None:
    """While the inner ones do their work, what the outer ones wait for stays with them."""
    pairs = [bench.sockets() for _ in range(3)]
    managers: list[object] = []

    async def level(depth: int) -> None:
        managers.append(manager())
        a, b = pairs[depth]
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, receive, a)
            if depth < 2:
                await trio.to_thread.run_sync(MOUNTS[inner].run, level, depth + 1)
            assert not attempt.done
            assert statistics().in_flight == 1
            b.send(b"%d" % depth)
            assert await attempt.result() == b"%d" % depth
        assert manager() is managers[depth]

    await level(0)
    assert len(set(map(id, managers))) == 3
    assert manager() is managers[0]


# Runs in many threads


def test_all_kinds_of_runs_at_once(bench: Bench) -> None:
    """What one sends is received by the next one's ring, in a circle; one of them has no ring."""
    runs: list[Callable[..., Any]] = [mount.run for mount in MOUNTS.values()]
    runs += [*runs, trio.run]
    pairs = [bench.sockets() for _ in runs]
    barrier, begun = threading.Barrier(len(runs)), threading.Event()
    rings: list[object] = []

    async def with_ring(mine: socket, theirs: socket, first: bool) -> None:
        rings.append(manager().ring)
        barrier.wait()
        for i in range(100):
            if first:
                await lowlevel.send(theirs, b"%d" % i)
            with trio.move_on_after(0) as scope:
                await lowlevel.timeout(1e6)
            assert scope.cancelled_caught
            received = await receive(mine)
            assert received == b"%d" % i
            if not first:
                await lowlevel.send(theirs, received)
        assert statistics().in_flight == 0

    async def without_ring(mine: socket, theirs: socket, first: bool) -> None:
        begun.set()
        barrier.wait()
        sockets = trio.socket.from_stdlib_socket(mine), trio.socket.from_stdlib_socket(theirs)
        for _ in range(100):
            await sockets[1].send(await sockets[0].recv(9))
        assert manager_or_none() is None

    threads = []
    for i, run in reversed([*enumerate(runs)]):  # the one without first: guest runs install a ring for all that begin
        mine, theirs = pairs[i - 1][1], pairs[i][0]
        threads.append(Thread(run, without_ring if run is trio.run else with_ring, mine, theirs, i == 0))
        begun.wait()
    for thread in threads:
        thread.result()
    assert len(set(map(id, rings))) == len(runs) - 1
