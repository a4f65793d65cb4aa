"""Multishot operations as async iterators, and the buffers they receive into.

The data path: the first ``__anext__`` arms the operation. Each of its CQEs is queued here, by the tick that reaps it;
the task takes them one by one. Buffers are the kernel's until it fills one, then the queue's, and the consumer's copy
frees it.

Facts, and what follows from them:

* **It ends silently**: with a CQE that lacks F_MORE, a good result perhaps (the completion queue was full, say). The
  next ``__anext__`` arms it again.
* **The kernel gives no backpressure.** Accepted connections would pile up without end; so with more than ``limit``
  results queued the operation is cancelled, and armed again when half of them are taken. Receives are bounded by their
  buffers: without one the operation ends with ENOBUFS, the data stays in the socket, and the peer is pushed back. It
  is armed again when half of the buffers are free, lest each free one cost an ENOBUFS.
* **A cancel may be overtaken by results.** So leaving waits for the last CQE; only then is it known what has come.
* **A receive ends on an empty datagram as it does at the end of a stream**: the type of the socket tells which it was.
* **What is left of a buffer may be too small for a message**: it would be cut (or refused, with EFAULT, if not even its
  header fits). So only stream sockets share buffers; a pipe does not tell whether it is one of packets.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import outcome
import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._abi import (
    ACCEPT_MULTISHOT,
    CQE_F_BUFFER,
    CQE_F_MORE,
    POLL_ADD_MULTI,
    RECV_MULTISHOT,
    SQE_BUFFER_SELECT,
    TIMEOUT_MULTISHOT,
    Opcode,
)
from ._cancel import Kind, State, closed_error
from ._core import HasFileno, _this_thread, number_of
from ._errors import INTERRUPTED, os_error
from ._ops import close_result
from ._ring import ffi
from ._sockaddr import Ancillary, decode_address, decode_ancillary, descriptors
from ._structs import STORAGE_SIZE, multishot_header, timespec, unsigned

if TYPE_CHECKING:
    from types import TracebackType

    from trio.lowlevel import Abort, RaiseCancelT, Task
    from typing_extensions import Self

    from ._errors import RingError
    from ._shots import Shots

T = TypeVar("T")

MULTISHOT: Final[dict[str, Kind[Any]]] = {}
"""Every multishot operation, by the name of its function."""


def _row(name: str, opcode: Opcode, since: str, summary: str, **more: Any) -> Kind[Any]:
    kind: Kind[Any] = Kind(
        name=name,
        opcode=opcode,
        since=since,
        result="count",
        summary=summary,
        man="io_uring_multishot(7)",
        runs="waits",
        **more,
    )
    MULTISHOT[name] = kind
    return kind


ACCEPT = _row(
    "accept_multishot",
    Opcode.ACCEPT,
    "5.19",
    "accept connections",
    direction="read",
    dispose=close_result,
    proxy=Opcode.SOCKET,
    ioprio=ACCEPT_MULTISHOT,
)
RECV = _row(
    "recv_multishot",
    Opcode.RECV,
    "6.0",
    "receive data",
    direction="read",
    proxy=Opcode.SEND_ZC,
    flags=SQE_BUFFER_SELECT,
    ioprio=RECV_MULTISHOT,
)
RECVMSG = _row(
    "recvmsg_multishot",
    Opcode.RECVMSG,
    "6.0",
    "receive messages",
    direction="read",
    proxy=Opcode.SEND_ZC,
    flags=SQE_BUFFER_SELECT,
    ioprio=RECV_MULTISHOT,
)
READ = _row(
    "read_multishot",
    Opcode.READ_MULTISHOT,
    "6.7",
    "read from a pipe or the like",
    flags=SQE_BUFFER_SELECT,
)
POLL = _row("poll_multishot", Opcode.POLL_ADD, "5.13", "wait for poll events", proxy=Opcode.MKDIRAT)
TIMEOUT = _row(
    "timeout_multishot",
    Opcode.TIMEOUT,
    "6.4",
    "a clock that ticks",
    proxy=Opcode.READ_MULTISHOT,
    success=frozenset({-errno.ETIME}),
)


class BufferPool:
    """Buffers for multishot receives: the kernel takes one when there is data, not one for each receive that waits.

    Several receives of one run may share a pool; a slow one then keeps buffers from the others. Use as a context
    manager, around the receives::

        with lowlevel.BufferPool(64, 4096) as pool:
            async with lowlevel.recv_multishot(sock, pool) as chunks: ...

    Args:
        count: how many, a power of two up to 32768.
        size: bytes of each; no chunk is larger.
        incremental: several receives share a buffer until it is full, where the kernel can do that (Linux 6.12). Small
            portions then use little memory. Only for stream sockets: the rest of a buffer may be too small for a
            message.

    Raises:
        ValueError: ``count`` or ``size`` out of range.
        UnavailableError: this run can have no ring.
        UnsupportedOperation: the kernel has no buffer rings (Linux 5.19 brought them).
    """

    @enable_ki_protection
    def __init__(self, count: int, size: int, *, incremental: bool = False) -> None:
        if not 1 <= count <= 32768 or count & (count - 1):
            raise ValueError(f"count must be a power of two from 1 to 32768, not {count}")
        if not 1 <= size <= 1 << 30:
            raise ValueError(f"size must be 1 to {1 << 30} bytes, not {size}")
        manager = _this_thread.manager.require(RECV)
        self._manager = manager
        self.incremental: Final = incremental
        self._ring = manager.registered.open_buffers(count, size, incremental=incremental)
        self._token = trio.lowlevel.current_trio_token()
        self._users = [0] * count  # chunks of each buffer that wait to be taken
        self._filled = [False] * count  # is it ours?
        self._free: list[int] = []  # ours, and of no use to anybody: to be given back
        self._starving: dict[Multishot[Any], None] = {}
        self._streams: set[Multishot[Any]] = set()
        self._closed = False

    @property
    def group(self) -> int:
        """The number by which the kernel knows the pool."""
        return self._ring.group

    @property
    def count(self) -> int:
        """How many buffers it has."""
        return self._ring.count

    @property
    def size(self) -> int:
        """How many bytes each has."""
        return self._ring.size

    @property
    def available(self) -> int:
        """How many buffers the kernel has, or could have."""
        return self._ring.count - self._ring.out + len(self._free)

    def take(self, res: int, flags: int) -> tuple[int, memoryview]:
        """A buffer's number, and what has been received into it."""
        buffer, start, ours = self._ring.take(flags, res)
        self._users[buffer] += 1
        self._filled[buffer] = ours
        return buffer, self._ring.view[start : start + min(res, self.size)]  # with MSG_TRUNC, res is what it would be

    def release(self, buffer: int) -> None:
        """One chunk of the buffer is no longer needed."""
        self._users[buffer] -= 1
        if self._filled[buffer] and not self._users[buffer]:
            self._free.append(buffer)
            if 2 * len(self._free) >= self.count:
                self.provide()
            if self._starving and not self._manager.closed:
                starving, self._starving = self._starving, {}
                for stream in starving:
                    stream.wake()

    def release_later(self, buffer: int) -> None:
        """As `release`, from wherever a view is collected."""
        try:
            self._token.run_sync_soon(self.release, buffer)
        except trio.RunFinishedError:
            pass

    def provide(self) -> None:
        """Gives the kernel what is free."""
        if self._free and not self._closed and not self._manager.ring.forked:  # a child shares the memory
            free, self._free = self._free, []
            for buffer in free:
                self._filled[buffer] = False
            self._ring.give_back(free)

    def starve(self, stream: Multishot[Any]) -> None:
        """Has the stream be woken when there is a buffer for it."""
        self._starving[stream] = None

    def check_usable(self) -> None:
        """Raises ValueError if nothing can be received into it here and now."""
        if self._closed:
            raise ValueError("this pool is closed")
        if self._manager is not _this_thread.manager:
            raise ValueError("this pool belongs to another trio run")

    def join(self, stream: Multishot[Any]) -> None:
        """The stream receives into the pool from now on."""
        self.check_usable()
        self._streams.add(stream)

    def leave(self, stream: Multishot[Any]) -> None:
        """The kernel no longer receives for the stream."""
        self._streams.discard(stream)
        self._starving.pop(stream, None)
        if self._closed and not self._streams:
            self._manager.registered.close_buffers(self._ring)

    @enable_ki_protection
    def close(self) -> None:
        """Frees the memory: at once, or when the last view of a buffer is gone. Idempotent.

        Raises:
            RuntimeError: a receive is using the pool.
        """
        if any(not stream.forsaken for stream in self._streams):
            raise RuntimeError(f"{len(self._streams)} multishot receives use this pool")
        if not self._closed:
            if not self._streams:  # otherwise the last to leave does it
                self._manager.registered.close_buffers(self._ring)
            self._closed = True

    @enable_ki_protection
    def __enter__(self) -> Self:
        return self

    @enable_ki_protection
    def __exit__(self, *_: object) -> None:
        self.close()


