"""The operation table, and one async function per operation on raw file descriptors.

`TABLE` is the single source of truth: a `Kind` says what the library knows about an operation, the function below
it how its arguments fill an SQE. The probe, the reference and the tests iterate over it. A new operation is its row
and a function of a few lines.

What holds for all of them, so that each docstring can be short:

* Each is a checkpoint. In a cancelled scope it raises `trio.Cancelled` and submits nothing.
* Cancelled later, it ends either way, never both: with its result if the kernel has done it, with `trio.Cancelled`
  if it did nothing. A result that arrives in spite of a cancel is returned; the next checkpoint raises.
* Buffers are held by a real export until the kernel is done: resizing a `bytearray` meanwhile raises `BufferError`.
  No function here keeps an export in a variable: a traceback would hold it for longer.
* Errors are `OSError` with the errno, and the file name where there is one, as in the standard library.
* EINTR is tried again. So is EAGAIN, once the fd is ready, except where the caller forbids waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import socket as stdlib_socket
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import enable_ki_protection

from ._abi import ASYNC_CANCEL_ALL, ASYNC_CANCEL_FD, FSYNC_DATASYNC, Opcode
from ._cancel import Kind
from ._core import HasFileno, _this_thread, number_of
from ._errors import ERESTARTS
from ._ring import ffi
from ._sockaddr import (
    Ancillary,
    decode_address,
    decode_ancillary,
    descriptors,
    encode_address,
    encode_ancillary,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
STATX_BASIC_STATS: Final = 0x7FF

_from_buffer: Final = ffi.from_buffer
_new: Final = ffi.new
_IOVECS: Final = ffi.typeof("struct iovec[]")
_MSGHDR: Final = ffi.typeof("struct msghdr *")
_STATX: Final = ffi.typeof("struct statx *")
_TIMESPEC: Final = ffi.typeof("struct __kernel_timespec *")
_STORAGE: Final = ffi.typeof("struct sockaddr_storage *")
_SOCKLEN: Final = ffi.typeof("tu_socklen_t *")
_CHARS: Final = ffi.typeof("char[]")
_UINTPTR: Final = ffi.typeof("uintptr_t")
_STORAGE_SIZE: Final = ffi.sizeof("struct sockaddr_storage")

TABLE: Final[dict[str, Kind]] = {}
"""Every operation, by the name of its function."""


def _row(name: str, opcode: Opcode, since: str, result: Any, summary: str, man: str | None = None, **more: Any) -> Kind:
    man = man or f"io_uring_prep_{opcode.name.lower()}(3)"
    kind = Kind(name=name, opcode=opcode, since=since, result=result, summary=summary, man=man, **more)
    TABLE[name] = kind
    return kind


def _close_result(res: int, keep: Any) -> None:
    with contextlib.suppress(OSError):  # it is closed in any case, and nobody is there to be told
        os.close(res)


def _address_of(struct: Any) -> int:
    return int(ffi.cast(_UINTPTR, struct))


def _path(path: StrOrBytesPath) -> Any:
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    return _new(_CHARS, raw)


# Files

READ = _row("read", Opcode.READ, "5.6", "count", "read into a buffer", wait_for=select.POLLIN)
WRITE = _row("write", Opcode.WRITE, "5.6", "count", "write from a buffer", wait_for=select.POLLOUT)
READV = _row("readv", Opcode.READV, "5.1", "count", "read into several buffers", wait_for=select.POLLIN)
WRITEV = _row("writev", Opcode.WRITEV, "5.1", "count", "write from several buffers", wait_for=select.POLLOUT)
FSYNC = _row("fsync", Opcode.FSYNC, "5.1", "nothing", "flush a file's data and metadata to storage")
FDATASYNC = _row("fdatasync", Opcode.FSYNC, "5.1", "nothing", "flush a file's data to storage")
OPENAT = _row("openat", Opcode.OPENAT, "5.6", "fd", "open a file", dispose=_close_result)
CLOSE = _row("close", Opcode.CLOSE, "5.6", "nothing", "close an fd", success=ERESTARTS | {-errno.EINTR})
STATX = _row("statx", Opcode.STATX, "5.6", "struct", "a file's metadata")


@enable_ki_protection
async def read(fd: int | HasFileno, buffer: Buffer, offset: int = -1) -> int:
    """Reads into ``buffer`` and returns the number of bytes; 0 is the end of the file. IORING_OP_READ, Linux 5.6.

    Args:
        fd: what to read.
        buffer: a writable, contiguous buffer. At most 2147479552 bytes are read in one call.
        offset: where in the file; -1 is the file's position, which moves.

    A read of a regular file that the kernel has begun cannot be cancelled; bound its size instead.
    """
    return await _this_thread.manager.perform(
        READ, fd if type(fd) is int else number_of(fd), offset, _from_buffer(_CHARS, buffer, True), -1
    )


@enable_ki_protection
async def write(fd: int | HasFileno, data: Buffer, offset: int = -1) -> int:
    """Writes ``data`` and returns the number of bytes written, which may be less. IORING_OP_WRITE, Linux 5.6.

    Args:
        fd: where to write.
        data: any contiguous buffer. At most 2147479552 bytes are written in one call.
        offset: where in the file; -1 is the file's position, which moves.
    """
    return await _this_thread.manager.perform(
        WRITE, fd if type(fd) is int else number_of(fd), offset, _from_buffer(_CHARS, data), -1
    )


def _iovec(buffers: Sequence[Buffer], *, writable: bool) -> tuple[Any, list[Any]]:
    views = [_from_buffer(_CHARS, buffer, writable) for buffer in buffers]
    vector = _new(_IOVECS, len(views))
    for i, view in enumerate(views):
        vector[i].iov_base = view
        vector[i].iov_len = len(view)
    return vector, views


@enable_ki_protection
async def readv(fd: int | HasFileno, buffers: Sequence[Buffer], offset: int = -1) -> int:
    """Reads into ``buffers``, one after the other; returns the bytes in all. IORING_OP_READV, Linux 5.1.

    Args:
        fd: what to read.
        buffers: up to 1024 writable buffers.
        offset: as in `read`.
    """
    vector, views = _iovec(buffers, writable=True)
    performing = _this_thread.manager.perform(READV, number_of(fd), offset, vector, len(views), keep=views)
    del vector, views
    return await performing


@enable_ki_protection
async def writev(fd: int | HasFileno, buffers: Sequence[Buffer], offset: int = -1) -> int:
    """Writes ``buffers``, one after the other; returns the bytes in all. IORING_OP_WRITEV, Linux 5.1.

    Args:
        fd: where to write.
        buffers: up to 1024 buffers.
        offset: as in `write`.
    """
    vector, views = _iovec(buffers, writable=False)
    performing = _this_thread.manager.perform(WRITEV, number_of(fd), offset, vector, len(views), keep=views)
    del vector, views
    return await performing


@enable_ki_protection
async def fsync(fd: int | HasFileno) -> None:
    """Returns when the file's data and metadata are on storage. IORING_OP_FSYNC, Linux 5.1.

    The kernel does it in a worker thread.
    """
    await _this_thread.manager.perform(FSYNC, number_of(fd))


@enable_ki_protection
async def fdatasync(fd: int | HasFileno) -> None:
    """As `fsync`, without metadata that reading does not need. IORING_OP_FSYNC with DATASYNC, Linux 5.1."""
    await _this_thread.manager.perform(FDATASYNC, number_of(fd), op_flags=FSYNC_DATASYNC)


@enable_ki_protection
async def openat(path: StrOrBytesPath, flags: int, mode: int = 0o777, *, dir_fd: int = AT_FDCWD) -> int:
    """Opens a file and returns its fd, which is not inheritable. IORING_OP_OPENAT, Linux 5.6.

    Args:
        path: relative to ``dir_fd``.
        flags: ``os.O_*``; ``O_CLOEXEC`` is added, as in `os.open`.
        mode: permissions of a file that is created, before the umask.
        dir_fd: an open directory; the default is the current one.

    An open that wins against its cancel returns its fd; none is leaked. A FIFO is not opened as open(2) does:
    reading succeeds at once, writing fails with ENXIO while nobody reads.
    """
    return await _this_thread.manager.perform(
        OPENAT, dir_fd, 0, _path(path), mode, flags | os.O_CLOEXEC, filename=os.fspath(path)
    )


@enable_ki_protection
async def close(fd: int) -> None:
    """Closes ``fd``. IORING_OP_CLOSE, Linux 5.6.

    Whoever waits for an operation on it gets `trio.ClosedResourceError` first. If this raises `trio.Cancelled` the fd
    is still open and yours: shield the call where it must be closed.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    trio.lowlevel.notify_closing(fd)
    await _this_thread.manager.perform(CLOSE, fd)


