"""The life of many operations that a task waits for as one.

Facts, and what follows from them:

* **Waking a task is what costs.** So the ring counts a job's CQEs off in C and Python hears of the last one. The job
  is one `Operation` to its task and to the I/O manager: the same states, the same rules, and its last CQE is that of
  the last of its requests.
* **It is many to the kernel**, and so to a cancel: each request that has had no CQE is asked for by its own token, and
  its own CQE decides. What has completed keeps its result.
* **What follows in a chain cannot be cancelled before it has begun**: the kernel does not find it. So while requests
  are unwanted, the ring reports each CQE, and the next of that chain is asked for then. It may still be too early: the
  kernel begins a step some time after the CQE of the one before. So a cancel that finds no such step is repeated.
* **A request that is staged when its fd is closed** stays where it is, for the sake of its chain, and names no file.
* **A linked request's fd is looked up when its turn comes**, long after the submission. A number could be another
  file's by then. So steps behind the first name no number (see `_batch`).
* **A job counts as many against the cap as it has requests**: it borrows their slots, and stands in the first one.
"""

from __future__ import annotations

import errno
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol

from ._abi import CQE_F_MORE, Opcode
from ._cancel import INDEX_BITS, INDEX_MASK, Event, Kind, Operation, Owner, State, closed_error, nothing
from ._errors import ERESTARTS, INTERRUPTED, ChainBrokenError, RingError, os_error
from ._ring import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

MAX_REQUESTS: Final = INDEX_MASK
_POSITION: Final = lib.TU_JOB_POSITION
_GENERATIONS: Final = 1 << 22
_generations: Final = count(1)
_DEFAULTS: Final = (None, -1, 0, None, 0, 0, None, None, 0, None, None)  # of the arguments of `perform`
PADDING: Final = tuple(_DEFAULTS[n:] for n in range(len(_DEFAULTS) + 1))
"""For each length of a request, what it leaves out."""
_KEEP: Final = 6
_FILENAME: Final = 7
_CANCELLED: Final = -errno.ECANCELED
_CLOSED: Final = INTERRUPTED | {-errno.EBADF, -errno.EINVAL}
_TRIES: Final = 1000  # of a cancel; the kernel begins some twenty steps at each enter
_NO_FD: Final = 1 << 31  # AT_FDCWD in a field without a sign is above it
_RESULTS: Final = ffi.typeof("int32_t[]")
_STRUCT: Final = ffi.typeof("struct tu_job *")
PENDING: Final = lib.TU_PENDING


class JobOwner(Owner, Protocol):
    """What a job needs of the I/O manager besides."""

    def end_job(self, job: Job) -> None:
        """The job is over: its slots are free."""


BATCH: Final[Kind[int]] = Kind(
    name="batch",
    opcode=Opcode.NOP,
    since="5.1",
    result="count",
    summary="many operations, waited for as one",
    man="io_uring_enter(2)",
)


def bare(exc: Exception) -> Exception:
    """An exception as a result. Its traceback would hold the frames, with what is pinned, and a cycle besides."""
    exc.__context__ = None
    return exc.with_traceback(None)


def _decode(request: tuple[Any, ...], res: int) -> Any:
    decode = request[0].decode
    try:
        return res if decode is None else decode(res, whole(request)[_KEEP])
    except Exception as exc:
        return bare(exc)


def values_of(requests: Iterable[tuple[Any, ...]], results: list[int]) -> list[Any]:
    """What the callers get for results that are all good."""
    return [
        None if (decode := request[0].decode) is nothing else res if decode is None else _decode(request, res)
        for request, res in zip(requests, results, strict=True)
    ]


def _opens(kind: Kind[Any]) -> bool:
    """Is its result a new fd, and nothing else? Data that has moved is not to be lost."""
    return kind.dispose is not None and kind.opcode is not Opcode.RECVMSG


def whole(request: tuple[Any, ...]) -> tuple[Any, ...]:
    """A request with all the arguments of `UringIOManager.perform`."""
    return request + PADDING[len(request)]


def fd_of(request: tuple[Any, ...]) -> int:
    """The fd a request names, or a negative number."""
    fd: int = request[1] if len(request) > 1 else -1
    return fd


def second_fd_of(request: tuple[Any, ...]) -> int:
    """The other fd a request names, or a negative number."""
    kind = request[0]
    if kind.second_fd is None:
        return -1
    _, _, off, _, length, _, _, _, _, _, extra = whole(request)
    fd: int = kind.second_fd_of(off, length, extra)
    return fd if fd < _NO_FD else -1


