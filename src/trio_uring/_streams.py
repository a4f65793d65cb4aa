"""trio's own names for sockets and streams, which lead here in runs that have a ring.

* trio makes every socket of its own by calling one name: for `trio.socket.socket` and its like, for accepted
  connections, for whatever wraps a socket of the standard library. So does anyio, through trio. A `UringSocket` comes
  from there, unless the caller is in a run without a ring.
* `trio.SocketStream` stays the class it is; two of its methods are replaced in it. Over a `UringSocket` they do what
  trio's do with less on the way. All other cases are trio's.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import enable_ki_protection

from . import _mount, _trio_internals
from ._core import _this_thread
from ._registered import STREAM_BUFFER_SIZE
from ._socket import PLAIN, RECV_SELECTING, SEND_UNCOUNTED, WHAT_FITS, UringSocket
from ._structs import CHARS, from_buffer

if TYPE_CHECKING:
    import socket as stdlib_socket

_RECEIVE_SIZE: Final = 65536  # what a stream asks for if it is not told
_NOT_OPEN: Final = frozenset({errno.EBADF, errno.ENOTSOCK})

_stock_receive_some: Final = trio.SocketStream.receive_some
_stock_send_all: Final = trio.SocketStream.send_all


def _stream_error(exc: OSError) -> Exception:
    if exc.errno in _NOT_OPEN:
        return trio.ClosedResourceError("this socket was already closed")
    return trio.BrokenResourceError(f"socket connection broken: {exc}")


@enable_ki_protection
async def _receive_some(self: trio.SocketStream, max_bytes: int | None = None) -> bytes:
    """See `trio.SocketStream`."""
    socket: Any = self.socket
    manager = _this_thread.manager
    if max_bytes is None:
        max_bytes = _RECEIVE_SIZE
    if type(socket) is UringSocket and manager.carries_sockets and socket.may_select(max_bytes):
        received: bytes | None
        try:
            if (socket.more or manager.is_lone()) and (received := await socket.receive_now(max_bytes)) is not None:
                return received
            waiting = manager.receive(RECV_SELECTING, socket._sock.fileno(), max_bytes)
            received = None if waiting is None else await waiting
        except OSError as exc:
            raise _stream_error(exc) from exc
        if received is not None:
            socket.more = len(received) == STREAM_BUFFER_SIZE
            return received
    return await _stock_receive_some(self, max_bytes)


def _pin(data: Any) -> Any:
    """What holds it for the kernel. Not to be kept in a frame: a traceback keeps that."""
    return data if type(data) is bytes else from_buffer(CHARS, data)


@enable_ki_protection
async def _send_all(self: trio.SocketStream, data: bytes | bytearray | memoryview) -> None:
    """See `trio.SocketStream`."""
    socket: Any = self.socket
    manager = _this_thread.manager
    if type(socket) is not UringSocket or not manager.carries_sockets or type(data) not in PLAIN or not data:
        await _stock_send_all(self, data)
        return
    fd = socket._sock.fileno()
    if socket.did_shutdown_SHUT_WR or manager.is_busy("write", fd):
        await _stock_send_all(self, data)
        return
    with _trio_internals.sending(self):
        whole = data if type(data) is bytes else memoryview(data)  # of one size until all is sent
        try:
            if manager.is_lone():
                sent = await socket.send_now(data)
            else:
                sent = await manager.perform(SEND_UNCOUNTED, fd, 0, _pin(data), -1, WHAT_FITS)
            while sent < len(whole):  # asks for the fd again: after a close, the number may be another's
                fd = socket._sock.fileno()
                sent += await manager.perform(SEND_UNCOUNTED, fd, 0, _pin(memoryview(whole)[sent:]), -1, WHAT_FITS)
        except OSError as exc:
            raise _stream_error(exc) from exc
        finally:
            if isinstance(whole, memoryview):
                whole.release()


class _AlsoOurs(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _trio_internals.TrioSocket)


class _SocketMaker(metaclass=_AlsoOurs):
    """Stands in the place of trio's class: its instances are that class's."""

    def __new__(cls, sock: stdlib_socket.socket) -> Any:
        """Outside of any run nobody knows yet who will use it."""
        manager = _this_thread.manager
        wanted = (manager.native and manager.carries_sockets) or not trio.lowlevel.in_trio_run()
        return (UringSocket if wanted else _trio_internals.TrioSocket)(sock)


class _SocketDoor:
    """The name by which trio makes its sockets."""

    def open(self) -> None:
        _trio_internals.set_socket_maker(_SocketMaker)

    def close(self) -> None:
        if _trio_internals.socket_maker() is _SocketMaker:
            _trio_internals.set_socket_maker(_trio_internals.TrioSocket)


if _trio_internals.SOCKETS_HAVE_A_DOOR:
    _mount.doors.append(_SocketDoor())
_mount.doors.append(_mount.MethodDoor(trio.SocketStream, "receive_some", _stock_receive_some, _receive_some))
if _trio_internals.STREAMS_TELL_WHO_SENDS:
    _mount.doors.append(_mount.MethodDoor(trio.SocketStream, "send_all", _stock_send_all, _send_all))
