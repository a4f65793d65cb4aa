"""Each operation does what the plain system call does: same inputs, same result or error, same effect.

Hypothesis makes up the inputs. Ours and the system call are done one after the other on two copies of the same things.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import stat
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import libc
from tests.helpers import run_native
from trio_uring import lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

GIB = 1 << 30
examples = partial(settings, deadline=None)

Call = tuple["Callable[..., Awaitable[Any]]", tuple[Any, ...]]


def _failure(exc: OSError | ValueError | OverflowError) -> tuple[Any, ...]:
    if isinstance(exc, OSError):
        return type(exc), exc.errno
    return (type(exc),)


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a system call, or its error."""
    try:
        return function(*args)
    except (OSError, ValueError, OverflowError) as exc:
        return _failure(exc)


def ours(*calls: Call) -> list[Any]:
    """The results of operations, or their errors, in a run of their own."""

    async def main() -> list[Any]:
        results: list[Any] = []
        for function, args in calls:
            try:
                results.append(await function(*args))
            except (OSError, ValueError, OverflowError) as exc:
                results.append(_failure(exc))
        return results

    return run_native(main)


def our(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    (result,) = ours((function, args))
    return result


@contextlib.contextmanager
def two_directories() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        yield Path(first), Path(second)


@contextlib.contextmanager
def two_files(content: bytes = b"", size: int | None = None, flags: int = os.O_RDWR) -> Iterator[tuple[int, int]]:
    with two_directories() as directories, contextlib.ExitStack() as stack:
        fds = []
        for directory in directories:
            path = directory / "file"
            path.write_bytes(content)
            if size is not None:
                os.truncate(path, size)
            fds.append(os.open(path, flags))
            stack.callback(os.close, fds[-1])
        yield fds[0], fds[1]


# Reading and writing

# Where a sparse file has something, and about where offsets could be cut off.
MARKS = {2 * GIB - 3: b"two gibibytes", 4 * GIB - 3: b"four gibibytes"}
OFFSETS = st.sampled_from([-1, 0, 1, *(mark + d for mark in MARKS for d in (-2, 0, 3, 5))]) | st.integers(0, 5 * GIB)
SIZES = st.lists(st.integers(0, 9), max_size=8)
PIECES = st.lists(st.binary(max_size=9), max_size=8)


def _contents(fd: int) -> tuple[int, int, list[bytes]]:
    """The file's size, its position, and what is in it, leaving out holes."""
    size, at, pieces = os.fstat(fd).st_size, 0, []
    position = os.lseek(fd, 0, os.SEEK_CUR)
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # holes up to the end
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        pieces.append(os.pread(fd, end - at, at))
        at = end
    os.lseek(fd, position, os.SEEK_SET)
    return size, position, pieces


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "file"
    with path.open("wb") as file:
        for offset, mark in MARKS.items():
            file.seek(offset)
            file.write(mark)
    return path


@contextlib.contextmanager
def _open_twice(path: Path) -> Iterator[tuple[int, int]]:
    fds = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _plain_preadv(fd: int, buffers: Sequence[bytearray], offset: int, flags: int) -> int:
    if offset == -1 and not flags:
        return os.readv(fd, buffers)
    return os.preadv(fd, buffers, offset, flags)


@examples(max_examples=150)
@given(sizes=SIZES, offset=OFFSETS, flags=st.sampled_from([0, 0, os.RWF_NOWAIT, 1 << 20]))
def test_readv(sparse: Path, sizes: list[int], offset: int, flags: int) -> None:
    assume(any(sizes) or flags < 1 << 20)  # preadv(2) does not look at its flags if there is nothing to do
    with _open_twice(sparse) as (fd, oracle_fd):
        buffers, oracle_buffers = ([bytearray(size) for size in sizes] for _ in range(2))
        expected = plainly(_plain_preadv, oracle_fd, oracle_buffers, offset, flags)
        assert our(lowlevel.readv, fd, buffers, offset, flags) == expected
        assert buffers == oracle_buffers
        assert os.lseek(fd, 0, os.SEEK_CUR) == os.lseek(oracle_fd, 0, os.SEEK_CUR)


@examples(max_examples=100)
@given(size=st.integers(0, 40), offset=OFFSETS)
def test_read(sparse: Path, size: int, offset: int) -> None:
    with _open_twice(sparse) as (fd, oracle_fd):
        buffer, oracle_buffer = bytearray(size), bytearray(size)
        expected = _plain_preadv(oracle_fd, [oracle_buffer], offset, 0)
        assert our(lowlevel.read, fd, buffer, offset) == expected
        assert buffer == oracle_buffer


WRITE_FLAGS = st.sampled_from([0, 0, os.RWF_DSYNC, os.RWF_SYNC, 0x10, 1 << 20])  # 0x10: RWF_APPEND


def _plain_pwritev(fd: int, pieces: Sequence[bytes], offset: int, flags: int) -> int:
    if offset == -1 and not flags:
        return os.writev(fd, pieces)
    return os.pwritev(fd, pieces, offset, flags)


@examples(max_examples=60)
@given(writes=st.lists(st.tuples(PIECES, OFFSETS, WRITE_FLAGS), min_size=1, max_size=4), append=st.booleans())
def test_writev_and_write(writes: list[tuple[list[bytes], int, int]], append: bool) -> None:
    with two_files(b"before", flags=os.O_RDWR | (os.O_APPEND if append else 0)) as (fd, oracle_fd):
        for pieces, offset, flags in writes:
            whole = b"".join(pieces)
            assume(whole or flags < 1 << 20)
            expected = [
                plainly(_plain_pwritev, oracle_fd, pieces, offset, flags),
                plainly(_plain_pwritev, oracle_fd, [whole], offset, flags),
            ]
            calls = (lowlevel.writev, (fd, pieces, offset, flags)), (lowlevel.write, (fd, whole, offset, flags))
            assert ours(*calls) == expected
        assert _contents(fd) == _contents(oracle_fd)


# Storage

FALLOCATE_MODES = st.sampled_from(
    [
        0,
        libc.FALLOC_FL_KEEP_SIZE,
        libc.FALLOC_FL_PUNCH_HOLE,
        libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE,
        libc.FALLOC_FL_COLLAPSE_RANGE,
        libc.FALLOC_FL_ZERO_RANGE,
        1 << 20,
    ]
)
BLOCKS = st.sampled_from([0, 1, 4096, 8192, 2 * GIB, 4 * GIB, 4 * GIB + 4096])


@examples(max_examples=60)
@given(mode=FALLOCATE_MODES, offset=BLOCKS, length=st.sampled_from([0, 1, 4096, 8192]))
def test_fallocate(mode: int, offset: int, length: int) -> None:
    with two_files(b"x" * 20000) as (fd, oracle_fd):
        expected = plainly(libc.fallocate, oracle_fd, mode, offset, length)
        assert our(lowlevel.fallocate, fd, mode, offset, length) == expected
        assert _contents(fd) == _contents(oracle_fd)
        assert os.fstat(fd).st_blocks == os.fstat(oracle_fd).st_blocks


@examples(max_examples=60)
@given(lengths=st.lists(st.sampled_from([-1, 0, 3, 2 * GIB, 4 * GIB + 1, 1 << 62, 1 << 63]), min_size=1, max_size=4))
def test_ftruncate(lengths: list[int]) -> None:
    with two_files(b"content") as (fd, oracle_fd):
        expected = [plainly(os.ftruncate, oracle_fd, length) for length in lengths]
        assert ours(*((lowlevel.ftruncate, (fd, length)) for length in lengths)) == expected
        assert _contents(fd) == _contents(oracle_fd)


RANGES = st.tuples(
    st.sampled_from([0, 1, 4096, 4 * GIB, -1]), st.sampled_from([0, 1, 1 << 20, (1 << 32) - 1]), st.integers(0, 9)
)


@examples(max_examples=60)
@given(where=RANGES)
def test_sync_file_range_and_fadvise(where: tuple[int, int, int]) -> None:
    with two_files(b"content") as (fd, oracle_fd):
        expected = [plainly(call, oracle_fd, *where) for call in (libc.sync_file_range, os.posix_fadvise)]
        assert ours((lowlevel.sync_file_range, (fd, *where)), (lowlevel.fadvise, (fd, *where))) == expected


@examples(max_examples=20)
@given(offset=st.sampled_from([0, 4 * GIB]), length=st.sampled_from([(1 << 32), 5 * GIB, 1 << 62]))
def test_fadvise_of_much(offset: int, length: int) -> None:
    with two_files(b"content") as (fd, oracle_fd):
        arguments = offset, length, os.POSIX_FADV_DONTNEED
        assert our(lowlevel.fadvise, fd, *arguments) == plainly(os.posix_fadvise, oracle_fd, *arguments)


@examples(max_examples=60)
@given(
    advice=st.sampled_from([mmap.MADV_DONTNEED, mmap.MADV_WILLNEED, mmap.MADV_FREE, mmap.MADV_NORMAL, 9999]),
    start=st.sampled_from([0, mmap.PAGESIZE, 1]),
)
def test_madvise(advice: int, start: int) -> None:
    pages = [mmap.mmap(-1, 3 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    for memory in pages:
        memory.write(b"x" * len(memory))
    expected = plainly(pages[1].madvise, advice, start, mmap.PAGESIZE)
    with memoryview(pages[0]) as view, view[start : start + mmap.PAGESIZE] as part:
        result = our(lowlevel.madvise, part, advice)
    if start % mmap.PAGESIZE:  # mmap.madvise rounds down; the system call refuses
        assert result == (OSError, 22)
    else:
        assert result == expected
        if advice != mmap.MADV_FREE:  # at the kernel's leisure
            assert pages[0][:] == pages[1][:]
    for memory in pages:
        memory.close()


# Opening

OPEN_FLAGS = st.builds(
    lambda access, more: access | sum(more),
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]),
    st.sets(
        st.sampled_from([os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH])
    ),
)
NAMES = ["file", "missing", "directory", "link", "dangling", "file/below", "directory/../file", "", ".."]


def _furnish(directory: Path) -> None:
    (directory / "file").write_bytes(b"content")
    (directory / "directory").mkdir()
    (directory / "link").symlink_to("file")
    (directory / "dangling").symlink_to("nowhere")


def _tree(directory: Path) -> dict[str, Any]:
    """All there is, and what of it can be compared."""
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        if path.is_symlink():
            content: Any = path.readlink()
        else:
            content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory))] = stat.filemode(status.st_mode), status.st_nlink, content
    return found


