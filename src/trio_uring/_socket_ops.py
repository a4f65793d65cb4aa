"""Operations on sockets: see `_ops` for what holds for all of them.

What would block is done by the kernel when the socket is ready, without a thread. One task at a time may use each
direction of a socket; another gets `trio.BusyResourceError`. ``MSG_DONTWAIT`` forbids waiting: "would block" is then
the answer.

What never blocks is no faster on a ring than by the plain system call; it is here for batches and chains. Where the
kernel lacks it, or lacks it for this socket (in io_uring, UNIX sockets have no SIOCINQ and getsockopt knows only
SOL_SOCKET), the plain call does it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import select
import socket as stdlib_socket
import sys
import termios
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, overload

from trio.lowlevel import enable_ki_protection

from ._abi import (
    SOCKET_OP_GETSOCKOPT,
    SOCKET_OP_SETSOCKOPT,
    SOCKET_OP_SIOCINQ,
    SOCKET_OP_SIOCOUTQ,
    Opcode,
)
from ._core import HasFileno, _this_thread, number_of
from ._ops import close_result, filled_by, operation, row
from ._sockaddr import Ancillary, decode_address, decode_ancillary, descriptors, encode_address, encode_ancillary
from ._structs import (
    CHARS,
    STORAGE_SIZE,
    address_in,
    address_of,
    content,
    control_of,
    from_buffer,
    message,
    new,
    new_address,
    unsigned,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from typing_extensions import Buffer

    from ._cancel import Kind
    from ._ops import Request

_INT_SIZE: Final = 4
_MAX_BACKLOG: Final = (1 << 31) - 1
_MAX_OPTION_SIZE: Final = 1024  # the standard library's limit


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[stdlib_socket.socket]:
    """The standard library's view of a socket."""
    sock = stdlib_socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


# Making and connecting


def _plain_socket(*, off: int, length: int, via: int | None, **fields: Any) -> int:
    assert via is not None
    return stdlib_socket.socket(via, off, length).detach()


def _plain_bind(*, fd: int, keep: bytes, **fields: Any) -> int:
    with _borrowed(fd) as sock:
        sock.bind(decode_address(keep))
    return 0


def _plain_listen(*, fd: int, length: int, **fields: Any) -> int:
    with _borrowed(fd) as sock:
        sock.listen(min(length, _MAX_BACKLOG))
    return 0


SOCKET = row(
    "socket",
    Opcode.SOCKET,
    "5.19",
    "fd",
    "create a socket",
    dispose=close_result,
    cloexec="off",
    fallback=_plain_socket,
)
BIND = row("bind", Opcode.BIND, "6.11", "nothing", "give a socket an address", fallback=_plain_bind)
LISTEN = row("listen", Opcode.LISTEN, "6.11", "nothing", "have a socket take connections", fallback=_plain_listen)
ACCEPT = row(
    "accept",
    Opcode.ACCEPT,
    "5.5",
    "fd",
    "accept a connection",
    runs="waits",
    direction="read",
    wait_for=select.POLLIN,
    dispose=close_result,
    decode=lambda res, keep: (res, address_in(keep[0], keep[1][0])),
    cloexec="op_flags",
)
CONNECT = row("connect", Opcode.CONNECT, "5.5", "nothing", "connect a socket", runs="waits", direction="write")
SHUTDOWN = row("shutdown", Opcode.SHUTDOWN, "5.11", "nothing", "shut down part of a connection")


@operation
def socket(family: int = stdlib_socket.AF_INET, type: int = stdlib_socket.SOCK_STREAM, proto: int = 0) -> Request[int]:
    """Creates a socket and returns its fd, which is not inheritable. IORING_OP_SOCKET, Linux 5.19.

    Args:
        family, type, proto: as in `socket.socket`. The type may have ``SOCK_NONBLOCK`` in it.
    """
    return SOCKET, -1, type | stdlib_socket.SOCK_CLOEXEC, None, unsigned("proto", proto), 0, None, None, 0, family


@operation
def bind(fd: int | HasFileno, address: Any) -> Request[None]:
    """Gives a socket an address. IORING_OP_BIND, Linux 6.11; before that, bind(2).

    Args:
        fd: the socket.
        address: as in `connect`. Port 0 is any free one, an empty UNIX path any free abstract one.
    """
    raw = encode_address(address)
    return BIND, number_of(fd), len(raw), new(CHARS, raw), 0, 0, raw


@operation
def listen(fd: int | HasFileno, backlog: int) -> Request[None]:
    """Has a socket take connections. IORING_OP_LISTEN, Linux 6.11; before that, listen(2).

    Args:
        fd: the socket.
        backlog: how many connections may wait to be accepted. The kernel has a limit (net.core.somaxconn).
    """
    return LISTEN, number_of(fd), 0, None, unsigned("backlog", backlog)


