"""Sockets against cancels and peers, thousands of times: bytes and connections are accounted for."""

from __future__ import annotations

import os
import random
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, manager, spin_until
from trio_uring import statistics

if TYPE_CHECKING:
    from tests.helpers import World

RACES = 10_000
STREAM = bytes(n % 251 for n in range(1 << 16))


@pytest.mark.seconds(60)
@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ["receive_some", "recv"])
async def test_a_cancelled_receive_loses_no_byte(world: World, name: str) -> None:
    """The peer sends before the receive is submitted, while the kernel has it, and around the cancel."""
    a, b = await world.pair("pair stream")
    receive: Any = trio.SocketStream(a).receive_some if name == "receive_some" else lambda: a.recv(65536)
    chance = random.Random(name)
    sent = got = 0
    ends = [0, 0]

    def send() -> None:
        nonlocal sent
        start = sent % 251
        sent += b._sock.send(STREAM[start : start + 1 + chance.randrange(40)])

    def interfere() -> None:
        """The receive is staged."""
        how = chance.randrange(8)
        if how & 1:
            send()
        if how & 2:
            manager().ring.flush()
        if how & 4:
            attempt.scope.cancel()
        if not how & 1:
            send()
        if not how & 4:
            if how == 3:
                spin_until(manager().ring.pending)
            attempt.scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(RACES):
            attempt = Attempt(nursery, receive, once_parked=interfere)
            await attempt.settled()
            ends[attempt.cancelled] += 1
            data = b"" if attempt.cancelled else await attempt.result()
            while got + len(data) < sent:
                data += await receive()
            assert data == STREAM[got % 251 :][: len(data)]
            got += len(data)
            assert got == sent
    assert min(ends) > RACES // 20
    await trio.testing.wait_all_tasks_blocked()
    buffers = manager()._stream_buffers
    assert buffers is not None
    assert buffers.out == 0
    assert statistics().in_flight == 0


@pytest.mark.seconds(60)
async def test_what_a_cancelled_send_all_has_sent_is_a_prefix(world: World) -> None:
    """No gap, nothing twice, and what a later one sends comes behind it."""
    a, b = await world.pair("tcp")
    chance = random.Random(1)
    stream = trio.SocketStream(a)
    ends = [0, 0]
    for number in range(400):
        data = bytes([number % 251]) + os.urandom(16) * (1 + chance.randrange(50_000))
        wanted = chance.randrange(len(data))
        got = bytearray()
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, stream.send_all, data if number % 2 else bytearray(data))
            while len(got) < wanted and not attempt.done:
                await trio.lowlevel.checkpoint()
                got += b._sock.recv(1 + chance.randrange(1 << 18)) if b.is_readable() else b""
            attempt.scope.cancel()
            await attempt.settled()
        assert attempt.error is None
        ends[attempt.cancelled] += 1
        end = b"the end, " * 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, end)  # what was sent before may have left no room
            while not got.endswith(end):
                got += await b.recv(1 << 20)
        body = got[: -len(end)]
        assert data.startswith(body)
        assert attempt.cancelled or body == data
    assert all(ends)


@pytest.mark.seconds(60)
async def test_an_accept_leaks_and_drops_nothing(world: World) -> None:
    """Every client is accepted once, by the accept that is cancelled or the next."""
    listener = await world.listener(socket.AF_UNIX, abstract=True)
    address = listener.getsockname()
    chance = random.Random(2)
    before = len(os.listdir("/proc/self/fd"))
    ends = [0, 0]

    def interfere() -> None:
        how = chance.randrange(8)
        if how & 1:
            client.connect(address)
        if how & 2:
            manager().ring.flush()
        if how & 4:
            attempt.scope.cancel()
        if not how & 1:
            client.connect(address)
        if how & 6:
            attempt.scope.cancel()

    async with trio.open_nursery() as nursery:
        for number in range(3000):
            with socket.socket(socket.AF_UNIX) as client:
                client.bind(f"\0{os.getpid()}-{number}")
                attempt = Attempt(nursery, listener.accept, once_parked=interfere)
                await attempt.settled()
                ends[attempt.cancelled] += 1
                sock, peer = await listener.accept() if attempt.cancelled else await attempt.result()
                with sock:
                    assert peer == client.getsockname()
            assert not listener.is_readable()
    assert all(ends)
    assert len(os.listdir("/proc/self/fd")) == before
