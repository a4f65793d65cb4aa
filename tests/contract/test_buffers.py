"""Memory belongs to the kernel until it is done: buffers are exported, everything else is kept."""

from __future__ import annotations

import array
import mmap
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.contract.cases import BLOCKING, CASES
from tests.helpers import AfterStep, Attempt, drain, manager, parked
from trio_uring import lowlevel, statistics
from trio_uring._abi import Opcode
from trio_uring._ring import ffi

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

READERS: dict[str, Callable[[Any, Any], Awaitable[int]]] = {
    "read": lowlevel.read,
    "readv": lambda fd, buffer: lowlevel.readv(fd, [bytearray(1), buffer]),
    "recv": lowlevel.recv,
}
WRITERS: dict[str, Callable[[Any, Any], Awaitable[int]]] = {
    "write": lowlevel.write,
    "writev": lambda fd, data: lowlevel.writev(fd, [b"x", data]),
    "send": lowlevel.send,
    "sendmsg": lambda fd, data: lowlevel.sendmsg(fd, [b"x", data]),
    "sendto": lambda fd, data: lowlevel.sendto(fd, data, None),
}


def _blocked(bench: Bench, name: str, buffer: bytearray) -> tuple[Callable[[], Awaitable[int]], Any, Any]:
    """A blocked call that uses the buffer, its socket, and what lets it succeed."""
    if name in READERS:
        a, b = bench.sockets()
        return lambda: READERS[name](a, buffer), a, lambda: b.send(b"hello")
    a, b, size = bench.full_socket()
    return lambda: WRITERS[name](a, buffer), a, lambda: drain(b.fileno(), size)


def _resizable(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return False
    return True


@pytest.mark.parametrize("end", ["done", "cancelled", "closed"])
@pytest.mark.parametrize("name", [*READERS, *WRITERS])
async def test_a_buffer_is_pinned_until_the_kernel_is_done(bench: Bench, name: str, end: str) -> None:
    buffer = bytearray(100)
    call, sock, unblock = _blocked(bench, name, buffer)
    resizable_at_once = []

    async def call_and_resize() -> None:
        try:
            await call()
        finally:
            resizable_at_once.append(_resizable(buffer))

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, call_and_resize)
        assert not _resizable(buffer)
        if end == "done":
            unblock()
        elif end == "cancelled":
            attempt.scope.cancel()
        else:
            lowlevel.notify_closing(sock)
        assert not _resizable(buffer)  # it has been asked for, but not happened yet
        await attempt.settled()
    assert resizable_at_once == [True]
    assert attempt.cancelled is (end == "cancelled")
    assert isinstance(attempt.error, trio.ClosedResourceError) is (end == "closed")


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
async def test_a_buffer_is_free_when_the_operation_is_taken_back(bench: Bench, name: str) -> None:
    buffer = bytearray(100)
    call, _, _ = _blocked(bench, name, buffer)

    def cancel() -> None:
        assert not _resizable(buffer)
        attempt.scope.cancel()

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, call, once_parked=cancel)
        await attempt.settled()
    assert attempt.cancelled
    assert _resizable(buffer)


async def test_a_buffer_is_free_after_an_error(bench: Bench) -> None:
    buffer = bytearray(10)
    _, write_end = bench.pipe()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await lowlevel.read(write_end, buffer)
    assert _resizable(buffer)


class Nonsense:
    """What an argument should not be: it fails when it is looked at."""

    def fileno(self) -> int:
        raise ValueError("no fd")


NONSENSE: Any = Nonsense()

