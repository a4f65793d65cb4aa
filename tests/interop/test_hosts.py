"""Guest runs in loops of other people's, Qt's and Tk's: they wait, and trio runs in their callbacks, with a ring."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import trio
import trio.testing
from PySide6.QtCore import QCoreApplication, QObject, Qt, QTimer, Signal

import trio_uring
from tests.helpers import Host, attached_first, manager, manager_or_none
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    import tkinter
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path
    from socket import socket

    from tests.helpers import Bench


class Loop(Protocol):
    """An event loop."""

    def put(self, function: Callable[[], object]) -> None:
        """From any thread: the loop's calls it."""

    def soon(self, function: Callable[[], object]) -> None:
        """From the loop's thread: calls it in one of the next turns, as what the application has to do itself."""

    def run(self, now_and_then: Callable[[], object]) -> None:
        """Runs to `quit`. While it waits no signal handler of Python's is called (the time limit's, say), so something
        has to be now and then.
        """

    def quit(self) -> None:
        """Ends `run`."""

    def close(self) -> None:
        """Ends all."""


class QtLoop(QObject):  # type: ignore[misc]
    """Qt's."""

    _asked = Signal(object)

    def __init__(self) -> None:
        self._application = QCoreApplication([])
        super().__init__()
        self._asked.connect(self._call, Qt.ConnectionType.QueuedConnection)

    def _call(self, function: Callable[[], object]) -> None:
        function()

    def put(self, function: Callable[[], object]) -> None:
        self._asked.emit(function)

    def soon(self, function: Callable[[], object]) -> None:
        QTimer.singleShot(0, function)

    def run(self, now_and_then: Callable[[], object]) -> None:
        alarm = QTimer()
        alarm.timeout.connect(now_and_then)
        alarm.start(100)
        self._application.exec()
        alarm.stop()

    def quit(self) -> None:
        self._application.quit()

    def close(self) -> None:
        self._application.shutdown()


class TkLoop:
    """Tk's."""

    def __init__(self, root: tkinter.Tk) -> None:
        self._root = root
        root.withdraw()
        root.update()

    def put(self, function: Callable[[], object]) -> None:
        self._root.after(0, function)

    soon = put

    def run(self, now_and_then: Callable[[], object]) -> None:
        def call() -> None:
            now_and_then()
            self._alarm = self._root.after(100, call)

        self._alarm = self._root.after(100, call)
        self._root.mainloop()
        self._root.after_cancel(self._alarm)

    def quit(self) -> None:
        self._root.quit()

    def close(self) -> None:
        self._root.destroy()


