"""Sockets by completion: `UringSocket` is trio's socket, whose operations are the ring's.

Stock trio tries the call, waits until the socket is ready, and calls again. Here the call itself is handed to the
kernel, which does it when the socket is ready. What that is worth was measured for each operation, and decides its way:

* **recv** on a stream goes to the kernel at once, with no memory of its own: the kernel takes one of the ring's buffers
  when there is data. So ten thousand idle connections hold none, and nobody allocates 64 KiB for a message of 64 bytes.
  What fills such a buffer is followed by more, and that is there: then the plain system call comes first. It does for a
  lone connection, too: the answer to what was just sent is often there before anybody has to sleep.
* **send** on a stream goes to the kernel at once while there are several connections to serve: one system call submits
  for all of them. For a lone one the plain system call costs less, and comes first.
* **connect and recv_into** go to the kernel at once; **accept** does when nobody is waiting, and tries first after one
  that was: a burst is taken without it, and a new connection's first receive is tried likewise.
* **Datagrams, and messages with ancillary data,** are tried first, as trio does: a datagram socket has room, or has
  something, nearly always when it is used, and a submission needs structures that cost more than the call. The wait,
  if there is one, is the ring's.

Whatever is out of the ordinary (flags, a second task on the same direction, a run without a ring) goes trio's own way,
which is right in every case: trying first, and waiting on the ring if there is one.
"""

from __future__ import annotations

import socket as stdlib_socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled, enable_ki_protection

from ._abi import SQE_BUFFER_SELECT, Opcode
from ._core import MAX_RW_COUNT, _this_thread, notify_closing
from ._registered import STREAM_BUFFER_SIZE
from ._sockaddr import encode_address
from ._socket_ops import ACCEPT, CONNECT, RECV, SEND
from ._structs import CHARS, address_of, from_buffer, new_address
from ._structs import new as new_struct
from ._trio_internals import CAN_RESOLVE, SocketBase, TrioSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

RECV_SELECTING: Final = replace(RECV, flags=SQE_BUFFER_SELECT, proxy=Opcode.SOCKET, counted=False)
SEND_UNCOUNTED: Final = replace(SEND, counted=False)
_RECV_UNCOUNTED: Final = replace(RECV, counted=False)
_ACCEPT_UNCOUNTED: Final = replace(ACCEPT, counted=False)
_CONNECT_UNCOUNTED: Final = replace(CONNECT, counted=False)

WHAT_FITS: Final = int(stdlib_socket.MSG_DONTWAIT)
"""For a send: the wait for room is ours. The kernel's own ends for a peer that has half-closed, too, at once, and after
some tries it has a worker thread wait: a few hundred such peers would take them all."""

_KNOWN_FAMILIES: Final = frozenset(map(int, (stdlib_socket.AF_INET, stdlib_socket.AF_INET6, stdlib_socket.AF_UNIX)))
"""Those whose addresses we show as the standard library does."""

_STREAM: Final = int(stdlib_socket.SOCK_STREAM)
_ACCEPT_FLAGS: Final = int(stdlib_socket.SOCK_NONBLOCK | stdlib_socket.SOCK_CLOEXEC)

PLAIN: Final = frozenset({bytes, bytearray})
"""Types of buffers about which there is nothing to ask."""

# As numbers: the properties of `socket.socket` make enums of them, which takes longer than receiving a message.
_family: Final[Callable[[stdlib_socket.socket], int]] = stdlib_socket.SocketType.family.__get__
_type: Final[Callable[[stdlib_socket.socket], int]] = stdlib_socket.SocketType.type.__get__

_NO_NUMBER: Final = 0
"""What flags and counts are if nobody gives any. Looked for by identity: None and "" are as false, but errors."""


def _is_ordinary(data: Buffer) -> bool:
    """Is it something to send, and no more to say about it? Only objects whose truth is known are asked for it."""
    if type(data) is memoryview:
        return data.c_contiguous and data.nbytes > 0
    return type(data) in PLAIN and bool(data)


async def _wait_readable(sock: stdlib_socket.socket) -> None:
    """Where receives wait as well, so that nobody waits beside another."""
    manager = _this_thread.manager
    await (manager if manager.carries_sockets else trio.lowlevel).wait_readable(sock)


async def _wait_writable(sock: stdlib_socket.socket) -> None:
    manager = _this_thread.manager
    await (manager if manager.carries_sockets else trio.lowlevel).wait_writable(sock)


