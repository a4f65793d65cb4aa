"""The ring: set-up, staging of SQEs, the tick, close. No trio, no tasks.

Facts about the kernel, and what follows from them:

* **DEFER_TASKRUN** (6.1) makes completions appear only when the owner asks for them. That is cheaper, and it
  closes most cancel races (an accept that is cancelled just after its client connected does not
  produce a connection nobody asked for). It needs SINGLE_ISSUER: the thread that *enables* the ring
  owns it, and every call from another thread fails with EEXIST. So a ring is created disabled and
  enabled by the thread that runs. Kernels that refuse a flag get the next rung of the ladder.
* **Queue full is no error.** SQEs are staged in memory of our own and the shim pushes them through the
  kernel's queue in as many rounds as it takes. A ring of one entry works; no cancel is ever dropped.
* **What is staged is still ours.** Until the tick the kernel knows nothing of an entry, and it can be
  taken back (`neutralise`). Each entry has a sequence number; comparing it with `base` tells whether
  the kernel has it. No per-operation bookkeeping at submit, hence none to get wrong.
* **The CQ may overflow** without losing anything (NODROP): the kernel keeps the rest and the shim
  fetches it. -EBADR would mean that a completion is lost, and with it a task: fatal and loud.
* **A ring survives fork badly**: parent and child would share it. The mappings are not inherited and
  the shim refuses every call of the child.

Sources: io_uring_setup(2), io_uring_enter(2).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from . import _native
from ._abi import CQE_BUFFER_SHIFT, CQE_F_BUF_MORE, PBUF_RING_INC, Feature, Opcode, Setup
from ._errors import RingError, UnavailableError, not_in_a_child, unavailable
from ._slots import Buffers, Queue

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

ffi: Final = _native.ffi
lib: Final = _native.lib

# opcode|flags|ioprio, fd, off, addr, len, op flags; what follows is zero unless `extra` is given
_fields: Final = struct.Struct("<IiqQII")
pack_sqe: Final = _fields.pack_into  # in memory that is zero
SQE_EXTRA_AT: Final = 40
pack_sqe_extra: Final = struct.Struct("<HHiQ8x").pack_into  # buf_index, personality, file_index, addr3
SQE_SIZE: Final = 64
_CHARS: Final = ffi.typeof("char[]")
_POINTERS: Final = ffi.typeof("void **")
_INT: Final = struct.Struct("<i")
pack_file_index: Final = _INT.pack_into
SQE_FILE_INDEX_AT: Final = 44
_FIELDS: Final = {
    "fd": (_INT, 4),
    "off": (struct.Struct("<q"), 8),
    "length": (_INT, 24),
    "file_index": (_INT, SQE_FILE_INDEX_AT),
}
_NO_EXTRA: Final = (0, 0, 0, 0)
SQE_ADDR_AT: Final = 2  # the addr field, in units of 8 bytes

_fill_buffer: Final = struct.Struct("<QIH").pack_into  # not the last field: in the first entry it is the ring's tail
_BUFFER_SIZE: Final = 16

_NEUTRALISED: Final = lib.TU_NEUTRALISED
_tick: Final = lib.tu_tick
_ETIME: Final = -errno.ETIME

INTERRUPTION: Final = 0
"""user_data of a CQE that no SQE caused: a wait ended early (a signal), and nothing else happened."""

_BASE: Final = Setup.R_DISABLED | Setup.CQSIZE | Setup.CLAMP
_LADDER: Final = (
    _BASE | Setup.SUBMIT_ALL | Setup.TASKRUN_FLAG | Setup.SINGLE_ISSUER | Setup.DEFER_TASKRUN,  # 6.1
    _BASE | Setup.SUBMIT_ALL | Setup.TASKRUN_FLAG | Setup.SINGLE_ISSUER | Setup.COOP_TASKRUN,  # 6.0
    _BASE | Setup.SUBMIT_ALL | Setup.TASKRUN_FLAG | Setup.COOP_TASKRUN,  # 5.19
    _BASE | Setup.SUBMIT_ALL,  # 5.18
    _BASE,  # 5.11
)
PREFERRED: Final = _LADDER[0]
"""The set-up flags a ring has where the kernel knows them all."""

# A submission thread excludes every flag about task work.
_SQPOLL_LADDER: Final = (
    _BASE | Setup.SQPOLL | Setup.SUBMIT_ALL | Setup.SINGLE_ISSUER,
    _BASE | Setup.SQPOLL | Setup.SUBMIT_ALL,
    _BASE | Setup.SQPOLL,
)

_MAX_ENTRIES: Final = 32768
_MAX_CQ_ENTRIES: Final = 65536
_MAX_IN_FLIGHT: Final = 1 << 19  # half of what a token's index can tell apart; readiness polls have the other half
_MAX_WORKERS: Final = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class RingConfig:
    """How the ring of a run is set up.

    Args:
        entries: Size of the submission queue, 1 to 32768; the kernel rounds up to a power of two. More
            operations than this in one tick cost one more system call per ``entries``.
        cq_entries: Size of the completion queue; by default large enough for ``max_in_flight``.
        max_in_flight: How many operations may be in flight at once. Further ones wait their turn, first
            come, first served. Waits for readiness (``trio.lowlevel.wait_readable`` and everything built on
            it) do not count.
        max_workers: Upper limit of the kernel's worker threads for this ring: one for bounded work
            (regular files), one for unbounded work (pipes, ttys, FIFOs). 0 keeps the kernel's default.
        sqpoll: Let a kernel thread poll the submission queue. It occupies a core; measure first.
        mode: ``"auto"`` uses io_uring where it can be had and otherwise warns and runs without;
            ``"require"`` raises :exc:`UnavailableError` instead; ``"off"`` runs without.
            The environment variable ``TRIO_URING`` overrides it.

    Raises:
        ValueError: a number out of range, an unknown mode.
    """

    entries: int = 256
    cq_entries: int | None = None
    max_in_flight: int = 16384
    max_workers: tuple[int, int] = (0, 256)
    sqpoll: bool = False
    mode: Literal["auto", "require", "off"] = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.entries <= _MAX_ENTRIES:
            raise ValueError(f"entries must be 1 to {_MAX_ENTRIES}, not {self.entries}")
        if self.cq_entries is not None and not self.entries <= self.cq_entries <= _MAX_CQ_ENTRIES:
            raise ValueError(f"cq_entries must be {self.entries} (entries) to {_MAX_CQ_ENTRIES}, not {self.cq_entries}")
        if not 1 <= self.max_in_flight <= _MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight must be 1 to {_MAX_IN_FLIGHT}, not {self.max_in_flight}")
        workers = list(self.max_workers)
        if len(workers) != 2 or not all(0 <= n <= _MAX_WORKERS for n in workers):
            raise ValueError(f"max_workers must be two numbers from 0 to {_MAX_WORKERS}, not {self.max_workers}")
        check_mode(self.mode, "mode")

    @property
    def effective_cq_entries(self) -> int:
        """The completion queue's size that is asked of the kernel."""
        if self.cq_entries is not None:
            return self.cq_entries
        return min(max(self.max_in_flight, 2 * self.entries), _MAX_CQ_ENTRIES)

    @property
    def effective_mode(self) -> str:
        """The mode after the environment variable ``TRIO_URING`` has had its say."""
        return mode_from_environment() or self.mode


