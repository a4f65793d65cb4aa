"""Peers against cancels, pauses and closes of multishot operations: bytes and connections are accounted for."""

from __future__ import annotations

import os
import random
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from tests.helpers import Bench

ROUNDS = 1000


def rest_of(sock: socket.socket) -> bytes:
    """What is left in it."""
    data = b""
    while True:
        try:
            data += sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return data


@pytest.mark.ring(cq_entries=256)
@pytest.mark.parametrize("size", [3, 64])
async def test_received_or_left_in_the_socket(bench: Bench, size: int) -> None:
    """The receive ends while the peer sends: by a cancel before or after its data, or by leaving."""
    a, b = bench.sockets(socket.AF_INET)
    chance = random.Random(size)
    stream = bytes(n % 251 for n in range(1 << 16))
    sent = bytearray()
    received = bytearray()
    ends = [0, 0]
    with lowlevel.BufferPool(2, size) as pool:
        for _ in range(ROUNDS):
            with trio.CancelScope() as scope:
                async with lowlevel.recv_multishot(a, pool, limit=1 + chance.randrange(4)) as chunks:
                    for _ in range(1 + chance.randrange(3)):
                        piece = stream[len(sent) % 251 :][: 1 + chance.randrange(3 * size)]
                        b.send(piece)
                        sent += piece
                        if chance.randrange(3) == 0:
                            scope.cancel()
                        received += await chunks.__anext__()
            ends[scope.cancelled_caught] += 1
            received += b"".join(chunks.leftover)
            received += rest_of(a)
            assert received == sent
            assert pool.available == 2
    assert all(ends)
    assert statistics().in_flight == 0


@pytest.mark.parametrize("close", [False, True])
async def test_every_connection_is_accepted_closed_or_left_in_the_backlog(bench: Bench, close: bool) -> None:
    """Clients connect from another thread while the accept ends."""
    listener = bench.listener(backlog=128)
    chance = random.Random(close)
    address = listener.getsockname()
    accepted = 0

    def connect(n: int) -> list[socket.socket]:
        return [socket.create_connection(address) for _ in range(n)]

    for _ in range(ROUNDS // 10):
        n = 1 + chance.randrange(8)
        clients: list[socket.socket] = []

        async def connecting() -> None:
            clients.extend(await trio.to_thread.run_sync(connect, n))  # noqa: B023

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connecting)
            async with lowlevel.accept_multishot(listener, limit=1 + chance.randrange(4)) as connections:
                for _ in range(chance.randrange(n + 1)):
                    os.close(await connections.__anext__())
                    accepted += 1
                if close:
                    lowlevel.notify_closing(listener)
        listener.setblocking(False)
        left = 0
        while True:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
            left += 1
        for client in clients:
            client.settimeout(10)
            try:
                assert client.recv(1) == b""  # somebody has closed the other end
            except ConnectionResetError:
                pass
            client.close()
        assert left <= n
    assert accepted
    assert statistics().in_flight == 0


async def test_a_reused_number_receives_nothing_of_the_former_file(bench: Bench) -> None:
    for n in range(ROUNDS // 2):
        a, b = socket.socketpair()
        other, feed = socket.socketpair()
        async with lowlevel.recv_multishot(a) as chunks:
            b.send(b"x")
            assert await chunks.__anext__() == b"x"
            lowlevel.notify_closing(a)
            os.dup2(other.fileno(), a.fileno())
            feed.send(b"secret")
            if n % 2:
                await trio.lowlevel.checkpoint()
            with pytest.raises(trio.ClosedResourceError):
                await chunks.__anext__()
        assert chunks.leftover == []
        assert other.recv(9) == b"secret"
        for sock in (a, b, other, feed):
            sock.close()


async def test_pools_are_shared_by_many(bench: Bench) -> None:
    """Fifty connections, four buffers: everybody gets everything."""
    pairs = [bench.sockets() for _ in range(50)]
    data = os.urandom(3000)

    async def send(sock: socket.socket) -> None:
        sent = 0
        while sent < len(data):
            sent += await lowlevel.send(sock, memoryview(data)[sent : sent + 100])
        sock.shutdown(socket.SHUT_WR)

    async def receive(sock: socket.socket, pool: Any) -> None:
        received = bytearray()
        async with lowlevel.recv_multishot(sock, pool, limit=8) as chunks:
            async for chunk in chunks:
                received += chunk
        assert received == data

    with lowlevel.BufferPool(4, 64, incremental=True) as pool:
        async with trio.open_nursery() as nursery:
            for a, b in pairs:
                nursery.start_soon(receive, a, pool)
                nursery.start_soon(send, b)
        assert pool.available == 4