@operation
def accept(fd: int | HasFileno, flags: int = stdlib_socket.SOCK_CLOEXEC) -> Request[tuple[int, Any]]:
    """Accepts a connection; returns its fd and the peer's address. IORING_OP_ACCEPT, Linux 5.5.

    Args:
        fd: a listening socket.
        flags: ``SOCK_NONBLOCK`` for the new fd; ``SOCK_CLOEXEC`` is added.

    An accept that wins against its cancel returns its connection; none is leaked or dropped.
    """
    storage, size = keep = new_address()
    return ACCEPT, number_of(fd), address_of(size), storage, 0, flags | stdlib_socket.SOCK_CLOEXEC, keep


@operation
def connect(fd: int | HasFileno, address: Any) -> Request[None]:
    """Connects a socket. IORING_OP_CONNECT, Linux 5.5.

    Args:
        fd: the socket.
        address: ``(ip, port)``, ``(ip, port, flowinfo, scope_id)`` or a UNIX path. Names are not resolved.

    After `trio.Cancelled` the socket is of no use: close it.
    """
    raw = encode_address(address)
    return CONNECT, number_of(fd), len(raw), new(CHARS, raw)


@operation
def shutdown(fd: int | HasFileno, how: int) -> Request[None]:
    """Shuts down part of a connection. IORING_OP_SHUTDOWN, Linux 5.11.

    Args:
        fd: the socket.
        how: ``socket.SHUT_RD``, ``SHUT_WR`` or ``SHUT_RDWR``.
    """
    return SHUTDOWN, number_of(fd), 0, None, unsigned("how", how)


# Data


def _close_received_fds(res: int, keep: Any) -> None:
    for fd in descriptors(decode_ancillary(control_of(keep[0]))):
        close_result(fd, None)


def _received(res: int, keep: Any) -> tuple[bytes, list[Ancillary], int, Any]:
    header, _, (data,), *_ = keep
    return content(data, res), decode_ancillary(control_of(header)), header.msg_flags, _sender(header)


def _sender(header: Any) -> Any:
    return address_in(header.msg_name, header.msg_namelen)


SEND = row(
    "send",
    Opcode.SEND,
    "5.6",
    "count",
    "send from a buffer",
    runs="waits",
    direction="write",
    wait_for=select.POLLOUT,
)
RECV = row(
    "recv",
    Opcode.RECV,
    "5.6",
    "count",
    "receive into a buffer",
    runs="waits",
    direction="read",
    wait_for=select.POLLIN,
)
SENDTO = row(
    "sendto",
    Opcode.SENDMSG,
    "5.3",
    "count",
    "send a buffer to an address",
    runs="waits",
    direction="write",
    wait_for=select.POLLOUT,
)
RECVFROM = row(
    "recvfrom",
    Opcode.RECVMSG,
    "5.3",
    "struct",
    "receive data and the sender's address",
    runs="waits",
    direction="read",
    wait_for=select.POLLIN,
    decode=lambda res, keep: (content(keep[2][0], res), _sender(keep[0])),
)
SENDMSG = row(
    "sendmsg",
    Opcode.SENDMSG,
    "5.3",
    "count",
    "send buffers, ancillary data, to an address",
    runs="waits",
    direction="write",
    wait_for=select.POLLOUT,
)
RECVMSG = row(
    "recvmsg",
    Opcode.RECVMSG,
    "5.3",
    "struct",
    "receive data, ancillary data and the sender's address",
    runs="waits",
    direction="read",
    wait_for=select.POLLIN,
    dispose=_close_received_fds,
    decode=_received,
)

_MSG_DONTWAIT: Final = int(stdlib_socket.MSG_DONTWAIT)
_DONTWAIT: Final = {kind: replace(kind, wait_for=0) for kind in (SEND, RECV, SENDTO, RECVFROM, SENDMSG, RECVMSG)}


def _patient(kind: Kind[Any], flags: int) -> Kind[Any]:
    """With MSG_DONTWAIT, "would block" is the answer the caller asked for."""
    return _DONTWAIT[kind] if int(flags) & _MSG_DONTWAIT else kind  # in plain ints: enum arithmetic is slow


def _send(fd: int | HasFileno, data: Buffer, flags: int = 0) -> Request[int]:
    return _patient(SEND, flags), number_of(fd), 0, from_buffer(CHARS, data), -1, flags


@filled_by(_send)
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
        SEND if not flags else _patient(SEND, flags),
        fd if type(fd) is int else number_of(fd),
        0,
        from_buffer(CHARS, data),
        -1,
        flags,
    )