@enable_ki_protection
async def statx(
    path: StrOrBytesPath | int, *, dir_fd: int = AT_FDCWD, flags: int = 0, mask: int = STATX_BASIC_STATS
) -> os.stat_result:
    """A file's metadata, as `os.stat` returns it. IORING_OP_STATX, Linux 5.6; always in a kernel worker.

    Args:
        path: relative to ``dir_fd``, or an fd.
        dir_fd: an open directory; the default is the current one.
        flags: ``AT_SYMLINK_NOFOLLOW`` (0x100) and the like; see statx(2).
        mask: which fields are wanted; see statx(2).
    """
    if isinstance(path, int):
        filename: object = path
        dir_fd, flags, raw = path, flags | AT_EMPTY_PATH, _path("")
    else:
        filename = os.fspath(path)
        raw = _path(path)
    result = _new(_STATX)
    await _this_thread.manager.perform(
        STATX, dir_fd, _address_of(result), raw, mask, flags, keep=result, filename=filename
    )
    return _stat_result(result)


def _stat_result(stx: Any) -> os.stat_result:
    times = [stx.stx_atime, stx.stx_mtime, stx.stx_ctime]
    nanoseconds = [t.tv_sec * 10**9 + t.tv_nsec for t in times]
    fields = (
        stx.stx_mode,
        stx.stx_ino,
        os.makedev(stx.stx_dev_major, stx.stx_dev_minor),
        stx.stx_nlink,
        stx.stx_uid,
        stx.stx_gid,
        stx.stx_size,
        *(t.tv_sec for t in times),
    )
    hidden = {
        **{f"st_{which}time": t.tv_sec + t.tv_nsec * 1e-9 for which, t in zip("amc", times, strict=True)},
        **{f"st_{which}time_ns": ns for which, ns in zip("amc", nanoseconds, strict=True)},
        "st_blksize": stx.stx_blksize,
        "st_blocks": stx.stx_blocks,
        "st_rdev": os.makedev(stx.stx_rdev_major, stx.stx_rdev_minor),
    }
    return os.stat_result(fields, hidden)


