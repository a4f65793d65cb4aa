"""The life of a multishot operation: one submission, many results.

It goes through the states of any other, and may do so many times: a multishot operation ends when the kernel likes,
silently, and is armed again. What is different:

* **It is nobody's to wait for.** Its CQEs go to a receiver; a task that waits for the next result waits there, and
  lets go at once. The operation goes on meanwhile.
* **A CQE with F_MORE is a result like any other**; the one without is the last, and may be a result, too.
* **It stays among the operations of its fd from `open_shots` to `close_shots`**, armed or not: its side of a socket is
  taken, and it hears when the fd is closed.
* **A cancel may find nothing, although it goes on**: between two shots the kernel has it in no list. Then it is asked
  again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from ._abi import CQE_F_MORE
from ._cancel import INDEX_MASK, Event, Kind, Operation, State
from ._errors import RingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._cancel import Owner

_IDLE: Final = State.IDLE
_CANCELLED: Final = (State.CANCELLING, State.DETACHED)


class Receiver(Protocol):
    """Who gets the results."""

    def receive(self, res: int, flags: int) -> None:
        """A CQE has come. Without F_MORE in ``flags`` the operation has ended."""

    def discard(self, res: int, flags: int) -> None:
        """As `receive`, after `forsake`: what has come is to be disposed of. At the end the slot is to be freed."""

    def fd_closed(self) -> None:
        """The fd is about to be closed. A CQE may still come."""

    def fail(self, error: RingError) -> None:
        """The ring has failed: no CQE will come, and whoever waits for one is to hear of it."""

    def forsake(self) -> None:
        """Nobody will take what has come. What is not armed any more is to free its slot."""


class Shots(Operation):
    """A multishot operation, in the slot of the one it borrows.

    Args:
        owner: the I/O manager.
        borrowed: an idle operation.
        kind: the row of the operation table.
        fd: what it works on; -1 for nothing.
        receiver: who gets the results.
    """

    __slots__ = ("borrowed", "receiver")

    def __init__(self, owner: Owner, borrowed: Operation, kind: Kind[Any], fd: int, receiver: Receiver) -> None:
        super().__init__(borrowed.token, owner, [], (), borrowed.trap)
        self.borrowed = borrowed
        self.kind = kind
        self.fd = fd
        self.receiver = receiver

    @property
    def index(self) -> int:
        """The slot it stands in."""
        return self.token & INDEX_MASK

    @property
    def armed(self) -> bool:
        """Will there be another CQE?"""
        return self._state is not _IDLE

    def arm(self, fill: Callable[[int], int]) -> None:
        """IDLE -> STAGED. ``fill`` stages the SQE for a token and returns its number."""
        try:
            self.number = fill(self.begin())
        except BaseException:
            self._state = _IDLE
            raise

    def complete(self, token: int, res: int, flags: int) -> None:
        """A result, or the end, or both."""
        if token != self.token:
            raise RingError(f"CQE {token:#x} is for a former life of {self!r}")
        before = self._state
        if flags & CQE_F_MORE:
            self._move(Event.SHOT)
        elif self._move(Event.LAST_CQE) is State.SETTLED:
            self._move(Event.PICK_UP)
        if before in _CANCELLED and not self.armed:
            self._count_cancel(res)
        if before is State.DETACHED:
            self.receiver.discard(res, flags)
        else:
            self.receiver.receive(res, flags)

    def stop(self) -> bool:
        """Asks for the end. False if there will be no CQE: the kernel had heard of nothing."""
        if self.state is State.STAGED:
            self._move(Event.ABORT)
            self._take_back()
        elif self._state is State.IN_FLIGHT:
            self._move(Event.ABORT)
            self._ask_kernel()
        return self.armed

    def fd_closing(self, fd: int) -> None:
        """The fd is about to be closed."""
        self.stop()
        self.receiver.fd_closed()

    def abandon(self) -> None:
        """Nobody will take any result: what comes is disposed of."""
        if self._state is State.DETACHED:
            return
        if self.stop():
            self._move(Event.ABANDON)
        self.task = None
        self.receiver.forsake()

    def _take_back(self) -> None:
        self.owner.ring.neutralise(self.number)