class LoopHost(Host):
    """A host of guest runs in such a loop."""

    def __init__(self, loop: Loop, *, native: bool) -> None:
        self._loop = loop
        self._native = native
        self._error: BaseException | None = None
        self.todo: Any = self
        self.result = None

    def put(self, function: Callable[[], object]) -> None:
        self._loop.put(partial(self._call, function))

    def _call(self, function: Callable[[], object]) -> None:
        """The loops would only print what is raised."""
        try:
            function()
        except BaseException as exc:
            self._error = exc
        if self._error is not None or self.result is not None:
            self._loop.quit()

    def own_event(self, function: Callable[[], object]) -> None:
        """What the application does itself, in one of the next turns of the loop."""
        self._loop.soon(partial(self._call, function))

    def begin(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        main = partial(async_fn, *args)
        if self._native:
            self.start(main)
        else:
            self.start_stock(attached_first(main))

    def finish(self) -> Any:
        self._loop.run(partial(self._call, bool))
        if self._error is not None:
            raise self._error
        assert self.result is not None
        return self.result.unwrap()

    def run(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> Any:
        self.begin(async_fn, *args)
        return self.finish()


def _tk() -> TkLoop | str:
    """Tk's loop, or why there is none."""
    try:
        import tkinter
    except ImportError:
        return "this Python has no tkinter"
    try:
        return TkLoop(tkinter.Tk())
    except tkinter.TclError as exc:
        return f"Tk has no display: {exc}"


@pytest.fixture(scope="module")
def loops() -> Iterator[dict[str, Loop | str]]:
    """Made before anything is counted: they keep fds of their own."""
    loops: dict[str, Loop | str] = {"qt": QtLoop(), "tk": _tk()}
    yield loops
    for loop in loops.values():
        if not isinstance(loop, str):
            loop.close()


@pytest.fixture(params=["qt-native", "qt-attached", "tk-native", "tk-attached"])
def host(request: pytest.FixtureRequest, loops: dict[str, Loop | str]) -> LoopHost:
    """With a run that has the ring as its I/O manager, or beside it."""
    name, _, mount = request.param.partition("-")
    loop = loops[name]
    if isinstance(loop, str):
        pytest.skip(loop)
    return LoopHost(loop, native=mount == "native")


@pytest.fixture(autouse=True)
def no_operation_left(host: LoopHost) -> Iterator[None]:
    """Fds and threads are looked for after every test, see the fixtures of all tests."""
    made: list[Any] = []
    begin = host.begin

    def noted(async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        async def main() -> object:
            made.append(manager())
            assert made[-1].native is host._native
            return await async_fn(*args)

        begin(main)

    host.begin = noted  # type: ignore[method-assign]
    yield
    assert made
    for each in made:
        assert each.closed
        assert not each._operations()


async def receive(sock: socket) -> bytes:
    buffer = bytearray(9)
    return bytes(buffer[: await lowlevel.recv(sock, buffer)])


def when_the_worker_sleeps(host: LoopHost, function: Callable[[], object]) -> None:
    """Calls it in the host when trio waits in another thread, for an operation in flight."""

    def look() -> None:
        found = manager_or_none()
        if found is not None and found._worker_waits and found.unfinished():
            function()
        else:
            host.own_event(look)

    host.own_event(look)


def test_a_file(host: LoopHost, tmp_path: Path) -> None:
    async def main() -> bytes:
        await trio_uring.write_file(tmp_path / "file", b"hello")
        async with await trio_uring.open_file(tmp_path / "file", "rb") as file:
            assert statistics().engine == "io_uring"
            return await file.read()

    assert host.run(main) == b"hello"


def test_an_echo(host: LoopHost) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> int:
        total = 0
        async with trio.open_nursery() as nursery:
            (listener, *_) = await trio_uring.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            async with await trio_uring.open_tcp_stream(*listener.socket.getsockname()) as stream:
                for i in range(100):
                    await stream.send_all(b"%d" % i)
                    assert await stream.receive_some() == b"%d" % i
                    total += 1
            nursery.cancel_scope.cancel()
        return total

    assert host.run(main) == 100


def test_a_timeout(host: LoopHost, bench: Bench) -> None:
    a, b = bench.sockets()

    async def main() -> bytes:
        with trio.move_on_after(0.01) as scope:
            await receive(a)
        assert scope.cancelled_caught
        assert statistics().cancels_won == 1
        b.send(b"hello")
        return await receive(a)

    assert host.run(main) == b"hello"


@pytest.mark.parametrize("name", ["recv", "read"])
def test_the_host_cancels(host: LoopHost, bench: Bench, name: str) -> None:
    a, _ = bench.sockets()
    scope = trio.CancelScope()

    async def main() -> bool:
        with scope:
            await getattr(lowlevel, name)(a, bytearray(9))
        return scope.cancelled_caught

    def cancel() -> None:
        scope.cancel()
        assert manager().ring.staged == 0  # nobody would submit it

    host.begin(main)
    when_the_worker_sleeps(host, cancel)
    assert host.finish() is True


def test_the_host_closes(host: LoopHost, bench: Bench) -> None:
    a, b = bench.sockets()
    fd = a.detach()

    async def main() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await lowlevel.recv(fd, bytearray(9))

    def close() -> None:
        lowlevel.notify_closing(fd)
        os.close(fd)
        assert b.recv(1) == b""

    host.begin(main)
    when_the_worker_sleeps(host, close)
    host.finish()


def test_many_operations(host: LoopHost, bench: Bench) -> None:
    """Of all the tasks that wait, each gets its own."""
    pairs = [bench.sockets() for _ in range(100)]
    files = [bench.file(b"%d" % i) for i in range(100)]
    got: dict[int, tuple[bytes, bytes]] = {}

    async def one(i: int) -> None:
        buffer = bytearray(9)
        received = await receive(pairs[i][0])
        got[i] = received, bytes(buffer[: await lowlevel.read(files[i], buffer)])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(one, i)

    def send() -> None:
        for i, (_, b) in enumerate(pairs):
            b.send(b"%d" % i)

    host.begin(main)
    when_the_worker_sleeps(host, send)
    host.finish()
    assert got == {i: (b"%d" % i, b"%d" % i) for i in range(100)}


def test_the_host_goes_on_while_trio_waits(host: LoopHost, bench: Bench) -> None:
    """The application sends what trio waits for, after a hundred events of its own."""
    a, b = bench.sockets()
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events < 100:
            host.own_event(event)
        else:
            b.send(b"hello")

    host.begin(receive, a)
    when_the_worker_sleeps(host, event)
    assert host.finish() == b"hello"
    assert events == 100


def test_the_host_goes_on_while_trio_is_busy(host: LoopHost, bench: Bench) -> None:
    """trio does not let go of its work until the application has had a hundred turns."""
    file = bench.file(b"hello")
    events = reads = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events < 100:
            host.own_event(event)

    async def main() -> None:
        nonlocal reads
        while events < 100:
            assert await lowlevel.read(file, bytearray(9), 0) == 5
            reads += 1

    host.own_event(event)
    host.run(main)
    assert reads > 0


def test_threads(host: LoopHost, bench: Bench) -> None:
    a, b = bench.sockets()

    def in_thread() -> bytes:
        trio.from_thread.run(lowlevel.send, b, b"hello")
        received: bytes = trio.from_thread.run(receive, a)
        return received

    async def main() -> bytes:
        return await trio.to_thread.run_sync(in_thread)

    assert host.run(main) == b"hello"


def test_an_error_ends_the_run(host: LoopHost, bench: Bench) -> None:
    """Its operations are cancelled first."""
    a, _ = bench.sockets()
    b, _ = bench.pipe()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lowlevel.recv, a, bytearray(9))
            nursery.start_soon(lowlevel.read, b, bytearray(9))
            await trio.testing.wait_all_tasks_blocked()
            raise KeyError

    with pytest.RaisesGroup(KeyError):
        host.run(main)


def test_one_run_after_the_other(host: LoopHost, tmp_path: Path) -> None:
    for i in range(5):
        host.result = None
        host.run(trio_uring.write_file, tmp_path / f"{i}", b"hello")
    assert len(os.listdir(tmp_path)) == 5