def check_mode(mode: str, source: str) -> str:
    """``mode`` if it is one; ``source`` names where it came from."""
    if mode not in ("auto", "require", "off"):
        raise ValueError(f'{source} must be "auto", "require" or "off", not {mode!r}')
    return mode


def mode_from_environment() -> str | None:
    """What ``TRIO_URING`` asks for, or None. Read before any io_uring system call: some sandboxes kill for one."""
    mode = os.environ.get("TRIO_URING")
    return check_mode(mode.lower(), "the environment variable TRIO_URING") if mode else None


class Form(NamedTuple):
    """How positional arguments fill an SQE, in C.

    Attributes:
        letters: what each is; see ``native/fill.c``.
        fd, off, length, op_flags: the fields where no argument says otherwise.
    """

    letters: str
    fd: int = -1
    off: int = 0
    length: int = 0
    op_flags: int = 0


@functools.cache
def _in_c(head: int, form: Form) -> tuple[Any, Any]:
    """An entry that is blank but for what all have in common, and the letters."""
    blank = ffi.new(_CHARS, SQE_SIZE)
    pack_sqe(ffi.buffer(blank), 0, head, form.fd, form.off, 0, form.length, form.op_flags)
    return blank, ffi.new(_CHARS, form.letters.encode())


class SQEs:
    """Memory for submission queue entries."""

    __slots__ = ("_memory", "_size")

    def __init__(self, capacity: int) -> None:
        self._size = SQE_SIZE * capacity
        self._memory = ffi.new(_CHARS, self._size)

    @property
    def memory(self) -> Any:
        """The entries, for C."""
        return self._memory

    def views(self) -> tuple[memoryview, Any]:
        """The same memory in bytes, for `pack_sqe`, and in pointers."""
        return memoryview(ffi.buffer(self._memory)).cast("B"), ffi.cast(_POINTERS, self._memory)

    @classmethod
    def of_rows(cls, head: int, form: Form, rows: list[tuple[Any, ...]], file: object) -> tuple[SQEs, Any] | None:
        """Filled in C, one for each tuple of arguments; and what holds their buffers. None if there is something out
        of the ordinary in one.

        Args:
            head: the first four bytes of each.
            form: what the arguments are.
            rows: the arguments.
            file: what stands for the fd in all of them, if it is not known yet.
        """
        sqes = cls(len(rows))
        pins = lib.tu_new_pins(len(rows))
        if pins == ffi.NULL:
            raise MemoryError
        pins = ffi.gc(pins, lib.tu_free_pins)
        blank, letters = _in_c(head, form)
        address = ffi.NULL if file is None else ffi.cast("void *", id(file))
        good = lib.tu_fill(sqes._memory, blank, letters, ffi.cast("void *", id(rows)), address, pins)
        return (sqes, pins) if good else None

    def weave(
        self,
        sqes: SQEs,
        start: int,
        lanes: int,
        steps: int,
        step: int,
        link: int,
        opened: Sequence[int] | None,
        used: Sequence[int] | None,
    ) -> None:
        """Puts in one step of ``lanes`` chains of so many steps.

        Args:
            sqes: the step of each chain, and of others before ``start`` and behind.
            link: the ``IOSQE_*`` flag that ties it to the next one, or 0.
            opened, used: the places of the direct descriptors that it opens or names.
        """
        null = ffi.NULL
        lib.tu_weave(
            self._memory,
            sqes._memory + SQE_SIZE * start,
            lanes,
            steps,
            step,
            link,
            null if opened is None else opened,
            null if used is None else used,
        )

    def fields(self, index: int) -> tuple[int, int, int, int, int]:
        """``fd, off, addr, length, op_flags`` of an entry."""
        _, *fields = _fields.unpack_from(ffi.buffer(self._memory), index << 6)
        return tuple(fields)

    def set_field(self, index: int, field: Literal["fd", "off", "length", "file_index"], value: int) -> None:
        """Changes a field of an entry."""
        form, at = _FIELDS[field]
        form.pack_into(ffi.buffer(self._memory), (index << 6) + at, value)


