"""The only file that touches trio's private names.

Each of these is checked here, at import, with a way round behind it:

* *the native mount*: trio has no hook for an I/O manager; ``setup_runner`` calls the module global
  ``TheIOManager``. If that has changed, `NATIVE_PROBLEM` says so and runs stay on trio's own manager.
* *waking a task without an Outcome*: saves 0.5 us a wake-up. `_wake_directly` does exactly what
  ``Runner.reschedule`` does; if that method has changed, `wake` is `_wake_publicly`.
* *a reusable trap*: the object ``wait_task_rescheduled`` yields. It is obtained through the public function, once for
  each operation's slot. Yielding it again is what the public function does as well, if that still has the one trap
  per call that `NATIVE_PROBLEM` looks for.
* *the class of trio's sockets*: trio makes every socket by calling the module global ``_SocketType``. The class
  itself is got through the public function; if that name is gone, sockets that unchanged code makes wait for
  readiness. So do streams that no longer say who sends on them, and sockets that no longer resolve addresses there.
* *the epoll of a run*: a forked child shares it with its parent and is to stay away from it. If it is not where it was,
  the child of a run that was started without a ring can take from its parent what that waits for, as in trio itself.
"""

from __future__ import annotations

import pathlib
import select
import socket
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import outcome
import trio
from trio import _socket
from trio._core import _run, _traps

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from trio.lowlevel import Abort, RaiseCancelT, Task

# fmt: off
_RESCHEDULE_NAMES: Final = frozenset({
    "_NO_SEND", "Value", "_runner", "_next_send_fn", "coro", "send", "_next_send", "_abort_func", "custom_sleep_data",
    "runq", "is_guest", "force_guest_tick_asap", "append", "instruments", "call",
})
# fmt: on


def io_manager_class() -> type[Any]:
    """The class whose instance becomes the I/O manager of the next run."""
    return getattr(_run, "TheIOManager", object)


def set_io_manager_class(cls: type[Any]) -> None:
    """Replaces it."""
    _run.TheIOManager = cls  # type: ignore[attr-defined]


def make_trap(abort: Callable[[RaiseCancelT], Abort]) -> Any:
    """The object that, yielded to trio, parks the task with this abort function. It can be yielded again and again."""
    coroutine = trio.lowlevel.wait_task_rescheduled(abort)  # noqa: ASYNC105
    try:
        return coroutine.send(None)
    finally:
        coroutine.close()


def _native_problem() -> str | None:
    """Why the I/O manager of a run cannot be replaced in this trio; None if it can."""
    try:
        stock = io_manager_class()
        duties = ("statistics", "close", "force_wakeup", "get_events", "process_events")
        missing = [
            name for name in (*duties, "wait_readable", "wait_writable", "notify_closing") if not hasattr(stock, name)
        ]
        if missing:
            return f"its I/O manager lacks {', '.join(missing)}"
        if "TheIOManager" not in _run.setup_runner.__code__.co_names:
            return "setup_runner no longer creates TheIOManager"
        if type(make_trap(lambda _: trio.lowlevel.Abort.SUCCEEDED)) is not _traps.WaitTaskRescheduled:
            return "wait_task_rescheduled yields something else"
    except AttributeError as exc:
        return str(exc)
    return None


def _reschedule_is_known() -> bool:
    try:
        return frozenset(_run.Runner.reschedule.__code__.co_names) == _RESCHEDULE_NAMES
    except AttributeError:
        return False


def _wake_directly(task: Task, value: object) -> None:
    """``reschedule(task, Value(value))``, but the task is sent the bare value."""
    runner = task._runner
    if task._next_send_fn is not None:
        raise RuntimeError(f"{task!r} is scheduled already")
    task._next_send_fn = task.coro.send
    task._next_send = value  # type: ignore[assignment]
    task._abort_func = None
    task.custom_sleep_data = None
    if not runner.runq and runner.is_guest:
        runner.force_guest_tick_asap()
    runner.runq.append(task)
    if "task_scheduled" in runner.instruments:
        runner.instruments.call("task_scheduled", task)


