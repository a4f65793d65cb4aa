"""Files: `trio_uring.open_file` against `trio.open_file`, and beside it what else there is."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
import trio

import trio_uring

from ._harness import compare, heading, ring_run
from .reads import BLOCK, BLOCKS, check, offsets
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from .syscalls import Mark

    Work = Callable[[Any, int], Awaitable[None]]
    """Does an operation so many times with a file, or with what opens one."""

SMALL: Final = 4096
COPY_BLOCK: Final = 1 << 18
COPY_BLOCKS: Final = 64
TEXT_SIZE: Final = 100 << 20
SYNCED_FILES: Final = 32


class Side(NamedTuple):
    """A way to use files.

    Attributes:
        name: its library.
        open: called with a path, a mode and perhaps a buffer's size; an asynchronous context manager.
        run: runs an async function.
        gather: awaits several.
    """

    name: str
    open: Callable[..., Any]
    run: Callable[..., float]
    gather: Callable[..., Awaitable[object]]


async def _trio_gather(*jobs: Awaitable[None]) -> None:
    async def one(job: Awaitable[None]) -> None:
        await job

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(one, job)


class _Opened:
    """The context manager of a file that is awaited first."""

    def __init__(self, opening: Awaitable[Any]) -> None:
        self._opening = opening

    async def __aenter__(self) -> Any:
        self._file = await self._opening
        return self._file

    async def __aexit__(self, *exc: object) -> None:
        await self._file.aclose()


class _InExecutor:
    """What one writes by hand with asyncio."""

    def __init__(self, path: Path, mode: str, buffering: int = -1) -> None:
        self._open = partial(open, path, mode, buffering)

    async def __aenter__(self) -> Any:
        self._call = asyncio.get_running_loop().run_in_executor
        self._file: Any = await self._call(None, self._open)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._call(None, self._file.close)

    async def read(self, size: int = -1) -> Any:
        return await self._call(None, self._file.read, size)

    async def write(self, data: bytes) -> Any:
        return await self._call(None, self._file.write, data)

    async def seek(self, offset: int) -> Any:
        return await self._call(None, self._file.seek, offset)

    async def readline(self) -> Any:
        return await self._call(None, self._file.readline)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while line := await self.readline():
            yield line


async def _on_threads(*args: Any) -> Any:
    return await trio.open_file(*args)


TRIO: Final = Side("trio.open_file", lambda *args: _Opened(_on_threads(*args)), trio.run, _trio_gather)
RING: Final = Side("trio_uring.open_file", lambda *args: _Opened(trio_uring.open_file(*args)), ring_run, _trio_gather)


def others() -> Iterator[Side]:
    """Those that are installed."""
    yield Side("anyio on asyncio", lambda *args: _Opened(anyio.open_file(*args)), anyio.run, asyncio.gather)
    yield Side("asyncio and an executor", _InExecutor, _asyncio_run, asyncio.gather)
    try:
        aiofiles = importlib.import_module("aiofiles")
        yield Side("aiofiles", aiofiles.open, _asyncio_run, asyncio.gather)
    except ImportError as exc:
        print(f"aiofiles: not measured: {exc}")
    try:
        aiofile = importlib.import_module("aiofile")
        yield Side("aiofile", lambda path, mode, *_: aiofile.async_open(path, mode), _asyncio_run, asyncio.gather)
    except ImportError as exc:
        print(f"aiofile: not measured: {exc}")


def _asyncio_run(async_fn: Callable[..., Any], *args: Any) -> float:
    return asyncio.run(async_fn(*args))  # type: ignore[no-any-return]


# The work


def small_work(path: Path) -> Work:
    async def work(open_file: Any, times: int) -> None:
        for _ in range(times):
            async with open_file(path, "rb") as file:
                data = await file.read()
        assert len(data) == SMALL

    return work


async def pread_work(file: trio_uring.AsyncFile, times: int) -> None:
    for offset in itertools.islice(offsets(), times):
        data = await file.pread(BLOCK, offset)
    check(data, offset)


async def seek_and_read_work(file: Any, times: int) -> None:
    for offset in itertools.islice(offsets(), times):
        await file.seek(offset)
        data = await file.read(BLOCK)
    check(data, offset)


async def append_work(file: Any, times: int) -> None:
    data = bytes(BLOCK)
    for _ in range(times):
        await file.write(data)


async def lines_work(file: Any, times: int) -> None:
    lines = 0
    async for _ in file:
        lines += 1
        if lines == times:
            return
    raise AssertionError("too few lines")


# Timing


async def time_open(side: Side, work: Work, tasks: int, times: int) -> float:
    """Seconds per operation of work that opens its files itself, in so many tasks."""
    await work(side.open, 2)
    start = time.perf_counter()
    await side.gather(*(work(side.open, times) for _ in range(tasks)))
    return (time.perf_counter() - start) / (tasks * times)


async def time_one(side: Side, work: Work, times: int, *how: Any) -> float:
    """Seconds per operation on one file that is open."""
    async with side.open(*how) as file:
        await work(file, 2)
        start = time.perf_counter()
        await work(file, times)
        return (time.perf_counter() - start) / times


def time_lines(path: Path, times: int) -> float:
    """A plain loop, that does what `lines_work` does."""
    lines = 0
    start = time.perf_counter()
    with open(path) as file:
        for _ in file:
            lines += 1
            if lines == times:
                break
    return (time.perf_counter() - start) / times


async def time_copy(side: Side, source: Path, target: Path) -> float:
    """Seconds per block, to a new file: what is there from before would take longer to empty than to write."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    async with side.open(source, "rb") as a, side.open(target, "wb") as b:
        while data := await a.read(COPY_BLOCK):
            await b.write(data)
    return (time.perf_counter() - start) / COPY_BLOCKS


