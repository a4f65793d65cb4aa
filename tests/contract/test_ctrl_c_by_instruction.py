"""Ctrl-C before each bytecode instruction of ours that runs while one call is made: until it is parked, and when its
completion has come until it returns.

Wherever it comes, the run ends with `KeyboardInterrupt`, and what is left is as if the call had not been made, or as if
it had returned. Nothing here knows how a call is made; only which file an instruction belongs to.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_uring
import trio_uring.anyio
from tests.helpers import REQUIRED, fill, run_attached, run_native
from trio_uring import RingConfig, UnavailableError, lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from types import FrameType

    from typing_extensions import Self

_OURS = os.path.dirname(trio_uring.__file__) + os.sep


class Instructions:
    """Counts our instructions that run inside, in this thread, and raises SIGINT before the n-th.

    Attributes:
        seen: how many there were.
        marks: for each source line, and each place where a call or a wait ends, the number of its first instruction.
    """

    def __init__(self, n: int) -> None:
        self.seen = 0
        self.marks: dict[tuple[object, bool, int | None], int] = {}
        self._n = n
        self._frame = 0  # that of the last one; it is not to be kept

    def __enter__(self) -> Self:
        self._before = sys.gettrace()  # of a coverage tool, say
        sys._getframe().f_trace_opcodes = True  # Python 3.12 has none of these events before a frame asks for them
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self.seen += 1
            back = id(frame) != self._frame
            self._frame = id(frame)
            self.marks.setdefault((frame.f_code, back, frame.f_lasti if back else frame.f_lineno), self.seen)
            if self.seen == self._n:
                signal.raise_signal(signal.SIGINT)
        return self._step


class Meanwhile(trio.abc.Instrument):
    """Does something whenever the run is about to sleep."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 1:
            self._action()


class Scene:
    """A call, and what is around it.

    Attributes:
        config: of the ring.
        others: how many operations of other tasks may be in flight when it is over.
        result: what the call has returned; None: it has not.
    """

    config = REQUIRED
    others = 0
    result: Any = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        self._stack.close()

    def own(self, thing: Any) -> Any:
        """Closes it at the end."""
        return self._stack.enter_context(thing)

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        a, b = socket.socketpair()
        return self.own(a), self.own(b)

    def uring(self, sock: socket.socket) -> Any:
        return self.own(trio_uring.socket.from_stdlib_socket(sock))

    def file(self) -> Path:
        path = self.directory / "file"
        path.write_bytes(b"hello")
        return path

    async def prepare(self) -> None:
        """In the run, before the call."""

    async def call(self) -> Any:
        """The call. It returns something."""
        raise NotImplementedError

    def meanwhile(self) -> None:
        """The run is about to sleep."""

    async def finish(self) -> None:
        """In the run, after the call, however it has ended."""

    def check(self) -> None:
        """After the run: nothing is lost, nothing held."""


# Receiving and sending


class Recv(Scene):
    """Data comes when the run sleeps."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.a, self.b = self.sockets()
        self.buffer = bytearray(9)
        self.to_come = [b"hello"]
        self.came = 0

    async def call(self) -> Any:
        return await lowlevel.recv(self.a, self.buffer)

    def meanwhile(self) -> None:
        if self.to_come:
            self.came += self.b.send(self.to_come.pop(0))

    def received(self) -> bytes | None:
        return None if self.result is None else bytes(self.buffer[: self.result])

    def check(self) -> None:
        self.buffer.append(0)
        received = self.received()
        if received is not None:
            assert received == b"hello"
        elif self.came:
            assert self.a.recv(9, socket.MSG_DONTWAIT) == b"hello"


class RecvAtOnce(Recv):
    async def prepare(self) -> None:
        self.meanwhile()


class FirstReceiveSome(Recv):
    def received(self) -> bytes | None:
        data: bytes | None = self.result
        return data

    async def prepare(self) -> None:
        self.stream = trio.SocketStream(self.uring(self.a))

    async def call(self) -> Any:
        return await self.stream.receive_some(9)


class ReceiveSome(FirstReceiveSome):
    async def prepare(self) -> None:
        await super().prepare()
        self.to_come.insert(0, b"first")
        assert await self.stream.receive_some(9) == b"first"
        self.came = 0


class View(FirstReceiveSome):
    """A buffer that is given back."""

    async def prepare(self) -> None:
        self.pool = lowlevel.BufferPool(4, 16)
        self.view: lowlevel.BufferView | None = None

    async def call(self) -> Any:
        async with lowlevel.recv_multishot(self.a, self.pool) as chunks:
            self.view = await chunks.next_view()
            self.result = b"hello"
            with self.view as data:
                assert data == self.result
        return self.result

    async def finish(self) -> None:
        if self.view is not None:
            self.view.release()
            assert self.pool.available == 4


class Letter(Scene):
    """One that has come is received, or still there."""

    async def prepare(self) -> None:
        self.mailbox = self.own(lowlevel.Mailbox())
        await self.mailbox.send("hello")

    async def call(self) -> Any:
        return await self.mailbox.__anext__()

    async def finish(self) -> None:
        if self.result is None:
            with trio.fail_after(5):
                await self.mailbox.receive()


class Contexts(Scene):
    """What is entered is left."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.buffer = bytearray(9)

    async def call(self) -> Any:
        with lowlevel.BufferPool(4, 16), lowlevel.RegisteredBuffer(self.buffer), lowlevel.Mailbox[int]():
            return True

    async def finish(self) -> None:
        self.buffer.append(0)


