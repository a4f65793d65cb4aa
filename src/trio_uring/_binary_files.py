"""The binary layers of a file: raw, on an fd; buffered, on a raw one.

The data path of a buffered read: what is wanted comes out of the *window*, an `io.BytesIO` over the bytes of the last
read. When they do not suffice the task takes the file's turn, and `RawFile._fetch` reads the next bytes through the
ring into a new ``bytes`` object, which becomes the window. Writes collect in a ``bytearray`` that goes to the ring when
it is full.

Who owns what: the raw file owns the fd, the turn and what was read ahead; the buffered file owns the window and the
bytes that wait to be written, never both at a time. `_text_files` adds the layer that decodes. An `AsyncFile` is the
top layer of such a pile; what begins with an underscore in a layer is for the layers above it.

What follows from the kernel and from `io`:

* Reads and writes use the file's own position, as `io` does, so a shared fd, ``O_APPEND`` and pipes need no care of
  their own. Two reads at once would both begin there, so one task at a time has the *turn*; others queue for it.
* `os.lseek`, `os.fstat` and `os.isatty` look at memory and are called as they are. A statx through the ring would take
  a kernel worker each time.
* **A write goes to the ring, although a kernel worker has to do it on ext4** (18 to 60 microseconds for 4 KiB, a plain
  write(2) 4). For that one has no bound: beyond the limit of dirty pages the kernel makes the writer pause, up to 0.2
  seconds at a time, and a part of a page that is not cached is read from the disk first. A write that refuses to wait
  (``RWF_NOWAIT``) would be the way, but ext4 does not know it (Linux 6.18). A read that refuses to wait it does know:
  ``pread`` tries one first, and ``read()`` of a small file that has just been opened (`_page_cache`).
* The buffered layer asks for as much at a time as `io` would, so that positions, ``peek`` and the cookies of text agree
  with `io` byte for byte. Below it, a regular file that is read on and on is *read ahead* in growing pieces, for the
  price of one operation each. The fd's position is then further than `io` would have it; whatever depends on it moves
  it back first.
* A cancelled read loses nothing: what had come goes back to what is read ahead, on pipes too. A cancelled write has
  taken nothing of its data, unless a part is in the file already: then the buffer takes the rest and the call returns.
* A call that the buffer can serve needs no turn: while a task that has it waits, nobody else is served.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import stat
import sys
import warnings
from itertools import islice
from operator import index
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

import trio
from trio.lowlevel import ParkingLot, checkpoint, checkpoint_if_cancelled, enable_ki_protection

from ._cancel import raise_later
from ._core import MAX_RW_COUNT, _this_thread, notify_closing
from ._errors import UnsupportedOperation as MissingInKernel
from ._file_ops import READ, WRITE, fadvise, fallocate, fdatasync, fsync, ftruncate, readv, writev
from ._page_cache import GUESS, read_cached, read_piece
from ._structs import CHARS, from_buffer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from typing_extensions import Buffer

    Piece = tuple[Buffer, int, int]
    """What has been read, where it begins in it, and its size."""

T = TypeVar("T")

CALLS_PER_CHECKPOINT: Final = 100
"""How many calls in a row the buffer may serve before it is asked when the last checkpoint was."""
CHECKPOINT_SECONDS: Final = 0.001
"""How long ago it must be for the next call to be one."""

_READ_AHEAD_MAX: Final = 1 << 18
_CLOSED: Final = "I/O operation on closed file."
_NEWLINE: Final = 10
_EMPTY: Final = io.BytesIO()


def protected(cls: type[T]) -> type[T]:
    """A class whose async methods Ctrl-C does not interrupt half-way: what they have read would be lost."""
    for member in vars(cls).values():
        if inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member):
            enable_ki_protection(member)
    return cls


class Turn:
    """Who may use a file: one task at a time, in the order they came.

    Attributes:
        served: how many calls there have been, more or less: it changes whenever somebody has used the file.
        limit: the buffer may serve calls until there have been so many. 0 while a task has the turn, and once the file
            is closed.
    """

    __slots__ = ("_closed", "_limit", "_queue", "_since", "_taken", "limit", "served")

    def __init__(self) -> None:
        self.served = 0
        self._since = monotonic()
        self.limit = self._limit = CALLS_PER_CHECKPOINT
        self._taken = False
        self._closed = False
        self._queue: ParkingLot | None = None

    async def __aenter__(self) -> None:
        if not self.take():
            await self.wait()

    async def __aexit__(self, *exc: object) -> None:
        self.give_up()

    def take(self) -> bool:
        """Takes the turn, if nobody has it and no checkpoint is due."""
        if self.served >= self.limit and not self.extend():
            return False
        self.served += 1
        self._taken = True
        self._limit = self.limit
        self.limit = 0
        return True

    def extend(self) -> bool:
        """Lets the buffer serve more calls, if the last checkpoint was not long ago."""
        if self._taken or self._closed or monotonic() - self._since > CHECKPOINT_SECONDS:
            return False
        self.limit = self.served + CALLS_PER_CHECKPOINT
        return True

    async def wait(self) -> None:
        """Takes it after a checkpoint, when those who came before have had it."""
        if not self._taken:
            await checkpoint()
        if self._taken:
            if self._queue is None:
                self._queue = ParkingLot()
            await self._queue.park()
        self.served += 1
        self._taken = True
        self.limit = 0
        self.renew()

    def give_up(self) -> None:
        """Others may go on."""
        if self._queue:
            self._queue.unpark()
        else:
            self._taken = False
            self.limit = 0 if self._closed else self._limit

    def renew(self) -> None:
        """The task that has the turn makes a checkpoint."""
        self._since = monotonic()
        self._limit = self.served + CALLS_PER_CHECKPOINT

    async def checkpoint(self) -> None:
        """A checkpoint for the task that has the turn."""
        await checkpoint()
        self.renew()

    def close(self) -> None:
        """Nothing is served from the buffer any more."""
        self._closed = True
        self.served += 1
        self.limit = 0


def _size_of(data: Buffer) -> int:
    """How many bytes there are in a bytes-like object."""
    try:
        return memoryview(data).nbytes
    except TypeError:
        raise TypeError(f"a bytes-like object is required, not {type(data).__name__!r}") from None


def _room_in(buffer: Buffer, name: str) -> int:
    """How many bytes may be read into it."""
    try:
        view = memoryview(buffer)
    except TypeError:
        view = memoryview(b"")
    if view.readonly or not view.c_contiguous:
        raise TypeError(f"{name}() argument must be read-write bytes-like object, not {type(buffer).__name__}")
    return view.nbytes


def _from(buffer: Buffer, start: int) -> Buffer:
    """Its bytes from there on. Not to be kept: in a traceback it would be an export for longer than it should."""
    return memoryview(buffer).cast("B")[start:] if start else buffer


def as_size(size: int | None) -> int:
    """How much to read; -1 is everything."""
    return -1 if size is None else index(size)


def _begun(lines: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """The generator after its first value. An async generator costs a loop half of what a coroutine for each line does.

    The run is not told of it: nothing has to be awaited when a loop is left early, so nobody need close it.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        lines.__anext__().send(None)
    except StopIteration:
        return lines
    finally:
        sys.set_asyncgen_hooks(*hooks)
    raise AssertionError("the first value is there without waiting")


