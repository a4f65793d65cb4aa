"""Messages from one run's ring to another's: a channel between threads without a lock, a pipe or a wake-up fd.

IORING_OP_MSG_RING posts a completion in another ring, and that wakes whoever waits in it. Facts, and what follows
from them:

* **It carries 32 bits**, in ``res``. Objects stay in this process: the mailbox keeps them by a number, and sends that.
* **The other ring is named by its fd**, and the request may still be staged when that ring is gone and its number is
  another file's. So a mailbox has a duplicate of the fd, which lives as long as anything that names it.
* **A ring takes nothing before it is enabled**, and a guest's main task runs before the first tick.
* **A completion can come to a run whose mailbox is closed**, a little late: the slot's generation tells.

Source: io_uring_prep_msg_ring(3).
"""

from __future__ import annotations

import os
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import outcome
import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._abi import Opcode
from ._core import _this_thread
from ._ops import operation, row

if TYPE_CHECKING:
    from trio.lowlevel import Abort, RaiseCancelT, Task
    from typing_extensions import Self

    from ._cancel import Kind
    from ._errors import RingError
    from ._ops import Request

T = TypeVar("T")

_OBJECT: Final = 1 << 31  # this bit is set in the numbers of objects

MSG_RING: Final[Kind[None]] = row(
    "msg_ring",
    Opcode.MSG_RING,
    "5.18",
    "nothing",
    "send a number to another run's mailbox",
)


class _RingFd:
    """A duplicate of a ring's fd, closed when the last one who names it has let go."""

    def __init__(self, duplicate: int) -> None:
        self.fd = duplicate

    def __del__(self) -> None:
        os.close(self.fd)


class Mailbox(Generic[T]):
    """Where tasks of other runs, in other threads of this process, send to. Made in the run that receives; a context
    manager and an async iterator::

        with lowlevel.Mailbox() as mailbox:  # in one run
            async for item in mailbox: ...

        await mailbox.send(item)  # in any run

    What is sent waits without a bound until it is received; what nobody has received when the mailbox closes is gone.
    It closes at the end of its run at the latest.

    Raises:
        UnavailableError: this run can have no ring.
        UnsupportedOperation: the kernel lacks MSG_RING; Linux 5.18 brought it.
    """

    @enable_ki_protection
    def __init__(self) -> None:
        self._manager = _this_thread.manager.require(MSG_RING)
        self._ring: _RingFd | None = _RingFd(os.dup(self._manager.ring.fd))  # None: closed
        self._keys = count()
        self._on_the_way: dict[int, T] = {}
        self._queue: deque[T | int] = deque()
        self._receiving = False
        self._waiting: Task | None = None
        self._manager.own_ring()  # before that nothing can be posted
        self._token = self._manager.mail.open(self)

    @enable_ki_protection
    def close(self) -> None:
        """Nothing is received any more; a task that waits for something gets `trio.ClosedResourceError`. Idempotent.

        Raises:
            RuntimeError: it belongs to another run, which goes on.
        """
        if self._ring is None:
            return
        self._check_run()
        self._manager.mail.close(self._token)
        task = self._waiting
        self.forsake()
        if task is not None:
            trio.lowlevel.reschedule(task)

    def fail(self, error: RingError) -> None:
        """Nothing will come any more: whoever waits is to hear of it."""
        task, self._waiting = self._waiting, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Error(error))

    def forsake(self) -> None:
        """Nobody will receive anything."""
        self._ring = None  # first: what a sender puts on its way from now on it takes back itself
        self._on_the_way.clear()
        self._queue.clear()
        self._waiting = None

    def _check_run(self) -> None:
        if self._manager is not _this_thread.manager:
            raise RuntimeError("a mailbox belongs to the trio run that made it; others only send")

    @enable_ki_protection
    def __enter__(self) -> Self:
        return self

    @enable_ki_protection
    def __exit__(self, *_: object) -> None:
        self.close()

    def deliver(self, res: int) -> None:
        """A CQE has come."""
        number = res & 0xFFFFFFFF
        try:
            self._queue.append(self._on_the_way.pop(number) if number & _OBJECT else number)
        except KeyError:  # the sender's run was torn down before it heard that this was sent
            return
        task, self._waiting = self._waiting, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    @enable_ki_protection
    async def receive(self) -> T | int:
        """The next item, an object or, from `msg_ring`, a number. For a task of the run that made the mailbox.

        Raises:
            trio.BusyResourceError: another task is already receiving.
            trio.ClosedResourceError: the mailbox is closed.
            RuntimeError: it belongs to another run.
        """
        if self._ring is not None:
            self._check_run()
        if self._receiving:
            raise trio.BusyResourceError("another task is already receiving")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._receiving = True
        try:
            if self._queue or self._ring is None:
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                self._manager.check_working()
                self._waiting = current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            if self._ring is None:
                raise trio.ClosedResourceError("this mailbox is closed")
            return self._queue.popleft()
        finally:
            self._receiving = False

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED

    def __aiter__(self) -> Self:
        return self

    @enable_ki_protection
    async def __anext__(self) -> T | int:
        try:
            return await self.receive()
        except trio.ClosedResourceError:
            raise StopAsyncIteration from None

    @enable_ki_protection
    async def send(self, item: T) -> None:
        """Sends an object, from any run. Cancelled, it was not sent.

        Raises:
            trio.BrokenResourceError: the mailbox is closed.
            UnavailableError: the calling run can have no ring.
        """
        number = next(self._keys) % _OBJECT | _OBJECT
        self._on_the_way[number] = item
        try:
            await _this_thread.manager.perform(*self.request(number))
        except BaseException:
            self._on_the_way.pop(number, None)
            raise

    def request(self, number: int) -> Request[None]:
        """What fills the SQE."""
        ring = self._ring
        if ring is None:
            raise trio.BrokenResourceError("this mailbox is closed")
        return MSG_RING, -1, self._token, None, number, 0, ring, None, 0, ring.fd


@operation
def msg_ring(mailbox: Mailbox[Any], number: int) -> Request[None]:
    """Sends a number to a mailbox, which may be of this run or another one's. IORING_OP_MSG_RING, Linux 5.18.

    Args:
        mailbox: see `Mailbox`.
        number: 0 to 2147483647.

    Raises:
        trio.BrokenResourceError: the mailbox is closed.
    """
    if not 0 <= number < _OBJECT:
        raise ValueError(f"number must be 0 to {_OBJECT - 1}, not {number}")
    return mailbox.request(number)
