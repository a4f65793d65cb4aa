"""Whole files: read, written, copied or sent with one call.

The data path of `read_file`: the ring opens the file, which is the only wake-up there has to be. What the page cache
has is then read at once, with a read that refuses to wait (``RWF_NOWAIT``), and the file is closed. What it has not, or
what is more than `GUESS` bytes, is read through the ring, in pieces of `PIECE` bytes.

Who owns what: the call owns its fds, each of which `_Closing` closes however the call ends. Between two awaits, and
only there, `_scratch` is whoever's reads into it.

Facts, and what follows from them:

* **A path is looked up once.** A file that is replaced while it is read is read as it was: never parts of two files.
* **A chain of open, read and close has a wake-up less than three operations, but costs more** than they do: it is made
  for many files at once. One wake-up is also all that the ring's open and a read that does not wait need.
* **A file that can be read without waiting can be closed without waiting.** The file systems that know ``RWF_NOWAIT``
  have nothing to flush at a close. For others (FUSE, NFS, overlays, /proc) the ring reads and closes.
* **A transfer from the page cache is done by the run's own thread**, so its size is how long other tasks wait.
* **What creates, writes, syncs or renames goes to a worker of the kernel**, one hop for each.
* **A FIFO is opened by the ring at once**, without a writer, and then looks as if it were at its end.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import select
import stat
import threading
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

from ._errors import os_error
from ._file_ops import close, fsync, openat, read, renameat2, statx, unlinkat, write
from ._ops import poll

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from ._structs import StrOrBytesPath

GUESS: Final = 1 << 16
"""How large a file may be to be read at once."""

PIECE: Final = 1 << 22
"""How many bytes are read or written with one operation: for so long, other tasks wait or a cancel has to."""

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_MAX_LINKS: Final = 40  # as in the kernel


class _Scratch(threading.local):
    """Memory to read small files into. No await while something in it is wanted."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(GUESS))


_scratch: Final = _Scratch()


class _Closing:
    """Closes an fd at the end of ``async with``, whatever the end is.

    Attributes:
        at_once: closing does not wait.
    """

    __slots__ = ("_fd", "at_once")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.at_once = False

    async def __aenter__(self) -> int:
        return self._fd

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.at_once or kind is GeneratorExit:  # after a crash nobody can wait
            os.close(self._fd)
        else:
            with trio.CancelScope(shield=True):
                await close(self._fd)


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
    try:
        async with (closing := _Closing(fd)):
            content, closing.at_once = _read_at_once(fd)
            if content is None:
                content = await _read_all(fd, os.fstat(fd).st_size if closing.at_once else 0)
            return content
    except OSError as exc:
        _name(exc, path)
        raise


def _name(exc: OSError, path: StrOrBytesPath) -> None:
    """The error is about this file, as the caller calls it."""
    exc.filename, exc.filename2 = os.fspath(path), None


def _read_at_once(fd: int) -> tuple[bytes | None, bool]:
    """The content of a small file that is in the page cache; and whether the file is one that never waits when it
    is asked not to.
    """
    memory = _scratch.memory
    try:
        n = os.preadv(fd, [memory], 0, os.RWF_NOWAIT)
        # A short read may be all that is in the cache. The end of the file is where nothing is read.
        if n == GUESS or os.preadv(fd, [memory[n:]], n, os.RWF_NOWAIT) != 0:
            return None, True
    except OSError as exc:  # what is really wrong the ring's read will say
        return None, exc.errno == errno.EAGAIN
    return memory[:n].tobytes(), True


async def _read_all(fd: int, size: int) -> bytes:
    """Everything from the file's position on.

    Args:
        fd: the file. Nothing has been read.
        size: what it should come to; 0 if that is not known.
    """
    # `BytesIO` gives the bytes it was filled with away, without a copy.
    room, filled = size + 1 if size else GUESS, 0
    content = io.BytesIO(bytes(room))
    while True:
        asked = min(PIECE, room - filled)
        n = await read(fd, content.getbuffer()[filled : filled + asked])
        filled += n
        if n == 0 and filled == 0 and stat.S_ISFIFO((await statx(fd)).st_mode):
            await poll(fd, select.POLLIN)  # its first writer has come, or come and gone
            n = filled = await read(fd, content.getbuffer())
        if n == 0 or (filled == size and n < asked):
            content.truncate(filled)
            return content.getvalue()
        if filled == room:
            content.seek(room)
            content.write(bytes(room))
            room *= 2


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


async def _write_all(fd: int, data: Buffer) -> int:
    size, written = memoryview(data).nbytes, 0
    while written < size:
        written += await write(fd, memoryview(data).cast("B")[written : written + PIECE])
    return written


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
                with trio.CancelScope(shield=True):
                    await renameat2(temporary, name, src_dir_fd=where, dst_dir_fd=where)
            except GeneratorExit:
                os.unlink(temporary, dir_fd=where)
                raise
            except BaseException:
                with trio.CancelScope(shield=True):
                    await unlinkat(temporary, dir_fd=where)
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
            if not os.path.basename(target):
                raise os_error(-errno.EISDIR, path) from None
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