def _wake_publicly(task: Task, value: object) -> None:
    trio.lowlevel.reschedule(task, value if isinstance(value, outcome.Error) else outcome.Value(value))


NATIVE_PROBLEM: Final = _native_problem()

wake: Final[Callable[[Task, object], None]] = _wake_directly if _reschedule_is_known() else _wake_publicly
"""Wakes a parked task. It is sent the value bare or in an `outcome.Value`; an `outcome.Error` as it is."""


class _NoEpoll:
    """Stands where the epoll of a run was: who would wait there gets an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def poll(self, *_: object) -> NoReturn:
        raise self._error

    def modify(self, *_: object) -> None:
        """Nobody will wait."""

    register = unregister = modify
    close = modify


def take_epoll_away(error: Exception) -> bool:
    """For a forked child: what it does with the epoll of this thread's run, it would do to that of its parent.

    Args:
        error: the end of the run, when it is about to wait.

    Returns:
        False if it was not found.
    """
    runner = getattr(getattr(_run, "GLOBAL_RUN_CONTEXT", None), "runner", None)
    manager = getattr(runner, "io_manager", None)
    epoll = getattr(manager, "_epoll", None)
    if not isinstance(epoll, select.epoll):
        return False
    manager._epoll = _NoEpoll(error)  # type: ignore[union-attr]
    epoll.close()  # the parent's stays open
    return True


class ThreadPath(trio.Path, pathlib.PurePosixPath):
    """`trio.Path` as a base class: its own two subclasses are final, and they say what its methods call in a thread."""

    __slots__ = ()

    _wrapped_cls: ClassVar[type[pathlib.Path]] = pathlib.PosixPath


def _look_at_sockets() -> tuple[Any, bool]:
    left, right = socket.socketpair()
    with left, right:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(left))
        return type(stream.socket), hasattr(stream, "_send_conflict_detector")


_look = _look_at_sockets()
TrioSocket: Final[Any] = _look[0]
"""The class of trio's sockets."""

STREAMS_TELL_WHO_SENDS: Final = _look[1]
"""Do streams have what lets one task send at a time?"""

SOCKETS_HAVE_A_DOOR: Final = getattr(_socket, "_SocketType", None) is TrioSocket
"""Does trio make its sockets through a name that can be replaced?"""

CAN_RESOLVE: Final = hasattr(TrioSocket, "_resolve_address_nocp")
"""Does trio resolve addresses where it can be asked to?"""


class SocketBase(TrioSocket):  # type: ignore[misc]
    """trio's own class of sockets."""

    _sock: socket.socket
    """What it is made of; anyio reads it as well."""

    async def resolve(self, address: Any) -> Any:
        """The address with its names resolved to numbers. See `CAN_RESOLVE`. Not always a checkpoint."""
        return await self._resolve_address_nocp(address, local=False)


def socket_maker() -> Any:
    """What trio calls with a `socket.socket` to make a socket of its own. See `SOCKETS_HAVE_A_DOOR`."""
    return _socket._SocketType


def set_socket_maker(maker: Any) -> None:
    """Replaces it."""
    _socket._SocketType = maker  # type: ignore[misc]


FD_STREAMS_TELL_WHO_SENDS: Final = "_send_conflict_detector" in trio.lowlevel.FdStream.__init__.__code__.co_names
"""The same of `trio.lowlevel.FdStream`."""


def sending(stream: trio.SocketStream | trio.lowlevel.FdStream) -> AbstractContextManager[None]:
    """Lets nobody else send on the stream. See `STREAMS_TELL_WHO_SENDS` and `FD_STREAMS_TELL_WHO_SENDS`."""
    detector: AbstractContextManager[None] = stream._send_conflict_detector
    return detector
