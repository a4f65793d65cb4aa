"""Calls of a file are cancelled at any moment and made again: no byte is lost, none comes twice.

Each round makes one call. Its peer acts before the call has begun, once it waits, or in the tick of the cancel. What
the calls have returned is compared with what went through the pipe, or with a model of the file.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, fill, in_kernel_worker
from trio_uring import _binary_files, _file_ops, open_file, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

ROUNDS = 400
PAGE = 4096
LETTERS = "ab \n\n\r\néé日"


class Rounds:
    """Calls that are cancelled, each at a moment that chance says, and how many of them were."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._ends: Counter[str] = Counter()

    async def play(
        self, call: Callable[..., Awaitable[Any]], *args: object, peer: Callable[[], object] = lambda: None
    ) -> Attempt[Any]:
        """One round: the call has ended when it returns, cancelled or not."""
        chance = self._chance
        how = chance.choice(("early", "parked", "same tick", "late"))
        async with trio.open_nursery() as nursery:
            attempt: Attempt[Any] = Attempt(nursery, call, *args)
            if how == "parked":
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(chance.randrange(4)):
                await trio.lowlevel.checkpoint()
            if how == "same tick" and chance.randrange(2):
                attempt.scope.cancel()
            if how != "early":
                peer()
            for _ in range(chance.randrange(1, 8) if how == "late" else 0):
                await trio.lowlevel.checkpoint()
            attempt.scope.cancel()
            await attempt.settled()
        if attempt.error is not None:
            raise attempt.error
        self._ends["cancelled" if attempt.cancelled else "done"] += 1
        return attempt

    def check(self) -> None:
        assert min(self._ends["cancelled"], self._ends["done"]) > ROUNDS // 50, f"no race: {self._ends}"
        now = statistics()
        assert now.in_flight == 0
        assert now.cancels_asked == now.cancels_won + now.cancels_lost


def some_text(chance: random.Random, size: int) -> str:
    return "".join(chance.choices(LETTERS, k=size))


# A pipe that is read


async def read_into(file: Any, method: str, size: int) -> bytes:
    buffer = bytearray(size)
    count = await getattr(file, method)(buffer)
    return bytes(buffer[:count])


async def joined_lines(file: Any, hint: int) -> Any:
    lines = await file.readlines(hint)
    return lines[0][:0].join(lines) if lines else b""


async def loop_over(file: Any, received: list[Any]) -> None:
    async for line in file:
        received.append(line)  # noqa: PERF401 - what came before a cancel counts


READERS = {
    "raw": ("rb", 0, None, None),
    "buffered": ("rb", -1, None, None),
    "small buffer": ("rb", 16, None, None),
    "text": ("r", -1, "utf-8", None),
    "text, line ends as they are": ("r", 16, "utf-16", ""),
    "text, one line end": ("r", -1, "utf-8", "\r\n"),
}


@pytest.mark.parametrize("kind", READERS)
async def test_reading(bench: Bench, kind: str) -> None:
    mode, buffering, encoding, newline = READERS[kind]
    chance = random.Random(kind)
    content = some_text(chance, 20 * ROUNDS).encode(encoding or "utf-8")
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    os.set_blocking(write_end, False)
    sent = 0

    def feed() -> None:
        nonlocal sent
        size = chance.choice((1, 5, 20, 60))
        with contextlib.suppress(BlockingIOError):
            sent += os.write(write_end, content[sent : sent + size])

    received: list[Any] = []
    rounds = Rounds(chance)
    file: Any = await open_file(read_end, mode, buffering, encoding, newline=newline)
    async with file:

        async def play(call: Callable[..., Awaitable[Any]], *args: object) -> None:
            attempt = await rounds.play(call, *args, peer=feed)
            if not attempt.cancelled and attempt.value is not None:
                received.append(attempt.value)

        for _ in range(ROUNDS):
            size = chance.choice((1, 7, 30, 100))
            calls: list[tuple[Any, ...]] = [
                (file.read, size),
                (file.readline,),
                (file.readline, size),
                (file.read,),
                (loop_over, file, received),
                (joined_lines, file, size),
            ]
            if "b" in mode:
                calls.append((read_into, file, "readinto", size))
            if "b" in mode and buffering:
                calls += [(file.read1, size), (read_into, file, "readinto1", size)]
            await play(*chance.choice(calls))
        assert sent > ROUNDS
        os.write(write_end, content[sent:])
        bench.closed(write_end)
        os.close(write_end)
        received.append(await file.read())
    rounds.check()
    if "b" in mode:
        assert b"".join(received) == content
    else:
        assert "".join(received) == io.TextIOWrapper(io.BytesIO(content), encoding, newline=newline).read()


