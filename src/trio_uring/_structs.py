"""The C structs of requests: built of Python objects, and read back into them.

Whatever the kernel reads after the call belongs to the operation: what these functions return goes into its ``pin`` or
``keep``, whole.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from ._native import ffi
from ._sockaddr import decode_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

from_buffer: Final = ffi.from_buffer
new: Final = ffi.new
CHARS: Final = ffi.typeof("char[]")

_IOVECS: Final = ffi.typeof("struct iovec[]")
_MSGHDR: Final = ffi.typeof("struct msghdr *")
_STATX: Final = ffi.typeof("struct statx *")
_TIMESPEC: Final = ffi.typeof("struct __kernel_timespec *")
_STORAGE: Final = ffi.typeof("struct sockaddr_storage *")
_SOCKLEN: Final = ffi.typeof("tu_socklen_t *")
_OPEN_HOW: Final = ffi.typeof("struct open_how *")
_SIGINFO: Final = ffi.typeof("struct tu_siginfo *")
_EPOLL_EVENT: Final = ffi.typeof("struct tu_epoll_event *")
_EPOLL_EVENTS: Final = ffi.typeof("struct tu_epoll_event[]")
_FUTEXES: Final = ffi.typeof("struct tu_futex[]")
_TWO_FDS: Final = ffi.typeof("int[2]")
_INT: Final = ffi.typeof("int")
_UINTPTR: Final = ffi.typeof("uintptr_t")
STORAGE_SIZE: Final = ffi.sizeof("struct sockaddr_storage")

_uncleared: Final = ffi.new_allocator(should_clear_after_alloc=False)


def unsigned(name: str, value: int, bits: int = 32) -> int:
    """``value``, if it fits an unsigned field.

    Raises:
        ValueError: it is negative.
        OverflowError: it is too large.
    """
    if value < 0:
        raise ValueError(f"{name} must not be negative: {value}")
    if value >> bits:
        raise OverflowError(f"{name} must fit {bits} bits: {value}")
    return value


def fd_field(fd: int) -> int:
    """A file descriptor for a field without a sign, ``AT_FDCWD`` included.

    Raises:
        OverflowError: it is no C int. The kernel would look at a part of it.
    """
    if not -(1 << 31) <= fd < 1 << 31:
        raise OverflowError(f"a file descriptor must fit a C int: {fd}")
    return fd & 0xFFFFFFFF


def address_of(struct: Any) -> int:
    """For a field other than ``addr``. The number keeps nothing alive."""
    return int(ffi.cast(_UINTPTR, struct))


def c_path(path: StrOrBytesPath) -> Any:
    """A copy of a file name, as C has it.

    Raises:
        ValueError: it has a null byte in it.
        TypeError: it is no path.
    """
    raw = os.fsencode(path)
    if 0 in raw:
        raise ValueError("embedded null byte")
    return new(CHARS, raw)


def iovec(buffers: Sequence[Buffer], *, writable: bool) -> tuple[Any, list[Any]]:
    """An array of iovecs, and the exports of the buffers it points to."""
    views = [from_buffer(CHARS, buffer, writable) for buffer in buffers]
    vector = new(_IOVECS, len(views))
    for i, view in enumerate(views):
        vector[i].iov_base = view
        vector[i].iov_len = len(view)
    return vector, views


def iovec_in(pieces: Sequence[tuple[int, int]]) -> Any:
    """An array of iovecs for ``(address, size)``."""
    vector = new(_IOVECS, len(pieces))
    for i, (address, size) in enumerate(pieces):
        vector[i].iov_base = ffi.cast("void *", address)
        vector[i].iov_len = size
    return vector


def timespec(seconds: float) -> Any:
    """A time as two integers.

    Raises:
        ValueError: it is negative, or no number.
    """
    if not seconds >= 0:
        raise ValueError(f"seconds must not be negative: {seconds}")
    nanoseconds = round(seconds * 1e9)
    return new(_TIMESPEC, (nanoseconds // 10**9, nanoseconds % 10**9))


def message(
    buffers: Sequence[Buffer], name: Any, name_size: int, control: Any, *, writable: bool
) -> tuple[Any, Any, list[Any], Any, Any]:
    """A msghdr, and everything it points to: iovecs, exports, the address, the control buffer."""
    vector, views = iovec(buffers, writable=writable)
    header = new(_MSGHDR)
    header.msg_iov = vector
    header.msg_iovlen = len(views)
    if name is not None:
        header.msg_name = name
        header.msg_namelen = name_size
    if control is not None:
        header.msg_control = control
        header.msg_controllen = len(control)
    return header, vector, views, name, control


def multishot_header(control_size: int) -> Any:
    """A msghdr that says how much of each buffer is for the address and for ancillary data."""
    header = new(_MSGHDR)
    header.msg_namelen = STORAGE_SIZE
    header.msg_controllen = control_size
    return header


def control_of(header: Any) -> bytes:
    """The control buffer of a received msghdr."""
    if not header.msg_controllen:
        return b""
    return bytes(ffi.buffer(header.msg_control, header.msg_controllen))


def new_statx() -> Any:
    """Room for a file's metadata."""
    return new(_STATX)