def _describe(result: Any) -> Any:
    """What can be compared of an fd, which is closed."""
    if not isinstance(result, int):
        return result
    try:
        return (
            fcntl.fcntl(result, fcntl.F_GETFL),
            os.get_inheritable(result),
            os.path.basename(os.readlink(f"/proc/self/fd/{result}")),
        )
    finally:
        os.close(result)


@examples(max_examples=120)
@given(
    name=st.sampled_from(NAMES).filter(bool),  # of two mistakes in one call either may be found first
    flags=OPEN_FLAGS,
    mode=st.integers(0, 0o777),
    resolve=st.sampled_from([None, 0, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x0C, 1 << 10]),
)
def test_open(name: str, flags: int, mode: int, resolve: int | None) -> None:
    with two_directories() as directories:
        fds = []
        for directory in directories:
            _furnish(directory)
            fds.append(os.open(directory, os.O_RDONLY))
        try:
            if resolve is None:
                expected = plainly(lambda: os.open(name, flags, mode, dir_fd=fds[1]))
                result = our(partial(lowlevel.openat, dir_fd=fds[0]), name, flags, mode)
            else:
                expected = plainly(libc.openat2, name.encode(), flags, mode, resolve, fds[1])
                result = our(partial(lowlevel.openat2, dir_fd=fds[0]), name, flags, mode, resolve)
            assert _describe(result) == _describe(expected)
            assert _tree(directories[0]) == _tree(directories[1])
        finally:
            for fd in fds:
                os.close(fd)


