"""Counts the system calls a piece of work makes, in all its threads, with ptrace(2): no root, no package.

The work runs in a forked child and says with `mark` where counting begins and where it ends; set-up and warm-up
are not counted. What the kernel's own worker threads do is no system call and is not counted either.

The tracer slows the child down. Threads that compete for the GIL then make several times the futex calls that they
make by themselves. So count one operation at a time where threads are involved: that agrees with what
``perf stat -e raw_syscalls:sys_enter`` counts without slowing anything down.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    Mark = Callable[[], None]

_TRACEME: Final = 0
_SYSCALL: Final = 24
_SETOPTIONS: Final = 0x4200
_GET_SYSCALL_INFO: Final = 0x420E  # Linux 5.3
_OPTIONS: Final = 0x1 | 0x8 | 0x100000  # TRACESYSGOOD, TRACECLONE, EXITKILL
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_INFO_ENTRY: Final = b"\x01"
_WALL: Final = 0x40000000
_NOT_PERMITTED: Final = 77

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def count(work: Callable[[Mark], object]) -> int | None:
    """The number of system calls between the two calls of ``mark`` that ``work`` makes; None where ptrace is forbidden.

    To be called while the process has one thread: it forks.
    """
    assert threading.active_count() == 1, "fork and threads do not go together"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _run_traced(work)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _NOT_PERMITTED:
        return None
    return _trace(pid)


def _run_traced(work: Callable[[Mark], object]) -> NoReturn:
    pid = os.getpid()
    os.setpgid(0, 0)  # so that the tracer can wait for its threads and for nobody else
    if _libc.ptrace(_TRACEME, 0, None, None) != 0:
        os._exit(_NOT_PERMITTED)
    code = 1
    try:
        os.kill(pid, signal.SIGSTOP)
        work(lambda: os.kill(pid, signal.SIGUSR1))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _trace(pid: int) -> int:
    """Drives the child from stop to stop. SIGUSR1 is the mark; the child never sees it."""
    info = ctypes.create_string_buffer(96)
    marks = calls = 0
    tid, signum = pid, 0
    _libc.ptrace(_SETOPTIONS, pid, None, _OPTIONS)
    while True:
        _libc.ptrace(_SYSCALL, tid, None, signum)  # fails if the thread is gone meanwhile: nothing is lost
        tid, status = os.waitpid(-pid, _WALL)
        signum = 0
        if os.WIFSTOPPED(status):
            stopped_by = os.WSTOPSIG(status)
            if stopped_by == _SYSCALL_STOP:
                if marks == 1:
                    _libc.ptrace(_GET_SYSCALL_INFO, tid, ctypes.c_void_p(len(info)), info)
                    calls += info[0] == _INFO_ENTRY
            elif stopped_by == signal.SIGUSR1:
                marks += 1
            elif stopped_by not in (signal.SIGSTOP, signal.SIGTRAP):  # a new thread, a clone
                signum = stopped_by
        elif tid == pid:
            if status != 0 or marks != 2:
                raise RuntimeError(f"the counted work failed: status {status:#x}, {marks} marks")
            return calls - 1  # the kill() of the second mark