class Reading:
    """While a file is read: if that fails, what it has read is put back. Then the turn is given up, if it is given.

    Args:
        file: what is read.
        turn: the task's.
    """

    __slots__ = ("_file", "_mark", "_turn")

    def __init__(self, file: AsyncFile, turn: Turn | None = None) -> None:
        self._file = file
        self._turn = turn

    def __enter__(self) -> None:
        try:
            self._file._check_open()
            self._mark = self._file._begin_reading()
        except BaseException:
            self._end()
            raise

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._file._end_reading(self._mark, exc)
        self._end()

    def _end(self) -> None:
        if self._turn is not None:
            self._turn.give_up()


class _Detached:
    """Stands where the layer below was."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(self._message)


@protected
class AsyncFile(trio.abc.AsyncResource):
    """A file on the ring: what `open_file` returns.

    It has the methods and properties of the file object that `open` would return for the same arguments, and no others:
    a text file has no ``readinto``, an unbuffered one no ``peek``. Those that may have to wait are async. Results,
    positions and errors are those of `io`.

    One task at a time uses the file; others wait for their turn, in order. Only `aclose` does not wait for a read:
    the task that reads gets `trio.ClosedResourceError`.

    **Checkpoints.** Every async method is one, with an exception: a call that the buffer can serve (a line that has
    been read already, a small write), or for a small file just opened the page cache (a ``read()`` of all of it),
    returns at once. The first of every hundred looks at the clock: if the last checkpoint was more than a millisecond
    ago, it is one. In a cancelled scope such a write, and such a ``read()``, is cancelled all the same.

    **Cancelling.** A cancelled read loses nothing: what had come is there for the next one, on a pipe, too. A cancelled
    write has taken nothing of its data. If a part of it is in the file already it is not cancelled any more: the buffer
    takes the rest, the call returns, and the next checkpoint raises. An unbuffered write returns how much was written.
    """

    __slots__ = ("__weakref__", "_raw", "_turn")

    _raw: RawFile
    _turn: Turn

    # What each layer does in its way

    async def read(self, size: int | None = -1, /) -> Any:
        """Reads up to ``size`` characters or bytes; without a size everything up to the end."""
        raise NotImplementedError

    async def write(self, data: Any, /) -> int:
        """Writes ``data``, text or bytes-like as the file is; returns how much of it was taken."""
        raise NotImplementedError

    async def readline(self, size: int | None = -1, /) -> Any:
        """Reads a line, of at most ``size`` characters or bytes. Empty at the end of the file."""
        raise NotImplementedError

    async def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to a position and returns it. Text: to what `tell` has returned, to the start, or to the end."""
        raise NotImplementedError

    async def tell(self) -> int:
        """The position; that of a text file only means something to `seek`."""
        raise NotImplementedError

    async def truncate(self, size: int | None = None, /) -> int:
        """Sets the file's size; by default to the position, which does not move. IORING_OP_FTRUNCATE, Linux 6.9, or a
        plain ftruncate(2).
        """
        raise NotImplementedError

    async def _readlines(self, hint: int) -> list[Any]:
        raise NotImplementedError

    def _begin_reading(self) -> Any:
        """Takes notice of where reading begins."""
        raise NotImplementedError

    def _end_reading(self, mark: Any, exc: BaseException | None) -> None:
        """Goes back there if it has failed."""
        raise NotImplementedError

    def _check_open(self, what: str = "") -> None:
        raise NotImplementedError

    def _check_writable(self) -> None:
        raise NotImplementedError

    @property
    def _has_unwritten(self) -> bool:
        raise NotImplementedError

    async def _drain(self) -> None:
        """Writes what waits to be written."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Leaves the fd where `io` would, for others that share it."""
        raise NotImplementedError

    async def _flush(self) -> None:
        raise NotImplementedError

    # What is the same for all

    async def _undoing(self, method: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Calls a method that reads, with the turn. If it fails, what it has read is as if it had not been."""
        turn = self._turn
        if not turn.take():
            await turn.wait()
        with Reading(self, turn):
            return await method(*args)

    async def readlines(self, hint: int | None = -1, /) -> list[Any]:
        """Reads all lines, or as many as have not more than ``hint`` characters or bytes and one more."""
        self._check_open()
        return await self._undoing(self._readlines, as_size(hint))

    async def writelines(self, lines: Iterable[Any], /) -> None:
        """Writes each of ``lines``; nothing is added to them. Those written before a cancel stay written."""
        self._check_open()
        await checkpoint()
        for line in lines:
            await self.write(line)

    async def flush(self) -> None:
        """Writes what the buffer holds. A cancelled flush has written a part of it, the rest is still there."""
        self._check_open("flush")
        async with self._turn:
            if not self._has_unwritten:
                await self._turn.checkpoint()
            self._check_open("flush")
            await self._flush()

    async def aclose(self) -> None:
        """Writes what the buffer holds and closes the file, also if it is cancelled or the write fails.

        The write cannot be cancelled: on a pipe that nobody reads it waits. Closing it again does nothing. With nothing
        to write it lets no other task run, but raises `trio.Cancelled` in a cancelled scope, when the file is closed.
        """
        raw = self._raw
        try:
            if not raw.closed and self._has_unwritten:
                with trio.CancelScope(shield=True):
                    async with self._turn:
                        if not raw.closed:
                            await self._drain()
            if not raw.closed:
                self._leave()
        finally:
            raw._close()
        await checkpoint_if_cancelled()

    def __aiter__(self) -> AsyncIterator[Any]:
        return _begun(self._lines())

    async def __anext__(self) -> Any:
        line = await self.readline()
        if line:
            return line
        raise StopAsyncIteration

    async def _lines(self) -> AsyncGenerator[Any, None]:
        """First None, then the lines."""
        yield None
        while line := await self.readline():
            yield line

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        return self._raw.closed

    @property
    def name(self) -> Any:
        """What was opened: a path, as it was given, or an fd."""
        return self._raw.name

    @property
    def mode(self) -> str:
        """The mode, as that of the `io` object."""
        return self._raw.mode

    def fileno(self) -> int:
        """The fd. Who uses it should `flush` first, and not rely on its position while the file is read."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Is it a terminal?"""
        return self._raw.isatty()

    def readable(self) -> bool:
        """Can it be read?"""
        return self._raw.readable()

    def writable(self) -> bool:
        """Can it be written?"""
        return self._raw.writable()

    def seekable(self) -> bool:
        """Does it have a position that can be moved?"""
        return self._raw.seekable()

    # Straight to the ring: neither the buffer nor the position plays a part

    async def pread(self, size: int, offset: int, /) -> bytes:
        """Reads up to ``size`` bytes at ``offset``, as `os.pread`: past the buffer, which it does not see.

        Any number of tasks may do so at once. What the page cache has, up to 64 KiB, it has at once. For the rest
        IORING_OP_READ, Linux 5.6.
        """
        raw = self._raw
        fd = raw._fd
        if fd < 0 or offset < 0:
            raw._refuse(offset)
        if raw._asks_cache and 0 <= size <= GUESS:
            cached = raw._read_cached_piece(size, offset)
            if cached is not None:
                await checkpoint()
                return cached
        size = min(size, MAX_RW_COUNT)
        room = bytes(size)  # new, and nobody else's until it is returned
        count = await _this_thread.manager.perform(READ, fd, offset, from_buffer(CHARS, room), -1)
        return room if count == size else room[:count]

    async def pwrite(self, data: Buffer, offset: int, /) -> int:
        """Writes at ``offset``, as `os.pwrite`: past the buffer. Returns how many bytes. IORING_OP_WRITE, Linux 5.6."""
        raw = self._raw
        if raw._fd < 0 or offset < 0:
            raw._refuse(offset)
        raw._settle()
        return await _this_thread.manager.perform(WRITE, raw._fd, offset, from_buffer(CHARS, data), -1)

    async def preadv(self, buffers: Sequence[Buffer], offset: int, flags: int = 0, /) -> int:
        """Reads at ``offset`` into ``buffers``, as `os.preadv`; returns how many bytes. IORING_OP_READV, Linux 5.1."""
        self._raw._refuse(offset)
        return await readv(self._raw._fd, buffers, offset, flags)

    async def pwritev(self, buffers: Sequence[Buffer], offset: int, flags: int = 0, /) -> int:
        """Writes ``buffers`` at ``offset``, as `os.pwritev`; returns how many bytes. IORING_OP_WRITEV, Linux 5.1."""
        self._raw._refuse(offset)
        self._raw._settle()
        return await writev(self._raw._fd, buffers, offset, flags)

    async def fsync(self) -> None:
        """Flushes the buffer, then returns when data and metadata are on storage. IORING_OP_FSYNC, Linux 5.1."""
        await self._sync(fsync)

    async def datasync(self) -> None:
        """As `fsync`, without metadata that reading does not need, as `os.fdatasync`."""
        await self._sync(fdatasync)

    async def _sync(self, operation: Callable[[int], Awaitable[None]]) -> None:
        self._check_open("flush")
        if self._has_unwritten:
            async with self._turn:
                self._check_open("flush")
                await self._drain()
        await operation(self._raw.fileno())

    async def stat(self) -> os.stat_result:
        """The open file's metadata, as `os.fstat`, which it calls. What only the buffer holds is not in it."""
        await checkpoint()
        return os.fstat(self._raw.fileno())

    async def allocate(self, offset: int, length: int, mode: int = 0, /) -> None:
        """Allocates ``length`` bytes at ``offset``, as `os.posix_fallocate`; or does what the ``FALLOC_FL_*`` of
        ``mode`` say, see `trio_uring.lowlevel.fallocate`. IORING_OP_FALLOCATE, Linux 5.6.
        """
        await fallocate(self._raw.fileno(), mode, offset, length)

    async def advise(self, offset: int, length: int, advice: int, /) -> None:
        """Announces how a part of the file will be used, as `os.posix_fadvise`. IORING_OP_FADVISE, Linux 5.6.

        Args:
            offset: its first byte.
            length: how many bytes; 0 is all up to the end.
            advice: ``os.POSIX_FADV_*``.
        """
        await fadvise(self._raw.fileno(), offset, length, advice)

    def __repr__(self) -> str:
        raw = self._raw
        if isinstance(raw, _Detached):
            return "<trio_uring.AsyncFile [detached]>"
        state = " [closed]" if raw.closed else ""
        return f"<trio_uring.AsyncFile name={raw.name!r} mode={self.mode!r}{state}>"


@protected
class RawFile(AsyncFile):
    """An unbuffered file, as `io.FileIO`.

    Args:
        fd: open, and its own from now on.
        status: what `os.fstat` says of it.
        name, mode, closefd: as `io.FileIO` has them.
        just_opened: through the ring, by its name.
    """

    __slots__ = (
        "_ahead",
        "_ahead_left",
        "_asks_cache",
        "_block_size",
        "_closefd",
        "_fd",
        "_grows",
        "_growth",
        "_log",
        "_mode",
        "_name",
        "_readable",
        "_regular",
        "_seekable",
        "_size",
        "_writable",
    )

    def __init__(self, fd: int, status: os.stat_result, name: Any, mode: str, closefd: bool, just_opened: bool) -> None:
        self._fd = fd
        self._raw = self
        self._turn = Turn()
        self._name = name
        self._mode = mode
        self._closefd = closefd
        self._readable = "r" in mode or "+" in mode
        self._writable = "r" not in mode or "+" in mode
        self._regular = stat.S_ISREG(status.st_mode)
        self._seekable: bool | None = True if self._regular else None
        self._size = status.st_size if self._regular and just_opened else 0
        self._asks_cache = self._regular and just_opened
        self._block_size = status.st_blksize if status.st_blksize > 1 else io.DEFAULT_BUFFER_SIZE
        self._ahead = _EMPTY
        self._ahead_left = 0
        self._grows = self._regular and closefd
        self._growth = 0
        self._log: list[Piece] | None = None

    @property
    def closed(self) -> bool:
        """Is it closed?"""
        return self._fd < 0

    @property
    def closefd(self) -> bool:
        """Does closing it close the fd?"""
        return self._closefd

    @property
    def name(self) -> Any:
        """What was opened."""
        return self._name

    @property
    def mode(self) -> str:
        """The mode, as that of `io.FileIO`."""
        return self._mode

    def fileno(self) -> int:
        """The fd."""
        self._check_open()
        return self._fd

    def isatty(self) -> bool:
        """Is it a terminal?"""
        return os.isatty(self.fileno())

    def readable(self) -> bool:
        """Can it be read?"""
        self._check_open()
        return self._readable

    def writable(self) -> bool:
        """Can it be written?"""
        self._check_open()
        return self._writable

    def seekable(self) -> bool:
        """Does it have a position that can be moved?"""
        self._check_open()
        if self._seekable is None:
            try:
                os.lseek(self._fd, 0, os.SEEK_CUR)
                self._seekable = True
            except OSError:
                self._seekable = False
        return self._seekable

    async def read(self, size: int | None = -1, /) -> bytes:
        """Reads up to ``size`` bytes with one operation, or all there are."""
        self._check_readable()
        size = as_size(size)
        if size < 0:
            return await self.readall()
        async with self._turn:
            self._check_open()
            return await self._fetch(size)

    async def readall(self) -> bytes:
        """Reads up to the end."""
        self._check_open()
        return await self._undoing(self._read_all)

    async def readinto(self, buffer: Buffer, /) -> int:
        """Reads into ``buffer`` with one operation; returns how many bytes."""
        self._check_readable()
        room = _room_in(buffer, "readinto")
        async with self._turn:
            self._check_open()
            return await self._fetch_into(buffer, 0, room)

    async def readline(self, size: int | None = -1, /) -> bytes:
        """Reads a line, byte by byte as `io.FileIO`."""
        self._check_open()
        return await self._undoing(self._readline, as_size(size))

    async def write(self, data: Buffer, /) -> int:
        """Writes ``data`` with one operation; returns how many bytes were written, which may be fewer."""
        size = _size_of(data)
        self._check_writable()
        async with self._turn:
            self._check_open()
            return await self._put(data, size)

    async def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to a position and returns it."""
        self._check_open()
        async with self._turn:
            await self._turn.checkpoint()
            self._check_open()
            return self._seek(target, whence)

    async def tell(self) -> int:
        """The position."""
        self._check_open()
        async with self._turn:
            await self._turn.checkpoint()
            self._check_open()
            return self._tell()

    async def truncate(self, size: int | None = None, /) -> int:
        """Sets the file's size; by default to the position."""
        self._check_writable()
        async with self._turn:
            self._check_open()
            return await self._truncate(size)

    # For the layers above. All of it with the turn

    def _fetch_ahead(self, size: int) -> bytes | None:
        """One read of what has been read ahead; None if the file has to be read for it."""
        if size > self._ahead_left and (self._regular or not self._ahead_left):
            return None
        data = self._ahead.read(size)
        self._ahead_left -= len(data)
        if self._log is not None:
            self._log.append((data, 0, len(data)))
        return data

    async def _fetch(self, size: int) -> bytes:
        """One read, of what has been read ahead and of the file."""
        ahead = self._ahead_left
        if ahead:
            served = self._fetch_ahead(size)
            if served is not None:
                return served
        wanted = size - ahead
        if self._grows:
            wanted = max(wanted, self._growth)
            self._growth = min(2 * wanted, _READ_AHEAD_MAX)
        wanted = min(wanted, MAX_RW_COUNT)
        self._turn.renew()
        data = bytes(wanted)  # new, and nobody else's until it is returned
        count = await _this_thread.manager.perform(READ, self._fd, -1, from_buffer(CHARS, data), -1)
        if count < wanted:
            data = data[:count]
        if ahead:
            data = self._ahead.read() + data
            self._ahead_left = 0
        if len(data) > size:
            self._ahead_left = len(data) - size
            self._ahead = io.BytesIO(data)
            data = self._ahead.read(size)
        if self._log is not None:
            self._log.append((data, 0, len(data)))
        return data

    async def _fetch_into(self, buffer: Buffer, start: int, size: int) -> int:
        """The same, into memory of the caller's."""
        if self._ahead_left:
            data = await self._fetch(size)
            memoryview(buffer).cast("B")[start : start + len(data)] = data
            return len(data)
        self._turn.renew()
        count = await _this_thread.manager.perform(
            READ, self._fd, -1, from_buffer(CHARS, _from(buffer, start), True), -1
        )
        if self._log is not None:
            self._log.append((buffer, start, count))
        return cast("int", count)

    def _read_cached_piece(self, size: int, offset: int) -> bytes | None:
        """So many bytes from there on, if they need not be waited for."""
        try:
            return read_piece(self._fd, size, offset)
        except OSError:  # what is really wrong the ring's read will say
            self._asks_cache = False
            return None

    async def _fetch_small_file(self) -> bytes | None:
        """All of a file that has just been opened, if that is little and need not be waited for."""
        if not (self._asks_cache and 0 < self._size < GUESS) or self._ahead_left:
            return None
        await checkpoint_if_cancelled()
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        content, _ = read_cached(self._fd, start)
        if content is not None:
            self._size = 0
            os.lseek(self._fd, start + len(content), os.SEEK_SET)
        return content

    async def _read_all(self) -> bytes:
        size = self._size_left()
        data = await self._fetch(size + 1 if size else io.DEFAULT_BUFFER_SIZE)
        if not data or len(data) == size:  # short, and where the file ends
            return data
        pieces = [data]
        while data := await self._fetch(max(size + 1 - len(data), _READ_AHEAD_MAX)):
            pieces.append(data)
        return b"".join(pieces)

    def _size_left(self) -> int:
        """How much there seems to be of a regular file; 0 of what does not say."""
        if self._size:
            size, self._size = self._size, 0
            return size
        return max(0, os.fstat(self._fd).st_size - self._tell()) if self._regular else 0

    async def _readline(self, limit: int) -> bytes:
        if limit != 0:
            self._check_readable()
        line = bytearray()
        while limit < 0 or len(line) < limit:
            byte = await self._fetch(1)
            line += byte
            if not byte or byte == b"\n":
                break
        return bytes(line)

    async def _readlines(self, hint: int) -> list[bytes]:
        self._check_readable()
        return await lines_of(self._readline, hint)

    def _begin_reading(self) -> list[Piece]:
        log: list[Piece] = []
        self._log = log
        return log

    def _end_reading(self, mark: list[Piece], exc: BaseException | None) -> None:
        self._log = None
        if exc is not None:
            self._put_back(b"", mark)

    def _put_back(self, first: bytes, pieces: Iterable[Piece]) -> None:
        """All of that has not been read, after all."""
        data = b"".join((first, *(memoryview(b).cast("B")[i : i + n] for b, i, n in pieces), self._ahead.read()))
        self._ahead = io.BytesIO(data)
        self._ahead_left = len(data)

    def _settle(self) -> None:
        """Nothing is read ahead any more: the fd's position is that of the file."""
        if self._ahead_left and self.seekable():
            self._seek(0, os.SEEK_CUR)

    async def _put(self, data: Buffer, size: int, start: int = 0) -> int:
        """One write, of what begins there."""
        self._settle()
        self._turn.renew()
        before = os.lseek(self._fd, 0, os.SEEK_CUR) if self._regular else 0
        sent: int = await _this_thread.manager.perform(WRITE, self._fd, -1, from_buffer(CHARS, _from(data, start)), -1)
        if sent < size - start and self._regular and os.lseek(self._fd, 0, os.SEEK_CUR) == before:
            # An error has ended it after a part, on a full disk, say. The kernel has not moved the position then.
            os.lseek(self._fd, before + sent, os.SEEK_SET)
        return sent

    def _tell(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR) - self._ahead_left

    def _seek(self, target: int, whence: int) -> int:
        position = os.lseek(self._fd, target - self._ahead_left if whence == os.SEEK_CUR else target, whence)
        self._ahead = _EMPTY
        self._ahead_left = self._growth = 0
        return position

    async def _truncate(self, size: int | None) -> int:
        self._settle()
        size = self._tell() if size is None else size
        try:
            await ftruncate(self._fd, size)
        except MissingInKernel:
            os.ftruncate(self._fd, size)
        return size

    @property
    def _has_unwritten(self) -> bool:
        return False

    async def _drain(self) -> None:
        pass

    def _leave(self) -> None:
        self._settle()

    async def _flush(self) -> None:
        pass

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        self._turn.close()
        if fd >= 0 and self._closefd:
            notify_closing(fd)
            os.close(fd)

    def _check_open(self, what: str = "") -> None:
        if self._fd < 0:
            raise ValueError("I/O operation on closed file")

    def _check_readable(self) -> None:
        self._check_open()
        if not self._readable:
            raise io.UnsupportedOperation("File not open for reading")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("File not open for writing")

    def _refuse(self, offset: int) -> None:
        """Raises what is wrong with an operation at an offset, if something is."""
        self._check_open()
        if offset < 0:
            raise OSError(errno.EINVAL, f"{os.strerror(errno.EINVAL)}: the offset is negative")

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd < 0 or not self._closefd:
            return
        try:
            warnings.warn(f"unclosed file {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self._fd = -1
            os.close(fd)


async def lines_of(readline: Callable[[int], Awaitable[Any]], hint: int) -> list[Any]:
    """All lines, or as many as do not exceed the hint and one more."""
    lines = []
    total = 0
    while line := await readline(-1):
        lines.append(line)
        total += len(line)
        if 0 < hint < total:
            break
    return lines


@protected
class Buffered(AsyncFile):
    """A buffered file: what `io.BufferedReader`, `io.BufferedWriter` and `io.BufferedRandom` have in common.

    Args:
        raw: the file below.
        size: how many bytes the buffer has.
    """

    __slots__ = ("_pending", "_pending_size", "_size", "_unread", "_window")

    def __init__(self, raw: RawFile, size: int) -> None:
        self._raw = raw
        self._turn = raw._turn
        self._size = size
        self._window = _EMPTY
        self._unread = 0
        self._pending: list[bytes] = []
        self._pending_size = 0

    @property
    def raw(self) -> RawFile:
        """The unbuffered file below."""
        return self._raw

    async def detach(self) -> RawFile:
        """Flushes and returns the unbuffered file below. This one is of no use any more."""
        await self.flush()
        raw, self._raw = self._raw, cast("RawFile", _Detached("raw stream has been detached"))
        self._turn = Turn()
        self._turn.close()
        return raw

    # Reading

    async def read(self, size: int | None = -1, /) -> bytes:
        """Reads ``size`` bytes, fewer only at the end of the file; without a size everything up to the end."""
        size = as_size(size)
        turn = self._turn
        if 0 <= size <= self._unread and turn.served < turn.limit:
            turn.served += 1
            self._unread -= size
            return self._window.read(size)
        self._check_open("read")
        if size < -1:
            raise ValueError("read length must be non-negative or -1")
        if not turn.take():
            await turn.wait()
        with Reading(self, turn):
            return await (self._read_all() if size < 0 else self._read(size))

    async def read1(self, size: int | None = -1, /) -> bytes:
        """Reads up to ``size`` bytes, with at most one operation."""
        self._check_open("read")
        return await self._undoing(self._read1, as_size(size))

    async def readinto(self, buffer: Buffer, /) -> int:
        """Reads into ``buffer`` until it is full or the file ends; returns how many bytes."""
        self._check_open("readinto")
        return await self._undoing(self._readinto, buffer, _room_in(buffer, "readinto"), False)

    async def readinto1(self, buffer: Buffer, /) -> int:
        """Reads into ``buffer``, with at most one operation; returns how many bytes."""
        self._check_open("readinto")
        return await self._undoing(self._readinto, buffer, _room_in(buffer, "readinto1"), True)

    async def readline(self, size: int | None = -1, /) -> bytes:
        """Reads a line, of at most ``size`` bytes. Empty at the end of the file."""
        limit = as_size(size)
        turn = self._turn
        if turn.served < turn.limit:
            line = self._line_of_window(limit)
            if line:
                turn.served += 1
                return line
        self._check_open("readline")
        if not turn.take():
            await turn.wait()
        with Reading(self, turn):
            return await self._readline(limit)

    async def _lines(self) -> AsyncGenerator[bytes | None, None]:
        yield None
        turn = self._turn
        ready = 0  # how many whole lines there are, while nobody else uses the file
        while True:
            ready = ready or self._lines_in_window()
            if ready and (turn.served < turn.limit or turn.extend()):
                batch = min(ready, turn.limit - turn.served)
                turn.served = mark = turn.served + batch
                for line in islice(self._window, batch):
                    self._unread -= len(line)
                    yield line
                    if turn.served != mark:
                        ready = 0
                        break
                else:
                    ready -= batch
            else:
                ready = 0
                line = await self.readline()
                if not line:
                    return
                yield line

    def _lines_in_window(self) -> int:
        """How many whole lines there are to come."""
        return self._window.getvalue().count(b"\n", self._window.tell())

    def _line_of_window(self, limit: int) -> bytes:
        """A whole line, or as much of it as may be; else nothing."""
        line = self._window.readline(limit)
        if line and (line[-1] == _NEWLINE or len(line) == limit):
            self._unread -= len(line)
            return line
        self._window.seek(-len(line), os.SEEK_CUR)
        return b""

    def _take_window(self) -> bytes:
        """All that is unread in it. There is no going back into it."""
        data = self._window.read() if self._unread else b""
        self._forget_window()
        return data

    def _set_window(self, data: bytes) -> None:
        self._window = io.BytesIO(data)
        self._unread = len(data)

    def _forget_window(self) -> None:
        self._window = _EMPTY
        self._unread = 0

    def _rewind(self) -> None:
        """The window is empty, and the raw file's position that of this one."""
        if self._unread:
            self._raw._seek(-self._unread, os.SEEK_CUR)
        self._forget_window()

    async def _read(self, size: int) -> bytes:
        """As `io.BufferedReader`: multiples of the buffer's size directly, the rest through the window."""
        if size <= self._unread:
            self._unread -= size
            return self._window.read(size)
        before = self._take_window()
        pieces = [before] if before else []  # one piece is not copied
        missing = size - len(before)
        if self._pending:
            await self._drain()
        while missing >= self._size:
            data = await self._raw._fetch(missing - missing % self._size)
            if not data:
                return b"".join(pieces)
            pieces.append(data)
            missing -= len(data)
        room = self._size
        while missing and room:
            self._set_window(await self._raw._fetch(room))
            if not self._unread:
                break
            room -= self._unread
            data = self._window.read(missing)
            self._unread -= len(data)
            missing -= len(data)
            pieces.append(data)
        return b"".join(pieces)

    async def _read_all(self) -> bytes:
        before = self._take_window()
        if self._pending:
            await self._drain()
        data = await self._raw._fetch_small_file()
        if data is None:
            data = await self._raw._read_all()
        return before + data if before else data

    async def _read1(self, size: int) -> bytes:
        if size < 0:
            size = self._size
        if not self._unread and size:
            if self._pending:
                await self._drain()
            self._forget_window()
            return await self._raw._fetch(size)
        data = self._window.read(size)
        self._unread -= len(data)
        return data

    def _read1_ahead(self, size: int) -> bytes | None:
        """The same, if nothing has to be waited for."""
        if self._unread or self._pending:
            return None
        self._forget_window()
        return self._raw._fetch_ahead(size)

    async def _readinto(self, buffer: Buffer, size: int, once: bool) -> int:
        count = self._read_window_into(buffer, 0)
        if count < size:
            if self._pending:
                await self._drain()
            self._forget_window()
        while count < size:
            missing = size - count
            if missing > self._size:
                got = await self._raw._fetch_into(buffer, count, missing)
            elif once and count:
                break
            else:
                self._set_window(await self._raw._fetch(self._size))
                got = self._read_window_into(buffer, count)
            count += got
            if once or not got:
                break
        return count

    def _read_window_into(self, buffer: Buffer, start: int) -> int:
        count = self._window.readinto(_from(buffer, start))
        self._unread -= count
        return count

    async def _peek(self) -> bytes:
        if self._writable:
            await self._flush()
        if not self._unread:
            self._set_window(await self._raw._fetch(self._size))
        return self._window.getvalue()[self._window.tell() :]

    async def _readline(self, limit: int) -> bytes:
        line = self._line_of_window(limit)
        if line or limit == 0:
            return line
        pieces = [self._take_window()]
        length = len(pieces[0])
        if self._pending:
            await self._drain()
        while True:
            self._set_window(await self._raw._fetch(self._size))
            left = limit - length if limit >= 0 else -1
            piece = self._window.readline(left)
            self._unread -= len(piece)
            pieces.append(piece)
            length += len(piece)
            if not piece or piece[-1] == _NEWLINE or length == limit:
                return b"".join(pieces)

    async def _readlines(self, hint: int) -> list[bytes]:
        return await lines_of(self._readline, hint)

    def _begin_reading(self) -> tuple[io.BytesIO, int, list[Piece]]:
        return self._window, self._window.tell(), self._raw._begin_reading()

    def _end_reading(self, mark: tuple[io.BytesIO, int, list[Piece]], exc: BaseException | None) -> None:
        self._raw._log = None
        if exc is not None:
            window, position, log = mark
            window.seek(position)
            self._raw._put_back(window.read(), log)
            self._forget_window()

    # Writing

    async def write(self, data: Buffer, /) -> int:
        """Writes ``data`` to the buffer, and the buffer to the file when it is full; returns the size of ``data``."""
        turn = self._turn
        size = len(data) if type(data) is bytes else _size_of(data)
        if turn.served < turn.limit and self._pending_size + size <= self._size:
            await checkpoint_if_cancelled()
            turn.served += 1
            self._take(data)
            return size
        self._check_open("write")
        if not turn.take():
            await turn.wait()
        try:
            self._check_open("write")
            await self._write(data, size, self._size)
            return size
        finally:
            turn.give_up()

    @property
    def _room(self) -> int:
        return self._size - self._pending_size

    def _take(self, data: Buffer, start: int = 0) -> None:
        """Adds what begins there to what is pending."""
        if not self._pending:
            self._rewind()
        content = bytes(_from(data, start))
        if content:
            self._pending.append(content)
            self._pending_size += len(content)

    async def _write(self, data: Buffer, size: int, keep: int) -> None:
        """Writes it after what is pending, or makes it so; at most ``keep`` bytes are pending at the end."""
        if self._pending_size + size > keep:
            await self._drain()
        sent = 0
        if size > keep:
            self._rewind()
            try:
                while size - sent > keep:
                    sent += await self._raw._put(data, size, sent)
            except (trio.Cancelled, KeyboardInterrupt) as exc:
                if not sent:
                    raise
                raise_later(exc)
        self._take(data, sent)

    async def _drain(self) -> None:
        while self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            self._pending = [data]
            sent = await self._raw._put(data, len(data))
            self._pending = [data[sent:]] if sent < len(data) else []
            self._pending_size -= sent

    def _leave(self) -> None:
        if self._writable:
            self._rewind()
        self._raw._settle()

    async def _flush(self) -> None:
        if self._writable:
            await self._drain()
            self._rewind()

    @property
    def _has_unwritten(self) -> bool:
        return bool(self._pending)

    # Position

    async def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to a position and returns it."""
        self._check_open("seek")
        if not 0 <= whence <= 4:
            raise ValueError(f"whence value {whence} unsupported")
        self._check_seekable()
        async with self._turn:
            await self._turn.checkpoint()
            self._check_open("seek")
            return await self._seek(index(target), whence)

    async def tell(self) -> int:
        """The position."""
        self._raw._check_open()
        async with self._turn:
            await self._turn.checkpoint()
            self._raw._check_open()
            return self._tell()

    async def truncate(self, size: int | None = None, /) -> int:
        """Sets the file's size; by default to the position, which does not move."""
        self._check_open("truncate")
        self._check_can_truncate()
        async with self._turn:
            self._check_open("truncate")
            return await self._truncate(size)

    def _tell(self) -> int:
        return self._raw._tell() - self._unread + self._pending_size

    async def _seek(self, target: int, whence: int) -> int:
        if whence <= os.SEEK_CUR and self._unread:
            here = self._tell()
            step = target - here if whence == os.SEEK_SET else target
            if -self._window.tell() <= step <= self._unread:
                self._window.seek(step, os.SEEK_CUR)
                self._unread -= step
                return here + step
        await self._drain()
        position = self._raw._seek(target - self._unread if whence == os.SEEK_CUR else target, whence)
        self._forget_window()
        return position

    async def _truncate(self, size: int | None) -> int:
        await self._flush()
        return await self._raw._truncate(size)

    @property
    def _readable(self) -> bool:
        return self._raw._readable

    @property
    def _writable(self) -> bool:
        return self._raw._writable

    def _check_open(self, what: str = "") -> None:
        if self._raw.closed:
            raise ValueError(f"{what} {'to' if what == 'write' else 'of'} closed file" if what else _CLOSED)

    def _check_writable(self) -> None:
        self._check_open("write")

    def _check_can_truncate(self) -> None:
        if not self._writable:
            raise io.UnsupportedOperation("truncate")

    def _check_seekable(self) -> None:
        if not self._raw.seekable():
            raise io.UnsupportedOperation("File or stream is not seekable.")

    def __del__(self) -> None:
        raw = getattr(self, "_raw", None)
        if not isinstance(raw, RawFile) or raw.closed or not raw._regular:
            return
        data = b"".join(getattr(self, "_pending", ()))
        while data:  # as io would; on a regular file that does not wait for anybody
            data = data[os.write(raw._fd, data) :]


@protected
class _CanPeek(Buffered):
    __slots__ = ()

    async def peek(self, size: int = 0, /) -> bytes:
        """What comes next, without moving on; as much as one operation gives, whatever ``size`` says."""
        self._check_open("peek")
        return await self._undoing(self._peek)


@protected
class BufferedReader(_CanPeek):
    """A buffered file that is read, as `io.BufferedReader`."""

    __slots__ = ()

    def writable(self) -> bool:
        """It is not."""
        return False

    async def write(self, data: Buffer, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`."""
        raise io.UnsupportedOperation("write")


class BufferedRandom(_CanPeek):
    """A buffered file that is read and written, as `io.BufferedRandom`."""

    __slots__ = ()


@protected
class BufferedWriter(Buffered):
    """A buffered file that is written, as `io.BufferedWriter`."""

    __slots__ = ()

    def readable(self) -> bool:
        """It is not."""
        return False

    async def read(self, size: int | None = -1, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`, as all that reads."""
        raise io.UnsupportedOperation("read")

    async def read1(self, size: int | None = -1, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`."""
        raise io.UnsupportedOperation("read1")

    async def readinto(self, buffer: Buffer, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`."""
        raise io.UnsupportedOperation("read")

    async def readinto1(self, buffer: Buffer, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`."""
        raise io.UnsupportedOperation("read1")

    async def readline(self, size: int | None = -1, /) -> bytes:
        """Raises `io.UnsupportedOperation`."""
        if size == 0:
            return b""
        raise io.UnsupportedOperation("read")

    async def readlines(self, hint: int | None = -1, /) -> NoReturn:
        """Raises `io.UnsupportedOperation`."""
        self._check_open()
        raise io.UnsupportedOperation("read")