# Directories: a history of changes, each done in both places

ANY_NAME = st.sampled_from(["file", "missing", "directory", "link", "dangling", "directory/x", "y"])


def _plain_unlink(path: Path, flags: int) -> None:
    if flags == libc.AT_REMOVEDIR:
        os.rmdir(path)
    else:
        os.unlink(path)


CHANGES = st.one_of(
    st.tuples(
        st.just("rename"),
        ANY_NAME,
        ANY_NAME,
        st.sampled_from([0, 0, libc.RENAME_NOREPLACE, libc.RENAME_EXCHANGE, 3, 1 << 10]),
    ),
    st.tuples(st.just("link"), ANY_NAME, ANY_NAME, st.sampled_from([0, libc.AT_SYMLINK_FOLLOW])),
    st.tuples(st.just("symlink"), ANY_NAME, ANY_NAME, st.just(0)),
    st.tuples(st.just("unlink"), ANY_NAME, st.just(""), st.sampled_from([0, libc.AT_REMOVEDIR])),
    st.tuples(st.just("mkdir"), ANY_NAME, st.just(""), st.integers(0, 0o7777)),
)


def _change(directory: Path, change: tuple[str, str, str, int]) -> tuple[Call, Callable[[], Any]]:
    """Our call, and the system call."""
    what, first, second, number = change
    one, two = directory / first, directory / second
    changes: dict[str, tuple[Call, Callable[[], Any]]] = {
        "rename": (
            (lowlevel.renameat2, (one, two, number)),
            lambda: libc.renameat2(bytes(one), bytes(two), number),
        ),
        "link": ((lowlevel.linkat, (one, two, number)), lambda: libc.linkat(bytes(one), bytes(two), number)),
        "symlink": ((lowlevel.symlinkat, (first, two)), lambda: os.symlink(first, two)),
        "unlink": ((lowlevel.unlinkat, (one, number)), lambda: _plain_unlink(one, number)),
        "mkdir": ((lowlevel.mkdirat, (one, number)), lambda: os.mkdir(one, number)),
    }
    return changes[what]


