"""What trio's own checks demand of streams, over our sockets; and that every door of trio and anyio leads to them."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
import trio
import trio.testing
import trustme

import trio_uring
from tests.helpers import REQUIRED, Mount, World, manager, sockets
from trio_uring.socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Pair = Callable[[], Awaitable[tuple[Any, Any]]]


async def _fill(stream: Any) -> None:
    """Nothing more can be sent on it."""

    async def send() -> None:
        while True:
            await stream.send_all(b"x" * 10_000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


def _clogged(pair: Pair) -> Pair:
    async def make() -> tuple[Any, Any]:
        a, b = await pair()
        await _fill(a)
        await _fill(b)
        return a, b

    return make


@pytest.mark.parametrize("name", ["tcp", "unix", "pair stream"])
async def test_trios_checks(world: World, name: str) -> None:
    async def pair() -> tuple[Any, Any]:
        a, b = await world.pair(name)
        assert type(a) is type(b) is UringSocket
        return trio.SocketStream(a), trio.SocketStream(b)

    await trio.testing.check_half_closeable_stream(pair, _clogged(pair))


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The client's context and the server's."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert("localhost").configure_cert(server)
    return client, server


async def test_trios_checks_over_tls(world: World, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    client, server = tls

    async def pair() -> tuple[Any, Any]:
        a, b = await world.pair("tcp")
        options: dict[str, Any] = {"https_compatible": True}
        return (
            trio.SSLStream(trio.SocketStream(a), client, server_hostname="localhost", **options),
            trio.SSLStream(trio.SocketStream(b), server, server_side=True, **options),
        )

    await trio.testing.check_two_way_stream(pair, None)


# Every door


async def _class_behind_a_listener(start: Callable[..., Awaitable[Any]], connect: Callable[[int], Any]) -> set[Any]:
    """Of the listener's socket, of the one that connects, and of the accepted one."""
    found: set[Any] = set()
    handled = trio.Event()

    async def handler(stream: Any) -> None:
        found.add(type(getattr(stream, "transport_stream", stream).socket))
        handled.set()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(start, handler, 0, host="127.0.0.1"))
        listener = getattr(listener, "transport_listener", listener)
        found.add(type(listener.socket))
        stream = await connect(listener.socket.getsockname()[1])
        found.add(type(stream.socket))
        await handled.wait()
        await stream.aclose()
        nursery.cancel_scope.cancel()
    return found


async def _behind_anyio(directory: Path) -> set[Any]:
    found: set[Any] = set()

    def note(thing: Any) -> None:
        found.add(type(thing._trio_socket))

    async def serve(listener: Any, connect: Callable[[], Awaitable[Any]]) -> None:
        async def handler(stream: Any) -> None:
            async with stream:
                note(stream)

        listeners = getattr(listener, "listeners", [listener])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handler)
            for each in listeners:
                note(each)
            async with await connect() as stream:
                note(stream)
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            nursery.cancel_scope.cancel()
        await listener.aclose()

    tcp = await anyio.create_tcp_listener(local_host="127.0.0.1")
    await serve(tcp, lambda: anyio.connect_tcp("127.0.0.1", tcp.extra(anyio.abc.SocketAttribute.local_port)))
    path = str(directory / "socket")
    await serve(await anyio.create_unix_listener(path), lambda: anyio.connect_unix(path))
    async with (
        await anyio.create_udp_socket(local_host="127.0.0.1") as udp,
        await anyio.create_connected_udp_socket("127.0.0.1", 9) as connected_udp,
        await anyio.create_unix_datagram_socket(local_path=str(directory / "datagrams")) as datagrams,
    ):
        for thing in (udp, connected_udp, datagrams):
            note(thing)
    return found


