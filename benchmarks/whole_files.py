"""Whole files: one read at a time, many small ones in a row, one large copy."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import trio_uring

from ._harness import compare, heading, ring_run, time_tasks
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ._harness import Loop
    from .syscalls import Mark

FILES: Final = 10_000
SMALL: Final = 1000
COPY_SIZE: Final = 1 << 30


async def with_open_file(path: str) -> bytes:
    async with await trio.open_file(path, "rb") as file:
        return await file.read()


async def with_path(path: str) -> bytes:
    return await trio.Path(path).read_bytes()


def loop_of(read: Callable[[str], Awaitable[bytes]], path: str, content: bytes) -> Loop:
    async def loop(times: int) -> None:
        found = b""
        for _ in range(times):
            found = await read(path)
        assert found == content

    return loop


def calls_per_file(run: Callable[..., object], loop: Loop, times: int) -> float | None:
    async def counted(mark: Mark) -> None:
        await loop(2)
        mark()
        await loop(times)
        mark()

    calls = count(lambda mark: run(counted, mark))
    return None if calls is None else calls / times


# Many


def read_plainly(paths: Sequence[str]) -> int:
    size = 0
    for path in paths:
        with open(path, "rb") as file:
            size += len(file.read())
    return size


async def read_on_the_ring(paths: Sequence[str], concurrency: int) -> int:
    size = 0
    async for _, content in trio_uring.read_files(paths, concurrency=concurrency):
        assert isinstance(content, bytes)
        size += len(content)
    return size


def time_files(read: Callable[[], int], paths: Sequence[str], size: int) -> float:
    start = time.perf_counter()
    found = read()
    seconds = time.perf_counter() - start
    assert found == size
    return seconds / len(paths)


# Copies


async def time_copy(copy: Callable[[str, str], Awaitable[object]], directory: Path) -> float:
    """To a new file, with nothing left to be written out from before."""
    target = directory / "target"
    target.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    await copy(os.fspath(directory / "source"), os.fspath(target))
    return time.perf_counter() - start


async def copy_in_a_thread(source: str, target: str) -> None:
    await trio.to_thread.run_sync(shutil.copyfile, source, target)


def copy_size(directory: Path) -> int:
    """A GiB, or less where that would not leave much room."""
    return min(COPY_SIZE, shutil.disk_usage(directory).free // 4)


def main(rounds: int) -> None:
    """Reads, many reads, a copy."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        content = bytes(SMALL)
        paths = [os.fspath(directory / f"{number}") for number in range(FILES)]
        for path in paths:
            Path(path).write_bytes(content)
        loops = [loop_of(read, paths[0], content) for read in (with_open_file, with_path, trio_uring.read_file)]
        # Counting forks, so it comes before the first thread. With several threads it would be wrong: see `syscalls`.
        runs = (trio.run, trio.run, ring_run)
        calls = [calls_per_file(run, loop, 100) for run, loop in zip(runs, loops, strict=True)]
        heading(
            f"whole_files: a file of {SMALL} bytes is opened, read and closed",
            "async with await trio.open_file(path, 'rb') as file: await file.read(); trio.Path(path).read_bytes()",
            "trio_uring.read_file(path)",
        )
        for title, loop, counted, target in (
            ("open_file, 1 task", loops[0], calls[0], 18.0),
            ("read_bytes, 1 task", loops[1], calls[1], None),
        ):
            compare(
                title,
                partial(trio.run, time_tasks, loop, 1, 100),
                partial(ring_run, time_tasks, loops[2], 1, 1000),
                rounds=rounds,
                target=target,
                calls=(counted, calls[2]),
            )
        heading(
            f"whole_files: {FILES} files of {SMALL} bytes, by so many at a time",
            "a plain loop: with open(path, 'rb') as file: file.read()",
            "async for path, content in trio_uring.read_files(paths)",
            "us per file",
        )
        for concurrency in (64, 256):
            compare(
                f"read_files, {concurrency} at a time",
                partial(time_files, partial(read_plainly, paths), paths, FILES * SMALL),
                partial(time_files, partial(ring_run, read_on_the_ring, paths, concurrency), paths, FILES * SMALL),
                rounds=rounds,
                target=1 / 1.3,
            )
        size = copy_size(directory)
        with (directory / "source").open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        heading(
            f"whole_files: a copy of {size >> 20} MiB, from the page cache to a new file",
            "trio.to_thread.run_sync(shutil.copyfile, source, target)",
            "trio_uring.copy_file(source, target)",
            "us per copy",
        )
        compare(
            "copy_file",
            partial(trio.run, time_copy, copy_in_a_thread, directory),
            partial(ring_run, time_copy, trio_uring.copy_file, directory),
            rounds=min(rounds, 7),
            target=1.0,
        )