# Sockets


def _close_received_fds(res: int, keep: Any) -> None:
    message = keep[0]
    for fd in descriptors(decode_ancillary(_control(message))):
        _close_result(fd, None)


SOCKET = _row("socket", Opcode.SOCKET, "5.19", "fd", "create a socket", dispose=_close_result)
ACCEPT = _row(
    "accept",
    Opcode.ACCEPT,
    "5.5",
    "fd",
    "accept a connection",
    direction="read",
    wait_for=select.POLLIN,
    dispose=_close_result,
)
CONNECT = _row("connect", Opcode.CONNECT, "5.5", "nothing", "connect a socket", direction="write")
SHUTDOWN = _row("shutdown", Opcode.SHUTDOWN, "5.11", "nothing", "shut down part of a connection")
SEND = _row("send", Opcode.SEND, "5.6", "count", "send from a buffer", direction="write", wait_for=select.POLLOUT)
RECV = _row("recv", Opcode.RECV, "5.6", "count", "receive into a buffer", direction="read", wait_for=select.POLLIN)
SENDMSG = _row(
    "sendmsg",
    Opcode.SENDMSG,
    "5.3",
    "count",
    "send buffers, ancillary data, to an address",
    direction="write",
    wait_for=select.POLLOUT,
)
RECVMSG = _row(
    "recvmsg",
    Opcode.RECVMSG,
    "5.3",
    "struct",
    "receive data, ancillary data and the sender's address",
    direction="read",
    wait_for=select.POLLIN,
    dispose=_close_received_fds,
)

# With MSG_DONTWAIT, "would block" is the answer the caller asked for.
_DONTWAIT: Final = {kind: dataclasses.replace(kind, wait_for=0) for kind in (SEND, RECV, SENDMSG, RECVMSG)}


def _patient(kind: Kind, flags: int) -> Kind:
    return _DONTWAIT[kind] if flags & stdlib_socket.MSG_DONTWAIT else kind


@enable_ki_protection
async def socket(family: int = stdlib_socket.AF_INET, type: int = stdlib_socket.SOCK_STREAM, proto: int = 0) -> int:
    """Creates a socket and returns its fd, which is not inheritable. IORING_OP_SOCKET, Linux 5.19."""
    return await _this_thread.manager.perform(SOCKET, -1, type | stdlib_socket.SOCK_CLOEXEC, None, proto, via=family)


