"""Sockets on the ring do what trio's do: each scenario runs under stock trio as well, and what comes is compared."""

from __future__ import annotations

import array
import ctypes
import errno
import itertools
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import KINDS, NAMED, Attempt, Mount, World, manager_or_none, parked, sockets
from trio_uring._registered import STREAM_BUFFER_SIZE
from trio_uring._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Scenario = Callable[["World"], Awaitable[object]]

PAIRS = [*NAMED, *(f"pair {kind}" for kind in KINDS)]
STREAMS = ["tcp", "tcp6", "unix", "unix abstract", "pair stream"]
OF_ANY_KIND = ["tcp", "unix", "unix seqpacket", "udp", "pair stream", "pair dgram"]


def error(exc: BaseException) -> tuple[object, ...]:
    """What is the same about it, on the ring or not."""
    return type(exc), getattr(exc, "errno", None)


async def tried(async_fn: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """The result, or what the error is."""
    try:
        with trio.testing.assert_checkpoints():
            return await async_fn(*args, **kwargs)
    except Exception as exc:
        return error(exc)


def run_in_a_world(run: Callable[..., Any], scenario: Scenario, directory: Any) -> Any:
    async def main() -> object:
        world = World(str(directory))
        try:
            return await scenario(world)
        finally:
            world.close()

    return run(main)


@pytest.fixture
def same(mount: Mount, tmp_path: Any, doors_open: None) -> Callable[[Scenario], Any]:
    """Runs a scenario on stock trio and on the ring, and asserts that the same came of it."""

    def check(scenario: Scenario) -> Any:
        expected = run_in_a_world(trio.run, scenario, tmp_path)
        got = run_in_a_world(mount.run, scenario, tmp_path)
        assert not differences(expected, got)
        return expected

    return check


def differences(left: Any, right: Any) -> Any:
    """Just these, of two results with names."""
    if isinstance(left, dict):
        return {name: (left[name], right.get(name)) for name in left if left[name] != right.get(name)}
    return [(one, other) for one, other in zip(left, right, strict=True) if one != other] if left != right else []


# Receiving


def into(method: Any, size: int, *args: Any, view: Callable[[bytearray], Any] = lambda buffer: buffer) -> Any:
    """A receive into a buffer, with what is in the buffer then."""

    async def receive() -> Any:
        buffer = bytearray(size)
        return await method(view(buffer), *args), bytes(buffer)

    return receive()


async def length(receive: Awaitable[bytes]) -> int:
    """With MSG_TRUNC it may be more than was received: the rest is whatever was in memory."""
    return len(await receive)


async def msg_into(a: Any, *args: Any) -> Any:
    buffers = [bytearray(2), memoryview(bytearray(3)), array.array("b", bytes(9))]
    return await a.recvmsg_into(buffers, *args), [bytes(buffer) for buffer in buffers]


RECEIVES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "recv": lambda a: a.recv(100),
    "recv short": lambda a: a.recv(3),
    "recv true": lambda a: a.recv(True),
    "recv peek": lambda a: a.recv(4, socket.MSG_PEEK),
    "recv waitall": lambda a: a.recv(4, socket.MSG_WAITALL),
    "recv dontwait": lambda a: a.recv(4, socket.MSG_DONTWAIT),
    "recv trunc": lambda a: length(a.recv(4, socket.MSG_TRUNC)),
    "recv big": lambda a: a.recv(1 << 20),
    "recv_into": lambda a: into(a.recv_into, 9),
    "recv_into short": lambda a: into(a.recv_into, 3),
    "recv_into view": lambda a: into(a.recv_into, 9, view=memoryview),
    "recv_into nbytes": lambda a: into(a.recv_into, 9, 2),
    "recv_into flags": lambda a: into(a.recv_into, 9, 0, socket.MSG_PEEK),
    "recvfrom": lambda a: a.recvfrom(100),
    "recvfrom_into": lambda a: into(a.recvfrom_into, 9),
    "recvfrom_into nbytes": lambda a: into(a.recvfrom_into, 9, 2),
    "recvmsg": lambda a: a.recvmsg(100),
    "recvmsg short": lambda a: a.recvmsg(3),
    "recvmsg ancillary": lambda a: a.recvmsg(100, 100),
    "recvmsg peek": lambda a: a.recvmsg(100, 0, socket.MSG_PEEK),
    "recvmsg_into": msg_into,
    "recvmsg_into ancillary": lambda a: msg_into(a, 50),
}
BAD_RECEIVES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "nothing": lambda a: a.recv(),
    "negative": lambda a: a.recv(-1),
    "a string": lambda a: a.recv("9"),
    "a float": lambda a: a.recv(9.0),
    "no flags": lambda a: a.recv(9, None),
    "empty flags": lambda a: a.recv(9, ""),
    "flags 0.0": lambda a: a.recv(9, 0.0),
    "too much": lambda a: a.recv(1 << 64),
    "a terabyte": lambda a: a.recv(1 << 50),
    "into bytes": lambda a: a.recv_into(b"xxx"),
    "into a read-only view": lambda a: a.recv_into(memoryview(b"xxx")),
    "into None": lambda a: a.recv_into(None),
    "more than fits": lambda a: a.recv_into(bytearray(2), 3),
    "negative nbytes": lambda a: a.recv_into(bytearray(2), -3),
    "nbytes None": lambda a: a.recv_into(bytearray(2), None),
    "flags None": lambda a: a.recv_into(bytearray(2), 0, None),
    "recvfrom": lambda a: a.recvfrom(-1),
    "recvmsg": lambda a: a.recvmsg(-1),
    "recvmsg ancillary": lambda a: a.recvmsg(9, -1),
    "recvmsg_into": lambda a: a.recvmsg_into([b"xxx"]),
    "one buffer": lambda a: a.recvmsg_into(bytearray(9)),
}