# A pipe that is nearly full is written

WRITERS = {
    "raw": ("wb", 0, None),
    "buffered": ("wb", -1, None),
    "small buffer": ("wb", 100, None),
    "text": ("w", 100, "utf-8"),
    "text, line by line": ("w", 1, "iso2022_jp"),
}


@pytest.mark.parametrize("kind", WRITERS)
async def test_writing(bench: Bench, kind: str) -> None:
    """A write that was cancelled has taken nothing, and is made again; another may come between."""
    mode, buffering, encoding = WRITERS[kind]
    chance = random.Random(kind)
    read_end, write_end = bench.pipe(os.O_NONBLOCK)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PAGE)
    before = fill(lambda: os.write(write_end, bytes(PAGE)))
    os.set_blocking(write_end, True)
    bench.closed(write_end)
    received: list[bytes] = []

    def take() -> None:
        with contextlib.suppress(BlockingIOError):
            received.append(os.read(read_end, chance.choice((10, 100, PAGE, PAGE))))

    accepted: list[Any] = []
    rounds = Rounds(chance)
    file = await open_file(write_end, mode, buffering, encoding)
    refused: list[Any] = []
    for _ in range(ROUNDS):
        if chance.randrange(5) == 0:
            await rounds.play(file.flush, peer=take)
            continue
        size = chance.choice((1, 20, 90, 300, 3 * PAGE))
        new: Any = chance.randbytes(size) if encoding is None else some_text(chance, size).replace("é", "本")
        data = refused.pop() if refused and chance.randrange(3) else new
        attempt = await rounds.play(file.write, data, peer=take)
        if attempt.cancelled:
            refused.append(data)
        else:
            accepted.append(data[: attempt.value])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.aclose)
        os.set_blocking(read_end, True)
        while data := await trio.to_thread.run_sync(os.read, read_end, 1 << 16):
            received.append(data)
    rounds.check()
    expected = (
        b"".join(accepted) if encoding is None else codecs.getincrementalencoder(encoding)().encode("".join(accepted))
    )
    assert b"".join(received)[before:] == expected


# A regular file


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("buffering", [0, 50, 8192])
async def test_a_regular_file(bench: Bench, buffering: int, worker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cancelled has not happened: the model makes only the calls that returned.

    In a thread of the kernel's a cancel may find the operation waiting or at work; otherwise it is done at once.
    Pipes are left out of that: a cancel answered with EALREADY was seen to leave the write waiting.
    """
    if worker:
        monkeypatch.setattr(_binary_files, "READ", in_kernel_worker(_file_ops.READ))
        monkeypatch.setattr(_binary_files, "WRITE", in_kernel_worker(_file_ops.WRITE))
    chance = random.Random(buffering)
    content = some_text(chance, 3000).encode()
    path = bench.path(content)
    model = io.BytesIO(content)
    rounds = Rounds(chance)
    async with await open_file(path, "r+b", buffering) as file:
        for _ in range(2 * ROUNDS):
            size = chance.choice((1, 10, 60, 500))
            calls: list[tuple[Any, ...]] = [
                ("read", size),
                ("read",),
                ("readline",),
                ("readlines",),
                ("write", chance.randbytes(size)),
                ("write", chance.randbytes(size)),
                ("seek", chance.randrange(3000)),
                ("seek", 0, os.SEEK_END),
                ("tell",),
                ("flush",),
                ("truncate", max(1000, len(model.getvalue()) - size)),
            ]
            method, *args = chance.choice(calls)
            attempt = await rounds.play(getattr(file, method), *args)
            if not attempt.cancelled:
                assert attempt.value == getattr(model, method)(*args), method
            assert await file.tell() == model.tell(), method
    rounds.check()
    assert path.read_bytes() == model.getvalue()
