"""4 KiB reads of a file in the page cache: what a file operation costs beyond the copy."""

from __future__ import annotations

import itertools
import os
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from trio_uring import lowlevel

from ._harness import compare, heading, ring_run, time_tasks
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._harness import Loop
    from .syscalls import Mark

BLOCK: Final = 4096
BLOCKS: Final = 1024
TARGETS: Final = {1: 15.0, 32: 20.0, 256: 12.0}


def cached_file() -> int:
    """The fd of a file of ``BLOCKS`` blocks, all in the page cache."""
    with tempfile.TemporaryFile() as file:
        for number in range(BLOCKS):
            file.write(number.to_bytes(4, "big") * (BLOCK // 4))
        file.flush()
        return os.dup(file.fileno())


def offsets() -> Iterator[int]:
    """Every block's offset, again and again, in an order that no read-ahead expects."""
    return (block * 389 % BLOCKS * BLOCK for block in itertools.count())


def check(data: bytes | bytearray, offset: int) -> None:
    assert data == (offset // BLOCK).to_bytes(4, "big") * (BLOCK // 4)


def threads_loop(fd: int) -> Loop:
    where = offsets()

    async def loop(times: int) -> None:
        data, offset = b"", 0
        for offset in itertools.islice(where, times):
            data = await trio.to_thread.run_sync(os.pread, fd, BLOCK, offset)
        check(data, offset)

    return loop


def ring_loop(fd: int) -> Loop:
    where = offsets()

    async def loop(times: int) -> None:
        buffer, offset = bytearray(BLOCK), 0
        for offset in itertools.islice(where, times):
            await lowlevel.read(fd, buffer, offset)
        check(buffer, offset)

    return loop


def calls_per_read(run: Callable[..., object], loop: Loop, tasks: int, times: int) -> float | None:
    async def counted(mark: Mark) -> None:
        async def one_task() -> None:
            await loop(times)

        await time_tasks(loop, tasks, 1)
        mark()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(one_task)
        mark()

    calls = count(lambda mark: run(counted, mark))
    return None if calls is None else calls / (tasks * times)


def main(rounds: int) -> None:
    """Concurrency 1, 32 and 256."""
    fd = cached_file()
    a, b = threads_loop(fd), ring_loop(fd)
    # Counting forks, so it comes before the first thread. With several threads it would be wrong: see `syscalls`.
    calls_a = calls_per_read(trio.run, a, 1, 256)
    calls_b = {tasks: calls_per_read(ring_run, b, tasks, 2048 // tasks) for tasks in TARGETS}
    heading(
        "reads: 4 KiB from the page cache, by so many tasks",
        "trio.to_thread.run_sync(os.pread, fd, 4096, offset)",
        "trio_uring.lowlevel.read(fd, buffer, offset)",
    )
    for tasks, target in TARGETS.items():
        compare(
            f"reads, {tasks} tasks",
            partial(trio.run, time_tasks, a, tasks, max(4, 1000 // tasks)),
            partial(ring_run, time_tasks, b, tasks, max(20, 4000 // tasks)),
            rounds=rounds,
            target=target,
            calls=(calls_a if tasks == 1 else None, calls_b[tasks]),
        )
    os.close(fd)
