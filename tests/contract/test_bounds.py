"""Everything has a limit: operations in flight, the completion queue, the kernel's workers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import outcome
import pytest
import trio
import trio.testing

from tests.helpers import (
    REQUIRED,
    Attempt,
    give_way,
    in_kernel_worker,
    manager,
    nothing_submitted,
    run_native,
    spin_until,
)
from trio_uring import RingConfig, _file_ops, lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tests.helpers import Bench

T = TypeVar("T")

LIMIT = 4


async def _queue(nursery: trio.Nursery, bench: Bench, n: int) -> list[tuple[Attempt[int], int]]:
    """``n`` tasks in the order in which they came, each with the other end of the pipe it reads."""
    arrived: list[tuple[Attempt[int], int]] = []
    for _ in range(n):
        read_end, write_end = bench.pipe()
        arrived.append((Attempt(nursery, lowlevel.read, read_end, bytearray(1)), write_end))
        await trio.testing.wait_all_tasks_blocked()
    return arrived


def _fds_in_flight() -> list[int]:
    return sorted(op.fd for op in statistics().operations if op.operation == "read")


@pytest.mark.ring(max_in_flight=LIMIT)
async def test_first_come_first_served(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        queue = await _queue(nursery, bench, 3 * LIMIT)
        assert (statistics().in_flight, statistics().waiting_for_slot) == (LIMIT, 2 * LIMIT)
        for i, (attempt, write_end) in enumerate(queue):
            assert not any(later.done for later, _ in queue[i:])
            before = _fds_in_flight()
            os.write(write_end, b"x")
            assert await attempt.result() == 1
            await trio.testing.wait_all_tasks_blocked()
            assert len(set(_fds_in_flight()) - set(before)) == (1 if i + LIMIT < len(queue) else 0)
            if i + LIMIT < len(queue):  # the next in the queue has the slot: it can be served
                assert statistics().waiting_for_slot == 2 * LIMIT - i - 1
    assert statistics().peak == LIMIT


@pytest.mark.ring(max_in_flight=1)
async def test_nobody_overtakes_the_queue() -> None:
    """A task that goes from one operation to the next lets the others have their turn."""
    done: list[str] = []

    async def work(name: str, n: int) -> None:
        for _ in range(n):
            await lowlevel.nop()
            done.append(name)

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(work, name, 20)
    assert all(sorted(done[i : i + 3]) == ["a", "b", "c"] for i in range(0, 60, 3))


@pytest.mark.ring(max_in_flight=LIMIT)
async def test_cancelled_in_the_queue(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        queue = await _queue(nursery, bench, LIMIT + 2)
        async with nothing_submitted():
            waiting, _ = queue.pop(LIMIT)
            assert await waiting.cancel()
        assert statistics().waiting_for_slot == 1
        for attempt, write_end in queue:
            os.write(write_end, b"x")
            assert await attempt.result() == 1


@pytest.mark.ring(max_in_flight=1)
async def test_cancelled_with_the_slot_in_hand(bench: Bench) -> None:
    """The task is cancelled in the tick in which it is given a slot: the next one gets it."""
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            (first, write_end), (second, _), (third, third_end) = await _queue(nursery, bench, 3)
            os.write(write_end, b"x")
            await first.result()
            second.scope.cancel()
            os.write(third_end, b"x")
            assert await third.result() == 1
            await second.settled()
            assert second.cancelled
    assert statistics().in_flight == 0


@pytest.mark.ring(max_in_flight=1)
async def test_waits_for_readiness_do_not_count(bench: Bench) -> None:
    a, b = bench.sockets()
    read_end, _ = bench.pipe()
    async with trio.open_nursery() as nursery:
        blocked = Attempt(nursery, lowlevel.read, read_end, bytearray(1))
        await trio.testing.wait_all_tasks_blocked()
        waiting = Attempt(nursery, trio.lowlevel.wait_readable, a)
        await trio.testing.wait_all_tasks_blocked()
        b.send(b"x")
        await waiting.result()
        assert await blocked.cancel()


@pytest.mark.ring(max_in_flight=1)
async def test_close_while_others_queue(bench: Bench) -> None:
    """Whoever waits for a slot to use the fd hears of it as well: by its turn the number may be somebody else's."""
    read_end, _ = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, lowlevel.read, read_end, bytearray(1)) for _ in range(3)]
        other = Attempt(nursery, lowlevel.write, bench.file(), b"x")
        await trio.testing.wait_all_tasks_blocked()
        lowlevel.notify_closing(read_end)
        for attempt in attempts:
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        assert await other.result() == 1
    assert (statistics().in_flight, statistics().waiting_for_slot) == (0, 0)


