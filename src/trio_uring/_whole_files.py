"""Whole files: read, written, copied or sent with one call.

The data path of `read_file`: the ring opens the file, which is the only wake-up there has to be. What the page cache
has is then read at once, with a read that refuses to wait (`_page_cache`), and the file is closed. What it has not, or
what is more than `GUESS` bytes, is read through the ring, in pieces of at most `PIECE` bytes. `read_files` does this
for many files in one step, with batches. `copy_file` and `send_file` move pages through a pipe; a copy is chains of
which each step fills the pipe or empties it.

Who owns what: a call owns its fds, each of which a `_Closing` closes however the call ends.

Facts, and what follows from them:

* **A path is looked up once.** A file that is replaced while it is read is read as it was: never parts of two files.
* **A chain of open, read and close has two wake-ups less than three operations, but costs more than they do**: it is
  made for many files at once. With a read that does not wait there is one wake-up in any case.
* **A file that can be read without waiting can be closed without waiting**: the file systems that know ``RWF_NOWAIT``
  have nothing to flush at a close. For others (tmpfs, overlays, FUSE, NFS, /proc) the ring reads and closes.
* **The metadata of an open file** comes from a plain fstat(2): on the ring it takes a kernel worker, some thirty times
  as long.
* **A transfer from the page cache is done by the run's own thread**, so its size is how long other tasks wait.
* **What creates, writes, syncs, renames or splices goes to a worker of the kernel**, one hop for each; steps of a
  chain stay with their worker. A file has one writer at a time, so that several pipes would copy no faster than one.
* **A write at the file's position (offset -1) that comes short leaves the position where it was** (Linux 6.18, a full
  disk). So every transfer here says where; what cannot seek does not look at that.
* **A FIFO is opened by the ring at once**, without a writer; a read then waits for one.
* **io_uring cannot clone a file.** The ioctl that does it first writes out what is dirty, which can take long; after
  that it only changes metadata. So the ring has the one done, and the other is done here, in bounded pieces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
import struct
from collections import deque
from functools import partial
from itertools import islice, repeat
from time import monotonic
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._batch import batch, chain
from ._core import HasFileno, number_of
from ._errors import ChainBrokenError, UnavailableError, UnsupportedOperation, os_error
from ._file_ops import close, fsync, ftruncate, openat, read, renameat2, statx, sync_file_range, unlinkat, write
from ._other_ops import splice
from ._page_cache import GUESS, read_cached

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Buffer, Self

    from ._structs import StrOrBytesPath

PathT = TypeVar("PathT", bound="StrOrBytesPath")

PIECE: Final = 1 << 22
"""How many bytes are read or written with one operation: for so long, other tasks wait or a cancel has to."""

PIPE_SIZE: Final = 1 << 20
"""How much goes through a pipe at a time: what a pipe may hold, unless an administrator says otherwise."""

MOST_CHAINED: Final = 64
"""How many of them one chain copies at the most, and so a kernel worker without a break."""

CHAIN_SECONDS: Final = 0.1
"""How long a chain may take, so that progress is reported now and then. It is made shorter or longer accordingly."""

CLONE: Final = 1 << 24
"""How many bytes are cloned at a time."""

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_MAX_OFFSET: Final = (1 << 63) - 1
_MAX_LINKS: Final = 40  # as in the kernel
_FICLONERANGE: Final = 0x4020940D
_WRITE_OUT: Final = 7  # SYNC_FILE_RANGE_WAIT_BEFORE, WRITE and WAIT_AFTER


class _Closing:
    """Closes an fd at the end of ``async with``, whatever the end is.

    Args:
        fd: the file.
        at_once: closing it does not wait.
    """

    __slots__ = ("_at_once", "_fd")

    def __init__(self, fd: int, at_once: bool = False) -> None:
        self._fd = fd
        self._at_once = at_once

    async def __aenter__(self) -> int:
        return self._fd

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._at_once or kind is GeneratorExit:  # after a crash nobody can wait
            os.close(self._fd)
        else:
            await _surely(partial(close, self._fd), partial(os.close, self._fd))


async def _surely(operation: Callable[[], Awaitable[None]], plainly: Callable[[], None]) -> None:
    """Does what has to be done, cancelled or not; if Ctrl-C forbids to wait for it, ``plainly`` and at once."""
    try:
        with trio.CancelScope(shield=True):
            await operation()
    except KeyboardInterrupt:  # so it has not been done
        plainly()
        raise


# Reading


@enable_ki_protection
async def read_file(path: StrOrBytesPath) -> bytes:
    """The content of a file, as ``open(path, "rb").read()``. IORING_OP_OPENAT and READ, Linux 5.6.

    Args:
        path: a regular file, or anything else that has an end: a FIFO is read until its last writer has gone, and first
            waited for until it has one.

    Raises:
        OSError: as `open` and ``read``, always with the file name.

    Up to 64 KiB that are in the page cache take one wake-up; what is more is read in pieces of 4 MiB. Cancelled, it
    raises `trio.Cancelled`; the file is closed.
    """
    fd = await openat(path, os.O_RDONLY)
    content, closes_at_once = read_cached(fd, 0)
    if content is not None:
        os.close(fd)
        return content
    try:
        async with _Closing(fd, closes_at_once):
            return await _read_all(fd)
    except OSError as exc:
        _name(exc, path)
        raise


def _name(exc: OSError, path: StrOrBytesPath) -> None:
    """The error is about this file, as the caller calls it; or about the ring."""
    if not isinstance(exc, (UnavailableError, UnsupportedOperation)):
        exc.filename, exc.filename2 = os.fspath(path), None


class _Filling:
    """A file that is being read to its end, from its beginning.

    Attributes:
        fd: the file.
        is_sized: its size is known; not so in /proc, say.
        expected: that size, or a guess.
        filled: how many bytes have been read.
        limit: how many there may be, for whoever wants to know.
    """

    __slots__ = ("_asked", "_content", "_room", "expected", "fd", "filled", "is_sized", "limit")

    def __init__(self, fd: int) -> None:
        status = os.fstat(fd)
        self.fd = fd
        self.is_sized = stat.S_ISREG(status.st_mode) and status.st_size > 0
        self.expected = status.st_size if self.is_sized else GUESS
        self.filled = self._asked = self._room = 0
        self.limit = 0
        self._content = io.BytesIO()  # gives its bytes away without a copy

    def next_piece(self, most: int) -> memoryview:
        """What is to be filled next. There is always room for one byte more than is expected: it shows the end."""
        if self.filled == self._room:
            self._room = 2 * self._room or self.expected + 1
            self._content.seek(self.filled)
            self._content.write(bytes(self._room - self.filled))
        self._asked = min(most, self._room - self.filled)
        return self._content.getbuffer()[self.filled : self.filled + self._asked]

    def add(self, n: int) -> bool:
        """So much of the piece has been filled. Was that the end?"""
        self.filled += n
        return n == 0 or (self.is_sized and self.filled == self.expected and n < self._asked)

    def result(self) -> bytes:
        """What has been read."""
        self._content.truncate(self.filled)
        return self._content.getvalue()


async def _read_all(fd: int) -> bytes:
    filling = _Filling(fd)
    while True:
        piece = filling.next_piece(PIECE)
        try:
            n = await read(fd, piece, filling.filled)
        finally:  # a traceback would hold it; and what a `BytesIO` has exported must be gone before it is
            with contextlib.suppress(BufferError):  # after a crash the kernel may still use it
                piece.release()
        if filling.add(n):
            return filling.result()


# Reading many


def read_files(paths: Iterable[PathT], *, concurrency: int = 64, max_bytes: int = 1 << 28) -> FileContents[PathT]:
    """Reads many files: ``async for path, content in read_files(paths)``. IORING_OP_OPENAT and READ, Linux 5.6.

    Args:
        paths: regular files. More of them are asked for as files are read.
        concurrency: how many files are open at a time.
        max_bytes: how many bytes are held at a time, beside what the caller keeps.

    Returns:
        an asynchronous iterator of pairs, in the order of ``paths``: the path as it was given, and the content or, not
        raised, the OSError. Its errno is EFBIG for a file of more than ``max_bytes`` bytes.

    Raises:
        ValueError: ``concurrency`` or ``max_bytes`` is less than 1.

    Files are read some at a time, when the next one is asked for. There is no task in the background, and nothing stays
    open, so the iterator can be left at any time. Each of its steps looks whether it is cancelled; other tasks run
    while files are read. A cancel loses nothing: iterate on, and the file that was due comes.
    """
    if concurrency < 1 or max_bytes < 1:
        raise ValueError(f"concurrency and max_bytes must be at least 1, not {concurrency} and {max_bytes}")
    return FileContents(paths, concurrency, max_bytes)


class FileContents(Generic[PathT]):
    """The asynchronous iterator that `read_files` returns."""

    def __init__(self, paths: Iterable[PathT], concurrency: int, max_bytes: int) -> None:
        self._paths = iter(paths)
        self._concurrency = self._width = concurrency
        self._max_bytes = max_bytes
        self._due: deque[PathT] = deque()  # taken from `_paths`, not read yet
        self._read: deque[tuple[PathT, bytes | OSError]] = deque()
        self._busy = False

    def __aiter__(self) -> Self:
        return self

    @enable_ki_protection
    async def __anext__(self) -> tuple[PathT, bytes | OSError]:
        if self._busy:
            raise trio.BusyResourceError("another task is iterating over these files")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._busy = True
        try:
            while not self._read:
                await self._read_some()
        finally:
            self._busy = False
        return self._read.popleft()

    async def _read_some(self) -> None:
        due = self._due
        due.extend(islice(self._paths, max(0, self._width - len(due))))
        if not due:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        paths = [*islice(due, self._width)]
        opening = batch()
        try:
            opening.extend(openat, zip(paths, repeat(os.O_RDONLY)))
        except (TypeError, ValueError):  # one of them is no path: find it
            self._width = 1
            if len(paths) == 1:
                due.popleft()
                raise
            return
        async with _ClosingAll() as fds:
            opened = await opening.run()
            fds.update(fd for fd in opened if type(fd) is int)
            results = await _read_those_that_fit(opened, self._max_bytes, fds)
        for result in results:
            path = due.popleft()
            if isinstance(result, OSError):
                _name(result, path)
            self._read.append((path, result))
        # Opening what does not fit is a waste.
        self._width = min(self._concurrency, 2 * len(paths)) if len(results) == len(paths) else max(1, len(results))


class _ClosingAll:
    """Closes, at the end of ``async with``, what is left in its set of fds."""

    def __init__(self) -> None:
        self._fds: set[int] = set()

    async def __aenter__(self) -> set[int]:
        return self._fds

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:  # after a crash nobody can wait
            self._close_plainly()
        elif self._fds:
            await _surely(self._close, self._close_plainly)

    async def _close(self) -> None:
        closing = batch()
        closing.extend(close, zip(self._fds))
        results = await closing.run()
        ends = zip(self._fds, results, strict=True)
        self._fds = {fd for fd, end in ends if isinstance(end, OSError) and end.errno == errno.ECANCELED}
        self._close_plainly()  # what Ctrl-C has left

    def _close_plainly(self) -> None:
        for fd in self._fds:
            os.close(fd)


async def _read_those_that_fit(opened: list[int | OSError], max_bytes: int, fds: set[int]) -> list[bytes | OSError]:
    """The content of the first files, up to one that does not fit behind the others.

    Args:
        opened: the files, or why they could not be opened.
        max_bytes: how large all of it may be.
        fds: what is to be closed.

    Raises:
        trio.Cancelled: nothing is read, so nothing is lost.
    """
    await trio.lowlevel.checkpoint_if_cancelled()  # some may not have been opened
    results: list[bytes | OSError] = []
    unfinished: dict[int, _Filling] = {}
    left = max_bytes
    is_alone = len(opened) == 1
    for fd in opened:
        if isinstance(fd, OSError):
            results.append(fd)
            continue
        content, closes_at_once = read_cached(fd, 0)
        if content is None:
            filling = _Filling(fd)
            size, is_certain = filling.expected, filling.is_sized
        else:
            size, is_certain = len(content), True
        if size > left and left < max_bytes:
            break
        if size > max_bytes and is_certain:
            results.append(_too_large(max_bytes))
        elif content is None:
            size = min(size, left)
            filling.limit = max_bytes if is_alone else size
            unfinished[len(results)] = filling
            results.append(b"")
            left -= size
            continue
        else:
            results.append(content)
            left -= size
        if closes_at_once:
            fds.remove(fd)
            os.close(fd)
    if unfinished:
        await _read_unfinished(unfinished, results, is_alone)
    return results


async def _read_unfinished(unfinished: dict[int, _Filling], results: list[bytes | OSError], is_alone: bool) -> None:
    """Reads files side by side. One that is larger than was expected ends the results; next time it is alone."""
    while unfinished:
        most = max(GUESS, PIECE // len(unfinished))
        reading = batch()
        reading.extend(read, [(each.fd, each.next_piece(most), each.filled) for each in unfinished.values()])
        counts = await reading.run()
        await trio.lowlevel.checkpoint_if_cancelled()  # some may not have been read
        for (position, filling), n in zip([*unfinished.items()], counts, strict=True):
            is_read = not isinstance(n, OSError) and filling.add(n)
            if isinstance(n, OSError):
                results[position] = n
            elif filling.filled > filling.limit:
                if not is_alone:
                    del results[position:]
                    unfinished = {before: each for before, each in unfinished.items() if before < position}
                    break
                results[position] = _too_large(filling.limit)
            elif is_read:
                results[position] = filling.result()
            else:
                continue
            del unfinished[position]


def _too_large(max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"the file has more than {max_bytes} bytes: raise max_bytes, or read it piece by piece")


# Writing


@enable_ki_protection
async def write_file(path: StrOrBytesPath, data: Buffer, *, atomic: bool = False, sync: bool = False) -> int:
    """Writes a file, as `pathlib.Path.write_bytes`; returns how many bytes. IORING_OP_OPENAT and WRITE, Linux 5.6.

    Args:
        path: the file. A new one gets the permissions 0666 less the umask.
        data: all of its content: any contiguous buffer.
        atomic: whoever reads the file, and whatever happens (a crash of the program or of the system, a full disk),
            finds the old content or the new one, never a mixture. See below.
        sync: return when the data is on storage.

    Raises:
        OSError: as `open` and ``write``, always with the file name.

    Not ``atomic``: cancelled, or after an error, the file holds some first part of the data, perhaps none.

    ``atomic``: the data is written to a new file in the same directory, synced, and renamed; then the directory is
    synced, so ``sync`` adds nothing. The new file has the old one's permissions, and owner and group where this process
    may give them; access lists, extended attributes and hard links stay behind with the old one. A symbolic
    link stays, and what it points to is replaced. What is no regular file cannot be replaced: OSError. It takes
    the right to write to the directory, not to the file. Cancelled, or after an error, nothing has changed and nothing
    is left; once the renaming has begun, a cancel is too late. A process that is killed may leave a file named
    ``.write-*.tmp``.
    """
    _bytes_of(data)  # before there is anything to regret
    try:
        if atomic:
            return await _replace(path, data)
        async with _Closing(await openat(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)) as fd:
            written = await _write_all(fd, data)
            if sync:
                await fsync(fd)
            return written
    except OSError as exc:
        _name(exc, path)
        raise


async def _write_all(fd: int, data: Buffer, offset: int = 0) -> int:
    size, written = len(_bytes_of(data)), 0
    while written < size:
        written += await write(fd, _bytes_of(data)[written : written + PIECE], offset + written)
    return written


def _bytes_of(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


async def _replace(path: StrOrBytesPath, data: Buffer) -> int:
    """There could be a file without a name instead, which nobody need remove (``O_TMPFILE``). But to replace another it
    needs a name in any case, so that would be one step more, and not every file system has it.
    """
    target, old = await _find_target(path)
    directory, name = os.path.split(target)
    temporary = f".write-{secrets.token_hex(8)}.tmp"
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o777
    async with _Closing(await openat(directory or ".", os.O_RDONLY | os.O_DIRECTORY)) as where:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        async with _Closing(await openat(temporary, flags, mode, dir_fd=where)) as fd:
            try:
                if old is not None:
                    _inherit(fd, old)
                written = await _write_all(fd, data)
                await fsync(fd)
                await renameat2(temporary, name, src_dir_fd=where, dst_dir_fd=where)
            except GeneratorExit:
                os.unlink(temporary, dir_fd=where)
                raise
            except BaseException:
                remove = partial(unlinkat, temporary, dir_fd=where)
                await _surely(remove, partial(os.unlink, temporary, dir_fd=where))
                raise
        with trio.CancelScope(shield=True):
            await _sync_directory(where)
    return written


async def _find_target(path: StrOrBytesPath) -> tuple[str, os.stat_result | None]:
    """What is to be replaced, behind symbolic links, and what it is now, if it exists."""
    target = os.fsdecode(path)
    for _ in range(_MAX_LINKS):
        try:
            old = await statx(target, flags=_AT_SYMLINK_NOFOLLOW)
        except FileNotFoundError:
            if target.endswith("/"):
                raise os_error(-errno.EISDIR, path) from None
            if not target:
                raise
            return target, None
        if stat.S_ISLNK(old.st_mode):
            link = os.readlink(target)  # it has just been looked at, so this does not wait
            target = os.path.join(os.path.dirname(target), link)
        elif stat.S_ISREG(old.st_mode):
            return target, old
        elif stat.S_ISDIR(old.st_mode):
            raise os_error(-errno.EISDIR, path)
        else:
            raise OSError(errno.EINVAL, "only a regular file can be replaced atomically; write without `atomic`", path)
    raise os_error(-errno.ELOOP, path)


def _inherit(fd: int, old: os.stat_result) -> None:
    """Permissions and owner of the old file, if the new one does not have them. The ring has no operation for that."""
    new = os.fstat(fd)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(fd, old.st_uid, old.st_gid)
        except PermissionError:
            pass
    if stat.S_IMODE(new.st_mode) != stat.S_IMODE(old.st_mode) & 0o777:
        os.fchmod(fd, stat.S_IMODE(old.st_mode) & 0o777)


async def _sync_directory(fd: int) -> None:
    try:
        await fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a file system that has no such thing
            raise


# Copying


@enable_ki_protection
async def copy_file(
    src: StrOrBytesPath, dst: StrOrBytesPath, *, progress: Callable[[int, int], object] | None = None
) -> int:
    """Copies the content of a file, as `shutil.copyfile`; returns how many bytes. IORING_OP_SPLICE, Linux 5.7.

    Args:
        src: what to copy. Symbolic links are followed.
        dst: where to. What is there is overwritten, and keeps its permissions.
        progress: is called with the bytes that are done and the bytes in all: at the beginning, and from then on, at
            least every 64 MiB. What it raises ends the copy.

    Raises:
        shutil.SameFileError: both are the same file.
        shutil.SpecialFileError: one is a FIFO.
        OSError: as `open`, or while copying, with both names.

    Where the file system can (btrfs, XFS), the copy shares the blocks of ``src``. Otherwise the kernel copies from
    file to file, and holes stay holes. What is copied is what ``src`` has at the beginning. Cancelled, or after an
    error, ``dst`` is left with some first part of the content.
    """
    async with _Closing(await openat(src, os.O_RDONLY)) as source:
        status = os.fstat(source)
        if stat.S_ISDIR(status.st_mode):
            raise os_error(-errno.EISDIR, os.fspath(src))
        await _check_target(src, status, dst)
        target_fd = await openat(dst, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            async with _Closing(target_fd) as target:
                return await _Copy(source, target, status, progress).run()
        except OSError as exc:
            exc.filename, exc.filename2 = os.fspath(src), os.fspath(dst)
            raise


async def _check_target(src: StrOrBytesPath, status: os.stat_result, dst: StrOrBytesPath) -> None:
    """Raises shutil's errors."""
    if stat.S_ISFIFO(status.st_mode):
        raise shutil.SpecialFileError(f"{os.fspath(src)!r} is a FIFO")
    try:
        existing = await statx(dst)
    except OSError:  # opening it will say what is wrong
        return
    if os.path.samestat(status, existing):
        raise shutil.SameFileError(f"{os.fspath(src)!r} and {os.fspath(dst)!r} are the same file")
    if stat.S_ISFIFO(existing.st_mode):
        raise shutil.SpecialFileError(f"{os.fspath(dst)!r} is a FIFO")