class Job(Operation):
    """Requests ``0 .. size - 1``, in one life.

    Args:
        owner: the I/O manager.
        borrowed: idle operations, one for each request; the job has their slots until it is done.
        requests: what each asks for, as the arguments of `UringIOManager.perform`; with that, the memory it uses.
        links: flag of each position whose request is linked to the next one.
        occupied: ``(fd, direction)`` for which there may be no other task.
        closed: positions whose fd is closed already.
        decode: makes the callers' results of the ``res`` of the CQEs where all are good; None: they are the same.
        finish: called with the owner when it is over, however it ends: the descriptors it had can go.

    Attributes:
        closed: positions whose fd was closed meanwhile.
        unwanted: positions that are to be cancelled as soon as the kernel can.
    """

    owner: JobOwner
    siblings: Any  # a list of such sets: one for each fd

    __slots__ = (
        "_array",
        "_cancelled_by_fd",
        "_named",
        "_tries",
        "borrowed",
        "closed",
        "decode",
        "finish",
        "links",
        "occupied",
        "requests",
        "size",
        "struct",
        "unwanted",
    )

    def __init__(
        self,
        owner: JobOwner,
        borrowed: Sequence[Operation],
        requests: Sequence[tuple[Any, ...]],
        links: Mapping[int, int],
        occupied: frozenset[tuple[int, str]],
        closed: set[int],
        decode: Callable[[list[int]], list[Any]] | None,
        finish: Callable[[Any], None],
    ) -> None:
        super().__init__(borrowed[0].token & INDEX_MASK, owner, [], (), borrowed[0].trap)
        borrowed[0].stand_in = self
        self.kind = BATCH
        self.borrowed = borrowed
        self.requests = requests
        self.links = links
        self.occupied = occupied
        self.decode = decode
        self.finish = finish
        self.size = len(requests)
        self.closed = closed
        self.unwanted: set[int] = set()
        self._cancelled_by_fd: set[int] = set()
        self._named: dict[int, list[tuple[int, Any]]] | None = None
        self._tries: dict[int, int] = {}
        self._array = ffi.new(_RESULTS, self.size)
        self.struct = ffi.new(_STRUCT, (0, self._array, self.size, self.size))

    @property
    def index(self) -> int:
        """The slot it stands in."""
        return self.token & INDEX_MASK

    def begin(self) -> int:
        """IDLE -> STAGED; the token is for `Ring.stage_job`."""
        self._state = State.IN_FLIGHT  # or STAGED, as the ring has it
        self.token = self.struct.token = lib.TU_JOB | next(_generations) % _GENERATIONS << 40 | self.index
        return self.token

    @property
    def results(self) -> list[int]:
        """The ``res`` of each request, or `PENDING`."""
        results: list[int] = ffi.unpack(self._array, self.size)
        return results

    @property
    def weight(self) -> int:
        """How many requests the kernel has."""
        left: int = self.struct.left
        return left

    def occupies(self, direction: str | None, fd: int) -> bool:
        """Is this direction of the fd in use?"""
        return self.task is not None and (fd, direction) in self.occupied

    def complete(self, token: int, res: int, flags: int) -> None:
        """The last CQE of the last request; or that of any, while some are unwanted."""
        if token & ~_POSITION != self.token:
            raise RingError(f"CQE {token:#x} is for a former life of {self!r}")
        if flags & CQE_F_MORE:
            position = (token & _POSITION) >> INDEX_BITS
            if position in self.links and position + 1 in self.unwanted:
                self._ask(position + 1)
            return
        before = self._state
        self._move(Event.LAST_CQE)
        self._leave()
        if self.unwanted:
            results = self.results
            for position in self.unwanted:
                self._count_cancel(results[position])
        if before is State.DETACHED:
            self._dispose_all()
            self._let_go()
        else:
            assert self.task is not None
            self.owner.wake(self.task, res)

    def cancel_missed(self, position: int) -> None:
        """The kernel has not found the request: it is done, or its turn in its chain has not come yet."""
        if position in self.unwanted and self._is_pending(position) and position - 1 in self.links:
            tries = self._tries[position] = self._tries.get(position, 0) + 1
            if tries < _TRIES and not self._is_pending(position - 1):
                self._ask(position)

    def abandon(self) -> None:
        """The task is gone for good: nobody will pick the results up."""
        if self.state is State.SETTLED:
            self._move(Event.ABANDON)
            self._dispose_all()
            self._let_go()
        else:
            super().abandon()

    def fd_closing(self, fd: int) -> None:
        """An fd is about to be closed: what names it is unwanted. What the kernel has not seen will not name it."""
        if self._named is None:
            self._named = self._index_fds()
        fields = self._named.pop(fd, ())
        self.closed.update(position for position, _ in fields)
        if self.state is State.STAGED:
            ring = self.owner.ring
            for position, field in fields:
                ring.set_field(self.number + position, field, -1)
        else:
            self._ask_for(position for position, _ in fields)

    def _index_fds(self) -> dict[int, list[tuple[int, Any]]]:
        """For each fd the positions that name it, and in which field."""
        named: dict[int, list[tuple[int, Any]]] = {}
        for position, request in enumerate(self.requests):
            fd = fd_of(request)
            if fd >= 0:
                named.setdefault(fd, []).append((position, "fd"))
            if request[0].second_fd is not None:
                named.setdefault(second_fd_of(request), []).append((position, request[0].second_fd))
        return named

    def expect_cancel_by_fd(self, fd: int) -> None:
        """What is cancelled on the fd is not to be tried again."""
        if self._named is None:
            self._named = self._index_fds()
        self._cancelled_by_fd.update(position for position, _ in self._named.get(fd, ()))

    def judge_all(self) -> tuple[list[Any], list[tuple[int, tuple[Any, ...]]]]:
        """Picks the results up: what each request gives, a value or an exception; and which are to be tried again, by
        position, with what they ask for.

        Raises:
            trio.Cancelled: the job was cancelled and nothing of it has been done.
        """
        results, interrupt = self.results, self.interrupt
        try:
            if interrupt is not None and INTERRUPTED.issuperset(results):
                interrupt()
            if min(results) < 0:
                return self._judge_each(results)
            return results if self.decode is None else self.decode(results), []
        finally:
            del interrupt
            self.pick_up()

    def _judge_each(self, results: list[int]) -> tuple[list[Any], list[tuple[int, tuple[Any, ...]]]]:
        values: list[Any] = []
        again: list[tuple[int, tuple[Any, ...]]] = []
        for first, end in self._chains():
            broken = self._broken_by(results, first, end) if end - first > 1 else None
            for position in range(first, end):
                request, res = self.requests[position], results[position]
                kind = request[0]
                done = res >= 0 or res in kind.success
                if broken is not None and position != broken and (_opens(kind) if done else res == _CANCELLED):
                    self._dispose_one(position, res)
                    values.append(ChainBrokenError(broken, self.requests[broken][0].name))
                elif done:
                    values.append(_decode(request, res))
                elif position in self.closed and res in _CLOSED:
                    values.append(closed_error())
                else:
                    if end - first == 1 and self._is_worth_a_retry(position, kind, res):
                        again.append((position, request))
                    elif res in INTERRUPTED and (position in self.unwanted or position in self._cancelled_by_fd):
                        res = _CANCELLED
                    values.append(os_error(res, whole(request)[_FILENAME]))
        return values, again

    def _is_worth_a_retry(self, position: int, kind: Kind[Any], res: int) -> bool:
        if position in self.unwanted or position in self._cancelled_by_fd:
            return False
        return kind.wait_for != 0 if res == -errno.EAGAIN else res == -errno.EINTR or res in ERESTARTS

    def _chains(self) -> Iterator[tuple[int, int]]:
        """First position and end of each chain; a request that is linked to none is one by itself."""
        first = 0
        for position in range(self.size):
            if position not in self.links:
                yield first, position + 1
                first = position + 1

    def _broken_by(self, results: list[int], first: int, end: int) -> int | None:
        """The step for which the kernel cancelled others: for its failure or short transfer those behind it, or all of
        the chain if it could not make sense of it. None if there is none.
        """
        for position in range(first, end):
            if results[position] != _CANCELLED or position in self.unwanted or position in self._cancelled_by_fd:
                continue
            if position > first:
                return position - 1
            return next((p for p in range(first, end) if results[p] < 0 and results[p] != _CANCELLED), first)
        return None

    def _is_pending(self, position: int) -> bool:
        return bool(self._array[position] == PENDING)

    def _ask_kernel(self) -> None:
        self._ask_for(range(self.size))

    def _ask_for(self, positions: Iterable[int]) -> None:
        """Has the kernel cancel what it has not done yet."""
        self.struct.each = 1
        for position in positions:
            if self._is_pending(position) and position not in self.unwanted:
                self.unwanted.add(position)
                self._ask(position)

    def _ask(self, position: int) -> None:
        self.owner.ask_cancel(
            self.token | position << INDEX_BITS, position << INDEX_BITS | self.index << 2 * INDEX_BITS
        )

    def _take_back(self) -> None:
        for number in reversed(range(self.number, self.number + self.size)):
            self.owner.ring.neutralise(number)
        self._leave()
        self._let_go()

    def _leave(self) -> None:
        """No request names any fd any more."""
        for each in self.siblings:
            each.discard(self)

    def _dispose_all(self) -> None:
        for position, res in enumerate(self.results):
            self._dispose_one(position, res)

    def _dispose_one(self, position: int, res: int) -> None:
        request = self.requests[position]
        dispose = request[0].dispose
        if res >= 0 and dispose is not None:
            dispose(res, whole(request)[_KEEP])

    def _let_go(self) -> None:
        self.task = self.interrupt = self.decode = None
        self.requests = ()
        self.borrowed[0].stand_in = None
        self.owner.end_job(self)
