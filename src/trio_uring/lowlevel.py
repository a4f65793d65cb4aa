"""Operations on raw file descriptors: one async function per io_uring opcode.

They run inside `trio_uring.run`, or any trio run after `trio_uring.install`.
"""

from __future__ import annotations

from ._cancel import Kind, State
from ._core import InFlight
from ._ops import (
    TABLE,
    accept,
    async_cancel,
    close,
    connect,
    fdatasync,
    fsync,
    nop,
    openat,
    poll,
    read,
    readv,
    recv,
    recvmsg,
    send,
    sendmsg,
    shutdown,
    socket,
    statx,
    timeout,
    write,
    writev,
)

__all__ = [
    "TABLE",
    "InFlight",
    "Kind",
    "State",
    "accept",
    "async_cancel",
    "close",
    "connect",
    "fdatasync",
    "fsync",
    "nop",
    "openat",
    "poll",
    "read",
    "readv",
    "recv",
    "recvmsg",
    "send",
    "sendmsg",
    "shutdown",
    "socket",
    "statx",
    "timeout",
    "write",
    "writev",
]
