"""The I/O manager: operations in slots, one `Ring.tick` per scheduler tick, tasks woken by CQEs.

The data path of ``await recv(fd, buffer)``: the coroutine calls `UringIOManager.perform`, which takes an idle
`Operation`, stages an SQE that carries its token, and parks the task on the operation's prebuilt trap. At the end of
the scheduler's tick trio calls `get_events`: one call into C submits everything that was staged, waits, and brings
the CQEs back as one list. `process_events` finds each operation by its token and lets it decide (`_cancel`). The
task runs again with the bare result. What is the same for every operation on this way is done in C (`_slots`).

Who owns what: the manager owns the ring, the slots and the two eventfds; an operation owns the memory the kernel
uses; the coroutine owns the operation from `perform`'s start until it picks the result up.

What trio asks of an I/O manager, beyond the obvious:

* ``get_events`` is falsy **iff** the time-out expired: ``wait_all_tasks_blocked`` and the autojump clock build on it.
* In guest mode ``get_events`` is called from worker threads. They may not enter the ring (it has one owner), and
  requests they submitted would die with them. So they only wait, on an eventfd the kernel signals at completions.
  Meanwhile whatever the host's callbacks stage (a cancel) is submitted at once; and a worker that is about to sleep
  looks first whether something was staged before it announced itself. One of the two always sees the other.
* An fd is about to be closed when ``notify_closing`` returns: every SQE that names it must be gone or resolved by the
  kernel, or it might meet a reused fd number; and cancelled polls must have let go of the file, or the peer sees no
  FIN.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import select
import threading
import types
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, Protocol, TypeVar, cast

import outcome
import trio
from trio.lowlevel import current_task, enable_ki_protection

from . import _trio_internals
from ._abi import Opcode
from ._cancel import INDEX_BITS, INDEX_MASK, Kind, Operation, State, closed_error
from ._errors import RingError, UnavailableError, unsupported
from ._job import Job
from ._registered import Registered
from ._ring import Ring, RingConfig, ffi, lib
from ._shots import Shots
from ._slots import complete_all

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Sequence

    from trio.lowlevel import Abort, RaiseCancelT, Task

    from ._ring import BufferRing, SubmissionQueue
    from ._shots import Receiver
    from ._slots import Received

T = TypeVar("T")

_CANCEL_HEAD: Final = int(Opcode.ASYNC_CANCEL)
_POLL_HEAD: Final = int(Opcode.POLL_ADD)
_OF_SOCKETS: Final = frozenset({Opcode.ACCEPT, Opcode.CONNECT, Opcode.RECV, Opcode.SEND})
MAX_RW_COUNT: Final = lib.TU_MAX_RW_COUNT  # what read(2) and write(2) transfer at most; the SQE's field has 32 bits
_WAKEUP_INDEX: Final = 1
_MAIL_INDEX: Final = 2
_FIRST_INDEX: Final = 3
_ONE_CQE: Final = 3  # numbers

DRAIN_SECONDS: Final = 10.0
"""How long the end of a run waits for operations the kernel will not give back (a dead network mount)."""

_kept_for_ever: list[Operation] = []

# A manager lives until it is closed. As garbage, with a thread that is gone or a host that gave up its guest run, its
# ring could be finalised first, and then nobody could drain it.
_open_managers: Final[set[UringIOManager]] = set()

at_close: Final[list[Callable[[UringIOManager], object]]] = []
"""Called, in whichever thread, with each manager that is about to close, before anything is cancelled."""

POLL_IN: Final[Kind[int]] = Kind(
    name="wait_readable",
    opcode=Opcode.POLL_ADD,
    since="5.1",
    result="count",
    summary="trio's wait for readability",
    man="io_uring_prep_poll_add(3)",
    direction="read",
    readiness=True,
    counted=False,
)
POLL_OUT: Final[Kind[int]] = Kind(
    name="wait_writable",
    opcode=Opcode.POLL_ADD,
    since="5.1",
    result="count",
    summary="trio's wait for writability",
    man="io_uring_prep_poll_add(3)",
    direction="write",
    readiness=True,
    counted=False,
)


_EVENTS_OF: Final = {POLL_IN: select.POLLIN, POLL_OUT: select.POLLOUT}
_ALWAYS_REPORTED: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL

_WITH_TASK: Final = frozenset({State.STAGED, State.IN_FLIGHT, State.CANCELLING})
"""States in which a parked task waits for a CQE."""
_WITH_OR_WITHOUT_TASK: Final = _WITH_TASK | {State.DETACHED}

_ANY_POLL: Final = replace(POLL_IN, name="wait_until_ready", summary="a wait before another try", direction=None)


class HasFileno(Protocol):
    """An object with a file descriptor."""

    def fileno(self) -> int:
        """The file descriptor's number."""


@dataclass(frozen=True)
class InFlight:
    """One operation in flight, for `UringStatistics.operations`.

    Attributes:
        operation: its name.
        fd: the file descriptor, or a negative number if it has none.
        task: name of the task that waits for it; None if nobody does any more.
        age: seconds since it was staged, accurate to one scheduler tick.
        state: its `State`, by name.
    """

    operation: str
    fd: int
    task: str | None
    age: float
    state: str


