"""TCP echo on raw file descriptors, 64 connections, 64 bytes: CPU time of the server for one round trip."""

from __future__ import annotations

import socket
from functools import partial
from typing import Final

import trio

from trio_uring import lowlevel

from ._harness import compare, heading
from ._network import HOST, Load, announce, on_second_core, serve_echo, server

CONNECTIONS: Final = 64
ROUND_TRIPS: Final = 4000


async def serve_raw_echo() -> None:
    """On raw file descriptors."""

    async def echo(fd: int) -> None:
        buffer = bytearray(65536)
        view = memoryview(buffer)
        while count := await lowlevel.recv(fd, buffer):
            await lowlevel.send(fd, view[:count], socket.MSG_WAITALL)
        await lowlevel.close(fd)

    with socket.create_server((HOST, 0)) as listener:
        announce(listener)
        async with trio.open_nursery() as nursery:
            while True:
                fd, _ = await lowlevel.accept(listener)
                nursery.start_soon(echo, fd)


def main(rounds: int) -> None:
    """The ring's server against stock trio's."""
    with on_second_core() as remark, server("stock", serve_echo) as stock, server("ring", serve_raw_echo) as ring:
        heading(
            f"echo: CPU time of the server, {CONNECTIONS} connections{remark}",
            "trio.SocketStream in trio.run",
            "lowlevel.recv and send",
            "us per round trip",
        )
        compare(
            "lowlevel.recv and send",
            partial(Load(stock, CONNECTIONS).cpu, ROUND_TRIPS),
            partial(Load(ring, CONNECTIONS).cpu, ROUND_TRIPS),
            rounds=rounds,
            target=1.55,
        )
