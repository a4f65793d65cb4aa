"""What was interrupted or would block is tried again, unless the caller forbids it."""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.contract.cases import BLOCKING_ON_FD, CASES
from tests.helpers import Attempt, drain, manager, nothing_submitted, parked
from trio_uring import lowlevel, statistics
from trio_uring._abi import NOP_INJECT_RESULT
from trio_uring._errors import ERESTARTS
from trio_uring._ring import ffi

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench


# Of two fds, or of a pidfd, O_NONBLOCK means the operation itself.
NOT_WAITING = ["splice", "tee", "waitid"]


@pytest.mark.parametrize("name", [name for name in BLOCKING_ON_FD if name not in NOT_WAITING])
async def test_nonblocking_fds_wait(bench: Bench, name: str) -> None:
    """O_NONBLOCK means nothing here."""
    blocked = CASES[name].blocked
    assert blocked is not None
    call, unblock = blocked(bench)

    def set_nonblocking() -> None:
        for operation in statistics().operations:
            if operation.operation == name:
                os.set_blocking(operation.fd, False)

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, call, once_parked=set_nonblocking)
        await trio.testing.wait_all_tasks_blocked()
        assert not attempt.done
        if name == "connect":  # no way to let this very call succeed
            assert await attempt.cancel()
        unblock()
        await attempt.settled()
        assert attempt.error is None


RWF_NOWAIT = 8


def _impatient(name: str, fd: int, buffer: bytearray) -> Awaitable[int]:
    """As `lowlevel.read` or `write`, but the kernel answers EAGAIN instead of waiting, as some do for O_NONBLOCK."""
    return manager().perform(lowlevel.TABLE[name], fd, -1, ffi.from_buffer(buffer), -1, RWF_NOWAIT)


@pytest.mark.parametrize("end", ["done", "cancelled", "closed"])
@pytest.mark.parametrize("name", ["read", "write"])
async def test_eagain_is_a_wait(bench: Bench, name: str, end: str) -> None:
    """It is tried again when the fd is ready; until then it can be cancelled and closed."""
    buffer = bytearray(b"hello")
    if name == "read":
        fd, peer = bench.pipe()
        size = 0
    else:
        peer, fd, size = bench.full_pipe()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, _impatient, name, fd, buffer)
        assert [op.state for op in statistics().operations if op.fd == fd] == ["IN_FLIGHT"]
        if end == "cancelled":
            assert await attempt.cancel()
        elif end == "closed":
            lowlevel.notify_closing(fd)
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        elif name == "read":
            os.write(peer, b"12345")
            assert await attempt.result() == 5
            assert buffer == b"12345"
        else:
            drain(peer, size)
            assert await attempt.result() == 5
            assert os.read(peer, 9) == b"hello"
    buffer.append(0)
    if end != "done" and name == "read":
        os.write(peer, b"hello")
        assert os.read(fd, 9) == b"hello"
    elif end != "done":
        assert drain(peer, size) == bytes(size)
        assert select.select([peer], [], [], 0)[0] == []


async def test_any_number_of_tasks_wait_for_another_try(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, _impatient, "read", read_end, bytearray(1)) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        for _ in attempts:
            os.write(write_end, b"x")
        for attempt in attempts:
            assert await attempt.result() == 1


@pytest.mark.parametrize("name", ["recv", "recvmsg", "send", "sendmsg"])
async def test_dontwait_does_not_wait(bench: Bench, name: str) -> None:
    a, b, size = bench.full_socket()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "recv": lambda: lowlevel.recv(a, bytearray(1), socket.MSG_DONTWAIT),
        "recvmsg": lambda: lowlevel.recvmsg(a, 1, flags=socket.MSG_DONTWAIT),
        "send": lambda: lowlevel.send(a, b"x", socket.MSG_DONTWAIT),
        "sendmsg": lambda: lowlevel.sendmsg(a, [b"x"], flags=socket.MSG_DONTWAIT),
    }
    with pytest.raises(BlockingIOError):
        await calls[name]()
    b.send(b"x")
    drain(b.fileno(), size)
    await calls[name]()


NOP: lowlevel.Kind[int] = dataclasses.replace(lowlevel.TABLE["nop"], result="count", decode=None)


async def _nop(result: int) -> int:
    """A no-op for which the kernel reports this result."""
    return await manager().perform(NOP, -1, 0, None, result & 0xFFFFFFFF, NOP_INJECT_RESULT)


async def test_results_as_the_kernel_gives_them() -> None:
    for result in (0, 1, 12345, 2**31 - 1):
        assert await _nop(result) == result
    for error in (errno.ENOENT, errno.EAGAIN, errno.ECANCELED, errno.EIO):  # nothing to wait for; nobody cancelled
        with pytest.raises(OSError, match=os.strerror(error)) as raised:
            await _nop(-error)
        assert raised.value.errno == error


@pytest.mark.parametrize("result", [-errno.EINTR, *sorted(ERESTARTS)])
async def test_interrupted_operations_are_tried_again(result: int) -> None:
    before = statistics().sqes
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, _nop, result)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert not attempt.done
        assert statistics().sqes > before + 5
        assert await attempt.cancel()
        async with nothing_submitted():
            pass


async def test_a_short_write_is_the_callers(bench: Bench) -> None:
    a, b, size = bench.full_socket()
    drain(b.fileno(), size // 2)
    sent = await lowlevel.send(a, bytes(size))
    assert 0 < sent < size
    read_end, write_end, size = bench.full_pipe(os.O_NONBLOCK)
    drain(read_end, 4096)
    assert await lowlevel.write(write_end, bytes(size)) == 4096
