"""Closing an fd: its waiters hear of it, the peer too, and nothing queued ever meets the number's next owner."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.contract.cases import BLOCKING_ON_FD, CASES
from tests.helpers import Attempt, nothing_submitted, parked
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

# What a task can be doing with a socket: each leaves an entry that names the fd.
USES: dict[str, Callable[[int], Awaitable[object]]] = {
    "recv": lambda fd: lowlevel.recv(fd, bytearray(100)),
    "send": lambda fd: lowlevel.send(fd, b"stray" * 100_000, socket.MSG_WAITALL),
    "read": lambda fd: lowlevel.read(fd, bytearray(100)),
    "poll": lambda fd: lowlevel.poll(fd, select.POLLIN),
    "wait_readable": trio.lowlevel.wait_readable,
}


@pytest.mark.parametrize("name", BLOCKING_ON_FD)
async def test_waiters_get_closed_resource_error(bench: Bench, name: str) -> None:
    blocked = CASES[name].blocked
    assert blocked is not None
    call, _ = blocked(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, call)
        (fd,) = (op.fd for op in statistics().operations if op.operation == name)
        lowlevel.notify_closing(fd)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
    assert statistics().in_flight == 0


@pytest.mark.parametrize("name", ["splice", "tee"])
async def test_the_other_fd_of_two(bench: Bench, name: str) -> None:
    read_end, write_end = bench.pipe()
    _, output = bench.pipe()
    calls: dict[str, Callable[[], Awaitable[int]]] = {
        "splice": lambda: lowlevel.splice(read_end, -1, output, -1, 9),
        "tee": lambda: lowlevel.tee(read_end, output, 9),
    }
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, calls[name])
        lowlevel.notify_closing(read_end)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
    os.write(write_end, b"hello")
    assert os.read(read_end, 9) == b"hello"


@pytest.mark.parametrize("wait", [trio.lowlevel.wait_readable, trio.lowlevel.wait_writable])
async def test_pollers_get_closed_resource_error(bench: Bench, wait: Callable[[Any], Awaitable[None]]) -> None:
    a, _, _ = bench.full_socket()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, wait, a)
        lowlevel.notify_closing(a)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()


async def _close_with_os(fd: int) -> None:
    lowlevel.notify_closing(fd)
    os.close(fd)


async def test_close_wakes_everybody_and_the_peer_sees_the_end(bench: Bench) -> None:
    for close in (lowlevel.close, _close_with_os):
        a, b, _ = bench.full_socket()
        fd = a.detach()
        async with trio.open_nursery() as nursery:
            attempts = [Attempt(nursery, use, fd) for name, use in USES.items() if name != "recv"]
            await trio.testing.wait_all_tasks_blocked()
            await close(fd)
            for attempt in attempts:
                with pytest.raises(trio.ClosedResourceError):
                    await attempt.result()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        while b.recv(1 << 20):
            pass  # to the end of the stream


@pytest.mark.parametrize("name", USES)
async def test_the_peer_sees_the_end_at_once(bench: Bench, name: str) -> None:
    """Not only after the run's next tick."""
    a, b = bench.sockets(socket.AF_INET)
    b.settimeout(10)
    fd = a.detach()
    async with trio.open_nursery() as nursery:
        if name == "send":
            attempt = Attempt(nursery, USES[name], fd)
        else:
            attempt = await parked(nursery, USES[name], fd)
        await trio.testing.wait_all_tasks_blocked()
        lowlevel.notify_closing(fd)
        os.close(fd)
        while b.recv(1 << 20):
            pass
        await attempt.settled()


_STAGED_WAIT = pytest.param(
    "wait_readable",
    "staged",
    marks=pytest.mark.native("trio's own wait raises it in whoever calls notify_closing then"),
)
_STAGED = [(name, "staged") for name in USES if name != "wait_readable"]


