"""Exceptions, and what an errno means here. Imports nothing of ours."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Final

# What the kernel answers for an operation that a signal or a cancel interrupted. The last five are its
# internal ERESTART* codes: they leak out of io-wq (a cancelled open of a FIFO gives -512).
ERESTARTS: Final = frozenset(range(-516, -511))
INTERRUPTED: Final = ERESTARTS | {-errno.ECANCELED, -errno.EINTR}


class UnavailableError(OSError):
    """This process cannot have a ring. The message says why and what to do about it."""


class UnsupportedOperation(OSError):
    """The running kernel lacks an operation. The message names it and the kernel that brought it."""


class FallbackWarning(UserWarning):
    """io_uring was asked for and cannot be had: the run goes on without it, slower."""


class RingError(RuntimeError):
    """A ring was used where it cannot be: by a forked child, by another thread, after its close.

    Also raised when the kernel reports that a completion is lost. None of these can be mended by
    trying again.
    """


def not_in_a_child() -> RingError:
    """What a forked child gets that goes on with what is its parent's."""
    return RingError("this ring belongs to the parent process; a forked child must start a run of its own")


class ChainBrokenError(OSError):
    """A step of a chain was not done, because one before it failed or came short. Its errno is ECANCELED.

    Also stands for an fd that a step of such a chain had opened: it was closed.

    Attributes:
        step: which step broke the chain: its position in the batch.
    """

    def __init__(self, step: int, name: str) -> None:
        super().__init__(errno.ECANCELED, f"the chain was broken by step {step} ({name})")
        self.step = step


def os_error(res: int, filename: object = None) -> OSError:
    """The exception for a negative result, as the standard library would build it; a tuple is two file names."""
    code = -res
    if filename is None:
        return OSError(code, os.strerror(code))
    if isinstance(filename, tuple):
        return OSError(code, os.strerror(code), filename[0], None, filename[1])
    return OSError(code, os.strerror(code), filename)


def locked_memory_error(purpose: str) -> OSError:
    """The ENOMEM for memory that cannot be locked."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return OSError(
        errno.ENOMEM,
        f"the kernel has no memory {purpose}; that counts against the limit of locked memory, "
        f"{'unlimited' if limit == resource.RLIM_INFINITY else f'{limit} bytes'} "
        "for all processes of the user together: raise it (ulimit -l, RLIMIT_MEMLOCK)",
    )


def unsupported(name: str, opcode: str, since: str) -> UnsupportedOperation:
    """The UnsupportedOperation for an operation that came with kernel ``since``."""
    return UnsupportedOperation(
        errno.EOPNOTSUPP,
        f"this kernel lacks {name} (IORING_OP_{opcode}); Linux {since} brought it, this is {os.uname().release}",
    )


def _io_uring_disabled() -> int:
    try:
        return int(Path("/proc/sys/kernel/io_uring_disabled").read_text())
    except (OSError, ValueError):
        return 0


def _seccomp_filter_active() -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    return "\nSeccomp:\t2" in status


def why_refused(code: int) -> str:
    """One sentence for an errno of io_uring_setup(2): the cause and the remedy."""
    disabled = _io_uring_disabled()
    if code in (errno.EPERM, errno.EACCES) and disabled:
        who = "every process" if disabled >= 2 else "processes outside kernel.io_uring_group"
        return (
            f"io_uring is switched off for {who} (kernel.io_uring_disabled is {disabled}); "
            "an administrator can allow it with: sysctl kernel.io_uring_disabled=0"
        )
    if code in (errno.EPERM, errno.EACCES, errno.ENOSYS) and _seccomp_filter_active():
        return (
            "a seccomp filter forbids io_uring (container runtimes do so by default); start the container "
            "with a profile that allows io_uring_setup, io_uring_enter and io_uring_register"
        )
    if code == errno.ENOSYS:
        return "this kernel has no io_uring with timed waits; Linux 5.11 brought it, Linux 6.1 or later is recommended"
    if code == errno.ENOMEM:
        return (
            "the kernel has no memory for the ring; raise the locked-memory limit (ulimit -l) or ask for fewer entries"
        )
    if code in (errno.EMFILE, errno.ENFILE):
        return "too many files are open to create a ring; raise the limit (ulimit -n)"
    if code == errno.EINVAL:
        return "this kernel refuses the ring's parameters; Linux 6.1 or later is recommended"
    return f"io_uring_setup failed: {os.strerror(code)}"


def unavailable(code: int) -> UnavailableError:
    """The UnavailableError for an errno of io_uring_setup(2)."""
    return UnavailableError(code, why_refused(code))
