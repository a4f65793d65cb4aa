"""A cancel races with what completes the operation: each round ends one way, and everything is accounted for."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, drain, fill, fork, in_kernel_worker
from trio_uring import _file_ops, lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.helpers import Bench

ROUNDS = 2000


class Partner:
    """A thread that does what it is told, as soon as it can."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while action := self._todo.get():
            try:
                self._done.put(action())
            except BaseException as exc:
                self._done.put(exc)

    def begin(self, action: Callable[[], object]) -> None:
        self._todo.put(action)

    def result(self) -> Any:
        result = self._done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()


@pytest.fixture
def partner() -> Iterator[Partner]:
    partner = Partner()
    try:
        yield partner
    finally:
        partner.close()


async def race(
    partner: Partner, i: int, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], action: Callable[[], object]
) -> tuple[Attempt[Any], Any]:
    """One round: starts the call, lets the partner act, cancels; in this order, but closer or farther apart each time.

    Returns the attempt, which has ended, and the action's result.
    """
    async with trio.open_nursery() as nursery:
        attempt: Attempt[Any] = Attempt(nursery, call, *args)
        for _ in range(i % 3):  # not started, staged, with the kernel
            await trio.lowlevel.checkpoint()
        result = None
        if i % 7 == 0:  # no race: cancelled before, in the same tick, a few ticks later
            if i % 3 == 0:
                attempt.scope.cancel()
            result = action()
            for _ in range(5 if i % 3 == 1 else 0):
                await trio.lowlevel.checkpoint()
            attempt.scope.cancel()
        else:
            partner.begin(action)
            for _ in range(i // 3 % 4):
                await trio.lowlevel.checkpoint()
            for _ in range(i // 12 % 40):
                os.sched_yield()
            attempt.scope.cancel()
        await attempt.settled()
        if i % 7:
            result = partner.result()
    if attempt.error is not None:
        raise attempt.error
    return attempt, result


class Tally(Counter[str]):
    """How many rounds ended which way."""

    def count(self, attempt: Attempt[Any]) -> bool:
        """True if it was done."""
        self["cancelled" if attempt.cancelled else "done"] += 1
        return not attempt.cancelled

    def check(self) -> None:
        assert self["cancelled"] + self["done"] == ROUNDS
        assert min(self["cancelled"], self["done"]) > ROUNDS // 500, f"no race: {self}"
        now = statistics()
        assert now.in_flight == 0
        assert now.cancels_asked == now.cancels_won + now.cancels_lost


def _is_empty(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    return False


async def test_recv(bench: Bench, partner: Partner) -> None:
    a, b = bench.sockets()
    tally = Tally()
    for i in range(ROUNDS):
        buffer, message = bytearray(9), b"%d" % i
        attempt, _ = await race(partner, i, lowlevel.recv, (a, buffer), partial(b.send, message))
        if tally.count(attempt):
            assert buffer[: attempt.value] == message
        else:
            assert a.recv(9) == message
    assert _is_empty(a)
    tally.check()


@pytest.mark.parametrize("how", ["poll", "worker", "nonblocking"])
async def test_pipe_read(bench: Bench, partner: Partner, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = bench.pipe(os.O_NONBLOCK if how == "nonblocking" else 0)
    if how == "worker":
        monkeypatch.setattr(_file_ops, "READ", in_kernel_worker(_file_ops.READ))
    tally = Tally()
    for i in range(ROUNDS):
        buffer, message = bytearray(9), b"%d" % i
        attempt, _ = await race(partner, i, lowlevel.read, (read_end, buffer), partial(os.write, write_end, message))
        if tally.count(attempt):
            assert buffer[: attempt.value] == message
        else:
            assert os.read(read_end, 9) == message
    os.set_blocking(read_end, False)
    with pytest.raises(BlockingIOError):
        os.read(read_end, 1)
    tally.check()


@pytest.mark.parametrize("flags", [0, socket.MSG_WAITALL])
async def test_send(bench: Bench, partner: Partner, flags: int) -> None:
    a, b = bench.sockets()
    for sock in (a, b):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    data = os.urandom(20_000 if flags else 100)
    tally = Tally()
    for i in range(ROUNDS):
        size = fill(lambda: a.send(bytes(1024), socket.MSG_DONTWAIT))
        attempt, _ = await race(partner, i, lowlevel.send, (a, data, flags), partial(drain, b.fileno(), size))
        if tally.count(attempt):
            assert 0 < attempt.value <= len(data)
            assert drain(b.fileno(), attempt.value) == data[: attempt.value]
        assert _is_empty(b)
    tally.check()


async def test_accept(bench: Bench, partner: Partner) -> None:
    listener = bench.new_socket(socket.AF_UNIX)
    listener.bind("")  # an abstract address of the kernel's choice
    listener.listen()
    listener.settimeout(10)

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.getsockname())
            client.send(b"hello")

    tally = Tally()
    for i in range(ROUNDS):
        attempt, _ = await race(partner, i, lowlevel.accept, (listener.fileno(),), connect)
        with socket.socket(fileno=attempt.value[0]) if tally.count(attempt) else listener.accept()[0] as accepted:
            assert accepted.recv(9) == b"hello"
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    tally.check()


async def test_connect(bench: Bench, partner: Partner) -> None:
    """The backlog is full; the partner makes room."""
    listener = bench.new_socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen(0)
    tally = Tally()
    for i in range(ROUNDS):
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as client:
            first.connect(listener.getsockname())
            attempt, (server, _) = await race(
                partner, i, lowlevel.connect, (client, listener.getsockname()), listener.accept
            )
            server.close()
            if tally.count(attempt):
                assert client.getpeername() == listener.getsockname()
                listener.accept()[0].close()
            else:
                with pytest.raises(OSError, match="not connected"):
                    client.getpeername()
    tally.check()


async def test_openat(bench: Bench, partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO: the open ends when the partner opens the other end."""
    monkeypatch.setattr(_file_ops, "OPENAT", in_kernel_worker(_file_ops.OPENAT))
    fifo = bench.fifo()
    tally = Tally()
    for i in range(ROUNDS):
        attempt, fd = await race(
            partner, i, lowlevel.openat, (fifo, os.O_RDONLY), lambda: os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        )
        os.close(fd)
        if tally.count(attempt):
            os.close(attempt.value)
    tally.check()


async def test_file_read(bench: Bench, partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's worker is the partner. A read that was cancelled has not moved the file's position."""
    monkeypatch.setattr(_file_ops, "READ", in_kernel_worker(_file_ops.READ))
    content = os.urandom(ROUNDS * 10)
    fd = bench.file(content)
    tally = Tally()
    position = 0
    for i in range(ROUNDS):
        buffer = bytearray(10)
        attempt, _ = await race(partner, i, lowlevel.read, (fd, buffer), os.sched_yield)
        if tally.count(attempt):
            assert buffer[: attempt.value] == content[position : position + attempt.value]
            position += attempt.value
        assert os.lseek(fd, 0, os.SEEK_CUR) == position
    tally.check()


async def test_a_stream_from_another_process(bench: Bench) -> None:
    """Reads are cancelled all the time; what arrives is the whole stream, in order."""
    read_end, write_end = bench.pipe()
    expected = b"".join(b"%d," % i for i in range(10_000))
    pid = fork()
    if pid == 0:
        try:
            for start in range(0, len(expected), 50):
                os.write(write_end, expected[start : start + 50])
                os.sched_yield()
        finally:
            os._exit(0)
    os.close(write_end)
    bench.closed(write_end)
    received = bytearray()
    tally = Tally()
    for i in range(len(expected) * 10):
        buffer = bytearray(50)
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, lowlevel.read, read_end, buffer)
            for _ in range(i % 4):
                await trio.lowlevel.checkpoint()
            attempt.scope.cancel()
        if tally.count(attempt):
            if not attempt.value:
                break
            received += buffer[: attempt.value]
    assert received == expected
    assert os.waitpid(pid, 0)[1] == 0


async def test_closes(partner: Partner) -> None:
    """Data arrives as the fd is closed: received, or ClosedResourceError. The number is reused at once."""
    tally = Counter[bool]()
    for i in range(ROUNDS):
        a, b = socket.socketpair()
        new, peer = socket.socketpair()
        with b, new, peer:
            fd, buffer = a.detach(), bytearray(9)

            def close(fd: int = fd, new: socket.socket = new) -> None:
                lowlevel.notify_closing(fd)
                os.dup2(new.fileno(), fd)  # closes it, too

            if i % 7:
                partner.begin(partial(b.send, b"hello"))
            else:  # no race: it is there before
                b.send(b"hello")
            async with trio.open_nursery() as nursery:
                if i % 3 == 0:
                    attempt = Attempt(nursery, lowlevel.recv, fd, buffer, once_parked=close)
                else:
                    attempt = Attempt(nursery, lowlevel.recv, fd, buffer)
                    for _ in range(2 + i // 3 % 4):
                        await trio.lowlevel.checkpoint()
                    for _ in range(i // 12 % 40):
                        os.sched_yield()
                    close()
                await attempt.settled()
            if i % 7:
                try:
                    partner.result()
                except BrokenPipeError:  # it came too late
                    pass
            peer.send(b"new")
            assert new.recv(9) == b"new"
            os.close(fd)
        received = attempt.error is None
        assert buffer == (b"hello" if received else b"") + bytes(9 - 5 * received)
        assert received or isinstance(attempt.error, trio.ClosedResourceError)
        tally[received] += 1
    assert min(tally.values()) > ROUNDS // 500, f"no race: {tally}"
