"""`Path`: trio's, with what the kernel can do on the ring.

It is a subclass of `trio.Path`. So it is one for every ``isinstance`` and every annotation, pure paths behave as
pathlib has them, and what is not overridden here is trio's own: a call of pathlib in a thread. What is overridden is
one or a few operations of `trio_uring.lowlevel`, which own everything the kernel uses; a path owns nothing. Each of
these methods also stands for trio's: without a ring, or on a kernel that lacks an operation, it calls that one.

Metadata (`stat` and what asks for a file's type) comes from STATX, which the kernel always hands to a worker of its
own: 23 to 40 us alone (the cores awake, or not) and 14 us with 64 under way, where a thread takes 55 to 130 and
`os.stat` 1.1, all with the path in the kernel's cache. `os.stat` is not the better choice for that: with a path that is
not cached it waits for a disk, and on a network or FUSE file system for a server, which may answer late, never, or be a
task of this very run. Nothing tells beforehand, and all tasks wait with it. For an open file `os.fstat` is better.

Two questions need no metadata: whether something is there, and whether it is a directory. An open with O_PATH
answers them (9 us alone, 6 us with 64). It completes while it is submitted if the path is cached, goes to a worker if
not, and needs no permission that stat does not. Closing what it opened never waits: there is nothing to flush.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload

import trio
from trio.lowlevel import enable_ki_protection

from ._errors import UnsupportedOperation
from ._file_ops import close, linkat, mkdirat, openat, renameat2, statx, symlinkat, unlinkat
from ._files import open_file
from ._mount import ring_at_hand
from ._trio_internals import ThreadPath
from ._whole_files import read_file, write_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _typeshed import (
        OpenBinaryMode,
        OpenBinaryModeReading,
        OpenBinaryModeUpdating,
        OpenBinaryModeWriting,
        OpenTextMode,
    )
    from typing_extensions import Buffer, Self

    from ._binary_files import AsyncFile, BufferedRandom, BufferedReader, BufferedWriter, RawFile
    from ._structs import StrOrBytesPath
    from ._text_files import TextFile

    StrPath = str | os.PathLike[str]
    F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_REMOVEDIR: Final = 0x200
_STATX_TYPE: Final = 0x1

_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})
"""Errors that pathlib takes for an answer, when it is asked whether something is there."""

RING_METHODS: Final[dict[str, Callable[..., Awaitable[Any]]]] = {}
"""What `Path` does on the ring, by name; each works on any path-like object that has ``parent``."""


# trio's own, also when the names in its class lead here.
_is_mount_in_thread: Final = trio.Path.is_mount
_touch_in_thread: Final = trio.Path.touch


def ring_or(
    stock: Callable[..., Awaitable[Any]],
    ours: Callable[..., Awaitable[Any]],
    wanted: Callable[[], bool] = ring_at_hand,
) -> Callable[..., Awaitable[Any]]:
    """``ours`` in a run with a ring whose kernel has what it needs, else ``stock``."""

    @enable_ki_protection  # what is returned may be a file
    async def either(*args: Any, **kwargs: Any) -> Any:
        if wanted():
            try:
                return await ours(*args, **kwargs)
            except UnsupportedOperation:  # so nothing has been done
                pass
        return await stock(*args, **kwargs)

    return either


def _on_the_ring(method: F) -> F:
    name = method.__name__
    RING_METHODS[name] = method
    return functools.wraps(method)(ring_or(getattr(trio.Path, name), method))  # type: ignore[return-value]


class Path(ThreadPath):
    """`trio.Path` on the ring: a path whose methods that do I/O are async.

    It is a `trio.Path`, and a `pathlib.PurePath`, and does what they do: its methods return what pathlib's return, and
    raise what they raise. What the kernel can do goes to the ring. The rest runs in a thread as with `trio.Path`:
    ``chmod``, ``glob``, ``iterdir``, ``readlink``, ``resolve`` and whatever else is not described here. Where
    there can be no ring all of them use threads.

    A method that is cancelled has done nothing, or raises nothing and returns its result; those that take
    several steps (`mkdir` with ``parents``, `touch`) may have done the first ones.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"trio_uring.Path({str(self)!r})"

    # Content

    # The types are those of `open_file`.

    @overload  # type: ignore[override]
    async def open(
        self,
        mode: OpenTextMode = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> TextFile: ...

    @overload
    async def open(
        self,
        mode: OpenBinaryMode,
        buffering: Literal[0],
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> RawFile: ...

    @overload
    async def open(
        self,
        mode: OpenBinaryModeUpdating,
        buffering: Literal[-1, 1] = -1,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> BufferedRandom: ...

    @overload
    async def open(
        self,
        mode: OpenBinaryModeWriting,
        buffering: Literal[-1, 1] = -1,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> BufferedWriter: ...

    @overload
    async def open(
        self,
        mode: OpenBinaryModeReading,
        buffering: Literal[-1, 1] = -1,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
    ) -> BufferedReader: ...

    @overload
    async def open(
        self,
        mode: str,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> AsyncFile: ...

    @_on_the_ring
    async def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> AsyncFile:
        """Opens the file, see `trio_uring.open_file`. IORING_OP_OPENAT, Linux 5.6.

        Raises:
            OSError: as `open`.
        """
        return await open_file(self, mode, buffering, encoding, errors, newline)

    @_on_the_ring
    async def read_bytes(self) -> bytes:
        """All of the file, see `trio_uring.read_file`. IORING_OP_OPENAT and IORING_OP_READ, Linux 5.6.

        Raises:
            OSError: as `open`.
        """
        return await read_file(self)

    @_on_the_ring
    async def write_bytes(self, data: Buffer) -> int:
        """Makes ``data`` all of the file, see `trio_uring.write_file`. IORING_OP_OPENAT and IORING_OP_WRITE, Linux 5.6.

        Returns:
            the number of bytes.

        Raises:
            OSError: as `open`.
        """
        return await write_file(self, memoryview(data))  # a mistake is found before the file is touched

    if sys.version_info >= (3, 13):

        @_on_the_ring
        async def read_text(
            self, encoding: str | None = None, errors: str | None = None, newline: str | None = None
        ) -> str:
            """All of the file, as text. IORING_OP_OPENAT and IORING_OP_READ, Linux 5.6.

            Args:
                encoding, errors, newline: as with `open`.

            Raises:
                OSError: as `open`.
                UnicodeError: it cannot be decoded.
            """
            return _decoded(await read_file(self), encoding, errors, newline)

    else:

        @_on_the_ring
        async def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
            """All of the file, as text. IORING_OP_OPENAT and IORING_OP_READ, Linux 5.6.

            Args:
                encoding, errors: as with `open`.

            Raises:
                OSError: as `open`.
                UnicodeError: it cannot be decoded.
            """
            return _decoded(await read_file(self), encoding, errors, None)

    @_on_the_ring
    async def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        """Makes ``data`` all of the file, encoded. IORING_OP_OPENAT and IORING_OP_WRITE, Linux 5.6.

        Args:
            data: what cannot be encoded is found before the file is touched.
            encoding, errors, newline: as with `open`.

        Returns:
            the number of characters.

        Raises:
            OSError: as `open`.
            UnicodeError: it cannot be encoded.
        """
        encoded = io.BytesIO()
        with io.TextIOWrapper(encoded, encoding, errors, newline) as text:
            count = text.write(data)
            text.flush()
            await write_file(self, encoded.getvalue())
        return count

    # Metadata

    @_on_the_ring
    async def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """The file's metadata. IORING_OP_STATX, Linux 5.6.

        Args:
            follow_symlinks: False asks for those of a symbolic link itself.

        Raises:
            OSError: as `os.stat`.
        """
        return await statx(self, flags=0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW)

    @_on_the_ring
    async def lstat(self) -> os.stat_result:
        """As `stat`, but of a symbolic link itself. IORING_OP_STATX, Linux 5.6."""
        return await statx(self, flags=_AT_SYMLINK_NOFOLLOW)

    @_on_the_ring
    async def samefile(self, other_path: StrPath) -> bool:
        """Is it the same file as ``other_path``? IORING_OP_STATX, Linux 5.6.

        Raises:
            OSError: one of them cannot be looked at.
        """
        return os.path.samestat(await statx(self), await statx(os.fspath(other_path)))

    if sys.version_info >= (3, 12):

        @_on_the_ring
        async def exists(self, *, follow_symlinks: bool = True) -> bool:
            """Is there such a file? IORING_OP_OPENAT, Linux 5.6.

            Args:
                follow_symlinks: False takes a symbolic link for what it is.

            Raises:
                OSError: it cannot be told, as a directory on the way must not be searched, say.
            """
            return await _can_be_reached(self, 0 if follow_symlinks else os.O_NOFOLLOW)

    else:

        @_on_the_ring
        async def exists(self) -> bool:
            """Is there such a file? IORING_OP_OPENAT, Linux 5.6.

            Raises:
                OSError: it cannot be told, as a directory on the way must not be searched, say.
            """
            return await _can_be_reached(self)

    if sys.version_info >= (3, 13):

        @_on_the_ring
        async def is_dir(self, *, follow_symlinks: bool = True) -> bool:
            """Is it a directory? IORING_OP_OPENAT, Linux 5.6. Arguments and errors as with `exists`."""
            return await _can_be_reached(self, os.O_DIRECTORY | (0 if follow_symlinks else os.O_NOFOLLOW))

        @_on_the_ring
        async def is_file(self, *, follow_symlinks: bool = True) -> bool:
            """Is it a regular file? IORING_OP_STATX, Linux 5.6. Arguments and errors as with `exists`."""
            return stat.S_ISREG(await _type_of(self, 0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW))

    else:

        @_on_the_ring
        async def is_dir(self) -> bool:
            """Is it a directory? IORING_OP_OPENAT, Linux 5.6. Errors as with `exists`."""
            return await _can_be_reached(self, os.O_DIRECTORY)

        @_on_the_ring
        async def is_file(self) -> bool:
            """Is it a regular file? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
            return stat.S_ISREG(await _type_of(self))

    @_on_the_ring
    async def is_symlink(self) -> bool:
        """Is it a symbolic link? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
        return stat.S_ISLNK(await _type_of(self, _AT_SYMLINK_NOFOLLOW))

    @_on_the_ring
    async def is_socket(self) -> bool:
        """Is it a socket? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
        return stat.S_ISSOCK(await _type_of(self))

    @_on_the_ring
    async def is_fifo(self) -> bool:
        """Is it a FIFO? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
        return stat.S_ISFIFO(await _type_of(self))

    @_on_the_ring
    async def is_block_device(self) -> bool:
        """Is it a block device? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
        return stat.S_ISBLK(await _type_of(self))

    @_on_the_ring
    async def is_char_device(self) -> bool:
        """Is it a character device? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
        return stat.S_ISCHR(await _type_of(self))

    if sys.version_info >= (3, 12):

        @_on_the_ring
        async def is_mount(self) -> bool:
            """Is it where a file system is mounted? IORING_OP_STATX, Linux 5.6. As `os.path.ismount` sees it."""
            try:
                here = await statx(self, flags=_AT_SYMLINK_NOFOLLOW)
            except (OSError, ValueError):
                return False
            try:
                above = await statx(f"{self}/.." if stat.S_ISDIR(here.st_mode) else self.parent)
            except PermissionError:  # a directory that must not be searched; its parent has to be found by name
                return await _is_mount_in_thread(Path(self))
            return here.st_dev != above.st_dev or here.st_ino == above.st_ino

        @_on_the_ring
        async def is_junction(self) -> bool:
            """False: only Windows has junctions."""
            await trio.lowlevel.checkpoint()
            return False

    else:

        @_on_the_ring
        async def is_mount(self) -> bool:
            """Is it where a file system is mounted? IORING_OP_STATX, Linux 5.6. Errors as with `exists`."""
            if not await _can_be_reached(self, os.O_DIRECTORY):
                return False
            here = await statx(self)
            try:
                above = await statx(self.parent)
            except OSError:
                return False
            return here.st_dev != above.st_dev or here.st_ino == above.st_ino

    # Changes

    @_on_the_ring
    async def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes a directory. IORING_OP_MKDIRAT, Linux 5.15.

        Args:
            mode: its permissions, before the umask.
            parents: make those above it as well, with the default permissions.
            exist_ok: a directory that is there is no error.

        Raises:
            OSError: as `os.mkdir`.
        """
        lacking: list[Path] = []
        for path in (self, *self.parents):
            try:
                await _make_directory(path, 0o777 if lacking else mode, exist_ok or bool(lacking))
                break
            except FileNotFoundError:
                if not parents:
                    raise
                lacking.append(path)
        while lacking:
            path = lacking.pop()
            await _make_directory(path, 0o777 if lacking else mode, exist_ok or bool(lacking))

    @_on_the_ring
    async def rmdir(self) -> None:
        """Removes a directory, which must be empty. IORING_OP_UNLINKAT, Linux 5.11.

        Raises:
            OSError: as `os.rmdir`.
        """
        await unlinkat(self, _AT_REMOVEDIR)

    @_on_the_ring
    async def unlink(self, missing_ok: bool = False) -> None:
        """Removes a file or a symbolic link. IORING_OP_UNLINKAT, Linux 5.11.

        Args:
            missing_ok: that there is none is no error.

        Raises:
            OSError: as `os.unlink`.
        """
        try:
            await unlinkat(self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_on_the_ring
    async def rename(self, target: StrPath) -> Self:
        """Renames the file, replacing one that is there. IORING_OP_RENAMEAT, Linux 5.11.

        Args:
            target: its new name; a relative one starts at the current directory.

        Returns:
            the new path.

        Raises:
            OSError: as `os.rename`.
        """
        await renameat2(self, target)
        return type(self)(target)

    @_on_the_ring
    async def replace(self, target: StrPath) -> Self:
        """As `rename`, which on Linux is the same. IORING_OP_RENAMEAT, Linux 5.11."""
        await renameat2(self, target)
        return type(self)(target)

    @_on_the_ring
    async def symlink_to(self, target: StrOrBytesPath, target_is_directory: bool = False) -> None:
        """Makes this path a symbolic link to ``target``. IORING_OP_SYMLINKAT, Linux 5.15.

        Args:
            target: what the link says.
            target_is_directory: matters on Windows only.

        Raises:
            OSError: as `os.symlink`.
        """
        await symlinkat(target, self)

    @_on_the_ring
    async def hardlink_to(self, target: StrOrBytesPath) -> None:
        """Makes this path another name of the file ``target``. IORING_OP_LINKAT, Linux 5.15.

        Raises:
            OSError: as `os.link`.
        """
        await linkat(target, self)

    @_on_the_ring
    @enable_ki_protection
    async def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Makes an empty file; the times of one that is there become now. IORING_OP_OPENAT, Linux 5.6.

        Setting times is no operation of io_uring: if the file is there, a thread does it.

        Args:
            mode: permissions of a new file, before the umask.
            exist_ok: False makes it an error that the file is there.

        Raises:
            OSError: as `os.open`.
        """
        try:
            fd = await openat(self, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        except FileExistsError:
            if not exist_ok:
                raise
        else:
            try:
                with trio.CancelScope(shield=True):
                    await close(fd)
            except KeyboardInterrupt:  # so it was not closed
                os.close(fd)
                raise
            return
        await _touch_in_thread(Path(self), mode)


def _decoded(data: bytes, encoding: str | None, errors: str | None, newline: str | None) -> str:
    with io.TextIOWrapper(io.BytesIO(data), encoding, errors, newline) as text:
        return text.read()


@enable_ki_protection
async def _can_be_reached(path: StrPath, flags: int = 0) -> bool:
    """Is something there that can be opened with O_PATH and these flags?"""
    try:
        fd = await openat(path, os.O_PATH | flags)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):  # that says nothing about the path
            file_type = await _type_of(path, _AT_SYMLINK_NOFOLLOW if flags & os.O_NOFOLLOW else 0)
            return stat.S_ISDIR(file_type) if flags & os.O_DIRECTORY else file_type != 0
        if exc.errno not in _NOT_THERE:
            raise
        return False
    except ValueError:  # no file can have this name
        return False
    os.close(fd)
    return True


async def _type_of(path: StrPath, flags: int = 0) -> int:
    """The type as in ``st_mode``, or 0 if nothing is there."""
    try:
        return stat.S_IFMT((await statx(path, flags=flags, mask=_STATX_TYPE)).st_mode)
    except OSError as exc:
        if exc.errno not in _NOT_THERE:
            raise
        return 0
    except ValueError:  # no file can have this name
        return 0


async def _make_directory(path: StrPath, mode: int, exist_ok: bool) -> None:
    try:
        await mkdirat(path, mode)
    except FileNotFoundError:
        raise
    except OSError:  # EEXIST, but the kernel may think something else the more important error
        if not exist_ok or not await _can_be_reached(path, os.O_DIRECTORY):
            raise