class Batch(Recv):
    async def call(self) -> Any:
        batch = lowlevel.batch()
        batch.add(lowlevel.nop)
        batch.add(lowlevel.recv, self.a, self.buffer)
        _, received = await batch.run()
        return received if isinstance(received, int) else None


class Send(Scene):
    """There is room when the run sleeps."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.a, self.b = self.sockets()
        self.buffer = bytearray(b"hello")
        self.before = fill(lambda: self.a.send(bytes(4096), socket.MSG_DONTWAIT))
        self.arrived = b""

    async def call(self) -> Any:
        return await lowlevel.send(self.a, self.buffer)

    def meanwhile(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.arrived += self.b.recv(1 << 20, socket.MSG_DONTWAIT)

    def check(self) -> None:
        self.buffer.append(0)
        self.meanwhile()
        assert self.arrived[self.before :] == b"hello"[: self.result or 0]


class SendAll(Send):
    async def prepare(self) -> None:
        self.stream = trio.SocketStream(self.uring(self.a))

    async def call(self) -> Any:
        await self.stream.send_all(self.buffer)
        return 5


# Connections


class Accept(Scene):
    """Somebody connects when the run sleeps."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.listener = self.own(socket.create_server(("127.0.0.1", 0)))
        self.client = self.own(socket.socket())
        self.connected = False

    async def prepare(self) -> None:
        self.ours = self.uring(self.listener)

    async def call(self) -> Any:
        sock, address = await self.ours.accept()
        assert address == self.client.getsockname()
        return self.own(sock)

    def meanwhile(self) -> None:
        if not self.connected:
            self.client.connect(self.listener.getsockname())
            self.connected = True

    def check(self) -> None:
        if self.connected and self.result is None:
            self.listener.setblocking(False)
            self.listener.accept()[0].close()


class AcceptAhead(Accept):
    """It closes what it has accepted and nobody has taken."""

    async def call(self) -> Any:
        async with trio_uring.AcceptAhead(trio.SocketListener(self.ours)) as listener:
            self.result = self.own((await listener.accept()).socket)
            return self.result

    def check(self) -> None:
        if self.connected and self.result is None:
            self.client.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                self.listener.close()
                assert self.client.recv(1) == b""


class Connect(Accept):
    async def prepare(self) -> None:
        self.ours = self.uring(self.client)

    async def call(self) -> Any:
        await self.ours.connect(self.listener.getsockname())
        return True

    def meanwhile(self) -> None:
        pass

    def check(self) -> None:
        if self.result:
            self.listener.setblocking(False)
            sock, address = self.listener.accept()
            sock.close()
            assert address == self.client.getsockname()


class Sockets(Scene):
    """Those that are made at once."""

    async def call(self) -> Any:
        for sock in (*trio_uring.socket.socketpair(), trio_uring.socket.socket()):
            self.own(sock)
        return True


class Listeners(Scene):
    async def call(self) -> Any:
        for listener in await trio_uring.open_tcp_listeners(0, host="127.0.0.1"):
            self.own(listener.socket)
        return True


# Closing