@examples(max_examples=80)
@given(history=st.lists(CHANGES, min_size=1, max_size=12))
def test_changes_of_directories(history: list[tuple[str, str, str, int]]) -> None:
    with two_directories() as (directory, oracle_directory):
        for each in (directory, oracle_directory):
            _furnish(each)
        expected = [plainly(_change(oracle_directory, change)[1]) for change in history]
        assert ours(*(_change(directory, change)[0] for change in history)) == expected
        assert _tree(directory) == _tree(oracle_directory)


@examples(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    follow=st.booleans(),
    form=st.sampled_from([str, os.fsencode, Path]),
)
def test_statx(name: str, follow: bool, form: Callable[[str], Any]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "in a directory where nobody else is"
        directory.mkdir()
        _furnish(directory)
        path = form(os.path.join(directory, name))
        expected = plainly(os.stat if follow else os.lstat, path)
        assert our(partial(lowlevel.statx, flags=0 if follow else 0x100), path) == expected


# Extended attributes

ATTRIBUTES = st.sampled_from(["user.a", b"user.b", "user.", "nonsense", "user." + "x" * 300, "trusted.c"])
XATTR_CHANGES = st.lists(
    st.tuples(ATTRIBUTES, st.binary(max_size=200), st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE, 1 << 10])),
    max_size=5,
)


@examples(max_examples=60)
@given(changes=XATTR_CHANGES, wanted=ATTRIBUTES, name=st.sampled_from(["file", "link", "dangling", "directory"]))
def test_xattr(changes: list[tuple[Any, bytes, int]], wanted: Any, name: str) -> None:
    with two_directories() as (directory, oracle_directory):
        for each in (directory, oracle_directory):
            _furnish(each)
        path, oracle_path = directory / name, oracle_directory / name
        expected = [plainly(os.setxattr, oracle_path, *change) for change in changes]
        expected.append(plainly(os.getxattr, oracle_path, wanted))
        calls: list[Call] = [(lowlevel.setxattr, (path, *change)) for change in changes]
        assert ours(*calls, (lowlevel.getxattr, (path, wanted))) == expected
        if path.exists():
            assert sorted(os.listxattr(path)) == sorted(os.listxattr(oracle_path))