def does_not_fit(exc: struct.error, values: Iterable[object]) -> OverflowError | TypeError:
    """The error for values that cannot be put into an entry."""
    error = OverflowError if all(isinstance(value, int) for value in values) else TypeError
    return error(f"an argument does not fit the submission queue entry: {exc}")


class SubmissionQueue(Queue):
    """SQEs staged in memory of ours, numbered from 0 in the order in which they are staged.

    ``base`` is the number of the first entry the kernel has not been given, ``tail`` the number of the next to be
    staged. ``rescued`` holds CQEs of a tick that failed. `Ring` and the simulated ring of `trio_uring.testing` share
    this part.
    """

    __slots__ = ("rescued",)

    def __init__(self, capacity: int = 512) -> None:
        self._make_room(capacity)
        self.rescued: list[int] = []

    def _make_room(self, capacity: int) -> None:
        sqes = SQEs(capacity)
        self._move_to(capacity, int(ffi.cast("uintptr_t", sqes.memory)), sqes, sqes.memory, *sqes.views())

    def _grow(self) -> None:
        self._make_room(2 * self.capacity)

    def stage(
        self,
        head: int,
        fd: int,
        off: int,
        addr: int,
        length: int,
        op_flags: int,
        user_data: int,
        pin: Any = None,
        extra: tuple[int, int, int, int] | None = None,
    ) -> int:
        """Stages one SQE and returns its number.

        Args:
            head: ``opcode | sqe flags << 8 | ioprio << 16``.
            fd, off, addr, length, op_flags, user_data: the SQE's fields of that meaning. ``off`` -1 is "the
                file's position".
            pin: a cffi pointer or array that becomes ``addr``. The caller keeps it alive.
            extra: ``buf_index, personality, file_index, addr3``, for the opcodes that use them.

        Raises:
            OverflowError: a value does not fit its field. Nothing is staged.
            TypeError: a value is not an integer. Nothing is staged.
        """
        if pin is not None:
            if not isinstance(pin, ffi.CData):
                raise TypeError(f"what is pinned must be a cffi pointer or array, not {pin!r}")
            addr = int(ffi.cast("uintptr_t", pin))
            pin = None  # a traceback keeps this frame
        return self.put(head, fd, off, addr, length, op_flags, user_data, *(extra or _NO_EXTRA))

    def stage_job(self, entries: Any, n: int, token: int) -> int:
        """Stages ``n`` filled SQEs with user_data ``token | position << 20``; returns the first one's number.

        Args:
            entries: cffi memory with the SQEs. It is copied.
            n, token: see `Job`.
        """
        return self.put_job(int(ffi.cast("uintptr_t", entries)), n, token)

    def set_field(self, number: int, field: Literal["fd", "off", "length", "file_index"], value: int) -> None:
        """Changes a field of a staged entry."""
        self._sqes.set_field(number - self.base, field, value)

    def is_staged(self, number: int) -> bool:
        """True while the kernel does not know of this entry."""
        return number >= self.base

    def neutralise(self, number: int) -> None:
        """Takes a staged entry back: the kernel will never see it."""
        if number == self.tail - 1:
            self.tail = number
        else:
            self._bytes[(number - self.base) << 6] = _NEUTRALISED

    @property
    def staged(self) -> int:
        """How many entries wait for the next tick."""
        return self.tail - self.base


