"""Numbers of the kernel's io_uring ABI, up to Linux 6.18.

They are ABI, so an opcode newer than the installed liburing headers is filled by number. Whether the
running kernel knows it is the probe's business, never this file's.
Source: include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import enum


class Opcode(enum.IntEnum):
    """``IORING_OP_*``."""

    NOP = 0
    READV = 1
    WRITEV = 2
    FSYNC = 3
    READ_FIXED = 4
    WRITE_FIXED = 5
    POLL_ADD = 6
    POLL_REMOVE = 7
    SYNC_FILE_RANGE = 8
    SENDMSG = 9
    RECVMSG = 10
    TIMEOUT = 11
    TIMEOUT_REMOVE = 12
    ACCEPT = 13
    ASYNC_CANCEL = 14
    LINK_TIMEOUT = 15
    CONNECT = 16
    FALLOCATE = 17
    OPENAT = 18
    CLOSE = 19
    FILES_UPDATE = 20
    STATX = 21
    READ = 22
    WRITE = 23
    FADVISE = 24
    MADVISE = 25
    SEND = 26
    RECV = 27
    OPENAT2 = 28
    EPOLL_CTL = 29
    SPLICE = 30
    PROVIDE_BUFFERS = 31
    REMOVE_BUFFERS = 32
    TEE = 33
    SHUTDOWN = 34
    RENAMEAT = 35
    UNLINKAT = 36
    MKDIRAT = 37
    SYMLINKAT = 38
    LINKAT = 39
    MSG_RING = 40
    FSETXATTR = 41
    SETXATTR = 42
    FGETXATTR = 43
    GETXATTR = 44
    SOCKET = 45
    URING_CMD = 46
    SEND_ZC = 47
    SENDMSG_ZC = 48
    READ_MULTISHOT = 49
    WAITID = 50
    FUTEX_WAIT = 51
    FUTEX_WAKE = 52
    FUTEX_WAITV = 53
    FIXED_FD_INSTALL = 54
    FTRUNCATE = 55
    BIND = 56
    LISTEN = 57
    RECV_ZC = 58
    EPOLL_WAIT = 59
    READV_FIXED = 60
    WRITEV_FIXED = 61
    PIPE = 62


class Setup(enum.IntFlag):
    """``IORING_SETUP_*``."""

    IOPOLL = 1 << 0
    SQPOLL = 1 << 1
    SQ_AFF = 1 << 2
    CQSIZE = 1 << 3
    CLAMP = 1 << 4
    ATTACH_WQ = 1 << 5
    R_DISABLED = 1 << 6
    SUBMIT_ALL = 1 << 7
    COOP_TASKRUN = 1 << 8
    TASKRUN_FLAG = 1 << 9
    SQE128 = 1 << 10
    CQE32 = 1 << 11
    SINGLE_ISSUER = 1 << 12
    DEFER_TASKRUN = 1 << 13
    NO_MMAP = 1 << 14
    REGISTERED_FD_ONLY = 1 << 15
    NO_SQARRAY = 1 << 16
    HYBRID_IOPOLL = 1 << 17
    CQE_MIXED = 1 << 18


class Feature(enum.IntFlag):
    """``IORING_FEAT_*``."""

    SINGLE_MMAP = 1 << 0
    NODROP = 1 << 1
    SUBMIT_STABLE = 1 << 2
    RW_CUR_POS = 1 << 3
    CUR_PERSONALITY = 1 << 4
    FAST_POLL = 1 << 5
    POLL_32BITS = 1 << 6
    SQPOLL_NONFIXED = 1 << 7
    EXT_ARG = 1 << 8
    NATIVE_WORKERS = 1 << 9
    RSRC_TAGS = 1 << 10
    CQE_SKIP = 1 << 11
    LINKED_FILE = 1 << 12
    REG_REG_RING = 1 << 13
    RECVSEND_BUNDLE = 1 << 14
    MIN_TIMEOUT = 1 << 15
    RW_ATTR = 1 << 16
    NO_IOWAIT = 1 << 17


SQE_FIXED_FILE = 1 << 0  # fd is a place in the table of registered files
SQE_IO_LINK = 1 << 2  # the next request starts when this one is done, and is cancelled if this one fails
SQE_IO_HARDLINK = 1 << 3  # the next request starts when this one is done, whatever came of it
SQE_BUFFER_SELECT = 1 << 5  # the kernel takes a provided buffer

SPLICE_F_FD_IN_FIXED = 1 << 31  # and so is splice's and tee's second fd

CQE_F_BUFFER = 1 << 0  # the upper half of the flags is the buffer's number
CQE_F_MORE = 1 << 1  # more CQEs of this request follow
CQE_F_NOTIF = 1 << 3  # the zero-copy notification: the buffer is free
CQE_F_BUF_MORE = 1 << 4  # the rest of the buffer is still the kernel's (incremental consumption)
CQE_BUFFER_SHIFT = 16

PBUF_RING_INC = 1 << 1  # io_uring_register_buf_ring: receives share a buffer as long as it has room

ASYNC_CANCEL_ALL = 1 << 0
ASYNC_CANCEL_FD = 1 << 1

FSYNC_DATASYNC = 1 << 0

POLL_ADD_MULTI = 1 << 0
TIMEOUT_ETIME_SUCCESS = 1 << 5  # the time-out's end does not break a chain
TIMEOUT_MULTISHOT = 1 << 6
ACCEPT_MULTISHOT = 1 << 0
RECV_MULTISHOT = 1 << 1
SEND_ZC_REPORT_USAGE = 1 << 3

SOCKET_OP_SIOCINQ = 0
SOCKET_OP_SIOCOUTQ = 1
SOCKET_OP_GETSOCKOPT = 2
SOCKET_OP_SETSOCKOPT = 3

FUTEX2_SIZE_U32 = 0x02
FUTEX2_PRIVATE = 128

NOP_INJECT_RESULT = 1 << 0