# Calls that fail before anything is submitted.
MISTAKES: dict[str, Callable[[Any], Awaitable[object]]] = {
    "read fd": lambda buffer: lowlevel.read(NONSENSE, buffer),
    "read offset": lambda buffer: lowlevel.read(0, buffer, 1 << 70),
    "write fd": lambda buffer: lowlevel.write(NONSENSE, buffer),
    "readv fd": lambda buffer: lowlevel.readv(NONSENSE, [buffer]),
    "readv offset": lambda buffer: lowlevel.readv(0, [buffer], 1 << 70),
    "readv buffer": lambda buffer: lowlevel.readv(0, [buffer, b"read-only"]),
    "writev fd": lambda buffer: lowlevel.writev(NONSENSE, [buffer]),
    "writev buffer": lambda buffer: lowlevel.writev(0, [buffer, NONSENSE]),
    "send fd": lambda buffer: lowlevel.send(NONSENSE, buffer),
    "recv fd": lambda buffer: lowlevel.recv(NONSENSE, buffer),
    "recv flags": lambda buffer: lowlevel.recv(0, buffer, 1 << 40),
    "sendto fd": lambda buffer: lowlevel.sendto(NONSENSE, buffer, "x"),
    "sendto address": lambda buffer: lowlevel.sendto(0, buffer, NONSENSE),
    "sendmsg fd": lambda buffer: lowlevel.sendmsg(NONSENSE, [buffer]),
    "sendmsg buffer": lambda buffer: lowlevel.sendmsg(0, [buffer, NONSENSE]),
    "sendmsg ancillary data": lambda buffer: lowlevel.sendmsg(0, [buffer], [NONSENSE]),
    "sendmsg address": lambda buffer: lowlevel.sendmsg(0, [buffer], address=NONSENSE),
    "madvise advice": lambda buffer: lowlevel.madvise(buffer, -1),
    "setxattr path": lambda buffer: lowlevel.setxattr(NONSENSE, "user.x", buffer),
    "setxattr name": lambda buffer: lowlevel.setxattr("x", "\0", buffer),
    "setxattr flags": lambda buffer: lowlevel.setxattr("x", "user.x", buffer, -1),
    "fsetxattr fd": lambda buffer: lowlevel.fsetxattr(NONSENSE, "user.x", buffer),
    "setsockopt fd": lambda buffer: lowlevel.setsockopt(NONSENSE, 1, 1, buffer),
    "futex_wait size": lambda buffer: lowlevel.futex_wait(buffer, 0),
    "futex_wait value": lambda buffer: lowlevel.futex_wait(buffer, -1),
    "futex_wait mask": lambda buffer: lowlevel.futex_wait(buffer, 0, -1),
    "futex_wake flags": lambda buffer: lowlevel.futex_wake(buffer, 0, flags=-1),
    "futex_waitv size": lambda buffer: lowlevel.futex_waitv([(bytearray(4), 0), (buffer, 0)]),
    "futex_waitv value": lambda buffer: lowlevel.futex_waitv([(buffer, 0), (bytearray(4), -1)]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_in_hand_does_not_hold_the_buffer(mistake: str) -> None:
    buffer = bytearray(5)
    with pytest.raises((ValueError, TypeError, OverflowError, BufferError)):
        await MISTAKES[mistake](buffer)
    assert _resizable(buffer)
    with pytest.raises((ValueError, TypeError, OverflowError, BufferError)) as raised:
        await MISTAKES[mistake](buffer)
    assert raised.value.__traceback__ is not None
    assert _resizable(buffer)


@pytest.mark.parametrize(
    "name", ["setxattr", "fsetxattr", "madvise", "futex_wait", "futex_wake", "futex_waitv", "sendto"]
)
async def test_a_buffer_is_held_once_it_is_staged(bench: Bench, name: str) -> None:
    """What the kernel reads later is not copied. It is free when the operation is taken back."""
    buffer = bytearray(4)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "setxattr": lambda: lowlevel.setxattr(bench.path(), "user.x", buffer),
        "fsetxattr": lambda: lowlevel.fsetxattr(bench.file(), "user.x", buffer),
        "madvise": lambda: lowlevel.madvise(buffer, 0),
        "futex_wait": lambda: lowlevel.futex_wait(buffer, 0),
        "futex_wake": lambda: lowlevel.futex_wake(buffer, 1),
        "futex_waitv": lambda: lowlevel.futex_waitv([(buffer, 0)]),
        "sendto": lambda: lowlevel.sendto(bench.sockets()[0], buffer, None),
    }
    held = []

    def look_and_cancel() -> None:
        held.append(not _resizable(buffer))
        attempt.scope.cancel()

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, calls[name], once_parked=look_and_cancel)
        await attempt.settled()
    assert attempt.cancelled
    assert held == [True]
    assert _resizable(buffer)


def _churn() -> None:
    """Overwrites memory that was freed too early."""
    for _ in range(3):
        rubbish = [ffi.new("unsigned char[]", b"\xff" * size) for size in (8, 16, 24, 32, 56, 64, 112, 128, 256) * 50]
        rubbish += [bytes([0xFF]) * size for size in range(1, 300)]
        del rubbish


@pytest.mark.parametrize("name", lowlevel.TABLE)
async def test_arguments_outlive_the_call_that_made_them(bench: Bench, name: str) -> None:
    """Before the tick: the kernel has not seen paths, addresses, vectors yet."""
    call = CASES[name].ready(bench)
    trio.lowlevel.add_instrument(AfterStep(trio.lowlevel.current_task(), _churn))
    await call()


@pytest.mark.parametrize("name", BLOCKING)
async def test_structures_outlive_the_wait(bench: Bench, name: str) -> None:
    """After the tick: the kernel writes sizes, addresses, ancillary data."""
    blocked = CASES[name].blocked
    assert blocked is not None
    call, unblock = blocked(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, call)
        _churn()
        if name in ("connect", "timeout"):  # no way to let this very call succeed
            assert await attempt.cancel()
        else:
            unblock()
            await attempt.result()


@pytest.mark.parametrize(
    "make",
    [bytearray, lambda n: memoryview(bytearray(n)), lambda n: array.array("B", bytes(n)), lambda n: mmap.mmap(-1, n)],
    ids=["bytearray", "memoryview", "array", "mmap"],
)
async def test_any_contiguous_buffer(bench: Bench, make: Callable[[int], Any]) -> None:
    a, b = bench.sockets()
    source, target = make(4096), make(4096)
    memoryview(source)[:5] = b"hello"
    assert await lowlevel.send(a, source) == 4096
    assert await lowlevel.recv(b, target) == 4096
    assert bytes(memoryview(target)) == bytes(memoryview(source)) == b"hello" + bytes(4091)


async def test_a_slice_of_a_buffer(bench: Bench) -> None:
    fd = bench.file(b"0123456789")
    buffer = bytearray(10)
    assert await lowlevel.read(fd, memoryview(buffer)[3:6], 4) == 3
    assert buffer == b"\0\0\x00456\0\0\0\0"
    assert await lowlevel.read(fd, memoryview(buffer)[3:3], 4) == 0


async def test_a_zero_copy_buffer_is_pinned_until_the_notification(bench: Bench) -> None:
    import socket

    a, b = bench.sockets(socket.AF_INET)
    send_zc: lowlevel.Kind[int] = lowlevel.Kind(
        name="send_zc", opcode=Opcode.SEND_ZC, since="6.0", result="count", summary="", man="", direction="write"
    )
    for _ in range(20):
        data = bytearray(b"hello" * 10_000)
        sent = await manager().perform(send_zc, a.fileno(), 0, ffi.from_buffer(data), -1)
        owed = any(op.operation == "send_zc" for op in statistics().operations)
        assert _resizable(data) is not owed
        assert drain(b.fileno(), sent) == (b"hello" * 10_000)[:sent]
        while any(op.operation == "send_zc" for op in statistics().operations):
            await trio.lowlevel.checkpoint()
        assert _resizable(data)
