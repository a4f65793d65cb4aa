"""trio's streams over file descriptors: pipes, terminals, the standard streams of a child process.

`trio.lowlevel.FdStream` stays the class it is; one of its methods is replaced in it. So it does not matter who has
imported it when, or through what: `trio.run_process` and anyio's processes have their pipes here, too.

Facts, and what follows from them (the numbers are in the documentation):

* **A pipe has room, as a rule.** So `send_all` writes at once, before the run's next tick and not after it: the other
  side begins that much earlier, which no operation on the ring makes up for. If there is no room at all it waits for
  some, as trio does. What does not fit is written by the ring: one operation where readiness takes a wait and a write.
* **A stream that waits for data should hold no memory**, and trio asks for 64 KiB. A read on the ring would pin that
  much, or take a buffer of the ring's and have it copied; both are slower than a poll on the ring followed by a plain
  read, which is what `receive_some` does as it is.
* **A close wakes who waits**, with no help from here: trio calls ``notify_closing`` first.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Final

import trio
from trio.lowlevel import FdStream, cancel_shielded_checkpoint, checkpoint_if_cancelled, enable_ki_protection

from . import _mount, _trio_internals
from ._core import _this_thread
from ._file_ops import WRITE
from ._structs import CHARS, from_buffer

WRITE_UNCOUNTED: Final = replace(WRITE, counted=False)  # a child that reads nothing keeps nobody else from the ring

_stock_send_all: Final = FdStream.send_all


@enable_ki_protection
async def _send_all(self: FdStream, data: bytes | bytearray | memoryview) -> None:
    """See `trio.lowlevel.FdStream`."""
    if not _this_thread.manager.native:
        await _stock_send_all(self, data)
        return
    with _trio_internals.sending(self):
        _open_fd(self)
        await checkpoint_if_cancelled()
        with memoryview(data) as whole:  # of one size until all is sent
            try:
                sent = await _begin(self, whole)
                while sent < len(whole):  # asks for the fd again: after a close, the number may be another's
                    sent += await _this_thread.manager.perform(
                        WRITE_UNCOUNTED, _open_fd(self), -1, from_buffer(CHARS, whole[sent:]), -1
                    )
            except OSError as exc:
                if exc.errno == errno.EBADF:
                    raise _not_open() from None
                raise trio.BrokenResourceError from exc


async def _begin(stream: FdStream, data: memoryview) -> int:
    """Writes what fits, and says how much. It is a checkpoint, unless more has to follow."""
    sent = 0
    while data:  # an empty write is a message to some
        try:
            sent = os.write(_open_fd(stream), data)
            break
        except BlockingIOError:
            await trio.lowlevel.wait_writable(_open_fd(stream))
        except OSError:
            await cancel_shielded_checkpoint()
            raise
    if sent >= len(data):
        await cancel_shielded_checkpoint()
    return sent


def _open_fd(stream: FdStream) -> int:
    fd = stream.fileno()
    if fd < 0:
        raise _not_open()
    return fd


def _not_open() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("file was already closed")


if _trio_internals.FD_STREAMS_TELL_WHO_SENDS:
    _mount.doors.append(_mount.MethodDoor(FdStream, "send_all", _stock_send_all, _send_all))