def _recv(fd: int | HasFileno, buffer: Buffer, flags: int = 0) -> Request[int]:
    return _patient(RECV, flags), number_of(fd), 0, from_buffer(CHARS, buffer, True), -1, flags


@filled_by(_recv)
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
        from_buffer(CHARS, buffer, True),
        -1,
        flags,
    )


def _sending(
    kind: Kind[int], fd: int, buffers: Sequence[Buffer], control: bytes, flags: int, address: Any
) -> Request[int]:
    raw = b"" if address is None else encode_address(address)
    keep = message(
        buffers,
        new(CHARS, raw) if raw else None,
        len(raw),
        from_buffer(CHARS, control) if control else None,
        writable=False,
    )
    return _patient(kind, flags), fd, 0, keep[0], 1, flags, keep


def _receiving(kind: Kind[Any], fd: int, bufsize: int, ancbufsize: int, flags: int) -> Request[Any]:
    control = new(CHARS, ancbufsize) if ancbufsize else None
    keep = message([bytearray(bufsize)], new_address()[0], STORAGE_SIZE, control, writable=True)
    return _patient(kind, flags), fd, 0, keep[0], 1, flags, keep


@operation
def sendto(fd: int | HasFileno, data: Buffer, address: Any, flags: int = 0) -> Request[int]:
    """Sends ``data`` to an address; returns the number of bytes sent. IORING_OP_SENDMSG, Linux 5.3.

    Args:
        fd: a socket that is not connected.
        data: any contiguous buffer.
        address: the destination; see `connect`.
        flags: ``MSG_*``.
    """
    return _sending(SENDTO, number_of(fd), (data,), b"", flags, address)


@operation
def recvfrom(fd: int | HasFileno, bufsize: int, flags: int = 0) -> Request[tuple[bytes, Any]]:
    """Receives up to ``bufsize`` bytes; returns them and the sender's address. IORING_OP_RECVMSG, Linux 5.3.

    Args:
        fd: a socket.
        bufsize: room for data, in bytes. The rest of a datagram is lost.
        flags: ``MSG_*``.
    """
    return _receiving(RECVFROM, number_of(fd), bufsize, 0, flags)


@operation
def sendmsg(
    fd: int | HasFileno,
    buffers: Sequence[Buffer],
    ancdata: Iterable[tuple[int, int, Any]] = (),
    flags: int = 0,
    address: Any = None,
) -> Request[int]:
    """Sends ``buffers`` with ancillary data; returns the bytes sent. IORING_OP_SENDMSG, Linux 5.3.

    Args:
        fd: a socket.
        buffers: the data, up to 1024 pieces.
        ancdata: ``(level, type, data)`` items, as in `socket.socket.sendmsg`; SCM_RIGHTS passes fds.
        flags: ``MSG_*``.
        address: the destination, for a socket that is not connected; see `connect`.
    """
    return _sending(SENDMSG, number_of(fd), buffers, encode_ancillary(ancdata), flags, address)


@operation
def recvmsg(
    fd: int | HasFileno, bufsize: int, ancbufsize: int = 0, flags: int = 0
) -> Request[tuple[bytes, list[Ancillary], int, Any]]:
    """Receives up to ``bufsize`` bytes with ancillary data. IORING_OP_RECVMSG, Linux 5.3.

    Args:
        fd: a socket.
        bufsize: room for data, in bytes.
        ancbufsize: room for ancillary data, in bytes; see `socket.CMSG_SPACE`.
        flags: ``MSG_*``.

    Returns:
        ``(data, ancdata, msg_flags, address)``, as `socket.socket.recvmsg`.
    """
    return _receiving(RECVMSG, number_of(fd), bufsize, ancbufsize, flags)


# What a socket knows of itself. The kernel says EOPNOTSUPP both for what io_uring does not do with this socket and for
# what the socket does not do at all: the plain call tells which.

_REFUSED: Final = -errno.EOPNOTSUPP


def _command(
    name: str, result: Any, summary: str, plainly: Callable[[Any], int], decode: Callable[[int, Any], object]
) -> Kind[Any]:
    """The row of a socket command, which is done ``plainly`` with what it keeps if it is refused or missing."""
    return row(
        name,
        Opcode.URING_CMD,
        "6.7",
        result,
        summary,
        "io_uring_prep_cmd(3)",
        proxy=Opcode.READ_MULTISHOT,
        success=frozenset({_REFUSED}),
        decode=lambda res, keep: decode(plainly(keep) if res == _REFUSED else res, keep),
        fallback=lambda *, keep, **fields: plainly(keep),
    )


def _plain_queue_size(keep: tuple[int, int]) -> int:
    fd, request = keep
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(_INT_SIZE)), sys.byteorder, signed=True)


