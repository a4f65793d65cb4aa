"""The types of ``native/slot.c``, which the classes of operations and of the submission queue are made of.

Python gets them from C in a dict: cffi, which the rest of C is reached by, does not know types of Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, overload

from ._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    class Queue:
        """Where SQEs are staged: ``base`` is the number of the first entry there, ``tail`` of the next one.

        What a finaliser must not come between is done in C.

        Attributes:
            capacity: how many entries there is room for.
        """

        base: int
        tail: int
        capacity: int
        _sqes: Any  #: what holds the entries
        _memory: Any  #: they, for cffi
        _bytes: memoryview  #: and in bytes
        noticed: Callable[[int], object] | None  #: called with the opcode before something is staged

        def _move_to(
            self, capacity: int, address: int, sqes: Any, memory: Any, in_bytes: memoryview, pointers: Any, /
        ) -> None:
            """Makes more room, unless there is as much by now."""

        def _consumed(self, n: int, /) -> None:
            """The first ``n`` staged entries are with the kernel."""

        def put(
            self,
            head: int,
            fd: int,
            off: int,
            addr: int,
            length: int,
            op_flags: int,
            user_data: int,
            buf_index: int,
            personality: int,
            file_index: int,
            addr3: int,
            /,
        ) -> int:
            """Stages an entry with these fields; returns its number."""

        def put_job(self, address: int, n: int, token: int, /) -> int:
            """Stages ``n`` filled entries with user_data ``token | position << 20``; returns the first one's number."""

    class Buffers:
        """Buffers the kernel takes from when data is there; see `BufferRing`.

        Attributes:
            memory, entries: the addresses of the buffers, and of the entries that tell the kernel of them.
            count: how many buffers, a power of two.
            size: bytes of each.
            tail: the number of the next entry.
            out: how many buffers are ours at the moment.
        """

        memory: int
        entries: int
        count: int
        size: int
        tail: int
        out: int

        def copy(self, flags: int, length: int) -> bytes:
            """A copy of what a CQE with ``flags`` has received; the buffer goes back at once. For buffers that are not
            consumed incrementally.
            """

    class Wait:
        """What a coroutine awaits while its operation is under way. The result is ``res``; nothing is picked up yet."""

        def __await__(self) -> Generator[Any, Any, int]: ...
        def __iter__(self) -> Generator[Any, Any, int]: ...

    class Received:
        """As `Wait`, for a receive. The result is what came, picked up; None if that has to be done another way."""

        def __await__(self) -> Generator[Any, Any, bytes | None]: ...

    class Slot:
        """The fields of an operation, which is what they are about; see `_cancel`."""

        token: int
        number: int
        ordinary: bool
        flags: int
        res: int

        def start(
            self,
            queue: Queue,
            kind: Any,
            task: Any,
            siblings: Any,
            since: float,
            fd: int,
            sqe_fd: int,
            off: int,
            addr: int,
            length: int,
            op_flags: int,
            pin: Any,
            keep: Any,
        ) -> Wait | None:
            """IDLE -> STAGED, with an SQE of these fields. None if something is out of the ordinary: nothing has
            happened then.
            """

        def receive(
            self,
            queue: Queue,
            kind: Any,
            task: Any,
            siblings: Any,
            since: float,
            fd: int,
            size: int,
            buffers: Buffers,
        ) -> Received | None:
            """`start` for a receive into one of ``buffers``."""

        @overload
        def wait(self, buffers: None) -> Wait: ...
        @overload
        def wait(self, buffers: Buffers) -> Received: ...
        def wait(self, buffers: Any) -> Any:
            """What to await when the next life has begun, if it is to be begun otherwise."""

        def pick_up(self) -> None:
            """The task runs again and has the result."""

    def complete_all(slots: list[Any], cqes: Iterator[int], wake: Callable[[Any, object], None]) -> None:
        """Has each slot that has a CQE ``complete`` it. ``cqes`` has three numbers for each."""

    def introduce(operation: type[Slot], idle: object, in_flight: object, settled: object) -> None:
        """The class of ordinary operations, and the states that C moves them between."""

else:
    _types: Final[dict[str, Any]] = {}
    if not lib.tu_add_types(ffi.cast("void *", id(_types))):
        raise ImportError("the types of native/slot.c cannot be made")
    Queue, Buffers, Slot = (_types[name] for name in ("Queue", "Buffers", "Slot"))
    Wait = Received = _types["Wait"]
    complete_all, introduce = (_types[name] for name in ("complete_all", "introduce"))
