"""What a run tells about its ring."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import Attempt, manager, parked
from trio_uring import RingConfig, UnavailableError, UringStatistics, lowlevel, statistics

if TYPE_CHECKING:
    from tests.helpers import Bench


@pytest.mark.native("trio's statistics, and its own waits, are those of its own manager")
async def test_trio_shows_them_too() -> None:
    found = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, UringStatistics)
    assert (found.backend, found.engine) == ("epoll", "io_uring")
    assert vars(found).keys() == vars(statistics()).keys()


@pytest.mark.native("trio's statistics, and its own waits, are those of its own manager")
async def test_waiting_tasks_are_counted_as_epolls(bench: Bench) -> None:
    """The task that reads trio's entry queue is one of them."""
    await trio.testing.wait_all_tasks_blocked()
    a, _, _ = bench.full_socket()
    assert (statistics().tasks_waiting_read, statistics().tasks_waiting_write) == (1, 0)
    async with trio.open_nursery() as nursery:
        reader = await parked(nursery, trio.lowlevel.wait_readable, a)
        writer = await parked(nursery, trio.lowlevel.wait_writable, a)
        await parked(nursery, lowlevel.read, bench.pipe()[0], bytearray(1))  # of no concern to trio
        assert (statistics().tasks_waiting_read, statistics().tasks_waiting_write) == (2, 1)
        reader.scope.cancel()
        writer.scope.cancel()
        assert (statistics().tasks_waiting_read, statistics().tasks_waiting_write) == (1, 0)
        nursery.cancel_scope.cancel()


async def test_what_is_in_flight(bench: Bench) -> None:
    read_end, _ = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.read, read_end, bytearray(1))
        (operation,) = (op for op in statistics().operations if op.operation == "read")
        assert (operation.fd, operation.task, operation.state) == (read_end, "read", "IN_FLIGHT")
        assert 0 <= operation.age < 30
        await lowlevel.timeout(0.001)
        (older,) = (op for op in statistics().operations if op.operation == "read")
        assert older.age > operation.age
        attempt.scope.cancel()
        assert [op.state for op in statistics().operations if op.operation == "read"] == ["CANCELLING"]
        await attempt.settled()
    assert [op for op in statistics().operations if op.operation == "read"] == []


async def test_what_the_end_of_a_run_would_leave_unfinished(bench: Bench) -> None:
    """Polls are let go of; multishot operations are open as long as their context is."""
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        await parked(nursery, trio.lowlevel.wait_readable, a)
        await parked(nursery, lowlevel.read, bench.pipe()[0], bytearray(10))
        async with lowlevel.recv_multishot(b):
            unfinished = manager().unfinished()
            assert [(op.operation, pinned) for op, pinned in unfinished] == [("read", 10), ("recv_multishot", 0)]
        nursery.cancel_scope.cancel()
    assert manager().unfinished() == []


async def test_fds_of_its_own() -> None:
    await lowlevel.nop()
    kinds = {os.readlink(f"/proc/self/fd/{fd}") for fd in manager().fds() if fd >= 0}
    assert kinds == {"anon_inode:[io_uring]", "anon_inode:[eventfd]"}


async def test_a_staged_operation_is_shown_as_such(bench: Bench) -> None:
    seen: list[lowlevel.InFlight] = []
    async with trio.open_nursery() as nursery:
        nop = Attempt(nursery, lowlevel.nop, once_parked=lambda: seen.extend(statistics().operations))
        await nop.result()
    assert [(op.state, op.fd, op.task) for op in seen if op.operation == "nop"] == [("STAGED", -1, "nop")]


@pytest.mark.native("trio's statistics, and its own waits, are those of its own manager")
async def test_a_released_poll_has_no_task(bench: Bench) -> None:
    a, _ = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, trio.lowlevel.wait_readable, a)
        attempt.scope.cancel()
        (operation,) = (op for op in statistics().operations if op.fd == a.fileno())
        assert (operation.task, operation.state) == (None, "DETACHED")


async def test_counters(bench: Bench) -> None:
    await trio.testing.wait_all_tasks_blocked()
    before = statistics()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(lowlevel.nop)
    after = statistics()
    assert after.sqes - before.sqes == 10
    assert after.cqes - before.cqes == 10
    assert after.submits - before.submits == 1
    assert after.enters - before.enters == 1
    assert after.peak >= 10
    assert (after.in_flight, after.waiting_for_slot, after.overflows, after.stalls) == (0, 0, 0, 0)


async def test_a_tick_with_nothing_to_do_makes_no_system_call(bench: Bench) -> None:
    await trio.testing.wait_all_tasks_blocked()
    before = statistics().enters
    for _ in range(100):
        await trio.lowlevel.checkpoint()
    assert statistics().enters == before


async def test_one_enter_for_a_tick(bench: Bench) -> None:
    """Ten connections with something to do in each tick: submit, wait and reap are one call."""
    fds = [bench.file(b"x") for _ in range(10)]
    rounds = 50

    async def work(fd: int) -> None:
        for _ in range(rounds):
            await lowlevel.read(fd, bytearray(1), 0)

    await trio.testing.wait_all_tasks_blocked()
    before = statistics()
    async with trio.open_nursery() as nursery:
        for fd in fds:
            nursery.start_soon(work, fd)
    after = statistics()
    assert after.sqes - before.sqes == rounds * len(fds)
    assert after.enters - before.enters <= rounds + 1


async def test_cancels_are_counted_by_who_won(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.read, read_end, bytearray(1))
        assert await attempt.cancel()
        os.write(write_end, b"x")
    now = statistics()
    assert (now.cancels_asked, now.cancels_won, now.cancels_lost) == (1, 1, 0)


def test_only_where_there_is_a_ring() -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError, match="has no ring"):
            statistics()
        with pytest.raises(UnavailableError, match=r"nop needs a ring.*switched off"):
            await lowlevel.nop()

    trio_uring.run(main, config=RingConfig(mode="off"))
    with pytest.raises(RuntimeError, match="async context"):
        statistics()