def anonymous(result: Any, addresses: dict[Any, str]) -> Any:
    """With names instead of addresses, which are not the same in two runs."""
    if isinstance(result, tuple):
        try:
            return addresses[result]
        except (KeyError, TypeError):
            return tuple(anonymous(each, addresses) for each in result)
    return addresses.get(result, result) if isinstance(result, str | bytes) and result else result


def addresses_of(a: Any, b: Any) -> dict[Any, str]:
    return {b.getsockname(): "b", a.getsockname(): "a"}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waits"])
def test_receive(same: Any, kind: str, waits: bool) -> None:
    async def receive(world: World) -> Any:
        results = {}
        for name, call in RECEIVES.items():
            a, b = await world.pair(kind)
            who = addresses_of(a, b)
            if waits:
                async with trio.open_nursery() as nursery:
                    attempt = await parked(nursery, tried, call, a)
                    await b.send(b"abcdef")
                    result = await attempt.result()
            else:
                await b.send(b"abcdef")
                result = await tried(call, a)
            results[name] = anonymous(result, who), await tried(a.recv, 100, socket.MSG_PEEK) if "peek" in name else 0
            a.close()
            b.close()
        return results

    results = same(receive)
    assert results["recv"][0] == b"abcdef"


@pytest.mark.parametrize("kind", STREAMS)
def test_end_of_the_stream(same: Any, kind: str) -> None:
    async def receive(world: World) -> Any:
        results = {}
        for (name, call), how in itertools.product(RECEIVES.items(), ("shutdown", "close", "waits")):
            a, b = await world.pair(kind)
            who = addresses_of(a, b)
            async with trio.open_nursery() as nursery:
                if how == "waits":
                    attempt = await parked(nursery, tried, call, a)
                    b.shutdown(socket.SHUT_WR)
                else:
                    b.close() if how == "close" else b.shutdown(socket.SHUT_WR)
                    attempt = Attempt(nursery, tried, call, a)
                results[name, how] = anonymous(await attempt.result(), who)
            assert await tried(a.recv, 9) == b""
            a.close()
            b.close()
        return results

    same(receive)


@pytest.mark.parametrize("kind", OF_ANY_KIND)
def test_receives_that_make_no_sense(same: Any, kind: str) -> None:
    async def receive(world: World) -> Any:
        a, b = await world.pair(kind)
        await b.send(b"abc")
        results = {}
        for name, call in BAD_RECEIVES.items():
            results[name] = await tried(call, a)
            assert results[name][0] in (TypeError, ValueError, OverflowError, MemoryError, BufferError), name
        return results, await a.recv(9)

    same(receive)


@pytest.mark.parametrize("kind", OF_ANY_KIND)
def test_nothing_asked_for(same: Any, kind: str) -> None:
    async def receive(world: World) -> Any:
        a, b = await world.pair(kind)
        results = []
        for call in (
            lambda: a.recv(0),
            lambda: a.recv_into(bytearray()),
            lambda: a.recvmsg(0),
            lambda: a.recvmsg_into([]),
        ):
            await b.send(b"abc")
            results.append(await tried(call))
        return anonymous(tuple(results), addresses_of(a, b))

    same(receive)


SIZES = [1, STREAM_BUFFER_SIZE - 1, STREAM_BUFFER_SIZE, STREAM_BUFFER_SIZE + 1, 1 << 20]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("size", [*SIZES, (1 << 31) - 1, 1 << 31, (1 << 32) + 1])
def test_sizes_of_receives(same: Any, kind: str, size: int) -> None:
    """How much comes at once is the kernel's to say; that it all comes, in order and not more than asked for, is not.
    The very big ones are room that is not touched.
    """
    data = bytes(n % 251 for n in range(20000 if size == 1 else 100_000))

    async def receive(world: World) -> Any:
        a, b = await world.pair(kind)
        stream = trio.SocketStream(b)
        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            while len(got) < len(data):
                chunk = await a.recv(size)
                assert 0 < len(chunk) <= size
                got += chunk
        return bytes(got)

    assert same(receive) == data


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("kind", ["udp", "udp6", "unix dgram", "unix seqpacket", "pair dgram", "pair seqpacket"])
def test_big_messages(same: Any, kind: str) -> None:
    """They are larger than what the ring has for streams, and stay whole, or are cut where the caller says."""

    async def receive(world: World) -> Any:
        a, b = await world.pair(kind)
        sizes = []
        for size, room in itertools.product((STREAM_BUFFER_SIZE, 16385, 40000, 60000), (1 << 20, 16384, 100)):
            for how in (a.recv, lambda n: a.recv_into(bytearray(n)), a.recvmsg):
                assert await b.send(bytes(size)) == size
                result = await how(room)
                sizes.append(result if isinstance(result, int) else len(result) if how == a.recv else len(result[0]))
        return sizes

    same(receive)


