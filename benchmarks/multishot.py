"""One submission, many results; buffers the kernel knows; sends without a copy. Each against the ordinary operation.

What is to be received is there before the clock starts: only the receiving is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import trio
import trio.testing

from trio_uring import lowlevel

from ._harness import compare, heading, ring_run
from .reads import BLOCK, BLOCKS, cached_file, check, offsets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONNECTIONS: Final = 64
BUFFERS: Final = 256
BURSTS: Final = 20
SENDS: Final = 30
TRANSFERS: Final = 2000

Pair = tuple[socket.socket, socket.socket]


class Receiver(Protocol):
    """Receives from a socket until it is cancelled, and tells how much."""

    async def __call__(self, sock: socket.socket, pool: lowlevel.BufferPool, got: Callable[[int], None]) -> None: ...


async def one_shot(sock: socket.socket, pool: lowlevel.BufferPool, got: Callable[[int], None]) -> None:
    fd, buffer = sock.fileno(), bytearray(pool.size)
    while True:
        got(await lowlevel.recv(fd, buffer))


async def copies(sock: socket.socket, pool: lowlevel.BufferPool, got: Callable[[int], None]) -> None:
    async with lowlevel.recv_multishot(sock, pool) as chunks:
        async for data in chunks:
            got(len(data))


async def views(sock: socket.socket, pool: lowlevel.BufferPool, got: Callable[[int], None]) -> None:
    async with lowlevel.recv_multishot(sock, pool) as chunks:
        async for view in chunks.views():
            with view as memory:
                got(len(memory))


class Countdown:
    """Ends when so much is done."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._done = trio.Event()
        self.wait = self._done.wait

    def count(self, n: int) -> None:
        self._left -= n
        if self._left <= 0:
            assert self._left == 0
            self._done.set()


async def time_receiver(receiver: Receiver, pairs: Sequence[Pair], size: int, messages: int) -> float:
    """Seconds for one message. Each burst is so many messages on each connection."""
    message, elapsed = bytes(size), 0.0
    countdown = Countdown(0)

    def got(n: int) -> None:
        countdown.count(n)

    with lowlevel.BufferPool(BUFFERS, size) as pool:
        async with trio.open_nursery() as nursery:
            for _, sock in pairs:
                nursery.start_soon(receiver, sock, pool, got)
            await trio.testing.wait_all_tasks_blocked()
            for burst in range(BURSTS + 2):
                countdown = Countdown(len(pairs) * messages * size)
                for (sock, _), _ in itertools.product(pairs, range(messages)):
                    sock.sendall(message)
                start = time.perf_counter()
                await countdown.wait()
                if burst >= 2:
                    elapsed += time.perf_counter() - start
            nursery.cancel_scope.cancel()
    return elapsed / (BURSTS * len(pairs) * messages)


@contextlib.contextmanager
def connected(n: int) -> Iterator[list[Pair]]:
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = []
        for _ in range(n):
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((client, stack.enter_context(listener.accept()[0])))
        yield pairs


async def accept_each(listener: socket.socket, got: Callable[[int], None]) -> None:
    while True:
        got((await lowlevel.accept(listener))[0])


async def accept_many(listener: socket.socket, got: Callable[[int], None]) -> None:
    async with lowlevel.accept_multishot(listener, limit=2 * CONNECTIONS) as connections:
        async for fd in connections:
            got(fd)


async def time_accept(multishot: bool, listener: socket.socket) -> float:
    """Seconds for one connection of a burst of them."""
    elapsed, fds = 0.0, []
    countdown = Countdown(0)

    def got(fd: int) -> None:
        fds.append(fd)
        countdown.count(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_many if multishot else accept_each, listener, got)
        await trio.testing.wait_all_tasks_blocked()
        for burst in range(BURSTS + 2):
            countdown = Countdown(CONNECTIONS)
            clients = [socket.create_connection(listener.getsockname()) for _ in range(CONNECTIONS)]
            start = time.perf_counter()
            await countdown.wait()
            if burst >= 2:
                elapsed += time.perf_counter() - start
            for client in clients:
                client.close()
            for fd in fds:
                os.close(fd)
            fds.clear()
        nursery.cancel_scope.cancel()
    return elapsed / (BURSTS * CONNECTIONS)


