"""trio's streams over fds, in runs that have a ring: unchanged programs write to them by completion."""

from __future__ import annotations

import errno
import os
import pty
import socket
import subprocess
import sys
import tty
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing
from trio.lowlevel import FdStream

import trio_uring
from tests.helpers import REQUIRED, Attempt, installed, manager, parked
from trio_uring import RingConfig, statistics

if TYPE_CHECKING:
    from tests.helpers import Bench

STOCK_SEND_ALL = FdStream.send_all
LARGE = bytes(200_000)  # more than fits


async def pipe() -> tuple[FdStream, FdStream]:
    """Where to send, and where it comes out."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    return FdStream(write_end), FdStream(read_end)


async def clogged_pipe() -> tuple[FdStream, FdStream]:
    sender, receiver = await pipe()
    fill_up(sender)
    return sender, receiver


def fill_up(stream: FdStream) -> int:
    size = 0
    while True:
        try:
            size += os.write(stream.fileno(), bytes(4096))
        except BlockingIOError:
            return size


async def read_all(receiver: FdStream) -> None:
    async for _ in receiver:
        pass


async def both_ways(maker: Any = pipe) -> tuple[trio.StapledStream[Any, Any], trio.StapledStream[Any, Any]]:
    there, back = await maker(), await maker()
    return trio.StapledStream(there[0], back[1]), trio.StapledStream(back[0], there[1])


async def socket_pair() -> tuple[FdStream, FdStream]:
    a, b = socket.socketpair()
    return FdStream(a.detach()), FdStream(b.detach())


async def clogged_socket_pair() -> tuple[FdStream, FdStream]:
    a, b = await socket_pair()
    fill_up(a)
    fill_up(b)
    return a, b


# What trio says of streams


@pytest.mark.seconds(60)
async def test_one_way() -> None:
    await trio.testing.check_one_way_stream(pipe, clogged_pipe)


@pytest.mark.seconds(60)
async def test_two_way() -> None:
    await trio.testing.check_two_way_stream(socket_pair, clogged_socket_pair)


@pytest.mark.seconds(60)
async def test_half_closeable() -> None:
    await trio.testing.check_half_closeable_stream(both_ways, None)


# Who comes here


async def test_a_write_that_fits_is_done_at_once() -> None:
    sender, receiver = await pipe()
    async with sender, receiver:
        await trio.testing.wait_all_tasks_blocked()
        before = statistics().sqes
        await sender.send_all(b"fits")
        assert await receiver.receive_some() == b"fits"
        assert statistics().sqes == before


@pytest.mark.native("beside trio's own manager the stream is trio's")
async def test_a_write_that_waits_is_on_the_ring() -> None:
    sender, receiver = await pipe()
    async with sender, receiver, trio.open_nursery() as nursery:
        attempt = await parked(nursery, sender.send_all, LARGE)
        assert [op.operation for op in statistics().operations if op.fd == sender.fileno()] == ["write"]
        assert statistics().in_flight == 0, "it counts against max_in_flight"
        nursery.start_soon(read_all, receiver)
        await attempt.result()
        sender.close()


@pytest.mark.native("beside trio's own manager the stream is trio's")
async def test_idle_streams_hold_no_memory_and_no_slot() -> None:
    streams = [await pipe() for _ in range(50)]
    async with trio.open_nursery() as nursery:
        for _, receiver in streams:
            nursery.start_soon(receiver.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        waiting = statistics()
        assert (waiting.tasks_waiting_read, waiting.in_flight) == (51, 0)  # one is trio's own
        nursery.cancel_scope.cancel()
    for sender, receiver in streams:
        sender.close()
        receiver.close()


def test_the_door_is_open_while_somebody_wants_rings() -> None:
    assert FdStream.send_all is STOCK_SEND_ALL

    async def main(expected: bool) -> None:
        assert (FdStream.send_all is not STOCK_SEND_ALL) is expected
        sender, receiver = await clogged_pipe()
        async with sender, receiver, trio.open_nursery() as nursery:
            nursery.start_soon(sender.send_all, b"end")
            received = b""
            while not received.endswith(b"end"):
                received += await receiver.receive_some()

    trio_uring.run(main, True, config=REQUIRED)
    trio.run(main, False)
    with installed():
        trio.run(main, True)
        assert FdStream.send_all is not STOCK_SEND_ALL
    with installed(RingConfig(mode="off")):
        trio.run(main, True)
    assert FdStream.send_all is STOCK_SEND_ALL


def test_what_somebody_has_patched_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed():
        ours = FdStream.send_all
        monkeypatch.setattr(FdStream, "send_all", partial(ours))
        patched = FdStream.send_all
    assert FdStream.send_all is patched
    monkeypatch.setattr(FdStream, "send_all", STOCK_SEND_ALL)


# Kinds of files


@pytest.mark.parametrize("make", [pipe, socket_pair])
async def test_a_large_send(make: Any) -> None:
    data = os.urandom(1 << 20)
    sender, receiver = await make()
    async with receiver, trio.open_nursery() as nursery:

        async def send() -> None:
            async with sender:
                await sender.send_all(memoryview(data))

        nursery.start_soon(send)
        assert b"".join([chunk async for chunk in receiver]) == data


async def test_a_terminal() -> None:
    outer_fd, inner_fd = pty.openpty()
    tty.setraw(inner_fd)
    outer, inner = FdStream(outer_fd), FdStream(inner_fd)
    data = bytes(range(256)) * 400
    async with outer, inner, trio.open_nursery() as nursery:
        nursery.start_soon(inner.send_all, data)
        received = b""
        while len(received) < len(data):
            received += await outer.receive_some()
        assert received == data


async def test_a_fifo(bench: Bench) -> None:
    path = bench.fifo()
    receiver = FdStream(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    assert await receiver.receive_some() == b""
    sender = FdStream(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    async with sender, receiver:
        await sender.send_all(b"x")
        assert await receiver.receive_some() == b"x"


async def test_an_empty_send_is_no_message() -> None:
    a, b = socket.socketpair(type=socket.SOCK_SEQPACKET)
    sender, receiver = FdStream(a.detach()), FdStream(b.detach())
    async with sender, receiver:
        await sender.send_all(b"")
        await sender.send_all(b"x")
        assert await receiver.receive_some() == b"x"


async def test_the_blocking_mode_is_put_back() -> None:
    read_end, write_end = os.pipe()
    copy = os.dup(write_end)
    sender, receiver = FdStream(write_end), FdStream(read_end)
    async with receiver:
        async with sender:
            fill_up(sender)
            with trio.move_on_after(0):
                await sender.send_all(b"x")
            assert not os.get_blocking(copy)
        assert os.get_blocking(copy)
        os.close(copy)


@pytest.mark.native("beside trio's own manager the stream is trio's")
async def test_another_has_made_it_blocking() -> None:
    """The mode is of the open file, which a child may share. What waits on the ring keeps no other task waiting."""
    sender, receiver = await pipe()
    async with sender, receiver, trio.open_nursery() as nursery:
        attempt = await parked(nursery, sender.send_all, LARGE)
        os.set_blocking(sender.fileno(), True)
        nursery.start_soon(read_all, receiver)
        await attempt.result()
        sender.close()


# How it ends


async def test_the_wrong_end() -> None:
    sender, receiver = await pipe()
    async with sender, receiver:
        with pytest.raises(trio.ClosedResourceError):
            await receiver.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await sender.receive_some()


@pytest.mark.parametrize(("make", "data"), [(pipe, b"x"), (clogged_pipe, b"x"), (pipe, LARGE)])
async def test_nobody_reads(make: Any, data: bytes) -> None:
    waits = make is clogged_pipe or data == LARGE
    sender, receiver = await make()
    async with sender:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, sender.send_all, data) if waits else None
            receiver.close()
            with pytest.raises(trio.BrokenResourceError) as caught:
                await (sender.send_all(b"x") if attempt is None else attempt.result())
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == errno.EPIPE


@pytest.mark.parametrize(("make", "data"), [(clogged_pipe, b"x"), (pipe, LARGE)])
async def test_closing_wakes_who_sends(make: Any, data: bytes) -> None:
    sender, receiver = await make()
    async with receiver, trio.open_nursery() as nursery:
        attempt = await parked(nursery, sender.send_all, data)
        with pytest.raises(trio.BusyResourceError):
            await sender.send_all(b"y")
        with pytest.raises(trio.BusyResourceError):
            await sender.wait_send_all_might_not_block()
        sender.close()
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()


async def test_closing_in_a_partial_write_spares_the_next_of_that_number() -> None:
    """The kernel has written a part when the fd is closed and its number given to another pipe."""
    sender, receiver = await pipe()
    number = sender.fileno()
    async with receiver, trio.open_nursery() as nursery:
        attempt = await parked(nursery, sender.send_all, LARGE)
        await receiver.receive_some()
        sender.close()
        read_end, write_end = os.pipe()
        others = {read_end, write_end}
        if number not in others:
            others.add(os.dup2(write_end, number))
        os.set_blocking(read_end, False)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
        for fd in others:
            os.close(fd)


@pytest.mark.native("beside trio's own manager the stream is trio's")
async def test_nor_does_what_is_left_go_there() -> None:
    """The same, but that the task has yet to hear of the part that is written."""
    sender, receiver = await pipe()
    number = sender.fileno()
    read_end, write_end = os.pipe2(os.O_NONBLOCK)

    def replace() -> None:
        os.read(receiver.fileno(), 1 << 16)
        manager().ring.flush()  # writes a second part
        sender.close()
        os.dup2(write_end, number)

    async with receiver, trio.open_nursery() as nursery:
        attempt = Attempt(nursery, sender.send_all, LARGE, once_parked=replace)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
        for fd in (read_end, write_end, number):
            os.close(fd)


async def test_a_cancelled_send_has_sent_a_beginning() -> None:
    data = bytes(range(251)) * 2000
    sender, receiver = await pipe()
    async with receiver:
        async with sender, trio.open_nursery() as nursery:
            attempt: Attempt[None] = await parked(nursery, sender.send_all, data)
            begun = await receiver.receive_some(1000)
            assert await attempt.cancel()
        received = begun + b"".join([chunk async for chunk in receiver])
    assert 0 < len(received) < len(data)
    assert data.startswith(received)


async def test_a_bytearray_is_of_one_size_meanwhile() -> None:
    data = bytearray(200_000)
    sender, receiver = await pipe()
    async with sender, receiver, trio.open_nursery() as nursery:
        attempt = await parked(nursery, sender.send_all, data)
        with pytest.raises(BufferError):
            data.append(1)
        assert await attempt.cancel()
        data.append(1)


async def test_a_cancelled_call_sends_nothing() -> None:
    sender, receiver = await pipe()
    async with sender, receiver:
        with trio.move_on_after(0) as scope:
            await sender.send_all(b"x")
        assert scope.cancelled_caught
        with pytest.raises(BlockingIOError):
            os.read(receiver.fileno(), 1)


# Child processes

_BACK = [sys.executable, "-c", "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"]
_DEAF = [sys.executable, "-c", "import os, signal; os.close(0); os.write(1, b'.'); signal.pause()"]


async def test_trio_run_process() -> None:
    data = os.urandom(1 << 20)
    done = await trio.run_process(_BACK, stdin=data, capture_stdout=True)
    assert done.stdout == data


async def test_anyio_run_process() -> None:
    data = os.urandom(1 << 20)
    done = await anyio.run_process(_BACK, input=data)
    assert done.stdout == data


async def test_anyio_open_process() -> None:
    async with await anyio.open_process(_BACK) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"there")
        await process.stdin.aclose()
        assert b"".join([chunk async for chunk in process.stdout]) == b"there"


async def test_a_child_that_has_closed_its_stdin() -> None:
    process = await trio.lowlevel.open_process(_DEAF, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert isinstance(process.stdin, FdStream)
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        assert await process.stdout.receive_some() == b"."
        with pytest.raises(trio.BrokenResourceError):
            await process.stdin.send_all(b"x")
        process.kill()
        await process.wait()