@enable_ki_protection
async def accept(fd: int | HasFileno, flags: int = stdlib_socket.SOCK_CLOEXEC) -> tuple[int, Any]:
    """Accepts a connection; returns its fd and the peer's address. IORING_OP_ACCEPT, Linux 5.5.

    Args:
        fd: a listening socket.
        flags: ``SOCK_NONBLOCK`` for the new fd; ``SOCK_CLOEXEC`` is added.

    An accept that wins against its cancel returns its connection; none is leaked or dropped.
    """
    storage = _new(_STORAGE)
    size = _new(_SOCKLEN, _STORAGE_SIZE)
    number = await _this_thread.manager.perform(
        ACCEPT, number_of(fd), _address_of(size), storage, 0, flags | stdlib_socket.SOCK_CLOEXEC, keep=size
    )
    raw = bytes(ffi.buffer(storage, min(size[0], _STORAGE_SIZE)))
    return number, decode_address(raw)


@enable_ki_protection
async def connect(fd: int | HasFileno, address: Any) -> None:
    """Connects a socket. IORING_OP_CONNECT, Linux 5.5.

    Args:
        fd: the socket.
        address: ``(ip, port)``, ``(ip, port, flowinfo, scope_id)`` or a UNIX path. Names are not resolved.

    After `trio.Cancelled` the socket is of no use: close it.
    """
    raw = encode_address(address)
    await _this_thread.manager.perform(CONNECT, number_of(fd), len(raw), _new(_CHARS, raw))


@enable_ki_protection
async def shutdown(fd: int | HasFileno, how: int) -> None:
    """Shuts down part of a connection. IORING_OP_SHUTDOWN, Linux 5.11.

    Args:
        fd: the socket.
        how: ``socket.SHUT_RD``, ``SHUT_WR`` or ``SHUT_RDWR``.
    """
    await _this_thread.manager.perform(SHUTDOWN, number_of(fd), length=how)


@enable_ki_protection
async def send(fd: int | HasFileno, data: Buffer, flags: int = 0) -> int:
    """Sends ``data`` and returns the number of bytes sent, which may be less. IORING_OP_SEND, Linux 5.6.

    Args:
        fd: a connected socket.
        data: any contiguous buffer.
        flags: ``MSG_*``. With ``MSG_WAITALL`` the kernel goes on until everything is sent; cancelled then, the call
            returns what was sent, if anything was.
    """
    return await _this_thread.manager.perform(
        _patient(SEND, flags), fd if type(fd) is int else number_of(fd), 0, _from_buffer(_CHARS, data), -1, flags
    )


@enable_ki_protection
async def recv(fd: int | HasFileno, buffer: Buffer, flags: int = 0) -> int:
    """Receives into ``buffer`` and returns the number of bytes; 0 is the end of the stream. IORING_OP_RECV, Linux 5.6.

    Args:
        fd: a socket.
        buffer: a writable, contiguous buffer.
        flags: ``MSG_*``.
    """
    return await _this_thread.manager.perform(
        RECV if not flags else _patient(RECV, flags),
        fd if type(fd) is int else number_of(fd),
        0,
        _from_buffer(_CHARS, buffer, True),
        -1,
        flags,
    )


def _control(message: Any) -> bytes:
    if not message.msg_controllen:
        return b""
    return bytes(ffi.buffer(message.msg_control, message.msg_controllen))


def _message(buffers: Sequence[Buffer], name: Any, name_size: int, control: Any, *, writable: bool) -> tuple[Any, ...]:
    """A msghdr, and everything it points to."""
    vector, views = _iovec(buffers, writable=writable)
    message = _new(_MSGHDR)
    message.msg_iov = vector
    message.msg_iovlen = len(views)
    if name is not None:
        message.msg_name = name
        message.msg_namelen = name_size
    if control is not None:
        message.msg_control = control
        message.msg_controllen = len(control)
    return message, vector, views, name, control


