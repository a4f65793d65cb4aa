"""A ring without a kernel: `SimulatedRing`.

A kernel may complete operations in any order, in part, interrupted or not at all, and a cancel may meet its operation
at any moment. A real one shows a few of these histories, and the same few on every run. This ring makes them up,
decision by decision, so that a seed repeats them and Hypothesis searches and shrinks them::

    ring = SimulatedRing(random.Random(seed))
    ring.stage(Opcode.RECV, 5, 0, 0, 100, 0, token, pin=buffer)
    ring.tick(1.0)  # [token, 37, 0]: a short receive

The simulation is an addition, never the proof. It knows what its authors know about the kernel: what passes here has
still to pass on a real ring.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import struct
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ._abi import (
    ACCEPT_MULTISHOT,
    CQE_BUFFER_SHIFT,
    CQE_F_BUF_MORE,
    CQE_F_BUFFER,
    CQE_F_MORE,
    CQE_F_NOTIF,
    PBUF_RING_INC,
    POLL_ADD_MULTI,
    RECV_MULTISHOT,
    SQE_IO_HARDLINK,
    SQE_IO_LINK,
    TIMEOUT_MULTISHOT,
    Opcode,
)
from ._errors import RingError
from ._ring import INTERRUPTION, RingConfig, SubmissionQueue, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PATTERN", "Choices", "Entry", "SimulatedRing"]

PATTERN: Final = 0xA5
"""The byte that simulated reads put into their buffers."""

_SQE: Final = struct.Struct("<BBHiqQIIQH22x")  # the fields of `Entry`
_ERESTARTSYS: Final = -512
_FIRST_FD: Final = 1_000_000  # no real fd has such a number: a real close of one fails
_NOTIFICATIONS: Final = (0, -(1 << 31))  # their ``res`` is a flag word: all data sent from the buffer; some copied

_READS: Final = frozenset({Opcode.READ, Opcode.RECV})
_LINKS: Final = SQE_IO_LINK | SQE_IO_HARDLINK
_SHORT_IS_A_FAILURE: Final = frozenset({Opcode.READ, Opcode.WRITE})  # to a chain
_TRANSFERS: Final = _READS | {Opcode.WRITE, Opcode.SEND, Opcode.SEND_ZC}
_MAKES_FD: Final = frozenset({Opcode.OPENAT, Opcode.OPENAT2, Opcode.ACCEPT, Opcode.SOCKET})
_MAY_FAIL: Final = (
    _TRANSFERS
    | _MAKES_FD
    | {Opcode.NOP, Opcode.FSYNC, Opcode.FTRUNCATE, Opcode.STATX, Opcode.CONNECT, Opcode.SHUTDOWN, Opcode.MKDIRAT}
)
_SIMULATED: Final = _MAY_FAIL | {
    Opcode.ASYNC_CANCEL,
    Opcode.CLOSE,
    Opcode.POLL_ADD,
    Opcode.TIMEOUT,
    Opcode.READ_MULTISHOT,
}


class Choices(Protocol):
    """Where the decisions come from: a `random.Random`, or Hypothesis (``st.randoms(use_true_random=False)``)."""

    def randrange(self, n: int, /) -> int:
        """A number from 0 to ``n`` - 1. 0 is always the tame decision, so that failures shrink to a tame kernel."""


class Entry(NamedTuple):
    """A submission queue entry, decoded."""

    opcode: int
    flags: int
    ioprio: int
    fd: int
    off: int
    addr: int
    length: int
    op_flags: int
    user_data: int
    buf_group: int = 0

    @property
    def multishot(self) -> bool:
        """Has it many results?"""
        flags, bit = {
            Opcode.ACCEPT: (self.ioprio, ACCEPT_MULTISHOT),
            Opcode.RECV: (self.ioprio, RECV_MULTISHOT),
            Opcode.POLL_ADD: (self.length, POLL_ADD_MULTI),
            Opcode.TIMEOUT: (self.op_flags, TIMEOUT_MULTISHOT),
            Opcode.READ_MULTISHOT: (1, 1),
        }.get(Opcode(self.opcode), (0, 0))
        return flags & bit != 0


@dataclass(eq=False)
class _Request:
    """An entry the simulated kernel has."""

    entry: Entry
    delay: int  # ticks to its next CQE
    ending: int | None = None  # its result, if that is decided already
    only_notification_left: bool = False
    last_shot: bool = False  # a multishot operation that was asked to end
    steps: list[Entry] = field(default_factory=list)  # those behind it in its chain


class _Buffers:
    """A ring of provided buffers, as the kernel sees it."""

    def __init__(self, entries: Any, count: int, incremental: bool) -> None:
        self._entries = entries
        self._count = count
        self._incremental = incremental
        self._head = 0

    def next(self) -> Any:
        """The entry that is due; None if there is none."""
        if self._head == self._entries[0].resv:
            return None
        return self._entries[self._head % self._count]

    def consume(self, size: int) -> int:
        """The entry that is due has received so much; returns the CQE's flag for it."""
        entry = self._entries[self._head % self._count]
        if self._incremental and size < entry.len:
            entry.addr += size
            entry.len -= size
            return CQE_F_BUF_MORE
        self._head = (self._head + 1) % (1 << 16)
        return 0