async def time_reads(fd: int, size: int, registered: bool) -> float:
    where = (offset % (BLOCK * BLOCKS - size + BLOCK) for offset in offsets())
    data = bytearray(size)
    offset = 0
    if registered:
        with lowlevel.RegisteredBuffer(data) as buffer:
            start = time.perf_counter()
            for offset in itertools.islice(where, TRANSFERS):
                await lowlevel.read_fixed(fd, buffer, offset)
            elapsed = time.perf_counter() - start
    else:
        start = time.perf_counter()
        for offset in itertools.islice(where, TRANSFERS):
            await lowlevel.read(fd, data, offset)
        elapsed = time.perf_counter() - start
    check(data[:BLOCK], offset)
    return elapsed / TRANSFERS


async def time_sends(sock: socket.socket, data: bytes, zero_copy: bool) -> float:
    """Seconds until a send has returned and its buffer may be used again."""
    send = lowlevel.send_zc if zero_copy else lowlevel.send
    start = time.perf_counter()
    for _ in range(SENDS):
        assert await send(sock, data, socket.MSG_WAITALL) == len(data)
    return (time.perf_counter() - start) / SENDS


@contextlib.contextmanager
def sink() -> Iterator[socket.socket]:
    """A TCP socket with a process at its other end that reads and forgets."""
    code = "import os; buffer = bytearray(1 << 20)\nwhile os.readv(0, [buffer]): pass"
    with connected(1) as [(sock, peer)], subprocess.Popen([sys.executable, "-c", code], stdin=peer.fileno()) as process:
        try:
            sock.sendall(b"x")
            yield sock
        finally:
            sock.shutdown(socket.SHUT_WR)
            process.wait()


def main(rounds: int) -> None:
    """All of it is for the record: no targets."""
    heading(
        f"receiving what is there: a burst on one connection, one message on each of {CONNECTIONS}",
        "lowlevel.recv",
        "lowlevel.recv_multishot, as bytes; as views",
        "us per message",
    )
    for size, burst in ((64, 200), (4096, 16)):
        for connections, messages in ((1, burst), (CONNECTIONS, 1)):
            with connected(connections) as pairs:
                for name, receiver in (("bytes", copies), ("views", views)):
                    compare(
                        f"{size} bytes, {connections}, {name}",
                        partial(ring_run, time_receiver, one_shot, pairs, size, messages),
                        partial(ring_run, time_receiver, receiver, pairs, size, messages),
                        rounds=rounds,
                    )
    heading(
        f"accepting bursts of {CONNECTIONS} connections",
        "lowlevel.accept",
        "lowlevel.accept_multishot",
        "us per connection",
    )
    with socket.create_server(("127.0.0.1", 0), backlog=2 * CONNECTIONS) as listener:
        compare(
            "accept",
            partial(ring_run, time_accept, False, listener),
            partial(ring_run, time_accept, True, listener),
            rounds=rounds,
        )
    heading("reads from the page cache, one task", "lowlevel.read", "lowlevel.read_fixed: a registered buffer")
    fd = cached_file()
    for size in (BLOCK, 16 * BLOCK, 256 * BLOCK):
        compare(
            f"{size >> 10} KiB",
            partial(ring_run, time_reads, fd, size, False),
            partial(ring_run, time_reads, fd, size, True),
            rounds=rounds,
        )
    os.close(fd)
    heading(
        "sends over loopback, where the kernel copies in any case, one at a time",
        "lowlevel.send",
        "lowlevel.send_zc, until the buffer is free",
        "us per send",
    )
    with sink() as sock:
        for size in (64 << 10, 256 << 10, 1 << 20):
            compare(
                f"{size >> 10} KiB",
                partial(ring_run, time_sends, sock, bytes(size), False),
                partial(ring_run, time_sends, sock, bytes(size), True),
                rounds=rounds,
            )