def test_empty_datagrams(same: Any) -> None:
    async def receive(world: World) -> Any:
        a, b = await world.pair("udp")
        for empty in (b"", bytearray(), memoryview(b"")):
            await b.send(empty)
        await b.send(b"x")
        return [await a.recv(9) for _ in range(4)]

    assert same(receive) == [b"", b"", b"", b"x"]


# Sending


class Ambiguous(bytes):
    """As an array of numbers: it has no truth value."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


SENDS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "bytes": lambda a: a.send(b"abc"),
    "bytearray": lambda a: a.send(bytearray(b"abc")),
    "view": lambda a: a.send(memoryview(b"abcdef")[1:4]),
    "strided view": lambda a: a.send(memoryview(b"abcdef")[::2]),
    "reversed view": lambda a: a.send(memoryview(b"abcdef")[::-1]),
    "array": lambda a: a.send(array.array("i", [1, 2, 3])),
    "view of an array": lambda a: a.send(memoryview(array.array("i", [1, 2, 3]))),
    "view of two dimensions": lambda a: a.send(memoryview(b"abcdef").cast("B", [2, 3])),
    "view of no dimension": lambda a: a.send(memoryview(b"a").cast("B", [])),
    "ctypes": lambda a: a.send((ctypes.c_short * 2)(1, 2)),
    "no truth value": lambda a: a.send(Ambiguous(b"abc")),
    "flags": lambda a: a.send(b"abc", socket.MSG_NOSIGNAL),
    "flags by a bool": lambda a: a.send(b"abc", False),
    "sendmsg": lambda a: a.sendmsg([b"ab", bytearray(b"c"), memoryview(b"de")]),
    "sendmsg ancillary": lambda a: a.sendmsg([b"abc"], [], socket.MSG_NOSIGNAL),
    "a generator": lambda a: a.sendmsg(piece for piece in (b"ab", b"c")),
}
BAD_SENDS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "nothing": lambda a: a.send(),
    "a string": lambda a: a.send("abc"),
    "None": lambda a: a.send(None),
    "an int": lambda a: a.send(3),
    "no flags": lambda a: a.send(b"abc", None),
    "flags 0.0": lambda a: a.send(b"abc", 0.0),
    "by keyword": lambda a: a.send(data=b"abc"),
    "sendto": lambda a: a.sendto(b"abc", 3, 4, 5),
    "sendmsg": lambda a: a.sendmsg(b"abc"),
    "sendmsg ancillary": lambda a: a.sendmsg([b"abc"], [(1, 2)]),
}


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("kind", PAIRS)
def test_send(same: Any, kind: str) -> None:
    async def send(world: World) -> Any:
        results = {}
        for name, call in SENDS.items():
            a, b = await world.pair(kind)
            results[name] = (
                await tried(call, a),
                await tried(b.recv, 100, socket.MSG_DONTWAIT) if isinstance(await tried(a.send, b"|"), int) else None,
            )
            a.close()
            b.close()
        return results

    same(send)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("kind", OF_ANY_KIND)
def test_sends_that_make_no_sense(same: Any, kind: str) -> None:
    async def send(world: World) -> Any:
        a, b = await world.pair(kind)
        results = {name: await tried(call, a) for name, call in BAD_SENDS.items()}
        await a.send(b"rest")
        return results, await b.recv(9)

    same(send)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("kind", STREAMS)
def test_nothing_to_send(same: Any, kind: str) -> None:
    async def send(world: World) -> Any:
        a, b = await world.pair(kind)
        stream = trio.SocketStream(a)
        results: list[Any] = []
        for empty in (b"", bytearray(), memoryview(b""), array.array("i")):
            results += [await tried(a.send, empty), await tried(stream.send_all, empty)]
        a.shutdown(socket.SHUT_WR)
        results += [await tried(a.send, b""), a.did_shutdown_SHUT_WR, await b.recv(9)]
        a.close()
        return [*results, await tried(a.send, b""), await tried(stream.send_all, b"")]

    same(send)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("kind", STREAMS)
def test_send_to_nobody(same: Any, kind: str) -> None:
    async def send(world: World) -> Any:
        results: dict[Any, Any] = {}
        for name, data in (("bytes", b"abc"), ("bytearray", bytearray(b"abc")), ("view", memoryview(b"abc"))):
            a, _ = await world.pair(kind)
            a.shutdown(socket.SHUT_WR)
            results[name, "shut down"] = await tried(a.send, data), await tried(trio.SocketStream(a).send_all, data)
            a, b = await world.pair(kind)
            b.close()
            for n in range(3):
                results[name, "gone", n] = await tried(a.send, data)
            results[name, "gone", "stream"] = await tried(trio.SocketStream(a).send_all, data)
        return results

    results = same(send)
    assert results["bytes", "gone", 2] == (BrokenPipeError, errno.EPIPE)
    assert results["bytes", "gone", "stream"][0] is trio.BrokenResourceError


async def test_a_buffer_on_its_way_keeps_its_size(world: World, traffic: bool) -> None:
    """Of the whole of what `send_all` sends, until all is sent."""
    a, b = await world.pair("tcp")
    data = bytearray(n % 251 for n in range(3 << 20))
    expected = bytes(data)
    got = bytearray()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, trio.SocketStream(a).send_all, data)
        while len(got) < len(expected):
            if not attempt.done:
                with pytest.raises(BufferError):
                    data.clear()
            got += await b.recv(50_000)
    assert got == expected
    data.clear()


# Messages


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_datagrams_to_addresses(same: Any, family: int) -> None:
    async def exchange(world: World) -> Any:
        a, b = [await world.bound(family, socket.SOCK_DGRAM) for _ in range(2)]
        who = addresses_of(a, b)
        to_b = b.getsockname()
        results = [
            await tried(a.sendto, b"one", to_b),
            await tried(a.sendto, b"two", socket.MSG_NOSIGNAL, to_b),
            await tried(a.sendmsg, [b"thr", b"ee"], [], 0, to_b),
            await tried(a.send, b"to whom?"),
            await tried(a.sendto, b"x", 3),
            await tried(a.sendto, b"x", "/missing" if family == socket.AF_UNIX else ("x", "y", "z")),
            await tried(a.sendto, bytes(100_000 if family != socket.AF_UNIX else 10_000_000), to_b),
        ]
        if family != socket.AF_UNIX:
            results.append(
                await tried(a.sendto, b"by name", ("localhost" if family == socket.AF_INET else "::1", to_b[1]))
            )
        ways = (b.recvfrom, b.recvmsg, lambda n: b.recvfrom_into(bytearray(n)))
        return [*results, *[anonymous(await tried(call, 100), who) for call in ways]]

    same(exchange)


def test_ancillary_data(same: Any, tmp_path: Any) -> None:
    """Fds are passed, and those that do not fit are closed."""
    (tmp_path / "file").write_text("content")

    async def exchange(world: World) -> Any:
        results: list[Any] = []
        for kind, room in itertools.product(("pair stream", "pair dgram", "unix"), (0, 1, 2)):
            a, b = await world.pair(kind)
            with open(tmp_path / "file") as file:
                fds = array.array("i", [file.fileno()] * 2)
                await a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            data, ancdata, flags, _ = await b.recvmsg(9, socket.CMSG_SPACE(4 * room) if room else 0)
            results.append((data, flags, len(ancdata)))
            for *_, raw in ancdata:
                for fd in array.array("i", raw[: len(raw) & ~3]):
                    results += [os.get_inheritable(fd), os.pread(fd, 99, 0)]
                    os.close(fd)
            b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            await a.send(b"who")
            data, ((*level, raw),), flags, _ = await b.recvmsg(9, 100)
            results.append((data, level, array.array("i", raw)[0] == os.getpid()))
        return results

    same(exchange)


def test_fds_nobody_asked_for(same: Any) -> None:
    """A plain receive of what has fds with it drops them."""

    async def exchange(world: World) -> Any:
        a, b = await world.pair("pair stream")
        c, d = await world.pair("pair stream")
        await a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [c.fileno()]))])
        c.close()
        return await b.recv(9), await d.recv(9)

    assert same(exchange) == (b"x", b"")


def test_out_of_band(same: Any) -> None:
    async def exchange(world: World) -> Any:
        a, b = await world.pair("tcp")
        results: list[Any] = [await tried(a.recv, 9, socket.MSG_OOB)]
        await b.send(b"abc")
        await b.send(b"!", socket.MSG_OOB)
        await b.send(b"def")
        results += [await tried(a.recv, 1, socket.MSG_OOB), await tried(a.recv, 9), await tried(a.recv, 9)]
        a.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        await b.send(b"?", socket.MSG_OOB)
        results.append(await tried(a.recv, 9))
        return results

    same(exchange)


def test_errors_that_wait_in_a_queue(same: Any) -> None:
    ip_recverr, msg_errqueue = 11, socket.MSG_ERRQUEUE

    async def exchange(world: World) -> Any:
        a = await world.bound(socket.AF_INET, socket.SOCK_DGRAM)
        nobody = await world.bound(socket.AF_INET, socket.SOCK_DGRAM)
        a.setsockopt(socket.SOL_IP, ip_recverr, 1)
        await a.connect(nobody.getsockname())
        nobody.close()
        await a.send(b"x")
        data, ancdata, flags, _ = await a.recvmsg(100, 512, msg_errqueue)
        return data, [each[:2] for each in ancdata], flags, await tried(a.send, b"y")

    same(exchange)


# Connecting


def test_connect_errors(same: Any, tmp_path: Any) -> None:
    (tmp_path / "a-file").touch()

    async def connect(world: World) -> Any:
        results: dict[str, Any] = {}
        inet, inet6, unix = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
        closed = (await world.bound(inet, socket.SOCK_STREAM)).getsockname()
        listener = await world.listener(inet)
        dgram = await world.bound(unix, socket.SOCK_DGRAM)
        not_listening = await world.bound(unix, socket.SOCK_STREAM)
        attempts: dict[str, tuple[int, Any]] = {
            "refused": (inet, closed),
            "refused by name": (inet, ("localhost", closed[1])),
            "refused6": (inet6, ("::1", closed[1])),
            "refused mapped": (inet6, ("::ffff:127.0.0.1", closed[1])),
            "unreachable": (inet, ("255.255.255.255", 9)),
            "broadcast": (inet, ("<broadcast>", 9)),
            "no such name": (inet, ("no-such-host.invalid", 9)),
            "no such service": (inet, ("127.0.0.1", "no-such-service")),
            "another family": (inet, ("::1", closed[1])),
            "port": (inet, ("127.0.0.1", 65536)),
            "negative port": (inet, ("127.0.0.1", -1)),
            "float": (inet, ("127.0.0.1", 1.5)),
            "path": (inet, "/path"),
            "three": (inet, ("127.0.0.1", 1, 2)),
            "list": (inet, ["127.0.0.1", 9]),
            "None": (inet, None),
            "host None": (inet, (None, closed[1])),
            "host int": (inet, (3, 9)),
            "host bytes": (inet, (b"127.0.0.1", closed[1])),
            "host empty": (inet, ("", closed[1])),
            "flow": (inet6, ("::1", closed[1], 1 << 20)),
            "scope": (inet6, ("::1", closed[1], 0, 1 << 32)),
            "no such scope": (inet6, ("fe80::1%nothing0", closed[1])),
            "five": (inet6, ("::1", closed[1], 0, 0, 0)),
            "missing path": (unix, f"{tmp_path}/missing"),
            "missing path-like": (unix, tmp_path / "missing"),
            "missing bytes": (unix, os.fsencode(f"{tmp_path}/missing")),
            "missing abstract": (unix, b"\0missing"),
            "long": (unix, "x" * 108),
            "longer": (unix, "x" * 109),
            "long abstract": (unix, b"\0" + b"x" * 108),
            "empty": (unix, ""),
            "nul": (unix, f"{tmp_path}/a\0b"),
            "file": (unix, f"{tmp_path}/a-file"),
            "directory": (unix, str(tmp_path)),
            "datagram": (unix, dgram.getsockname()),
            "not listening": (unix, not_listening.getsockname()),
            "tuple": (unix, ("127.0.0.1", 9)),
        }
        for name, (family, address) in attempts.items():
            sock = world.new(family)
            results[name] = await tried(sock.connect, address), sock.fileno() >= 0
        sock = world.new()
        await sock.connect(listener.getsockname())
        await tried(sock.connect, listener.getsockname())  # to the kernel, the first may not have ended until now
        results["connected already"] = await tried(sock.connect, listener.getsockname())
        sock.close()
        results["closed"] = await tried(sock.connect, listener.getsockname())
        results["listener"] = await tried(listener.connect, listener.getsockname())
        return results

    results = same(connect)
    assert results["refused"] == ((ConnectionRefusedError, errno.ECONNREFUSED), True)
    assert results["no such name"][0][0] is socket.gaierror


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_failed_connect_tells_the_address(same: Any, family: int, host: str) -> None:
    async def connect(world: World) -> Any:
        with pytest.raises(OSError, match=r"Error connecting to .+: ") as caught:
            await world.new(family).connect((host, 1))
        return str(caught.value)

    same(connect)


@pytest.mark.parametrize("kind", ["udp", "udp6", "unix dgram"])
def test_connect_of_datagram_sockets(same: Any, kind: str) -> None:
    async def connect(world: World) -> Any:
        a, _ = await world.pair(kind)
        other = await world.bound(*NAMED[kind][:2])
        results = [await tried(a.connect, other.getsockname()), await tried(a.connect, 9)]
        if kind.startswith("udp"):
            other.close()
            results += [await tried(a.send, b"x"), await tried(a.recv, 9), await tried(a.send, b"x")]
        return results

    same(connect)


async def test_a_cancelled_connect_closes_the_socket(world: World, bench: Any) -> None:
    address = bench.deaf_listener().getsockname()
    for early in (True, False):
        sock = world.new()
        async with trio.open_nursery() as nursery:
            if early:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await sock.connect(address)
            else:
                attempt = await parked(nursery, sock.connect, address)
                assert await attempt.cancel()
        assert sock.fileno() == -1


@pytest.mark.native("beside trio's own I/O manager each of the two knows its own waiters only")
async def test_two_connects(world: World, bench: Any) -> None:
    address = bench.deaf_listener().getsockname()
    sock = world.new()
    async with trio.open_nursery() as nursery:
        first = await parked(nursery, sock.connect, address)
        assert await tried(sock.connect, address) == (trio.BusyResourceError, None)
        sock.close()
        with pytest.raises(trio.ClosedResourceError):
            await first.result()


async def test_a_full_backlog_of_a_unix_listener(world: World) -> None:
    """No poll tells when there is room. The kernel says so, where stock trio takes that for a connection."""
    listener = world.new(socket.AF_UNIX)
    await listener.bind(world.path())
    listener.listen(0)
    await world.new(socket.AF_UNIX).connect(listener.getsockname())
    late = world.new(socket.AF_UNIX)
    assert await tried(late.connect, listener.getsockname()) == (BlockingIOError, errno.EAGAIN)
    world.own((await listener.accept())[0])
    await late.connect(listener.getsockname())
    world.own((await listener.accept())[0])


# Accepting


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix", "unix abstract", "unix seqpacket"])
def test_accept(same: Any, kind: str) -> None:
    family, type_, abstract = NAMED[kind]

    async def accept(world: World) -> Any:
        listener = await world.listener(family, type_, abstract=abstract)
        results: list[Any] = []
        for waits, named in itertools.product((False, True), (False, True)):
            client = world.new(family, type_)
            if named:
                await client.bind(world.address(family, abstract=abstract))
            async with trio.open_nursery() as nursery:
                if waits:
                    attempt = await parked(nursery, listener.accept)
                    await client.connect(listener.getsockname())
                else:
                    await client.connect(listener.getsockname())
                    attempt = Attempt(nursery, listener.accept)
                sock, address = await attempt.result()
            world.own(sock)
            who = {client.getsockname(): "client", listener.getsockname(): "listener"} if named else {}
            plain = (address == client.getsockname(), type(address))
            results.append((who.get(address), plain, sock.family, sock.type, sock.proto, sock.get_inheritable()))
            results.append((os.get_blocking(sock.fileno()), type(sock) is type(listener), sock._sock.gettimeout()))
            results.append(sock.getpeername() == client.getsockname())
        return results

    same(accept)


def test_an_accepted_socket_is_of_its_listeners_protocol(same: Any) -> None:
    async def accept(world: World) -> Any:
        listener = world.new(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        await world.new().connect(listener.getsockname())
        return world.own((await listener.accept())[0]).proto

    assert same(accept) == socket.IPPROTO_TCP


def test_accept_errors(same: Any) -> None:
    async def accept(world: World) -> Any:
        a, _ = await world.pair("tcp")
        u, _ = await world.pair("udp")
        closed = await world.listener(socket.AF_INET)
        closed.close()
        return [await tried(sock.accept) for sock in (world.new(), a, u, closed, world.new(socket.AF_UNIX))]

    same(accept)


# Closing, shutting down, handing on


METHODS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    **RECEIVES,
    **SENDS,
    "accept": lambda a: a.accept(),
    "connect": lambda a: a.connect(("127.0.0.1", 9)),
    "bind": lambda a: a.bind(("127.0.0.1", 0)),
    "sendto": lambda a: a.sendto(b"x", ("127.0.0.1", 9)),
    "wait_writable": lambda a: a.wait_writable(),
    "receive_some": lambda a: trio.SocketStream(a).receive_some(),
    "receive_some 1": lambda a: trio.SocketStream(a).receive_some(1),
    "receive_some 0": lambda a: trio.SocketStream(a).receive_some(0),
    "send_all": lambda a: trio.SocketStream(a).send_all(b"x"),
    "send_all a view": lambda a: trio.SocketStream(a).send_all(memoryview(b"x")),
    "send_eof": lambda a: trio.SocketStream(a).send_eof(),
    "might not block": lambda a: trio.SocketStream(a).wait_send_all_might_not_block(),
}


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("how", ["close", "detach", "with"])
def test_closed(same: Any, how: str) -> None:
    async def use(world: World) -> Any:
        a, b = await world.pair("tcp")
        if how == "close":
            a.close()
            a.close()
        elif how == "with":
            with a as same_one:
                assert same_one is a
        else:
            os.close(a.detach())
            assert a.detach() == -1
        ways = {
            name: call for name, call in METHODS.items() if name != "wait_writable"
        }  # where trio's error is epoll's
        results: dict[str, Any] = {name: await tried(call, a) for name, call in ways.items()}
        for name in ("getpeername", "getsockname", "listen", "is_readable", "get_inheritable", "dup"):
            try:
                results[name] = getattr(a, name)()
            except (OSError, ValueError) as exc:
                results[name] = error(exc)
        return {**results, "after": (a.fileno(), await b.recv(9), repr(a))}

    same(use)


@pytest.mark.usefixtures("traffic")
def test_unconnected(same: Any) -> None:
    async def use(world: World) -> Any:
        ways = {name: call for name, call in METHODS.items() if name != "connect"}
        return {name: await tried(call, world.new()) for name, call in ways.items()}

    same(use)


def test_outside_of_a_run(doors_open: None) -> None:
    """A socket is left to somebody else, or to the end of its block."""
    a, b = sockets().socketpair()
    assert type(a) is UringSocket
    with b:
        os.close(a.detach())
    assert (a.fileno(), b.fileno()) == (-1, -1)


def test_half_close(same: Any) -> None:
    async def use(world: World) -> Any:
        results: list[Any] = []
        for kind in STREAMS:
            for how in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
                a, b = await world.pair(kind)
                async with trio.open_nursery() as nursery:
                    reader = await parked(nursery, tried, a.recv, 9)
                    a.shutdown(how)
                    if how == socket.SHUT_WR:
                        results.append(await b.recv(9))
                        await b.send(b"to the last")
                    results.append(await reader.result())
                results += [a.did_shutdown_SHUT_WR, await tried(a.send, b"x")]
                a.close()
                b.close()
        try:
            world.new().shutdown(socket.SHUT_WR)
        except OSError as exc:
            results.append(error(exc))
        return results

    same(use)


def test_the_rest(same: Any) -> None:
    """What does no I/O."""

    async def use(world: World) -> Any:
        a, b = await world.pair("tcp")
        results: list[Any] = [a.is_readable(), a.family, a.type, a.proto]
        await b.send(b"x")
        with trio.fail_after(9):
            while not a.is_readable():
                await trio.lowlevel.checkpoint()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", [1, 5]).tobytes())
        results += [
            a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            a.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8),
            a.get_inheritable(),
            await a.wait_writable(),
            a.getsockname() == b.getpeername(),
            repr(a).startswith("<trio.socket.socket "),
            isinstance(a, trio.socket.SocketType),
        ]
        a.set_inheritable(True)
        results.append(a.get_inheritable())
        with a.dup() as c:
            assert type(c) is type(a)
            a.close()
            results += [c.fileno() >= 0, await c.recv(9), await c.send(b"y"), await b.recv(9), c.get_inheritable()]
        results.append(await b.recv(9))
        return results

    same(use)


def test_bind_and_listen(same: Any) -> None:
    async def use(world: World) -> Any:
        path = world.path()
        unix, again = world.new(socket.AF_UNIX), world.new(socket.AF_UNIX)
        results = [
            await tried(unix.bind, path),
            await tried(again.bind, path),
            await tried(again.bind, ("x", 1)),
            await tried(world.new().bind, ("127.0.0.1", 70000)),
            await tried(world.new().bind, ("8.8.8.8", 0)),
            await tried(world.new().bind, "path"),
            os.path.basename(unix.getsockname()) == os.path.basename(path),
        ]
        listener = world.new()
        await listener.bind(("localhost", 0))
        results += [listener.listen(), listener.listen(5)]
        client = world.new()
        await client.connect(listener.getsockname())
        world.own((await listener.accept())[0])
        return results

    same(use)


@pytest.mark.parametrize("kind", ["tcp", "pair stream", "udp"])
def test_blocking_and_shared_sockets(same: Any, kind: str) -> None:
    """Somebody else has the file, and makes it block; or we have it from somebody else."""

    async def use(world: World) -> Any:
        a, b = await world.pair(kind)
        results: list[Any] = []
        shared = world.own(sockets().fromfd(a.fileno(), a.family, a.type))
        adopted = world.own(sockets().from_stdlib_socket(socket.socket(fileno=b.detach())))
        results.append([os.get_blocking(sock.fileno()) for sock in (a, shared, adopted)])
        for reader in (a, shared):
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, reader.recv, 9)
                await adopted.send(b"x")
                results.append(await attempt.result())
        if manager_or_none() is not None:  # a plain call would block
            os.set_blocking(shared.fileno(), True)
            if kind != "udp":
                async with trio.open_nursery() as nursery:
                    attempt = await parked(nursery, a.recv, 9)
                    await adopted.send(b"x")
                    assert await attempt.result() == b"x"
            os.set_blocking(shared.fileno(), False)
        return results

    same(use)


def test_a_child_has_it_as_well(same: Any) -> None:
    async def use(world: World) -> Any:
        a, b = await world.pair("pair stream")
        os.set_blocking(b.fileno(), True)
        script = "read -r line; echo $line $line; read -r line; echo done"
        with subprocess.Popen(["/bin/sh", "-c", script], stdin=b.fileno(), stdout=b.fileno()) as child:
            b.close()
            await a.send(b"twice\n")
            got = b""
            while not got.endswith(b"\n"):
                got += await a.recv(99)
            a.shutdown(socket.SHUT_WR)
            end = b""
            while chunk := await a.recv(99):
                end += chunk
            child.wait()
        return got, end

    assert same(use) == (b"twice twice\n", b"done\n")


def test_busy(same: Any) -> None:
    async def use(world: World) -> Any:
        results: list[Any] = []
        for kind in ("tcp", "pair stream", "udp"):
            for first, second in itertools.product(("recv", "recv_into", "recvmsg"), repeat=2):
                a, b = await world.pair(kind)
                async with trio.open_nursery() as nursery:
                    attempt = await parked(nursery, RECEIVES[first], a)
                    results.append((kind, first, second, await tried(RECEIVES[second], a)))
                    await b.send(b"x")
                    await attempt.result()
        listener = await world.listener(socket.AF_INET)
        async with trio.open_nursery() as nursery:
            await parked(nursery, listener.accept)
            results.append(await tried(listener.accept))
            nursery.cancel_scope.cancel()
        return results

    assert same(use)[0][-1] == (trio.BusyResourceError, None)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("name", ["recv", "recvfrom", "recvmsg", "recvmsg_into"])
def test_two_that_wait_for_one_message(same: Any, kind: str, name: str) -> None:
    """Both are told that there is something. Who finds nothing any more waits on."""

    async def use(world: World) -> Any:
        a, b = await world.pair(kind)
        c = world.own(a.dup())
        async with trio.open_nursery() as nursery:
            attempts = [await parked(nursery, tried, RECEIVES[name], sock) for sock in (a, c)]
            done = []
            for _ in attempts:
                await b.send(b"abcdef")
                await trio.testing.wait_all_tasks_blocked()
                done.append(sum(attempt.done for attempt in attempts))
            who = addresses_of(a, b)
            results = [anonymous(await attempt.result(), who) for attempt in attempts]
        return done, results

    assert same(use)[0] == [1, 2]


@pytest.mark.native("beside trio's own I/O manager each of the two knows its own waiters only")
@pytest.mark.usefixtures("traffic")
def test_busy_senders(same: Any) -> None:
    async def use(world: World) -> Any:
        a, _ = await world.pair("pair stream")
        stream = trio.SocketStream(a)
        async with trio.open_nursery() as nursery:
            await parked(nursery, stream.send_all, bytes(10 << 20))
            ways: list[Any] = [lambda data=data: a.send(data) for data in (b"x", bytearray(b"x"), memoryview(b"x"))]
            ways += [lambda: a.sendmsg([b"x"]), lambda: stream.send_all(b"x"), stream.send_eof, a.wait_writable]
            ways += [stream.wait_send_all_might_not_block]
            results = [await tried(way) for way in ways]
            nursery.cancel_scope.cancel()
        return [result[0] for result in results]

    assert set(same(use)) == {trio.BusyResourceError}


def test_a_reset(same: Any) -> None:
    async def use(world: World) -> Any:
        results: list[Any] = []
        for name, waits in itertools.product(("recv", "recv_into", "recvmsg", "receive_some"), (False, True)):
            a, b = await world.pair("tcp")
            b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", [1, 0]).tobytes())
            async with trio.open_nursery() as nursery:
                if waits:
                    attempt = await parked(nursery, tried, METHODS[name], a)
                    b.close()
                else:
                    b.close()
                    attempt = Attempt(nursery, tried, METHODS[name], a)
                results.append(await attempt.result())
            results += [await tried(a.recv, 9), await tried(a.send, b"x")]
        return results

    assert same(use)[0] == (ConnectionResetError, errno.ECONNRESET)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ["receive_some", "send_all", "send_all a view"])
def test_what_has_broken_a_stream_is_told(same: Any, name: str) -> None:
    async def use(world: World) -> Any:
        a, b = await world.pair("tcp")
        b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", [1, 0]).tobytes())
        b.close()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await METHODS[name](a)
        cause = caught.value.__cause__
        assert cause is not None
        return error(caught.value), error(cause)

    assert same(use)[1][0] in (ConnectionResetError, BrokenPipeError)


@pytest.mark.usefixtures("traffic")
def test_the_number_is_no_socket_any_more(same: Any) -> None:
    """Somebody has closed it and opened a file: a stream calls that closed, as trio does."""

    async def use(world: World) -> Any:
        results = {}
        for name in ("receive_some", "receive_some 1", "send_all", "send_all a view"):
            a, _ = await world.pair("pair stream")
            with open("/dev/null") as file:
                os.dup2(file.fileno(), a.fileno())
            results[name] = await tried(METHODS[name], a)
        return results

    assert set(same(use).values()) == {(trio.ClosedResourceError, None)}


def test_other_families(same: Any) -> None:
    """What we know nothing about is trio's."""

    async def use(world: World) -> Any:
        netlink = world.new(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        await netlink.bind((0, 0))
        # RTM_GETLINK for all links
        request = array.array("I", [20, 18 | 0x301 << 16, 7, 0, 17]).tobytes()
        results: list[Any] = [await netlink.sendto(request, (0, 0))]
        data, address = await netlink.recvfrom(1 << 16)
        results += [address, int.from_bytes(data[8:12], "little"), await tried(netlink.accept)]
        try:
            crypto = world.new(socket.AF_ALG, socket.SOCK_SEQPACKET, 0)
            await crypto.bind(("hash", "sha256"))
            operation, nobody = await crypto.accept()
        except OSError:
            return results
        await world.own(operation).send(b"abc")
        return [*results, await operation.recv(99), nobody]

    same(use)


# Everything mixed


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 1), st.binary(max_size=40)),
        st.tuples(st.just("send"), st.integers(0, 1), st.sampled_from([bytes(16384), bytes(20000), bytes(32768)])),
        st.tuples(st.just("recv"), st.integers(0, 1), st.sampled_from([1, 7, 16384, 16385, 65536])),
        st.tuples(st.just("recv_into"), st.integers(0, 1), st.sampled_from([1, 7, 16384, 50000])),
        st.tuples(st.just("recvmsg"), st.integers(0, 1), st.sampled_from([7, 50000])),
        st.tuples(st.just("shutdown"), st.integers(0, 1), st.sampled_from([0, 1, 2])),
        st.tuples(st.just("close"), st.integers(0, 1), st.just(0)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["pair stream", "pair seqpacket"])
