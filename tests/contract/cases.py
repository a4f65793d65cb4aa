"""Each operation of the table: a call that completes at once, one that fails, one that blocks, one on a closed fd.

The tests that hold for every operation iterate over `CASES`.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import mmap
import os
import select
import socket
import termios
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from tests import libc
from tests.helpers import Bench, drain, fill, is_acknowledged, spin_until
from trio_uring import lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Call = Callable[[], Awaitable[object]]
    Unblock = Callable[[], object]
    Oracle = Callable[[], object]

EPOLL_CTL_ADD = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """How to call an operation.

    Attributes:
        ready: a call that completes at once, and would again if it had not happened. It checks what it has done.
        fails: a call that fails, and the same with the standard library; None if there is none.
        closed: a call on an fd; None if it takes no fd.
        blocked: a call that blocks, and what makes the next such call complete. It fails if the first one left a trace.
    """

    ready: Callable[[Bench], Call]
    fails: Callable[[Bench], tuple[Call, Oracle]] | None
    closed: Callable[[int], Awaitable[object]] | None
    blocked: Callable[[Bench], tuple[Call, Unblock]] | None = None


def _expect(value: object, call: Call) -> Call:
    async def checked() -> None:
        assert await call() == value

    return checked


def _then(call: Call, check: Callable[[], object]) -> Call:
    """The call returns None, and afterwards the check is true."""

    async def checked() -> None:
        assert await call() is None
        assert check()

    return checked


def _closing(call: Callable[[], Awaitable[Any]]) -> Call:
    async def closed() -> None:
        result = await call()
        for fd in result if isinstance(result, tuple) else (result,):
            if isinstance(fd, int):
                assert not os.get_inheritable(fd)
                os.close(fd)

    return closed


def _raising(code: int) -> Oracle:
    """Stands for a system call the standard library does not have."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


# Reading and writing


def _reading(function: Callable[[int, Any], Awaitable[int]], target: Any) -> Case:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        read_end, write_end = bench.pipe()
        return _expect(5, partial(function, read_end, target)), lambda: os.write(write_end, b"hello")

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        write_end = bench.pipe()[1]
        return partial(function, write_end, target), partial(os.read, write_end, 1)

    return Case(
        lambda bench: _expect(5, partial(function, bench.file(b"hello"), target)),
        fails,
        lambda fd: function(fd, target),
        blocked,
    )


def _writing(function: Callable[[int, Any], Awaitable[int]], source: Any) -> Case:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        read_end, write_end, size = bench.full_pipe()

        def unblock() -> None:
            assert drain(read_end, size) == bytes(size)
            assert select.select([read_end], [], [], 0)[0] == []

        return _expect(5, partial(function, write_end, source)), unblock

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        read_end = bench.pipe()[0]
        return partial(function, read_end, source), partial(os.write, read_end, b"x")

    return Case(
        lambda bench: _expect(5, partial(function, bench.file(), source)),
        fails,
        lambda fd: function(fd, source),
        blocked,
    )


# Files


def _on_pipe(function: Callable[[int], Awaitable[object]], oracle: Callable[[int], object]) -> Any:
    """What cannot be done with a pipe."""

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        write_end = bench.pipe()[1]
        return partial(function, write_end), partial(oracle, write_end)

    return fails


def _on_missing(function: Callable[[Any], Awaitable[object]], oracle: Callable[[Any], object]) -> Any:
    def fails(bench: Bench) -> tuple[Call, Oracle]:
        missing = bench.directory / "missing" / "file"
        return partial(function, missing), partial(oracle, missing)

    return fails


def _flushing(function: Callable[[int], Awaitable[object]], oracle: Callable[[int], object]) -> Case:
    return Case(
        lambda bench: _expect(None, partial(function, bench.file(b"x"))),
        _on_pipe(function, oracle),
        function,
    )


def _fallocate_ready(bench: Bench) -> Call:
    fd = bench.file()
    return _then(partial(lowlevel.fallocate, fd, 0, 10, 100), lambda: os.fstat(fd).st_size == 110)


