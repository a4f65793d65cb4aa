"""The life of one operation: every state, every transition, the abort function, what a CQE means for a task.

Nothing else in this package decides that. (The ordinary, a result that nobody has asked to cancel, ``native/slot.c``
handles as this file would, and leaves it the rest.) The rules, and why they are so:

* **The operation's own last CQE decides, never the cancel's.** A cancel may be acknowledged although the
  operation had sent half its data, or come too late although it looks in time. So the abort function asks the
  kernel (ASYNC_CANCEL by token), answers ``Abort.FAILED``, and the task stays parked until that CQE.
  A result >= 0 is delivered even if a cancel was asked for: data that moved is never lost. trio raises
  `trio.Cancelled` at the next checkpoint.
* **What the kernel has not seen is simply taken back.** An operation that is only staged is neutralised and its
  task released at once. This is also how a call inside a cancelled scope submits nothing: trio calls the abort
  function as soon as the task parks, and the entry is still ours.
* **A readiness poll carries no result and pins nothing**: its waiter is released at once, the kernel's cancel follows.
* **Memory belongs to the operation until its last CQE**, not to the task: the task may be gone by then.
  A zero-copy send has two: the result wakes the task, the notification (F_NOTIF) frees the buffer.
* **A result nobody can take any more is disposed of** (an fd is closed).
* **Tokens carry a generation**, so that a CQE for a former life of the slot is detected, not delivered.

Whether an operation is STAGED or IN_FLIGHT is derived from the ring's count of submitted entries: one fact, one place.
"""

from __future__ import annotations

import enum
import errno
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import outcome
import trio

from ._abi import CQE_F_BUFFER, CQE_F_MORE, CQE_F_NOTIF, Opcode
from ._errors import ERESTARTS, INTERRUPTED, RingError, os_error
from ._ring import ffi
from ._slots import Slot, introduce
from ._trio_internals import make_trap

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from trio.lowlevel import RaiseCancelT, Task

    from ._ring import Form, SubmissionQueue

INDEX_BITS: Final = 20
INDEX_MASK: Final = (1 << INDEX_BITS) - 1
_GENERATION: Final = 1 << INDEX_BITS


class State(enum.IntEnum):
    """Where an operation is in its life."""

    IDLE = 0  #: in the pool; no task, no memory
    STAGED = 1  #: its SQE is ours; a task is parked
    IN_FLIGHT = 2  #: the kernel has it; a task is parked
    CANCELLING = 3  #: the kernel has it and was asked to cancel; a task is parked
    NOTIFYING = 4  #: the result is with the task; the kernel still reads the buffer
    DETACHED = 5  #: the kernel has it; no task waits for it
    SETTLED = 6  #: the kernel is done; the task has not picked the result up yet


class Event(enum.IntEnum):
    """What can happen to an operation."""

    STAGE = 0  #: its SQE is filled
    SUBMIT = 1  #: the ring hands its SQE to the kernel
    ABORT = 2  #: trio wants the task back
    CLOSE = 3  #: the fd is about to be closed
    RELEASE = 4  #: as ABORT or CLOSE, for a readiness poll that is in flight
    ABANDON = 5  #: the task is gone for good
    RESULT_CQE = 6  #: a CQE with F_MORE: the result, but not the last CQE
    LAST_CQE = 7  #: the last CQE
    PICK_UP = 8  #: the task runs again and takes the result
    SHOT = 9  #: a CQE with F_MORE of a multishot operation: one result of many


TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.IDLE: {
        Event.STAGE: State.STAGED,
    },
    State.STAGED: {
        Event.SUBMIT: State.IN_FLIGHT,
        Event.ABORT: State.IDLE,
        Event.CLOSE: State.IDLE,
        Event.ABANDON: State.IDLE,
    },
    State.IN_FLIGHT: {
        Event.ABORT: State.CANCELLING,
        Event.CLOSE: State.CANCELLING,
        Event.RELEASE: State.DETACHED,
        Event.ABANDON: State.DETACHED,
        Event.RESULT_CQE: State.NOTIFYING,
        Event.LAST_CQE: State.SETTLED,
        Event.SHOT: State.IN_FLIGHT,
    },
    State.CANCELLING: {
        Event.ABORT: State.CANCELLING,
        Event.CLOSE: State.CANCELLING,
        Event.ABANDON: State.DETACHED,
        Event.RESULT_CQE: State.NOTIFYING,
        Event.LAST_CQE: State.SETTLED,
        Event.SHOT: State.CANCELLING,
    },
    State.NOTIFYING: {
        Event.CLOSE: State.NOTIFYING,
        Event.PICK_UP: State.DETACHED,
        Event.ABANDON: State.DETACHED,
        Event.LAST_CQE: State.SETTLED,
    },
    State.DETACHED: {
        Event.CLOSE: State.DETACHED,
        Event.RESULT_CQE: State.DETACHED,
        Event.LAST_CQE: State.IDLE,
        Event.SHOT: State.DETACHED,
    },
    State.SETTLED: {
        Event.CLOSE: State.SETTLED,
        Event.PICK_UP: State.IDLE,
        Event.ABANDON: State.IDLE,
    },
}

# A hot transition as an array; None where the table has no such transition. The hottest are in native/slot.c.
_AFTER_LAST_CQE: Final = tuple(TRANSITIONS[state].get(Event.LAST_CQE) for state in State)

_CANCELLED: Final = (State.CANCELLING, State.DETACHED)
_HAS_RESULT: Final = (State.SETTLED, State.NOTIFYING)
_IDLE: Final = State.IDLE
_IN_FLIGHT: Final = State.IN_FLIGHT


T = TypeVar("T")


class Fallback(Protocol):
    """Does an operation at once, without the ring and without blocking."""

    def __call__(self, *, fd: int, off: int, pin: Any, length: int, op_flags: int, via: int | None, keep: Any) -> int:
        """Takes the fields of the SQE; returns what the CQE's ``res`` would be. Raises OSError."""