class _Copy:
    """Of one open file to another, an empty one, by the best way there is."""

    def __init__(
        self, source: int, target: int, status: os.stat_result, progress: Callable[[int, int], object] | None
    ) -> None:
        self._source = source
        self._target = target
        self._size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        self._has_offsets = self._size > 0 and stat.S_ISREG(os.fstat(target).st_mode)
        self._is_sparse = status.st_blocks * 512 < self._size
        self._progress = progress
        self._done = 0
        self._end = self._size  # less if the source is found to be shorter
        self._pieces = self._find_pieces()
        self._chained = 4

    async def run(self) -> int:
        self._add(0)
        for way in (self._clone, self._splice) if self._has_offsets else ():
            if await way():
                return self._end
            self._done = 0
        await self._read_and_write()
        return self._done

    def _add(self, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(self._done, max(self._done, self._size))

    # Without a copy

    async def _clone(self) -> bool:
        """False if the file system cannot, or not now."""
        size = self._size
        try:
            self._clone_range(size, 0)  # nothing, which is refused where cloning is
        except OSError:
            return False
        await sync_file_range(self._source, 0, 0, _WRITE_OUT)
        for offset in range(0, size, CLONE):
            n = min(CLONE, size - offset)
            try:
                self._clone_range(offset, n)
            except OSError:  # the source has been changed, say
                return False
            self._add(n)
            await trio.lowlevel.checkpoint()
        return True

    def _clone_range(self, offset: int, n: int) -> None:
        where = 0 if n == 0 else offset
        fcntl.ioctl(self._target, _FICLONERANGE, struct.pack("=qQQQ", self._source, offset, n, where))

    # Through a pipe

    async def _splice(self) -> bool:
        """False if there is no way from the one file into a pipe, or out of it into the other."""
        try:
            with _pipe() as ends:
                while pieces := [*islice(self._pieces, self._chained)]:
                    began = monotonic()
                    await self._copy_pieces(ends, pieces)
                    slow = monotonic() - began > CHAIN_SECONDS
                    self._chained = max(1, self._chained // 2) if slow else min(MOST_CHAINED, self._chained * 2)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        if self._is_sparse or self._end < self._size:
            await self._set_size()
        return True

    async def _copy_pieces(self, ends: tuple[int, int], pieces: list[tuple[int, int]]) -> None:
        results = await self._run_chain(ends, pieces) if len(pieces) > 1 else [0, 0]
        for (offset, n), filled, emptied in zip(pieces, results[::2], results[1::2], strict=True):
            await self._finish_piece(ends, offset, n, _count(filled), _count(emptied))

    async def _run_chain(self, ends: tuple[int, int], pieces: list[tuple[int, int]]) -> list[int | OSError]:
        """For each piece what went into the pipe, and what came out. One kernel worker does it all."""
        steps = chain()
        for offset, n in pieces:
            steps.add(splice, self._source, offset, ends[1], -1, n)
            steps.add(splice, ends[0], -1, self._target, offset, n)
        try:
            results: list[int | OSError] = await steps.run()
        except ValueError:  # the ring is too small for a chain of that length
            self._chained = max(1, self._chained // 4)
            return [0, 0] * len(pieces)
        await trio.lowlevel.checkpoint_if_cancelled()  # some may not have been done
        return results

    async def _finish_piece(self, ends: tuple[int, int], offset: int, n: int, filled: int, emptied: int) -> None:
        """Does what the chain has not: it ends where a step comes short."""
        end, in_pipe = offset + n, filled - emptied
        offset += emptied
        while offset < end:
            if not in_pipe:
                in_pipe = await splice(self._source, offset, ends[1], -1, end - offset)
            if not in_pipe:
                self._end = min(self._end, offset)
                return
            moved = await splice(ends[0], -1, self._target, offset, in_pipe)
            in_pipe -= moved
            offset += moved
        self._add(n)

    def _find_pieces(self) -> Iterator[tuple[int, int]]:
        """Where there is data: offset and size."""
        end = 0
        while end < self._size:
            start, end = self._next_data(end)
            for offset in range(start, end, PIPE_SIZE):
                yield offset, min(PIPE_SIZE, end - offset)

    def _next_data(self, after: int) -> tuple[int, int]:
        if not self._is_sparse:
            return 0, self._size
        try:
            start = os.lseek(self._source, after, os.SEEK_DATA)
            end = os.lseek(self._source, start, os.SEEK_HOLE)
        except OSError:  # there is no more
            start = end = self._size
        start, end = min(start, self._size), min(end, self._size)
        self._done += start - after  # holes
        return start, end

    async def _set_size(self) -> None:
        try:
            await ftruncate(self._target, self._end)
        except UnsupportedOperation:  # before Linux 6.9
            os.ftruncate(self._target, self._end)

    # Through memory

    async def _read_and_write(self) -> None:
        memory = bytearray(PIPE_SIZE)
        while n := await read(self._source, memory, self._done):
            await _write_all(self._target, memoryview(memory)[:n], self._done)
            self._add(n)


# Sending


@enable_ki_protection
async def send_file(
    file: StrOrBytesPath | int | HasFileno, stream: trio.abc.SendStream, offset: int = 0, count: int | None = None
) -> int:
    """Sends a file, or a part of it; returns how many bytes. IORING_OP_SPLICE, Linux 5.7.

    Args:
        file: a path, an fd or what has one; it must be seekable. The position of an fd is neither used nor moved.
        stream: where to. To a `trio.SocketStream` the kernel sends the file itself; for any other, TLS say, it
            is read and given to ``send_all``. No other task may send meanwhile.
        offset: the first byte to be sent.
        count: how many bytes at most; by default all up to the end of the file.

    Raises:
        OSError: the file cannot be opened or read.
        trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError: as ``send_all``.
        ValueError: ``offset`` or ``count`` is negative.

    Cancelled, or after an error, some first part may have been sent, and nobody knows how much: then the stream is good
    for nothing but to be closed, as after a cancelled ``send_all``.
    """
    if offset < 0 or (count is not None and count < 0):
        raise ValueError(f"offset and count must not be negative: {offset}, {count}")
    if isinstance(file, int) or not isinstance(file, (str, bytes, os.PathLike)):
        return await _send(number_of(file), stream, offset, count)
    fd = await openat(file, os.O_RDONLY)
    try:
        async with _Closing(fd):
            return await _send(fd, stream, offset, count)
    except OSError as exc:
        _name(exc, file)
        raise


async def _send(fd: int, stream: trio.abc.SendStream, offset: int, count: int | None) -> int:
    os.lseek(fd, 0, os.SEEK_CUR)  # a pipe says that it has no offsets
    await stream.wait_send_all_might_not_block()  # it knows whether the stream is closed, or somebody else's now
    end = _MAX_OFFSET if count is None else min(offset + count, _MAX_OFFSET)
    if isinstance(stream, trio.SocketStream):
        try:
            return await _splice_to_socket(fd, stream, offset, end)
        except _CannotSplice:
            pass
    memory, start = bytearray(PIPE_SIZE), offset
    while n := await read(fd, memoryview(memory)[: min(end - offset, PIPE_SIZE)], offset):
        await stream.send_all(bytes(memoryview(memory)[:n]))
        offset += n
    return offset - start


class _CannotSplice(Exception):
    """There is no way from this file into a pipe."""


async def _splice_to_socket(fd: int, stream: trio.SocketStream, offset: int, end: int) -> int:
    start = offset
    with _pipe() as (pipe, into_pipe):
        while offset < end:
            try:
                n = await splice(fd, offset, into_pipe, -1, min(end - offset, PIPE_SIZE))
            except OSError as exc:
                if exc.errno == errno.EINVAL and offset == start:
                    raise _CannotSplice from exc
                raise
            if n == 0:
                break
            offset += n
            await _empty_into_socket(pipe, n, stream)
    return offset - start


async def _empty_into_socket(pipe: int, n: int, stream: trio.SocketStream) -> None:
    while n:
        try:
            n -= await splice(pipe, -1, stream.socket, -1, n)
        except BlockingIOError:
            await stream.wait_send_all_might_not_block()
        except OSError as exc:
            if stream.socket.fileno() < 0:
                raise trio.ClosedResourceError("this stream was closed") from None
            raise trio.BrokenResourceError(f"the stream is broken: {exc}") from exc


def _count(result: int | OSError) -> int:
    """How much a step has moved; none if it was not done."""
    if isinstance(result, ChainBrokenError):
        return 0
    if isinstance(result, OSError):
        raise result
    return result


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """A pipe, as large as it may be; closed at the end."""
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except PermissionError:  # this user has many large ones already
            pass
        yield ends
    finally:
        for end in ends:
            os.close(end)