def stat_result(stx: Any) -> os.stat_result:
    """A struct statx as `os.stat` would have returned it."""
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


def memory(size: int) -> Any:
    """Memory with anything in it: what the kernel fills need not be cleared."""
    return _uncleared(CHARS, size)


def content(memory: Any, size: int) -> bytes:
    """The first ``size`` bytes."""
    return bytes(ffi.buffer(memory, size))


def open_how(flags: int, mode: int, resolve: int) -> Any:
    """How openat2(2) is to open a file."""
    return new(_OPEN_HOW, (flags, mode, resolve))


def two_fds() -> Any:
    """Room for the ends of a pipe."""
    return new(_TWO_FDS)


def new_siginfo() -> Any:
    """Room for what became of a child."""
    return new(_SIGINFO)


def waitid_result(info: Any) -> os.waitid_result | None:
    """A siginfo as `os.waitid` would have returned it: None if it tells of no child."""
    if not info.pid:
        return None
    return os.waitid_result((info.pid, info.uid, info.signo, info.status, info.code))


def epoll_event(events: int, data: int) -> Any:
    """What an epoll is to wait for, and what it then reports."""
    return new(_EPOLL_EVENT, (events, data))


def new_epoll_events(n: int) -> Any:
    """Room for what an epoll reports."""
    return new(_EPOLL_EVENTS, n)


def epoll_events(events: Any, n: int) -> list[tuple[int, int]]:
    """What it has reported, as `select.epoll.poll` shows it. `select.epoll` fills in only the half it shows."""
    return [(int(ffi.cast(_INT, event.data)), event.events) for event in events[0:n]]


def futex(buffer: Buffer) -> Any:
    """The export of a futex's four bytes.

    Raises:
        ValueError: there are not four of them, or their address is no multiple of four.
    """
    word = from_buffer(CHARS, buffer, True)
    size, address = len(word), address_of(word)
    if size == 4 and address % 4 == 0:
        return word
    del word  # a traceback would hold the export
    raise ValueError(f"a futex is 4 bytes at a multiple of 4, not {size} at {address:#x}")


def futex_waiters(futexes: Sequence[tuple[Buffer, int]], flags: int) -> tuple[Any, list[Any]]:
    """An array of what futex_waitv(2) waits for, and the exports of the futexes."""
    expected = [unsigned("the expected value", value) for _, value in futexes]
    words = [futex(buffer) for buffer, _ in futexes]
    return new(_FUTEXES, [(v, address_of(w), flags, 0) for v, w in zip(expected, words, strict=True)]), words


def new_address() -> tuple[Any, Any]:
    """Room for a sockaddr, and for its size."""
    return new(_STORAGE), new(_SOCKLEN, STORAGE_SIZE)


def address_in(storage: Any, size: int) -> Any:
    """A sockaddr the kernel has filled, as the socket module shows it."""
    return decode_address(bytes(ffi.buffer(storage, min(size, STORAGE_SIZE))))