@examples(max_examples=40)
@given(changes=XATTR_CHANGES, wanted=ATTRIBUTES)
def test_fxattr(changes: list[tuple[Any, bytes, int]], wanted: Any) -> None:
    with two_files() as (fd, oracle_fd):
        expected = [plainly(os.setxattr, oracle_fd, *change) for change in changes]
        expected.append(plainly(os.getxattr, oracle_fd, wanted))
        calls: list[Call] = [(lowlevel.fsetxattr, (fd, *change)) for change in changes]
        assert ours(*calls, (lowlevel.fgetxattr, (fd, wanted))) == expected


# Sockets

OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_RCVBUF),
    (socket.SOL_SOCKET, socket.SO_LINGER),
    (socket.SOL_SOCKET, socket.SO_TYPE),
    (socket.SOL_SOCKET, socket.SO_ERROR),
    (socket.SOL_SOCKET, 9999),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_TCP, socket.TCP_CONGESTION),
    (socket.IPPROTO_TCP, socket.TCP_INFO),
    (socket.IPPROTO_IP, socket.IP_TTL),
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
    (99, 1),
]
KINDS = [
    (socket.AF_INET, socket.SOCK_STREAM),
    (socket.AF_INET6, socket.SOCK_DGRAM),
    (socket.AF_UNIX, socket.SOCK_STREAM),
]


def _two_sockets(family: int, kind: int) -> tuple[socket.socket, socket.socket]:
    return socket.socket(family, kind), socket.socket(family, kind)


@examples(max_examples=150)
@given(
    option=st.sampled_from(OPTIONS),
    value=st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 100) | st.binary(max_size=20),
    size=st.sampled_from([None, 0, 1, 4, 8, 64, 1024, 1025, -1]),
    kind=st.sampled_from(KINDS),
)
def test_socket_options(option: tuple[int, int], value: int | bytes, size: int | None, kind: tuple[int, int]) -> None:
    one, two = _two_sockets(*kind)
    with one, two:
        expected = [
            plainly(two.setsockopt, *option, value),
            plainly(two.getsockopt, *option, *(() if size is None else (size,))),
        ]
        results = ours((lowlevel.setsockopt, (one, *option, value)), (lowlevel.getsockopt, (one, *option, size)))
        if size in (-1, 1025):  # the standard library says so, too, with an OSError that has no errno
            assert results.pop() == (ValueError,)
            expected.pop()
        if option == (socket.IPPROTO_TCP, socket.TCP_INFO):  # there are clocks in it
            results, expected = (
                [len(each) if type(each) is bytes else each for each in side] for side in (results, expected)
            )
        assert results == expected


@examples(max_examples=80)
@given(
    address=st.sampled_from(
        [
            ("127.0.0.1", 0),
            ("", 0),
            ("192.0.2.1", 0),
            ("127.0.0.1", 1 << 16),
            ("::1", 0),
            ("::", 0, 0, 0),
            "",
            b"\0trio_uring-oracle",
            "missing/socket",
            "x" * 200,
        ]
    ),
    backlog=st.sampled_from([0, 1, 4096, (1 << 31) - 1]),
    kind=st.sampled_from(KINDS),
)
def test_bind_and_listen(address: Any, backlog: int, kind: tuple[int, int]) -> None:
    # Of another family, the standard library does not get as far as the system call.
    assume(isinstance(address, tuple) == (kind[0] != socket.AF_UNIX))
    assume(not isinstance(address, tuple) or (":" in address[0]) == (kind[0] == socket.AF_INET6))
    results = []
    for call in (plainly, our):  # one after the other: an abstract address is there once
        with socket.socket(*kind) as sock:
            functions: Any = (
                (lowlevel.bind, lowlevel.listen) if call is our else (socket.socket.bind, socket.socket.listen)
            )
            outcomes = [call(functions[0], sock, address), call(functions[1], sock, backlog)]
            name = sock.getsockname()
            results.append((outcomes, name[0] if isinstance(name, tuple) else len(name)))
    if isinstance(address, tuple) and address[1] > 65535:
        assert results[1][0][0] == (ValueError,)
        assert results[0][0][0] == (OverflowError,)
    elif isinstance(address, str) and len(address) > 107:
        assert results[1][0][0] == (ValueError,)
        assert results[0][0][0][0] is OSError
    else:
        assert results[0] == results[1]