@pytest.mark.parametrize(("name", "when"), [*((name, "in flight") for name in USES), *_STAGED, _STAGED_WAIT])
async def test_nothing_crosses_to_the_next_owner_of_the_number(bench: Bench, name: str, when: str) -> None:
    """The fd is closed and its number reused in the same tick."""
    a, b = bench.sockets()
    new, peer = bench.sockets()
    peer.send(b"for the new owner")
    fd = a.detach()

    def replace() -> None:
        lowlevel.notify_closing(fd)
        os.close(fd)
        os.dup2(new.fileno(), fd)
        bench.keep(fd)

    async with trio.open_nursery() as nursery:
        if when == "staged":
            async with nothing_submitted():
                attempt = Attempt(nursery, USES[name], fd, once_parked=replace)
                await attempt.settled()
        else:
            attempt = await parked(nursery, USES[name], fd)
            replace()
            await attempt.settled()
        if name != "send" or when == "staged":
            assert isinstance(attempt.error, trio.ClosedResourceError)
    assert new.recv(100) == b"for the new owner"
    with pytest.raises(BlockingIOError):
        peer.recv(1, socket.MSG_DONTWAIT)
    if when == "staged":
        assert b.recv(100) == b""


async def test_send_and_close_in_one_tick(bench: Bench) -> None:
    """In whichever order they run: the send is taken back, or finds the fd closed."""
    for _ in range(20):
        a, b = bench.sockets()
        fd = a.detach()
        async with trio.open_nursery() as nursery:
            send = Attempt(nursery, lowlevel.send, fd, b"stray")
            nursery.start_soon(lowlevel.close, fd)
            await send.settled()
        assert isinstance(send.error, trio.ClosedResourceError) or getattr(send.error, "errno", 0) == errno.EBADF
        assert b.recv(9) == b""


async def test_closing_twice_at_once(bench: Bench) -> None:
    fd = bench.sockets()[0].detach()
    async with trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, lowlevel.close, fd) for _ in range(2)]
        for attempt in attempts:
            await attempt.settled()
    errors = sorted(type(attempt.error).__name__ for attempt in attempts)
    assert errors == ["ClosedResourceError", "NoneType"]


async def test_close_in_a_cancelled_scope_does_nothing(bench: Bench) -> None:
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        async with nothing_submitted():
            with trio.CancelScope() as scope:
                scope.cancel()
                await lowlevel.close(a.fileno())
            assert scope.cancelled_caught
        b.send(b"hello")
        assert await attempt.result() == 5


async def test_close_is_no_concern_of_other_fds(bench: Bench) -> None:
    a, b = bench.sockets()
    other = bench.sockets()[0].detach()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        waiter = await parked(nursery, trio.lowlevel.wait_readable, b)
        await lowlevel.close(other)
        lowlevel.notify_closing(-1)
        lowlevel.notify_closing(other)
        b.send(b"hello")
        a.send(b"x")
        assert await attempt.result() == 5
        await waiter.result()


async def test_close_hands_over_what_was_done(bench: Bench) -> None:
    """A partial transfer is a success, also when a close ends it."""
    a, b = bench.sockets()
    buffer = bytearray(10)
    b.send(b"hel")
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, buffer, socket.MSG_WAITALL)
        lowlevel.notify_closing(a)
        assert await attempt.result() == 3


async def test_cancel_after_close(bench: Bench) -> None:
    """Whichever reason it hears of, the task ends, and the kernel is asked once."""
    a, _ = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(1))
        lowlevel.notify_closing(a)
        attempt.scope.cancel()
        await attempt.settled()
        assert attempt.cancelled or isinstance(attempt.error, trio.ClosedResourceError)
    assert statistics().cancels_asked == 1


async def test_waiting_on_a_closed_fd(bench: Bench) -> None:
    fd = bench.sockets()[0].detach()
    await lowlevel.close(fd)
    for call in (*USES.values(), trio.lowlevel.wait_writable, lowlevel.close):
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            await call(fd)
        assert raised.value.errno == errno.EBADF


async def test_trio_sockets_close(bench: Bench) -> None:
    """trio's own objects on the ring."""
    a, b = trio.socket.socketpair()
    with b:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, a.recv, 1)
            a.close()
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        assert await b.recv(1) == b""