class Ring(SubmissionQueue):
    """One io_uring instance. Created disabled by any thread, then used by the thread that calls `enable`.

    Args:
        config: see `RingConfig`.

    Raises:
        UnavailableError: the kernel, a sandbox or a limit forbids it; the message says which.
    """

    __slots__ = ("_cqes", "_handed_out", "_ring", "config", "supported")

    def __init__(self, config: RingConfig) -> None:
        super().__init__()
        self.config = config
        self._ring: Any = None
        self._handed_out = 0
        ring = lib.tu_new()
        if ring == ffi.NULL:
            raise MemoryError
        try:
            self._open(ring)
            self.supported = _probe(ring)
        except BaseException:
            lib.tu_free(ring)
            raise
        self._ring = ring
        self._cqes = memoryview(ffi.buffer(ring.cqes, 24 * lib.TU_CQES_PER_TICK)).cast("B").cast("q")

    def _open(self, ring: Any) -> None:
        config = self.config
        for flags in _SQPOLL_LADDER if config.sqpoll else _LADDER:
            res = lib.tu_open(ring, config.entries, config.effective_cq_entries, flags)
            if res == 0:
                return
            if res != -errno.EINVAL:
                break
        raise unavailable(-res)

    def enable(self) -> None:
        """Makes the calling thread the owner: only it may call `tick`, `flush` and `register_eventfd` from now on."""
        self._check(lib.tu_enable(self._live(), *self.config.max_workers))

    def tick(self, timeout: float) -> list[int]:
        """Submits what is staged, waits for a completion, reaps. No system call if there is nothing to do.

        Args:
            timeout: seconds to wait for the first completion; 0 does not wait.

        Returns:
            ``[user_data, res, flags, ...]``, three numbers for each CQE; empty if and only if the time-out expired.
            A wait that ended early for another reason gives one CQE with user_data `INTERRUPTION`.

        Raises:
            RingError: forked child, foreign thread, closed ring, a lost completion.
        """
        nanoseconds = int(timeout * 1e9) if timeout else 0
        tail = self.tail
        try:
            got = _tick(self._ring, self._memory, tail - self.base, nanoseconds)
            if got > 0:
                self._consumed(tail - self.base)
                events = self._cqes[: 3 * got].tolist()
                self._handed_out += got
                return events
            if got == _ETIME:
                self._consumed(tail - self.base)
                return []
        except BaseException:  # from a signal handler; or the ring is closed
            self._recover(self._live())
            raise
        return self._troubled_tick(got)

    def _troubled_tick(self, got: int) -> list[int]:
        ring = self._ring
        if got == -errno.EOWNERDEAD:
            self._check(got)
        self._recover(ring)
        if got in (-errno.EINTR, -errno.EAGAIN):
            events, self.rescued = self.rescued, []
            return events or [INTERRUPTION, 0, 0]
        self._check(got)
        raise AssertionError(got)

    def _recover(self, ring: Any) -> None:
        """After trouble in a tick: neither entries that were taken nor CQEs that were reaped may be forgotten."""
        self._count_taken(ring)
        missed = ring.cqes_seen - self._handed_out
        self.rescued += self._cqes[: 3 * missed].tolist()
        self._handed_out += missed

    def _count_taken(self, ring: Any) -> None:
        """What the shim has taken must not be staged again, whatever went wrong afterwards."""
        self._consumed(ring.taken - self.base)

    def flush(self) -> None:
        """Gives everything staged to the kernel now. Completions stay in the ring for the next tick."""
        ring = self._live()
        self._count_taken(ring)  # a finaliser may flush when a tick has just been made
        try:
            res = lib.tu_flush(ring, self._memory, self.staged)
        finally:
            self._count_taken(ring)
        self._check(res)

    def pending(self) -> bool:
        """Is there something to reap? Any thread may ask."""
        res: int = self._check(lib.tu_pending(self._live()))
        return bool(res)

    def register_eventfd(self, fd: int) -> None:
        """Has the kernel signal ``fd`` at completions. To be called anew before each wait on ``fd``: the kernel
        signals a completion that an eventfd caused only once per registration. With -1 none is signalled any more.
        """
        self._check(lib.tu_register_eventfd(self._live(), fd))

    def set_job(self, slot: int, job: Any) -> None:
        """From now on the CQEs of a job are counted off in ``job``, a ``struct tu_job *``; NULL ends that.

        A CQE with the job's token tells of its end; one with a position in it and F_MORE of one of its requests.
        """
        self._check(lib.tu_set_job(self._live(), slot, job))

    def register_files(self, n: int) -> None:
        """Makes a table of ``n`` places for direct descriptors. Once in a ring's life."""
        self._check(lib.tu_register_files(self._live(), n))

    def put_file(self, place: int, fd: int) -> None:
        """Puts an open file into the table. It stays open there, whoever closes the fd.

        Raises:
            OSError: EBADF: there is no such fd, or it is a ring's.
        """
        self._check(lib.tu_put_file(self._live(), place, fd))

    def clear_files(self, places: Sequence[int]) -> None:
        """Closes the direct descriptors in these places, if there are any. Places in a row take one system call."""
        self._check(lib.tu_clear_files(self._live(), places, len(places)))

    def register_buffers(self, n: int) -> None:
        """Makes a table of ``n`` places for fixed buffers. Once in a ring's life."""
        self._check(lib.tu_register_buffers(self._live(), n))

    def update_buffer(self, index: int, address: int, size: int) -> None:
        """Puts a fixed buffer into its place; size 0 takes it out. What is in flight keeps its hold of the pages."""
        self._check(lib.tu_update_buffer(self._live(), index, ffi.cast("void *", address), size))

    def register_buffer_ring(self, entries: Any, n: int, group: int, flags: int) -> None:
        """Tells the kernel of a ring of provided buffers; see `BufferRing`."""
        self._check(lib.tu_register_buffer_ring(self._live(), entries, n, group, flags))

    def unregister_buffer_ring(self, group: int) -> None:
        """Ends that."""
        self._check(lib.tu_unregister_buffer_ring(self._live(), group))

    @property
    def fd(self) -> int:
        """The ring's file descriptor."""
        fd: int = self._live().ring_fd
        return fd

    @property
    def forked(self) -> bool:
        """True in a child of the process that made the ring."""
        return bool(lib.tu_pending(self._live()) == -errno.EOWNERDEAD)

    @property
    def setup_flags(self) -> Setup:
        """The set-up flags the kernel accepted."""
        return Setup(self._live().setup_flags)

    @property
    def features(self) -> Feature:
        """The features the kernel reports."""
        return Feature(self._live().features)

    @property
    def entries(self) -> tuple[int, int]:
        """Sizes of the submission and the completion queue, as the kernel made them."""
        ring = self._live()
        return ring.sq_entries, ring.cq_entries

    def counters(self) -> dict[str, int]:
        """Totals so far: ``enters, submits, sqes, cqes, overflows, stalls``."""
        ring = self._live()
        return {
            "enters": ring.enters,
            "submits": ring.submits,
            "sqes": ring.sqes,
            "cqes": ring.cqes_seen + ring.cqes_in_jobs,
            "overflows": ring.overflows,
            "stalls": ring.stalls,
        }

    def close(self) -> None:
        """Closes the ring. Idempotent.

        This does **not** end the kernel's use of memory named in SQEs. Reap the last CQE of every operation first.
        """
        ring, self._ring = self._ring, None
        if ring is not None:
            self._cqes.release()
            lib.tu_free(ring)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._ring is None

    def __del__(self) -> None:
        # An attribute may be missing if __init__ failed early.
        if getattr(self, "_ring", None) is not None:
            self.close()

    def __repr__(self) -> str:
        return "<Ring closed>" if self.closed else f"<Ring fd={self.fd} {self.setup_flags!r} staged={self.staged}>"

    def _live(self) -> Any:
        if self._ring is None:
            raise RingError("this ring is closed")
        return self._ring

    def _check(self, res: int) -> int:
        if res >= 0:
            return res
        if res == -errno.EOWNERDEAD and self._ring is not None and not self.forked:
            raise RingError("the kernel thread that polls this ring's submission queue has died")
        if res == -errno.EOWNERDEAD:
            raise not_in_a_child()
        if res == -errno.EEXIST:
            raise RingError("this ring belongs to another thread; only the thread that enabled it may use it")
        if res == -errno.EBADR:
            raise RingError(
                "the kernel dropped a completion for lack of memory; operations in flight cannot be trusted"
            )
        if res == -errno.EBADFD:
            raise RingError("this ring is not enabled yet")
        raise OSError(-res, f"io_uring: {os.strerror(-res)}")


