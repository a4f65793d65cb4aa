"""The operation table, and what turns a row of it into an async function.

`TABLE` is the single source of truth: a `Kind` says what the library knows about an operation. The function
below it, its *filler*, says how its arguments fill an SQE: it returns the arguments of `UringIOManager.perform`, and
`operation` makes the async function of it. `trio_uring.lowlevel.batch` and ``chain`` use the same fillers. The probe,
the reference and the tests iterate over the table. A new operation is its row and a filler of a few lines.

The operations on files are in `_file_ops`, those on sockets in `_socket_ops`, what concerns neither in `_other_ops`;
here are those on the ring itself.

What holds for all of them, so that each docstring can be short:

* Each is a checkpoint. In a cancelled scope it raises `trio.Cancelled` and submits nothing.
* Cancelled later, it ends either way, never both: with its result if the kernel has done it, with `trio.Cancelled`
  if it did nothing. A result that arrives in spite of a cancel is returned; the next checkpoint raises.
* Buffers are held by a real export until the kernel is done: resizing a `bytearray` meanwhile raises `BufferError`.
  No function here keeps an export in a variable: a traceback would hold it for longer.
* Errors are `OSError` with the errno, and the file name where there is one, as in the standard library.
* EINTR is tried again. So is EAGAIN, once the fd is ready, except where the caller forbids waiting.
* Arguments are checked before anything is submitted. What the kernel lacks raises `UnsupportedOperation`.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar

from trio.lowlevel import enable_ki_protection

from ._abi import ASYNC_CANCEL_ALL, ASYNC_CANCEL_FD, TIMEOUT_ETIME_SUCCESS, Opcode
from ._cancel import Kind
from ._core import HasFileno, UringIOManager, _this_thread, number_of
from ._structs import timespec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from typing_extensions import ParamSpec, Unpack

    P = ParamSpec("P")
    T = TypeVar("T")
    F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])
    Request = tuple[Kind[T], Unpack[tuple[Any, ...]]]
    """The arguments of `UringIOManager.perform`."""
    Operation = Callable[P, Coroutine[Any, Any, T]]
    """An async function of `trio_uring.lowlevel`."""

TABLE: Final[dict[str, Kind[Any]]] = {}
"""Every operation, by the name of its function."""


class _Fillers(dict["Callable[..., Any]", "Callable[..., tuple[Any, ...]]"]):
    def __missing__(self, function: object) -> NoReturn:
        raise TypeError(f"not an operation of trio_uring.lowlevel: {function!r}")


_fillers: Final = _Fillers()

filler_of: Final = _fillers.__getitem__
"""What fills the SQE for an operation's async function. Raises TypeError for any other function."""


def row(
    name: str,
    opcode: Opcode,
    since: str,
    result: Literal["count", "fd", "nothing", "struct"],
    summary: str,
    man: str | None = None,
    **more: Any,
) -> Kind[Any]:
    """Adds a row to `TABLE`."""
    man = man or f"io_uring_prep_{opcode.name.lower()}(3)"
    kind: Kind[Any] = Kind(name=name, opcode=opcode, since=since, result=result, summary=summary, man=man, **more)
    TABLE[name] = kind
    return kind


def operation(filler: Callable[P, Request[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The async function of an operation."""

    @functools.wraps(filler)
    @enable_ki_protection
    async def perform(*args: P.args, **kwargs: P.kwargs) -> T:
        return await _this_thread.manager.perform(*filler(*args, **kwargs))

    # What a reader sees is the function's own result: Request[int] -> int.
    signature = inspect.signature(filler)
    result = str(signature.return_annotation).removeprefix("Request[").removesuffix("]")
    perform.__annotations__["return"] = result
    perform.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    return filled_by(filler)(perform)


def filled_by(filler: Callable[..., Request[Any]]) -> Callable[[F], F]:
    """For an async function that spells its filler out, as one call less shows in its cost, or does more than it."""

    def remember(function: F) -> F:
        _fillers[function] = filler
        return function

    return remember


def close_result(res: int, keep: object) -> None:
    """Disposes of an fd that nobody can take."""
    try:
        os.close(res)
    except OSError:  # it is closed in any case, and nobody is there to be told
        pass


# The ring itself

POLL = row("poll", Opcode.POLL_ADD, "5.1", "count", "wait for poll events", "io_uring_prep_poll_add(3)", runs="waits")
TIMEOUT = row(
    "timeout",
    Opcode.TIMEOUT,
    "5.16",
    "nothing",
    "wait for a while",
    runs="waits",
    success=frozenset({-errno.ETIME}),
    proxy=Opcode.LINKAT,
)
NOP = row("nop", Opcode.NOP, "5.1", "nothing", "nothing")
ASYNC_CANCEL = row(
    "async_cancel",
    Opcode.ASYNC_CANCEL,
    "5.19",
    "count",
    "cancel what is in flight on an fd",
    "io_uring_prep_cancel(3)",
    proxy=Opcode.SOCKET,
    names="number",
    prelude=UringIOManager.expect_cancel_by_fd,
    success=frozenset({-errno.ENOENT}),
    decode=lambda res, keep: max(res, 0),
)


@operation
def poll(fd: int | HasFileno, events: int) -> Request[int]:
    """Waits until one of ``events`` holds and returns those that do. IORING_OP_POLL_ADD, Linux 5.1.

    Args:
        fd: anything poll(2) takes.
        events: ``select.POLLIN`` and so on. ``POLLERR``, ``POLLHUP`` and ``POLLRDHUP`` are always reported.
    """
    return POLL, number_of(fd), 0, None, 0, events


@operation
def timeout(seconds: float) -> Request[None]:
    """Returns after ``seconds``, by the kernel's clock. IORING_OP_TIMEOUT, Linux 5.16.

    `trio.sleep` costs less and follows trio's clock; this is for measuring and for chains.
    """
    return TIMEOUT, -1, 0, timespec(seconds), 1, TIMEOUT_ETIME_SUCCESS


@operation
def nop() -> Request[None]:
    """One round through the ring. IORING_OP_NOP, Linux 5.1."""
    return (NOP,)


@operation
def async_cancel(fd: int | HasFileno) -> Request[int]:
    """Cancels what is in flight on ``fd``; returns how many operations. IORING_OP_ASYNC_CANCEL by fd, Linux 5.19.

    Tasks that wait for one of them get ``OSError(ECANCELED)``. To cancel a task use its cancel scope.
    """
    return ASYNC_CANCEL, number_of(fd), 0, None, 0, ASYNC_CANCEL_FD | ASYNC_CANCEL_ALL
