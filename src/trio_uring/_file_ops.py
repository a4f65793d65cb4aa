"""Operations on files: see `_ops` for what holds for all of them.

Where the kernel does them decides what they cost. Reads from the page cache and opens of cached paths complete while
they are submitted. What changes a directory, syncs, or asks for metadata always goes to a worker thread of the kernel:
good with many under way, poor one at a time. An operation on a regular file that has begun cannot be cancelled; bound
its size instead.

A path and what else the kernel reads is copied when the function is called, and kept until the kernel is done with it.
"""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING, Final

from trio.lowlevel import enable_ki_protection

from ._abi import FSYNC_DATASYNC, Opcode
from ._core import HasFileno, _this_thread, number_of
from ._errors import ERESTARTS
from ._ops import close_result, filled_by, operation, row
from ._ring import Form
from ._structs import (
    CHARS,
    address_of,
    c_path,
    content,
    fd_field,
    from_buffer,
    iovec,
    memory,
    new_statx,
    open_how,
    stat_result,
    unsigned,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from ._ops import Request
    from ._structs import StrOrBytesPath

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
STATX_BASIC_STATS: Final = 0x7FF

_XATTR_SIZE_MAX: Final = 1 << 16
_FIELD_MAX: Final = (1 << 32) - 1


# Reading and writing

READ = row(
    "read",
    Opcode.READ,
    "5.6",
    "count",
    "read into a buffer",
    runs="may block",
    wait_for=select.POLLIN,
    form=Form("FW|OG", off=-1),
)
WRITE = row(
    "write",
    Opcode.WRITE,
    "5.6",
    "count",
    "write from a buffer",
    runs="may block",
    wait_for=select.POLLOUT,
    form=Form("FR|OG", off=-1),
)
READV = row(
    "readv", Opcode.READV, "5.1", "count", "read into several buffers", runs="may block", wait_for=select.POLLIN
)
WRITEV = row(
    "writev", Opcode.WRITEV, "5.1", "count", "write from several buffers", runs="may block", wait_for=select.POLLOUT
)


def _read(fd: int | HasFileno, buffer: Buffer, offset: int = -1, flags: int = 0) -> Request[int]:
    return READ, fd if type(fd) is int else number_of(fd), offset, from_buffer(CHARS, buffer, True), -1, flags


@filled_by(_read)
@enable_ki_protection
async def read(fd: int | HasFileno, buffer: Buffer, offset: int = -1, flags: int = 0) -> int:
    """Reads into ``buffer`` and returns the number of bytes; 0 is the end of the file. IORING_OP_READ, Linux 5.6.

    Args:
        fd: what to read.
        buffer: a writable, contiguous buffer. At most 2147479552 bytes are read in one call.
        offset: where in the file; -1 is the file's position, which moves.
        flags: ``os.RWF_*``. With ``RWF_NOWAIT`` a read that would have to wait raises `BlockingIOError`. ``RWF_HIPRI``
            is EINVAL.

    A read of a regular file that the kernel has begun cannot be cancelled; bound its size instead.
    """
    return await _this_thread.manager.perform(
        READ, fd if type(fd) is int else number_of(fd), offset, from_buffer(CHARS, buffer, True), -1, flags
    )


def _write(fd: int | HasFileno, data: Buffer, offset: int = -1, flags: int = 0) -> Request[int]:
    return WRITE, fd if type(fd) is int else number_of(fd), offset, from_buffer(CHARS, data), -1, flags


@filled_by(_write)
@enable_ki_protection
async def write(fd: int | HasFileno, data: Buffer, offset: int = -1, flags: int = 0) -> int:
    """Writes ``data`` and returns the number of bytes written, which may be less. IORING_OP_WRITE, Linux 5.6.

    Args:
        fd: where to write.
        data: any contiguous buffer. At most 2147479552 bytes are written in one call.
        offset: where in the file; -1 is the file's position, which moves; but not where an error, such as a full disk,
            cut the write short (Linux 6.18).
        flags: ``os.RWF_*``: ``RWF_DSYNC``, ``RWF_SYNC``, ``RWF_APPEND``.
    """
    return await _this_thread.manager.perform(
        WRITE, fd if type(fd) is int else number_of(fd), offset, from_buffer(CHARS, data), -1, flags
    )


@operation
def readv(fd: int | HasFileno, buffers: Sequence[Buffer], offset: int = -1, flags: int = 0) -> Request[int]:
    """Reads into ``buffers``, one after the other; returns the bytes in all. IORING_OP_READV, Linux 5.1.

    Args:
        fd: what to read.
        buffers: up to 1024 writable buffers.
        offset, flags: as in `read`.
    """
    number = number_of(fd)
    vector, views = iovec(buffers, writable=True)
    return READV, number, offset, vector, len(views), flags, views


@operation
def writev(fd: int | HasFileno, buffers: Sequence[Buffer], offset: int = -1, flags: int = 0) -> Request[int]:
    """Writes ``buffers``, one after the other; returns the bytes in all. IORING_OP_WRITEV, Linux 5.1.

    Args:
        fd: where to write.
        buffers: up to 1024 buffers.
        offset, flags: as in `write`.
    """
    number = number_of(fd)
    vector, views = iovec(buffers, writable=False)
    return WRITEV, number, offset, vector, len(views), flags, views


# Opening and closing

OPENAT = row(
    "openat",
    Opcode.OPENAT,
    "5.6",
    "fd",
    "open a file",
    runs="may block",
    names="directory",
    dispose=close_result,
    cloexec="op_flags",
    form=Form("PG|L", fd=AT_FDCWD, length=0o777, op_flags=os.O_CLOEXEC),
)
OPENAT2 = row(
    "openat2",
    Opcode.OPENAT2,
    "5.6",
    "fd",
    "open a file, saying how its path is resolved",
    runs="may block",
    names="directory",
    dispose=close_result,
    cloexec="open_how",
)
CLOSE = row(
    "close",
    Opcode.CLOSE,
    "5.6",
    "nothing",
    "close an fd",
    runs="may block",
    names="number",
    success=ERESTARTS | {-errno.EINTR},
    prelude=lambda manager, fd: manager.notify_closing(fd),
)


@operation
def openat(path: StrOrBytesPath, flags: int, mode: int = 0o777, *, dir_fd: int = AT_FDCWD) -> Request[int]:
    """Opens a file and returns its fd, which is not inheritable. IORING_OP_OPENAT, Linux 5.6.

    Args:
        path: relative to ``dir_fd``.
        flags: ``os.O_*``; ``O_CLOEXEC`` is added, as in `os.open`.
        mode: permissions of a file that is created, before the umask.
        dir_fd: an open directory; the default is the current one.

    An open that wins against its cancel returns its fd; none is leaked. A FIFO is not opened as open(2) does:
    reading succeeds at once, writing fails with ENXIO while nobody reads.
    """
    return OPENAT, dir_fd, 0, c_path(path), unsigned("mode", mode), flags | os.O_CLOEXEC, None, os.fspath(path)


@operation
def openat2(
    path: StrOrBytesPath, flags: int, mode: int = 0, resolve: int = 0, *, dir_fd: int = AT_FDCWD
) -> Request[int]:
    """Opens a file as `openat`, but strictly, and as ``resolve`` says. IORING_OP_OPENAT2, Linux 5.6.

    Args:
        path: relative to ``dir_fd``.
        flags: ``os.O_*``; ``O_CLOEXEC`` is added. A flag the kernel does not know is EINVAL.
        mode: permissions of a file that is created, before the umask; 0 without ``O_CREAT`` or ``O_TMPFILE``.
        resolve: how the path may lead to the file, ``RESOLVE_*`` of openat2(2): ``NO_XDEV`` 0x01,
            ``NO_MAGICLINKS`` 0x02, ``NO_SYMLINKS`` 0x04, ``BENEATH`` 0x08, ``IN_ROOT`` 0x10, ``CACHED`` 0x20.
        dir_fd: an open directory; the default is the current one.
    """
    how = open_how(unsigned("flags", flags, 64) | os.O_CLOEXEC, mode, resolve)
    return OPENAT2, dir_fd, address_of(how), c_path(path), 24, 0, how, os.fspath(path)


@operation
def close(fd: int) -> Request[None]:
    """Closes ``fd``. IORING_OP_CLOSE, Linux 5.6.

    Whoever waits for an operation on it gets `trio.ClosedResourceError` first. If this raises `trio.Cancelled` the fd
    is still open and yours: shield the call where it must be closed.
    """
    return CLOSE, fd


# Storage

FSYNC = row("fsync", Opcode.FSYNC, "5.1", "nothing", "flush a file's data and metadata to storage", runs="worker")
FDATASYNC = row("fdatasync", Opcode.FSYNC, "5.1", "nothing", "flush a file's data to storage", runs="worker")
SYNC_FILE_RANGE = row(
    "sync_file_range", Opcode.SYNC_FILE_RANGE, "5.2", "nothing", "flush a part of a file's data", runs="worker"
)
FALLOCATE = row("fallocate", Opcode.FALLOCATE, "5.6", "nothing", "allocate or free a part of a file", runs="worker")
FTRUNCATE = row("ftruncate", Opcode.FTRUNCATE, "6.9", "nothing", "set a file's size", runs="worker")
FADVISE = row("fadvise", Opcode.FADVISE, "5.6", "nothing", "announce how a file will be used", runs="worker")
MADVISE = row("madvise", Opcode.MADVISE, "5.6", "nothing", "announce how memory will be used", runs="worker")


@operation
def fsync(fd: int | HasFileno) -> Request[None]:
    """Returns when the file's data and metadata are on storage. IORING_OP_FSYNC, Linux 5.1.

    The kernel does it in a worker thread.
    """
    return FSYNC, number_of(fd)


@operation
def fdatasync(fd: int | HasFileno) -> Request[None]:
    """As `fsync`, without metadata that reading does not need. IORING_OP_FSYNC with DATASYNC, Linux 5.1."""
    return FDATASYNC, number_of(fd), 0, None, 0, FSYNC_DATASYNC


@operation
def sync_file_range(fd: int | HasFileno, offset: int, length: int, flags: int) -> Request[None]:
    """Starts or awaits the writing of a part of a file. IORING_OP_SYNC_FILE_RANGE, Linux 5.2.

    Args:
        fd: a regular file, a block device or a directory.
        offset: the first byte.
        length: how many bytes, at most 4294967295; 0 is all up to the end.
        flags: ``SYNC_FILE_RANGE_*``: ``WAIT_BEFORE`` 1, ``WRITE`` 2, ``WAIT_AFTER`` 4.

    It writes no metadata and does not flush the drive's cache: no substitute for `fdatasync`. See sync_file_range(2).
    """
    return SYNC_FILE_RANGE, number_of(fd), offset, None, unsigned("length", length), flags


@operation
def fallocate(fd: int | HasFileno, mode: int, offset: int, length: int) -> Request[None]:
    """Allocates or frees a part of a file. IORING_OP_FALLOCATE, Linux 5.6.

    Args:
        fd: a file open for writing.
        mode: 0 allocates and extends the file, as `os.posix_fallocate`. Or ``FALLOC_FL_*`` of fallocate(2):
            ``KEEP_SIZE`` 0x01, ``PUNCH_HOLE`` 0x02, ``COLLAPSE_RANGE`` 0x08, ``ZERO_RANGE`` 0x10,
            ``INSERT_RANGE`` 0x20.
        offset: the first byte.
        length: how many bytes.
    """
    length = unsigned("length", length, 63)
    return FALLOCATE, number_of(fd), offset, None, unsigned("mode", mode), 0, None, None, length


@operation
def ftruncate(fd: int | HasFileno, length: int) -> Request[None]:
    """Sets a file's size, as `os.ftruncate`. IORING_OP_FTRUNCATE, Linux 6.9.

    Args:
        fd: a file open for writing.
        length: in bytes. What is added reads as zeros.
    """
    return FTRUNCATE, number_of(fd), length


@operation
def fadvise(fd: int | HasFileno, offset: int, length: int, advice: int) -> Request[None]:
    """Announces how a part of a file will be used, as `os.posix_fadvise`. IORING_OP_FADVISE, Linux 5.6.

    Args:
        fd: a file.
        offset: the first byte.
        length: how many bytes; 0 is all up to the end. More than 4294967295 need Linux 6.11, or are EINVAL.
        advice: ``os.POSIX_FADV_*``.
    """
    short, long = _in_two_fields(unsigned("length", length, 63))
    return FADVISE, number_of(fd), offset, None, short, unsigned("advice", advice), None, None, long


@operation
def madvise(buffer: Buffer, advice: int) -> Request[None]:
    """Announces how memory will be used, as `mmap.mmap.madvise`. IORING_OP_MADVISE, Linux 5.6.

    Args:
        buffer: memory that begins at a page, such as an `mmap.mmap` or a slice of its memoryview; otherwise EINVAL.
            More than 4294967295 bytes need Linux 6.11.
        advice: ``mmap.MADV_*``. Some destroy the content: ``MADV_DONTNEED``, ``MADV_REMOVE``.
    """
    advice = unsigned("advice", advice)
    view = from_buffer(CHARS, buffer)
    short, long = _in_two_fields(len(view))
    return MADVISE, -1, long, view, short, advice


def _in_two_fields(length: int) -> tuple[int, int]:
    """For the old field of 32 bits and the newer one of 64, which old kernels want to be 0."""
    return (length, 0) if length <= _FIELD_MAX else (0, length)


# Metadata

STATX = row(
    "statx",
    Opcode.STATX,
    "5.6",
    "struct",
    "a file's metadata",
    runs="worker",
    names="directory",
    decode=lambda res, keep: stat_result(keep),
)
GETXATTR = row(
    "getxattr",
    Opcode.GETXATTR,
    "5.19",
    "struct",
    "an extended attribute of a file",
    runs="worker",
    decode=lambda res, keep: content(keep[0], res),
)
FGETXATTR = row(
    "fgetxattr",
    Opcode.FGETXATTR,
    "5.19",
    "struct",
    "an extended attribute of an open file",
    runs="worker",
    decode=lambda res, keep: content(keep[0], res),
)
SETXATTR = row("setxattr", Opcode.SETXATTR, "5.19", "nothing", "set an extended attribute of a file", runs="worker")
FSETXATTR = row(
    "fsetxattr", Opcode.FSETXATTR, "5.19", "nothing", "set an extended attribute of an open file", runs="worker"
)


@operation
def statx(
    path: StrOrBytesPath | int, *, dir_fd: int = AT_FDCWD, flags: int = 0, mask: int = STATX_BASIC_STATS
) -> Request[os.stat_result]:
    """A file's metadata, as `os.stat` returns it. IORING_OP_STATX, Linux 5.6; always in a kernel worker.

    Args:
        path: relative to ``dir_fd``, or an fd.
        dir_fd: an open directory; the default is the current one.
        flags: ``AT_SYMLINK_NOFOLLOW`` (0x100) and the like; see statx(2).
        mask: which fields are wanted; see statx(2).
    """
    mask = unsigned("mask", mask)
    result = new_statx()
    if isinstance(path, int):
        return STATX, path, address_of(result), c_path(""), mask, flags | AT_EMPTY_PATH, result, path
    return STATX, dir_fd, address_of(result), c_path(path), mask, flags, result, os.fspath(path)


@operation
def getxattr(path: StrOrBytesPath, name: StrOrBytesPath) -> Request[bytes]:
    """An extended attribute's value, as `os.getxattr`. IORING_OP_GETXATTR, Linux 5.19.

    Args:
        path: relative to the current directory. A symbolic link is followed.
        name: with its namespace, such as ``"user.mime_type"``.

    The kernel does it in a worker thread, so it is asked once, with room for the largest value there can be (64 KiB).
    """
    value, c_name, file = memory(_XATTR_SIZE_MAX), c_path(name), c_path(path)
    where = 0, 0, 0, address_of(file)
    keep = value, file
    return GETXATTR, -1, address_of(value), c_name, _XATTR_SIZE_MAX, 0, keep, os.fspath(path), 0, None, where


@operation
def fgetxattr(fd: int | HasFileno, name: StrOrBytesPath) -> Request[bytes]:
    """An extended attribute of an open file, as `os.getxattr`. IORING_OP_FGETXATTR, Linux 5.19.

    Args:
        fd: a file.
        name: as in `getxattr`.
    """
    value, c_name, number = memory(_XATTR_SIZE_MAX), c_path(name), number_of(fd)
    return FGETXATTR, number, address_of(value), c_name, _XATTR_SIZE_MAX, 0, (value,), number


@operation
def setxattr(path: StrOrBytesPath, name: StrOrBytesPath, value: Buffer, flags: int = 0) -> Request[None]:
    """Sets an extended attribute, as `os.setxattr`. IORING_OP_SETXATTR, Linux 5.19.

    Args:
        path: relative to the current directory. A symbolic link is followed.
        name: with its namespace, such as ``"user.mime_type"``.
        value: at most 65536 bytes, often less; the file system says.
        flags: ``os.XATTR_CREATE``, ``os.XATTR_REPLACE``.
    """
    c_name, file, filename = c_path(name), c_path(path), os.fspath(path)
    where = 0, 0, 0, address_of(file)
    view = from_buffer(CHARS, value)
    return SETXATTR, -1, address_of(view), c_name, len(view), flags, (view, file), filename, 0, None, where


@operation
def fsetxattr(fd: int | HasFileno, name: StrOrBytesPath, value: Buffer, flags: int = 0) -> Request[None]:
    """Sets an extended attribute of an open file, as `os.setxattr`. IORING_OP_FSETXATTR, Linux 5.19.

    Args:
        fd: a file.
        name, value, flags: as in `setxattr`.
    """
    c_name, number = c_path(name), number_of(fd)
    view = from_buffer(CHARS, value)
    return FSETXATTR, number, address_of(view), c_name, len(view), flags, view, number


# Directories

RENAMEAT2 = row(
    "renameat2",
    Opcode.RENAMEAT,
    "5.11",
    "nothing",
    "rename a file",
    runs="worker",
    names="directory",
    second_fd="length",
)
UNLINKAT = row(
    "unlinkat", Opcode.UNLINKAT, "5.11", "nothing", "remove a file or directory", runs="worker", names="directory"
)
MKDIRAT = row("mkdirat", Opcode.MKDIRAT, "5.15", "nothing", "make a directory", runs="worker", names="directory")
SYMLINKAT = row(
    "symlinkat", Opcode.SYMLINKAT, "5.15", "nothing", "make a symbolic link", runs="worker", names="directory"
)
LINKAT = row(
    "linkat",
    Opcode.LINKAT,
    "5.15",
    "nothing",
    "make another name for a file",
    runs="worker",
    names="directory",
    second_fd="length",
)


@operation
def renameat2(
    src: StrOrBytesPath,
    dst: StrOrBytesPath,
    flags: int = 0,
    *,
    src_dir_fd: int = AT_FDCWD,
    dst_dir_fd: int = AT_FDCWD,
) -> Request[None]:
    """Renames a file, replacing what has the new name, as `os.replace`. IORING_OP_RENAMEAT, Linux 5.11.

    Args:
        src: its name, relative to ``src_dir_fd``.
        dst: its new name, relative to ``dst_dir_fd``.
        flags: ``RENAME_*`` of renameat2(2): ``NOREPLACE`` 1, ``EXCHANGE`` 2, ``WHITEOUT`` 4.
        src_dir_fd, dst_dir_fd: open directories; the default is the current one.
    """
    new_name, names = c_path(dst), (os.fspath(src), os.fspath(dst))
    return RENAMEAT2, src_dir_fd, address_of(new_name), c_path(src), fd_field(dst_dir_fd), flags, new_name, names


@operation
def unlinkat(path: StrOrBytesPath, flags: int = 0, *, dir_fd: int = AT_FDCWD) -> Request[None]:
    """Removes a file, as `os.unlink`, or a directory, as `os.rmdir`. IORING_OP_UNLINKAT, Linux 5.11.

    Args:
        path: relative to ``dir_fd``.
        flags: ``AT_REMOVEDIR`` (0x200) for a directory.
        dir_fd: an open directory; the default is the current one.
    """
    return UNLINKAT, dir_fd, 0, c_path(path), 0, flags, None, os.fspath(path)


@operation
def mkdirat(path: StrOrBytesPath, mode: int = 0o777, *, dir_fd: int = AT_FDCWD) -> Request[None]:
    """Makes a directory, as `os.mkdir`. IORING_OP_MKDIRAT, Linux 5.15.

    Args:
        path: relative to ``dir_fd``.
        mode: its permissions, before the umask.
        dir_fd: an open directory; the default is the current one.
    """
    return MKDIRAT, dir_fd, 0, c_path(path), unsigned("mode", mode), 0, None, os.fspath(path)


@operation
def symlinkat(target: StrOrBytesPath, path: StrOrBytesPath, *, dir_fd: int = AT_FDCWD) -> Request[None]:
    """Makes a symbolic link, as `os.symlink`. IORING_OP_SYMLINKAT, Linux 5.15.

    Args:
        target: what the link says. Nothing of that name need exist.
        path: the link's name, relative to ``dir_fd``.
        dir_fd: an open directory; the default is the current one.
    """
    link, names = c_path(path), (os.fspath(target), os.fspath(path))
    return SYMLINKAT, dir_fd, address_of(link), c_path(target), 0, 0, link, names


@operation
def linkat(
    src: StrOrBytesPath,
    dst: StrOrBytesPath,
    flags: int = 0,
    *,
    src_dir_fd: int = AT_FDCWD,
    dst_dir_fd: int = AT_FDCWD,
) -> Request[None]:
    """Makes another name for a file, as `os.link`. IORING_OP_LINKAT, Linux 5.15.

    Args:
        src: its name, relative to ``src_dir_fd``.
        dst: the other name, relative to ``dst_dir_fd``.
        flags: ``AT_SYMLINK_FOLLOW`` (0x400): a symbolic link ``src`` stands for what it points to. ``AT_EMPTY_PATH``
            (0x1000): an empty ``src`` is the open file ``src_dir_fd``.
        src_dir_fd, dst_dir_fd: open directories; the default is the current one.
    """
    new_name, names = c_path(dst), (os.fspath(src), os.fspath(dst))
    return LINKAT, src_dir_fd, address_of(new_name), c_path(src), fd_field(dst_dir_fd), flags, new_name, names
