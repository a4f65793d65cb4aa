"""TCP echo, 64 connections, 64 bytes: CPU time of the server for one round trip.

The server is a process on the first core, the load comes from this one, on the second. The load generator is the
same for all servers: plain sockets and epoll, each connection with one message under way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from trio_uring import lowlevel

from ._harness import ROOT, compare, heading, pin, ring_run

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTIONS: Final = 64
MESSAGE: Final = bytes(range(64))
ROUND_TRIPS: Final = 4000


# The servers


def announce(listener: socket.socket | trio.socket.SocketType) -> None:
    print(listener.getsockname()[1], flush=True)


async def serve_stock() -> None:
    """As everybody writes it."""

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    announce(listener.socket)
    await trio.serve_listeners(echo, [listener])


async def serve_ring() -> None:
    """On raw file descriptors."""

    async def echo(fd: int) -> None:
        buffer = bytearray(65536)
        view = memoryview(buffer)
        while count := await lowlevel.recv(fd, buffer):
            await lowlevel.send(fd, view[:count], socket.MSG_WAITALL)
        await lowlevel.close(fd)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        announce(listener)
        async with trio.open_nursery() as nursery:
            while True:
                fd, _ = await lowlevel.accept(listener)
                nursery.start_soon(echo, fd)


SERVERS: Final = {
    "stock": partial(trio.run, serve_stock),
    "ring": partial(ring_run, serve_ring),
    "installed": partial(ring_run, serve_stock),
}


# The load


class Load:
    """Connections to one server, and the CPU clock of its process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        # clock_getcpuclockid(3): all threads of the process, the kernel's workers included
        self._clock = ~process.pid << 3 | 2
        self._epoll = select.epoll()
        self._sockets = {}
        for _ in range(CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLIN)

    def round(self) -> float:
        """CPU seconds of the server for one round trip."""
        sockets, poll = self._sockets, self._epoll.poll
        start = time.clock_gettime(self._clock)
        for sock in sockets.values():
            sock.sendall(MESSAGE)
        started, finished = len(sockets), 0
        while finished < ROUND_TRIPS:
            for fd, _ in poll():
                sock = sockets[fd]
                data = sock.recv(65536)
                while len(data) < len(MESSAGE):
                    data += sock.recv(65536)
                assert data == MESSAGE
                finished += 1
                if started < ROUND_TRIPS:
                    started += 1
                    sock.sendall(MESSAGE)
        return (time.clock_gettime(self._clock) - start) / ROUND_TRIPS


@contextlib.contextmanager
def server(name: str) -> Iterator[Load]:
    command = f"from benchmarks.echo import SERVERS; SERVERS[{name!r}]()"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            pin(process.pid, 0)
            assert process.stdout is not None
            yield Load(process, int(process.stdout.readline()))
        finally:
            process.kill()


def main(rounds: int) -> None:
    """The ring's server against stock trio's, and stock trio's code unchanged on the ring."""
    cores = os.sched_getaffinity(0)
    with server("stock") as stock, server("ring") as ring, server("installed") as installed:
        two_cores = pin(0, 1)
        heading(
            f"echo: CPU time of the server, {CONNECTIONS} connections"
            + ("" if two_cores else "; ONE core for server and load: these numbers mean little"),
            "trio.SocketStream in trio.run",
            "lowlevel.recv and send; or A's code in trio_uring.run",
            "us per round trip",
        )
        compare("lowlevel.recv and send", stock.round, ring.round, rounds=rounds, target=1.55)
        compare("A's code, on the ring", stock.round, installed.round, rounds=rounds)
    os.sched_setaffinity(0, cores)
