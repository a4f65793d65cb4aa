"""Ways to run a test on a ring, and tools to look at an operation from outside."""

from __future__ import annotations

import array
import dataclasses
import fcntl
import gc
import itertools
import os
import pickle
import queue
import re
import select
import signal
import socket
import sys
import termios
import threading
import time
import warnings
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import outcome
import trio
import trio.testing

import trio_uring
from tests import libc
from trio_uring import RingConfig, _trio_internals
from trio_uring._attached import AttachedManager
from trio_uring._core import UringIOManager, _this_thread
from trio_uring._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from pathlib import Path
    from types import FrameType

    from trio.lowlevel import Task

    from trio_uring.lowlevel import Kind

T = TypeVar("T")

REQUIRED = RingConfig(mode="require")
IOSQE_ASYNC = 1 << 4
_OF_TRIO = re.compile(
    "coroutine ignored GeneratorExit|must be called from async context|was never awaited|Nursery.__del__"
    "|I/O operation on closed epoll object"
)


class Run(Protocol):
    """`trio_uring.run`, or something like it."""

    def __call__(
        self, async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = ..., **kwargs: Any
    ) -> T: ...


@dataclasses.dataclass(frozen=True)
class Mount:
    """A way to tie a ring to a run."""

    name: str
    run: Run
    native: bool = True  #: is the run's I/O manager the ring?


def run_native(async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any) -> T:
    return trio_uring.run(async_fn, *args, config=config, **kwargs)


