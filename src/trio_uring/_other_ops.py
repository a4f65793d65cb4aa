"""Operations that concern neither files nor sockets alone: see `_ops` for what holds for all of them.

Pipes and what moves between them, an epoll, children, futexes: what a program waits for beside I/O, so that it need
not keep a thread for each.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Any, Final

from ._abi import FUTEX2_PRIVATE, FUTEX2_SIZE_U32, Opcode
from ._core import HasFileno, number_of
from ._ops import close_result, operation, row
from ._structs import (
    address_of,
    epoll_event,
    epoll_events,
    fd_field,
    futex,
    futex_waiters,
    new_epoll_events,
    new_siginfo,
    two_fds,
    unsigned,
    waitid_result,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from ._ops import Request

FUTEX_BITSET_MATCH_ANY: Final = 0xFFFFFFFF
_PRIVATE_U32: Final = FUTEX2_SIZE_U32 | FUTEX2_PRIVATE
_WHOLE_FIELD: Final = (1 << 64) - 1


# Pipes


def _plain_pipe(*, pin: Any, op_flags: int, **fields: Any) -> int:
    pin[0], pin[1] = os.pipe2(op_flags)
    return 0


def _close_both(res: int, fds: Any) -> None:
    for fd in fds:
        close_result(fd, None)


# A worker thread of the kernel always does it, but unlike others it can be interrupted.
SPLICE = row(
    "splice",
    Opcode.SPLICE,
    "5.7",
    "count",
    "move data between a pipe and another fd",
    runs="may block",
    second_fd="file_index",
)
TEE = row("tee", Opcode.TEE, "5.8", "count", "copy data between pipes", runs="may block", second_fd="file_index")
PIPE = row(
    "pipe",
    Opcode.PIPE,
    "6.16",
    "struct",
    "create a pipe",
    dispose=_close_both,
    decode=lambda res, fds: (fds[0], fds[1]),
    fallback=_plain_pipe,
)


@operation
def splice(
    fd_in: int | HasFileno, offset_in: int, fd_out: int | HasFileno, offset_out: int, length: int, flags: int = 0
) -> Request[int]:
    """Moves data between two fds, one of them a pipe, and returns how many bytes. IORING_OP_SPLICE, Linux 5.7.

    Args:
        fd_in: where it comes from.
        offset_in: where in that file; -1 is the file's position, and a must for a pipe.
        fd_out: where it goes.
        offset_out: likewise.
        length: how many bytes at most.
        flags: ``SPLICE_F_*``: ``MOVE`` 1, ``NONBLOCK`` 2, ``MORE`` 4.

    It waits in a worker thread of the kernel. With ``NONBLOCK``, or where an fd itself is non-blocking, it does not
    wait: `BlockingIOError`. 0 is the end of the input.
    """
    extra = 0, 0, number_of(fd_in), 0
    size, source = unsigned("length", length), _offset("offset_in", offset_in)
    return SPLICE, number_of(fd_out), offset_out, None, size, flags, None, None, source, None, extra


def _offset(name: str, offset: int) -> int:
    """For a field without a sign."""
    return _WHOLE_FIELD if offset == -1 else unsigned(name, offset, 63)


@operation
def tee(fd_in: int | HasFileno, fd_out: int | HasFileno, length: int, flags: int = 0) -> Request[int]:
    """Copies data from one pipe to another without taking it, and returns how many bytes. IORING_OP_TEE, Linux 5.8.

    Args:
        fd_in, fd_out: two pipes.
        length: how many bytes at most.
        flags: as in `splice`, and it waits as that does.
    """
    extra = 0, 0, number_of(fd_in), 0
    return TEE, number_of(fd_out), 0, None, unsigned("length", length), flags, None, None, 0, None, extra


@operation
def pipe(flags: int = 0) -> Request[tuple[int, int]]:
    """Creates a pipe; returns the fds to read and to write. IORING_OP_PIPE, Linux 6.16; before that, pipe2(2).

    Args:
        flags: ``os.O_NONBLOCK``, ``O_DIRECT``. ``O_CLOEXEC`` is added.
    """
    fds = two_fds()
    return PIPE, -1, 0, fds, 0, flags | os.O_CLOEXEC, fds, None, 0, 0


# epoll

EPOLL_CTL = row(
    "epoll_ctl", Opcode.EPOLL_CTL, "5.6", "nothing", "change what an epoll waits for", names="number", second_fd="off"
)
EPOLL_WAIT = row(
    "epoll_wait",
    Opcode.EPOLL_WAIT,
    "6.15",
    "struct",
    "wait for an epoll's events",
    runs="waits",
    wait_for=select.POLLIN,
    decode=lambda res, events: epoll_events(events, res),
)


@operation
def epoll_ctl(
    epfd: int | HasFileno, op: int, fd: int | HasFileno, events: int = 0, data: int | None = None
) -> Request[None]:
    """Changes what an epoll waits for. IORING_OP_EPOLL_CTL, Linux 5.6.

    Args:
        epfd: an epoll, such as `select.epoll`.
        op: ``EPOLL_CTL_*`` of epoll_ctl(2): ``ADD`` 1, ``DEL`` 2, ``MOD`` 3.
        fd: whose events they are.
        events: ``select.EPOLL*``.
        data: what `epoll_wait` then reports, a number below 2147483648; by default ``fd``, as in `select.epoll`.
    """
    number = number_of(fd)
    event = epoll_event(events, fd_field(number) if data is None else unsigned("data", data, 31))
    return EPOLL_CTL, number_of(epfd), number, event, unsigned("op", op)


@operation
def epoll_wait(epfd: int | HasFileno, maxevents: int) -> Request[list[tuple[int, int]]]:
    """Waits for events; returns ``(data, events)`` of each, as `select.epoll.poll`. IORING_OP_EPOLL_WAIT, Linux 6.15.

    Args:
        epfd: an epoll.
        maxevents: how many at most.
    """
    size = unsigned("maxevents", maxevents, 16)
    events = new_epoll_events(size)
    return EPOLL_WAIT, number_of(epfd), 0, events, size, 0, events


# Children

WAITID = row(
    "waitid",
    Opcode.WAITID,
    "6.7",
    "struct",
    "wait for a child",
    runs="waits",
    names="number",
    decode=lambda res, info: waitid_result(info),
)


@operation
def waitid(idtype: int, id: int, options: int) -> Request[os.waitid_result | None]:
    """Waits for a child, as `os.waitid`. IORING_OP_WAITID, Linux 6.7.

    Args:
        idtype: ``os.P_PID``, ``P_PGID``, ``P_ALL``, ``P_PIDFD``.
        id: which.
        options: ``os.WEXITED`` and so on. With ``WNOHANG``, or a non-blocking pidfd, it returns None if there is
            nothing to report.
    """
    info = new_siginfo()
    fd, extra = id if idtype == os.P_PIDFD else -1, (0, 0, options, 0)
    return WAITID, fd, address_of(info), None, unsigned("idtype", idtype), 0, info, None, 0, id, extra


# Futexes

FUTEX_WAIT = row("futex_wait", Opcode.FUTEX_WAIT, "6.7", "nothing", "wait on a futex", runs="waits")
FUTEX_WAKE = row("futex_wake", Opcode.FUTEX_WAKE, "6.7", "count", "wake who waits on a futex")
FUTEX_WAITV = row("futex_waitv", Opcode.FUTEX_WAITV, "6.7", "count", "wait on any of several futexes", runs="waits")


@operation
def futex_wait(
    futex: Buffer, expected: int, mask: int = FUTEX_BITSET_MATCH_ANY, flags: int = _PRIVATE_U32
) -> Request[None]:
    """Waits until a futex is woken. IORING_OP_FUTEX_WAIT, Linux 6.7.

    Args:
        futex: a writable buffer of 4 bytes, aligned to 4.
        expected: what must be in it, as an unsigned number; otherwise `BlockingIOError` at once.
        mask: it is woken by a `futex_wake` with a bit in common.
        flags: ``FUTEX2_*`` of futex_wait(2): ``SIZE_U32`` 2 and, within one process, ``PRIVATE`` 128. To share a
            futex with another process both sides pass 2.

    It may be woken for no reason: look at the value again.
    """
    return _on_futex(FUTEX_WAIT, futex, unsigned("expected", expected), mask, flags)


@operation
def futex_wake(
    futex: Buffer, count: int, mask: int = FUTEX_BITSET_MATCH_ANY, flags: int = _PRIVATE_U32
) -> Request[int]:
    """Wakes up to ``count`` waiters of a futex and returns how many. IORING_OP_FUTEX_WAKE, Linux 6.7.

    Args:
        futex, flags: as in `futex_wait`.
        count: how many at most.
        mask: who: those whose mask has a bit in common.
    """
    return _on_futex(FUTEX_WAKE, futex, unsigned("count", count, 31), mask, flags)


def _on_futex(kind: Any, buffer: Buffer, value: int, mask: int, flags: int) -> Request[Any]:
    extra = 0, 0, 0, unsigned("mask", mask)
    unsigned("flags", flags, 31)
    return kind, -1, value, futex(buffer), 0, 0, None, None, 0, flags, extra


@operation
def futex_waitv(futexes: Sequence[tuple[Buffer, int]], flags: int = _PRIVATE_U32) -> Request[int]:
    """Waits until one of several futexes is woken; returns its index. IORING_OP_FUTEX_WAITV, Linux 6.7.

    Args:
        futexes: up to 128 pairs of a futex and what must be in it; see `futex_wait`.
        flags: as in `futex_wait`, for all of them.
    """
    waiters, words = futex_waiters(futexes, unsigned("flags", flags))
    return FUTEX_WAITV, -1, 0, waiters, len(words), 0, words, None, 0, 0
