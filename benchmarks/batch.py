"""Batches: 64 operations, one submission, one wake-up; against a plain loop of system calls, and against stock trio."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from trio_uring import lowlevel

from ._harness import compare, heading, ring_run, time_tasks
from .reads import BLOCK, BLOCKS, cached_file, calls_per_read, check, offsets, threads_loop
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from .syscalls import Mark

SIZE: Final = 64
TIMES: Final = 100
CONTENTS: Final = [bytes([number]) * (500 + number) for number in range(SIZE)]


class Reads:
    """64 blocks of a file in the page cache, at a time.

    Args:
        fd: the file.
        pieces: the offsets of 64 blocks, again and again.
    """

    def __init__(self, fd: int, pieces: Iterable[list[int]]) -> None:
        self._fd = fd
        self._pieces = iter(pieces)
        self._buffers = [bytearray(BLOCK) for _ in range(SIZE)]
        self._blocks: list[bytes] = []
        self._plain_offsets: list[int] = []
        self._ring_offsets: list[int] = []

    def plain(self) -> None:
        fd, pread, self._plain_offsets = self._fd, os.pread, next(self._pieces)
        self._blocks = [pread(fd, BLOCK, offset) for offset in self._plain_offsets]

    async def ring(self) -> None:
        self._ring_offsets = next(self._pieces)
        batch = lowlevel.batch()
        batch.extend(lowlevel.read, zip(itertools.repeat(self._fd), self._buffers, self._ring_offsets, strict=False))
        await batch.run()

    def check(self) -> None:
        """What both sides have read last, and forgets it."""
        for data, offset in zip(self._blocks, self._plain_offsets, strict=True):
            check(data, offset)
        for buffer, offset in zip(self._buffers, self._ring_offsets, strict=True):
            check(buffer, offset)
            buffer[:] = bytes(BLOCK)
        self._blocks = []


def pieces_of_a_file() -> Iterator[list[int]]:
    """All blocks of it, in the order of `offsets`: more than the first caches of a processor hold."""
    where = offsets()
    return itertools.cycle([list(itertools.islice(where, SIZE)) for _ in range(BLOCKS // SIZE)])


class Files:
    """64 small files: open, read, close."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self._buffers = [bytearray(BLOCK) for _ in paths]
        self._contents: list[bytes] = []
        self._counts: list[int] = []

    def plain(self) -> None:
        self._contents = contents = []
        for path in self._paths:
            fd = os.open(path, os.O_RDONLY)
            contents.append(os.read(fd, BLOCK))
            os.close(fd)

    async def ring(self) -> None:
        """What a chain has opened the batch closes."""
        chains = lowlevel.chains()
        file = chains.direct(lowlevel.openat, zip(self._paths, itertools.repeat(os.O_RDONLY), strict=False))
        chains.add(lowlevel.read, zip(itertools.repeat(file), self._buffers, itertools.repeat(0), strict=False))
        _, self._counts = await chains.run()

    def check(self) -> None:
        """What both sides have read last, and forgets it."""
        assert self._contents == CONTENTS
        for n, buffer, content in zip(self._counts, self._buffers, CONTENTS, strict=True):
            assert buffer[:n] == content
            buffer[:] = bytes(BLOCK)
        self._contents, self._counts = [], []


def time_plain(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(TIMES):
        work()
    return (time.perf_counter() - start) / (TIMES * SIZE)


async def time_batches(work: Callable[[], Awaitable[object]]) -> float:
    await work()
    start = time.perf_counter()
    for _ in range(TIMES):
        await work()
    return (time.perf_counter() - start) / (TIMES * SIZE)


def calls_of_plain(work: Callable[[], object]) -> float | None:
    def counted(mark: Mark) -> None:
        work()
        mark()
        work()
        mark()

    calls = count(counted)
    return None if calls is None else calls / SIZE


def calls_of_batch(work: Callable[[], Awaitable[object]]) -> float | None:
    async def counted(mark: Mark) -> None:
        await work()
        mark()
        for _ in range(10):
            await work()
        mark()

    calls = count(lambda mark: ring_run(counted, mark))
    return None if calls is None else calls / (10 * SIZE)


def main(rounds: int) -> None:
    """Reads, then chains."""
    fd = cached_file()
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"{number}" for number in range(SIZE)]
        for path, content in zip(paths, CONTENTS, strict=True):
            path.write_bytes(content)
        threads = threads_loop(fd)
        some = next(pieces_of_a_file())
        works: list[Any] = [Reads(fd, pieces_of_a_file()), Reads(fd, itertools.repeat(some)), Files(paths)]
        # Counting forks, so it comes before the first thread. With several threads it would be wrong: see `syscalls`.
        calls = [(calls_of_plain(work.plain), calls_of_batch(work.ring)) for work in works]
        calls_of_thread = calls_per_read(trio.run, threads, 1, 256)
        reads, few_reads, files = works
        heading(
            f"batches of {SIZE}: 4 KiB reads from the page cache; small files opened, read and closed",
            "a loop of os.pread; by 64 tasks, trio.to_thread.run_sync(os.pread, ...); a loop of os.open, read, close",
            "lowlevel.batch(): 64 reads; 64 chains of an open (as a direct descriptor) and a read",
        )
        batched_reads = partial(ring_run, time_batches, reads.ring)
        compare(
            "reads, 4 MiB", partial(time_plain, reads.plain), batched_reads, rounds=rounds, target=0.5, calls=calls[0]
        )
        reads.check()
        compare(
            "reads, the same 256 KiB",
            partial(time_plain, few_reads.plain),
            partial(ring_run, time_batches, few_reads.ring),
            rounds=rounds,
            calls=calls[1],
        )
        few_reads.check()
        compare(
            "reads, stock trio",
            partial(trio.run, time_tasks, threads, SIZE, 10),
            batched_reads,
            rounds=rounds,
            target=40.0,
            calls=(calls_of_thread, calls[0][1]),
        )
        compare(
            "open, read, close",
            partial(time_plain, files.plain),
            partial(ring_run, time_batches, files.ring),
            rounds=rounds,
            target=0.5,
            calls=calls[2],
        )
        files.check()
    os.close(fd)
