"""What the page cache has of a file, read without waiting.

A read that refuses to wait (``RWF_NOWAIT``) is done by the run's own thread and needs no wake-up; in the ring it would
be done by that thread as well. So its size is how long other tasks wait. Not every file system knows it: tmpfs,
overlays, FUSE, NFS and /proc do not. A file with ``O_DIRECT`` would have it wait all the same.

Between two awaits, and only there, `_scratch` is whoever's reads into it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import Final

GUESS: Final = 1 << 16
"""How large a file may be to be read at once."""

_RWF_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)  # a Python built without preadv2(2), on older Alpine, lacks it


class _Scratch(threading.local):
    """Memory to read small files into. No await while something in it is wanted."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(GUESS))
        self.buffers = [self.memory]
        self.one_byte = [bytearray(1)]


_scratch: Final = _Scratch()


def read_piece(fd: int, size: int, offset: int) -> bytes | None:
    """``size`` bytes from there on, `GUESS` at most, if all of them are in the page cache.

    Raises:
        OSError: the file is one that cannot be asked not to wait, or cannot be read.
    """
    if not _RWF_NOWAIT:
        return None
    piece = _scratch.memory[:size]
    try:
        n = os.preadv(fd, [piece], offset, _RWF_NOWAIT)
    except BlockingIOError:
        return None
    return piece.tobytes() if n == size else None


def read_cached(fd: int, offset: int) -> tuple[bytes | None, bool]:
    """What a small file holds from there on, if it is in the page cache; and whether the file is one that never waits
    when it is asked not to. The file's position does not move.
    """
    scratch = _scratch
    if not _RWF_NOWAIT:
        return None, False
    try:
        n = os.preadv(fd, scratch.buffers, offset, _RWF_NOWAIT)
        if n == GUESS:
            return None, True
        # A short read may be all that is in the cache, which has whole pages. So one that ends within a page has found
        # the end of the file; after any other, that is where nothing is read.
        end = offset + n
        if end % mmap.PAGESIZE == 0 and os.preadv(fd, scratch.one_byte, end, _RWF_NOWAIT) != 0:
            return None, True
    except OSError as exc:  # what is really wrong the ring's read will say
        return None, exc.errno == errno.EAGAIN
    return scratch.memory[:n].tobytes(), True