@dataclass(frozen=True)
class UringStatistics:
    """The state of a run's ring.

    Attributes:
        tasks_waiting_read, tasks_waiting_write: tasks in ``wait_readable`` and ``wait_writable``, as in trio's own.
        enters: ``io_uring_enter`` calls.
        submits: ticks that handed at least one entry to the kernel.
        sqes: entries handed to the kernel.
        cqes: completions reaped.
        cancels_asked: cancels requested of the kernel.
        cancels_won: of these, how many operations ended cancelled.
        cancels_lost: of these, how many had completed first.
        overflows: times the completion queue overflowed (nothing is lost).
        stalls: times the kernel took no entry for lack of memory.
        in_flight: operations in flight now, of those that count against ``max_in_flight``.
        peak: highest ``in_flight`` so far.
        waiting_for_slot: tasks that wait because ``max_in_flight`` is reached.
        operations: the live table of what is in flight, readiness polls included.
        backend: ``"epoll"``, the value trio's own code understands.
        engine: ``"io_uring"``.
    """

    tasks_waiting_read: int
    tasks_waiting_write: int
    enters: int
    submits: int
    sqes: int
    cqes: int
    cancels_asked: int
    cancels_won: int
    cancels_lost: int
    overflows: int
    stalls: int
    in_flight: int
    peak: int
    waiting_for_slot: int
    operations: tuple[InFlight, ...]
    backend: Literal["epoll"] = field(default="epoll", init=False)
    engine: Literal["io_uring"] = field(default="io_uring", init=False)


@dataclass
class _Waiting:
    """A task that waits for slots."""

    fds: Collection[int]  #: what it will use
    needed: int
    got: list[Operation]


class _Both:
    """Two sets of operations that an operation is to be discarded from."""

    def __init__(self, *sets: set[Operation]) -> None:
        self._sets = sets

    def discard(self, operation: Operation) -> None:
        for each in self._sets:
            each.discard(operation)


class _Notices:
    """Slot 0: CQEs that concern no task (acknowledged cancels, a wait that a signal ended)."""

    def __init__(self, slots: list[Any]) -> None:
        self._slots = slots
        self.missed: list[tuple[Operation, int]] = []

    def complete(self, token: int, res: int, flags: int) -> None:
        """Nothing depends on them, but that a cancel may have come too early for a step of a chain, or between two
        shots of a multishot operation, or two tries of any operation that the kernel makes again when the fd is ready.
        """
        if res == -errno.ENOENT or res == -errno.EALREADY:
            operation = self._slots[token >> 2 * INDEX_BITS]
            life = token >> INDEX_BITS & INDEX_MASK
            if isinstance(operation, Job | Shots):
                if res == -errno.ENOENT or isinstance(operation, Shots):
                    operation.cancel_missed(life)
            elif isinstance(operation, Operation) and res == -errno.ENOENT:
                self.missed.append((operation, life))

    def ask_again(self) -> None:
        """For those that have not ended since: mostly, the CQE has come behind the notice."""
        missed = self.missed[:]
        self.missed.clear()
        for operation, life in missed:
            operation.cancel_missed(life)


