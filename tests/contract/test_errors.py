"""Errors are those of the standard library: the same class, errno and file name for the same failing call."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests import libc
from tests.helpers import Attempt, nothing_submitted, parked
from trio_uring import lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from tests.helpers import Bench

UNUSED_FD = 9999
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS, UNUSED_FD.to_bytes(4, "little"))


class Place:
    """Objects on which calls fail."""

    def __init__(self, bench: Bench) -> None:
        self.directory = bench.directory
        self.directory_fd = bench.keep(os.open(self.directory, os.O_RDONLY))
        self.missing = self.directory / "missing"
        self.path = bench.path(b"content")
        self.below_a_file = self.path / "below"
        self.link = self.directory / "link"
        self.link.symlink_to("link")
        self.read_only = bench.keep(os.open(self.path, os.O_RDONLY))
        self.write_only = bench.keep(os.open(self.path, os.O_WRONLY))
        self.full = bench.keep(os.open("/dev/full", os.O_WRONLY))
        self.pipe = bench.pipe()
        _, self.broken_pipe = bench.pipe()
        os.close(_)
        bench.closed(_)
        self.tcp = bench.new_socket()
        self.udp = bench.new_socket(kind=socket.SOCK_DGRAM)
        self.connected_udp = bench.new_socket(kind=socket.SOCK_DGRAM)
        self.connected_udp.connect(("127.0.0.1", 9))
        self.unix = bench.new_socket(socket.AF_UNIX)
        self.unix_datagram = bench.new_socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.broken, peer = bench.sockets()
        peer.close()
        listener = bench.listener()
        self.nobody_listens = listener.getsockname()
        listener.close()


# A failing call, and the standard library's.
FAILURES: dict[str, tuple[Callable[[Place], Awaitable[object]], Callable[[Place], object]]] = {
    "open missing": (lambda p: lowlevel.openat(p.missing, os.O_RDONLY), lambda p: os.open(p.missing, os.O_RDONLY)),
    "open missing str": (
        lambda p: lowlevel.openat(str(p.missing), os.O_RDONLY),
        lambda p: os.open(str(p.missing), os.O_RDONLY),
    ),
    "open missing bytes": (
        lambda p: lowlevel.openat(bytes(p.missing), os.O_RDONLY),
        lambda p: os.open(bytes(p.missing), os.O_RDONLY),
    ),
    "open relative": (
        lambda p: lowlevel.openat("missing", os.O_RDONLY, dir_fd=p.directory_fd),
        lambda p: os.open("missing", os.O_RDONLY, dir_fd=p.directory_fd),
    ),
    "open below a file": (
        lambda p: lowlevel.openat(p.below_a_file, os.O_RDONLY),
        lambda p: os.open(p.below_a_file, os.O_RDONLY),
    ),
    "open relative to a file": (
        lambda p: lowlevel.openat("x", os.O_RDONLY, dir_fd=p.read_only),
        lambda p: os.open("x", os.O_RDONLY, dir_fd=p.read_only),
    ),
    "open a directory for writing": (
        lambda p: lowlevel.openat(p.directory, os.O_WRONLY),
        lambda p: os.open(p.directory, os.O_WRONLY),
    ),
    "open exclusively": (
        lambda p: lowlevel.openat(p.path, os.O_CREAT | os.O_EXCL),
        lambda p: os.open(p.path, os.O_CREAT | os.O_EXCL),
    ),
    "open a circle of links": (lambda p: lowlevel.openat(p.link, os.O_RDONLY), lambda p: os.open(p.link, os.O_RDONLY)),
    "open a long name": (lambda p: lowlevel.openat("x" * 300, os.O_RDONLY), lambda p: os.open("x" * 300, os.O_RDONLY)),
    "open nothing": (lambda p: lowlevel.openat("", os.O_RDONLY), lambda p: os.open("", os.O_RDONLY)),
    "open null": (lambda p: lowlevel.openat("a\0b", os.O_RDONLY), lambda p: os.open("a\0b", os.O_RDONLY)),
    "stat missing": (lambda p: lowlevel.statx(p.missing), lambda p: os.stat(p.missing)),
    "stat below a file": (lambda p: lowlevel.statx(p.below_a_file), lambda p: os.stat(p.below_a_file)),
    "stat relative": (
        lambda p: lowlevel.statx("missing", dir_fd=p.directory_fd),
        lambda p: os.stat("missing", dir_fd=p.directory_fd),
    ),
    "stat a closed fd": (lambda p: lowlevel.statx(UNUSED_FD), lambda p: os.stat(UNUSED_FD)),
    "stat null": (lambda p: lowlevel.statx("a\0b"), lambda p: os.stat("a\0b")),
    "read a closed fd": (lambda p: lowlevel.read(UNUSED_FD, bytearray(1)), lambda p: os.read(UNUSED_FD, 1)),
    "read a negative fd": (lambda p: lowlevel.read(-1, bytearray(1)), lambda p: os.read(-1, 1)),
    "read a huge fd": (lambda p: lowlevel.read(1 << 40, bytearray(1)), lambda p: os.read(1 << 40, 1)),
    "read what is write-only": (
        lambda p: lowlevel.read(p.write_only, bytearray(1)),
        lambda p: os.read(p.write_only, 1),
    ),
    "read a directory": (lambda p: lowlevel.read(p.directory_fd, bytearray(1)), lambda p: os.read(p.directory_fd, 1)),
    "read at a negative offset": (
        lambda p: lowlevel.read(p.read_only, bytearray(1), -5),
        lambda p: os.pread(p.read_only, 1, -5),
    ),
    "readv of a closed fd": (
        lambda p: lowlevel.readv(UNUSED_FD, [bytearray(1)]),
        lambda p: os.readv(UNUSED_FD, [bytearray(1)]),
    ),
    "readv of too many": (
        lambda p: lowlevel.readv(p.read_only, [bytearray(1)] * 1025),
        lambda p: os.readv(p.read_only, [bytearray(1)] * 1025),
    ),
    "write what is read-only": (lambda p: lowlevel.write(p.read_only, b"x"), lambda p: os.write(p.read_only, b"x")),
    "write to a broken pipe": (lambda p: lowlevel.write(p.broken_pipe, b"x"), lambda p: os.write(p.broken_pipe, b"x")),
    "write to a full device": (lambda p: lowlevel.write(p.full, b"x"), lambda p: os.write(p.full, b"x")),
    "writev to a full device": (lambda p: lowlevel.writev(p.full, [b"x"]), lambda p: os.writev(p.full, [b"x"])),
    "fsync a pipe": (lambda p: lowlevel.fsync(p.pipe[1]), lambda p: os.fsync(p.pipe[1])),
    "fdatasync a pipe": (lambda p: lowlevel.fdatasync(p.pipe[1]), lambda p: os.fdatasync(p.pipe[1])),
    "fsync a closed fd": (lambda p: lowlevel.fsync(UNUSED_FD), lambda p: os.fsync(UNUSED_FD)),
    "close a closed fd": (lambda p: lowlevel.close(UNUSED_FD), lambda p: os.close(UNUSED_FD)),
    "socket of no family": (lambda p: lowlevel.socket(99), lambda p: socket.socket(99)),
    "socket of no type": (lambda p: lowlevel.socket(type=99), lambda p: socket.socket(type=99)),
    "connect where nobody listens": (
        lambda p: lowlevel.connect(p.tcp, p.nobody_listens),
        lambda p: p.tcp.connect(p.nobody_listens),
    ),
    "connect to a missing path": (
        lambda p: lowlevel.connect(p.unix, str(p.missing)),
        lambda p: p.unix.connect(str(p.missing)),
    ),
    "connect a file": (
        lambda p: lowlevel.connect(p.read_only, p.nobody_listens),
        lambda p: socket.socket(fileno=p.read_only),
    ),
    "accept without listening": (lambda p: lowlevel.accept(p.tcp), lambda p: p.tcp.accept()),
    "accept on UDP": (lambda p: lowlevel.accept(p.udp), lambda p: p.udp.accept()),
    "shutdown unconnected": (
        lambda p: lowlevel.shutdown(p.tcp, socket.SHUT_RD),
        lambda p: p.tcp.shutdown(socket.SHUT_RD),
    ),
    "shutdown nonsense": (lambda p: lowlevel.shutdown(p.broken, 9), lambda p: p.broken.shutdown(9)),
    "send unconnected": (lambda p: lowlevel.send(p.udp, b"x"), lambda p: p.udp.send(b"x")),
    "send to a closed peer": (lambda p: lowlevel.send(p.broken, b"x"), lambda p: p.broken.send(b"x")),
    "send too much": (
        lambda p: lowlevel.send(p.connected_udp, bytes(70_000)),
        lambda p: p.connected_udp.send(bytes(70_000)),
    ),
    "sendmsg unconnected": (lambda p: lowlevel.sendmsg(p.udp, [b"x"]), lambda p: p.udp.sendmsg([b"x"])),
    "sendmsg a closed fd's rights": (
        lambda p: lowlevel.sendmsg(p.broken, [b"x"], [RIGHTS]),
        lambda p: p.broken.sendmsg([b"x"], [RIGHTS]),
    ),
    "recv unconnected": (lambda p: lowlevel.recv(p.tcp, bytearray(1)), lambda p: p.tcp.recv(1)),
    "recvmsg unconnected": (lambda p: lowlevel.recvmsg(p.tcp, 1), lambda p: p.tcp.recvmsg(1)),
    "recvfrom unconnected": (lambda p: lowlevel.recvfrom(p.tcp, 1), lambda p: p.tcp.recvfrom(1)),
    "recvfrom nothing": (lambda p: lowlevel.recvfrom(p.tcp, -1), lambda p: p.tcp.recvfrom(-1)),
    "sendto a missing path": (
        lambda p: lowlevel.sendto(p.unix_datagram, b"x", str(p.missing)),
        lambda p: p.unix_datagram.sendto(b"x", str(p.missing)),
    ),
    "bind a foreign address": (
        lambda p: lowlevel.bind(p.tcp, ("192.0.2.1", 0)),
        lambda p: p.tcp.bind(("192.0.2.1", 0)),
    ),
    "bind an address in use": (
        lambda p: lowlevel.bind(p.unix, str(p.path)),
        lambda p: p.unix.bind(str(p.path)),
    ),
    "listen on UDP": (lambda p: lowlevel.listen(p.udp, 1), lambda p: p.udp.listen(1)),
    "getsockopt of no option": (
        lambda p: lowlevel.getsockopt(p.tcp, socket.IPPROTO_TCP, 9999),
        lambda p: p.tcp.getsockopt(socket.IPPROTO_TCP, 9999),
    ),
    "setsockopt too short": (
        lambda p: lowlevel.setsockopt(p.tcp, socket.IPPROTO_TCP, socket.TCP_NODELAY, b"x"),
        lambda p: p.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, b"x"),
    ),
    "rename missing": (
        lambda p: lowlevel.renameat2(p.missing, p.path),
        lambda p: os.rename(p.missing, p.path),
    ),
    "rename relative": (
        lambda p: lowlevel.renameat2("missing", b"new", src_dir_fd=p.directory_fd, dst_dir_fd=p.directory_fd),
        lambda p: os.rename("missing", b"new", src_dir_fd=p.directory_fd, dst_dir_fd=p.directory_fd),
    ),
    "rename relative to a closed fd": (
        lambda p: lowlevel.renameat2(p.path, "new", dst_dir_fd=UNUSED_FD),
        lambda p: os.rename(p.path, "new", dst_dir_fd=UNUSED_FD),
    ),
    "rename to a huge fd": (
        lambda p: lowlevel.renameat2(p.path, "new", dst_dir_fd=1 << 32),
        lambda p: os.rename(p.path, "new", dst_dir_fd=1 << 32),
    ),
    "rename a directory to a file": (
        lambda p: lowlevel.renameat2(p.directory, p.path),
        lambda p: os.rename(p.directory, p.path),
    ),
    "link what is there": (lambda p: lowlevel.linkat(p.path, p.link), lambda p: os.link(p.path, p.link)),
    "link null": (lambda p: lowlevel.linkat(p.path, "a\0b"), lambda p: os.link(p.path, "a\0b")),
    "symlink what is there": (lambda p: lowlevel.symlinkat("x", p.link), lambda p: os.symlink("x", p.link)),
    "unlink missing": (lambda p: lowlevel.unlinkat(bytes(p.missing)), lambda p: os.unlink(bytes(p.missing))),
    "unlink a directory": (lambda p: lowlevel.unlinkat(p.directory), lambda p: os.unlink(p.directory)),
    "rmdir a full directory": (
        lambda p: lowlevel.unlinkat(p.directory, libc.AT_REMOVEDIR),
        lambda p: os.rmdir(p.directory),
    ),
    "mkdir what is there": (lambda p: lowlevel.mkdirat(p.directory), lambda p: os.mkdir(p.directory)),
    "getxattr of none": (
        lambda p: lowlevel.getxattr(p.path, "user.none"),
        lambda p: os.getxattr(p.path, "user.none"),
    ),
    "fgetxattr of a closed fd": (
        lambda p: lowlevel.fgetxattr(UNUSED_FD, "user.none"),
        lambda p: os.getxattr(UNUSED_FD, "user.none"),
    ),
    "setxattr of nonsense": (
        lambda p: lowlevel.setxattr(str(p.path), "nonsense", b"x"),
        lambda p: os.setxattr(str(p.path), "nonsense", b"x"),
    ),
    "setxattr too large": (
        lambda p: lowlevel.setxattr(p.path, "user.x", bytes(65537)),
        lambda p: os.setxattr(p.path, "user.x", bytes(65537)),
    ),
    "ftruncate what is read-only": (
        lambda p: lowlevel.ftruncate(p.read_only, 1),
        lambda p: os.ftruncate(p.read_only, 1),
    ),
    "fallocate what is read-only": (
        lambda p: lowlevel.fallocate(p.read_only, 0, 0, 1),
        lambda p: os.posix_fallocate(p.read_only, 0, 1),
    ),
    "waitid of nobody": (
        lambda p: lowlevel.waitid(os.P_PID, os.getpid(), os.WEXITED),
        lambda p: os.waitid(os.P_PID, os.getpid(), os.WEXITED),
    ),
    "waitid for nothing": (lambda p: lowlevel.waitid(os.P_ALL, 0, 0), lambda p: os.waitid(os.P_ALL, 0, 0)),
}


def _what(exc: BaseException) -> dict[str, Any]:
    return {
        "class": type(exc),
        **{name: getattr(exc, name, None) for name in ("errno", "strerror", "filename", "filename2")},
    }


@pytest.mark.parametrize("case", FAILURES)
async def test_errors_are_those_of_the_standard_library(bench: Bench, case: str) -> None:
    ours, stdlib = FAILURES[case]
    place = Place(bench)
    with pytest.raises((OSError, ValueError, OverflowError)) as expected:
        stdlib(place)
    with pytest.raises(type(expected.value)) as raised:
        await ours(place)
    if isinstance(expected.value, OSError):
        assert _what(raised.value) == _what(expected.value)


HUGE = 1 << 70

# What no field of the kernel's holds, or what the kernel would take for something else.
WRONG_ARGUMENTS: dict[str, tuple[Callable[[Place], Awaitable[object]], type[Exception]]] = {
    "read offset": (lambda p: lowlevel.read(p.read_only, bytearray(1), HUGE), OverflowError),
    "read flags": (lambda p: lowlevel.read(p.read_only, bytearray(1), 0, -1), OverflowError),
    "read no number": (lambda p: lowlevel.read(p.read_only, bytearray(1), 1.5), TypeError),  # type: ignore[arg-type]
    "read into bytes": (lambda p: lowlevel.read(p.read_only, b"x"), BufferError),
    "readv offset": (lambda p: lowlevel.readv(p.read_only, [bytearray(1)], HUGE), OverflowError),
    "writev no buffer": (lambda p: lowlevel.writev(p.write_only, ["x"]), TypeError),  # type: ignore[list-item]
    "openat mode": (lambda p: lowlevel.openat(p.path, os.O_RDONLY, -1), ValueError),
    "openat flags": (lambda p: lowlevel.openat(p.path, -1), OverflowError),
    "openat2 flags": (lambda p: lowlevel.openat2(p.path, -1), ValueError),
    "openat2 resolve": (lambda p: lowlevel.openat2(p.path, 0, 0, HUGE), OverflowError),
    "statx mask": (lambda p: lowlevel.statx(p.path, mask=-1), ValueError),
    "sync_file_range length": (lambda p: lowlevel.sync_file_range(p.read_only, 0, -1, 0), ValueError),
    "sync_file_range long": (lambda p: lowlevel.sync_file_range(p.read_only, 0, 1 << 32, 0), OverflowError),
    "fallocate length": (lambda p: lowlevel.fallocate(p.write_only, 0, 0, -1), ValueError),
    "fallocate mode": (lambda p: lowlevel.fallocate(p.write_only, -1, 0, 1), ValueError),
    "ftruncate length": (lambda p: lowlevel.ftruncate(p.write_only, HUGE), OverflowError),
    "fadvise length": (lambda p: lowlevel.fadvise(p.read_only, 0, 1 << 63, 0), OverflowError),
    "fadvise advice": (lambda p: lowlevel.fadvise(p.read_only, 0, 0, -1), ValueError),
    "madvise advice": (lambda p: lowlevel.madvise(bytearray(1), -1), ValueError),
    "setxattr flags": (lambda p: lowlevel.setxattr(p.path, "user.x", b"", -1), OverflowError),
    "getxattr null": (lambda p: lowlevel.getxattr(p.path, "user.\0"), ValueError),
    "renameat2 flags": (lambda p: lowlevel.renameat2(p.path, p.missing, -1), OverflowError),
    "linkat fd": (lambda p: lowlevel.linkat(p.path, p.missing, dst_dir_fd=HUGE), OverflowError),
    "mkdirat mode": (lambda p: lowlevel.mkdirat(p.missing, -1), ValueError),
    "socket proto": (lambda p: lowlevel.socket(proto=-1), ValueError),
    "socket family": (lambda p: lowlevel.socket(HUGE), OverflowError),
    "listen backlog": (lambda p: lowlevel.listen(p.tcp, -1), ValueError),
    "shutdown how": (lambda p: lowlevel.shutdown(p.tcp, -1), ValueError),
    "send flags": (lambda p: lowlevel.send(p.broken, b"x", -1), OverflowError),
    "sendto address": (lambda p: lowlevel.sendto(p.udp, b"x", ("localhost", 9)), ValueError),
    "recvmsg sizes": (lambda p: lowlevel.recvmsg(p.udp, 1, -1), ValueError),
    "getsockopt level": (lambda p: lowlevel.getsockopt(p.tcp, 1 << 32, 1), OverflowError),
    "getsockopt option": (lambda p: lowlevel.getsockopt(p.tcp, 1, -1), ValueError),
    "getsockopt size": (lambda p: lowlevel.getsockopt(p.tcp, 1, 1, 1025), ValueError),
    "setsockopt value": (lambda p: lowlevel.setsockopt(p.tcp, 1, 1, 1 << 31), OverflowError),
    "splice length": (lambda p: lowlevel.splice(p.pipe[0], -1, p.write_only, -1, -1), ValueError),
    "splice offset": (lambda p: lowlevel.splice(p.pipe[0], -2, p.write_only, -1, 1), ValueError),
    "tee length": (lambda p: lowlevel.tee(p.pipe[0], p.broken_pipe, -1), ValueError),
    "pipe flags": (lambda p: lowlevel.pipe(HUGE), OverflowError),
    "epoll_ctl fd": (lambda p: lowlevel.epoll_ctl(p.read_only, 1, 1 << 32), OverflowError),
    "epoll_ctl data": (lambda p: lowlevel.epoll_ctl(p.read_only, 1, 0, 1, 1 << 31), OverflowError),
    "epoll_wait size": (lambda p: lowlevel.epoll_wait(p.read_only, -1), ValueError),
    "waitid type": (lambda p: lowlevel.waitid(-1, 0, os.WEXITED), ValueError),
    "waitid id": (lambda p: lowlevel.waitid(os.P_PID, HUGE, os.WEXITED), OverflowError),
    "futex size": (lambda p: lowlevel.futex_wait(bytearray(5), 0), ValueError),
    "futex alignment": (lambda p: lowlevel.futex_wake(memoryview(bytearray(8))[1:5], 1), ValueError),
    "futex read-only": (lambda p: lowlevel.futex_wait(b"1234", 0), BufferError),
    "futex value": (lambda p: lowlevel.futex_wait(bytearray(4), -1), ValueError),
    "futex mask": (lambda p: lowlevel.futex_wait(bytearray(4), 0, 1 << 32), OverflowError),
    "futex flags": (lambda p: lowlevel.futex_wait(bytearray(4), 0, flags=-1), ValueError),
    "futex count": (lambda p: lowlevel.futex_wake(bytearray(4), -1), ValueError),
    "futexes": (lambda p: lowlevel.futex_waitv([(bytearray(4), 0), (bytearray(3), 0)]), ValueError),
    "futexes' value": (lambda p: lowlevel.futex_waitv([(bytearray(4), 1 << 32)]), OverflowError),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
async def test_wrong_arguments_submit_nothing(bench: Bench, case: str) -> None:
    call, error = WRONG_ARGUMENTS[case]
    place = Place(bench)
    async with nothing_submitted():
        with pytest.raises(error) as raised:
            await call(place)
        assert str(raised.value)


async def test_reset_connection(bench: Bench) -> None:
    for call in (lowlevel.recv, lowlevel.read):
        a, b = bench.sockets(socket.AF_INET)
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, call, a, bytearray(9))
            b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            b.close()
            with pytest.raises(ConnectionResetError):
                await attempt.result()


async def test_end_of_file(bench: Bench) -> None:
    a, b = bench.sockets()
    b.close()
    buffer = bytearray(9)
    assert await lowlevel.recv(a, buffer) == 0
    assert await lowlevel.read(a, buffer) == 0
    assert await lowlevel.recvmsg(a, 9) == a.recvmsg(9)
    assert await lowlevel.read(bench.file(b"x"), buffer, 1) == 0
    assert await lowlevel.readv(bench.file(b""), [buffer]) == 0
    read_end, write_end = bench.pipe()
    os.close(write_end)
    bench.closed(write_end)
    assert await lowlevel.read(read_end, buffer) == 0


async def test_no_address_of_such_a_form(bench: Bench) -> None:
    sock = bench.new_socket()
    for address, error in [
        (("localhost", 80), ValueError),
        (("127.0.0.1", 1 << 16), ValueError),
        (("127.0.0.1", -1), ValueError),
        ("x" * 108, ValueError),
        (("127.0.0.1",), TypeError),
        (5, TypeError),
    ]:
        with pytest.raises(error):
            await lowlevel.connect(sock, address)


# Who occupies a direction of a socket.
RECEIVERS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "recv": lambda sock: lowlevel.recv(sock, bytearray(1)),
    "recvmsg": lambda sock: lowlevel.recvmsg(sock, 1),
    "wait_readable": trio.lowlevel.wait_readable,
}
SENDERS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "send": lambda sock: lowlevel.send(sock, b"x"),
    "sendmsg": lambda sock: lowlevel.sendmsg(sock, [b"x"]),
    "connect": lambda sock: lowlevel.connect(sock, "nowhere"),
    "wait_writable": trio.lowlevel.wait_writable,
}


def _marked(names: Iterable[str]) -> list[Any]:
    """trio's own waits are the ring's only on the native mount."""
    native = pytest.mark.native("each I/O manager knows who waits with it")
    return [pytest.param(name, marks=native if name.startswith("wait") else ()) for name in names]


@pytest.mark.parametrize("second", _marked([*RECEIVERS, *SENDERS]))
@pytest.mark.parametrize("first", _marked([*RECEIVERS, "send", "sendmsg", "wait_writable"]))
async def test_one_task_for_each_direction(bench: Bench, first: str, second: str) -> None:
    uses = {**RECEIVERS, **SENDERS}
    a, *_ = bench.full_socket()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, uses[first], a)
        if (first in RECEIVERS) is (second in RECEIVERS):
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await uses[second](a)
        elif second == "connect":
            with pytest.raises(FileNotFoundError):
                await uses[second](a)
        else:
            await (await parked(nursery, uses[second], a)).cancel()
        assert not attempt.done
        assert await attempt.cancel()
        await (await parked(nursery, uses[first], a)).cancel()  # free again


@pytest.mark.parametrize("call", _marked(["accept", "wait_readable"]))
async def test_accept_occupies_the_listener(bench: Bench, call: str) -> None:
    listener = bench.listener()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.accept, listener)
        with pytest.raises(trio.BusyResourceError):
            await getattr(lowlevel if call == "accept" else trio.lowlevel, call)(listener)
        assert await attempt.cancel()


async def test_busy_until_the_kernel_has_let_go(bench: Bench) -> None:
    a, _ = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(1))
        attempt.scope.cancel()
        with pytest.raises(trio.BusyResourceError):
            await lowlevel.recv(a, bytearray(1))
        await attempt.settled()


async def test_any_number_of_tasks_read_a_pipe(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, lowlevel.read, read_end, bytearray(1)) for _ in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        os.write(write_end, b"12345")
        assert [await attempt.result() for attempt in attempts] == [1] * 5


def test_outside_of_a_run() -> None:
    with pytest.raises(RuntimeError, match="async context"):
        lowlevel.nop().send(None)


def test_path_types(mount: Any, tmp_path: Path) -> None:
    path = tmp_path / "ümläut \udcff"
    path.write_bytes(b"x")

    async def main() -> None:
        for form in (path, str(path), bytes(path)):
            os.close(await lowlevel.openat(form, os.O_RDONLY))
            assert (await lowlevel.statx(form)).st_size == 1
        nonsense: list[Any] = [None, 1.5, bytearray(b"x")]
        for form in nonsense:
            with pytest.raises(TypeError):
                await lowlevel.openat(form, os.O_RDONLY)

    mount.run(main)
