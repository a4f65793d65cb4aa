"""`open_file`: the builtin `open`, with a file on the ring as its result.

The data path: `_plan` says once for each set of arguments which layers a file has and how it is opened. One openat
through the ring gives the fd, `os.fstat` on it what kind of file it is, and the layers are put on it (`_binary_files`,
`_text_files`). Between the fd and the file object that owns it nothing waits, so a cancel loses none.

What is right and wrong with a mode, an encoding and so on, the builtin `open` knows: `_plan` has it open the null
device with them.
"""

from __future__ import annotations

import errno
import functools
import io
import locale
import mmap
import os
import stat
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast, overload

from trio.lowlevel import checkpoint, enable_ki_protection

from ._binary_files import AsyncFile, BufferedRandom, BufferedReader, BufferedWriter, RawFile
from ._core import _this_thread
from ._file_ops import AT_FDCWD, OPENAT
from ._structs import CHARS, address_of, c_path, from_buffer
from ._text_files import TextFile, TextSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import (
        OpenBinaryMode,
        OpenBinaryModeReading,
        OpenBinaryModeUpdating,
        OpenBinaryModeWriting,
        OpenTextMode,
    )

    from ._structs import StrOrBytesPath

    FileOrFd = StrOrBytesPath | int
    Opener = Callable[[str, int], int]

_BUFFERED: Final[dict[type, type[BufferedReader | BufferedWriter | BufferedRandom]]] = {
    io.BufferedReader: BufferedReader,
    io.BufferedWriter: BufferedWriter,
    io.BufferedRandom: BufferedRandom,
}
_locale_encoding: Final = getattr(locale, "getencoding", functools.partial(locale.getpreferredencoding, False))


class _Plan(NamedTuple):
    """What the arguments of `open_file` come to.

    Attributes:
        flags: ``os.O_*``.
        raw_mode: the mode of the raw file.
        buffered: the layer above; None if there is none.
        text: the settings of the layer above that, if there is one.
    """

    flags: int
    raw_mode: str
    buffered: type[BufferedReader | BufferedWriter | BufferedRandom] | None
    text: TextSettings | None


@functools.lru_cache(typed=True)
def _plan(mode: str, buffering: int, encoding: str | None, errors: str | None, newline: str | None) -> _Plan:
    flags_of_mode = 0

    def opener(path: str, flags: int) -> int:
        nonlocal flags_of_mode
        flags_of_mode = flags
        return os.open(path, flags & os.O_ACCMODE | os.O_CLOEXEC)

    with open(os.devnull, mode, buffering, encoding, errors, newline, opener=opener) as file:
        if isinstance(file, io.FileIO):
            return _Plan(flags_of_mode, file.mode, None, None)
        if not isinstance(file, io.TextIOWrapper):
            return _Plan(flags_of_mode, file.mode, _BUFFERED[type(file)], None)
        settings = TextSettings(file.encoding, cast("str", file.errors), newline, file.line_buffering)
        return _Plan(flags_of_mode, file.buffer.raw.mode, _BUFFERED[type(file.buffer)], settings)


# The types are those of trio.open_file.