@pytest.mark.seconds(120)
def test_random_scenarios(kind: str, mount: Mount, doors_open: None, traffic: bool) -> None:
    async def one(pair: tuple[Any, Any], what: str, who: int, argument: Any) -> Any:
        sock = pair[who]
        if what in ("send", "recv", "recvmsg"):
            call = getattr(sock, what)
            result = await tried(call, argument)
        elif what == "recv_into":
            buffer = bytearray(argument)
            result = await tried(sock.recv_into, buffer), bytes(buffer)
        else:
            try:
                result = sock.shutdown(argument) if what == "shutdown" else sock.close()
            except OSError as exc:
                result = error(exc)
        return result

    async def play(steps: list[tuple[str, int, Any]]) -> list[Any]:
        pair = sockets().socketpair(socket.AF_UNIX, KINDS[kind.removeprefix("pair ")])
        results: list[Any] = []
        try:
            for step in steps:
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        attempt = Attempt(nursery, one, pair, *step)
                        await trio.testing.wait_all_tasks_blocked()
                        if not attempt.done:  # it waits, in both
                            scope.cancel()
                results.append("waits" if attempt.cancelled or scope.cancelled_caught else attempt.value)
        finally:
            for sock in pair:
                sock.close()
        return results

    async def all_of(examples: list[Any]) -> list[Any]:
        return [await play(steps) for steps in examples]

    examples: list[Any] = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(_steps)
    def collect(steps: list[Any]) -> None:
        examples.append(steps)

    collect()
    expected, got = trio.run(all_of, examples), mount.run(all_of, examples)
    for steps, one_expected, one_got in zip(examples, expected, got, strict=True):
        assert one_got == one_expected, steps