def _tried_first(
    call: Callable[..., Any], wait: Callable[[stdlib_socket.socket], Awaitable[None]]
) -> Callable[..., Any]:
    """The method that tries the plain call, and waits only if that would block."""

    @enable_ki_protection
    async def method(self: UringSocket, *args: Any, **kwargs: Any) -> Any:
        await checkpoint_if_cancelled()
        try:
            result = call(self._sock, *args, **kwargs)
        except BlockingIOError:
            pass
        except BaseException:
            await cancel_shielded_checkpoint()
            raise
        else:
            await cancel_shielded_checkpoint()
            return result
        while True:
            await wait(self._sock)
            try:
                return call(self._sock, *args, **kwargs)
            except BlockingIOError:
                pass

    method.__name__ = call.__name__
    method.__qualname__ = f"UringSocket.{call.__name__}"
    method.__doc__ = f"As `socket.socket.{call.__name__}`."
    return method


_accept_trying: Final = _tried_first(stdlib_socket.socket.accept, _wait_readable)
_recv_trying: Final = _tried_first(stdlib_socket.socket.recv, _wait_readable)
_recv_into_trying: Final = _tried_first(stdlib_socket.socket.recv_into, _wait_readable)
_sendto_trying: Final = _tried_first(stdlib_socket.socket.sendto, _wait_writable)
_send_trying: Final = _tried_first(stdlib_socket.socket.send, _wait_writable)


