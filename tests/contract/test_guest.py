"""Guest mode: the run waits in worker threads, which may not touch the ring, while the host goes on."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, Host, give_way, manager, run_guest, spin_until
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench
    from trio_uring._core import UringIOManager


class Asleep:
    """A guest run that waits for one operation, while a worker thread sleeps in its place."""

    def __init__(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        self.scope = trio.CancelScope()
        self.error: Exception | None = None
        self.counters: Any = None
        self._host = Host()
        self._host.start(self._main, call, *args)
        self.manager = manager()
        while not self._worker_sleeps():
            if not self._host.todo.empty():
                self._host.step()

    async def _main(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        try:
            with self.scope:
                await call(*args)
        except Exception as exc:
            self.error = exc
        self.counters = statistics()

    def _worker_sleeps(self) -> bool:
        return self.manager._worker_waits and any(
            op.state == "IN_FLIGHT" and op.task != "<TrioToken.run_sync_soon task>"
            for op in self.manager.statistics().operations
        )

    def finish(self) -> None:
        self._host.finish()


def test_a_cancel_by_the_host_is_submitted_at_once(bench: Bench) -> None:
    """Nothing else happens that could wake the worker."""
    for call in (lowlevel.recv, lowlevel.read):
        run = Asleep(call, bench.sockets()[0], bytearray(9))
        run.scope.cancel()
        assert run.manager.ring.staged == 0
        run.finish()
        assert run.scope.cancelled_caught
        assert run.counters.cancels_won == 1


def test_a_deadline_set_by_the_host(bench: Bench) -> None:
    run = Asleep(lowlevel.recv, bench.sockets()[0], bytearray(9))
    run.scope.deadline = -1
    run.finish()
    assert run.scope.cancelled_caught


def test_a_cancelled_wait_for_readiness(bench: Bench) -> None:
    run = Asleep(trio.lowlevel.wait_readable, bench.sockets()[0])
    run.scope.cancel()
    run.finish()
    assert run.scope.cancelled_caught


@pytest.mark.parametrize("call", [trio.lowlevel.wait_readable, lambda fd: lowlevel.recv(fd, bytearray(9))])
def test_a_close_by_the_host(bench: Bench, call: Callable[[int], Awaitable[object]]) -> None:
    a, b = bench.sockets()
    fd = a.detach()
    run = Asleep(call, fd)
    run.manager.notify_closing(fd)
    os.close(fd)
    assert b.recv(1) == b""  # at once
    run.finish()
    assert isinstance(run.error, trio.ClosedResourceError)


def test_data_wakes_the_worker(bench: Bench) -> None:
    a, b = bench.sockets()
    buffer = bytearray(9)
    run = Asleep(lowlevel.recv, a, buffer)
    b.send(b"hello")
    run.finish()
    assert run.error is None
    assert buffer[:5] == b"hello"


def test_another_thread_wakes_the_worker() -> None:
    run = Asleep(lowlevel.timeout, 1e6)
    thread = threading.Thread(target=run.manager.force_wakeup)
    thread.start()
    spin_until(lambda: not run._host.todo.empty())
    thread.join()
    run._host.step()
    run.scope.cancel()
    run.finish()


def test_the_worker_that_is_about_to_sleep(bench: Bench) -> None:
    """The host cancels at a hundred different moments around the one at which the worker falls asleep."""
    a, _ = bench.sockets()
    rounds = 300
    attempts: list[Attempt[int]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(rounds):
                attempts.append(Attempt(nursery, lowlevel.recv, a, bytearray(1)))
                await attempts[-1].settled()
                assert attempts[-1].cancelled

    host = Host()
    host.start(main)
    cancelled = 0
    while host.result is None:
        host.step()
        if len(attempts) > cancelled and hasattr(attempts[-1], "task"):
            for _ in range(cancelled % 100):
                give_way()
            cancelled = len(attempts)
            attempts[-1].scope.cancel()
    host.result.unwrap()
    assert cancelled == rounds


def test_two_guests_in_two_threads(bench: Bench) -> None:
    pairs = [bench.sockets(), bench.sockets()]
    results = []

    def host(mine: Any, theirs: Any) -> None:
        async def main() -> int:
            total = 0
            for _ in range(100):
                await lowlevel.send(theirs, b"x")
                total += await lowlevel.recv(mine, bytearray(1))
            return total

        results.append(run_guest(main))

    (a1, a2), (b1, b2) = pairs
    threads = [threading.Thread(target=host, args=args) for args in ((a1, b2), (b1, a2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [100, 100]


def test_many_rounds(bench: Bench) -> None:
    """A partner in a thread answers each message, so that each round sleeps in a worker."""
    a, b = bench.sockets()
    rounds = 500
    managers: list[UringIOManager] = []

    def partner() -> None:
        b.send(b.recv(9))
        data = b.recv(9)
        spin_until(lambda: managers[0]._worker_waits)
        while data:
            b.send(data)
            data = b.recv(9)

    async def main() -> None:
        managers.append(manager())
        buffer = bytearray(9)
        for i in range(rounds):
            await lowlevel.send(a, b"%d" % i)
            assert buffer[: await lowlevel.recv(a, buffer)] == b"%d" % i
        assert statistics().cancels_asked == 0
        assert manager()._notify_fd is not None  # it did sleep
        a.shutdown(1)

    thread = threading.Thread(target=partner, daemon=True)
    thread.start()
    run_guest(main)
    thread.join()