class Multishot(Generic[T]):
    """The results of a multishot operation: an async context manager, and inside of it an async iterator.

    One task iterates. A result that has come is never lost by a cancel: the next ``__anext__`` has it. `stop` ends the
    operation, and what has come by then can still be iterated. Leaving the context ends it, too, and cleans up what
    nobody took: connections are closed, data is kept in `leftover`.

    Attributes:
        leftover: after the end of the context, data that had come and was not taken.
    """

    leftover: list[T]

    def __init__(
        self, kind: Kind[Any], fd: int, limit: int, *, off: int = 0, pin: Any = None, length: int = 0, op_flags: int = 0
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self._manager = _this_thread.manager.require(kind)
        self._kind = kind
        self._fd = fd
        self._limit = limit
        self._fields: tuple[int, Any, int, int] = off, pin, length, op_flags
        self._extra: tuple[int, int, int, int] | None = None
        self._queue: deque[Any] = deque()
        self._shots: Shots | None = None
        self._entered = False
        self._iterating = False  # a task is in `_next`
        self._waiting: Task | None = None  # for a result
        self._ending: list[Task] = []  # for the last CQE
        self._pausing = False  # a cancel was asked for
        self._finished = False  # the operation is not to be armed again
        self._closed = False
        self._error = 0
        self.leftover = []
        self.forsaken = False

    # What a kind of result decides

    def _enqueue(self, res: int, flags: int) -> None:
        self._queue.append(res)

    def _make(self, item: Any) -> T:
        """The caller's result of what is queued."""
        return item  # type: ignore[no-any-return]

    def _clean_up(self, item: Any) -> None:
        """Nobody took this."""
        self.leftover.append(self._make(item))

    def _is_the_end(self, res: int, flags: int) -> bool:
        return False

    def _may_be_armed(self) -> bool:
        return len(self._queue) <= self._limit // 2

    # `Receiver`

    def receive(self, res: int, flags: int) -> None:
        """See `trio_uring._shots.Receiver`."""
        ended = not flags & CQE_F_MORE
        if res >= 0 or res in self._kind.success:
            if ended and self._is_the_end(res, flags):
                self._finished = True
            else:
                self._enqueue(res, flags)
        elif res == -errno.ECANCELED and not self._pausing:
            self._error = res
        elif res not in INTERRUPTED:
            self._fail(res)
        if ended:
            self._pausing = False
        elif len(self._queue) >= self._limit and not self._pausing:
            self._stop()
        self.wake()

    def _fail(self, res: int) -> None:
        self._error = res

    def discard(self, res: int, flags: int) -> None:
        """See `trio_uring._shots.Receiver`."""
        if res >= 0:
            self._enqueue(res, flags)
        self._clear()
        if not flags & CQE_F_MORE:
            self._let_go()

    def fd_closed(self) -> None:
        """See `trio_uring._shots.Receiver`."""
        self._closed = self._pausing = True
        self.wake()

    def fail(self, error: RingError) -> None:
        """See `trio_uring._shots.Receiver`."""
        tasks = self._ending if self._waiting is None else [*self._ending, self._waiting]
        self._waiting, self._ending = None, []
        for task in tasks:
            trio.lowlevel.reschedule(task, outcome.Error(error))

    def forsake(self) -> None:
        """See `trio_uring._shots.Receiver`."""
        self.forsaken = True
        self._waiting = None
        self._ending.clear()
        self._clear()
        if self._shots is not None and not self._shots.armed:
            self._let_go()

    def wake(self) -> None:
        """Has whoever waits look again."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            trio.lowlevel.reschedule(waiting)
        while self._ending:
            trio.lowlevel.reschedule(self._ending.pop())

    # The operation

    def _arm(self) -> None:
        assert self._shots is not None
        off, pin, length, op_flags = self._fields
        ring, kind, fd, extra = self._manager.ring, self._kind, self._fd, self._extra
        self._shots.arm(lambda token: ring.stage(kind.head, fd, off, 0, length, op_flags, token, pin, extra))

    def _stop(self) -> None:
        assert self._shots is not None
        self._pausing = self._shots.stop()

    def _clear(self) -> None:
        while self._queue:
            self._clean_up(self._queue.popleft())

    # What users call

    def __aiter__(self) -> Self:
        return self

    @enable_ki_protection
    async def __anext__(self) -> T:
        return self._make(await self._next())

    async def _next(self) -> Any:
        """What comes next, as it is queued."""
        shots = self._shots
        if shots is None:
            raise RuntimeError("a multishot operation is iterated inside of its `async with`")
        if self._iterating:
            raise trio.BusyResourceError("another task is already iterating")
        self._iterating = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._queue or not self._goes_on():
                await trio.lowlevel.cancel_shielded_checkpoint()
            while not self._queue:
                self._manager.check_working()
                if not shots.armed:
                    self._arm_or_end()
                await self._park()
        finally:
            self._iterating = False
        item = self._queue.popleft()
        if self._goes_on() and not shots.armed and self._may_be_armed():
            self._arm()
        return item

    def _arm_or_end(self) -> None:
        """Nothing is queued, and nothing will come."""
        if self._error:
            res, self._error = self._error, 0
            raise os_error(res)
        if self._closed:
            raise closed_error()
        if self._finished:
            raise StopAsyncIteration
        self._arm_or_wait()

    def _goes_on(self) -> bool:
        return not (self._finished or self._closed or self._error)

    def _arm_or_wait(self) -> None:
        self._arm()

    async def _park(self) -> None:
        """Waits until something has come."""

        def abort(_: RaiseCancelT) -> Abort:
            self._waiting = None
            if self._shots is not None and self._shots.state is State.STAGED:
                self._shots.stop()
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiting = current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    @enable_ki_protection
    async def stop(self) -> None:
        """Ends the operation. The iteration goes on with what has come by then, and ends."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._end()

    async def _end(self) -> None:
        """Stops, and waits for the last CQE, whatever happens."""
        self._manager.check_working()
        self._finished = True
        shots = self._shots
        if shots is not None and shots.armed:
            self._stop()
        self.wake()  # there may be nothing to wait for any more
        if shots is None or not shots.armed:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        try:
            while shots.armed:
                self._ending.append(current_task())
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        except BaseException:  # the coroutine is being closed: its run was torn down
            shots.abandon()
            raise

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a multishot operation is entered once")
        self._entered = True
        try:
            await trio.lowlevel.checkpoint()
            shots = await self._manager.open_shots(self._kind, self._fd, self)
            try:
                self._begin()
            except BaseException:
                self._manager.close_shots(shots)
                raise
        except BaseException:
            self._entered = False
            raise
        self._shots = shots
        shots.keep = self
        return self

    def _begin(self) -> None:
        """The context has been entered."""

    @enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shots = self._shots
        if self.forsaken:
            return
        assert shots is not None
        if kind is GeneratorExit and not self._can_wait():
            shots.abandon()
            return
        await self._end()
        self._let_go()
        self._clear()
        if kind is None:  # otherwise what is on its way is not to be replaced
            await trio.lowlevel.checkpoint_if_cancelled()

    def _can_wait(self) -> bool:
        """Is it an asynchronous generator that is being closed, by a task? Otherwise its run is gone."""
        return _this_thread.manager is self._manager and trio.lowlevel.in_trio_task()

    def _let_go(self) -> None:
        """The kernel is done with it, for good."""
        shots, self._shots = self._shots, None
        if shots is not None:
            self._manager.close_shots(shots)
            self._left()

    def _left(self) -> None:
        """The context has been left."""


class Connections(Multishot[int]):
    """Fds of accepted connections."""

    def _clean_up(self, item: int) -> None:
        close_result(item, None)


class Events(Multishot[int]):
    """Poll events; those that come before the last ones were taken are added to them."""

    def _enqueue(self, res: int, flags: int) -> None:
        if self._queue:
            self._queue[0] |= res
        else:
            self._queue.append(res)


class Ticks(Multishot[int]):
    """How often a clock has ticked since last asked."""

    def __init__(self, seconds: float, count: int) -> None:
        if not seconds >= _SHORTEST_TICK:
            raise ValueError(f"seconds must be at least {_SHORTEST_TICK}, not {seconds}")
        super().__init__(TIMEOUT, -1, 1 << 30, pin=timespec(seconds), length=1, op_flags=TIMEOUT_MULTISHOT)
        self._to_come = unsigned("count", count)

    def _arm(self) -> None:
        _, *fields = self._fields
        self._fields = self._to_come, *fields
        super()._arm()

    def _enqueue(self, res: int, flags: int) -> None:
        if self._to_come:
            self._to_come -= 1
            self._finished = not self._to_come
        if self._queue:
            self._queue[0] += 1
        else:
            self._queue.append(1)

    def _clean_up(self, item: int) -> None:
        """A tick that nobody heard is gone."""


class BufferView:
    """A chunk in the kernel's own buffer: a context manager that gives a `memoryview`. Afterwards the kernel may use
    the buffer again.

    Raises (at the end of the context):
        BufferError: a slice of the memoryview is still in use. The buffer is then not given back; `release` it later.
    """

    def __init__(self, pool: BufferPool, buffer: int | None, chunk: memoryview) -> None:
        self._pool = pool
        self._buffer = -1 if buffer is None else buffer
        self._had = buffer is not None
        self._chunk = chunk
        # A memoryview does not count its slices. But what it views can be told to count its views.
        self._memory = memoryview(ffi.buffer(ffi.from_buffer(chunk)))

    def __enter__(self) -> memoryview:
        return self._memory

    @enable_ki_protection
    def __exit__(self, *_: object) -> None:
        self.release()

    @enable_ki_protection
    def release(self) -> None:
        """Gives the buffer back. Idempotent."""
        if self._take_back():
            self._pool.release(self._buffer)

    def _take_back(self) -> bool:
        """Does it have a buffer that nobody looks at any more?"""
        self._memory.release()
        self._chunk.release()
        had, self._had = self._had, False
        return had

    def __del__(self) -> None:
        try:
            if self._take_back():
                self._pool.release_later(self._buffer)
        except BufferError:  # the pool has to do without it
            pass


class _Received(Multishot[T]):
    """What comes in buffers of a pool."""

    _pool: BufferPool

    def __init__(self, kind: Kind[Any], fd: int, pool: BufferPool | None, limit: int, **fields: Any) -> None:
        super().__init__(kind, fd, limit, **fields)
        of_socket = None if kind is READ else _kind_of_socket(fd)
        self._is_stream = of_socket in (None, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
        self._is_of_bytes = kind is RECV and of_socket is socket.SOCK_STREAM
        self._own_pool = pool is None
        if pool is not None:
            pool.check_usable()
            if pool.incremental and not self._is_of_bytes:
                raise ValueError("messages cannot share buffers: give a pool with incremental=False")
            self._pool = pool

    def _begin(self) -> None:
        if self._own_pool:
            self._pool = BufferPool(_POOL_COUNT, _POOL_SIZE, incremental=self._is_of_bytes)
        self._pool.join(self)
        self._extra = self._pool.group, 0, 0, 0

    def _enqueue(self, res: int, flags: int) -> None:
        if flags & CQE_F_BUFFER:
            self._queue.append(self._pool.take(res, flags))
        else:
            self._queue.append((None, memoryview(b"")))

    def _is_the_end(self, res: int, flags: int) -> bool:
        return res == 0 and self._is_stream

    def _fail(self, res: int) -> None:
        if res != -errno.ENOBUFS:  # that only means that all buffers are in the queue, or with others
            self._error = res

    def _may_be_armed(self) -> bool:
        return super()._may_be_armed() and 2 * self._pool.available >= self._pool.count

    def _arm(self) -> None:
        self._pool.provide()
        super()._arm()

    def _arm_or_wait(self) -> None:
        if self._pool.available:
            self._arm()
        else:
            self._pool.starve(self)

    def _release(self, item: Any) -> None:
        buffer, memory = item
        memory.release()
        if buffer is not None:
            self._pool.release(buffer)

    def _left(self) -> None:
        self._pool.leave(self)
        if self._own_pool:
            self._pool.close()


class Chunks(_Received[bytes]):
    """Data, in the portions in which it came."""

    def _make(self, item: Any) -> bytes:
        data = bytes(item[1])
        self._release(item)
        return data

    def views(self) -> Views:
        """The same data without a copy: an async iterator of `BufferView`."""
        return Views(self)

    @enable_ki_protection
    async def next_view(self) -> BufferView:
        """As ``__anext__``, without a copy."""
        buffer, memory = await self._next()
        return BufferView(self._pool, buffer, memory)


class Views:
    """Chunks in the kernel's own buffers. A buffer whose view is in use is not the kernel's to fill: who keeps all of
    them stops the receive.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def __aiter__(self) -> Self:
        return self

    @enable_ki_protection
    async def __anext__(self) -> BufferView:
        return await self._chunks.next_view()


Message = tuple[bytes, list[Ancillary], int, Any]
"""``(data, ancdata, flags, address)``."""


class Messages(_Received[Message]):
    """Messages, as `trio_uring.lowlevel.recvmsg` returns them."""

    def __init__(self, fd: int, pool: BufferPool | None, limit: int, ancbufsize: int, flags: int) -> None:
        self._data_at = _RECVMSG_OUT.size + STORAGE_SIZE + unsigned("ancbufsize", ancbufsize)
        size = _POOL_SIZE if pool is None else pool.size
        if size <= self._data_at:
            raise ValueError(
                f"buffers of {size} bytes have no room: {self._data_at} are for address and ancillary data"
            )
        super().__init__(
            RECVMSG, fd, pool, limit, pin=multishot_header(ancbufsize), length=1, op_flags=unsigned("flags", flags)
        )

    def _is_the_end(self, res: int, flags: int) -> bool:
        if res > self._data_at or not self._is_stream:
            return False
        if flags & CQE_F_BUFFER:
            self._release(self._pool.take(res, flags))
        return True

    def _make(self, item: Any) -> Message:
        memory = item[1]
        name_size, control_size, _, flags = _RECVMSG_OUT.unpack_from(memory)
        control_at = _RECVMSG_OUT.size + STORAGE_SIZE
        name = bytes(memory[_RECVMSG_OUT.size : _RECVMSG_OUT.size + min(name_size, STORAGE_SIZE)])
        control = bytes(memory[control_at : control_at + control_size])
        data = bytes(memory[self._data_at :])
        self._release(item)
        return data, decode_ancillary(control), flags, decode_address(name)

    def _clean_up(self, item: Any) -> None:
        data, ancdata, flags, address = self._make(item)
        for fd in descriptors(ancdata):
            close_result(fd, None)
        rest = [each for each in ancdata if each[:2] != (socket.SOL_SOCKET, socket.SCM_RIGHTS)]
        self.leftover.append((data, rest, flags, address))


@enable_ki_protection  # what is made here must not close the fd
def _kind_of_socket(fd: int) -> socket.SocketKind | None:
    """SOCK_STREAM and so on; None: it is no socket, or the operation will say what is wrong with it."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError):
        return None
    try:
        return sock.type
    finally:
        sock.detach()


def accept_multishot(fd: int | HasFileno, flags: int = 0, *, limit: int = 64) -> Connections:
    """Accepts connections: an async context manager, and an async iterator of fds. IORING_OP_ACCEPT, multishot, Linux
    5.19.

    Args:
        fd: a listening socket.
        flags: ``SOCK_NONBLOCK`` for the new fds; ``SOCK_CLOEXEC`` is added.
        limit: with so many connections waiting to be taken, no more are accepted. Up to the listener's backlog may come
            in excess.

    An error such as EMFILE is raised by ``__anext__``; the next one tries again. The fds are yours once they are
    iterated; the others are closed at the end of the context.
    """
    return Connections(ACCEPT, number_of(fd), limit, op_flags=unsigned("flags", flags) | socket.SOCK_CLOEXEC)


def recv_multishot(fd: int | HasFileno, pool: BufferPool | None = None, *, flags: int = 0, limit: int = 256) -> Chunks:
    """Receives: an async context manager, and an async iterator of `bytes`. IORING_OP_RECV, multishot, Linux 6.0.

    Args:
        fd: a socket.
        pool: where to receive into; by default 8 buffers of 16 KiB of its own.
        flags: ``MSG_*``, without ``MSG_WAITALL``.
        limit: with so many chunks waiting to be taken, no more are received.

    The iteration ends at the end of the stream. Empty datagrams are items.
    """
    return Chunks(RECV, number_of(fd), pool, limit, op_flags=unsigned("flags", flags))


def recvmsg_multishot(
    fd: int | HasFileno, pool: BufferPool | None = None, *, ancbufsize: int = 0, flags: int = 0, limit: int = 256
) -> Messages:
    """Receives messages with ancillary data and the sender's address: an async context manager, and an async iterator
    of ``(data, ancdata, flags, address)``. IORING_OP_RECVMSG, multishot, Linux 6.0.

    Args:
        fd: a socket.
        pool: where to receive into; by default 8 buffers of 16 KiB of its own. 144 + ``ancbufsize`` bytes of a buffer
            are not for data; a datagram that does not fit is truncated, with ``MSG_TRUNC`` in its flags.
        ancbufsize: room for ancillary data, in bytes; see `socket.CMSG_SPACE`.
        flags: ``MSG_*``.
        limit: with so many messages waiting to be taken, no more are received.
    """
    return Messages(number_of(fd), pool, limit, ancbufsize, flags)


def read_multishot(fd: int | HasFileno, pool: BufferPool | None = None, *, limit: int = 256) -> Chunks:
    """Reads from a pipe, a tty or the like: an async context manager, and an async iterator of `bytes`.
    IORING_OP_READ_MULTISHOT, Linux 6.7.

    Args:
        fd: what to read; a regular file has no readiness to wait for (EBADFD).
        pool: where to read into; by default 8 buffers of 16 KiB of its own.
        limit: with so many chunks waiting to be taken, no more are read.
    """
    return Chunks(READ, number_of(fd), pool, limit, off=-1)


def poll_multishot(fd: int | HasFileno, events: int) -> Events:
    """Watches an fd: an async context manager, and an async iterator of poll events. IORING_OP_POLL_ADD, multishot,
    Linux 5.13.

    Args:
        fd: anything poll(2) takes.
        events: ``select.POLLIN`` and so on.

    It is triggered by edges: an item comes when something has happened, with what holds then. Events that come before
    the last were taken are added to them.
    """
    return Events(POLL, number_of(fd), 1 << 30, op_flags=unsigned("events", events), length=POLL_ADD_MULTI)


def timeout_multishot(seconds: float, count: int = 0) -> Ticks:
    """A clock: an async context manager, and an async iterator of how often it has ticked since last asked.
    IORING_OP_TIMEOUT, multishot, Linux 6.4.

    Args:
        seconds: between two ticks, by the kernel's clock; at least 0.0001.
        count: how often it ticks; 0 is for ever.
    """
    return Ticks(seconds, count)


_POOL_COUNT: Final = 8
_POOL_SIZE: Final = 16384
_SHORTEST_TICK: Final = 1e-4
_RECVMSG_OUT: Final = struct.Struct("<4I")  # struct io_uring_recvmsg_out: sizes of name, control, payload; flags
