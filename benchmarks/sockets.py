"""Sockets of unchanged trio code, in `trio.run` and in `trio_uring.run`: CPU time of the server, and latency."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import anyio
import trio

from ._harness import ROOT, compare, heading, pin
from ._network import (
    HOST,
    MESSAGE,
    RUNS,
    Load,
    Server,
    Visitors,
    announce,
    on_second_core,
    serve_echo,
    serve_tcp,
    server,
)
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .syscalls import Mark

CONNECTIONS: Final = 64
ROUND_TRIPS: Final = 2000
BLOCK: Final = bytes(65536)
BLOCKS: Final = 32


# The servers


async def serve_asyncio_echo() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    listener = await asyncio.start_server(echo, HOST, 0)
    announce(listener.sockets[0])
    await listener.serve_forever()


async def serve_anyio_echo() -> None:
    async def echo(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    listener = await anyio.create_tcp_listener(local_host=HOST)
    print(listener.extra(anyio.abc.SocketAttribute.local_port), flush=True)
    await listener.serve(echo)


async def serve_visitors() -> None:
    async def one_byte(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())

    await serve_tcp(one_byte)


async def serve_datagrams() -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((HOST, 0))
        announce(sock)
        while True:
            data, address = await sock.recvfrom(65536)
            await sock.sendto(data, address)


async def serve_bulk() -> None:
    async def send(stream: trio.SocketStream) -> None:
        async for _ in stream:
            for _ in range(BLOCKS):
                await stream.send_all(BLOCK)

    await serve_tcp(send)


# System calls


def press(port: int) -> None:
    """Exchanges messages until the server goes."""
    with contextlib.suppress(ConnectionError, EOFError):
        Load(Server(0, port), CONNECTIONS).exchange(sys.maxsize)


def calls_per_round_trip(run: str) -> float | None:
    """System calls of the server; that they are counted slows it down, but not the load."""
    warm_up, times = 1000, 5000

    async def serve(listener: socket.socket, mark: Mark) -> None:
        answered = itertools.count(1)

        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)
                done = next(answered)
                if done in (warm_up, warm_up + times):
                    mark()
                    if done > warm_up:
                        nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            await trio.serve_listeners(echo, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])

    def work(listener: socket.socket, mark: Mark) -> None:
        pin(0, 0)
        RUNS[run](serve, listener, mark)

    with socket.create_server((HOST, 0), backlog=CONNECTIONS) as listener:
        code = f"from benchmarks.sockets import press; press({listener.getsockname()[1]})"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
            try:
                calls = count(partial(work, listener))
            finally:
                process.kill()
    return None if calls is None else calls / times


# The comparisons


class Case(NamedTuple):
    """An echo server under load.

    Attributes:
        name: what it is.
        connections: how many.
        message: what is sent to and fro.
        target: how much less CPU time the ring should take.
        other: what to compare with: a run, and what it runs.
        needs: a package without which this is left out.
    """

    name: str
    target: float
    connections: int = CONNECTIONS
    message: bytes = MESSAGE
    other: tuple[str, Callable[[], Awaitable[None]]] = ("stock", serve_echo)
    needs: str = "trio"


ECHO: Final = (
    Case("64 connections", 1.5),
    Case("512 connections", 1.6, connections=512),
    Case("4 KiB, 64", 1.5, message=MESSAGE * 64),
    Case("A: asyncio on uvloop, 64", 1.0, other=("asyncio", serve_asyncio_echo), needs="uvloop"),
    Case("A: anyio on uvloop, 64", 1.3, other=("anyio", serve_anyio_echo), needs="uvloop"),
)


def compare_echo(case: Case, rounds: int, calls: tuple[float | None, float | None] | None) -> None:
    if importlib.util.find_spec(case.needs) is None:
        print(f"{case.name}: not measured: pip install {case.needs}")
        return
    with server(*case.other) as a, server("ring", serve_echo) as b:
        compare(
            case.name,
            partial(Load(a, case.connections, case.message).cpu, ROUND_TRIPS),
            partial(Load(b, case.connections, case.message).cpu, ROUND_TRIPS),
            rounds=rounds,
            target=case.target,
            calls=calls,
            calls_target=0.2,
        )


def main(rounds: int) -> None:
    """Each server as it stands, once in each run."""
    with on_second_core() as remark:
        calls = calls_per_round_trip("stock"), calls_per_round_trip("ring")
        stock = "in trio.run"
        ring = "the same in trio_uring.run"
        heading(
            f"sockets: echo through trio.SocketStream, 64 bytes, CPU time of the server{remark}",
            f"{stock}, or as said",
            ring,
            "us per round trip",
        )
        for case in ECHO:
            compare_echo(case, rounds, calls if case is ECHO[0] else None)

        with server("stock", serve_echo) as a, server("ring", serve_echo) as b:
            one_a, one_b = Load(a, 1), Load(b, 1)
            compare("1, CPU", partial(one_a.cpu, 1000), partial(one_b.cpu, 1000), rounds=rounds, target=1 / 0.85)
            compare("1, median latency", partial(one_a.p50, 1000), partial(one_b.p50, 1000), rounds=rounds, target=1.0)

        heading(f"CPU time of other servers{remark}", stock, ring, "us per ...")
        with server("stock", serve_visitors) as a, server("ring", serve_visitors) as b:
            compare(
                "accept, 1 byte, close",
                partial(Visitors(a, 32).cpu, 500),
                partial(Visitors(b, 32).cpu, 500),
                rounds=rounds,
                target=1.3,
            )
        with server("stock", serve_datagrams) as a, server("ring", serve_datagrams) as b:
            compare(
                "UDP echo",
                partial(Load(a, CONNECTIONS, kind=socket.SOCK_DGRAM).cpu, ROUND_TRIPS),
                partial(Load(b, CONNECTIONS, kind=socket.SOCK_DGRAM).cpu, ROUND_TRIPS),
                rounds=rounds,
                target=2.0,
            )
        with server("stock", serve_bulk) as a, server("ring", serve_bulk) as b:
            size = len(BLOCK) * BLOCKS
            compare(
                f"{size >> 20} MiB of 64 KiB sends",
                partial(Load(a, 16, b"x", reply=size).cpu, 64),
                partial(Load(b, 16, b"x", reply=size).cpu, 64),
                rounds=rounds,
                target=1.3,
            )