class BufferRing(Buffers):
    """Buffers the kernel takes from when data is there, instead of one for each receive that waits.

    The kernel tells which buffer it has filled by number; `take` is that data, and the buffer goes back with
    `give_back`. `copy` does both. With incremental consumption one buffer serves several receives, until it is full.

    Args:
        ring: the ring whose receives use it, or a simulated one.
        count: how many buffers, a power of two up to 32768.
        size: bytes of each.
        group: its number, which receives name.
        incremental: whether to ask for incremental consumption.

    Attributes:
        incremental: whether the kernel has it.
        out: how many buffers are ours at the moment.
    """

    def __init__(self, ring: Any, count: int, size: int, group: int, *, incremental: bool = False) -> None:
        self.count = count
        self.size = size
        self.group = group
        self.out = count
        self._ring = ring
        self._entries = mmap.mmap(-1, max(count * ffi.sizeof("struct tu_buffer"), mmap.PAGESIZE))
        self._memory = mmap.mmap(-1, count * size)
        self._entries_pin = ffi.from_buffer("struct tu_buffer[]", self._entries)
        self._memory_pin = ffi.from_buffer(self._memory)
        self.entries, self.memory = (int(ffi.cast("uintptr_t", pin)) for pin in (self._entries_pin, self._memory_pin))
        self._used = [0] * count
        self.view = memoryview(self._memory)
        try:
            ring.register_buffer_ring(self._entries_pin, count, group, PBUF_RING_INC if incremental else 0)
        except OSError:
            if not incremental:
                raise
            incremental = False
            ring.register_buffer_ring(self._entries_pin, count, group, 0)
        self.incremental = incremental
        self.give_back(range(count))

    def take(self, flags: int, length: int) -> tuple[int, int, bool]:
        """What a CQE with ``flags`` has received: ``(buffer, start, whether the buffer is ours now)``.

        The data is ``view[start : start + length]``.
        """
        buffer = flags >> CQE_BUFFER_SHIFT
        start = buffer * self.size + self._used[buffer]
        # What has received nothing into a shared buffer has not consumed it, though not every kernel says so.
        if flags & CQE_F_BUF_MORE or (self.incremental and not length):
            self._used[buffer] += length
            return buffer, start, False
        self._used[buffer] = 0
        self.out += 1
        return buffer, start, True

    def give_back(self, buffers: Collection[int]) -> None:
        """The kernel may use them again."""
        mask = self.count - 1
        for tail, buffer in enumerate(buffers, self.tail):
            at = (tail & mask) * _BUFFER_SIZE
            _fill_buffer(self._entries, at, self.memory + buffer * self.size, self.size, buffer)
        lib.tu_provide(self._entries_pin, len(buffers))
        self.tail += len(buffers)
        self.out -= len(buffers)

    def close(self) -> None:
        """Takes it from the kernel. No receive may be using it any more. The memory goes with the last view of it."""
        self._ring.unregister_buffer_ring(self.group)


