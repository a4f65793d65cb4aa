"""Each operation once: a call that completes at once, and one that blocks."""

from __future__ import annotations

import dataclasses
import os
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.helpers import Bench, drain
from trio_uring import lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Call = Callable[[], Awaitable[object]]
    Unblock = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """How to call an operation.

    Attributes:
        ready: a call that completes at once, and would again if it had not happened.
        blocked: a call that blocks, and what makes the next such call complete. It fails if the first one left a trace.
    """

    ready: Callable[[Bench], Call]
    blocked: Callable[[Bench], tuple[Call, Unblock]] | None = None


def _expect(value: object, call: Call) -> Call:
    async def checked() -> None:
        assert await call() == value

    return checked


def _closing(call: Callable[[], Awaitable[Any]]) -> Call:
    async def closed() -> None:
        result = await call()
        os.close(result[0] if isinstance(result, tuple) else result)

    return closed


def _read_ready(bench: Bench) -> Call:
    return _expect(5, partial(lowlevel.read, bench.file(b"hello"), bytearray(9)))


def _readv_ready(bench: Bench) -> Call:
    return _expect(5, partial(lowlevel.readv, bench.file(b"hello"), [bytearray(2), bytearray(7)]))


def _write_ready(bench: Bench) -> Call:
    return _expect(5, partial(lowlevel.write, bench.file(), b"hello"))


def _writev_ready(bench: Bench) -> Call:
    return _expect(5, partial(lowlevel.writev, bench.file(), [b"he", b"llo"]))


def _blocked_reading(function: Callable[[int, Any], Awaitable[int]], target: Any) -> Any:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        read_end, write_end = bench.pipe()
        return _expect(5, partial(function, read_end, target)), lambda: os.write(write_end, b"hello")

    return blocked


def _blocked_writing(function: Callable[[int, Any], Awaitable[int]], source: Any) -> Any:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        read_end, write_end, size = bench.full_pipe()

        def unblock() -> None:
            assert drain(read_end, size) == bytes(size)
            assert select.select([read_end], [], [], 0)[0] == []

        return _expect(5, partial(function, write_end, source)), unblock

    return blocked


def _receiving(function: Callable[[socket.socket, Any], Awaitable[object]], target: Any, result: object) -> Case:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        a, b = bench.sockets()
        return _expect(result, partial(function, a, target)), partial(b.send, b"hello")

    def ready(bench: Bench) -> Call:
        call, unblock = blocked(bench)
        unblock()
        return call

    return Case(ready, blocked)


def _sending(function: Callable[[socket.socket, Any], Awaitable[object]], source: Any) -> Case:
    def ready(bench: Bench) -> Call:
        return _expect(5, partial(function, bench.sockets()[0], source))

    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        a, b, size = bench.full_socket()

        def unblock() -> None:
            assert drain(b.fileno(), size) == bytes(size)
            assert select.select([b], [], [], 0)[0] == []

        return _expect(5, partial(function, a, source)), unblock

    return Case(ready, blocked)


def _accept_blocked(bench: Bench) -> tuple[Call, Unblock]:
    listener = bench.listener()
    return _closing(partial(lowlevel.accept, listener)), lambda: bench.new_socket().connect(listener.getsockname())


def _accept_ready(bench: Bench) -> Call:
    call, unblock = _accept_blocked(bench)
    unblock()
    return call


def _connect_ready(bench: Bench) -> Call:
    return partial(lowlevel.connect, bench.new_socket(), bench.listener().getsockname())


def _connect_blocked(bench: Bench) -> tuple[Call, Unblock]:
    client, listener, another = bench.new_socket(), bench.deaf_listener(), bench.listener()
    addresses = iter((listener.getsockname(), another.getsockname()))
    clients = iter((client, bench.new_socket()))  # a cancelled connect spoils its socket

    return lambda: lowlevel.connect(next(clients), next(addresses)), lambda: None


def _close_ready(bench: Bench) -> Call:
    fd = os.open(os.devnull, os.O_RDONLY)  # kept by nobody: if the call fails to close it, the leak check finds it
    return partial(lowlevel.close, fd)


def _poll_blocked(bench: Bench) -> tuple[Call, Unblock]:
    read_end, write_end = bench.pipe()
    return _expect(select.POLLIN, partial(lowlevel.poll, read_end, select.POLLIN)), lambda: os.write(write_end, b"x")


def _poll_ready(bench: Bench) -> Call:
    return _expect(select.POLLOUT, partial(lowlevel.poll, bench.pipe()[1], select.POLLOUT | select.POLLIN))


def _timeout_blocked(bench: Bench) -> tuple[Call, Unblock]:
    durations = iter((1e6, 0.0))
    return lambda: lowlevel.timeout(next(durations)), lambda: None


CASES = {
    "read": Case(_read_ready, _blocked_reading(lowlevel.read, bytearray(9))),
    "write": Case(_write_ready, _blocked_writing(lowlevel.write, b"hello")),
    "readv": Case(_readv_ready, _blocked_reading(lowlevel.readv, [bytearray(2), bytearray(7)])),
    "writev": Case(_writev_ready, _blocked_writing(lowlevel.writev, [b"he", b"llo"])),
    "fsync": Case(lambda bench: partial(lowlevel.fsync, bench.file())),
    "fdatasync": Case(lambda bench: partial(lowlevel.fdatasync, bench.file())),
    "openat": Case(lambda bench: _closing(partial(lowlevel.openat, bench.path(), os.O_RDONLY))),
    "close": Case(_close_ready),
    "statx": Case(lambda bench: partial(lowlevel.statx, bench.path())),
    "socket": Case(lambda bench: _closing(lowlevel.socket)),
    "accept": Case(_accept_ready, _accept_blocked),
    "connect": Case(_connect_ready, _connect_blocked),
    "shutdown": Case(lambda bench: partial(lowlevel.shutdown, bench.sockets()[0], socket.SHUT_WR)),
    "send": _sending(lowlevel.send, b"hello"),
    "recv": _receiving(lowlevel.recv, bytearray(9), 5),
    "sendmsg": _sending(lowlevel.sendmsg, [b"he", b"llo"]),
    "recvmsg": _receiving(lowlevel.recvmsg, 9, (b"hello", [], 0, None)),
    "poll": Case(_poll_ready, _poll_blocked),
    "timeout": Case(lambda bench: partial(lowlevel.timeout, 0), _timeout_blocked),
    "nop": Case(lambda bench: lowlevel.nop),
    "async_cancel": Case(lambda bench: _expect(0, partial(lowlevel.async_cancel, bench.file()))),
}

BLOCKING = [name for name, case in CASES.items() if case.blocked]
