"""Calls of a file, cancelled at any moment and made again: no byte is lost, none comes or goes twice."""

from __future__ import annotations

import fcntl
import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

import trio_uring
from tests.helpers import Attempt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

T = TypeVar("T")

open_file: Any = trio_uring.open_file
CANCELLED = object()


async def cut_short(
    rng: random.Random, meanwhile: Callable[[], object], call: Callable[[], Awaitable[T]]
) -> T | object:
    """Makes the call, and cancels it some steps later, just after something else has happened."""
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, call)
        for _ in range(rng.randrange(4)):
            await trio.lowlevel.checkpoint()
        if rng.random() < 0.5:
            meanwhile()
        return CANCELLED if await attempt.cancel() else attempt.value


def some_text(rng: random.Random, size: int) -> str:
    return "".join(rng.choices("ab\n\u00e4\u20ac", (5, 5, 1, 1, 1), k=size))


READERS: dict[str, tuple[tuple[Any, ...], list[tuple[Any, ...]]]] = {
    "raw": (("rb", 0), [("read", 100), ("readinto", 50), ("readline",)]),
    "buffered": (("rb", 64), [("read", 10), ("read", 200), ("readline",), ("read1", 50), ("readinto", 70), ("peek",)]),
    "text": (("r", -1, "utf-8", None, ""), [("read", 10), ("read", 200), ("readline",), ("__anext__",)]),
}


async def call_of(file: Any, name: str, *args: int) -> Any:
    """What is read, whatever the method."""
    if name == "__anext__":
        async for line in file:
            return line
        return ""
    if name == "readinto":
        buffer = bytearray(*args)
        return bytes(buffer[: await file.readinto(buffer)])
    if name == "peek":
        await file.peek()
        return b""
    return await getattr(file, name)(*args)


@pytest.mark.parametrize("kind", READERS)
async def test_reading_from_a_pipe(bench: Bench, kind: str) -> None:
    """While the other end writes, a little at a time."""
    settings, calls = READERS[kind]
    rng = random.Random(kind)
    read_end, write_end = bench.pipe()
    text = some_text(rng, 12_000)
    left = bytearray(text.encode())
    found: list[Any] = []
    cancelled = 0

    def send() -> None:
        n = rng.randrange(1, 60)
        os.write(write_end, left[:n])
        del left[:n]

    async with await open_file(read_end, *settings, closefd=False) as file:
        while left:
            result = await cut_short(rng, send, partial(call_of, file, *rng.choice(calls)))
            if result is CANCELLED:
                cancelled += 1
            else:
                found.append(result)
        bench.closed(write_end)
        os.close(write_end)
        found.append(await file.read() if kind != "raw" else await file.readall())
    assert cancelled > 50
    assert type(found[-1])().join(found) == (text if kind == "text" else text.encode())


WRITERS: dict[str, tuple[Any, ...]] = {"raw": ("wb", 0), "buffered": ("wb", 64), "text": ("w", 64, "utf-8", None, "")}


@pytest.mark.parametrize("kind", WRITERS)
async def test_writing_to_a_pipe_that_is_full(bench: Bench, kind: str) -> None:
    """A call that is cancelled has taken nothing; what one has taken arrives once."""
    rng = random.Random(kind)
    read_end, write_end = bench.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(read_end, False)
    taken: list[bytes] = []
    arrived: list[bytes] = []
    cancelled = 0

    def drain(size: int = 300) -> None:
        try:
            arrived.append(os.read(read_end, size))
        except BlockingIOError:
            pass

    file: Any = await open_file(write_end, *WRITERS[kind], closefd=False)
    while len(taken) < 400:
        text = some_text(rng, rng.choice((1, 20, 90, 3000)))
        data: Any = text if kind == "text" else text.encode()
        flush = rng.random() < 0.3
        result = await cut_short(rng, drain, file.flush if flush else partial(file.write, data))
        if result is CANCELLED:
            cancelled += 1
            drain(1)
        elif not flush:
            taken.append(text.encode() if kind == "text" else data[:result])
    async with trio.open_nursery() as nursery:
        closing = Attempt(nursery, file.aclose)
        while not closing.done:
            drain()
            await trio.lowlevel.checkpoint()
    for _ in range(20):  # more than the pipe holds
        drain()
    assert cancelled > 50
    assert b"".join(arrived) == b"".join(taken)


@pytest.mark.parametrize("buffering", [0, 16, 4096])
async def test_a_regular_file(bench: Bench, buffering: int) -> None:
    """Against a model: what is cancelled is done again until it is done."""
    rng = random.Random(buffering)
    path = bench.path(bytes(2000))
    model = bytearray(2000)
    at = cancelled = 0
    async with await open_file(path, "r+b", buffering) as file:
        for _ in range(1500):
            name = rng.choice(("read", "write", "seek", "flush"))
            argument: Any = {
                "read": (rng.randrange(1, 100),),
                "write": (rng.randbytes(rng.randrange(1, 100)),),
                "seek": (rng.randrange(2000),),
                "flush": (),
            }[name]
            method = getattr(file, name)
            while (result := await cut_short(rng, int, partial(method, *argument))) is CANCELLED:
                cancelled += 1
            if name == "read":
                assert result == model[at : at + argument[0]]
                at += len(result)
            elif name == "write":
                assert result == len(argument[0])
                model[at : at + len(argument[0])] = argument[0]
                at += len(argument[0])
            elif name == "seek":
                at = argument[0]
            assert await file.tell() == at
    assert cancelled > 50
    assert path.read_bytes() == model