@overload
async def open_file(
    file: FileOrFd,
    mode: OpenTextMode = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> TextFile: ...


@overload
async def open_file(
    file: FileOrFd,
    mode: OpenBinaryMode,
    buffering: Literal[0],
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> RawFile: ...


@overload
async def open_file(
    file: FileOrFd,
    mode: OpenBinaryModeUpdating,
    buffering: Literal[-1, 1] = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> BufferedRandom: ...


@overload
async def open_file(
    file: FileOrFd,
    mode: OpenBinaryModeWriting,
    buffering: Literal[-1, 1] = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> BufferedWriter: ...


@overload
async def open_file(
    file: FileOrFd,
    mode: OpenBinaryModeReading,
    buffering: Literal[-1, 1] = -1,
    encoding: None = None,
    errors: None = None,
    newline: None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> BufferedReader: ...


@overload
async def open_file(
    file: FileOrFd,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> AsyncFile: ...


@enable_ki_protection
async def open_file(
    file: FileOrFd,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Opener | None = None,
) -> AsyncFile:
    """Opens a file on the ring; the arguments are those of `open`. IORING_OP_OPENAT, Linux 5.6.

    Args:
        file: a path, or an fd that is open.
        mode: ``r``, ``w``, ``a`` or ``x``; with ``+`` for both directions, ``b`` for bytes.
        buffering: 0: none, for bytes only. 1: text is flushed at line ends. More: the buffer's size in bytes.
        encoding, errors, newline: of text, as in `open`.
        closefd: False leaves an fd that was given open.
        opener: called with path and flags, in this thread; returns the fd.

    An open that is cancelled leaves no fd. Opening a FIFO to write waits until somebody reads it, and can be cancelled;
    opening one to read does not wait, but the first read waits until somebody has written.

    Raises:
        OSError: as `open`, with the path as its ``filename``.
        UnavailableError: the run can have no ring.
    """
    name: Any = file if isinstance(file, int) else os.fspath(file)
    if encoding is None and "b" not in str(mode):
        encoding = io.text_encoding(None, 2)
        if encoding == "locale":
            encoding = _locale_encoding()
    plan = (_plan.__wrapped__ if buffering == 1 else _plan)(mode, buffering, encoding, errors, newline)
    if isinstance(file, int):
        await _on_a_ring()
        if file < 0:
            raise ValueError("negative file descriptor")
        raw = _raw_file(int(file), name, plan, closefd, False)
    elif not closefd:
        raise ValueError("Cannot use closefd=False with file name")
    else:
        fd = await (_open(name, plan.flags) if opener is None else _open_with(opener, name, plan.flags))
        try:
            raw = _raw_file(fd, name, plan, True, opener is None)
        except BaseException:
            os.close(fd)
            raise
    try:
        return _with_layers(raw, mode, buffering, plan)
    except BaseException:
        raw._close()
        raise


async def _on_a_ring() -> None:
    """A checkpoint, and the ring is there."""
    _this_thread.manager.require(OPENAT)
    await checkpoint()


async def _open_with(opener: Opener, path: Any, flags: int) -> int:
    await _on_a_ring()
    fd = opener(path, flags)
    if not isinstance(fd, int):
        raise TypeError("expected integer from opener")
    if fd < 0:
        raise ValueError(f"opener returned {fd}")
    os.set_inheritable(fd, False)
    return fd


async def _open(path: str | bytes, flags: int) -> int:
    fd: int = await _this_thread.manager.perform(
        OPENAT, AT_FDCWD, 0, c_path(path), 0o666, flags | os.O_CLOEXEC, None, path
    )
    return fd


def _raw_file(fd: int, name: Any, plan: _Plan, closefd: bool, just_opened: bool) -> RawFile:
    """The raw file; the fd stays the caller's if this raises."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    raw = RawFile(fd, status, name, plan.raw_mode, closefd, just_opened)
    if plan.flags & os.O_APPEND and raw.seekable():
        os.lseek(fd, 0, os.SEEK_END)
    return raw


def _with_layers(raw: RawFile, mode: str, buffering: int, plan: _Plan) -> AsyncFile:
    if plan.buffered is None:
        return raw
    text = plan.text
    if text is not None and buffering < 0 and not raw._regular and raw.isatty():
        text = text._replace(line_buffering=True)
    if plan.buffered is BufferedRandom and not raw.seekable():
        raise io.UnsupportedOperation("File or stream is not seekable.")
    buffered = plan.buffered(raw, buffering if buffering > 1 else raw._block_size)
    return buffered if text is None else TextFile(buffered, text, mode)


def aligned_buffer(size: int, alignment: int = mmap.PAGESIZE) -> memoryview:
    """Memory for files that are opened with ``O_DIRECT``: zeros, at an address that is a multiple of ``alignment``.

    Args:
        size: in bytes. ``O_DIRECT`` wants a multiple of the device's block size.
        alignment: in bytes, a power of two.

    Raises:
        ValueError: the size is not positive, or the alignment no power of two.
    """
    if size <= 0:
        raise ValueError(f"size must be positive: {size}")
    if alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two: {alignment}")
    whole = mmap.mmap(-1, size if alignment <= mmap.PAGESIZE else size + alignment)
    start = -address_of(from_buffer(CHARS, whole)) % alignment
    return memoryview(whole)[start : start + size]
