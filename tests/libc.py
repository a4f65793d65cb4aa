"""System calls for which the standard library has no function: the oracle of tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from typing import Final

from trio_uring._ring import ffi

AT_FDCWD: Final = -100
AT_REMOVEDIR: Final = 0x200
AT_SYMLINK_FOLLOW: Final = 0x400
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_COLLAPSE_RANGE: Final = 8
FALLOC_FL_ZERO_RANGE: Final = 16

_libc: Final = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437
_SYS_FUTEX: Final = {"x86_64": 202, "aarch64": 98, "riscv64": 98}[platform.machine()]
_FUTEX_WAKE_PRIVATE: Final = 1 | 128


def _call(name: str, *args: object) -> int:
    res = int(getattr(_libc, name)(*args))
    if res < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return res


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    _call("sync_file_range", fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _call("fallocate", fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def openat2(path: bytes, flags: int, mode: int, resolve: int, dir_fd: int = AT_FDCWD) -> int:
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)
    return _call("syscall", _SYS_OPENAT2, dir_fd, path, how, ctypes.c_size_t(ctypes.sizeof(how)))


def renameat2(src: bytes, dst: bytes, flags: int, src_dir_fd: int = AT_FDCWD, dst_dir_fd: int = AT_FDCWD) -> None:
    _call("renameat2", src_dir_fd, src, dst_dir_fd, dst, ctypes.c_uint(flags))


def linkat(src: bytes, dst: bytes, flags: int) -> None:
    _call("linkat", AT_FDCWD, src, AT_FDCWD, dst, flags)


def tee(fd_in: int, fd_out: int, length: int, flags: int) -> int:
    return _call("tee", fd_in, fd_out, ctypes.c_size_t(length), ctypes.c_uint(flags))


def splice(fd_in: int, offset_in: int, fd_out: int, offset_out: int, length: int, flags: int) -> int:
    offsets = [None if offset == -1 else ctypes.byref(ctypes.c_int64(offset)) for offset in (offset_in, offset_out)]
    return _call("splice", fd_in, offsets[0], fd_out, offsets[1], ctypes.c_size_t(length), ctypes.c_uint(flags))


def futex_wake(futex: memoryview, count: int) -> int:
    address = ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.from_buffer(futex))))
    return _call("syscall", _SYS_FUTEX, address, _FUTEX_WAKE_PRIVATE, count)


def pages_in_cache(fd: int) -> int:
    """How many pages of a file, which is not empty, the page cache has. Unlike a read, asking brings none there."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        pages = bytearray(-(-size // mmap.PAGESIZE))
        address = ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.from_buffer(mapped))))
        _call("mincore", address, ctypes.c_size_t(size), (ctypes.c_char * len(pages)).from_buffer(pages))
    return sum(page & 1 for page in pages)