async def time_synced(side: Side, directory: Path, times: int, clock: Callable[[], float]) -> float:
    """Seconds, by a clock, per append that is made durable, in as many tasks as there are files."""

    async def one(path: Path, times: int) -> None:
        async with side.open(path, "ab", 0) as file:
            for _ in range(times):
                await file.write(bytes(BLOCK))
                if side is RING:
                    await file.datasync()
                else:
                    await trio.to_thread.run_sync(os.fdatasync, file.fileno())

    start = clock()
    await side.gather(*(one(directory / f"synced{number}", times) for number in range(SYNCED_FILES)))
    return (clock() - start) / (SYNCED_FILES * times)


def cpu_time() -> float:
    """Of this process, its threads and the kernel's workers for it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def calls(side: Side, work: Work, times: int, *how: Any) -> float | None:
    """System calls per operation."""

    async def counted(mark: Mark) -> None:
        if how:
            async with side.open(*how) as file:
                await work(file, 2)
                mark()
                await work(file, times)
                mark()
        else:
            await work(side.open, 2)
            mark()
            await work(side.open, times)
            mark()

    made = count(lambda mark: side.run(counted, mark))
    return None if made is None else made / times


def make_files(directory: Path) -> tuple[Path, Path, Path]:
    """A small one, one of blocks, one of lines."""
    small, blocks, text = directory / "small", directory / "blocks", directory / "text"
    small.write_bytes(bytes(SMALL))
    blocks.write_bytes(b"".join(number.to_bytes(4, "big") * (BLOCK // 4) for number in range(BLOCKS)))
    lines = "".join("x" * (20 + number * 37 % 110) + "\n" for number in range(10_000))
    with open(text, "w") as file:
        file.writelines(lines for _ in range(TEXT_SIZE // len(lines) + 1))
    return small, blocks, text


def main(rounds: int) -> None:
    """Each against `trio.open_file`, then against the others, with fewer rounds."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        _main(Path(name), rounds)


