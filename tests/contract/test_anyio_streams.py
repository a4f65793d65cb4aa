"""`trio_uring.anyio`: streams and listeners keep what anyio's documentation says of its own, and are on the ring."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing
import trustme
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    TypedAttributeLookupError,
)
from anyio.abc import ByteStream, SocketAttribute, SocketListener, SocketStream, UNIXSocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.stapled import MultiListener
from anyio.streams.text import TextReceiveStream, TextSendStream, TextStream
from anyio.streams.tls import TLSAttribute, TLSListener, TLSStream

import trio_uring
import trio_uring.anyio as ours
from tests.helpers import Attempt, nothing_submitted, parked
from trio_uring._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

KINDS = ["tcp", "unix"]
LARGE = os.urandom(3_000_000)

Pair = tuple[SocketStream, SocketStream]


@asynccontextmanager
async def listening(kind: str, directory: Path) -> AsyncIterator[tuple[Any, Callable[[], Awaitable[SocketStream]]]]:
    """A listener, and what connects to it."""
    listener: Any
    if kind == "tcp":
        listener = await ours.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(SocketAttribute.local_port)

        async def connect() -> SocketStream:
            return await ours.connect_tcp("127.0.0.1", port)
    else:
        path = directory / "socket"
        listener = await ours.create_unix_listener(path)

        async def connect() -> SocketStream:
            return await ours.connect_unix(path)

    async with listener:
        yield listener, connect


async def accept(listener: Any) -> SocketStream:
    """One connection of a listener, which for TCP is a `MultiListener` of one."""
    listener = listener.listeners[0] if isinstance(listener, MultiListener) else listener
    accepted: SocketStream = await listener.accept()
    return accepted


@asynccontextmanager
async def pair(kind: str, directory: Path) -> AsyncIterator[Pair]:
    """Two connected streams: who has connected, who was accepted."""
    async with listening(kind, directory) as (listener, connect):
        connected = await connect()
        accepted = await accept(listener)
    async with connected, accepted:
        yield connected, accepted


async def receive_exactly(stream: Any, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += await stream.receive()
    return bytes(received)


async def fill(stream: SocketStream, nursery: trio.Nursery) -> Attempt[None]:
    """A send that waits, because nobody receives."""
    return await parked(nursery, stream.send, bytes(20_000_000))


def in_flight() -> list[str]:
    return [operation.operation for operation in trio_uring.statistics().operations]


def socket_under(stream: Any) -> object:
    """trio's socket."""
    return stream._trio_socket


def raw(stream: Any) -> socket.socket:
    found: socket.socket = stream.extra(SocketAttribute.raw_socket)
    return found


kinds = pytest.mark.parametrize("kind", KINDS)


# What they are


@kinds
async def test_classes(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect):
        assert isinstance(listener, MultiListener if kind == "tcp" else SocketListener)
        connected = await connect()
        accepted = await accept(listener)
        async with connected, accepted:
            for stream in (connected, accepted):
                assert isinstance(stream, UNIXSocketStream if kind == "unix" else SocketStream)
                assert isinstance(stream, ByteStream)
                assert type(socket_under(stream)) is UringSocket


@kinds
async def test_they_wait_on_the_ring(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect), trio.open_nursery() as nursery:
        accepting = await parked(nursery, accept, listener)
        assert "accept" in in_flight()
        async with await connect() as connected, await accepting.result() as accepted:
            receiving = await parked(nursery, accepted.receive)
            assert "recv" in in_flight()
            await connected.send(b"hello")
            assert await receiving.result() == b"hello"


@kinds
async def test_attributes(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect):
        connected = await connect()
        accepted = await accept(listener)
        async with connected, accepted:
            address = listener.extra(SocketAttribute.local_address)
            assert connected.extra(SocketAttribute.remote_address) == address
            assert accepted.extra(SocketAttribute.local_address) == address
            mine = connected.extra(SocketAttribute.local_address)
            assert accepted.extra(SocketAttribute.remote_address) == mine
            for stream in (connected, accepted):
                assert type(raw(stream)) is socket.socket
                assert stream.extra(SocketAttribute.family) == raw(stream).family
            assert raw(connected).getpeername() == address
            if kind == "tcp":
                assert address == ("127.0.0.1", listener.extra(SocketAttribute.local_port))
                assert connected.extra(SocketAttribute.remote_port) == address[1]
                assert accepted.extra(SocketAttribute.remote_port) == connected.extra(SocketAttribute.local_port)
                for stream in (connected, accepted):
                    assert raw(stream).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            else:
                assert address == str(tmp_path / "socket")
                with pytest.raises(TypedAttributeLookupError):
                    connected.extra(SocketAttribute.local_port)
        with pytest.raises(TypedAttributeLookupError):
            listener.extra(SocketAttribute.remote_address)


