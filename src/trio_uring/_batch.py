"""Batches and chains: many operations, one submission, one wake-up.

The data path: `Batch.add` keeps what the operation's filler says (see `_ops`). `Batch.run` borrows as many slots as
there are operations, writes all SQEs in one loop, has them copied to where the next tick submits from, and parks. The
kernel's answers go into an array in C; when the last has come the task wakes, once. What an operation costs in Python
is its SQE; and not even that where many are alike (see `_rows`).

Who owns what: the batch owns the requests, and with them the memory they name, until it runs; then the `Job` does,
until the last CQE. The caller owns the results.

A chain is a run of linked SQEs in a batch. The kernel starts each step when the one before is done, without a way back
to Python. Between its steps a file can go by a *direct descriptor*: a place in a table of the ring's instead of a
number of the process, known before the file is opened. Kernel facts that decide the rest:

* A failed step cancels those behind it, and so does a short read or write; not where the link is a hard one.
* A chain ends where a submission ends, so it cannot be longer than the submission queue.
* The kernel resolves the fd of a step when its turn comes, and by then the number may be another file's. So what steps
  behind the first name is put into the same table before. Not a duplicate: to close that would drop the POSIX locks
  the process has on the file. A directory cannot be named by a place, so it is duplicated; and what is about the number
  itself, a close, say, can only be a first step.
* What of a chain's places is in use at its end is closed here, however it ends.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import sys
from itertools import chain as chained
from itertools import starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, cast

import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._abi import SPLICE_F_FD_IN_FIXED, SQE_FIXED_FILE, SQE_IO_HARDLINK, SQE_IO_LINK, Opcode
from ._cancel import closed_error, raise_later
from ._core import MAX_RW_COUNT, UringIOManager, _this_thread
from ._errors import os_error, unsupported
from ._file_ops import AT_EMPTY_PATH, CLOSE, LINKAT, STATX
from ._job import BATCH, MAX_REQUESTS, PADDING, Job, bare, fd_of, second_fd_of, values_of, whole
from ._ops import TABLE, close_result, filler_of
from ._other_ops import EPOLL_CTL, WAITID
from ._registered import MAX_DIRECT
from ._ring import (
    SQE_ADDR_AT,
    SQE_EXTRA_AT,
    SQE_FILE_INDEX_AT,
    SQE_SIZE,
    SQEs,
    does_not_fit,
    pack_file_index,
    pack_sqe,
    pack_sqe_extra,
)
from ._rows import Column, DirectFile, Filled, as_direct, direct_form, fill_column, request_of
from ._sockaddr import decode_ancillary, descriptors
from ._structs import control_of

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from typing_extensions import ParamSpec

    from ._cancel import Kind, Operation

    P = ParamSpec("P")

_MAX_PLACES_PER_PART: Final = MAX_DIRECT // 4  # so that several batches can be under way
_NEED_A_NUMBER: Final = {EPOLL_CTL, WAITID}
_SENDS_FDS: Final = {Opcode.SENDMSG, Opcode.SENDMSG_ZC}
_kind_of: Final = itemgetter(0)


def _named_by_follower(request: tuple[Any, ...]) -> tuple[int, ...]:
    """The files that a step behind the first of its chain names, to be put into the ring's table before.

    Raises:
        ValueError: it names something by its number, which may be another file's when its turn comes.
    """
    if len(request) < 2 or (request[1] < 0 and request[0].second_fd is None and request[0].opcode not in _SENDS_FDS):
        return ()
    kind, fd, _, pin, _, op_flags, _, _, _, _, _ = whole(request)
    by_number = fd >= 0 and (kind.names == "number" or (kind in (STATX, LINKAT) and op_flags & AT_EMPTY_PATH))
    if kind.opcode in _SENDS_FDS and pin.msg_controllen:
        by_number = bool(descriptors(decode_ancillary(control_of(pin))))
    if by_number:
        del request, pin  # a traceback keeps this frame
        raise ValueError(
            f"this {kind.name} cannot follow another step of a chain: "
            "it names an fd by its number, and that may be another file's by then"
        )
    if kind.names != "file":
        return ()
    return tuple(number for number in (fd, second_fd_of(request)) if number >= 0)


class _Spent(list[tuple[Any, ...]]):
    """The requests of a batch that has been run."""

    def append(self, request: object) -> NoReturn:
        del request  # a traceback keeps this frame
        raise RuntimeError("the batch has been run")

    extend = append


class Batch:
    """Operations that are submitted together and waited for as one. Made by `trio_uring.lowlevel.batch`.

    Add operations, then `run` it, once::

        batch = lowlevel.batch()
        for offset, buffer in pieces:
            batch.add(lowlevel.read, fd, buffer, offset)
        counts = await batch.run()
    """

    def __init__(self) -> None:
        self._manager = _this_thread.manager.require(BATCH)
        self._requests: list[tuple[Any, ...]] | Filled = []
        self._links: dict[int, int] = {}  # IOSQE flags of each step that another one follows
        self._placed: dict[int, tuple[int, ...]] = {}  # what each step needs places in the ring's table for

    def __len__(self) -> int:
        return len(self._requests)

    @enable_ki_protection
    def add(self, operation: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> int:
        """Adds an operation and returns its position in what `run` returns.

        Args:
            operation: one of `trio_uring.lowlevel`'s functions.
            args, kwargs: its arguments. Buffers are held from now on.

        Raises:
            TypeError: it is no such function.
            RuntimeError: the batch has been run.
        """
        requests = self._one_by_one()
        requests.append(filler_of(operation)(*args, **kwargs))
        return len(requests) - 1

    def extend(self, operation: Callable[..., Awaitable[object]], arguments: Iterable[tuple[Any, ...]]) -> None:
        """Adds an operation for each of ``arguments``: as so many calls of `add`, but cheaper.

        Cheapest is a batch of nothing but one such call, of ``read``, ``write`` or ``openat`` with fds that are ints
        and paths that are str or bytes: C does it then.

        Args:
            operation: one of `trio_uring.lowlevel`'s functions.
            arguments: the positional arguments of each call.
        """
        filler = filler_of(operation)
        rows = [*map(tuple, arguments)]  # now, as whoever yields them may add to this batch, or use a list again
        if not self._requests and type(self._requests) is list:
            column = fill_column(TABLE[operation.__name__], rows)
            if column is not None:
                self._requests = Filled([column])
                return
        self._one_by_one().extend(starmap(filler, rows))

    def chain(self) -> Chain:
        """Begins a chain: operations of this batch that follow one another."""
        return Chain(self)

    def _one_by_one(self) -> list[tuple[Any, ...]]:
        """The requests, to add others."""
        if type(self._requests) is Filled:
            self._requests = [*self._requests]
        return cast("list[tuple[Any, ...]]", self._requests)

    @enable_ki_protection
    async def run(self) -> list[Any]:
        """Submits everything, waits for everything, and returns the results in the order of `add`.

        A result is what the operation's own function would have returned, or, not raised, the exception. EINTR and
        EAGAIN are tried again, as in single operations, but not in a chain.

        Cancelled, it cancels all that is left. If nothing had been done it raises `trio.Cancelled`; otherwise it
        returns, with ``OSError(ECANCELED)`` for what was not done, and the next checkpoint raises.

        Raises:
            trio.BusyResourceError: another task, or another operation of the batch, uses a direction of a socket.
            UnsupportedOperation: the kernel lacks one of the operations.
            OverflowError, TypeError, ValueError: an argument does not fit its field; a chain is too long.
            RuntimeError: it has been run before.

        When it raises anything, nothing was submitted.
        """
        if type(self._requests) is _Spent:
            raise RuntimeError("the batch has been run")
        if self._manager is not _this_thread.manager:
            raise RuntimeError("a batch runs in the trio run that made it")
        requests, self._requests = self._requests, _Spent()
        try:
            if not requests:
                await trio.lowlevel.checkpoint()
                return []
            await trio.lowlevel.checkpoint_if_cancelled()
            without_ring = self._take_out_what_the_kernel_lacks(requests) if self._manager.lacks_any else {}
            return await self._run(self._parts(requests), len(requests), without_ring)
        finally:
            requests.clear()  # a traceback keeps this frame

    async def _run(
        self, parts: list[_Part], size: int, without_ring: dict[int, tuple[tuple[Any, ...], set[Any]]]
    ) -> list[Any]:
        try:
            if len(parts) == 1:
                values = await self._run_part(parts[0])
            else:
                for part in parts[1:]:
                    part.watch(self._manager)  # their turn comes only later
                    part.check()
                values = await self._run_parts(parts)
        finally:
            for part in parts:
                part.requests = ()  # a traceback keeps this frame
        for position, (request, siblings) in without_ring.items():
            if position < len(values):
                values[position] = self._fall_back(siblings, *whole(request))
        if len(values) < size:
            values += [os_error(-errno.ECANCELED) for _ in range(size - len(values))]
        return values

    async def _run_parts(self, parts: list[_Part]) -> list[Any]:
        """One after the other, until one is cancelled. What has been done is not lost."""
        values: list[Any] = []
        for part in parts:
            size = len(part)
            try:
                values += await self._run_part(part)
            except (trio.Cancelled, KeyboardInterrupt) as exc:
                if not values:
                    raise
                raise_later(exc)
                break
            except (OSError, trio.BusyResourceError) as exc:
                if not values:
                    raise
                values += [bare(exc)] * size
        return values

    # What needs no ring

    def _take_out_what_the_kernel_lacks(
        self, requests: list[tuple[Any, ...]] | Filled
    ) -> dict[int, tuple[tuple[Any, ...], set[Any]]]:
        """A NOP takes its place. Whatever has a fallback is done in no time."""
        taken_out: dict[int, tuple[tuple[Any, ...], set[Any]]] = {}
        if isinstance(requests, Filled):
            for kind in requests.kinds:
                self._manager.require(kind)  # none of them has a fallback
            return taken_out
        for position, request in enumerate(requests):
            kind = request[0]
            try:
                lacking = self._manager.lacks(kind)
                if lacking and (position in self._links or position - 1 in self._links):
                    raise unsupported(kind.name, kind.opcode.name, kind.since)
            except OSError:
                del request  # a traceback keeps this frame
                taken_out.clear()
                raise
            if lacking:
                taken_out[position] = request, self._manager.siblings_of(whole(request)[1])
                requests[position] = (BATCH,)
        return taken_out

    def _fall_back(
        self,
        siblings: set[Any],
        kind: Kind[Any],
        fd: int,
        off: int,
        pin: Any,
        length: int,
        op_flags: int,
        keep: Any,
        filename: object,
        addr: int,
        via: int | None,
        extra: object,
    ) -> Any:
        if self._manager.siblings_of(fd) is not siblings:
            return closed_error()
        try:
            return self._manager.fall_back(kind, fd, off, pin, length, op_flags, keep, via)
        except Exception as exc:
            return bare(exc)

    # Running

    def _parts(self, requests: list[tuple[Any, ...]] | Filled) -> list[_Part]:
        """The batch as a whole, or in parts of a quarter of what can be in flight at once: operations that go on for
        long, receives on idle connections, say, would keep a larger one waiting for ever. No chain is divided.

        Raises:
            ValueError: a chain is too long.
        """
        cap = min(self._manager.max_in_flight, MAX_REQUESTS)
        most = -(-cap // 4)
        if isinstance(requests, Filled):
            if requests.steps == 1 and not requests.opened and requests.lanes <= most:
                return [_Part(requests.part(0, requests.lanes), {}, ())]
        elif not self._links and not self._placed and len(requests) <= most:
            return [_Part(requests[:], {}, ())]
        longest = min(-(-cap // 2), self._manager.ring.entries[0])  # the kernel takes a chain at one go
        most_places = max(1, min(_MAX_PLACES_PER_PART, self._manager.registered.max_direct // 4))
        limits = _Limits(most, longest, most_places)
        if isinstance(requests, Filled):
            return _parts_of_alike(requests, limits)
        return _parts_of_any(requests, self._links, self._placed, limits)

    async def _run_part(self, part: _Part) -> list[Any]:
        manager = self._manager
        try:
            if part.files:
                if not manager.registered.has_places(len(part.files)):
                    part.watch(manager)
                places = await manager.registered.borrow_places(len(part.files))
                part.places = dict(zip(part.files, places, strict=True))
            sqes = part.fill()
            part.watch(manager)
            borrowed = await manager.borrow(len(part), current_task(), ())
            try:
                if part.has_prelude:
                    await trio.lowlevel.checkpoint_if_cancelled()
                job = part.make_job(manager, borrowed, sqes)
            except BaseException:
                manager.give_back(borrowed)
                raise
        except BaseException:
            part.requests = []  # a traceback keeps this frame
            part.finish(manager)
            raise
        await manager.run_job(job, sqes.memory)
        values, again = job.judge_all()
        if again:
            try:
                await self._try_all_again(values, again, part.siblings)
            finally:
                again.clear()  # a traceback keeps this frame
        return values

    async def _try_all_again(
        self, values: list[Any], again: list[tuple[int, tuple[Any, ...]]], siblings: dict[int, set[Any]]
    ) -> None:
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                for position, request in again:
                    nursery.start_soon(self._try_again, values, position, request, siblings)
                request = ()
        except BaseExceptionGroup as group:
            if group.split(KeyboardInterrupt)[1] is not None:
                raise
            raise_later(KeyboardInterrupt())

    async def _try_again(
        self, values: list[Any], position: int, request: tuple[Any, ...], siblings: dict[int, set[Any]]
    ) -> None:
        try:
            for fd in (whole(request)[1], second_fd_of(request)):
                if fd >= 0 and self._manager.siblings_of(fd) is not siblings[fd]:
                    raise closed_error()
            values[position] = await self._manager.perform(*request)
        except trio.Cancelled:  # what the others have done is not to be lost; the next checkpoint raises again
            values[position] = os_error(-errno.ECANCELED)
        except Exception as exc:
            values[position] = bare(exc)


class _Limits(NamedTuple):
    """Of what is in flight at once."""

    size: int  #: of a part, in requests, if it is more than one chain
    chain: int  #: in requests
    places: int  #: in the ring's table

    def too_long(self) -> ValueError:
        return ValueError(
            f"a chain has at most {self.chain} steps, and at most {self.places} direct descriptors"
            " and other files behind its first step"
        )


def _parts_of_alike(requests: Filled, limits: _Limits) -> list[_Part]:
    if requests.steps > limits.chain or requests.opened > limits.places:
        raise limits.too_long()
    lanes = max(1, min(limits.size // requests.steps, limits.places // max(1, requests.opened)))
    ends = [*range(lanes, requests.lanes, lanes), requests.lanes]
    parts = [requests.part(start, end) for start, end in zip([0, *ends], ends)]  # noqa: B905
    return [_Part(part, part.links(), part.files()) for part in parts]


def _parts_of_any(
    requests: list[tuple[Any, ...]], links: dict[int, int], placed: dict[int, tuple[int, ...]], limits: _Limits
) -> list[_Part]:
    total = len(requests)
    in_part = set(chained.from_iterable(placed.values()))
    if total <= limits.size and (not links or total <= limits.chain) and len(in_part) <= limits.places:
        return [_Part(requests[:], links, in_part)]
    parts: list[tuple[int, int, set[int]]] = []
    start = first = 0
    in_part = set()
    in_chain: set[int] = set()
    for position in range(total):
        in_chain.update(placed.get(position, ()))
        if position in links:
            continue
        end = position + 1
        if end - first > limits.chain or len(in_chain) > limits.places:
            raise limits.too_long()
        if start < first and (end - start > limits.size or len(in_part) + len(in_chain - in_part) > limits.places):
            parts.append((start, first, in_part))
            start, in_part = first, set()
        in_part |= in_chain
        first, in_chain = end, set()
    parts.append((start, total, in_part))
    if len(parts) == 1:
        return [_Part(requests[:], links, in_part)]
    return [
        _Part(requests[start:end], {at - start: flag for at, flag in links.items() if start <= at < end}, files)
        for start, end, files in parts
    ]


class _Part:
    """What of a batch is in flight at once. Positions are those in the part."""

    __slots__ = (
        "_duplicates",
        "_held",
        "closed",
        "decodes",
        "files",
        "has_direction",
        "has_prelude",
        "has_second_fd",
        "links",
        "places",
        "requests",
        "siblings",
    )

    def __init__(self, requests: list[tuple[Any, ...]] | Filled, links: dict[int, int], files: Collection[int]) -> None:
        self.requests: Sequence[tuple[Any, ...]] = requests
        self.links = links
        self.files = files
        self.has_prelude = self.has_second_fd = self.has_direction = self.decodes = False
        for kind in requests.kinds if isinstance(requests, Filled) else set(map(_kind_of, requests)):
            if kind.prelude is not None:
                self.has_prelude = True
            if kind.second_fd is not None:
                self.has_second_fd = True
            if kind.direction is not None:
                self.has_direction = True
            if kind.decode is not None:
                self.decodes = True
        self.closed: set[int] = set()  # positions whose fd has been closed
        self.places: dict[int, int] = {}  # in the ring's table, of direct descriptors and of fds
        self.siblings: dict[int, set[Any]] = {}  # for each fd that is named
        self._duplicates: dict[int, int] = {}  # of directories
        self._held: set[int] = set()  # fds whose files are in their places

    def __len__(self) -> int:
        return len(self.requests)

    def watch(self, manager: UringIOManager) -> None:
        """From now on it is noticed if one of the fds is closed."""
        if self.siblings:
            return
        fds = self.requests.fds() if isinstance(self.requests, Filled) else set(map(fd_of, self.requests))
        if self.has_second_fd:
            fds.update(map(second_fd_of, self.requests))
        self.siblings = {fd: manager.siblings_of(fd) for fd in fds if fd >= 0}

    def check(self) -> None:
        """Raises what `fill` raises."""
        self.places = dict.fromkeys(self.files, 0)
        try:
            self.fill()
        finally:
            self.places = {}

    def fill(self) -> SQEs:
        """The SQEs, but for their user_data.

        Raises:
            OverflowError, TypeError, ValueError: an argument does not fit.
        """
        if isinstance(self.requests, Filled):
            return self.requests.weave([*self.places.values()])
        sqes = SQEs(len(self.requests))
        memory, pointers = sqes.views()
        links, places = self.links, self.places
        request: tuple[Any, ...] = ()
        at, address_at = 0, SQE_ADDR_AT
        try:
            for position, request in enumerate(self.requests):
                if len(request) == 6:
                    kind, fd, off, pin, length, op_flags = request
                    addr, via, extra = 0, None, None
                else:
                    kind, fd, off, pin, length, op_flags, _, _, addr, via, extra = request + PADDING[len(request)]
                head = kind.head
                if position in links:
                    head |= links[position] << 8
                if length < 0:
                    length = len(pin)
                    if length > MAX_RW_COUNT:
                        length = MAX_RW_COUNT
                if type(fd) is DirectFile:
                    if fd not in places:
                        raise ValueError(f"{fd!r} belongs to another batch")
                    if kind is CLOSE:
                        pack_file_index(memory, at + SQE_FILE_INDEX_AT, places[fd] + 1)
                        via = 0
                    elif kind in _NEED_A_NUMBER:
                        raise ValueError(f"{kind.name} takes no direct descriptor")
                    else:
                        via = places[fd]
                        head |= SQE_FIXED_FILE << 8
                    fd = -1
                elif position - 1 in links and fd >= 0 and kind.names == "file":
                    via = places[fd]
                    head |= SQE_FIXED_FILE << 8
                if kind.second_fd == "file_index":
                    assert extra is not None
                    second = extra[2]
                    if second in places and (second < 0 or position - 1 in links):
                        extra = (*extra[:2], places[second], *extra[3:])
                        op_flags |= SPLICE_F_FD_IN_FIXED
                    elif type(second) is DirectFile:
                        raise ValueError(f"{second!r} belongs to another batch")
                pack_sqe(memory, at, head, fd if via is None else via, off, addr, length, op_flags)
                if extra is not None:
                    if type(extra) is DirectFile:
                        pack_file_index(memory, at + SQE_FILE_INDEX_AT, places[extra] + 1)
                    else:
                        pack_sqe_extra(memory, at + SQE_EXTRA_AT, *extra)
                if pin is not None:
                    pointers[address_at] = pin
                at += SQE_SIZE
                address_at += SQE_SIZE // 8
        except struct.error as exc:
            more = extra if type(extra) is tuple else ()
            raise does_not_fit(exc, (fd if via is None else via, off, length, op_flags, addr, *more)) from None
        finally:
            request = pin = None  # type: ignore[assignment]  # a traceback keeps this frame
        return sqes

    def make_job(self, manager: UringIOManager, borrowed: Sequence[Operation], sqes: SQEs) -> Job:
        """What has to happen just before it is submitted, and the job.

        Raises:
            trio.BusyResourceError: see `_occupy`.
            OSError: too many files are open.
        """
        if self.siblings:
            self._leave_out_what_was_closed(manager, sqes)
            if not isinstance(self.requests, Filled):  # their later steps name nothing but direct descriptors
                for before in self.links:
                    self._hold_files(manager, sqes, before + 1)
        occupied = self._occupy(manager)
        if self.has_prelude:
            for position, (kind, fd) in enumerate(self._targets()):
                if fd >= 0 and kind.prelude is not None and position not in self.closed:
                    kind.prelude(manager, fd)
            self.siblings = {fd: manager.siblings_of(fd) for fd in self.siblings}
        requests = self.requests
        decode = None
        if self.decodes:
            decode = requests.values if isinstance(requests, Filled) else functools.partial(values_of, requests)
        job = Job(manager, borrowed, requests, self.links, occupied, self.closed, decode, self.finish)
        job.siblings = list(self.siblings.values())
        self.requests = []
        return job

    def _targets(self) -> list[tuple[Kind[Any], int]]:
        """The kind and the fd of each request, without what it holds: a traceback keeps frames."""
        return [(request[0], fd_of(request)) for request in self.requests]

    def _leave_out_what_was_closed(self, manager: UringIOManager, sqes: SQEs) -> None:
        """The numbers may be those of other files by now."""
        closed = {fd for fd, siblings in self.siblings.items() if manager.siblings_of(fd) is not siblings}
        if not closed:
            return
        for position, request in enumerate(self.requests):
            if fd_of(request) in closed:
                sqes.set_field(position, "fd", -1)
                self.closed.add(position)
            kind = request[0]
            if kind.second_fd is not None and second_fd_of(request) in closed:
                sqes.set_field(position, kind.second_fd, -1)
                self.closed.add(position)
        for fd in closed:
            del self.siblings[fd]

    def _hold_files(self, manager: UringIOManager, sqes: SQEs, position: int) -> None:
        """A step that is not the first of its chain is about the files of now, whoever closes their numbers."""
        if position in self.closed:
            return
        kind, fd = self.requests[position][0], fd_of(self.requests[position])
        second = second_fd_of(self.requests[position])
        if kind.names == "file":
            for number in (fd, second):
                if number >= 0 and number not in self._held:
                    self._held.add(number)
                    manager.registered.put_file(self.places[number], number)
            return
        if fd >= 0:
            sqes.set_field(position, "fd", self._duplicate(fd))
        if second >= 0:
            assert kind.second_fd is not None
            sqes.set_field(position, kind.second_fd, self._duplicate(second))

    def _duplicate(self, fd: int) -> int:
        if fd not in self._duplicates:
            try:
                self._duplicates[fd] = os.dup(fd)
            except OSError as exc:
                if exc.errno != errno.EBADF:
                    raise
                return -1  # the step will say so
        return self._duplicates[fd]

    def _occupy(self, manager: UringIOManager) -> frozenset[tuple[int, str]]:
        """The directions of sockets that are used: one after the other in a chain, otherwise by one request each.

        Raises:
            trio.BusyResourceError: not so.
        """
        if not self.siblings or not self.has_direction:
            return frozenset()
        users: dict[tuple[int, str], int] = {}
        chain = 0
        for position, (kind, fd) in enumerate(self._targets()):
            direction = kind.direction
            if direction is not None and fd >= 0 and position not in self.closed:
                manager.check_not_busy(direction, fd)
                if users.setdefault((fd, direction), chain) != chain:
                    raise trio.BusyResourceError(f"another operation of the batch uses this fd to {direction}")
            chain += position not in self.links
        return frozenset(users)

    def finish(self, manager: UringIOManager) -> None:
        """It is over: descriptors that were its own are closed."""
        for fd in self._duplicates.values():
            close_result(fd, None)
        if self.places:
            manager.registered.return_places([*self.places.values()])


class Chain:
    """Operations of a batch that follow one another. Made by `Batch.chain` and `trio_uring.lowlevel.chain`.

    Each step starts when the one before is done. If one fails, or reads or writes less than it was asked to, those
    behind it are not done: their results are `ChainBrokenError`, and a file that an earlier step opened is closed::

        chain = lowlevel.chain()
        file = chain.direct(lowlevel.openat, path, os.O_RDONLY)
        chain.add_hard(lowlevel.read, file, buffer, 0)  # a short read is no reason not to close
        chain.add(lowlevel.close, file)
        _, count, _ = await chain.run()
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._next = -1  # position of the next step
        self._link = SQE_IO_LINK

    @enable_ki_protection
    def add(self, operation: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> int:
        """Adds a step, as `Batch.add`. If it fails, or comes short, the steps behind it are not done.

        Raises:
            ValueError: it is about the number of an fd (a close, say) and not the first step; the number may be another
                file's when its turn comes.
        """
        return self._add(SQE_IO_LINK, filler_of(operation)(*args, **kwargs))

    @enable_ki_protection
    def add_hard(self, operation: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> int:
        """Adds a step, as `Batch.add`. The step behind it is done whatever comes of it."""
        return self._add(SQE_IO_HARDLINK, filler_of(operation)(*args, **kwargs))

    @enable_ki_protection
    def direct(self, operation: Callable[P, Awaitable[object]], *args: P.args, **kwargs: P.kwargs) -> DirectFile:
        """Adds a step that opens a file or a socket, as `add`, but as a direct descriptor. Linux 5.15.

        Args:
            operation: ``openat``, ``openat2``, ``socket`` or ``accept``.
            args, kwargs: its arguments.

        Returns:
            what stands for the fd in later steps. The step's result is None. If none of them closes it, the batch does.
        """
        file = DirectFile.new()
        self._add_direct(as_direct(filler_of(operation)(*args, **kwargs), file))
        return file

    def _add_direct(self, request: tuple[Any, ...]) -> None:
        position = self._add(SQE_IO_LINK, request)
        placed = self._batch._placed
        placed[position] = (request[-1], *placed.get(position, ()))

    def _add(self, link: int, request: tuple[Any, ...]) -> int:
        batch = self._batch
        requests = batch._one_by_one()
        position = len(requests)
        try:
            if position == self._next:
                if named := _named_by_follower(request):
                    batch._placed[position] = named
                batch._links[position - 1] = self._link
            elif self._next >= 0 and type(requests) is not _Spent:
                raise RuntimeError("the steps of a chain are added one after the other, with nothing between them")
            requests.append(request)
        except (RuntimeError, ValueError):
            del request  # a traceback keeps this frame
            raise
        self._next = position + 1
        self._link = link
        return position

    @enable_ki_protection
    async def run(self) -> list[Any]:
        """Runs the batch the chain belongs to; see `Batch.run`."""
        return await self._batch.run()


class Chains:
    """Chains that differ in nothing but their arguments. Made by `trio_uring.lowlevel.chains`.

    A step is added to all of them at once, with the arguments for each::

        chains = lowlevel.chains()
        file = chains.direct(lowlevel.openat, [(path, os.O_RDONLY) for path in paths])
        chains.add(lowlevel.read, [(file, buffer, 0) for buffer in buffers])
        opened, counts = await chains.run()

    Each is as good as a `Chain`, all are one batch. Where a chain is broken, `ChainBrokenError.step` is the position
    in that batch: of ``k`` steps it is number ``step % k``. Cheapest are steps of ``read``, ``write`` and ``openat``
    with paths that are str or bytes: C fills them.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._steps: list[Column | list[tuple[Any, ...]]] = []
        self._links: list[int] = []
        self._files: set[DirectFile] = set()

    def add(self, operation: Callable[..., Awaitable[object]], arguments: Iterable[tuple[Any, ...]]) -> None:
        """Adds a step to each chain, as `Chain.add`.

        Args:
            operation: one of `trio_uring.lowlevel`'s functions.
            arguments: the positional arguments for each chain.

        Raises:
            ValueError: there are not as many arguments as chains; or as `Chain.add`.
        """
        self._add(SQE_IO_LINK, operation, arguments)

    def add_hard(self, operation: Callable[..., Awaitable[object]], arguments: Iterable[tuple[Any, ...]]) -> None:
        """Adds a step to each chain, as `Chain.add_hard`."""
        self._add(SQE_IO_HARDLINK, operation, arguments)

    def direct(self, operation: Callable[..., Awaitable[object]], arguments: Iterable[tuple[Any, ...]]) -> DirectFile:
        """Adds a step to each chain that opens a direct descriptor, as `Chain.direct`.

        Returns:
            what stands, in the later steps of each chain, for the file it has opened.
        """
        file = DirectFile.new()
        self._add(SQE_IO_LINK, operation, arguments, file)
        self._files.add(file)
        return file

    def _add(
        self,
        link: int,
        operation: Callable[..., Awaitable[object]],
        arguments: Iterable[tuple[Any, ...]],
        opened: DirectFile | None = None,
    ) -> None:
        filler, rows, first = filler_of(operation), [*map(tuple, arguments)], not self._steps
        if type(self._batch._requests) is _Spent:
            raise RuntimeError("the chains have been run")
        if not first and len(rows) != len(self._steps[0]):
            raise ValueError(f"arguments for {len(rows)} chains, but there are {len(self._steps[0])}")
        kind = TABLE[operation.__name__]
        used = (
            next((each for each in rows[0] if type(each) is DirectFile and each in self._files), None) if rows else None
        )
        column: Column | list[tuple[Any, ...]] | None = None
        if opened is not None and kind.cloexec == "op_flags":
            column = fill_column(direct_form(kind), rows, opened, used)
        elif opened is None and (first or used is not None or kind.names == "directory"):
            column = fill_column(kind, rows, None, used)
        if column is None:
            column = [request_of(filler, row, lane, opened, self._files) for lane, row in enumerate(rows)]
            try:
                for request in [] if first else column:
                    _named_by_follower(request)
            except ValueError:
                del column, request  # a traceback keeps this frame
                raise
        self._steps.append(column)
        self._links.append(link)

    @enable_ki_protection
    async def run(self) -> list[list[Any]]:
        """Runs the chains as one batch; see `Batch.run`.

        Returns:
            a list for each step: the results, or exceptions, of each chain.
        """
        steps, self._steps = self._steps, []
        n = len(self._links)
        try:
            if all(type(step) is Column for step in steps) and steps:
                self._batch._requests = Filled(cast("list[Column]", steps[:]), self._links[:-1])
            else:
                for lane in range(len(steps[0]) if steps else 0):
                    self._add_chain([step[lane] for step in steps])
        finally:
            steps.clear()  # a traceback keeps this frame
        results = await self._batch.run()
        return [results[step::n] for step in range(n)]

    def _add_chain(self, requests: list[tuple[Any, ...]]) -> None:
        chain = self._batch.chain()
        for request, link in zip(requests, self._links, strict=True):
            if type(whole(request)[-1]) is DirectFile:
                chain._add_direct(request)
            else:
                chain._add(link, request)
        requests.clear()


def batch() -> Batch:
    """A new `Batch`: many operations, one submission, one wake-up.

    Raises:
        UnavailableError: this run can have no ring.
    """
    return Batch()


def chain() -> Chain:
    """A `Chain` in a batch of its own: operations that the kernel does one after the other, with one wake-up.

    Raises:
        UnavailableError: this run can have no ring.
    """
    return Batch().chain()


def chains() -> Chains:
    """`Chains` in a batch of their own: many that differ in nothing but their arguments.

    Raises:
        UnavailableError: this run can have no ring.
    """
    return Chains(Batch())