def _main(directory: Path, rounds: int) -> None:
    small, blocks, text = make_files(directory)
    appended, copied = directory / "appended", directory / "copied"
    lines = 20_000 if rounds < 5 else 1_000_000
    work = small_work(small)
    # Counting forks, so it comes before the first thread.
    of_small = calls(TRIO, work, 50), calls(RING, work, 50)
    of_reads = calls(TRIO, seek_and_read_work, 50, blocks, "rb", 0), calls(RING, pread_work, 50, blocks, "rb", 0)
    of_appends = calls(TRIO, append_work, 50, appended, "ab", 0), calls(RING, append_work, 50, appended, "ab", 0)
    of_lines = calls(TRIO, lines_work, 50, text), calls(RING, lines_work, 10_000, text)

    heading("files", "trio.open_file", "trio_uring.open_file")
    for tasks, times, target in ((1, 50, 10.0), (64, 4, 12.0)):
        compare(
            f"open, read, close, {tasks}",
            partial(trio.run, time_open, TRIO, work, tasks, times),
            partial(ring_run, time_open, RING, work, tasks, times * 4),
            rounds=rounds,
            target=target,
            calls=of_small if tasks == 1 else None,
        )
    ring_reads = partial(ring_run, time_one, RING, pread_work, 1000, blocks, "rb", 0)
    compare(
        "4 KiB read at random",
        partial(trio.run, time_one, TRIO, seek_and_read_work, 50, blocks, "rb", 0),
        ring_reads,
        rounds=rounds,
        target=20.0,
        calls=of_reads,
    )
    ring_appends = partial(ring_run, time_one, RING, append_work, 500, appended, "ab", 0)
    compare(
        "4 KiB append",
        partial(trio.run, time_one, TRIO, append_work, 100, appended, "ab", 0),
        ring_appends,
        rounds=rounds,
        target=5.0,
        calls=of_appends,
    )
    os.truncate(appended, 0)
    ring_lines = partial(ring_run, time_one, RING, lines_work, lines, text, "r")
    compare(
        "line of text",
        partial(trio.run, time_one, TRIO, lines_work, 300, text, "r"),
        ring_lines,
        rounds=rounds,
        target=20.0,
        calls=of_lines,
    )
    compare(
        "copy 256 KiB",
        partial(trio.run, time_copy, TRIO, blocks_of(directory), copied),
        partial(ring_run, time_copy, RING, blocks_of(directory), copied),
        rounds=rounds,
        target=3.0,
    )
    for what, clock, target in (("", time.perf_counter, 2.5), (", CPU", cpu_time, 1.0)):
        compare(
            f"append, datasync{what}",
            partial(trio.run, time_synced, TRIO, directory, 4, clock),
            partial(ring_run, time_synced, RING, directory, 4, clock),
            rounds=max(2, rounds // 3),
            target=target,
        )

    heading("the same, others", "as named", "trio_uring.open_file")
    fewer = max(2, rounds // 3)
    compare("line, plain loop", partial(time_lines, text, lines), ring_lines, rounds=fewer, target=1 / 3)
    for side in others():
        for tasks, times in ((1, 50), (64, 4)):
            compare(
                f"open, read, close, {tasks}: {side.name}",
                partial(side.run, time_open, side, work, tasks, times),
                partial(ring_run, time_open, RING, work, tasks, times * 4),
                rounds=fewer,
            )
        reads = partial(side.run, time_one, side, seek_and_read_work, 50, blocks, "rb", 0)
        if side.name == "aiofile":
            reads = partial(side.run, _time_caio, side, blocks)
        compare(f"4 KiB read: {side.name}", reads, ring_reads, rounds=fewer, target=1.0)
        compare(
            f"4 KiB append: {side.name}",
            partial(side.run, time_one, side, append_work, 100, appended, "ab", 0),
            ring_appends,
            rounds=fewer,
        )
        compare(
            f"line of text: {side.name}",
            partial(side.run, time_one, side, lines_work, 300, text, "r"),
            ring_lines,
            rounds=fewer,
        )
    _compare_with_pyaio(blocks, ring_reads, fewer)


def blocks_of(directory: Path) -> Path:
    """A file to copy."""
    path = directory / "source"
    if not path.exists():
        path.write_bytes(os.urandom(COPY_BLOCK) * COPY_BLOCKS)
    return path


async def _time_caio(side: Side, path: Path) -> float:
    """aiofile's own way to read at an offset."""
    aiofile = importlib.import_module("aiofile")
    async with aiofile.AIOFile(path, "rb") as file:
        start = time.perf_counter()
        for offset in itertools.islice(offsets(), 300):
            data = await file.read_bytes(BLOCK, offset)
        check(data, offset)
        return (time.perf_counter() - start) / 300


def _compare_with_pyaio(path: Path, ring_reads: Callable[[], float], rounds: int) -> None:
    try:
        uring = importlib.import_module("pyaio.uring")
    except ImportError as exc:
        print(f"pyaio: not measured: {exc}")
        return

    async def timed() -> float:
        fd = os.open(path, os.O_RDONLY)
        async with uring.UringIO() as io:
            start = time.perf_counter()
            for offset in itertools.islice(offsets(), 1000):
                data = await io.read(fd, offset, BLOCK)
            check(data, offset)
            cost = (time.perf_counter() - start) / 1000
        os.close(fd)
        return cost

    compare("4 KiB read: pyaio", lambda: asyncio.run(timed()), ring_reads, rounds=rounds, target=1.0)
