"""A ring beside trio's own I/O manager, for a run that was started without one.

It is mounted when a task first asks for something, through nothing but trio's public interface (a forked child apart),
and goes with the run.
trio waits in its epoll as ever; so everything here is about one question: how does that wait learn of the ring?

* **An Instrument** is called around each wait. Before it, everything staged is submitted and what is done is reaped;
  after it, what has completed meanwhile is.
* **An eventfd**, which the kernel signals at completions, is watched by a system task of ours, so that epoll wakes. It
  is registered anew for each wait and taken out after it: while tasks are busy nobody needs to be told, and a task
  switch for each completion is what it would cost. Whatever completes before it is registered is looked for after it
  is, and the eventfd is written to by hand.
* **That wake-up costs three system calls**, and most operations complete while they are submitted. So the first entry
  of a tick that may do so wakes another task of ours, which does nothing: while a task can run, trio does not wait.
* **An Instrument costs something in each tick**, used or not. So it is added when an entry is staged and removed when
  nothing has been under way for a while. What comes then (a message to a mailbox, a forced wake-up) finds the eventfd
  registered, and the watching task brings it in.
* **trio ends system tasks with the main task**, but others of them may still have operations in flight, and
  asynchronous generators may begin new ones. No task can watch then. The wait is in the ring, for a short time, and
  then in epoll for none, in turns.
* **In guest mode** the hooks run in the host's thread, which owns the ring. The wait between them is another thread's
  meanwhile, and what the host's callbacks stage is submitted at once.
* **A forked child shares trio's epoll with its parent.** What it takes from there, the eventfd's event say, the parent
  would wait for in vain. So the child's run ends before it waits.
* **A hook that raises is removed by trio**, with a line in a log. So what happens in one is caught here: the ring has
  failed then, and everybody who waits for it is told. The memory of what was in flight stays where it is until the run
  ends and the ring has been drained; if it cannot be, for ever.

``trio.lowlevel.notify_closing`` knows nothing of this ring; `notify_closing` tells both.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final, NoReturn

import trio
from trio.lowlevel import enable_ki_protection

from . import _trio_internals
from ._abi import Opcode
from ._core import _FIRST_INDEX, UringIOManager, _drain_eventfd, _this_thread, ring_failed
from ._errors import not_in_a_child

if TYPE_CHECKING:
    from trio.lowlevel import Abort, RaiseCancelT, Task

    from ._core import HasFileno
    from ._ring import Ring, RingConfig

_QUIET_TICKS: Final = 32
"""After so many without anything under way the hooks are removed; to add them again costs about ten such ticks."""

_TURN: Final = 0.005
"""Seconds in the ring at a time when no task can watch the eventfd."""

_WAIT: Final = frozenset(
    {Opcode.RECV, Opcode.RECVMSG, Opcode.ACCEPT, Opcode.CONNECT, Opcode.POLL_ADD, Opcode.TIMEOUT, Opcode.STATX}
)
"""Opcodes that seldom complete while they are submitted."""


def _nothing() -> None:
    """For `trio.lowlevel.TrioToken.run_sync_soon`: ends a wait."""


class _Ticks(trio.abc.Instrument):
    """Called around each wait, while there is anything to wait for."""

    def __init__(self, manager: AttachedManager) -> None:
        self._manager = manager

    def before_io_wait(self, timeout: float) -> None:
        manager = self._manager
        try:
            manager.before_wait(timeout)
        except BaseException as exc:
            manager.fail(exc)
            if timeout > 0:  # those who hear of it are not to wait
                manager.token.run_sync_soon(_nothing)

    def after_io_wait(self, timeout: float) -> None:
        manager = self._manager
        try:
            manager.after_wait()
        except BaseException as exc:
            manager.fail(exc)


class _End(trio.abc.Instrument):
    """Called at the end of the run, whatever ends it."""

    def __init__(self, manager: AttachedManager) -> None:
        self._manager = manager

    def after_run(self) -> None:
        self._manager.close()


class AttachedManager(UringIOManager):
    """A ring for the current run, which has an I/O manager of trio's.

    Args:
        config: see `RingConfig`.
        ring: a ring to use instead of a new one (a simulated one in tests).

    Raises:
        UnavailableError: there can be no ring; the message says why.
    """

    native: ClassVar[bool] = False  # trio's own waits, and what trio closes, are epoll's

    @enable_ki_protection
    def __init__(self, config: RingConfig, ring: Ring | None = None) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self._eventfd = -1
        self._registered = False
        self._watched = False
        self._hooked = False
        self._wakeful: Task | None = None
        self._quiet = 0
        self._ticks: Final = _Ticks(self)
        super().__init__(config, ring)
        try:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.own_ring()
            trio.lowlevel.add_instrument(_End(self))
        except BaseException:
            self.close()
            raise
        self._hook()
        try:
            trio.lowlevel.spawn_system_task(self._watch, name="<trio_uring: watches the ring>")
            self._watched = True
            trio.lowlevel.spawn_system_task(self._stay_awake, name="<trio_uring: stays awake>")
        except RuntimeError:  # the run is about to end
            pass

    # The hooks

    def _hook(self) -> None:
        self._hooked = True
        self._quiet = 0
        self.ring.noticed = None
        trio.lowlevel.add_instrument(self._ticks)

    def _unhook(self) -> None:
        """Whoever stages something from now on puts the hooks back."""
        self._hooked = False
        self._signal_completions()
        trio.lowlevel.remove_instrument(self._ticks)
        self.ring.noticed = self._hook_and_keep_awake

    def _hook_and_keep_awake(self, opcode: int) -> None:
        self._hook()
        self._keep_awake(opcode)

    def _keep_awake(self, opcode: int) -> None:
        """What may complete at once is not to wait for an eventfd."""
        if opcode not in _WAIT and self._wakeful is not None:
            self.ring.noticed = None
            task, self._wakeful = self._wakeful, None
            trio.lowlevel.reschedule(task)

    async def _stay_awake(self) -> None:
        """A system task: one that can run while something is staged."""

        def abort(_: RaiseCancelT) -> Abort:
            self._wakeful = None
            return trio.lowlevel.Abort.SUCCEEDED

        while True:
            if self.ring.staged and self.failure is None:
                await trio.lowlevel.checkpoint()
                continue
            self._wakeful = trio.lowlevel.current_task()
            if self._hooked:
                self.ring.noticed = self._keep_awake
            await trio.lowlevel.wait_task_rescheduled(abort)

    def _under_way(self) -> bool:
        """Is there anything a CQE may come for, messages apart?"""
        return len(self._slots) - len(self._idle) - len(self._idle_uncounted) > _FIRST_INDEX

    def before_wait(self, timeout: float) -> None:
        """trio is about to wait in its epoll, for up to ``timeout`` seconds."""
        ring = self.ring
        events = ring.tick(0)
        self._now = 0.0
        if events:
            self.process_events(events)
        under_way = self._under_way()
        if under_way or events or ring.staged:
            self._quiet = 0
        else:
            self._quiet += 1
            if self._quiet > _QUIET_TICKS and self._watched:
                self._unhook()
                return
        self._worker_waits = True
        if timeout <= 0:
            return
        if events or ring.staged:
            self._end_wait()
        elif self._watched:
            self._signal_completions()
        elif under_way or self.mail:
            self._take_turns(timeout)

    def _signal_completions(self) -> None:
        self.ring.register_eventfd(self._eventfd)
        self._registered = True
        if self.ring.pending():
            os.eventfd_write(self._eventfd, 1)

    def _take_turns(self, timeout: float) -> None:
        self.process_events(self.ring.tick(min(timeout, _TURN)))
        self._end_wait()

    def _end_wait(self) -> None:
        """Ends trio's wait, the current or the next one."""
        if self._watched:
            os.eventfd_write(self._eventfd, 1)
        else:
            self.token.run_sync_soon(_nothing, idempotent=True)

    def after_wait(self) -> None:
        """trio has waited."""
        self._worker_waits = False
        ring = self.ring
        if self._registered:
            self._registered = False
            ring.register_eventfd(-1)
        events = ring.tick(0)
        self._now = 0.0
        if events:
            self.process_events(events)

    async def _watch(self) -> None:
        """A system task: has trio's epoll wake when the ring has something."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._eventfd)
                _drain_eventfd(self._eventfd)
                if not self._hooked and not self.failure:
                    self._hook()
        finally:
            self._watched = False

    # What is different beside another I/O manager

    def ask_cancel(self, token: int, notice: int, *, again: bool = False) -> None:
        """See `UringIOManager.ask_cancel`."""
        super().ask_cancel(token, notice, again=again)
        if self._worker_waits and self.ring.pending():
            self._end_wait()

    def notify_closing(self, fd: int | HasFileno) -> None:
        """Tells trio's own I/O manager, too."""
        if not self._closed:
            trio.lowlevel.notify_closing(fd)
        super().notify_closing(fd)
        if self._worker_waits and not self._closed and self.ring.pending():
            self._end_wait()

    def fds(self) -> set[int]:
        """See `UringIOManager.fds`."""
        return super().fds() | {self._eventfd}

    # The end

    def end_in_child(self) -> None:
        """A forked child has this run as well, but is not to go on with it."""
        if _trio_internals.take_epoll_away(not_in_a_child()) and self._hooked:
            self._hooked = False
            trio.lowlevel.remove_instrument(self._ticks)

    def fail(self, cause: BaseException) -> None:
        """See `UringIOManager.fail`."""
        if self.failure is not None:
            return
        if self._hooked:
            self._hooked = False
            trio.lowlevel.remove_instrument(self._ticks)
        super().fail(cause)

        def refuse(_: int) -> NoReturn:
            raise ring_failed(cause)

        self.ring.noticed = refuse

    def close(self) -> None:
        """See `UringIOManager.close`."""
        if self._closed:
            return
        self.ring.noticed = None
        self._wakeful = None
        self._worker_waits = False
        try:
            super().close()
        finally:
            if self._eventfd >= 0:
                os.close(self._eventfd)


def _in_child() -> None:
    manager: object = _this_thread.manager
    if isinstance(manager, AttachedManager):
        manager.end_in_child()


os.register_at_fork(after_in_child=_in_child)