class Close(Scene):
    """What another task waits for."""

    others = 1

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.a, self.b = self.sockets()
        self.heard: BaseException | int = 0
        self.left_open: int | None = None

    async def _wait(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                self.heard = await lowlevel.recv(self.fd, bytearray(9))
            except trio.ClosedResourceError as exc:
                self.heard = exc

    async def prepare(self) -> None:
        self.fd = self.a.fileno()
        self.ours = self.uring(self.a)
        trio.lowlevel.spawn_system_task(self._wait)
        await trio.testing.wait_all_tasks_blocked()

    async def call(self) -> Any:
        self.ours.close()
        return True

    def meanwhile(self) -> None:
        self.b.send(b"x")  # for who still waits

    async def finish(self) -> None:
        self.ours.close()

    def check(self) -> None:
        assert isinstance(self.heard, trio.ClosedResourceError)


class Exit(Close):
    async def call(self) -> Any:
        with self.ours:
            pass
        return True


class Detach(Close):
    async def call(self) -> Any:
        self.left_open = self.ours.detach()
        return True

    def check(self) -> None:
        super().check()
        if self.left_open is not None:
            os.close(self.left_open)


class NotifyClosing(Close):
    async def call(self) -> Any:
        lowlevel.notify_closing(self.ours)
        return True


# Files


class OpenReadClose(Scene):
    async def prepare(self) -> None:
        self.path = self.file()

    async def call(self) -> Any:
        async with await trio_uring.open_file(self.path, "rb") as file:
            return await file.read()

    def check(self) -> None:
        assert self.result in (None, b"hello")


class OfAnyio(OpenReadClose):
    async def call(self) -> Any:
        async with await trio_uring.anyio.FileReadStream.from_path(self.path) as stream:
            return await stream.receive()


class InChains(OpenReadClose):
    async def call(self) -> Any:
        chains = lowlevel.chains()
        chains.add(lowlevel.openat, [(self.path, os.O_RDONLY)] * 2)
        chains.add(lowlevel.nop, [()] * 2)
        for fd in (await chains.run())[0]:
            os.close(fd)
        return b"hello"


class ReadBytes(OpenReadClose):
    async def call(self) -> Any:
        return await trio_uring.Path(self.path).read_bytes()


class BatchInParts(OpenReadClose):
    """What the first ones have opened is not lost."""

    config = RingConfig(mode="require", max_in_flight=4)

    async def call(self) -> Any:
        batch = lowlevel.batch()
        batch.extend(lowlevel.openat, [(self.path, os.O_RDONLY)] * 3)
        for fd in await batch.run():
            if isinstance(fd, int):
                os.close(fd)
        return b"hello"


class Write(Scene):
    """More than a pipe has room for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.read_end, self.write_end = os.pipe()
        self._stack.callback(os.close, self.read_end)
        os.set_blocking(self.read_end, False)
        fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 4096)
        self.data = os.urandom(10000)
        self.arrived = b""

    async def prepare(self) -> None:
        self.writer = await trio_uring.open_file(self.write_end, "wb", 1024)

    async def call(self) -> Any:
        return await self.writer.write(self.data)

    def meanwhile(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.read_end, 4096):
                self.arrived += data

    async def finish(self) -> None:
        await self.writer.aclose()

    def check(self) -> None:
        self.meanwhile()
        assert self.arrived == (b"" if self.result is None else self.data)


# The test


def _run_stock(async_fn: Callable[..., Awaitable[object]], config: RingConfig) -> None:
    trio.run(async_fn)


RUNS: dict[str, Callable[..., object]] = {"native": run_native, "attached": run_attached, "mounting": _run_stock}

Plays = list[tuple[str, type[Scene]]]

_HOT: list[type[Scene]] = [Recv, ReceiveSome, SendAll]
_ON_BOTH: list[type[Scene]] = [Send, Accept, Connect, OpenReadClose, ReadBytes, Batch, Close]
_ON_ONE: list[type[Scene]] = [
    *(RecvAtOnce, FirstReceiveSome, View, AcceptAhead, Sockets, Listeners, Exit, Detach, NotifyClosing),
    *(OfAnyio, InChains, BatchInParts, Write, Letter, Contexts),
]

HOTTEST: Plays = [*itertools.product(["native"], _HOT)]
OTHERS: Plays = [
    *itertools.product(["attached"], _HOT),
    *itertools.product(["native", "attached"], _ON_BOTH),
    *itertools.product(["native"], _ON_ONE),
    *itertools.product(["mounting"], [Recv, ReadBytes]),
]


def ids(plays: Plays) -> list[str]:
    return [f"{scene.__name__}-{mount}" for mount, scene in plays]


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _play(mount: str, scene: Scene, n: int) -> Instructions:
    instructions = Instructions(n)

    async def main() -> None:
        trio.lowlevel.add_instrument(Meanwhile(scene.meanwhile))
        await trio.testing.wait_all_tasks_blocked()  # trio's own tasks have begun
        await scene.prepare()
        try:
            with instructions:
                scene.result = await scene.call()
            await trio.lowlevel.checkpoint()
        finally:
            await scene.finish()
            with contextlib.suppress(UnavailableError):  # interrupted before there was a ring
                assert statistics().in_flight <= scene.others

    try:
        RUNS[mount](main, config=scene.config)
    except KeyboardInterrupt:
        assert instructions.seen >= n > 0
    else:
        assert n == 0 or instructions.seen < n, "the interrupt is lost"
        assert scene.result is not None
    scene.check()
    return instructions


def _interrupted_at(mount: str, scene_type: type[Scene], directory: Path, n: int) -> Instructions:
    """Interrupted before the n-th instruction, if there are so many; not at all if n is 0."""
    before = _open_fds()
    scene = scene_type(directory)
    try:
        instructions = _play(mount, scene, n)
    finally:
        scene.close()
    if _open_fds() != before:
        gc.collect()  # a socket that nobody has closed warns
        assert _open_fds() == before
    return instructions


@pytest.mark.parametrize(("mount", "scene"), HOTTEST, ids=ids(HOTTEST))
def test_at_each(mount: str, scene: type[Scene], tmp_path: Path) -> None:
    n = 1
    while _interrupted_at(mount, scene, tmp_path, n).seen >= n:
        n += 1
    assert n > 20


@pytest.mark.parametrize(("mount", "scene"), OTHERS, ids=ids(OTHERS))
def test_on_each_line(mount: str, scene: type[Scene], tmp_path: Path) -> None:
    undisturbed = _interrupted_at(mount, scene, tmp_path, 0)
    assert undisturbed.seen > 20
    for n in undisturbed.marks.values():
        _interrupted_at(mount, scene, tmp_path, n)