def _ftruncate_ready(bench: Bench) -> Call:
    fd = bench.file(b"hello")
    return _then(partial(lowlevel.ftruncate, fd, 3), lambda: os.fstat(fd).st_size == 3)


def _private_page() -> mmap.mmap:
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[:5] = b"hello"
    return page


def _madvise_ready(bench: Bench) -> Call:
    page = _private_page()
    return _then(partial(lowlevel.madvise, page, mmap.MADV_DONTNEED), lambda: page[:5] == bytes(5))


def _madvise_fails(bench: Bench) -> tuple[Call, Oracle]:
    page = _private_page()
    return partial(lowlevel.madvise, page, 9999), partial(page.madvise, 9999)


def _openat2_fails(bench: Bench) -> tuple[Call, Oracle]:
    beneath = 8
    return (
        partial(lowlevel.openat2, "/dev/null", os.O_RDONLY, resolve=beneath),
        # libc.openat2 knows no file name for its error.
        lambda: _with_filename("/dev/null", lambda: libc.openat2(b"/dev/null", os.O_RDONLY, 0, beneath)),
    )


def _with_filename(name: str, oracle: Oracle) -> None:
    try:
        oracle()
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, name) from None


def _close_ready(bench: Bench) -> Call:
    fd = os.open(os.devnull, os.O_RDONLY)  # kept by nobody: if the call fails to close it, the leak check finds it
    return partial(lowlevel.close, fd)


def _statx_ready(bench: Bench) -> Call:
    path = bench.path(b"hello")
    return _expect(os.stat(path), partial(lowlevel.statx, path))


ATTRIBUTE = "user.trio_uring"


def _with_attribute(bench: Bench, value: bytes) -> Any:
    path = bench.path()
    os.setxattr(path, ATTRIBUTE, value)
    return path


def _getxattr_ready(bench: Bench) -> Call:
    return _expect(b"value", partial(lowlevel.getxattr, _with_attribute(bench, b"value"), ATTRIBUTE))


def _fgetxattr_ready(bench: Bench) -> Call:
    fd = bench.keep(os.open(_with_attribute(bench, b"value"), os.O_RDONLY))
    return _expect(b"value", partial(lowlevel.fgetxattr, fd, ATTRIBUTE))


def _setxattr_ready(bench: Bench) -> Call:
    path = bench.path()
    call = partial(lowlevel.setxattr, path, ATTRIBUTE, b"value", os.XATTR_CREATE)
    return _then(call, lambda: os.getxattr(path, ATTRIBUTE) == b"value")


def _fsetxattr_ready(bench: Bench) -> Call:
    fd = bench.file()
    call = partial(lowlevel.fsetxattr, fd, ATTRIBUTE, b"value", os.XATTR_CREATE)
    return _then(call, lambda: os.getxattr(fd, ATTRIBUTE) == b"value")


def _fgetxattr_fails(bench: Bench) -> tuple[Call, Oracle]:
    fd = bench.file()
    return partial(lowlevel.fgetxattr, fd, ATTRIBUTE), partial(os.getxattr, fd, ATTRIBUTE)


def _fsetxattr_fails(bench: Bench) -> tuple[Call, Oracle]:
    fd = bench.file()
    arguments = fd, ATTRIBUTE, b"", os.XATTR_REPLACE
    return partial(lowlevel.fsetxattr, *arguments), partial(os.setxattr, *arguments)


def _two_names(function: Callable[[Any, Any], Awaitable[object]], done: Callable[[Any, Any], bool]) -> Any:
    def ready(bench: Bench) -> Call:
        old = bench.path(b"content")
        new = old.with_suffix(".new")
        return _then(partial(function, old, new), lambda: done(old, new))

    return ready


def _two_missing(function: Callable[[Any, Any], Awaitable[object]], oracle: Callable[[Any, Any], object]) -> Any:
    def fails(bench: Bench) -> tuple[Call, Oracle]:
        names = bench.directory / "missing", bench.directory / "new"
        return partial(function, *names), partial(oracle, *names)

    return fails