@examples(max_examples=80)
@given(
    data=st.binary(max_size=50),
    bufsize=st.integers(0, 60),
    flags=st.sampled_from([0, socket.MSG_PEEK, socket.MSG_TRUNC]),
    named=st.booleans(),
)
def test_sendto_and_recvfrom(data: bytes, bufsize: int, flags: int, named: bool) -> None:
    receiver, oracle_receiver = _two_sockets(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, oracle_receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        for each in (receiver, oracle_receiver):
            each.bind(("127.0.0.1", 0))
        if named:
            expected = plainly(sender.sendto, data, 0, oracle_receiver.getsockname())
            assert our(lowlevel.sendto, sender, data, receiver.getsockname()) == expected
        else:
            for each in (oracle_receiver, receiver):
                sender.connect(each.getsockname())
                function = partial(our, lowlevel.sendto) if each is receiver else _plain_send
                assert function(sender, data, None) == len(data)
        in_queue = our(lowlevel.siocinq, receiver)
        assert in_queue == len(data)
        if flags == socket.MSG_TRUNC and bufsize < len(data):
            # The count is that of the datagram: socket.recvfrom then shows bytes that were never received.
            expected = data[:bufsize], sender.getsockname()
            flags = 0
        else:
            expected = plainly(oracle_receiver.recvfrom, bufsize, flags)
        assert our(lowlevel.recvfrom, receiver, bufsize, flags) == expected


def _plain_send(sock: socket.socket, data: bytes, address: None) -> int:
    return sock.send(data)


@examples(max_examples=40)
@given(
    sent=st.integers(0, 5000), family=st.sampled_from([socket.AF_INET, socket.AF_UNIX]), received=st.integers(1, 5000)
)
def test_queue_sizes(sent: int, family: int, received: int) -> None:
    with contextlib.ExitStack() as stack:
        if family == socket.AF_UNIX:
            a, b = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                a = socket.create_connection(listener.getsockname())
                b, _ = listener.accept()
        stack.enter_context(a)
        stack.enter_context(b)
        if sent:
            a.sendall(bytes(sent))
            b.recv(received)
        queues = [int.from_bytes(fcntl.ioctl(b, 0x541B, bytes(4)), "little")]
        assert ours((lowlevel.siocinq, (b,))) == queues == [max(sent - received, 0)]
        if family == socket.AF_UNIX:  # that of TCP empties by itself
            assert our(lowlevel.siocoutq, a) == int.from_bytes(fcntl.ioctl(a, 0x5411, bytes(4)), "little")


# Pipes


@examples(max_examples=40)
@given(flags=st.sampled_from([0, os.O_NONBLOCK, os.O_DIRECT, os.O_CLOEXEC, os.O_NONBLOCK | os.O_DIRECT, os.O_APPEND]))
def test_pipe(flags: int) -> None:
    expected, result = plainly(os.pipe2, flags | os.O_CLOEXEC), our(lowlevel.pipe, flags)
    if not isinstance(expected[0], int):
        assert result == expected
        return
    assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in result] == [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in expected]
    for fd in (*expected, *result):
        assert not os.get_inheritable(fd)
        os.close(fd)


@contextlib.contextmanager
def pipes(n: int) -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe2(os.O_NONBLOCK) for _ in range(n)]
    try:
        yield made
    finally:
        for pipe in made:
            for fd in pipe:
                os.close(fd)


@examples(max_examples=80)
@given(
    data=st.binary(max_size=30),
    length=st.integers(0, 40),
    flags=st.sampled_from([0, 1, 2, 4, 1 << 10]),
)
def test_splice_and_tee_between_pipes(data: bytes, length: int, flags: int) -> None:
    assume(length or flags < 1 << 10)  # splice(2) does not look at its flags if there is nothing to do
    with pipes(4) as made:
        for _, write_end in made[::2]:
            os.write(write_end, data)
        (source, _), (target_end, target) = made[0], made[1]
        (oracle_source, _), (oracle_end, oracle_target) = made[2], made[3]
        expected = [
            plainly(libc.tee, oracle_source, oracle_target, length, flags),
            plainly(libc.splice, oracle_source, -1, oracle_target, -1, length, flags),
        ]
        assert (
            ours(
                (lowlevel.tee, (source, target, length, flags)),
                (lowlevel.splice, (source, -1, target, -1, length, flags)),
            )
            == expected
        )
        for end, oracle in ((source, oracle_source), (target_end, oracle_end)):
            assert plainly(os.read, end, 100) == plainly(os.read, oracle, 100)