def _plain_getsockopt(keep: tuple[int, int, int, Any, bool]) -> int:
    fd, level, option, value, _ = keep
    with _borrowed(fd) as sock:
        raw = sock.getsockopt(level, option, len(value))
    value[0 : len(raw)] = raw
    return len(raw)


def _plain_setsockopt(keep: tuple[int, int, int, Any]) -> int:
    fd, level, option, value = keep
    with _borrowed(fd) as sock:
        sock.setsockopt(level, option, content(value, len(value)))
    return 0


def _option(res: int, keep: tuple[int, int, int, Any, bool]) -> int | bytes:
    *_, value, as_int = keep
    if as_int:
        return int.from_bytes(content(value, _INT_SIZE), sys.byteorder, signed=True)
    return content(value, res)


SIOCINQ = _command("siocinq", "count", "how much there is to receive", _plain_queue_size, lambda res, keep: res)
SIOCOUTQ = _command("siocoutq", "count", "how much is still to be sent", _plain_queue_size, lambda res, keep: res)
GETSOCKOPT = _command("getsockopt", "struct", "an option of a socket", _plain_getsockopt, _option)
SETSOCKOPT = _command("setsockopt", "nothing", "set an option of a socket", _plain_setsockopt, lambda res, keep: None)


@operation
def siocinq(fd: int | HasFileno) -> Request[int]:
    """How many bytes can be received at once. IORING_OP_URING_CMD with SIOCINQ, Linux 6.7; before that, ioctl(2).

    Args:
        fd: a socket. Of datagrams it is the size of the next.
    """
    number = number_of(fd)
    return SIOCINQ, number, SOCKET_OP_SIOCINQ, None, 0, 0, (number, termios.FIONREAD)


@operation
def siocoutq(fd: int | HasFileno) -> Request[int]:
    """How many bytes are not acknowledged yet. IORING_OP_URING_CMD with SIOCOUTQ, Linux 6.7; before that, ioctl(2).

    Args:
        fd: a socket.
    """
    number = number_of(fd)
    return SIOCOUTQ, number, SOCKET_OP_SIOCOUTQ, None, 0, 0, (number, termios.TIOCOUTQ)


def _option_name(level: int, option: int) -> int:
    return unsigned("level", level, 31) | unsigned("option", option, 31) << 32


def _getsockopt(fd: int | HasFileno, level: int, option: int, size: int | None = None) -> Request[Any]:
    if not 0 <= (size or 0) <= _MAX_OPTION_SIZE:
        raise ValueError(f"size must be 0 to {_MAX_OPTION_SIZE}, not {size}")
    value, number = new(CHARS, size or _INT_SIZE), number_of(fd)
    where = 0, 0, len(value), address_of(value)
    keep = number, level, option, value, not size
    return GETSOCKOPT, number, SOCKET_OP_GETSOCKOPT, None, 0, 0, keep, None, _option_name(level, option), None, where


@overload
async def getsockopt(fd: int | HasFileno, level: int, option: int, size: None = None) -> int: ...
@overload
async def getsockopt(fd: int | HasFileno, level: int, option: int, size: int) -> bytes: ...
@filled_by(_getsockopt)
@enable_ki_protection
async def getsockopt(fd: int | HasFileno, level: int, option: int, size: int | None = None) -> int | bytes:
    """An option of a socket. IORING_OP_URING_CMD with GETSOCKOPT, Linux 6.7; before that, getsockopt(2).

    Args:
        fd: a socket.
        level: ``socket.SOL_*``, ``IPPROTO_*``. io_uring has ``SOL_SOCKET`` only; others take getsockopt(2).
        option: ``socket.SO_*``, ``TCP_*`` and so on.
        size: of the option's value in bytes, at most 1024. Without it the value is an int.
    """
    value: int | bytes = await _this_thread.manager.perform(*_getsockopt(fd, level, option, size))
    return value


@operation
def setsockopt(fd: int | HasFileno, level: int, option: int, value: int | Buffer) -> Request[None]:
    """Sets an option of a socket. IORING_OP_URING_CMD with SETSOCKOPT, Linux 6.7; before that, setsockopt(2).

    Args:
        fd: a socket.
        level, option: as in `getsockopt`; any level.
        value: an int, or a buffer, which is copied.
    """
    raw = value.to_bytes(_INT_SIZE, sys.byteorder, signed=True) if isinstance(value, int) else bytes(value)
    copy, number = new(CHARS, len(raw)), number_of(fd)
    copy[0 : len(raw)] = raw
    where = 0, 0, len(raw), address_of(copy)
    keep = number, level, option, copy
    return SETSOCKOPT, number, SOCKET_OP_SETSOCKOPT, None, 0, 0, keep, None, _option_name(level, option), None, where