def _unlinkat_ready(bench: Bench) -> Call:
    path = bench.path()
    return _then(partial(lowlevel.unlinkat, path), lambda: not path.exists())


def _mkdirat_ready(bench: Bench) -> Call:
    path = bench.directory / "new"
    return _then(partial(lowlevel.mkdirat, path), path.is_dir)


# Sockets


def _receiving(
    function: Callable[[Any, Any], Awaitable[object]], target: Any, result: object, oracle: Callable[[Any], object]
) -> Case:
    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        a, b = bench.sockets()
        return _expect(result, partial(function, a, target)), partial(b.send, b"hello")

    def ready(bench: Bench) -> Call:
        call, unblock = blocked(bench)
        unblock()
        return call

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        unconnected = bench.new_socket()
        return partial(function, unconnected, target), partial(oracle, unconnected)

    return Case(ready, fails, lambda fd: function(fd, target), blocked)


def _sending(function: Callable[..., Awaitable[object]], source: Any, oracle: Callable[[Any], object]) -> Case:
    def ready(bench: Bench) -> Call:
        return _expect(5, partial(function, bench.sockets()[0], source))

    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        a, b, size = bench.full_socket()

        def unblock() -> None:
            assert drain(b.fileno(), size) == bytes(size)
            assert select.select([b], [], [], 0)[0] == []

        return _expect(5, partial(function, a, source)), unblock

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        unconnected = bench.new_socket(kind=socket.SOCK_DGRAM)
        return partial(function, unconnected, source), partial(oracle, unconnected)

    return Case(ready, fails, lambda fd: function(fd, source), blocked)


def _sendto_ready(bench: Bench) -> Call:
    a, b = (bench.new_socket(kind=socket.SOCK_DGRAM) for _ in range(2))
    b.bind(("127.0.0.1", 0))

    async def call() -> None:
        assert await lowlevel.sendto(a, b"hello", b.getsockname()) == 5
        assert b.recv(9, socket.MSG_DONTWAIT) == b"hello"

    return call


def _sendto_fails(bench: Bench) -> tuple[Call, Oracle]:
    sock = bench.new_socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    missing = str(bench.directory / "missing")
    return partial(lowlevel.sendto, sock, b"x", missing), partial(sock.sendto, b"x", missing)


def full_tcp(bench: Bench) -> tuple[socket.socket, int, int]:
    """A TCP socket with no room left, and nothing under way that would make some; its peer, and how many bytes wait."""
    listener, a = bench.listener(), bench.new_socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
    a.connect(listener.getsockname())
    b = bench.keep(listener.accept()[0].detach())
    total = 0
    while more := fill(lambda: a.send(bytes(4096), socket.MSG_DONTWAIT)):
        total += more
        spin_until(lambda: is_acknowledged(a))
    return a, b, total


def _sending_zc(function: Callable[..., Awaitable[object]], source: Any, oracle: Callable[[Any], object]) -> Case:
    def ready(bench: Bench) -> Call:
        return _expect(5, partial(function, bench.sockets(socket.AF_INET)[0], source))

    def blocked(bench: Bench) -> tuple[Call, Unblock]:
        a, b, size = full_tcp(bench)

        def unblock() -> None:
            assert drain(b, size) == bytes(size)
            assert select.select([b], [], [], 0)[0] == []

        return _expect(5, partial(function, a, source)), unblock

    return dataclasses.replace(_sending(function, source, oracle), ready=ready, blocked=blocked)


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


def _on_socket(
    function: Callable[[socket.socket], Awaitable[object]], oracle: Callable[[socket.socket], object], **kind: Any
) -> Any:
    """What cannot be done with a fresh socket."""

    def fails(bench: Bench) -> tuple[Call, Oracle]:
        sock = bench.new_socket(**kind)
        return partial(function, sock), partial(oracle, sock)

    return fails


def _bind_ready(bench: Bench) -> Call:
    sock = bench.new_socket()
    return _then(partial(lowlevel.bind, sock, ("127.0.0.1", 0)), lambda: sock.getsockname()[1] != 0)