@examples(max_examples=80)
@given(offset=OFFSETS, length=st.integers(0, 40))
def test_splice_from_a_file(sparse: Path, offset: int, length: int) -> None:
    with _open_twice(sparse) as (fd, oracle_fd), pipes(2) as ((end, target), (oracle_end, oracle_target)):
        expected = plainly(libc.splice, oracle_fd, offset, oracle_target, -1, length, 0)
        assert our(lowlevel.splice, fd, offset, target, -1, length) == expected
        assert plainly(os.read, end, 100) == plainly(os.read, oracle_end, 100)
        assert os.lseek(fd, 0, os.SEEK_CUR) == os.lseek(oracle_fd, 0, os.SEEK_CUR)


@examples(max_examples=40)
@given(data=st.binary(min_size=1, max_size=30), offset=OFFSETS, length=st.integers(0, 40))
def test_splice_to_a_file(data: bytes, offset: int, length: int) -> None:
    with two_files(b"0123456789") as (fd, oracle_fd), pipes(2) as ((source, end), (oracle_source, oracle_end)):
        os.write(end, data)
        os.write(oracle_end, data)
        expected = plainly(libc.splice, oracle_source, -1, oracle_fd, offset, length, 0)
        assert our(lowlevel.splice, source, -1, fd, offset, length) == expected
        assert _contents(fd) == _contents(oracle_fd)


# epoll, children


@examples(max_examples=60)
@given(
    events=st.lists(
        st.sampled_from([select.EPOLLIN, select.EPOLLOUT, select.EPOLLET | select.EPOLLIN, select.EPOLLONESHOT, 0]),
        min_size=1,
        max_size=4,
    ),
    written=st.booleans(),
    maxevents=st.integers(1, 5),
)
def test_epoll(events: list[int], written: bool, maxevents: int) -> None:
    with pipes(len(events)) as made, select.epoll() as epoll, select.epoll() as oracle:
        fds = [
            read_end if mask & select.EPOLLIN else write_end
            for (read_end, write_end), mask in zip(made, events, strict=True)
        ]
        if written:
            for _, write_end in made:
                os.write(write_end, b"x")
        for fd, mask in zip(fds, events, strict=True):
            oracle.register(fd, mask)
        adding: list[Call] = [(lowlevel.epoll_ctl, (epoll, 1, fd, mask)) for fd, mask in zip(fds, events, strict=True)]
        assert ours(*adding) == [None] * len(events)
        expected = oracle.poll(0, maxevents)
        if expected:
            assert our(lowlevel.epoll_wait, epoll, maxevents) == expected
        assert ours(
            (lowlevel.epoll_ctl, (epoll, 3, fds[0], select.EPOLLOUT)), (lowlevel.epoll_ctl, (epoll, 2, fds[0]))
        ) == [
            None,
            None,
        ]
        oracle.unregister(fds[0])
        assert sorted(epoll.poll(0)) == sorted(oracle.poll(0))


WAITID_OPTIONS = [os.WEXITED, os.WEXITED | os.WNOHANG, os.WEXITED | os.WNOWAIT, os.WSTOPPED | os.WNOHANG, 0, 1 << 20]


@examples(max_examples=25)
@given(end=st.sampled_from([0, 1, 77, -signal.SIGKILL, -signal.SIGTERM]), options=st.sampled_from(WAITID_OPTIONS))
def test_waitid(end: int, options: int) -> None:
    results = []
    for call in (plainly, our):
        read_end, write_end = os.pipe()
        script = f"kill {end} $$; read x" if end < 0 else f"exit {end}"
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0)])
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            function: Any = lowlevel.waitid if call is our else os.waitid
            result = call(function, os.P_PID, pid, options)
            if isinstance(result, os.waitid_result):
                assert result.si_pid == pid
                result = tuple(result)[1:]
            results.append((result, plainly(os.waitid, os.P_PID, pid, os.WEXITED) is None))
        finally:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(read_end)
            os.close(write_end)
    assert results[0] == results[1]
