"""Sends without a copy, and reads and writes on buffers the kernel knows.

Facts, and what follows from them:

* **A zero-copy send is answered twice**: with its result, and with a notification when the network stack no longer
  reads the buffer; over TCP, when the peer has acknowledged the data. To change the buffer before that is to change
  what is sent. So the functions here return after the notification, unless they are given an event for it. The buffer
  is held until then in any case.
* **It is not always without a copy**: over loopback, for instance, the kernel copies when the peer has room, and not
  before. It pays from some 10 KB upwards.
* **A registered buffer** saves the kernel looking up and holding the pages at each operation.
* **Pages that are registered, or being sent, are locked in memory** and count against the limit of locked memory.

Sources: io_uring_prep_send_zc(3), io_uring_register_buffers(3).
"""

from __future__ import annotations

import errno
import select
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._abi import Opcode
from ._core import HasFileno, _this_thread, number_of
from ._errors import locked_memory_error
from ._ops import filled_by, operation, row
from ._sockaddr import encode_address, encode_ancillary
from ._structs import CHARS, address_of, from_buffer, iovec_in, message, new

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from trio.lowlevel import Abort, RaiseCancelT, Task
    from typing_extensions import Buffer, Self

    from ._cancel import Kind
    from ._ops import Request


class _Release:
    """Who still uses the buffer: the call, while it lasts, and each request until its last CQE. A request that is tried
    again may owe its notification beside the new one. A context manager: the call.
    """

    def __init__(self, event: trio.Event | None = None) -> None:
        self._event = event
        self._users = 1
        self._task: Task | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not GeneratorExit:  # the run is torn down: whoever waits for it is gone, too
            self.drop()
        if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
            raise locked_memory_error("to send from the buffer itself") from None

    def hold(self) -> None:
        self._users += 1

    def drop(self) -> None:
        self._users -= 1
        if self._users:
            return
        if self._event is not None:
            self._event.set()
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Waits for the last one, but not in a cancelled scope: what was sent must be told."""
        if not self._users:
            return
        self._task = task = current_task()

        def abort(_: RaiseCancelT) -> Abort:
            self._task = None
            trio.lowlevel.reschedule(task)
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)


def _staged(keep: tuple[Any, ...]) -> None:
    keep[0].hold()


def _released(keep: tuple[Any, ...]) -> None:
    keep[0].drop()


SEND_ZC: Final[Kind[int]] = row(
    "send_zc",
    Opcode.SEND_ZC,
    "6.0",
    "count",
    "send from a buffer without a copy",
    runs="waits",
    direction="write",
    wait_for=select.POLLOUT,
    staged=_staged,
    released=_released,
)
SENDMSG_ZC: Final[Kind[int]] = row(
    "sendmsg_zc",
    Opcode.SENDMSG_ZC,
    "6.1",
    "count",
    "send buffers without a copy, ancillary data, to an address",
    runs="waits",
    direction="write",
    wait_for=select.POLLOUT,
    staged=_staged,
    released=_released,
)
_MAX_SIZE: Final = 1 << 30  # the kernel's limit
_MSG_DONTWAIT: Final = int(socket.MSG_DONTWAIT)
_DONTWAIT: Final = {kind: replace(kind, wait_for=0) for kind in (SEND_ZC, SENDMSG_ZC)}
READ_FIXED: Final[Kind[int]] = row(
    "read_fixed",
    Opcode.READ_FIXED,
    "5.19",  # as its buffers, and SOCKET
    "count",
    "read into a registered buffer",
    runs="may block",
    wait_for=select.POLLIN,
    proxy=Opcode.SOCKET,
)
WRITE_FIXED: Final[Kind[int]] = row(
    "write_fixed",
    Opcode.WRITE_FIXED,
    "5.19",
    "count",
    "write from a registered buffer",
    runs="may block",
    wait_for=select.POLLOUT,
    proxy=Opcode.SOCKET,
)
READV_FIXED: Final[Kind[int]] = row(
    "readv_fixed",
    Opcode.READV_FIXED,
    "6.15",
    "count",
    "read into pieces of a registered buffer",
    "io_uring_prep_readv(3)",
    runs="may block",
    wait_for=select.POLLIN,
)
WRITEV_FIXED: Final[Kind[int]] = row(
    "writev_fixed",
    Opcode.WRITEV_FIXED,
    "6.15",
    "count",
    "write from pieces of a registered buffer",
    "io_uring_prep_writev(3)",
    runs="may block",
    wait_for=select.POLLOUT,
)


# Zero-copy sends


def _patient(kind: Kind[int], flags: int) -> Kind[int]:
    """With MSG_DONTWAIT, "would block" is the answer the caller asked for."""
    return _DONTWAIT[kind] if int(flags) & _MSG_DONTWAIT else kind  # in plain ints: enum arithmetic is slow


def _send_zc_request(release: _Release, fd: int | HasFileno, data: Buffer, flags: int) -> Request[int]:
    return _patient(SEND_ZC, flags), number_of(fd), 0, from_buffer(CHARS, data), -1, flags, (release,)


def _send_zc(fd: int | HasFileno, data: Buffer, flags: int = 0) -> Request[int]:
    return _send_zc_request(_Release(), fd, data, flags)


@filled_by(_send_zc)
@enable_ki_protection
async def send_zc(fd: int | HasFileno, data: Buffer, flags: int = 0, *, released: trio.Event | None = None) -> int:
    """Sends ``data`` without copying it, and returns the number of bytes sent, which may be less.
    IORING_OP_SEND_ZC, Linux 6.0.

    Args:
        fd: a connected TCP or UDP socket; others fail with EOPNOTSUPP.
        data: any contiguous buffer.
        flags: ``MSG_*``; see `send`.
        released: is set when the kernel no longer reads ``data``, also if the call fails or is cancelled. The call then
            returns before that, as soon as the kernel has taken the data; until it is set, do not change it.

    Without ``released`` it returns when ``data`` is free again. Cancelled while it waits for that, it returns at once:
    then, too, the buffer is held until the kernel is done, but must not be changed.

    Raises:
        OSError: ENOMEM, too much that is being sent counts against the limit of locked memory.
    """
    release = _Release(released)
    with release:
        count = await _this_thread.manager.perform(*_send_zc_request(release, fd, data, flags))
    if released is None:
        await release.wait()
    return count


def _sendmsg_zc_request(
    release: _Release,
    fd: int | HasFileno,
    buffers: Sequence[Buffer],
    ancdata: Iterable[tuple[int, int, Any]],
    flags: int,
    address: Any,
) -> Request[int]:
    raw = b"" if address is None else encode_address(address)
    control = encode_ancillary(ancdata)
    header, *rest = message(
        buffers,
        new(CHARS, raw) if raw else None,
        len(raw),
        from_buffer(CHARS, control) if control else None,
        writable=False,
    )
    return _patient(SENDMSG_ZC, flags), number_of(fd), 0, header, 1, flags, (release, *rest)


def _sendmsg_zc(
    fd: int | HasFileno,
    buffers: Sequence[Buffer],
    ancdata: Iterable[tuple[int, int, Any]] = (),
    flags: int = 0,
    address: Any = None,
) -> Request[int]:
    return _sendmsg_zc_request(_Release(), fd, buffers, ancdata, flags, address)


@filled_by(_sendmsg_zc)
@enable_ki_protection
async def sendmsg_zc(
    fd: int | HasFileno,
    buffers: Sequence[Buffer],
    ancdata: Iterable[tuple[int, int, Any]] = (),
    flags: int = 0,
    address: Any = None,
    *,
    released: trio.Event | None = None,
) -> int:
    """Sends ``buffers`` without copying them; returns the bytes sent. IORING_OP_SENDMSG_ZC, Linux 6.1.

    Args:
        fd: a TCP or UDP socket.
        buffers, ancdata, flags, address: as in `sendmsg`.
        released: as in `send_zc`.
    """
    release = _Release(released)
    with release:
        count = await _this_thread.manager.perform(*_sendmsg_zc_request(release, fd, buffers, ancdata, flags, address))
    if released is None:
        await release.wait()
    return count


# Registered buffers


class RegisteredBuffer:
    """A buffer the ring of this run knows, for `read_fixed` and its like. A context manager: `close` at its end.

    Args:
        buffer: writable and contiguous, 1 byte to 1 GiB. It is held as long as it is registered, and while operations
            use it.

    Attributes:
        size: how many bytes it has.

    Raises:
        ValueError: ``buffer`` is empty or too large.
        OSError: ENOMEM, the limit of locked memory does not allow it; ENOBUFS, too many are registered.
        UnavailableError: this run can have no ring.
        UnsupportedOperation: the kernel cannot register buffers one by one; Linux 5.19 brought that.
    """

    @enable_ki_protection
    def __init__(self, buffer: Buffer) -> None:
        manager = _this_thread.manager.require(READ_FIXED)
        self._manager = manager
        self._pin: Any = from_buffer(CHARS, buffer, True)
        self.size = len(self._pin)
        try:
            if not 1 <= self.size <= _MAX_SIZE:
                raise ValueError(f"a registered buffer has 1 to {_MAX_SIZE} bytes, not {self.size}")
            self._index = manager.registered.add_buffer(address_of(self._pin), self.size)
        except BaseException:
            self._pin = None
            raise

    @enable_ki_protection
    def close(self) -> None:
        """Unregisters it. Operations the kernel has go on, and hold it until they are done. Idempotent.

        Raises:
            RuntimeError: it is registered with another trio run, which goes on.
        """
        if self._pin is not None:
            if not self._manager.closed and self._manager is not _this_thread.manager:
                raise RuntimeError("a buffer is unregistered by the run it is registered with")
            self._manager.registered.remove_buffer(self._index)
            self._pin = None

    @enable_ki_protection
    def __enter__(self) -> Self:
        return self

    @enable_ki_protection
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def request(
        self, kind: Kind[int], fd: int | HasFileno, offset: int, start: int, length: int | None, flags: int
    ) -> Request[int]:
        """What fills the SQE for a transfer of one piece."""
        length = self.size - start if length is None else length
        address = self._address(start, length)
        return kind, number_of(fd), offset, None, length, flags, self._pin, None, address, None, self._extra

    def request_vector(
        self, kind: Kind[int], fd: int | HasFileno, pieces: Sequence[tuple[int, int]], offset: int, flags: int
    ) -> Request[int]:
        """What fills the SQE for a transfer of several pieces."""
        addresses = [(self._address(start, length), length) for start, length in pieces]
        vector = iovec_in([piece for piece in addresses if piece[1]])  # the kernel takes no empty ones
        return kind, number_of(fd), offset, vector, len(vector), flags, self._pin, None, 0, None, self._extra

    @property
    def _extra(self) -> tuple[int, int, int, int]:
        return self._index, 0, 0, 0

    def _address(self, start: int, length: int) -> int:
        if self._pin is None:
            raise ValueError("this buffer is no longer registered")
        if self._manager is not _this_thread.manager:
            raise ValueError("this buffer is registered with another trio run")
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"bytes {start} to {start + length} are not in a buffer of {self.size} bytes")
        return address_of(self._pin) + start


@operation
def read_fixed(
    fd: int | HasFileno,
    buffer: RegisteredBuffer,
    offset: int = -1,
    *,
    start: int = 0,
    length: int | None = None,
    flags: int = 0,
) -> Request[int]:
    """Reads into a registered buffer; returns the number of bytes. IORING_OP_READ_FIXED, Linux 5.19.

    Args:
        fd: what to read.
        buffer: where to.
        offset: where in the file; -1 is the file's position, which moves.
        start, length: which bytes of ``buffer``; by default all.
        flags: ``os.RWF_*``.
    """
    return buffer.request(READ_FIXED, fd, offset, start, length, flags)


@operation
def write_fixed(
    fd: int | HasFileno,
    buffer: RegisteredBuffer,
    offset: int = -1,
    *,
    start: int = 0,
    length: int | None = None,
    flags: int = 0,
) -> Request[int]:
    """Writes from a registered buffer; returns the number of bytes. IORING_OP_WRITE_FIXED, Linux 5.19.

    Args:
        fd: where to write.
        buffer: where from.
        offset, start, length, flags: as in `read_fixed`.
    """
    return buffer.request(WRITE_FIXED, fd, offset, start, length, flags)


@operation
def readv_fixed(
    fd: int | HasFileno,
    buffer: RegisteredBuffer,
    pieces: Sequence[tuple[int, int]],
    offset: int = -1,
    flags: int = 0,
) -> Request[int]:
    """Reads into pieces of a registered buffer; returns the bytes in all. IORING_OP_READV_FIXED, Linux 6.15.

    Args:
        fd: what to read.
        buffer: where to.
        pieces: up to 1024 ``(start, length)``.
        offset, flags: as in `read_fixed`.
    """
    return buffer.request_vector(READV_FIXED, fd, pieces, offset, flags)


@operation
def writev_fixed(
    fd: int | HasFileno,
    buffer: RegisteredBuffer,
    pieces: Sequence[tuple[int, int]],
    offset: int = -1,
    flags: int = 0,
) -> Request[int]:
    """Writes from pieces of a registered buffer; returns the bytes in all. IORING_OP_WRITEV_FIXED, Linux 6.15.

    Args:
        fd: where to write.
        buffer: where from.
        pieces, offset, flags: as in `readv_fixed`.
    """
    return buffer.request_vector(WRITEV_FIXED, fd, pieces, offset, flags)