@pytest.mark.ring(entries=1, cq_entries=2)
async def test_overflow_is_counted_and_loses_nothing() -> None:
    async with trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, lowlevel.nop) for _ in range(3000)]
    assert all(attempt.done and attempt.error is None for attempt in attempts)
    assert statistics().overflows > 0
    assert statistics().in_flight == 0


@pytest.mark.ring(entries=1, max_in_flight=1)
async def test_the_smallest_ring(bench: Bench) -> None:
    a, b = bench.sockets()
    data = os.urandom(200_000)

    async def send() -> None:
        sent = 0
        while sent < len(data):
            sent += await lowlevel.send(a, data[sent : sent + 1000])

    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while len(got) < len(data):
            await trio.lowlevel.wait_readable(b)  # a recv would keep the only slot until somebody can send
            buffer = bytearray(4096)
            got += buffer[: await lowlevel.recv(b, buffer)]
    assert got == data


def _kernel_workers() -> list[str]:
    """The names of the kernel's worker threads. A name holds the number of the thread that has the ring, but as the
    first PID namespace sees it, which need not be ours.
    """
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
            pass
    return [name for name in names if name.startswith("iou-wrk-")]


def _most_workers(bench: Bench, config: RingConfig, of_others: Collection[str]) -> int:
    """How many kernel workers a run uses for more blocking work than it may have workers for."""
    fifos = [bench.fifo() for _ in range(10)]
    writers: list[int] = []

    async def main() -> int:
        most = 0
        async with trio.open_nursery() as nursery:
            attempts = [Attempt(nursery, lowlevel.openat, fifo, os.O_RDONLY) for fifo in fifos]
            await trio.testing.wait_all_tasks_blocked()
            for _ in fifos:
                writers.append(bench.keep(_open_any_writer(fifos, writers)))
                most = max(most, sum(name not in of_others for name in _kernel_workers()))
                spin_until(manager().ring.pending)
                await trio.lowlevel.checkpoint()
            for attempt in attempts:
                bench.keep(await attempt.result())
        return most

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_file_ops, "OPENAT", in_kernel_worker(_file_ops.OPENAT))
        return run_native(main, config=config)


def _open_any_writer(fifos: list[Path], before: list[int]) -> int:
    """Opens the first FIFO whose reader has begun to open it, and which is not open yet."""
    known = {os.fstat(fd).st_ino for fd in before}
    while True:
        for fifo in fifos:
            if os.stat(fifo).st_ino not in known:
                try:
                    return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
                except OSError:
                    give_way()


def _in_a_fresh_thread(function: Callable[[], T]) -> T:
    """The kernel keeps its workers, and how many there may be, for each thread."""
    results: list[outcome.Outcome[T]] = []
    thread = threading.Thread(target=lambda: results.append(outcome.capture(function)))
    thread.start()
    thread.join()
    return results[0].unwrap()


def test_kernel_workers_are_limited(bench: Bench) -> None:
    config = RingConfig(mode="require", max_workers=(2, 2))
    of_others = _kernel_workers()
    assert 1 <= _in_a_fresh_thread(lambda: _most_workers(bench, config, of_others)) <= 2


def test_the_limit_ends_with_the_run(bench: Bench) -> None:
    """A later run of the thread that asks for no limit has the kernel's."""
    configs = (RingConfig(mode="require", max_workers=(1, 1)), REQUIRED)
    of_others = _kernel_workers()
    most = _in_a_fresh_thread(lambda: [_most_workers(bench, config, of_others) for config in configs])
    assert most[0] == 1 < most[1]