def _probe(ring: Any) -> frozenset[int]:
    supported = ffi.new("uint8_t[256]")
    res = lib.tu_probe(ring, supported, 256)
    if res < 0:
        raise unavailable(-res)
    return frozenset(op for op in range(256) if supported[op])


@dataclass(frozen=True)
class Capabilities:
    """What io_uring offers here: measured by setting up a ring, never guessed from a version number.

    Attributes:
        kernel: release of the running kernel.
        liburing: version of the headers this was built with.
        setup_flags: set-up flags the kernel accepted, by name.
        features: features the kernel reports, by name.
        operations: operations the kernel supports, by name.
        missing: operations known to this library that the kernel lacks, by name.
    """

    kernel: str
    liburing: str
    setup_flags: tuple[str, ...]
    features: tuple[str, ...]
    operations: tuple[str, ...]
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, str | list[str]]:
        """The same as plain lists and strings, ready for JSON."""
        return {k: v if isinstance(v, str) else list(v) for k, v in vars(self).items()}

    def __str__(self) -> str:
        return "\n".join(
            (
                f"kernel      {self.kernel}",
                f"liburing    {self.liburing}",
                f"set-up      {' '.join(self.setup_flags)}",
                f"features    {' '.join(self.features)}",
                f"operations  {len(self.operations)} supported",
                f"missing     {' '.join(self.missing) or 'none'}",
            )
        )