async def _behind_trio(directory: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> set[Any]:
    a, b = trio.socket.socketpair()
    with a, b, trio.socket.socket() as new, trio.socket.fromfd(a.fileno()) as copy, a.dup() as other:
        left, right = socket.socketpair()
        with trio.socket.from_stdlib_socket(left) as adopted, right:
            found = {type(sock) for sock in (a, b, new, copy, other, adopted)}
    found |= await _class_behind_a_listener(trio.serve_tcp, partial(trio.open_tcp_stream, "127.0.0.1"))

    async def serve_tls(handler: Any, port: int, **more: Any) -> None:
        await trio.serve_ssl_over_tcp(handler, port, tls[1], **more)

    found |= await _class_behind_a_listener(serve_tls, partial(trio.open_tcp_stream, "127.0.0.1"))
    path = str(directory / "trio-socket")
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        stream = await trio.open_unix_socket(path)
        found.add(type(stream.socket))
        await stream.aclose()
    return found


@pytest.mark.native("beside trio's own I/O manager its names keep their meaning")
async def test_every_door(doors_open: None, tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    assert await _behind_trio(tmp_path, tls) == {UringSocket}
    assert await _behind_anyio(tmp_path) == {UringSocket}


def test_other_runs_keep_trios(tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    stock = type(trio.run(_a_socket))
    assert not issubclass(stock, UringSocket)
    found: list[set[Any]] = []

    async def other_thread() -> None:
        found.append(await _behind_trio(tmp_path, tls) | await _behind_anyio(tmp_path))

    async def main() -> None:
        assert type(await _a_socket()) is UringSocket
        thread = threading.Thread(target=trio.run, args=(other_thread,))
        thread.start()
        await trio.to_thread.run_sync(thread.join)

    trio_uring.run(main, config=REQUIRED)
    assert found == [{stock}]
    assert type(trio.run(_a_socket)) is stock


async def test_beside_trios_own_manager_its_names_are_trios(doors_open: None, mount: Mount) -> None:
    assert manager().native is mount.native
    assert (type(await _a_socket()) is UringSocket) is mount.native


async def _a_socket() -> Any:
    with trio.socket.socket() as sock:
        return sock


async def test_by_our_names(tmp_path: Path) -> None:
    """In every run."""

    async def serve(handler: Any, port: int, **more: Any) -> None:
        await trio_uring.serve_tcp(handler, port, **more)

    assert await _class_behind_a_listener(serve, partial(trio_uring.open_tcp_stream, "127.0.0.1")) == {UringSocket}
    with sockets().socket(socket.AF_UNIX) as listener:
        await listener.bind(str(tmp_path / "socket"))
        listener.listen()
        async with await trio_uring.open_unix_socket(tmp_path / "socket") as stream:
            assert type(stream.socket) is UringSocket
    ours = trio_uring.socket
    a, b = ours.socketpair()
    with a, b, ours.socket() as new, ours.fromfd(a.fileno()) as copy:
        left, right = socket.socketpair()
        with ours.from_stdlib_socket(left) as adopted, right:
            assert {type(sock) for sock in (a, b, new, copy, adopted)} == {UringSocket}


async def test_arguments_of_listeners_and_streams() -> None:
    (listener,) = await trio_uring.open_tcp_listeners(0, host="127.0.0.1", backlog=7)
    async with listener:
        assert _backlog(listener) == 7
        port = listener.socket.getsockname()[1]
        async with await trio_uring.open_tcp_stream("127.0.0.1", port, local_address="127.0.0.2") as stream:
            assert stream.socket.getsockname()[0] == "127.0.0.2"


def _backlog(listener: trio.SocketListener) -> int:
    """What it has been told: of a socket that listens it stands in TCP_INFO, as ``tcpi_sacked``."""
    info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    assert isinstance(info, bytes)
    return int.from_bytes(info[28:32], sys.byteorder)


async def test_handlers_live_where_they_are_told_to() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(await stream.receive_some())

    async with trio.open_nursery() as handlers:
        async with trio.open_nursery() as server:
            serve = partial(trio_uring.serve_tcp, echo, 0, host="127.0.0.1", backlog=7, handler_nursery=handlers)
            (listener,) = await server.start(serve)
            assert _backlog(listener) == 7
            stream = await trio_uring.open_tcp_stream(*listener.socket.getsockname())
            await trio.testing.wait_all_tasks_blocked()
            server.cancel_scope.cancel()
        async with stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"


async def test_sockets_of_a_factory_stay_what_they_are() -> None:
    class Own(UringSocket):
        pass

    class Factory(trio.abc.SocketFactory):
        def socket(self, *args: Any) -> Any:
            return Own(socket.socket(*args))

    trio.socket.set_custom_socket_factory(Factory())
    (listener,) = await trio_uring.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await trio_uring.open_tcp_stream(*listener.socket.getsockname()) as stream:
        assert type(listener.socket) is type(stream.socket) is Own