def nothing(res: int, keep: Any) -> None:
    """The caller's result of an operation whose success says it all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind(Generic[T]):
    """One row of the operation table: everything the library knows about an operation.

    Attributes:
        name: the function in `trio_uring.lowlevel`.
        opcode: the kernel's number.
        since: the kernel that brought it, as ``"major.minor"``.
        result: what a CQE's ``res`` >= 0 means.
        summary: one line for the reference.
        man: the manual page its meaning is taken from.
        runs: where the kernel does it. ``"inline"``: while it is submitted. ``"waits"``: inline if it can, else when
            the fd is ready, without a thread. ``"may block"``: inline if it can, else in a worker thread of the
            kernel. ``"worker"``: always in one.
        decode: makes the caller's result of ``res`` and what the operation kept; None: the result is ``res``.
        direction: the side of a socket it occupies: one task at a time. None: any number of tasks.
        wait_for: poll events after which -EAGAIN is worth another try; 0: -EAGAIN goes to the caller.
        success: negative results that mean success here.
        dispose: what becomes of a result nobody can take; called with ``res`` and what the operation kept.
        staged, released: called with what the operation keeps when the kernel is to use its memory, and when it no
            longer does: once each for every try, and tries may overlap.
        prelude: called with the manager and the fd when the task is sure to submit, just before.
        names: what its fd is to it: a file; a directory that a path is relative to; or the number itself.
        second_fd: the field of the SQE that holds another fd, if one does.
        proxy: an opcode that came with the same kernel, for what the probe does not tell.
        fallback: does it without the ring where the kernel lacks it.
        cloexec: the field with the close-on-exec flag, for an operation that can make a direct descriptor,
            which must not have that flag.
        form: how its positional arguments fill its SQE, if C can do that. Its result is then ``res``, or nothing.
        readiness: True for polls: no result, nothing pinned.
        counted: does it count against ``max_in_flight``? What every socket of a program may wait with does not.
        flags: the SQE's ``IOSQE_*`` flags.
        ioprio: the SQE's ioprio field, which several opcodes use for flags of their own.
        head: the SQE's first four bytes, made of these.
        ordinary: True if there is nothing to be done when it is staged, nor when the kernel is done with its memory.
        keeps: True if what the operation keeps is needed after its last CQE.
        needs: the opcodes without which it does not work.
    """

    name: str
    opcode: Opcode
    since: str
    result: Literal["count", "fd", "nothing", "struct"]
    summary: str
    man: str
    runs: Literal["inline", "waits", "may block", "worker"] = "inline"
    decode: Callable[[int, Any], T] | None = None
    direction: Literal["read", "write"] | None = None
    wait_for: int = 0
    success: frozenset[int] = frozenset()
    dispose: Callable[[int, Any], object] | None = None
    staged: Callable[[Any], object] | None = None
    released: Callable[[Any], object] | None = None
    prelude: Callable[[Any, int], object] | None = None
    names: Literal["file", "directory", "number"] = "file"
    second_fd: Literal["length", "off", "file_index"] | None = None
    proxy: Opcode | None = None
    fallback: Fallback | None = None
    cloexec: Literal["off", "op_flags", "open_how"] | None = None
    form: Form | None = None
    readiness: bool = False
    counted: bool = True
    flags: int = 0
    ioprio: int = 0
    head: int = field(init=False)
    ordinary: bool = field(init=False)
    keeps: bool = field(init=False)
    needs: frozenset[Opcode] = field(init=False)

    def __post_init__(self) -> None:
        if self.result == "nothing" and self.decode is None:
            object.__setattr__(self, "decode", nothing)
        object.__setattr__(self, "head", self.opcode | self.flags << 8 | self.ioprio << 16)
        object.__setattr__(self, "ordinary", self.second_fd is None and self.staged is None and self.released is None)
        object.__setattr__(self, "keeps", self.decode is not None or self.dispose is not None)
        needs = {self.opcode} if self.proxy is None else {self.opcode, self.proxy}
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def cancellable(self) -> bool:
        """Can the kernel end it before it is done? What runs inline or in a worker it can only take back unbegun."""
        return self.runs in ("waits", "may block")

    def second_fd_of(self, off: int, length: int, extra: tuple[int, int, int, int] | None) -> int:
        """The other fd the SQE names, of its fields."""
        if self.second_fd == "file_index":
            assert extra is not None
            return extra[2]
        number = off if self.second_fd == "off" else length
        return number if number < 1 << 31 else number - (1 << 32)


class Owner(Protocol):
    """What an operation needs of the I/O manager that holds it."""

    cancels_won: int
    cancels_lost: int

    @property
    def ring(self) -> SubmissionQueue:
        """Where SQEs are staged."""

    @property
    def wake(self) -> Callable[[Task, object], None]:
        """Wakes a parked task with a value."""

    def ask_cancel(self, token: int, notice: int, *, again: bool = False) -> None:
        """Stages an ASYNC_CANCEL for the request with this token. ``notice`` is the user_data of its own CQE."""

    def hand_over(self, operation: Operation) -> None:
        """Gives an idle operation to the task that waits longest for one."""

    def released(self, operation: Operation) -> None:
        """The kernel no longer uses the memory of an operation that wants to know."""

    def buffer_unread(self, flags: int) -> None:
        """Nobody takes what the kernel has put into the provided buffer that the CQE's flags name."""

    def check_still_open(self, fd: int, siblings: set[Operation]) -> None:
        """Raises `trio.ClosedResourceError` if the fd that these operations are about has been closed."""


class Retry(NamedTuple):
    """What a task does about a result that is not its to see: submit the operation once more."""

    wait_for: int  #: poll events to wait for first; 0: none
    pin: Any
    keep: Any


def closed_error() -> trio.ClosedResourceError:
    """For a task whose fd was closed by another."""
    return trio.ClosedResourceError("another task closed this fd")