# Sending and receiving


@kinds
async def test_large_messages_both_ways_at_once(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right), anyio.create_task_group() as tasks:
        tasks.start_soon(left.send, LARGE)
        tasks.start_soon(right.send, LARGE[::-1])

        async def check(stream: SocketStream, expected: bytes) -> None:
            assert await receive_exactly(stream, len(expected)) == expected

        tasks.start_soon(check, right, LARGE)
        tasks.start_soon(check, left, LARGE[::-1])


@kinds
async def test_max_bytes(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        await left.send(b"hello, world")
        assert await right.receive(5) == b"hello"
        assert await right.receive(1) == b","
        assert await right.receive() == b" world"
        with pytest.raises(ValueError, match="positive"):
            await right.receive(0)


@kinds
@pytest.mark.parametrize("wrapped", [bytes, bytearray, memoryview])
async def test_any_buffer_can_be_sent(kind: str, wrapped: Callable[[bytes], Any], tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        await left.send(wrapped(b"hello"))
        assert await right.receive() == b"hello"


@kinds
async def test_half_close(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        await left.send(b"last words")
        await left.send_eof()
        assert [data async for data in right] == [b"last words"]
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await right.receive()
        await right.send(b"the answer")
        assert await left.receive() == b"the answer"
        with pytest.raises(BrokenResourceError):
            await left.send(b"more")


@kinds
async def test_end_of_stream_when_the_peer_closes(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right), trio.open_nursery() as nursery:
        receiving = await parked(nursery, right.receive)
        await left.aclose()
        with pytest.raises(EndOfStream):
            await receiving.result()


@kinds
async def test_busy(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect), trio.open_nursery() as nursery:
        accepting = await parked(nursery, accept, listener)
        with pytest.raises(BusyResourceError):
            await accept(listener)
        connected = await connect()
        accepted = await accepting.result()
        async with connected, accepted:
            await parked(nursery, connected.receive)
            with pytest.raises(BusyResourceError):
                await connected.receive()
            await fill(connected, nursery)
            with pytest.raises(BusyResourceError):
                await connected.send(b"more")
            nursery.cancel_scope.cancel()


@kinds
async def test_closed(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect):
        connected = await connect()
        accepted = await accept(listener)
        for resource in (connected, accepted, listener):
            await resource.aclose()
            await resource.aclose()
        for stream in (connected, accepted):
            with pytest.raises(ClosedResourceError):
                await stream.receive()
            with pytest.raises(ClosedResourceError):
                await stream.send(b"too late")
        with pytest.raises(ClosedResourceError):
            await accept(listener)


@kinds
async def test_closed_by_another_task(kind: str, tmp_path: Path) -> None:
    async with (
        listening(kind, tmp_path) as (listener, connect),
        trio.open_nursery() as nursery,
        await connect() as connected,
        await accept(listener),
    ):
        waiting: list[Attempt[Any]] = [
            await parked(nursery, connected.receive),
            await fill(connected, nursery),
            await parked(nursery, accept, listener),
        ]
        await connected.aclose()
        await listener.aclose()
        for attempt in waiting:
            with pytest.raises(ClosedResourceError):
                await attempt.result()


async def test_broken(tmp_path: Path) -> None:
    async with pair("tcp", tmp_path) as (left, right), trio.open_nursery() as nursery:
        raw(left).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sending = await fill(right, nursery)
        receiving = await parked(nursery, right.receive)
        await left.aclose()  # which is a reset
        await sending.settled()
        await receiving.settled()
        assert BrokenResourceError in {type(sending.error), type(receiving.error)}
        with pytest.raises(BrokenResourceError):
            await right.send(b"hello?")


@kinds
async def test_broken_when_nobody_will_receive(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right), trio.open_nursery() as nursery:
        sending = await fill(left, nursery)
        await right.aclose()
        with pytest.raises(BrokenResourceError):
            await sending.result()


async def test_file_descriptors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    async with pair("unix", tmp_path) as (left, right):
        assert isinstance(left, UNIXSocketStream)
        assert isinstance(right, UNIXSocketStream)
        with open(tmp_path / "file", "rb") as file:
            await left.send_fds(b"two of them", [file, file.fileno()])
        message, fds = await right.receive_fds(100, 2)
        assert (message, len(fds)) == (b"two of them", 2)
        for fd in fds:
            assert os.pread(fd, 100, 0) == b"content"
            os.close(fd)


# Connecting and listening


async def test_refused(tmp_path: Path) -> None:
    async with await ours.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
    with pytest.raises(OSError, match="connection attempts failed"):
        await ours.connect_tcp("127.0.0.1", port)
    with pytest.raises(FileNotFoundError):
        await ours.connect_unix(tmp_path / "nothing")


async def test_by_name() -> None:
    async with await ours.create_tcp_listener(local_host="localhost") as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, echo)
            async with await ours.connect_tcp("localhost", port) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
            tasks.cancel_scope.cancel()


async def test_arguments_are_anyios() -> None:
    async with await ours.create_tcp_listener(local_host="127.0.0.1", backlog=1, reuse_port=True) as listener:
        assert raw(listener).getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        port = listener.extra(SocketAttribute.local_port)
        async with await ours.connect_tcp("127.0.0.1", port, local_host="127.0.0.2") as stream:
            assert stream.extra(SocketAttribute.local_address)[0] == "127.0.0.2"


async def test_a_unix_socket_in_the_way_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for _ in range(2):
        async with await ours.create_unix_listener(path, mode=0o600) as listener:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert listener.extra(SocketAttribute.local_address) == str(path)


async def echo(stream: ByteStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


@kinds
async def test_serve(kind: str, tmp_path: Path) -> None:
    answers: list[bool] = []

    async def ask(number: int) -> None:
        async with await connect() as stream:
            question = b"%d" % number * 1000
            await stream.send(question)
            await stream.send_eof()
            answers.append(b"".join([data async for data in stream]) == question)

    async with listening(kind, tmp_path) as (listener, connect), anyio.create_task_group() as servers:
        servers.start_soon(listener.serve, echo)
        async with anyio.create_task_group() as clients:
            for number in range(50):
                clients.start_soon(ask, number)
        servers.cancel_scope.cancel()
    assert answers == [True] * 50


@kinds
async def test_serve_in_a_task_group_of_the_callers(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect), anyio.create_task_group() as handlers:
        async with anyio.create_task_group() as servers:
            servers.start_soon(listener.serve, echo, handlers)
            stream = await connect()
            await stream.send(b"one")
            assert await stream.receive() == b"one"
            servers.cancel_scope.cancel()
        async with stream:
            await stream.send(b"two")
            assert await stream.receive() == b"two"


@kinds
async def test_an_error_in_a_handler_ends_serve(kind: str, tmp_path: Path) -> None:
    async def fail(stream: SocketStream) -> None:
        async with stream:
            raise KeyError("nothing but this")

    async with listening(kind, tmp_path) as (listener, connect), anyio.create_task_group() as tasks:

        async def serve() -> None:
            with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
                await listener.serve(fail)

        tasks.start_soon(serve)
        async with await connect() as stream:
            with pytest.raises(EndOfStream):
                await stream.receive()


# Cancellation


@kinds
async def test_a_cancelled_receive_loses_nothing(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        with anyio.move_on_after(0.01) as scope:
            await right.receive()
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.01):
                await right.receive()
        await left.send(b"hello")
        assert await right.receive() == b"hello"


@kinds
async def test_a_cancelled_accept_loses_no_connection(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect):
        with anyio.move_on_after(0.01) as scope:
            await accept(listener)
        assert scope.cancelled_caught
        async with await connect(), await accept(listener):
            pass


@kinds
async def test_a_cancelled_send_leaves_the_stream_open(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right), trio.open_nursery() as nursery:
        assert await (await fill(left, nursery)).cancel()
        nursery.start_soon(right.aclose)
        with pytest.raises(BrokenResourceError):
            await left.send(LARGE)


@kinds
async def test_cancelled_before_it_begins(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        await left.send(b"hello")
        async with nothing_submitted():
            with anyio.CancelScope() as scope:
                scope.cancel()
                await right.receive()
            assert scope.cancelled_caught
        assert await right.receive() == b"hello"


async def test_a_cancelled_connect_leaves_nothing(tmp_path: Path) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # so the next one waits
            with anyio.move_on_after(0.05) as scope:
                await ours.connect_tcp(*full.getsockname())
            assert scope.cancelled_caught


@kinds
async def test_every_call_is_a_checkpoint(kind: str, tmp_path: Path) -> None:
    async with listening(kind, tmp_path) as (listener, connect):
        with trio.testing.assert_checkpoints():
            connected = await connect()
        with trio.testing.assert_checkpoints():
            accepted = await accept(listener)
        with trio.testing.assert_checkpoints():
            await connected.send(b"hello")
        with trio.testing.assert_checkpoints():
            await accepted.receive()
        for stream in (connected, accepted):
            with trio.testing.assert_checkpoints():
                await stream.aclose()


# Wrappers

CA = trustme.CA()


def server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert("localhost").configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


@pytest.mark.parametrize("standard_compatible", [True, False])
async def test_tls_by_connecting(standard_compatible: bool) -> None:
    tcp = await ours.create_tcp_listener(local_host="127.0.0.1")
    listener = TLSListener(tcp, server_context(), standard_compatible)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        stream = await ours.connect_tcp(
            "127.0.0.1",
            tcp.extra(SocketAttribute.local_port),
            ssl_context=client_context(),
            tls_hostname="localhost",
            tls_standard_compatible=standard_compatible,
        )
        async with stream:
            assert isinstance(stream, TLSStream)
            assert isinstance(stream.transport_stream, SocketStream)
            assert type(socket_under(stream.transport_stream)) is UringSocket
            assert stream.extra(TLSAttribute.tls_version).startswith("TLS")
            assert stream.extra(SocketAttribute.remote_port) == tcp.extra(SocketAttribute.local_port)
            tasks.start_soon(stream.send, LARGE)
            assert await receive_exactly(stream, len(LARGE)) == LARGE
        tasks.cancel_scope.cancel()


async def test_tls_that_nobody_vouches_for() -> None:
    tcp = await ours.create_tcp_listener(local_host="127.0.0.1")
    failed = anyio.Event()

    class Noting(TLSListener):
        @staticmethod
        async def handle_handshake_error(exc: BaseException, stream: Any) -> None:
            await anyio.aclose_forcefully(stream)
            failed.set()

    async with Noting(tcp, server_context()) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        with pytest.raises(ssl.SSLCertVerificationError):
            await ours.connect_tcp(
                "127.0.0.1", tcp.extra(SocketAttribute.local_port), tls=True, tls_hostname="localhost"
            )
        await failed.wait()
        tasks.cancel_scope.cancel()


@kinds
async def test_tls_wrapped_round_both_ends(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        ends: dict[str, TLSStream] = {}

        async def wrap(name: str, stream: SocketStream, **kwargs: Any) -> None:
            ends[name] = await TLSStream.wrap(stream, **kwargs)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: wrap("server", right, server_side=True, ssl_context=server_context()))
            tasks.start_soon(lambda: wrap("client", left, hostname="localhost", ssl_context=client_context()))
        client, server = ends["client"], ends["server"]
        await client.send(b"hello")
        assert await server.receive() == b"hello"
        await server.send(b"the answer")
        assert await client.receive() == b"the answer"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.aclose)
            with pytest.raises(EndOfStream):
                await server.receive()
            await server.aclose()


@kinds
async def test_buffered(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        buffered = BufferedByteReceiveStream(right)
        await left.send(b"head\r\nbo")
        assert await buffered.receive_until(b"\r\n", 100) == b"head"
        await left.send(b"dy and the rest")
        assert await buffered.receive_exactly(4) == b"body"
        await left.send_eof()
        with pytest.raises(DelimiterNotFound):
            await buffered.receive_until(b"\r\n", 5)
        with pytest.raises(IncompleteRead):
            await buffered.receive_exactly(1000)


@kinds
async def test_text(kind: str, tmp_path: Path) -> None:
    async with pair(kind, tmp_path) as (left, right):
        text = TextStream(left)
        await text.send("sch\xf6n")
        receiver = TextReceiveStream(right)
        assert await receiver.receive() == "sch\xf6n"
        await right.send("\xf6".encode()[:1])
        with anyio.move_on_after(0.01):
            await text.receive()
        await right.send("\xf6".encode()[1:])
        assert await text.receive() == "\xf6"
        await TextSendStream(right, "latin-1").send("\xf6")
        assert await left.receive() == b"\xf6"


async def test_where_anyio_keeps_its_socket_elsewhere(tmp_path: Path) -> None:
    """What can be done without the name that is not public: the stream stays as anyio has made it."""

    async def make() -> object:
        return made

    made = object()
    assert await ours._over_ours(make) is made