class SimulatedRing(SubmissionQueue):
    """Stands in for a `Ring`: takes staged entries and answers them as some kernel might.

    What it may do: complete in any order; transfer less than was asked; end an operation with one of ``faults``; end a
    zero-copy send with a result and a later notification, an error included; take only part of the staged entries; end
    a wait for nothing; overflow the completion queue; end a multishot operation with any of its results, or for lack
    of a provided buffer. A cancel is answered with 0, -EALREADY or -ENOENT, before or after the operation's own CQE,
    and after 0 and -EALREADY the operation ends with -ECANCELED, -EINTR, -512 or its own result. A cancel of what has
    a CQE already finds nothing: -ENOENT; nor does one of a step of a chain that has not begun, which may be some time
    after the CQE of the step before.

    What it does not do: I/O, waiting (time does not pass here), ownership by a thread, operations that
    are not in ``supported``. The only memory it touches is the buffer of a read, just before the last CQE.

    Args:
        choices: where the decisions come from; by default `random.Random(0)`.
        config: for the sizes of the queues.
        patience: each CQE is posted within this many ticks.
        rarity: how rare failures and interruptions are: one in so many.
        faults: negative results that operations end with now and then. Polls, timeouts and closes have none.

    Attributes:
        open_fds: the fds it has handed out and that are not closed. They are numbers without a file.
        received: how many bytes multishot receives have had of each fd. Byte ``n`` of an fd's is ``n % 256``.
    """

    def __init__(
        self,
        choices: Choices | None = None,
        *,
        config: RingConfig | None = None,
        patience: int = 4,
        rarity: int = 8,
        faults: Sequence[int] = (-errno.EINTR, -errno.EAGAIN, _ERESTARTSYS, -errno.ENOBUFS),
    ) -> None:
        super().__init__()
        self.config = config or RingConfig()
        self.supported: frozenset[int] = _SIMULATED
        self.open_fds: set[int] = set()
        self.received: Counter[int] = Counter()
        self.closed = False
        self._choices = choices or random.Random(0)
        self._patience = patience
        self._rarity = rarity
        self._faults = tuple(faults)
        self._requests: list[_Request] = []
        self._next_steps: list[list[Entry]] = []  # of chains, that begin with the next tick
        self._jobs: dict[int, Any] = {}
        self._buffers: dict[int, _Buffers] = {}
        self._cq: deque[tuple[Entry, int, int]] = deque()
        self._fds = itertools.count(_FIRST_FD)
        self._eventfd: int | None = None
        self._process = os.getpid()
        self._counters = dict.fromkeys(("enters", "submits", "sqes", "cqes", "overflows", "stalls"), 0)

    # As in `Ring`

    def enable(self) -> None:
        """Does nothing: any thread may use it."""
        self._check_usable()

    def tick(self, timeout: float) -> list[int]:
        """Takes staged entries, posts what is due, and returns CQEs in the form of `Ring.tick`.

        With a ``timeout`` it returns something if anything is in flight that is not part of a job. A wait that nothing
        can end is over at once.
        """
        self._check_usable()
        self._counters["enters"] += 1
        taken = self._choices.randrange(self.staged + 1) if self._rarely() else self.staged
        interrupted = taken < self.staged
        self._counters["stalls"] += interrupted
        self._take(taken)
        self._advance()
        interrupted = interrupted or (timeout > 0 and self._rarely())
        events = self._reap()
        while timeout > 0 and not interrupted and not events and (self._cq or self._requests or self._next_steps):
            self._advance()
            events = self._reap()
        return events or [INTERRUPTION, 0, 0] if interrupted else events

    def flush(self) -> None:
        """Takes everything staged. CQEs wait for the next tick."""
        self._check_usable()
        self._counters["enters"] += 1
        self._take(self.staged)
        self._advance()

    def pending(self) -> bool:
        """Is there a CQE to reap?"""
        self._check_usable()
        return bool(self._cq)

    def register_eventfd(self, fd: int) -> None:
        """Signals ``fd``, a real eventfd, at every CQE; with -1 none any more."""
        self._check_usable()
        self._eventfd = fd if fd >= 0 else None

    def set_job(self, slot: int, job: Any) -> None:
        """As `Ring.set_job`."""
        self._check_usable()
        if job == ffi.NULL:
            self._jobs.pop(slot, None)
        else:
            self._jobs[slot] = job
            for position in range(job.size):
                job.results[position] = lib.TU_PENDING

    def register_files(self, n: int) -> None:
        """Does nothing."""

    def put_file(self, place: int, fd: int) -> None:
        """Does nothing."""

    def clear_files(self, places: Sequence[int]) -> None:
        """Does nothing."""

    def register_buffers(self, n: int) -> None:
        """Does nothing."""

    def update_buffer(self, index: int, address: int, size: int) -> None:
        """Does nothing."""

    def register_buffer_ring(self, entries: Any, n: int, group: int, flags: int) -> None:
        """As `Ring.register_buffer_ring`."""
        self._check_usable()
        self._buffers[group] = _Buffers(entries, n, bool(flags & PBUF_RING_INC))

    def unregister_buffer_ring(self, group: int) -> None:
        """As `Ring.unregister_buffer_ring`."""
        self._check_usable()
        del self._buffers[group]

    @property
    def forked(self) -> bool:
        """True in a child of the process that made the ring."""
        return os.getpid() != self._process

    @property
    def entries(self) -> tuple[int, int]:
        """Sizes of the submission and the completion queue."""
        return self.config.entries, self.config.effective_cq_entries

    def counters(self) -> dict[str, int]:
        """As `Ring.counters`."""
        self._check_usable()
        return dict(self._counters)

    def close(self) -> None:
        """Ends the use of the ring. What is in flight stays so, as with a real one."""
        self.closed = True

    # What a test sees besides

    @property
    def staging(self) -> tuple[Entry, ...]:
        """What the next tick submits."""
        return self._decode(self.staged)

    @property
    def in_flight(self) -> tuple[Entry, ...]:
        """The entries that were taken and whose last CQE has not been handed out."""
        posted = (entry for entry, _, flags in self._cq if not flags & CQE_F_MORE)
        steps = (entry for request in self._requests for entry in request.steps)
        return (*(request.entry for request in self._requests), *steps, *itertools.chain(*self._next_steps), *posted)

    def close_fd(self, fd: int) -> None:
        """Closes one of ``open_fds``.

        Raises:
            OSError: it is not open.
        """
        if fd not in self.open_fds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.open_fds.remove(fd)

    # The kernel's part

    def _check_usable(self) -> None:
        if self.closed:
            raise RingError("this ring is closed")
        if self.forked:
            raise RingError("this ring belongs to the parent process")

    def _rarely(self) -> bool:
        return self._choices.randrange(self._rarity) == self._rarity - 1

    def _delay(self) -> int:
        return self._choices.randrange(self._patience)

    def _one_of(self, values: Sequence[Any]) -> Any:
        return values[self._choices.randrange(len(values))]

    def _decode(self, n: int) -> tuple[Entry, ...]:
        entries = map(Entry._make, _SQE.iter_unpack(self._bytes[: _SQE.size * n]))
        return tuple(entry for entry in entries if entry.opcode != lib.TU_NEUTRALISED)

    def _take(self, n: int) -> None:
        while 0 < n < self.staged and self._bytes[(n - 1) * _SQE.size + 1] & _LINKS:  # a chain is taken as a whole
            n += 1
        entries = self._decode(n)
        self._consumed(n)
        self._counters["submits"] += bool(entries)
        self._counters["sqes"] += len(entries)
        chain: list[Entry] = []
        for entry in entries:
            chain.append(entry)
            if not entry.flags & _LINKS:
                self._begin(chain)
                chain = []

    def _begin(self, chain: list[Entry]) -> None:
        entry, *steps = chain
        ending = None
        if entry.opcode not in self.supported:
            ending = -errno.EINVAL
        elif entry.opcode == Opcode.ASYNC_CANCEL:
            ending = self._cancel(entry)
        self._requests.append(_Request(entry, self._delay(), ending, steps=steps))

    def _cancel(self, cancel: Entry) -> int:
        """Decides what becomes of the operation that is to be cancelled; the result of the cancel itself."""
        if cancel.op_flags:
            return -errno.EINVAL  # only by user_data
        for target in self._requests:
            if target.entry.user_data == cancel.addr and not target.only_notification_left:
                break
        else:
            return -errno.ENOENT
        target.delay = min(target.delay, self._delay())
        answer: int = self._one_of((0, -errno.EALREADY, -errno.ENOENT))
        if answer != -errno.ENOENT:
            target.ending = self._one_of((-errno.ECANCELED, -errno.EINTR, _ERESTARTSYS, None))
            target.last_shot = True
        return answer

    def _advance(self) -> None:
        """One tick passes: whatever is due gets its CQE, in any order."""
        steps, self._next_steps = self._next_steps, []
        for chain in steps:
            self._begin(chain)
        due = [request for request in self._requests if request.delay == 0]
        for request in self._requests:
            request.delay -= 1
        while due:
            self._complete(due.pop(self._choices.randrange(len(due))))

    def _complete(self, request: _Request) -> None:
        entry = request.entry
        if request.only_notification_left:
            self._requests.remove(request)
            self._post(entry, self._one_of(_NOTIFICATIONS), CQE_F_NOTIF)
            return
        if entry.multishot and request.ending is None:
            self._shoot(request)
            return
        res = self._own_result(entry) if request.ending is None else request.ending
        if entry.opcode in _READS and res > 0:
            ffi.memmove(ffi.cast("char *", entry.addr), bytes([PATTERN]) * res, res)
        if entry.opcode == Opcode.SEND_ZC and (res >= 0 or self._one_of((False, True))):
            self._post(entry, res, CQE_F_MORE)
            self._go_on_with_chain(request, res)
            request.only_notification_left = True
            request.delay = self._delay() - 1
            if request.delay < 0:  # both in one tick
                self._complete(request)
        else:
            self._requests.remove(request)
            self._post(entry, res, 0)
            self._go_on_with_chain(request, res)

    def _shoot(self, request: _Request) -> None:
        """One result of many, or the last."""
        entry = request.entry
        res, flags = self._shot(entry)
        if request.last_shot or (res < 0 and res != -errno.ETIME) or self._rarely():
            self._requests.remove(request)
            self._post(entry, res, flags)
        else:
            request.delay = self._delay()
            self._post(entry, res, flags | CQE_F_MORE)

    def _shot(self, entry: Entry) -> tuple[int, int]:
        """Result and flags."""
        if self._faults and self._rarely():
            return int(self._one_of(self._faults)), 0
        if entry.opcode not in (Opcode.RECV, Opcode.READ_MULTISHOT):
            return self._own_result(entry), 0
        buffers = self._buffers.get(entry.buf_group)
        buffer = buffers.next() if buffers else None
        if buffers is None or buffer is None:
            return -errno.ENOBUFS, 0
        size = buffer.len - self._choices.randrange(buffer.len)
        start = self.received[entry.fd]
        self.received[entry.fd] += size
        data = bytes(n % 256 for n in range(start, start + size))
        ffi.memmove(ffi.cast("char *", buffer.addr), data, size)
        return size, CQE_F_BUFFER | buffer.bid << CQE_BUFFER_SHIFT | buffers.consume(size)

    def _go_on_with_chain(self, request: _Request, res: int) -> None:
        steps, request.steps = request.steps, []
        if not steps:
            return
        entry = request.entry
        failed = res < 0 or (res < entry.length and entry.opcode in _SHORT_IS_A_FAILURE)
        if failed and not entry.flags & SQE_IO_HARDLINK:
            for step in steps:
                self._post(step, -errno.ECANCELED, 0)
        elif self._one_of((False, True)):
            self._next_steps.append(steps)
        else:
            self._begin(steps)

    def _own_result(self, entry: Entry) -> int:
        """What the operation ends with if no cancel decides."""
        opcode = entry.opcode
        if opcode in _MAY_FAIL and self._faults and self._rarely():
            return int(self._one_of(self._faults))
        if opcode in _TRANSFERS:
            counts = entry.length + 1 if opcode in _READS else max(entry.length, 1)  # a read may find the end
            return entry.length - self._choices.randrange(counts)
        if opcode in _MAKES_FD:
            fd = next(self._fds)
            self.open_fds.add(fd)
            return fd
        if opcode == Opcode.POLL_ADD:
            return entry.op_flags
        if opcode == Opcode.TIMEOUT:
            return -errno.ETIME
        if opcode == Opcode.CLOSE and entry.fd >= _FIRST_FD:
            if entry.fd not in self.open_fds:
                return -errno.EBADF
            self.close_fd(entry.fd)
        return 0

    def _post(self, entry: Entry, res: int, flags: int) -> None:
        self._counters["overflows"] += len(self._cq) >= self.config.effective_cq_entries
        self._cq.append((entry, res, flags))
        if self._eventfd is not None:
            os.eventfd_write(self._eventfd, 1)

    def _reap(self) -> list[int]:
        """As many CQEs as the completion queue holds; the rest waits. Those of jobs are counted off."""
        events: list[int] = []
        for _ in range(min(len(self._cq), self.config.effective_cq_entries)):
            entry, res, flags = self._cq.popleft()
            self._counters["cqes"] += 1
            token, job = entry.user_data, self._job_of(entry.user_data)
            events += (token, res, flags) if job is None else self._count_off(job, token, res, flags)
        return events

    def _job_of(self, user_data: int) -> Any:
        job = self._jobs.get(user_data & lib.TU_SLOT) if user_data & lib.TU_JOB else None
        if job is None or user_data & ~lib.TU_JOB_POSITION != job.token or not job.left:
            return None
        return job if (user_data & lib.TU_JOB_POSITION) // (lib.TU_SLOT + 1) < job.size else None

    def _count_off(self, job: Any, user_data: int, res: int, flags: int) -> tuple[int, ...]:
        """What of it is to be seen."""
        last = not flags & CQE_F_MORE
        if not flags & CQE_F_NOTIF:
            job.results[(user_data & lib.TU_JOB_POSITION) // (lib.TU_SLOT + 1)] = res
        job.left -= last
        if last and not job.left:
            return job.token, job.size, 0
        return (user_data, res, CQE_F_MORE) if last and job.each else ()