def raise_later(interruption: BaseException) -> None:
    """For a call that has done something and returns it, and is protected from Ctrl-C: the next checkpoint raises what
    has interrupted it. A cancelled scope does so by itself. Ctrl-C was told once, so it is told again.
    """
    if isinstance(interruption, KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def _raise_closed() -> NoReturn:
    raise closed_error()


def _raise_cancelled_by_fd() -> NoReturn:
    raise os_error(-errno.ECANCELED)


class Operation(Slot):
    """A slot for one operation at a time, reused for the next.

    It belongs to the coroutine that staged it from `begin` until the coroutine picks the result up. A task that is let
    go earlier is sent an `outcome.Error` instead of a number, and the operation is none of its business any more.
    """

    __slots__ = ()

    owner: Owner
    _state: State
    task: Task | None
    kind: Kind[Any]
    fd: int
    siblings: set[Operation]
    since: float
    interrupt: Callable[[], NoReturn] | None

    def __init__(
        self, index: int, owner: Owner, home: list[Operation], waiters: Collection[Task], trap: Any = None
    ) -> None:
        self.owner = owner
        self.home = home
        self.waiters = waiters
        self.token = index
        self.trap: Any = make_trap(self.abort) if trap is None else trap
        self.stand_in: Operation | None = None
        self._state = _IDLE
        self.fd = -1
        self.pin: Any = None
        self.keep: Any = None
        self.res = 0
        self.flags = 0

    @property
    def state(self) -> State:
        """The state in the sense of `TRANSITIONS`."""
        if (self._state is _IN_FLIGHT) and self.owner.ring.is_staged(self.number):
            return State.STAGED
        return self._state

    def _move(self, event: Event) -> State:
        """Makes a transition; the table decides whether there is one."""
        state = self.state
        try:
            self._state = TRANSITIONS[state][event]
        except KeyError:
            raise RingError(f"{event.name} cannot happen to an operation that is {state.name}: {self!r}") from None
        return self._state

    def begin(self) -> int:
        """IDLE -> STAGED. Returns the token for the SQE's user_data; the caller fills the SQE and sets ``number``."""
        self._state = _IN_FLIGHT  # or STAGED, as the ring has it
        self.token = token = self.token + _GENERATION
        return token

    def start_in_python(
        self,
        queue: SubmissionQueue,
        kind: Kind[Any],
        task: Task,
        siblings: set[Operation],
        since: float,
        fd: int,
        fields: tuple[int, int, int, int, int],
        pin: Any = None,
        keep: Any = None,
        extra: tuple[int, int, int, int] | None = None,
    ) -> None:
        """`start`, whatever the values: it raises the errors for them. ``fields`` begin with the fd of the SQE. What is
        to be awaited is made before, by `wait`: nothing may fail afterwards.
        """
        self.task = task
        self.kind = kind
        self.ordinary = kind.ordinary
        self.fd = fd
        self.siblings = siblings
        self.since = since
        self.pin = pin = ffi.from_buffer(pin) if isinstance(pin, bytes) else pin
        self.keep = keep
        siblings.add(self)
        try:
            self.number = queue.stage(kind.head, *fields, self.begin(), pin, extra)
        except BaseException:
            siblings.discard(self)
            pin = keep = None  # a traceback keeps this frame
            raise

    def not_staged(self) -> None:
        """Its SQE could not be filled: back to IDLE."""
        self._state = _IDLE
        self._let_go()

    @property
    def weight(self) -> int:
        """How many requests it is, for the statistics."""
        return 1

    def occupies(self, direction: str | None, fd: int) -> bool:
        """Is this direction of the fd in use?"""
        return self.kind.direction == direction and self.task is not None

    def complete(self, token: int, res: int, flags: int) -> None:
        """A CQE with this operation's token has arrived."""
        if token != self.token:
            raise RingError(f"CQE {token:#x} is for a former life of {self!r}")
        if flags & CQE_F_MORE:
            self._complete_partly(res)
            return
        before = self._state
        after = _AFTER_LAST_CQE[before]
        if after is None:
            raise RingError(f"unexpected CQE (res {res}) for {self!r}")
        self._state = after
        self.flags = flags
        self.siblings.discard(self)
        if before is not _IN_FLIGHT:
            self._complete_late(before, res, flags)
            return
        if res >= 0 or not self._is_to_be_retried(res):
            self._unpin()
        self.res = res
        self.owner.wake(self.task, res)  # type: ignore[arg-type]

    def _complete_partly(self, res: int) -> None:
        """A result, while the kernel goes on reading the buffer."""
        before = self._state
        after = self._move(Event.RESULT_CQE)
        if before is not State.IN_FLIGHT:
            self._count_cancel(res)
        if after is State.NOTIFYING:
            assert self.task is not None
            self.res = res
            self.owner.wake(self.task, res)

    def _complete_late(self, before: State, res: int, flags: int) -> None:
        """The last CQE of an operation that was cancelled, detached or only waited for its notification."""
        if before is State.NOTIFYING:  # res is a flag word; the task has been woken with the result
            if not self._is_to_be_retried(self.res):
                self._unpin()
        elif before is State.CANCELLING:
            self._count_cancel(res)
            if not self._is_to_be_retried(res):
                self._unpin()
            assert self.task is not None
            self.res = res
            self.owner.wake(self.task, res)
        else:
            if not flags & CQE_F_NOTIF:
                self._count_cancel(res)
                self._dispose(res)
            self._unpin()
            self._let_go()

    def _unpin(self) -> None:
        """The kernel is done with the memory. What the result is made of, or disposed of with, stays until then."""
        kind = self.kind
        if kind.released is not None:
            self._tell_released()
        self.pin = None
        if not kind.keeps:
            self.keep = None

    def _tell_released(self) -> None:
        if self.kind.released is not None:
            self.owner.released(self)

    def _is_to_be_retried(self, res: int) -> bool:
        """Interrupted or refused before it did anything, and nobody wanted that?"""
        if res == -errno.EAGAIN:
            return self.kind.wait_for != 0
        return (res == -errno.EINTR or res in ERESTARTS) and self.interrupt is None and res not in self.kind.success

    def _count_cancel(self, res: int) -> None:
        if res in INTERRUPTED:
            self.owner.cancels_won += 1
        else:
            self.owner.cancels_lost += 1

    def _dispose(self, res: int) -> None:
        if self.flags & CQE_F_BUFFER:
            self.owner.buffer_unread(self.flags)
        if res >= 0 and self.kind.dispose is not None:
            self.kind.dispose(res, self.keep)

    def abort(self, raise_cancel: RaiseCancelT) -> trio.lowlevel.Abort:
        """trio's abort function, for every parked operation."""
        if self.stand_in is not None:  # who has borrowed the slot, and the trap with it
            return self.stand_in.abort(raise_cancel)
        if self.task is None:  # a call after the end of the run, from the clean-up of an abandoned task
            return trio.lowlevel.Abort.FAILED
        if self._state in _HAS_RESULT:  # a call of a finaliser's, just before the task is woken
            return trio.lowlevel.Abort.FAILED
        if self.state is State.STAGED:
            self._move(Event.ABORT)
            self._take_back()
            return trio.lowlevel.Abort.SUCCEEDED
        if self.kind.readiness:
            self._detach(Event.RELEASE)
            return trio.lowlevel.Abort.SUCCEEDED
        self._cancel_in_kernel(Event.ABORT, raise_cancel)
        return trio.lowlevel.Abort.FAILED

    def fd_closing(self, fd: int) -> None:
        """The fd is about to be closed: nothing may name it any more, and whoever waits must hear of it."""
        task, state = self.task, self.state
        if state is State.STAGED:
            assert task is not None
            self._move(Event.CLOSE)
            self._take_back()
            self.owner.wake(task, outcome.Error(closed_error()))
        elif state is State.IN_FLIGHT and self.kind.readiness:
            assert task is not None
            self._detach(Event.RELEASE)
            self.owner.wake(task, outcome.Error(closed_error()))
        elif state is State.IN_FLIGHT:
            self._cancel_in_kernel(Event.CLOSE, _raise_closed)
        else:
            self._move(Event.CLOSE)

    def expect_cancel_by_fd(self, fd: int) -> None:
        """Somebody is about to cancel whatever is in flight on an fd: what comes of it is not to be tried again."""
        if self._state is _IN_FLIGHT and self.interrupt is None:
            self.interrupt = _raise_cancelled_by_fd

    def abandon(self) -> None:
        """The task is gone for good (its run was torn down): nobody will pick the result up."""
        state = self.state
        if state is State.STAGED:
            self._move(Event.ABANDON)
            self._take_back()
        elif state is State.SETTLED:
            self._move(Event.ABANDON)
            self._dispose(self.res)
            self._let_go()
        elif state is State.NOTIFYING:
            self._move(Event.ABANDON)
            self.task = None
        elif state in (State.IN_FLIGHT, State.CANCELLING):
            self._detach(Event.ABANDON)

    def _cancel_in_kernel(self, event: Event, interrupt: Callable[[], NoReturn]) -> None:
        asked_before = self._state is State.CANCELLING
        self._move(event)
        self.interrupt = interrupt
        if not asked_before:
            self._ask_kernel()

    def _detach(self, event: Event) -> None:
        asked_before = self._state is State.CANCELLING
        self._move(event)
        self.task = None
        self.interrupt = None
        if not asked_before:
            self._ask_kernel()

    def _ask_kernel(self) -> None:
        self._ask_once(again=False)

    def _ask_once(self, *, again: bool) -> None:
        life = self.token >> INDEX_BITS & INDEX_MASK
        notice = (self.token & INDEX_MASK) << 2 * INDEX_BITS | life << INDEX_BITS
        self.owner.ask_cancel(self.token, notice, again=again)

    def cancel_missed(self, life: int) -> None:
        """The kernel has not found what was to be cancelled. Either it has ended, and its CQE is on its way; or it was
        just between two tries, or two shots, and will be found.
        """
        if life == self.token >> INDEX_BITS & INDEX_MASK and self._state in _CANCELLED:
            self._ask_once(again=True)

    def _take_back(self) -> None:
        self.owner.ring.neutralise(self.number)
        self.siblings.discard(self)
        self._tell_released()
        self._let_go()

    def _let_go(self) -> None:
        self.pin = self.keep = None
        self.task = None
        self.interrupt = None
        if self.waiters:
            self.owner.hand_over(self)
        else:
            self.home.append(self)

    def take_result(self, res: int) -> Any:
        """Picks up a result that means success, and makes the caller's of it."""
        decode, keep = self.kind.decode, self.keep
        self.pick_up()
        return res if decode is None else decode(res, keep)

    def _pick_up_late(self) -> None:
        """`pick_up` while the kernel still reads the buffer."""
        self._move(Event.PICK_UP)
        self.task = None

    def judge(self, res: int, filename: object) -> Retry:
        """Picks up a negative result and says what it means for the task.

        Raises:
            trio.Cancelled: the operation was cancelled for the task's scope.
            trio.ClosedResourceError: it was cancelled because its fd was closed.
            OSError: anything else that is the caller's to know.
        """
        interrupt = self.interrupt
        retry = None
        if self._is_to_be_retried(res):
            retry = Retry(self.kind.wait_for if res == -errno.EAGAIN else 0, self.pin, self.keep)
            if self._state is State.SETTLED:  # otherwise the notification does it
                self._tell_released()
        self.pick_up()
        if retry is not None:
            return retry
        try:
            if interrupt is not None and res in INTERRUPTED:
                interrupt()
            raise os_error(res, filename)
        finally:
            del interrupt  # it refers to the task, whose frames refer to this one

    def _not_received(self, res: int) -> None:
        """`judge`, where the caller has another way to go on. It has, too, when all provided buffers are in use."""
        if res == -errno.ENOBUFS:
            self.pick_up()
        else:
            self.judge(res, None)
        self.owner.check_still_open(self.fd, self.siblings)

    def __repr__(self) -> str:
        kind: Kind[Any] | None = self.kind  # None before its first life
        name = "-" if kind is None else kind.name
        return f"<Operation {self.token:#x} {name} fd={self.fd} {self.state.name}>"


introduce(Operation, State.IDLE, State.IN_FLIGHT, State.SETTLED)