@contextlib.contextmanager
def _trial_ring() -> Iterator[Ring]:
    if mode_from_environment() == "off":
        raise UnavailableError(errno.EPERM, "the environment variable TRIO_URING switches io_uring off")
    ring = Ring(RingConfig(entries=2, max_in_flight=4))
    try:
        yield ring
    finally:
        ring.close()


def capabilities() -> Capabilities:
    """What io_uring offers in this process.

    Raises:
        UnavailableError: it is not available; see `why_not`.
    """
    with _trial_ring() as ring:
        return Capabilities(
            kernel=os.uname().release,
            liburing=f"{lib.TU_LIBURING_MAJOR}.{lib.TU_LIBURING_MINOR}",
            setup_flags=tuple(flag.name or "" for flag in Setup if flag in ring.setup_flags),
            features=tuple(flag.name or "" for flag in Feature if flag in ring.features),
            operations=tuple(op.name for op in Opcode if op in ring.supported),
            missing=tuple(op.name for op in Opcode if op not in ring.supported),
        )


def why_not() -> str | None:
    """One sentence that says why io_uring is not available here, with the remedy; None if it is."""
    try:
        with _trial_ring():
            return None
    except UnavailableError as exc:
        return exc.strerror or str(exc)


def is_available() -> bool:
    """True if a ring can be set up in this process, now."""
    return why_not() is None