@enable_ki_protection
async def sendmsg(
    fd: int | HasFileno,
    buffers: Sequence[Buffer],
    ancdata: Iterable[tuple[int, int, Any]] = (),
    flags: int = 0,
    address: Any = None,
) -> int:
    """Sends ``buffers`` with ancillary data; returns the bytes sent. IORING_OP_SENDMSG, Linux 5.3.

    Args:
        fd: a socket.
        buffers: the data, up to 1024 pieces.
        ancdata: ``(level, type, data)`` items, as in `socket.socket.sendmsg`; SCM_RIGHTS passes fds.
        flags: ``MSG_*``.
        address: the destination, for a socket that is not connected; see `connect`.
    """
    name = None if address is None else _new(_CHARS, raw := encode_address(address))
    control = encode_ancillary(ancdata)
    keep = _message(
        buffers,
        name,
        len(raw) if name is not None else 0,
        _from_buffer(_CHARS, control) if control else None,
        writable=False,
    )
    performing = _this_thread.manager.perform(_patient(SENDMSG, flags), number_of(fd), 0, keep[0], 1, flags, keep=keep)
    del keep
    return await performing


@enable_ki_protection
async def recvmsg(
    fd: int | HasFileno, bufsize: int, ancbufsize: int = 0, flags: int = 0
) -> tuple[bytes, list[Ancillary], int, Any]:
    """Receives up to ``bufsize`` bytes with ancillary data. IORING_OP_RECVMSG, Linux 5.3.

    Args:
        fd: a socket.
        bufsize: room for data, in bytes.
        ancbufsize: room for ancillary data, in bytes; see `socket.CMSG_SPACE`.
        flags: ``MSG_*``.

    Returns:
        ``(data, ancdata, msg_flags, address)``, as `socket.socket.recvmsg`.
    """
    data = bytearray(bufsize)
    control = _new(_CHARS, ancbufsize) if ancbufsize else None
    keep = _message([data], _new(_STORAGE), _STORAGE_SIZE, control, writable=True)
    message = keep[0]
    count = await _this_thread.manager.perform(_patient(RECVMSG, flags), number_of(fd), 0, message, 1, flags, keep=keep)
    address = decode_address(bytes(ffi.buffer(message.msg_name, min(message.msg_namelen, _STORAGE_SIZE))))
    return bytes(memoryview(data)[:count]), decode_ancillary(_control(message)), message.msg_flags, address


# The ring itself

POLL = _row("poll", Opcode.POLL_ADD, "5.1", "count", "wait for poll events", man="io_uring_prep_poll_add(3)")
TIMEOUT = _row("timeout", Opcode.TIMEOUT, "5.4", "nothing", "wait for a while", success=frozenset({-errno.ETIME}))
NOP = _row("nop", Opcode.NOP, "5.1", "nothing", "nothing")
ASYNC_CANCEL = _row(
    "async_cancel", Opcode.ASYNC_CANCEL, "5.19", "count", "cancel what is in flight on an fd", "io_uring_prep_cancel(3)"
)


@enable_ki_protection
async def poll(fd: int | HasFileno, events: int) -> int:
    """Waits until one of ``events`` holds and returns those that do. IORING_OP_POLL_ADD, Linux 5.1.

    Args:
        fd: anything poll(2) takes.
        events: ``select.POLLIN`` and so on. ``POLLERR``, ``POLLHUP`` and ``POLLRDHUP`` are always reported.
    """
    return await _this_thread.manager.perform(POLL, number_of(fd), op_flags=events)


@enable_ki_protection
async def timeout(seconds: float) -> None:
    """Returns after ``seconds``, by the kernel's clock. IORING_OP_TIMEOUT, Linux 5.4.

    `trio.sleep` costs less and follows trio's clock; this is for measuring and for chains.
    """
    if not seconds >= 0:
        raise ValueError(f"seconds must not be negative: {seconds}")
    nanoseconds = round(seconds * 1e9)
    spec = _new(_TIMESPEC, (nanoseconds // 10**9, nanoseconds % 10**9))
    await _this_thread.manager.perform(TIMEOUT, -1, 0, spec, 1)


@enable_ki_protection
async def nop() -> None:
    """One round through the ring. IORING_OP_NOP, Linux 5.1."""
    await _this_thread.manager.perform(NOP)


@enable_ki_protection
async def async_cancel(fd: int | HasFileno) -> int:
    """Cancels what is in flight on ``fd``; returns how many operations. IORING_OP_ASYNC_CANCEL by fd, Linux 5.19.

    Tasks that wait for one of them get ``OSError(ECANCELED)``. To cancel a task use its cancel scope.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    manager = _this_thread.manager
    manager.expect_cancel_by_fd(number_of(fd))
    try:
        return await manager.perform(ASYNC_CANCEL, number_of(fd), op_flags=ASYNC_CANCEL_FD | ASYNC_CANCEL_ALL)
    except FileNotFoundError:  # nothing is in flight
        return 0