class Host:
    """A host loop for guest mode: a queue of callbacks."""

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.result: outcome.Outcome[Any] | None = None

    def start(
        self, async_fn: Callable[..., Awaitable[object]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any
    ) -> None:
        """Starts a run that has a ring."""
        with installed(config):
            self.start_stock(async_fn, *args, **kwargs)

    def start_stock(self, async_fn: Callable[..., Awaitable[object]], *args: object, **kwargs: Any) -> None:
        """Starts a run."""

        def done(result: outcome.Outcome[Any]) -> None:
            self.result = result

        trio.lowlevel.start_guest_run(
            async_fn, *args, run_sync_soon_threadsafe=self.todo.put, done_callback=done, **kwargs
        )

    def step(self) -> None:
        """Waits for the next callback and calls it."""
        self.todo.get()()

    def finish(self) -> Any:
        """Goes on to the end of the run; returns its result."""
        while self.result is None:
            self.step()
        return self.result.unwrap()


def run_without_ring(async_fn: Callable[..., Awaitable[T]], *args: object) -> T:
    """As where there can be none."""
    return trio_uring.run(async_fn, *args, config=RingConfig(mode="off"))


def run_guest(async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any) -> T:
    host = Host()
    host.start(async_fn, *args, config=config, **kwargs)
    result: T = host.finish()
    return result


_public_wakes = itertools.count()
_shortcut = UringIOManager.__dict__["wake"]
_public_runs: set[int] = set()


def run_with_public_wake(
    async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any
) -> T:
    number = next(_public_wakes)
    _public_runs.add(number)
    UringIOManager.wake = staticmethod(_trio_internals._wake_publicly)
    try:
        return run_native(async_fn, *args, config=config, **kwargs)
    finally:
        _public_runs.discard(number)
        if not _public_runs:  # there may be runs in several threads
            UringIOManager.wake = _shortcut


def attached_first(
    async_fn: Callable[[], Awaitable[T]], config: RingConfig = REQUIRED
) -> Callable[[], Coroutine[Any, Any, T]]:
    """What attaches a ring of this configuration to the run that is under way, and goes on."""

    async def main() -> T:
        AttachedManager(config)
        return await async_fn()

    return main


def run_attached(
    async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any
) -> T:
    return trio.run(attached_first(partial(async_fn, *args), config), **kwargs)


def run_attached_guest(
    async_fn: Callable[..., Awaitable[T]], *args: object, config: RingConfig = REQUIRED, **kwargs: Any
) -> T:
    host = Host()
    host.start_stock(attached_first(partial(async_fn, *args), config), **kwargs)
    result: T = host.finish()
    return result


MOUNTS = {
    mount.name: mount
    for mount in (
        Mount("native", run_native),
        Mount("guest", run_guest),
        Mount("public-wake", run_with_public_wake),
        Mount("attached", run_attached, native=False),
        Mount("attached-guest", run_attached_guest, native=False),
    )
}


@contextmanager
def installed(config: RingConfig = REQUIRED) -> Iterator[None]:
    trio_uring.install(config)
    try:
        yield
    finally:
        trio_uring.uninstall()


def manager_or_none() -> UringIOManager | None:
    """That of this thread's run, if it has one."""
    found: object = _this_thread.manager
    return found if isinstance(found, UringIOManager) else None


def manager() -> UringIOManager:
    """That of this thread's run; the host of a guest run sees it, too."""
    found = manager_or_none()
    assert found is not None
    return found


def in_kernel_worker(kind: Kind[T]) -> Kind[T]:
    """The same operation, but the kernel does it in a worker thread, where a cancel may find it running."""
    return dataclasses.replace(kind, flags=kind.flags | IOSQE_ASYNC)


class AfterStep(trio.abc.Instrument):
    """Calls ``action`` when ``task`` has made its next step: what it has just staged is still ours."""

    def __init__(self, task: Task, action: Callable[[], object]) -> None:
        self._task = task
        self._action = action

    def after_task_step(self, task: Task) -> None:
        if task is self._task:
            trio.lowlevel.remove_instrument(self)
            self._action()


class Attempt(Generic[T]):
    """A call in a task of its own that can be cancelled; then one of ``value``, ``error`` and ``cancelled`` is set.

    Args:
        nursery: where the task lives.
        async_fn, args: the call.
        once_parked: called when the task has parked for the first time, before the tick submits anything.
    """

    value: T
    error: Exception | None = None
    cancelled = False
    task: Task

    def __init__(
        self,
        nursery: trio.Nursery,
        async_fn: Callable[..., Awaitable[T]],
        *args: object,
        once_parked: Callable[[], object] | None = None,
    ) -> None:
        self.scope = trio.CancelScope()
        self._done = trio.Event()
        self._call = async_fn, args
        self._once_parked = once_parked
        nursery.start_soon(self._run, name=getattr(async_fn, "__name__", None))

    async def _run(self) -> None:
        self.task = trio.lowlevel.current_task()
        if self._once_parked is not None:
            trio.lowlevel.add_instrument(AfterStep(self.task, self._once_parked))
        async_fn, args = self._call
        try:
            with self.scope:
                self.value = await async_fn(*args)
        except Exception as exc:
            self.error = exc
        finally:
            self.cancelled = self.scope.cancelled_caught
            self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    async def result(self) -> T:
        """Waits for the end; the value, or the error."""
        await self._done.wait()
        assert not self.cancelled
        if self.error is not None:
            raise self.error
        return self.value

    async def settled(self) -> Attempt[T]:
        """Waits for the end, whatever it is."""
        await self._done.wait()
        return self

    async def cancel(self) -> bool:
        """Cancels it and waits for the end: True if it was cancelled, False if it was done."""
        self.scope.cancel()
        await self._done.wait()
        if self.error is not None:
            raise self.error
        return self.cancelled


async def parked(nursery: trio.Nursery, async_fn: Callable[..., Awaitable[T]], *args: object) -> Attempt[T]:
    """Starts the call and waits until it, and everything else, is blocked: its operation is with the kernel."""
    attempt = Attempt(nursery, async_fn, *args)
    await trio.testing.wait_all_tasks_blocked()
    assert not attempt.done, attempt.error or attempt.value
    return attempt


@contextmanager
def interrupted_at_line(n: int) -> Iterator[Callable[[], int]]:
    """The n-th line of ours that runs inside, in this thread, is interrupted. Yields what ends that and returns how
    many lines there were.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if "/trio_uring/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == n:
                signal.raise_signal(signal.SIGINT)
        return trace

    def stop() -> int:
        sys.settrace(before)
        return seen

    before = sys.gettrace()  # of a coverage tool, say
    sys.settrace(trace)
    try:
        yield stop
    finally:
        stop()


def give_way() -> None:
    """Lets other threads run, of this process and of others. Unlike sched_yield it gives up the GIL in every Python."""
    time.sleep(0)


def spin_until(condition: Callable[[], object]) -> None:
    """Blocks the thread, and with it the run, until another thread or the kernel has done something."""
    while not condition():
        give_way()


def drop_from_cache(fd: int) -> None:
    """Has the page cache forget a file. It may put that off: a core keeps the pages it touched last for a while."""

    def is_gone() -> bool:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return not libc.pages_in_cache(fd)

    spin_until(is_gone)


class Crash(Exception):
    """What `crash` crashes the scheduler with."""


async def crash() -> None:
    """Crashes the scheduler itself, as a mistake in somebody's abort function does. The run is torn down at once."""

    def abort(_: object) -> trio.lowlevel.Abort:
        raise Crash

    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.lowlevel.wait_task_rescheduled(abort)


@contextmanager
def only_trio_complains() -> Iterator[None]:
    """A run that was torn down leaves coroutines behind. trio's complain when they are collected; nobody else may."""
    strangers: list[str] = []

    def listen(complaint: sys.UnraisableHookArgs) -> None:
        text = f"{complaint.object!r}: {complaint.exc_value!r}"
        if not _OF_TRIO.search(text):
            strangers.append(text)

    before, sys.unraisablehook = sys.unraisablehook, listen
    gc.freeze()  # a collection need only look at what comes from now on
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Trio guest run got abandoned", RuntimeWarning)
            yield
            for _ in range(3):
                gc.collect()
    finally:
        gc.unfreeze()
        sys.unraisablehook = before
    assert not strangers, strangers


def run_to_a_crash(mount: Mount, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
    """Runs what ends in `crash`, and collects what is left of it."""
    with only_trio_complains():
        try:
            mount.run(async_fn, *args)
        except trio.TrioInternalError as exc:
            assert isinstance(exc.__cause__, Crash)  # noqa: PT017 - pytest.raises would keep the tasks alive
            return
        raise AssertionError("it did not crash")


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads (idle ones of trio's)
        return os.fork()


def in_child(function: Callable[[], T]) -> T:
    """Calls it in a forked child; its result, or its exception."""
    read_end, write_end = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            signal.alarm(20)
            os.close(read_end)
            with open(write_end, "wb") as pipe:
                pickle.dump(outcome.capture(function), pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert (status, bool(report)) == (0, True), "the child died"
    result: T = pickle.loads(report).unwrap()
    return result


@asynccontextmanager
async def nothing_submitted() -> AsyncIterator[None]:
    """The kernel hears of nothing that happens inside."""
    await trio.testing.wait_all_tasks_blocked()
    before = trio_uring.statistics()
    yield
    await trio.testing.wait_all_tasks_blocked()
    after = trio_uring.statistics()
    assert (after.sqes, after.cancels_asked) == (before.sqes, before.cancels_asked)
    assert after.in_flight == before.in_flight


class Bench:
    """Files, pipes and sockets that are closed at the end of the test, except those the test has closed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._fds: set[int] = set()
        self._names = itertools.count()

    def close(self) -> None:
        self._stack.close()
        for fd in self._fds:
            os.close(fd)

    def keep(self, fd: int) -> int:
        """Closes it at the end."""
        self._fds.add(fd)
        return fd

    def closed(self, fd: int) -> None:
        """The test has closed it."""
        self._fds.remove(fd)

    def _new_path(self) -> Path:
        return self.directory / f"file-{next(self._names)}"

    def path(self, content: bytes = b"") -> Path:
        path = self._new_path()
        path.write_bytes(content)
        return path

    def fifo(self) -> Path:
        path = self._new_path()
        os.mkfifo(path)
        return path

    def file(self, content: bytes = b"") -> int:
        return self.keep(os.open(self.path(content), os.O_RDWR))

    def pipe(self, flags: int = 0) -> tuple[int, int]:
        read_end, write_end = os.pipe2(flags | os.O_CLOEXEC)
        return self.keep(read_end), self.keep(write_end)

    def full_pipe(self, flags: int = 0) -> tuple[int, int, int]:
        """A pipe with no room left, and how many bytes are in it."""
        read_end, write_end = self.pipe(flags)
        os.set_blocking(write_end, False)
        size = fill(lambda: os.write(write_end, bytes(4096)))
        os.set_blocking(write_end, not flags & os.O_NONBLOCK)
        return read_end, write_end, size

    def sockets(
        self, family: int = socket.AF_UNIX, kind: int = socket.SOCK_STREAM
    ) -> tuple[socket.socket, socket.socket]:
        """A connected pair."""
        if family == socket.AF_UNIX:
            pair = socket.socketpair(family, kind)
        else:
            listener = self.listener(family)
            client = socket.create_connection(listener.getsockname()[:2])
            pair = client, listener.accept()[0]
        for sock in pair:
            self._stack.enter_context(sock)
        return pair

    def full_socket(self) -> tuple[socket.socket, socket.socket, int]:
        """A connected pair, the first of which has no room left, and how many bytes wait in the second."""
        a, b = self.sockets()
        size = fill(lambda: a.send(bytes(4096), socket.MSG_DONTWAIT))
        return a, b, size

    def new_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        return self._stack.enter_context(socket.socket(family, kind))

    def listener(self, family: int = socket.AF_INET, backlog: int = 16) -> socket.socket:
        listener = self.new_socket(family)
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen(backlog)
        return listener

    def child(self) -> tuple[int, Callable[[], None]]:
        """The pid of a child, and what makes it exit with status 0."""
        read_end, write_end = self.pipe()
        to_stdin = [(os.POSIX_SPAWN_DUP2, read_end, 0)]
        pid = os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=to_stdin)
        self._stack.callback(_reap, pid)

        def end() -> None:
            self.closed(write_end)
            os.close(write_end)

        return pid, end

    def exited_child(self) -> int:
        """The pid of a child that nobody has waited for."""
        pid, end = self.child()
        end()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    def epoll(self) -> select.epoll:
        return self._stack.enter_context(select.epoll())

    def futex(self) -> memoryview:
        """A futex with 7 in it."""
        return memoryview(array.array("I", [7])).cast("B")

    def wake(self, futex: memoryview) -> None:
        """Wakes one who waits on the futex, now or later."""
        stop = threading.Event()

        def wake() -> None:
            while not stop.is_set() and not libc.futex_wake(futex, 1):
                give_way()

        thread = threading.Thread(target=wake)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(stop.set)

    def deaf_listener(self) -> socket.socket:
        """A listener with a full backlog: who connects next has to wait."""
        listener = self.listener(backlog=0)
        for _ in range(2):
            client = self.new_socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        return listener


LOCALHOST = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_socket_numbers = itertools.count()


def sockets() -> Any:
    """trio's names for sockets; or ours of the same name in a run where trio's do not lead to the ring."""
    manager = _this_thread.manager
    return trio_uring.socket if manager.carries_sockets and not manager.native else trio.socket


class World:
    """trio's sockets, of the class that belongs to the run, closed at the end."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def own(self, sock: Any) -> Any:
        assert (type(sock) is UringSocket) is bool(_this_thread.manager.carries_sockets)
        return self._stack.enter_context(sock)

    def new(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0) -> Any:
        return self.own(sockets().socket(family, kind, proto))

    def path(self) -> str:
        return f"{self.directory}/socket-{next(_socket_numbers)}"

    def address(self, family: int, *, abstract: bool = False) -> Any:
        if family == socket.AF_UNIX:
            return f"\0trio-uring-{os.getpid()}-{next(_socket_numbers)}" if abstract else self.path()
        return LOCALHOST[socket.AddressFamily(family)], 0

    async def bound(self, family: int, kind: int, *, abstract: bool = False) -> Any:
        sock = self.new(family, kind)
        await sock.bind(self.address(family, abstract=abstract))
        return sock

    async def listener(self, family: int, kind: int = socket.SOCK_STREAM, *, abstract: bool = False) -> Any:
        sock = await self.bound(family, kind, abstract=abstract)
        sock.listen()
        return sock

    async def pair(self, name: str) -> tuple[Any, Any]:
        """A connected pair, of a name in `NAMED`, or "pair" and one in `KINDS`."""
        if name.startswith("pair "):
            a, b = sockets().socketpair(socket.AF_UNIX, KINDS[name.removeprefix("pair ")])
            return self.own(a), self.own(b)
        family, kind, abstract = NAMED[name]
        if kind == socket.SOCK_DGRAM:
            a, b = [await self.bound(family, kind) for _ in range(2)]
            await a.connect(b.getsockname())
            await b.connect(a.getsockname())
            return a, b
        listener = await self.listener(family, kind, abstract=abstract)
        a = self.new(family, kind)
        await a.connect(listener.getsockname())
        b, address = await listener.accept()
        assert address == a.getsockname()
        return a, self.own(b)


KINDS = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
NAMED = {
    "tcp": (socket.AF_INET, socket.SOCK_STREAM, False),
    "tcp6": (socket.AF_INET6, socket.SOCK_STREAM, False),
    "unix": (socket.AF_UNIX, socket.SOCK_STREAM, False),
    "unix abstract": (socket.AF_UNIX, socket.SOCK_STREAM, True),
    "unix seqpacket": (socket.AF_UNIX, socket.SOCK_SEQPACKET, False),
    "unix dgram": (socket.AF_UNIX, socket.SOCK_DGRAM, False),
    "udp": (socket.AF_INET, socket.SOCK_DGRAM, False),
    "udp6": (socket.AF_INET6, socket.SOCK_DGRAM, False),
}


def _reap(pid: int) -> None:
    """Ends a child, unless the test has."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


_SIOCOUTQNSD = 0x894B


def fill(write: Callable[[], int]) -> int:
    """Writes until there is no room; the bytes in all."""
    total = 0
    while True:
        try:
            total += write()
        except BlockingIOError:
            return total


def is_acknowledged(sock: socket.socket) -> bool:
    """Is all that has been sent over TCP with the peer? What is on its way may make room when it arrives."""
    unacknowledged, unsent = (fcntl.ioctl(sock, request, bytes(4)) for request in (termios.TIOCOUTQ, _SIOCOUTQNSD))
    return unacknowledged == unsent


def drain(fd: int, size: int) -> bytes:
    """Reads exactly ``size`` bytes."""
    chunks = []
    while size:
        chunk = os.read(fd, size)
        assert chunk, f"end of file, {size} bytes missing"
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
