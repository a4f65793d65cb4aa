"""trio's part of a run, played by hand: `ByHand` parks tasks, wakes them and calls their abort functions."""

from __future__ import annotations

import errno
import gc
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import outcome
import trio
from trio.lowlevel import Abort

from trio_uring import RingConfig, _core
from trio_uring._abi import CQE_F_MORE, Opcode
from trio_uring._cancel import Kind, Operation
from trio_uring._core import UringIOManager
from trio_uring.testing import SimulatedRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from trio_uring._ring import Ring


class CancelledByTest(BaseException):
    """Stands for `trio.Cancelled`."""


def raise_cancel() -> NoReturn:
    raise CancelledByTest


def kind(opcode: Opcode, **more: Any) -> Kind[Any]:
    """A row of a table of operations."""
    row = {"name": opcode.name.lower(), "since": "", "result": "count", "summary": "", "man": "", **more}
    return Kind(opcode=opcode, **row)


class ScriptedRing(SimulatedRing):
    """A kernel that takes everything and answers what the test tells it to.

    Attributes:
        obliging: once the script is over, whatever is in flight ends cancelled.
    """

    def __init__(self, config: RingConfig) -> None:
        super().__init__(config=config)
        self.script: deque[list[int]] = deque()
        self.obliging = False
        self._taken: list[int] = []

    def answer(self, *numbers: int) -> None:
        """The CQEs that the next tick brings: token, res, flags, token, ..."""
        self.script.append(list(numbers))

    def tick(self, timeout: float) -> list[int]:
        """Takes all; what the script says next."""
        self._check_usable()
        self.flush()
        if self.obliging and not self.script:
            self.answer(*(number for token in self._taken for number in (token, -errno.ECANCELED, 0)))
        events = self.script.popleft() if self.script else []
        for token, flags in zip(events[::3], events[2::3], strict=True):
            if token in self._taken and not flags & CQE_F_MORE:
                self._taken.remove(token)
        return events

    def flush(self) -> None:
        """Takes all."""
        self._taken += [entry.user_data for entry in self.staging if entry.opcode != Opcode.ASYNC_CANCEL]
        self._consumed(self.staged)


class Task:
    """A task that makes one call of `perform`. In the end it has a ``result`` or an ``error``."""

    name = "by hand"

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.abort: Callable[[Any], Abort] | None = None
        self.operation: Operation | None = None
        self.woken = False
        self.value: Any = None
        self.result: int | None = None
        self.error: BaseException | None = None

    @property
    def parked(self) -> bool:
        """It waits for its operation, or for a slot."""
        return self.result is None and self.error is None and not self.woken

    @property
    def token(self) -> int:
        """That of the operation it waits for."""
        assert self.operation is not None
        return self.operation.token

    def take_value(self) -> Any:
        """What it was woken with. Nobody else may hold it: an exception in it refers to the frames it passed."""
        value, self.value = self.value, None
        return value


class ByHand:
    """A manager, and what trio would do with it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ring: SimulatedRing | Ring, config: RingConfig | None = None
    ) -> None:
        self.manager = UringIOManager(config or ring.config, ring=cast("Ring", ring))
        self._running: Task | None = None
        monkeypatch.setattr(_core, "current_task", lambda: self._running)
        monkeypatch.setattr(trio.lowlevel, "reschedule", self._wake)
        monkeypatch.setattr(self.manager, "wake", self._wake)

    def start(self, kind: Kind[Any], fd: int = -1, *args: Any, **kwargs: Any) -> Task:
        """A new task calls `perform`."""
        task = Task(self.manager.perform(kind, fd, *args, **kwargs))
        del args, kwargs  # an error refers to this frame, too
        self._step(task)
        return task

    def resume(self, task: Task) -> Task:
        """A woken task goes on until it parks or ends."""
        assert task.woken
        task.woken = False
        self._step(task)
        return task

    def tick(self, timeout: float = 0) -> None:
        """One turn of the scheduler's loop, without running tasks."""
        self.manager.process_events(self.manager.get_events(timeout))

    def cancel(self, task: Task) -> Abort:
        """A cancel scope around the task is cancelled."""
        assert task.abort is not None
        abort, task.abort = task.abort, None
        success = abort(raise_cancel)
        if success is Abort.SUCCEEDED:
            self._wake(task, outcome.capture(raise_cancel))
        return success

    def _wake(self, task: Task, value: object = None) -> None:
        assert task.parked
        task.woken = True
        task.value = outcome.Value(None) if value is None else value

    def _step(self, task: Task) -> None:
        self._running = task
        try:
            trap = task.generator.send(task.take_value())
        except StopIteration as stop:
            task.result = stop.value
        except BaseException as exc:
            task.error = exc
        else:
            task.abort = trap.abort_func
            task.operation = getattr(trap.abort_func, "__self__", None)


def pinned(buffer: bytearray) -> bool:
    """Does anybody hold an export of it?"""
    try:
        buffer.append(0)
    except BufferError:
        return True
    buffer.pop()
    return False


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is released inside is released at once, or not at all."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
