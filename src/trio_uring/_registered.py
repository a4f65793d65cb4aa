"""What is registered with a run's ring: direct descriptors, fixed buffers, rings of provided buffers.

All of it is indices in tables of the ring's. So for each table somebody has to know which index is whose; and an index
may be given to the next one only when no staged entry names it any more.
"""

from __future__ import annotations

import errno
import itertools
import resource
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Protocol

import outcome
import trio

from ._errors import locked_memory_error
from ._ring import BufferRing

if TYPE_CHECKING:
    from trio.lowlevel import Abort, RaiseCancelT, Task

    from ._errors import RingError
    from ._ring import Ring

MAX_DIRECT: Final = 1024
"""How many files the chains of a run can have in the ring's table at once: direct descriptors, and what they name."""

MAX_FIXED_BUFFERS: Final = 1024
"""How many buffers can be registered in a run at once."""

STREAM_BUFFERS: Final = 512
"""How many connections can have received something when the run looks next; more take another way."""

STREAM_BUFFER_SIZE: Final = 16384
"""Bytes of each. What fills one is followed by more, which is received without it."""

_STREAM_GROUP: Final = 0  # what an SQE says that names no group


class RingOwner(Protocol):
    """What this needs of the I/O manager."""

    @property
    def ring(self) -> Ring:
        """Its ring."""

    @property
    def closed(self) -> bool:
        """Is the run over?"""

    def own_ring(self) -> bool:
        """Makes this thread, if it is the run's, the ring's owner. False if it is another one."""

    def check_working(self) -> None:
        """Raises `RingError` if the ring has failed."""


class _Places:
    """Who has which place in the table of direct descriptors. Who waits for some waits in line."""

    def __init__(self, ring: Ring) -> None:
        self.size = _max_direct()
        self._free = list(range(self.size))
        # No trio.Lock: a task that a crash ends while it holds one stays in a table of trio's for ever.
        self._line: OrderedDict[Task, int] = OrderedDict()
        ring.register_files(self.size)

    def are_free(self, n: int) -> bool:
        return len(self._free) >= n and not self._line

    async def take(self, n: int) -> list[int]:
        if self.are_free(n):
            return self._take(n)
        task = trio.lowlevel.current_task()
        self._line[task] = n

        def leave(_: RaiseCancelT) -> Abort:
            del self._line[task]
            self._serve()
            return trio.lowlevel.Abort.SUCCEEDED

        places: list[int] = await trio.lowlevel.wait_task_rescheduled(leave)
        return places

    def _take(self, n: int) -> list[int]:
        got = self._free[-n:]
        del self._free[-n:]
        return got

    def put_back(self, places: list[int]) -> None:
        self._free.extend(places)
        self._serve()

    def fail(self, error: RingError) -> None:
        while self._line:
            task, _ = self._line.popitem()
            trio.lowlevel.reschedule(task, outcome.Error(error))

    def _serve(self) -> None:
        """Those that came first go first."""
        while self._line and next(iter(self._line.values())) <= len(self._free):
            task, n = self._line.popitem(last=False)
            trio.lowlevel.reschedule(task, outcome.Value(self._take(n)))


def _max_direct() -> int:
    return min(MAX_DIRECT, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class Registered:
    """The tables of one ring. Each is made when it is needed first."""

    def __init__(self, owner: RingOwner) -> None:
        self._owner = owner
        self._places: _Places | None = None
        self._free_buffers: list[int] | None = None
        self._groups = itertools.count(_STREAM_GROUP + 1)
        self._free_groups: list[int] = []

    # Direct descriptors

    @property
    def max_direct(self) -> int:
        """How many direct descriptors there can be at once."""
        return _max_direct() if self._places is None else self._places.size

    def has_places(self, n: int) -> bool:
        """Are so many places for direct descriptors free?"""
        return self._places is None or self._places.are_free(n)

    async def borrow_places(self, n: int) -> list[int]:
        """Free places for direct descriptors; waits until there are enough."""
        self._owner.check_working()
        if self._places is None:
            self._places = _Places(self._owner.ring)
        return await self._places.take(n)

    def fail(self, error: RingError) -> None:
        """The ring has failed: whoever waits for places is to hear of it."""
        if self._places is not None:
            self._places.fail(error)

    def put_file(self, place: int, fd: int) -> None:
        """Puts an open file into a place that was borrowed; it stays empty if there is no such file."""
        try:
            self._owner.ring.put_file(place, fd)
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise

    def return_places(self, places: list[int]) -> None:
        """They are free again. What is still open in one of them is closed."""
        if not self._owner.own_ring():  # the run is torn down by somebody else: the end of the ring closes them
            return
        assert self._places is not None
        self._owner.ring.clear_files(places)
        if not self._owner.closed:
            self._places.put_back(places)

    # Fixed buffers

    @property
    def buffers_in_use(self) -> int:
        """How many are registered."""
        return 0 if self._free_buffers is None else MAX_FIXED_BUFFERS - len(self._free_buffers)

    def add_buffer(self, address: int, size: int) -> int:
        """Returns the index of a fixed buffer.

        Raises:
            OSError: there are too many; or the kernel refuses it, for lack of memory that may be locked, say.
        """
        if self._free_buffers is None:
            self._owner.ring.register_buffers(MAX_FIXED_BUFFERS)
            self._free_buffers = list(range(MAX_FIXED_BUFFERS))
        if not self._free_buffers:
            raise OSError(errno.ENOBUFS, f"at most {MAX_FIXED_BUFFERS} buffers can be registered in a run")
        index = self._free_buffers.pop()
        try:
            self._owner.ring.update_buffer(index, address, size)
        except BaseException as exc:
            self._free_buffers.append(index)
            if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
                raise locked_memory_error(f"to register a buffer of {size} bytes") from None
            raise
        return index

    def remove_buffer(self, index: int) -> None:
        """Operations that are under way keep it. Those that are staged get it first: the index may be another's
        soon."""
        if self._owner.closed:
            return
        ring = self._owner.ring
        if ring.staged:
            self._owner.own_ring()
            ring.flush()
        ring.update_buffer(index, 0, 0)
        assert self._free_buffers is not None
        self._free_buffers.append(index)

    # Rings of provided buffers

    def open_stream_buffers(self) -> BufferRing:
        """Buffers for the sockets of the whole run."""
        return BufferRing(self._owner.ring, STREAM_BUFFERS, STREAM_BUFFER_SIZE, _STREAM_GROUP)

    def open_buffers(self, count: int, size: int, *, incremental: bool) -> BufferRing:
        """Buffers the kernel takes from; see `BufferRing`."""
        group = self._free_groups.pop() if self._free_groups else next(self._groups)
        try:
            return BufferRing(self._owner.ring, count, size, group, incremental=incremental)
        except BaseException:
            self._free_groups.append(group)
            raise

    def close_buffers(self, buffers: BufferRing) -> None:
        """No receive uses them any more."""
        if not self._owner.closed:
            buffers.close()
            self._free_groups.append(buffers.group)