class UringSocket(SocketBase):
    """A `trio.socket.SocketType` whose operations are the ring's, in runs that have one. In others it is like trio's.

    What its methods return and raise, and when they wait, is as with trio's, and with that the standard library's. What
    differs is when it is closed: whoever waits hears of it, also if it is closed by leaving a ``with`` block, or left
    to somebody else by `detach`.
    """

    def __init__(self, sock: stdlib_socket.socket) -> None:
        super().__init__(sock)
        self.streams: Final = _type(sock) == _STREAM
        self.more = False  # is there something to receive, most likely?

    @enable_ki_protection
    def dup(self) -> UringSocket:
        """As `socket.socket.dup`."""
        return UringSocket(self._sock.dup())

    @enable_ki_protection
    def close(self) -> None:
        """As `socket.socket.close`. Tasks that wait get `trio.ClosedResourceError`; the peer hears of it at once."""
        if self._sock.fileno() >= 0:
            notify_closing(self._sock)
            self._sock.close()

    async def wait_writable(self) -> None:
        """Waits until there is room to send; see `trio.lowlevel.wait_writable`."""
        await _wait_writable(self._sock)

    @enable_ki_protection
    def __exit__(self, *exc_info: object) -> None:
        self._tell_waiters()
        self._sock.close()

    @enable_ki_protection
    def detach(self) -> int:
        """As `socket.socket.detach`. Tasks that wait get `trio.ClosedResourceError`."""
        self._tell_waiters()
        return self._sock.detach()

    def _tell_waiters(self) -> None:
        """Outside of a run there are none, and as with trio's these two ways to part with a socket are open there."""
        if self._sock.fileno() >= 0 and trio.lowlevel.in_trio_run():
            notify_closing(self._sock)

    @enable_ki_protection
    async def accept(self) -> tuple[UringSocket, Any]:
        """As `socket.socket.accept`. IORING_OP_ACCEPT, Linux 5.5.

        An accept that wins against its cancel returns its connection; none is leaked or dropped.
        """
        sock, manager = self._sock, _this_thread.manager
        fd = sock.fileno()
        if (
            self.more
            or not manager.carries_sockets
            or _family(sock) not in _KNOWN_FAMILIES
            or manager.is_busy("read", fd)
        ):
            self.more = False
            new, address = await _accept_trying(self)
        else:
            storage, size = keep = new_address()
            fd, address = await manager.perform(
                _ACCEPT_UNCOUNTED, fd, address_of(size), storage, 0, _ACCEPT_FLAGS, keep
            )
            new = stdlib_socket.socket(_family(sock), _type(sock), sock.proto, fd)
        self.more = True
        accepted = UringSocket(new)
        accepted.more = True
        return accepted, address

    @enable_ki_protection
    async def connect(self, address: Any) -> None:
        """As `socket.socket.connect`. IORING_OP_CONNECT, Linux 5.5.

        A connect that is cancelled closes the socket, as with trio: what has become of the connection is not known.
        """
        manager, sock = _this_thread.manager, self._sock
        ordinary = manager.carries_sockets and CAN_RESOLVE and self.streams and _family(sock) in _KNOWN_FAMILIES
        if not ordinary or manager.is_busy("write", sock.fileno()):
            await super().connect(address)
            return
        try:
            address = await self.resolve(address)
            try:
                raw = encode_address(address)
            except (TypeError, ValueError):
                await super().connect(address)  # which knows the error for it
                return
            try:
                await manager.perform(_CONNECT_UNCOUNTED, sock.fileno(), len(raw), new_struct(CHARS, raw))
            except OSError as exc:
                raise OSError(exc.errno, f"Error connecting to {address!r}: {exc.strerror}") from None
        except trio.Cancelled:
            self.close()
            raise

    def may_select(self, buflen: int) -> bool:
        """Can the kernel be left to choose where to put so many bytes?"""
        return self.streams and type(buflen) is int and 0 < buflen <= MAX_RW_COUNT

    @enable_ki_protection
    async def receive_now(self, buflen: int) -> bytes | None:
        """What is there to receive. None if nothing is; then it was no checkpoint."""
        await checkpoint_if_cancelled()
        try:
            data = self._sock.recv(buflen, stdlib_socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except BaseException:
            await cancel_shielded_checkpoint()
            raise
        await cancel_shielded_checkpoint()
        self.more = len(data) >= STREAM_BUFFER_SIZE
        return data

    @enable_ki_protection
    async def recv(self, buflen: int, flags: int = 0, /) -> bytes:
        """As `socket.socket.recv`. IORING_OP_RECV, Linux 5.6."""
        manager = _this_thread.manager
        received: bytes | None
        if manager.carries_sockets and flags is _NO_NUMBER and self.may_select(buflen):
            if (self.more or manager.is_lone()) and (received := await self.receive_now(buflen)) is not None:
                return received
            waiting = manager.receive(RECV_SELECTING, self._sock.fileno(), buflen)
            received = None if waiting is None else await waiting
            if received is not None:
                self.more = len(received) == STREAM_BUFFER_SIZE
                return received
        received = await _recv_trying(self, buflen, flags)
        return received

    @enable_ki_protection
    async def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.socket.recv_into`. IORING_OP_RECV, Linux 5.6."""
        manager = _this_thread.manager
        if (
            manager.carries_sockets
            and self.streams
            and nbytes is _NO_NUMBER
            and flags is _NO_NUMBER
            and type(buffer) is bytearray
            and buffer
        ):
            fd = self._sock.fileno()
            if not manager.is_busy("read", fd):
                return await manager.perform(_RECV_UNCOUNTED, fd, 0, from_buffer(CHARS, buffer, True), -1)
        count: int = await _recv_into_trying(self, buffer, nbytes, flags)
        return count

    @enable_ki_protection
    async def send_now(self, data: Buffer) -> int:
        """Sends what there is room for. 0 if there is none; then it was no checkpoint."""
        await checkpoint_if_cancelled()
        try:
            sent = self._sock.send(data, stdlib_socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except BaseException:
            await cancel_shielded_checkpoint()
            raise
        await cancel_shielded_checkpoint()
        return sent

    @enable_ki_protection
    async def send(self, data: Buffer, flags: int = 0, /) -> int:
        """As `socket.socket.send`. IORING_OP_SEND, Linux 5.6."""
        manager, fd = _this_thread.manager, self._sock.fileno()
        if manager.carries_sockets and self.streams and flags is _NO_NUMBER and _is_ordinary(data):
            if manager.is_lone() and (sent := await self.send_now(data)):
                return sent
            if not manager.is_busy("write", fd):
                return await manager.perform(SEND_UNCOUNTED, fd, 0, from_buffer(CHARS, data), -1, WHAT_FITS)
        count: int = await _send_trying(self, data, flags)
        return count

    @enable_ki_protection
    async def sendto(self, *args: Any) -> int:
        """As `socket.socket.sendto`."""
        if not CAN_RESOLVE:
            return await super().sendto(*args)  # type: ignore[no-any-return]
        *before, address = args
        count: int = await _sendto_trying(self, *before, await self.resolve(address))
        return count

    recvfrom = _tried_first(stdlib_socket.socket.recvfrom, _wait_readable)
    recvfrom_into = _tried_first(stdlib_socket.socket.recvfrom_into, _wait_readable)
    recvmsg = _tried_first(stdlib_socket.socket.recvmsg, _wait_readable)
    recvmsg_into = _tried_first(stdlib_socket.socket.recvmsg_into, _wait_readable)


def on_the_ring(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    """trio's socket as one of ours. Those of a custom socket factory stay what they are."""
    return UringSocket(sock._sock) if type(sock) is TrioSocket else sock  # type: ignore[attr-defined]
