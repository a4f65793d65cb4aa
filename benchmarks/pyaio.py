"""4 KiB reads against pyaio, asyncio on io_uring (``pip install --pre pyaio``)."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import time
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from trio_uring import lowlevel

from ._harness import compare, heading, ring_run, time_tasks
from .reads import BLOCK, cached_file, check, offsets, ring_loop

if TYPE_CHECKING:
    from ._harness import Loop

TASKS: Final = 32
TIMES: Final = 125


def fresh_buffer_loop(fd: int) -> Loop:
    """As pyaio does it: a new buffer for each read."""
    where = offsets()

    async def loop(times: int) -> None:
        buffer, offset = bytearray(), 0
        for offset in itertools.islice(where, times):
            buffer = bytearray(BLOCK)
            await lowlevel.read(fd, buffer, offset)
        check(buffer, offset)

    return loop


async def time_pyaio(uring: Any, fd: int) -> float:
    """What `time_tasks` does, in asyncio's terms."""
    where = offsets()
    go = asyncio.Event()

    async with uring.UringIO() as io:

        async def loop(times: int) -> None:
            data, offset = bytearray(), 0
            for offset in itertools.islice(where, times):
                data = await io.read(fd, offset, BLOCK)
            check(data, offset)

        async def one_task(warm: asyncio.Semaphore) -> None:
            await loop(2)
            warm.release()
            await go.wait()
            await loop(TIMES)

        warm = asyncio.Semaphore(0)
        tasks = [asyncio.ensure_future(one_task(warm)) for _ in range(TASKS)]
        for _ in tasks:
            await warm.acquire()
        start = time.perf_counter()
        go.set()
        await asyncio.gather(*tasks)
        return (time.perf_counter() - start) / (TASKS * TIMES)


def main(rounds: int) -> None:
    """Concurrency 32; once as each is meant to be used, once with a new buffer for each read on both sides."""
    try:
        uring = importlib.import_module("pyaio.uring")
    except ImportError as exc:
        print(f"\npyaio: not measured: {exc}; pip install --pre pyaio")
        return
    fd = cached_file()
    heading(
        f"pyaio {metadata.version('pyaio')}: 4 KiB from the page cache, by {TASKS} tasks",
        "asyncio, await pyaio.uring.UringIO().read(fd, offset, 4096)",
        "trio, await trio_uring.lowlevel.read(fd, buffer, offset)",
    )

    def pyaio_round() -> float:
        return asyncio.run(time_pyaio(uring, fd))

    for name, loop, target in (
        ("buffer used again", ring_loop(fd), 1.3),
        ("new buffer each time", fresh_buffer_loop(fd), None),
    ):
        compare(name, pyaio_round, partial(ring_run, time_tasks, loop, TASKS, TIMES), rounds=rounds, target=target)
    os.close(fd)
