"""A server in a process of its own, on the first core; the load on it comes from this process, on the second.

What is measured is the CPU time of the server's process, kernel included, so it matters little that the load is made
in Python too: it uses plain sockets and epoll, and is the same for all servers.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import trio

from ._harness import ROOT, pin, ring_run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

HOST: Final = "127.0.0.1"
MESSAGE: Final = bytes(range(64))
NO_TIME_WAIT: Final = struct.pack("ii", 1, 0)  # for SO_LINGER


# The servers


def _run_on_uvloop(program: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import uvloop

    uvloop.run(program())


def _run_anyio_on_uvloop(program: Callable[[], Awaitable[None]]) -> None:
    anyio.run(program, backend="asyncio", backend_options={"use_uvloop": True})


RUNS: Final[dict[str, Callable[..., Any]]] = {
    "stock": trio.run,
    "ring": ring_run,
    "asyncio": _run_on_uvloop,
    "anyio": _run_anyio_on_uvloop,
}


def announce(listener: socket.socket | trio.socket.SocketType) -> None:
    """Tells the other process where the server can be reached."""
    print(listener.getsockname()[1], flush=True)


async def serve_tcp(handler: Callable[[trio.SocketStream], Awaitable[object]]) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host=HOST, backlog=4096)
    announce(listener.socket)
    await trio.serve_listeners(handler, [listener])


async def serve_echo() -> None:
    """As everybody writes it."""

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    await serve_tcp(echo)


class Server:
    """The process of a server."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self.port: Final = port

    def cpu_time(self) -> float:
        """Of all its threads, the kernel's workers for it included, in seconds."""
        return time.clock_gettime(~self._pid << 3 | 2)  # clock_getcpuclockid(3)

    def memory(self) -> int:
        """What of its memory is resident, in bytes."""
        with open(f"/proc/{self._pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def server(run: str, program: Callable[[], Awaitable[None]]) -> Iterator[Server]:
    """Has one of `RUNS` run a function of a module. Its first line of output is the port where it serves."""
    name = program.__name__
    code = f"from benchmarks._network import RUNS; from {program.__module__} import {name}; RUNS[{run!r}]({name})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            pin(process.pid, 0)
            assert process.stdout is not None
            yield Server(process.pid, int(process.stdout.readline()))
        finally:
            process.kill()


@contextlib.contextmanager
def on_second_core() -> Iterator[str]:
    """Keeps this process there; says what else there is to say in a heading."""
    cores = os.sched_getaffinity(0)
    two_cores = pin(0, 1)
    try:
        yield "" if two_cores else "; ONE core for server and load: these numbers mean little"
    finally:
        os.sched_setaffinity(0, cores)


# The load


class Load:
    """Connections to one server. On each there is one message under way, answered by as many bytes, or by ``reply``."""

    def __init__(
        self,
        server: Server,
        connections: int,
        message: bytes = MESSAGE,
        *,
        reply: int | None = None,
        kind: int = socket.SOCK_STREAM,
    ) -> None:
        self._server = server
        self._message = message
        self._reply = len(message) if reply is None else reply
        self._epoll = select.epoll()
        self._sockets = {}
        self._beside: dict[int, Callable[[], None]] = {}
        for _ in range(connections):
            sock = socket.socket(socket.AF_INET, kind)
            sock.connect((HOST, server.port))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLIN)

    def abandon(self) -> None:
        """Closes all connections, once the server has gone, and leaves none in TIME_WAIT."""
        self._epoll.close()
        for sock in self._sockets.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_TIME_WAIT)
            sock.close()

    def watch(self, sock: socket.socket, events: int, ready: Callable[[], None]) -> None:
        """What else to do, in the middle of an `exchange`, when something happens on a socket."""
        if sock.fileno() in self._beside:
            self._epoll.modify(sock, events)
        else:
            self._epoll.register(sock, events)
        self._beside[sock.fileno()] = ready

    def exchange(self, times: int) -> list[float]:
        """So many messages and answers in all, on all connections; returns how long each was under way."""
        sockets, beside, poll = self._sockets, self._beside, self._epoll.poll
        message, reply, now = self._message, self._reply, time.perf_counter
        echoed = reply == len(message)
        latencies: list[float] = []
        since, missing = {}, {}
        started = 0
        for fd, sock in sockets.items():
            if started < times:
                started += 1
                missing[fd], since[fd] = reply, now()
                sock.sendall(message)
        while len(latencies) < times:
            for fd, _ in poll():
                if fd in beside:
                    beside[fd]()
                    continue
                sock = sockets[fd]
                if echoed:
                    data = sock.recv(reply)
                    position, count = reply - missing[fd], len(data)
                    assert data == message[position : position + count]
                    if not count:
                        raise EOFError("the server has gone")
                else:
                    count = discard(sock)
                missing[fd] -= count
                if not missing[fd]:
                    latencies.append(now() - since[fd])
                    if started < times:
                        started += 1
                        missing[fd], since[fd] = reply, now()
                        sock.sendall(message)
        return latencies

    def cpu(self, times: int) -> float:
        """CPU seconds of the server for one exchange."""
        start = self._server.cpu_time()
        self.exchange(times)
        return (self._server.cpu_time() - start) / times

    def p50(self, times: int) -> float:
        """Seconds within which half of the messages are answered."""
        return statistics.median(self.exchange(times))

    def p99(self, times: int) -> float:
        """Seconds within which all but one message in a hundred are answered."""
        return statistics.quantiles(self.exchange(times), n=100)[-1]


_FORGOTTEN: Final = bytearray(1 << 20)


def discard(sock: socket.socket) -> int:
    """Receives without copying: MSG_TRUNC has TCP drop what there is."""
    count = sock.recv_into(_FORGOTTEN, 0, socket.MSG_TRUNC)
    if not count:
        raise EOFError("the server has gone")
    return count


class Visitors:
    """Clients that connect, send a byte, receive it back, and wait until the server closes; so many at a time."""

    def __init__(self, server: Server, at_a_time: int) -> None:
        self._server = server
        self._at_a_time = at_a_time
        self._epoll = select.epoll()

    def _arrive(self) -> socket.socket:
        visitor = socket.create_connection((HOST, self._server.port))
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_TIME_WAIT)
        visitor.sendall(b"x")
        self._epoll.register(visitor, select.EPOLLIN)
        return visitor

    def cpu(self, times: int) -> float:
        """CPU seconds of the server for one visit."""
        start = self._server.cpu_time()
        present = {}
        left = times
        for _ in range(min(times, self._at_a_time)):
            visitor = self._arrive()
            present[visitor.fileno()] = visitor
        started = len(present)
        while left:
            for fd, _ in self._epoll.poll():
                visitor = present[fd]
                if data := visitor.recv(2):
                    assert data == b"x"
                    continue
                del present[fd]
                visitor.close()
                left -= 1
                if started < times:
                    started += 1
                    visitor = self._arrive()
                    present[visitor.fileno()] = visitor
        return (self._server.cpu_time() - start) / times