def _listen_ready(bench: Bench) -> Call:
    sock = bench.new_socket()
    return _then(
        partial(lowlevel.listen, sock, 5), lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    )


def _siocinq_ready(bench: Bench) -> Call:
    a, b = bench.sockets(socket.AF_INET)
    b.send(b"hello")
    return _expect(5, partial(lowlevel.siocinq, a))


def _ioctl(request: int) -> Callable[[socket.socket], object]:
    return lambda sock: fcntl.ioctl(sock, request, bytes(4))


def _getsockopt_ready(bench: Bench) -> Call:
    sock = bench.new_socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return _expect(1, partial(lowlevel.getsockopt, sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE))


def _setsockopt_ready(bench: Bench) -> Call:
    sock, option = bench.new_socket(), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return _then(partial(lowlevel.setsockopt, sock, *option, 1), lambda: sock.getsockopt(*option) == 1)


NO_OPTION = (socket.SOL_SOCKET, 9999)


# Pipes


def _pipe_ready(bench: Bench) -> Call:
    async def call() -> None:
        fds = await lowlevel.pipe()
        assert os.write(fds[1], b"x") == len(os.read(fds[0], 9)) == 1
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.close(fd)

    return call


def _splice_blocked(bench: Bench) -> tuple[Call, Unblock]:
    read_end, write_end = bench.pipe()
    call = partial(lowlevel.splice, read_end, -1, bench.file(), -1, 9)
    return _expect(5, call), lambda: os.write(write_end, b"hello")


def _splice_ready(bench: Bench) -> Call:
    call, unblock = _splice_blocked(bench)
    unblock()
    return call


def _splice_fails(bench: Bench) -> tuple[Call, Oracle]:
    arguments = bench.file(), -1, bench.file(), -1, 9, 0
    return partial(lowlevel.splice, *arguments), partial(libc.splice, *arguments)


def _tee_blocked(bench: Bench) -> tuple[Call, Unblock]:
    read_end, write_end = bench.pipe()
    call = partial(lowlevel.tee, read_end, bench.pipe()[1], 9)
    return _expect(5, call), lambda: os.write(write_end, b"hello")


def _tee_ready(bench: Bench) -> Call:
    call, unblock = _tee_blocked(bench)
    unblock()
    return call


def _tee_fails(bench: Bench) -> tuple[Call, Oracle]:
    arguments = bench.file(), bench.file(), 9, 0
    return partial(lowlevel.tee, *arguments), partial(libc.tee, *arguments)


# epoll


def _epoll_ctl_ready(bench: Bench) -> Call:
    epoll, (read_end, write_end) = bench.epoll(), bench.pipe()
    os.write(write_end, b"x")
    call = partial(lowlevel.epoll_ctl, epoll, EPOLL_CTL_ADD, read_end, select.EPOLLIN)
    return _then(call, lambda: epoll.poll(0) == [(read_end, select.EPOLLIN)])


def _epoll_ctl_fails(bench: Bench) -> tuple[Call, Oracle]:
    epoll, fd = bench.epoll(), bench.file()
    return partial(lowlevel.epoll_ctl, epoll, EPOLL_CTL_ADD, fd, select.EPOLLIN), partial(epoll.register, fd)


def _epoll_wait_blocked(bench: Bench) -> tuple[Call, Unblock]:
    epoll, (read_end, write_end) = bench.epoll(), bench.pipe()
    epoll.register(read_end, select.EPOLLIN)
    call = _expect([(read_end, select.EPOLLIN)], partial(lowlevel.epoll_wait, epoll, 9))
    return call, lambda: os.write(write_end, b"x")


def _epoll_wait_ready(bench: Bench) -> Call:
    call, unblock = _epoll_wait_blocked(bench)
    unblock()
    return call


# Children and futexes


def _child_is_reaped(pid: int, call: Callable[[], Awaitable[Any]]) -> Call:
    async def checked() -> None:
        result = await call()
        assert (result.si_pid, result.si_status, result.si_code) == (pid, 0, os.CLD_EXITED)

    return checked