class _Wakeup:
    """Slot 1: a poll on an eventfd, so that any thread can end a wait in the ring."""

    def __init__(self, ring: SubmissionQueue) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ring = ring
        self._lock = threading.RLock()  # between a late `wake_up` of another thread and `close`
        self.arm()

    def wake_up(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def arm(self) -> None:
        self._ring.stage(_POLL_HEAD, self.fd, 0, 0, 0, select.POLLIN, _WAKEUP_INDEX)

    def complete(self, token: int, res: int, flags: int) -> None:
        _drain_eventfd(self.fd)
        self.arm()


class Addressee(Protocol):
    """Who gets what is sent to a mailbox."""

    def deliver(self, res: int) -> None:
        """A CQE has come."""

    def fail(self, error: RingError) -> None:
        """Nothing will come any more: the ring has failed. Whoever waits is to hear of it."""

    def forsake(self) -> None:
        """The run is over."""


class _Mail:
    """Slot 2: CQEs that other rings have posted. Those for a mailbox that is closed are nobody's."""

    def __init__(self) -> None:
        self._boxes: dict[int, Addressee] = {}
        self._numbers = itertools.count(_MAIL_INDEX | 1 << INDEX_BITS, 1 << INDEX_BITS)

    def open(self, box: Addressee) -> int:
        """Returns the user_data of what is sent to it."""
        token = next(self._numbers)
        self._boxes[token] = box
        return token

    def close(self, token: int) -> None:
        self._boxes.pop(token, None)

    def complete(self, token: int, res: int, flags: int) -> None:
        box = self._boxes.get(token)
        if box is not None:
            box.deliver(res)

    def fail(self, error: RingError) -> None:
        for box in tuple(self._boxes.values()):
            box.fail(error)

    def forsake(self) -> None:
        while self._boxes:
            _, box = self._boxes.popitem()
            box.forsake()

    def __len__(self) -> int:
        return len(self._boxes)


def _refuse(kind: Kind[Any], *args: object, **kwargs: object) -> NoReturn:
    current_task()  # outside of any run: trio's own error
    raise UnavailableError(errno.EOPNOTSUPP, f"{kind.name} needs a ring, and the run whose ring this was is over")


def ring_failed(cause: BaseException) -> RingError:
    """For a task that waits for what will never come. The run itself goes on."""
    error = RingError(f"the ring of this run has failed: {cause!r}")
    error.__cause__ = cause
    return error


def _seen_from_outside(op: Operation) -> InFlight:
    return InFlight(
        operation=op.kind.name,
        fd=op.fd,
        task=None if op.task is None else op.task.name,
        age=max(0.0, monotonic() - op.since),
        state=op.state.name,
    )


def _size_of_buffer(pin: Any) -> int:
    if isinstance(pin, bytes):
        return len(pin)
    return ffi.sizeof(pin) if pin is not None and ffi.typeof(pin).kind == "array" else 0


def number_of(fd: int | HasFileno) -> int:
    """The number of an fd, or of an object that has one."""
    return fd if isinstance(fd, int) else fd.fileno()


def _drain_eventfd(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass


class UringIOManager:
    """trio's I/O manager on a ring. One for each run; trio makes and closes it.

    Args:
        config: see `RingConfig`.
        ring: a ring to use instead of a new one (a simulated one in tests).

    Raises:
        UnavailableError: there can be no ring; the message says why.
    """

    wake = staticmethod(_trio_internals.wake)

    native: ClassVar[bool] = True
    """Is it the run's own I/O manager, which hears of all that is closed in the run?"""

    def __init__(self, config: RingConfig, ring: Ring | None = None) -> None:
        self.ring: Ring = Ring(config) if ring is None else ring
        self.cancels_won = 0
        self.cancels_lost = 0
        self.failure: BaseException | None = None
        self._config = config
        self._owner: int | None = None
        self._worker_waits = False
        self._notify_fd: int | None = None
        self._notify_wanted = False
        self._closed = False
        self._cancels_asked = 0
        self._now = 0.0  # when this tick began; 0: nobody has asked yet
        self._missing = frozenset(Opcode) - self.ring.supported
        self.carries_sockets = self._missing.isdisjoint(_OF_SOCKETS)
        self._wakeup = _Wakeup(self.ring)
        self.mail = _Mail()
        self._slots: list[Any] = [None, self._wakeup, self.mail]
        self._slots[0] = self._notices = _Notices(self._slots)
        self._idle: list[Operation] = []
        self._idle_uncounted: list[Operation] = []
        self._counted_slots = 0
        self._queue: OrderedDict[Task, _Waiting] = OrderedDict()
        self.registered = Registered(self)
        self._stream_buffers: BufferRing | None = None
        self._lone = False
        self._by_fd: dict[int, set[Operation]] = {}
        self._unprocessed: Iterator[int] = iter(())
        _this_thread.manager = self
        _open_managers.add(self)

    # What trio calls

    def get_events(self, timeout: float) -> list[int]:
        """Submits, waits up to ``timeout`` seconds, reaps. Falsy if and only if the time-out expired."""
        if get_ident() != self._owner:
            if self._owner is not None:
                return self._wait_in_worker(timeout)
            self.own_ring()
        if self.failure is not None:
            return self._poll(timeout)
        try:
            events = self.ring.tick(timeout)
            self._now = 0.0
            if events:
                self._unprocessed = iter(events)
            elif self._notify_fd is not None:  # guest mode: a worker may be about to wait
                self.ring.register_eventfd(self._notify_fd)
        except (OSError, RingError) as exc:
            self._fail_unless_forked(exc)
            return [0, 0, 0]
        return events

    def process_events(self, events: list[int]) -> None:
        """Lets each operation that has a CQE in ``events`` decide what that means for its task."""
        self._lone = len(events) <= _ONE_CQE
        if not events:
            return
        # Kept, so that the drain sees the rest if one of them fails. From the start: a host may give up its guest run
        # between `get_events` and this.
        rest = self._unprocessed = iter(events)
        complete_all(self._slots, rest, self.wake)
        if self._notices.missed:
            self._notices.ask_again()
        if self._notify_wanted:
            self._notify_wanted = False
            self._notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    async def wait_readable(self, fd: int | HasFileno) -> None:
        """See `trio.lowlevel.wait_readable`. IORING_OP_POLL_ADD, Linux 5.1."""
        await self.perform(POLL_IN, number_of(fd), op_flags=select.POLLIN)

    async def wait_writable(self, fd: int | HasFileno) -> None:
        """See `trio.lowlevel.wait_writable`. IORING_OP_POLL_ADD, Linux 5.1."""
        await self._until_writable(POLL_OUT, number_of(fd))

    def notify_closing(self, fd: int | HasFileno) -> None:
        """See `trio.lowlevel.notify_closing`. When it returns, no SQE names ``fd`` and no cancelled poll holds it."""
        number = number_of(fd)
        if number < 0:
            return
        operations = self._by_fd.pop(number, None)  # what comes now is for another file of that number
        if self._closed:
            return
        for task in [task for task, waiting in self._queue.items() if number in waiting.fds]:
            self._leave_queue(task)
            trio.lowlevel.reschedule(task, outcome.Error(closed_error()))
        if not operations:
            return
        for operation in tuple(operations):
            operation.fd_closing(number)
        if operations and self._owner is not None:  # those that are left are with the kernel
            self._flush()

    def force_wakeup(self) -> None:
        """Ends the current or the next wait early. Callable from any thread; after `close` it does nothing."""
        self._wakeup.wake_up()

    def statistics(self) -> UringStatistics:
        """A snapshot; see `UringStatistics`."""
        in_flight = [op for op in self._operations() if op.state is not State.IDLE]
        waiting = [op for op in in_flight if op.kind.readiness and op.state in (State.STAGED, State.IN_FLIGHT)]
        ring = self.ring.counters()
        return UringStatistics(
            tasks_waiting_read=sum(op.kind is POLL_IN for op in waiting),
            tasks_waiting_write=sum(op.kind is POLL_OUT for op in waiting),
            enters=ring["enters"],
            submits=ring["submits"],
            sqes=ring["sqes"],
            cqes=ring["cqes"],
            cancels_asked=self._cancels_asked,
            cancels_won=self.cancels_won,
            cancels_lost=self.cancels_lost,
            overflows=ring["overflows"],
            stalls=ring["stalls"],
            in_flight=sum(op.weight for op in in_flight if op.kind.counted),
            peak=self._counted_slots,  # a slot is made only when none is idle
            waiting_for_slot=len(self._queue),
            operations=tuple(_seen_from_outside(op) for op in in_flight),
        )

    def unfinished(self) -> list[tuple[InFlight, int]]:
        """What would be left behind if the run ended now, and the size of the buffer each holds, as far as it has one.

        Readiness polls hold nothing and are let go of at once. A multishot operation is open until its context is left.
        """
        return [
            (_seen_from_outside(op), _size_of_buffer(op.pin))
            for op in self._operations()
            if isinstance(op, Shots) or (op.state is not State.IDLE and not op.kind.readiness)
        ]

    def fds(self) -> set[int]:
        """Those that it needs itself, as long as it is open."""
        return {self.ring.fd, self._wakeup.fd, -1 if self._notify_fd is None else self._notify_fd}

    def close(self) -> None:
        """Cancels what is in flight, drains the ring to the last CQE, then closes it.

        If draining fails, the memory of the operations that are left stays allocated for ever, with a warning:
        the kernel may still write to it.
        """
        if self._closed:
            return
        for notice in tuple(at_close):
            notice(self)
        self._closed = True
        _open_managers.discard(self)
        self._queue.clear()
        self.mail.forsake()
        self.perform = self.receive = _refuse  # type: ignore[method-assign]  # for late calls
        if _this_thread.manager is self:
            del _this_thread.manager
        try:
            if not self.ring.forked:
                self._drain()
        finally:
            self.ring.close()
            self._wakeup.close()
            if self._notify_fd is not None:
                os.close(self._notify_fd)
            for operation in self._operations():
                operation.trap = None  # breaks the cycle operation -> trap -> abort -> operation
            self._slots.clear()

    # What operations call

    def own_ring(self) -> bool:
        """Makes this thread, if it is the run's, the ring's owner. False if it is another one.

        A guest's main task runs before the first tick does it.
        """
        if self._owner is None:
            self.ring.enable()
            self._owner = get_ident()
        return get_ident() == self._owner

    def ask_cancel(self, token: int, notice: int, *, again: bool = False) -> None:
        """Stages an ASYNC_CANCEL; the operation's own CQE will tell what came of it. One asked again is one cancel."""
        self._cancels_asked += not again
        self.ring.stage(_CANCEL_HEAD, -1, 0, token, 0, 0, notice)
        if self._worker_waits:
            self._flush()

    def hand_over(self, operation: Operation) -> None:
        """Gives an idle operation to the task that waits longest; it goes on when it has as many as it needs."""
        task, waiting = next(iter(self._queue.items()))
        waiting.got.append(operation)
        if len(waiting.got) == waiting.needed:
            del self._queue[task]
            trio.lowlevel.reschedule(task)

    def end_job(self, job: Job) -> None:
        """The job is over: its slots are free."""
        self.ring.set_job(job.index, ffi.NULL)
        self._slots[job.index] = job.borrowed[0]
        self.give_back(job.borrowed)
        job.finish(self)

    def released(self, operation: Operation) -> None:
        """The kernel no longer uses the memory of an operation that wants to know."""
        if not self._closed:
            assert operation.kind.released is not None
            operation.kind.released(operation.keep)

    def buffer_unread(self, flags: int) -> None:
        """Nobody takes what the kernel has put into the provided buffer that the CQE's flags name."""
        if self._stream_buffers is not None:
            self._stream_buffers.copy(flags, 0)

    # What `lowlevel` calls

    def expect_cancel_by_fd(self, fd: int) -> None:
        """An ASYNC_CANCEL by fd is about to be staged."""
        for operation in self._by_fd.get(fd, ()):
            operation.expect_cancel_by_fd(fd)

    @enable_ki_protection
    @types.coroutine
    def perform(
        self,
        kind: Kind[T],
        fd: int = -1,
        off: int = 0,
        pin: Any = None,
        length: int = 0,
        op_flags: int = 0,
        keep: Any = None,
        filename: object = None,
        addr: int = 0,
        via: int | None = None,
        extra: tuple[int, int, int, int] | None = None,
    ) -> Generator[Any, Any, T]:
        """Runs one operation to its end and returns its result. A checkpoint in any case.

        Args:
            kind: the row of the operation table.
            fd, off, length, op_flags, addr, extra: the SQE's fields. ``length`` -1 is "all of ``pin``".
            pin: a cffi buffer or struct, or bytes, whose address goes into ``addr``; the operation owns it until its
                last CQE.
            keep: whatever else the kernel reads or writes; owned likewise.
            filename: for the OSError.
            via: the fd for the SQE, if it is not ``fd`` itself.

        Raises:
            trio.BusyResourceError: another task uses this direction of the fd.
            trio.ClosedResourceError: the fd was closed meanwhile.
            UnsupportedOperation: the kernel lacks the operation.
            OSError: the operation failed.
        """
        try:
            without_ring = self._missing and self.lacks(kind)
        except OSError:
            pin = keep = None  # a traceback keeps this frame
            raise
        if without_ring:
            yield from trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105
            return self.fall_back(kind, fd, off, pin, length, op_flags, keep, via)
        if kind.prelude is not None:
            yield from trio.lowlevel.checkpoint_if_cancelled().__await__()  # noqa: ASYNC105
            kind.prelude(self, fd)
        siblings = self._by_fd.get(fd)
        if siblings is None:
            siblings = self._by_fd[fd] = set()
        try:
            while True:
                task = current_task()
                pool = self._idle if kind.counted else self._idle_uncounted
                operation: Operation = pool.pop() if pool else (yield from self._another_slot(kind, task, fd))
                if siblings and kind.direction is not None and fd >= 0:
                    try:
                        self.check_not_busy(kind.direction, fd)
                    except trio.BusyResourceError:
                        operation.not_staged()
                        raise
                if length < 0:
                    length = min(len(pin), MAX_RW_COUNT)
                since = self._now or self._look_at_the_clock()
                sqe_fd = fd if via is None else via
                ring = self.ring
                try:
                    waiting = None
                    if extra is None:
                        waiting = operation.start(
                            ring, kind, task, siblings, since, fd, sqe_fd, off, addr, length, op_flags, pin, keep
                        )
                    if waiting is None:
                        waiting = operation.wait(None)
                        fields = sqe_fd, off, addr, length, op_flags
                        operation.start_in_python(ring, kind, task, siblings, since, fd, fields, pin, keep, extra)
                except BaseException:
                    operation.not_staged()
                    raise
                if not kind.ordinary:
                    try:
                        if kind.second_fd is not None:
                            self._register_second_fd(operation, kind.second_fd_of(off, length, extra))
                        if kind.staged is not None:
                            kind.staged(keep)
                    except BaseException:
                        operation.abandon()
                        raise
                pin = keep = None  # from here on the operation owns them
                res = yield from waiting
                if res >= 0:
                    if kind.decode is None:
                        operation.pick_up()
                        return res  # type: ignore[return-value]
                    return operation.take_result(res)  # type: ignore[no-any-return]
                if res in kind.success:
                    if fd >= 0 and self._by_fd.get(fd) is not siblings:  # what it means may be asked of the fd
                        operation.pick_up()
                        raise closed_error()
                    return operation.take_result(res)  # type: ignore[no-any-return]
                wait_for, pin, keep = operation.judge(res, filename)
                self.check_still_open(fd, siblings)
                if wait_for:
                    yield from self._until_ready(kind, fd, wait_for)
                    self.check_still_open(fd, siblings)
        except BaseException:
            pin = keep = res = None  # a traceback keeps this frame
            raise

    def is_lone(self) -> bool:
        """Is this the first who asks in a tick that brought at most one completion? Then there is, as far as anybody
        knows, one thing to do, and a plain system call costs less than a submission.
        """
        lone, self._lone = self._lone, False
        return lone

    @enable_ki_protection
    def receive(self, kind: Kind[Any], fd: int, size: int) -> Received | None:
        """`perform` for a receive from a stream that takes one of the ring's own buffers when there is data. So one
        that waits holds no memory. With what it does not need left out: this is the hottest path of a server.

        Args:
            kind: a row of the operation table, with ``SQE_BUFFER_SELECT`` and the direction ``"read"``.
            fd: the socket.
            size: how many bytes at most.

        Returns:
            what to await, at once: it is under way. The result is what was received, ``b""`` at the end of the stream.
            None, of this call or as the result, if it has to be done another way: another task is receiving, all
            buffers are in use, or the kernel has no such thing.
        """
        if self._missing and not self._missing.isdisjoint(kind.needs):
            return None
        buffers = self._stream_buffers
        if buffers is None:
            try:
                buffers = self._stream_buffers = self.registered.open_stream_buffers()
            except OSError:  # no memory, say; perhaps next time
                return None
        siblings = self._by_fd.get(fd)
        if siblings is None:
            siblings = self._by_fd[fd] = set()
        for other in siblings:
            if other.occupies("read", fd):
                return None
        task, since = current_task(), self._now or self._look_at_the_clock()
        pool = self._idle_uncounted
        operation = pool.pop() if pool else self._new_slot(pool, ())
        try:
            waiting = operation.receive(self.ring, kind, task, siblings, since, fd, size, buffers)
            if waiting is None:
                waiting = operation.wait(buffers)
                operation.start_in_python(self.ring, kind, task, siblings, since, fd, (fd, 0, 0, size, 0))
        except BaseException:
            operation.not_staged()
            raise
        return waiting

    @property
    def closed(self) -> bool:
        """Is the run over?"""
        return self._closed

    def check_working(self) -> None:
        """Raises `RingError` if the ring has failed: nothing would ever come of what is asked of it."""
        if self.failure is not None:
            raise ring_failed(self.failure)

    @property
    def lacks_any(self) -> bool:
        """Does the kernel lack anything this library knows?"""
        return bool(self._missing)

    def require(self, kind: Kind[Any]) -> UringIOManager:
        """This manager, if the operation can be done with the ring.

        Raises:
            UnavailableError: the run has no ring.
            UnsupportedOperation: the kernel lacks the operation.
            RingError: the ring has failed.
        """
        self.check_working()
        if self.lacks(kind):
            raise unsupported(kind.name, kind.opcode.name, kind.since)
        return self

    def lacks(self, kind: Kind[Any]) -> bool:
        """Is the operation to be done without the ring?

        Raises:
            UnsupportedOperation: it cannot be done at all.
        """
        if self._missing.isdisjoint(kind.needs):
            return False
        if kind.fallback is None:
            raise unsupported(kind.name, kind.opcode.name, kind.since)
        return True

    def fall_back(
        self, kind: Kind[T], fd: int, off: int, pin: Any, length: int, op_flags: int, keep: Any, via: int | None
    ) -> T:
        """The operation without the ring."""
        assert kind.fallback is not None
        res = kind.fallback(fd=fd, off=off, pin=pin, length=length, op_flags=op_flags, via=via, keep=keep)
        return res if kind.decode is None else kind.decode(res, keep)  # type: ignore[return-value]

    def _register_second_fd(self, operation: Operation, fd: int) -> None:
        """An operation on two fds ends when either is closed."""
        if fd >= 0 and fd != operation.fd:
            others = self._by_fd.setdefault(fd, set())
            others.add(operation)
            operation.siblings = cast("set[Operation]", _Both(operation.siblings, others))

    def _until_ready(self, kind: Kind[Any], fd: int, events: int) -> Generator[Any, Any, None]:
        """Waits until another try of an operation is worth while. As many tasks may wait as may operate."""
        if events == select.POLLOUT:
            yield from self._until_writable(POLL_OUT if kind.direction else _ANY_POLL, fd)
        else:
            yield from self.perform(POLL_IN if kind.direction else _ANY_POLL, fd, op_flags=events)

    def check_still_open(self, fd: int, siblings: set[Operation]) -> None:
        """The number may name another file by now. `notify_closing` has taken the set away then."""
        if self._by_fd.get(fd) is not siblings:
            raise closed_error()

    @enable_ki_protection
    @types.coroutine
    def _until_writable(self, kind: Kind[int], fd: int) -> Generator[Any, Any, None]:
        """Waits for POLLOUT alone. io_uring always reports POLLRDHUP as well, at once and for ever after the peer's
        half-close, although there may be no room. epoll can be told not to. So in that case, a rare one, the ring
        waits for an epoll that waits for the fd.
        """
        siblings = self._by_fd.setdefault(fd, set())
        revents = yield from self.perform(kind, fd, op_flags=select.POLLOUT)
        if revents != select.POLLRDHUP:
            return
        self.check_still_open(fd, siblings)
        with contextlib.closing(select.epoll()) as epoll:
            epoll.register(fd, select.EPOLLOUT)
            yield from self.perform(kind, fd, op_flags=select.POLLIN, via=epoll.fileno())

    def _look_at_the_clock(self) -> float:
        self._now = monotonic()
        return self._now

    def _another_slot(self, kind: Kind[Any], task: Task, fd: int) -> Generator[Any, Any, Operation]:
        """A new slot, or the next one to become free if there may be no more."""
        if not kind.counted:
            return self._new_slot(self._idle_uncounted, ())
        (operation,) = yield from self.borrow(1, task, (fd,))
        return operation

    @enable_ki_protection
    @types.coroutine
    def borrow(self, n: int, task: Task, fds: Collection[int]) -> Generator[Any, Any, list[Operation]]:
        """Idle operations, for a task that will use these fds; waits until there are enough.

        Raises:
            trio.ClosedResourceError: one of the fds was closed meanwhile.
            RingError: the ring has failed.
        """
        self.check_working()
        idle = self._idle
        while len(idle) < n and self._counted_slots < self._config.max_in_flight:
            self._counted_slots += 1
            idle.append(self._new_slot(idle, self._queue))
        if len(idle) >= n:
            got = idle[-n:]
            del idle[-n:]
            return got

        def abort(_: RaiseCancelT) -> Abort:
            self._leave_queue(task)
            return trio.lowlevel.Abort.SUCCEEDED

        siblings = [(fd, self._by_fd.setdefault(fd, set())) for fd in fds]
        waiting = self._queue[task] = _Waiting(fds, n, idle[:])
        idle.clear()
        yield from trio.lowlevel.wait_task_rescheduled(abort).__await__()  # noqa: ASYNC105
        try:
            for fd, operations in siblings:
                self.check_still_open(fd, operations)
        except trio.ClosedResourceError:
            self.give_back(waiting.got)
            raise
        return waiting.got

    def _leave_queue(self, task: Task) -> None:
        """The task no longer waits for slots."""
        waiting = self._queue.pop(task, None)  # it is gone if the run is being torn down
        if waiting is not None:
            self.give_back(waiting.got)

    def give_back(self, operations: Sequence[Operation]) -> None:
        """They are idle again."""
        if self._queue:
            for operation in operations:
                operation.not_staged()
        else:
            self._idle.extend(operations)

    def _new_slot(self, home: list[Operation], waiters: Collection[Task]) -> Operation:
        index = len(self._slots)
        if index > INDEX_MASK:
            raise RingError(f"more than {INDEX_MASK} operations are in flight")
        operation = Operation(index, self, home, waiters)
        self._slots.append(operation)
        return operation

    def check_not_busy(self, direction: str, fd: int) -> None:
        """Raises `trio.BusyResourceError` if a task uses this direction of the fd."""
        for other in self._by_fd.get(fd, ()):
            if other.occupies(direction, fd):
                raise trio.BusyResourceError(f"another task is already using this fd to {direction}")

    def is_busy(self, direction: str, fd: int) -> bool:
        """Does a task use this direction of the fd?"""
        siblings = self._by_fd.get(fd)
        return any(other.occupies(direction, fd) for other in siblings) if siblings else False

    def siblings_of(self, fd: int) -> set[Operation]:
        """The operations on an fd."""
        return self._by_fd.setdefault(fd, set())

    @property
    def max_in_flight(self) -> int:
        """How many operations may be in flight at once."""
        return self._config.max_in_flight

    # Jobs

    @enable_ki_protection
    @types.coroutine
    def run_job(self, job: Job, entries: Any) -> Generator[Any, Any, None]:
        """Runs a job to its end, or to that of its task.

        Args:
            job: it has what it needs; nothing is staged.
            entries: its SQEs, in cffi memory.

        Raises:
            trio.Cancelled: in a cancelled scope; nothing was submitted.
        """
        job.task = task = current_task()
        job.since = self._now or self._look_at_the_clock()
        self._slots[job.index] = job
        try:
            self.ring.set_job(job.index, job.struct)
            job.number = self.ring.stage_job(entries, job.size, job.begin())
        except BaseException:
            job.not_staged()
            raise
        for siblings in job.siblings:
            siblings.add(job)
        try:
            res = yield job.trap
        except BaseException:
            if job.task is task:
                job.abandon()
            raise
        if type(res) is not int:
            try:
                res.unwrap()
            finally:
                del res  # a traceback keeps this frame

    # Multishot operations

    @enable_ki_protection
    async def open_shots(self, kind: Kind[Any], fd: int, receiver: Receiver) -> Shots:
        """A multishot operation, not yet armed.

        Raises:
            trio.BusyResourceError: another task uses this direction of the fd.
            trio.ClosedResourceError: the fd was closed meanwhile.
        """
        task = current_task()
        (borrowed,) = await self.borrow(1, task, (fd,))
        if kind.direction is not None and fd >= 0:
            try:
                self.check_not_busy(kind.direction, fd)
            except trio.BusyResourceError:
                self.give_back((borrowed,))
                raise
        shots = Shots(self, borrowed, kind, fd, receiver)
        shots.task = task
        shots.since = self._now or self._look_at_the_clock()
        shots.siblings = self.siblings_of(fd)
        shots.siblings.add(shots)
        self._slots[shots.index] = shots
        return shots

    def close_shots(self, shots: Shots) -> None:
        """It has ended, for good."""
        shots.siblings.discard(shots)
        shots.borrowed.token = shots.token
        self._slots[shots.index] = shots.borrowed
        self.give_back((shots.borrowed,))

    # A ring that has failed

    def fail(self, cause: BaseException) -> None:
        """The ring cannot be relied on any more: whoever waits for it hears of it, and whoever comes later. Where it is
        the run's own I/O manager, those who wait until an fd is ready still do; see `_poll`.
        """
        if self.failure is not None:
            return
        self.failure = cause
        self._worker_waits = False
        while self._queue:
            waiting, _ = self._queue.popitem()
            trio.lowlevel.reschedule(waiting, outcome.Error(ring_failed(cause)))
        self.registered.fail(ring_failed(cause))
        self.mail.fail(ring_failed(cause))
        for operation in self._operations():
            task = operation.task
            if isinstance(operation, Shots):
                operation.receiver.fail(ring_failed(cause))
            elif task is None or operation.state not in _WITH_TASK or (self.native and operation.kind.readiness):
                continue
            else:
                self.wake(task, outcome.Error(ring_failed(cause)))
            with contextlib.suppress(RingError, OSError):  # what it has in the ring's tables goes with the ring
                operation.abandon()
        self.perform = self._perform_without_ring  # type: ignore[assignment, method-assign]
        self.receive = self._refuse_to_receive  # type: ignore[assignment, method-assign]

    def _fail_unless_forked(self, cause: OSError | RingError) -> None:
        """In a forked child nobody has asked for the run to go on."""
        if self.ring.forked:
            raise cause
        self.fail(cause)

    def _flush(self) -> None:
        if self.failure is None:
            try:
                self.ring.flush()
            except (OSError, RingError) as exc:
                self._fail_unless_forked(exc)

    def _perform_without_ring(self, kind: Kind[T], *args: Any, **kwargs: Any) -> Generator[Any, Any, T]:
        """`perform`, when the ring has failed."""
        if not (self.native and kind.readiness):
            self.check_working()
        return UringIOManager.perform(self, kind, *args, **kwargs)

    def _refuse_to_receive(self, *_: object) -> NoReturn:
        assert self.failure is not None
        raise ring_failed(self.failure)

    def _poll(self, timeout: float) -> list[int]:
        """`get_events`, when the ring has failed: what it would bring for those who wait until an fd is ready. So the
        run can end as any other does: threads come back, and what is not on the ring goes on.
        """
        waiting = [op for op in self._operations() if op.state in _WITH_OR_WITHOUT_TASK and op.kind.readiness]
        events = [number for op in waiting if op.task is None for number in (op.token, -errno.ECANCELED, 0)]
        wanted: dict[int, int] = {self._wakeup.fd: select.POLLIN}
        for op in waiting:
            if op.task is not None:
                wanted[op.fd] = wanted.get(op.fd, 0) | _EVENTS_OF.get(op.kind, select.POLLIN | select.POLLOUT)
        poll = select.poll()
        for fd, mask in wanted.items():
            poll.register(fd, mask)
        ready = dict(poll.poll(0 if events else math.ceil(timeout * 1000)))
        if ready.pop(self._wakeup.fd, 0):
            _drain_eventfd(self._wakeup.fd)
            events += [0, 0, 0]
        for op in waiting:
            revents = ready.get(op.fd, 0) & (_EVENTS_OF.get(op.kind, ~0) | _ALWAYS_REPORTED)
            if op.task is not None and revents:
                if self.ring.is_staged(op.number):
                    self.ring.neutralise(op.number)
                events += [op.token, revents, 0]
        return events

    # Guest mode

    def _wait_in_worker(self, timeout: float) -> list[int]:
        """`get_events` in a thread that may not enter the ring: waits, and has `process_events` reap."""
        if self.failure is not None:
            return self._poll(timeout)
        if self._notify_fd is None:
            self._notify_wanted = True  # only the owner may register one
            return [0, 0, 0]
        self._worker_waits = True
        try:
            _drain_eventfd(self._notify_fd)
            if self.ring.staged or self.ring.pending():
                return [0, 0, 0]
            poll = select.poll()
            poll.register(self._notify_fd, select.POLLIN)
            poll.register(self._wakeup.fd, select.POLLIN)
            return [0, 0, 0] if poll.poll(math.ceil(timeout * 1000)) else []
        finally:
            self._worker_waits = False

    # Tear-down

    def _operations(self) -> list[Operation]:
        return self._slots[_FIRST_INDEX:]

    def _in_kernel(self) -> list[Operation]:
        return [op for op in self._operations() if op.state is not State.IDLE]

    def _drain(self) -> None:
        try:
            for operation in self._operations():
                operation.abandon()
            self.process_events([*self._unprocessed, *self.ring.rescued])
            deadline = monotonic() + DRAIN_SECONDS
            if get_ident() == self._owner:
                while self._in_kernel() and (left := deadline - monotonic()) > 0:
                    self.process_events(self.ring.tick(min(left, 1.0)))
        except (OSError, RingError):  # of which the run has heard, or it is told what is left over
            pass
        finally:
            left_over = self._in_kernel()
            if left_over:
                _kept_for_ever.extend(left_over)
                warnings.warn(
                    f"the run ended with {len(left_over)} operations the kernel did not give back; "
                    f"their memory stays allocated: {left_over[:5]}",
                    ResourceWarning,
                    stacklevel=2,
                )


class _NoManager:
    """Stands where the manager would be in a thread whose run has no ring, or none yet."""

    carries_sockets: ClassVar[bool] = False
    native: ClassVar[bool] = False
    mount: Callable[[str], UringIOManager]
    """Ties a ring to the current run, for a purpose; see `_mount`, which puts it here."""

    def expect_cancel_by_fd(self, fd: int) -> None:
        """Nothing is in flight."""

    def notify_closing(self, fd: int | HasFileno) -> None:
        """As `UringIOManager.notify_closing`."""
        trio.lowlevel.notify_closing(fd)

    def require(self, kind: Kind[Any]) -> UringIOManager:
        """As `UringIOManager.require`."""
        return self.mount(kind.name).require(kind)

    def perform(self, kind: Kind[T], *args: Any, **kwargs: Any) -> Generator[Any, Any, T]:
        """As `UringIOManager.perform`."""
        return self.mount(kind.name).perform(kind, *args, **kwargs)


no_manager: Final = _NoManager()


class _ThisThread(threading.local):
    manager = cast("UringIOManager", no_manager)


_this_thread: Final = _ThisThread()


def on_ring() -> bool:
    """Is the caller a task of a run that has a ring?"""
    found: object = _this_thread.manager
    return found is not no_manager and trio.lowlevel.in_trio_task()


@enable_ki_protection
def notify_closing(fd: int | HasFileno) -> None:
    """Tells whoever waits for an fd that it will be closed: `trio.lowlevel.notify_closing`, for the ring as well.

    When it returns, nothing that is under way names the fd. Tasks that wait for it get `trio.ClosedResourceError`. In a
    run that was started with a ring trio's function is the same; in one where the ring came later, that function
    reaches only what waits in trio itself. `close`, and what else this package closes, calls this one.

    Args:
        fd: a file descriptor, or an object that has one.

    Raises:
        RuntimeError: not inside a trio run.
    """
    _this_thread.manager.notify_closing(fd)


def close_left_over() -> None:
    """Closes this thread's manager, if there is one: trio begins no second run in a thread, so its own never began."""
    if isinstance(_this_thread.manager, UringIOManager):
        _this_thread.manager.close()
