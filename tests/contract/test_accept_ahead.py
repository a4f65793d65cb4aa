"""`AcceptAhead`: connections accepted before anybody asks for them are bounded, handed over, and never leaked."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import Attempt, parked
from trio_uring import AcceptAhead
from trio_uring.socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def _listener() -> trio.SocketListener:
    (listener,) = await trio_uring.open_tcp_listeners(0, host="127.0.0.1")
    return listener


def _connect(clients: ExitStack, listener: trio.SocketListener) -> socket.socket:
    return clients.enter_context(socket.create_connection(listener.socket.getsockname(), timeout=10))


async def test_it_serves(clients: ExitStack) -> None:
    served = 0
    done = trio.Event()

    async def echo(stream: trio.SocketStream) -> None:
        nonlocal served
        assert type(stream.socket) is UringSocket
        await stream.send_all(await stream.receive_some(1))
        served += 1
        if served == len(peers):
            done.set()

    listener = await _listener()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [AcceptAhead(listener)])
        peers = [_connect(clients, listener) for _ in range(100)]
        for peer in peers:
            peer.send(b"x")
        await done.wait()
        nursery.cancel_scope.cancel()
    assert all(peer.recv(9) == b"x" for peer in peers)
    assert listener.socket.fileno() == -1


async def test_what_was_accepted_is_handed_over_after_a_stop(clients: ExitStack) -> None:
    listener = await _listener()
    async with AcceptAhead(listener) as ahead:
        with trio.move_on_after(0):
            await ahead.accept()
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, ahead.accept)
            peers = [_connect(clients, listener) for _ in range(3)]
            streams = [await attempt.result()]
        await trio.testing.wait_all_tasks_blocked()
        await ahead.stop()
        streams += [await ahead.accept() for _ in peers[1:]]
        with pytest.raises(trio.ClosedResourceError):
            await ahead.accept()
        for stream, peer in zip(streams, peers, strict=True):
            peer.send(b"x")
            assert await stream.receive_some() == b"x"
            await stream.aclose()


async def test_nobody_is_accepted_beyond_the_limit(clients: ExitStack) -> None:
    listener = await _listener()
    async with AcceptAhead(listener, limit=4) as ahead:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, ahead.accept)
            _connect(clients, listener)
            await (await attempt.result()).aclose()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            _connect(clients, listener)
            await trio.testing.wait_all_tasks_blocked()
        accepted = len(os.listdir("/proc/self/fd")) - before - 20
        assert 4 <= accepted <= 8
        for _ in range(20):
            await (await ahead.accept()).aclose()


@pytest.mark.parametrize("family", [socket.AF_INET6, socket.AF_UNIX])
async def test_connections_are_of_their_listeners_family(clients: ExitStack, tmp_path: Path, family: int) -> None:
    with socket.socket(family) as plain:
        plain.bind(str(tmp_path / "socket") if family == socket.AF_UNIX else ("::1", 0))
        plain.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain.dup()))
    async with AcceptAhead(listener) as ahead:
        peer = clients.enter_context(socket.socket(family))
        peer.connect(listener.socket.getsockname())
        async with await ahead.accept() as stream:
            assert (stream.socket.family, stream.socket.type) == (family, socket.SOCK_STREAM)
            assert stream.socket.getsockname() == peer.getpeername()


async def test_no_fds_are_left(clients: ExitStack) -> None:
    """It is told, and accepts again when there are."""
    listener = await _listener()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with AcceptAhead(listener) as ahead:
        peer = _connect(clients, listener)
        top = os.dup(peer.fileno())
        os.close(top)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        try:
            with pytest.raises(OSError, match="Too many open files") as raised:
                await ahead.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert raised.value.errno == errno.EMFILE
        async with await ahead.accept() as stream:
            assert stream.socket.getpeername() == peer.getsockname()


async def test_closing_closes_what_nobody_has_taken(clients: ExitStack) -> None:
    listener = await _listener()
    async with trio.open_nursery() as nursery:
        async with AcceptAhead(listener) as ahead:
            attempt = await parked(nursery, ahead.accept)
            first, second = _connect(clients, listener), _connect(clients, listener)
            stream = await attempt.result()
            await trio.testing.wait_all_tasks_blocked()
        assert second.recv(9) == b""
        await stream.send_all(b"x")
        assert first.recv(9) == b"x"
        await stream.aclose()


async def test_a_close_wakes_who_waits() -> None:
    listener = await _listener()
    async with trio.open_nursery() as nursery, AcceptAhead(listener) as ahead:
        attempt: Attempt[trio.SocketStream] = await parked(nursery, ahead.accept)
        await ahead.stop()
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
    assert listener.socket.fileno() == -1