def _waitid_ready(bench: Bench) -> Call:
    pid = bench.exited_child()
    return _child_is_reaped(pid, partial(lowlevel.waitid, os.P_PID, pid, os.WEXITED))


def _waitid_blocked(bench: Bench) -> tuple[Call, Unblock]:
    pid, end = bench.child()
    pidfd = bench.keep(os.pidfd_open(pid))
    return _child_is_reaped(pid, partial(lowlevel.waitid, os.P_PIDFD, pidfd, os.WEXITED)), end


def _waitid_fails(bench: Bench) -> tuple[Call, Oracle]:
    nobody = os.P_PID, os.getpid(), os.WEXITED
    return partial(lowlevel.waitid, *nobody), partial(os.waitid, *nobody)


def _futex_wait_blocked(bench: Bench) -> tuple[Call, Unblock]:
    futex = bench.futex()
    return _expect(None, partial(lowlevel.futex_wait, futex, 7)), partial(bench.wake, futex)


def _futex_wait_ready(bench: Bench) -> Call:
    call, unblock = _futex_wait_blocked(bench)
    unblock()
    return call


def _futex_waitv_blocked(bench: Bench) -> tuple[Call, Unblock]:
    futexes = [(bench.futex(), 7) for _ in range(2)]
    return _expect(1, partial(lowlevel.futex_waitv, futexes)), partial(bench.wake, futexes[1][0])


def _futex_waitv_ready(bench: Bench) -> Call:
    call, unblock = _futex_waitv_blocked(bench)
    unblock()
    return call


# Registered buffers


def _registered(content: bytes) -> lowlevel.RegisteredBuffer:
    return lowlevel.RegisteredBuffer(bytearray(content))


def _fixed(
    case: Callable[[Callable[[int, Any], Awaitable[int]], Any], Case],
    function: Callable[..., Awaitable[int]],
    buffer: bytes,
    file: bytes = b"",
    *pieces: object,
) -> Case:
    def ready(bench: Bench) -> Call:
        return _expect(5, partial(function, bench.file(file), _registered(buffer), *pieces))

    return dataclasses.replace(
        case(lambda fd, content: function(fd, _registered(content), *pieces), buffer), ready=ready
    )


# The ring itself


def _msg_ring_ready(bench: Bench) -> Call:
    mailbox = lowlevel.Mailbox[int]()
    numbers = itertools.count()

    async def call() -> None:
        number = next(numbers)
        await lowlevel.msg_ring(mailbox, number)
        with trio.CancelScope(shield=True):
            assert await mailbox.receive() == number

    return call


def _below_zero(number: int) -> None:
    raise ValueError(number)


def _poll_blocked(bench: Bench) -> tuple[Call, Unblock]:
    read_end, write_end = bench.pipe()
    return _expect(select.POLLIN, partial(lowlevel.poll, read_end, select.POLLIN)), lambda: os.write(write_end, b"x")


def _poll_ready(bench: Bench) -> Call:
    return _expect(select.POLLOUT, partial(lowlevel.poll, bench.pipe()[1], select.POLLOUT | select.POLLIN))


def _poll_fails(bench: Bench) -> tuple[Call, Oracle]:
    return partial(lowlevel.poll, 1 << 20, select.POLLIN), _raising(errno.EBADF)


def _async_cancel_fails(bench: Bench) -> tuple[Call, Oracle]:
    return partial(lowlevel.async_cancel, 1 << 20), _raising(errno.EBADF)


def _timeout_blocked(bench: Bench) -> tuple[Call, Unblock]:
    durations = iter((1e6, 0.0))
    return lambda: lowlevel.timeout(next(durations)), lambda: None


CASES = {
    "read": _reading(lowlevel.read, bytearray(9)),
    "write": _writing(lowlevel.write, b"hello"),
    "readv": _reading(lowlevel.readv, [bytearray(2), bytearray(7)]),
    "writev": _writing(lowlevel.writev, [b"he", b"llo"]),
    "openat": Case(
        lambda bench: _closing(partial(lowlevel.openat, bench.path(), os.O_RDONLY)),
        _on_missing(lambda path: lowlevel.openat(path, os.O_RDONLY), lambda path: os.open(path, os.O_RDONLY)),
        lambda fd: lowlevel.openat("x", os.O_RDONLY, dir_fd=fd),
    ),
    "openat2": Case(
        lambda bench: _closing(partial(lowlevel.openat2, bench.path(), os.O_RDONLY)),
        _openat2_fails,
        lambda fd: lowlevel.openat2("x", os.O_RDONLY, dir_fd=fd),
    ),
    "close": Case(_close_ready, lambda bench: (partial(lowlevel.close, -1), partial(os.close, -1)), lowlevel.close),
    "fsync": _flushing(lowlevel.fsync, os.fsync),
    "fdatasync": _flushing(lowlevel.fdatasync, os.fdatasync),
    "sync_file_range": _flushing(
        lambda fd: lowlevel.sync_file_range(fd, 0, 0, 2), lambda fd: libc.sync_file_range(fd, 0, 0, 2)
    ),
    "fallocate": Case(
        _fallocate_ready,
        _on_pipe(lambda fd: lowlevel.fallocate(fd, 0, 0, 1), lambda fd: libc.fallocate(fd, 0, 0, 1)),
        lambda fd: lowlevel.fallocate(fd, 0, 0, 1),
    ),
    "ftruncate": Case(
        _ftruncate_ready,
        _on_pipe(lambda fd: lowlevel.ftruncate(fd, 1), lambda fd: os.ftruncate(fd, 1)),
        lambda fd: lowlevel.ftruncate(fd, 1),
    ),
    "fadvise": Case(
        lambda bench: _expect(None, partial(lowlevel.fadvise, bench.file(b"x"), 0, 1, os.POSIX_FADV_WILLNEED)),
        _on_pipe(lambda fd: lowlevel.fadvise(fd, 0, 1, 0), lambda fd: os.posix_fadvise(fd, 0, 1, 0)),
        lambda fd: lowlevel.fadvise(fd, 0, 1, 0),
    ),
    "madvise": Case(_madvise_ready, _madvise_fails, None),
    "statx": Case(_statx_ready, _on_missing(lowlevel.statx, os.stat), lambda fd: lowlevel.statx("x", dir_fd=fd)),
    "getxattr": Case(
        _getxattr_ready,
        _on_missing(lambda path: lowlevel.getxattr(path, ATTRIBUTE), lambda path: os.getxattr(path, ATTRIBUTE)),
        None,
    ),
    "fgetxattr": Case(_fgetxattr_ready, _fgetxattr_fails, lambda fd: lowlevel.fgetxattr(fd, ATTRIBUTE)),
    "setxattr": Case(
        _setxattr_ready,
        _on_missing(
            lambda path: lowlevel.setxattr(path, ATTRIBUTE, b"x"), lambda path: os.setxattr(path, ATTRIBUTE, b"x")
        ),
        None,
    ),
    "fsetxattr": Case(_fsetxattr_ready, _fsetxattr_fails, lambda fd: lowlevel.fsetxattr(fd, ATTRIBUTE, b"x")),
    "renameat2": Case(
        _two_names(lowlevel.renameat2, lambda old, new: not old.exists() and new.exists()),
        _two_missing(lowlevel.renameat2, os.rename),
        lambda fd: lowlevel.renameat2("x", "y", src_dir_fd=fd),
    ),
    "unlinkat": Case(
        _unlinkat_ready, _on_missing(lowlevel.unlinkat, os.unlink), lambda fd: lowlevel.unlinkat("x", dir_fd=fd)
    ),
    "mkdirat": Case(
        _mkdirat_ready, _on_missing(lowlevel.mkdirat, os.mkdir), lambda fd: lowlevel.mkdirat("x", dir_fd=fd)
    ),
    "symlinkat": Case(
        _two_names(lowlevel.symlinkat, lambda old, new: new.readlink() == old),
        _on_missing(lambda path: lowlevel.symlinkat("x", path), lambda path: os.symlink("x", path)),
        lambda fd: lowlevel.symlinkat("x", "y", dir_fd=fd),
    ),
    "linkat": Case(
        _two_names(lowlevel.linkat, os.path.samefile),
        _two_missing(lowlevel.linkat, os.link),
        lambda fd: lowlevel.linkat("x", "y", src_dir_fd=fd),
    ),
    "socket": Case(
        lambda bench: _closing(lowlevel.socket),
        lambda bench: (partial(lowlevel.socket, 99), partial(socket.socket, 99)),
        None,
    ),
    "bind": Case(
        _bind_ready,
        _on_socket(lambda sock: lowlevel.bind(sock, ("192.0.2.1", 0)), lambda sock: sock.bind(("192.0.2.1", 0))),
        lambda fd: lowlevel.bind(fd, ("127.0.0.1", 0)),
    ),
    "listen": Case(
        _listen_ready,
        _on_socket(lambda sock: lowlevel.listen(sock, 1), lambda sock: sock.listen(1), kind=socket.SOCK_DGRAM),
        lambda fd: lowlevel.listen(fd, 1),
    ),
    "accept": Case(
        _accept_ready, _on_socket(lowlevel.accept, lambda sock: sock.accept()), lowlevel.accept, _accept_blocked
    ),
    "connect": Case(
        _connect_ready,
        _on_socket(
            lambda sock: lowlevel.connect(sock, "missing"),
            lambda sock: sock.connect("missing"),
            family=socket.AF_UNIX,
        ),
        lambda fd: lowlevel.connect(fd, ("127.0.0.1", 9)),
        _connect_blocked,
    ),
    "shutdown": Case(
        lambda bench: _expect(None, partial(lowlevel.shutdown, bench.sockets()[0], socket.SHUT_WR)),
        _on_socket(lambda sock: lowlevel.shutdown(sock, socket.SHUT_RD), lambda sock: sock.shutdown(socket.SHUT_RD)),
        lambda fd: lowlevel.shutdown(fd, socket.SHUT_RD),
    ),
    "send": _sending(lowlevel.send, b"hello", lambda sock: sock.send(b"x")),
    "recv": _receiving(lowlevel.recv, bytearray(9), 5, lambda sock: sock.recv(9)),
    "sendto": dataclasses.replace(
        _sending(lambda sock, data: lowlevel.sendto(sock, data, None), b"hello", lambda sock: None),
        ready=_sendto_ready,
        fails=_sendto_fails,
    ),
    "recvfrom": _receiving(lowlevel.recvfrom, 9, (b"hello", None), lambda sock: sock.recvfrom(9)),
    "sendmsg": _sending(lowlevel.sendmsg, [b"he", b"llo"], lambda sock: sock.sendmsg([b"x"])),
    "recvmsg": _receiving(lowlevel.recvmsg, 9, (b"hello", [], 0, None), lambda sock: sock.recvmsg(9)),
    "siocinq": Case(
        _siocinq_ready,
        lambda bench: (
            partial(lowlevel.siocinq, listener := bench.listener()),
            lambda: _ioctl(termios.FIONREAD)(listener),
        ),
        lowlevel.siocinq,
    ),
    "siocoutq": Case(
        lambda bench: _expect(0, partial(lowlevel.siocoutq, bench.sockets(socket.AF_INET)[0])),
        lambda bench: (
            partial(lowlevel.siocoutq, listener := bench.listener()),
            lambda: _ioctl(termios.TIOCOUTQ)(listener),
        ),
        lowlevel.siocoutq,
    ),
    "getsockopt": Case(
        _getsockopt_ready,
        _on_socket(lambda sock: lowlevel.getsockopt(sock, *NO_OPTION), lambda sock: sock.getsockopt(*NO_OPTION)),
        lambda fd: lowlevel.getsockopt(fd, socket.SOL_SOCKET, socket.SO_TYPE),
    ),
    "setsockopt": Case(
        _setsockopt_ready,
        _on_socket(lambda sock: lowlevel.setsockopt(sock, *NO_OPTION, 1), lambda sock: sock.setsockopt(*NO_OPTION, 1)),
        lambda fd: lowlevel.setsockopt(fd, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ),
    "pipe": Case(
        _pipe_ready, lambda bench: (partial(lowlevel.pipe, os.O_APPEND), partial(os.pipe2, os.O_APPEND)), None
    ),
    "splice": Case(_splice_ready, _splice_fails, lambda fd: lowlevel.splice(fd, -1, fd, -1, 1), _splice_blocked),
    "tee": Case(_tee_ready, _tee_fails, lambda fd: lowlevel.tee(fd, fd, 1), _tee_blocked),
    "epoll_ctl": Case(
        _epoll_ctl_ready, _epoll_ctl_fails, lambda fd: lowlevel.epoll_ctl(fd, EPOLL_CTL_ADD, 0, select.EPOLLIN)
    ),
    "epoll_wait": Case(
        _epoll_wait_ready,
        lambda bench: (partial(lowlevel.epoll_wait, bench.epoll(), 0), _raising(errno.EINVAL)),
        lambda fd: lowlevel.epoll_wait(fd, 1),
        _epoll_wait_blocked,
    ),
    "waitid": Case(
        _waitid_ready, _waitid_fails, lambda fd: lowlevel.waitid(os.P_PIDFD, fd, os.WEXITED), _waitid_blocked
    ),
    "futex_wait": Case(
        _futex_wait_ready,
        lambda bench: (partial(lowlevel.futex_wait, bench.futex(), 8), _raising(errno.EAGAIN)),
        None,
        _futex_wait_blocked,
    ),
    "futex_wake": Case(
        lambda bench: _expect(0, partial(lowlevel.futex_wake, bench.futex(), 1)),
        lambda bench: (partial(lowlevel.futex_wake, bench.futex(), 1, flags=0), _raising(errno.EINVAL)),
        None,
    ),
    "futex_waitv": Case(
        _futex_waitv_ready,
        lambda bench: (partial(lowlevel.futex_waitv, [(bench.futex(), 8)]), _raising(errno.EAGAIN)),
        None,
        _futex_waitv_blocked,
    ),
    "send_zc": _sending_zc(lowlevel.send_zc, b"hello", lambda sock: sock.send(b"x")),
    "sendmsg_zc": _sending_zc(lowlevel.sendmsg_zc, [b"he", b"llo"], lambda sock: sock.sendmsg([b"x"])),
    "read_fixed": _fixed(_reading, lowlevel.read_fixed, bytes(9), b"hello"),
    "write_fixed": _fixed(_writing, lowlevel.write_fixed, b"hello"),
    "readv_fixed": _fixed(_reading, lowlevel.readv_fixed, bytes(9), b"hello", [(7, 2), (0, 7)]),
    "writev_fixed": _fixed(_writing, lowlevel.writev_fixed, b"hello", b"", [(3, 2), (0, 3)]),
    "msg_ring": Case(
        _msg_ring_ready,
        lambda bench: (partial(lowlevel.msg_ring, lowlevel.Mailbox[int](), -1), partial(_below_zero, -1)),
        None,
    ),
    "poll": Case(_poll_ready, _poll_fails, lambda fd: lowlevel.poll(fd, select.POLLIN), _poll_blocked),
    "timeout": Case(
        lambda bench: partial(lowlevel.timeout, 0),
        lambda bench: (partial(lowlevel.timeout, -1), partial(time.sleep, -1)),
        None,
        _timeout_blocked,
    ),
    "nop": Case(lambda bench: lowlevel.nop, None, None),
    "async_cancel": Case(
        lambda bench: _expect(0, partial(lowlevel.async_cancel, bench.file())),
        _async_cancel_fails,
        lowlevel.async_cancel,
    ),
}

BLOCKING = [name for name, case in CASES.items() if case.blocked]

BLOCKING_ON_FD = [name for name in BLOCKING if name not in ("timeout", "futex_wait", "futex_waitv")]
