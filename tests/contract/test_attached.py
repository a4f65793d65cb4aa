"""A ring that is mounted by the first call, in a run that was started without one."""

from __future__ import annotations

import asyncio
import errno
import os
import pathlib
import resource
import select
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import (
    Attempt,
    Host,
    Mount,
    attached_first,
    in_child,
    interrupted_at_line,
    manager,
    manager_or_none,
    parked,
    run_attached,
    run_attached_guest,
    run_native,
    spin_until,
)
from trio_uring import (
    RingConfig,
    RingError,
    UnavailableError,
    UringStatistics,
    _core,
    _trio_internals,
    lowlevel,
    statistics,
)
from trio_uring._attached import _QUIET_TICKS, AttachedManager
from trio_uring._ring import Ring
from trio_uring.lowlevel import BufferPool, Mailbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.helpers import Bench

BESIDE = [Mount("attached", run_attached, native=False), Mount("attached-guest", run_attached_guest, native=False)]


@pytest.fixture(params=BESIDE, ids=lambda mount: mount.name)
def mount(request: pytest.FixtureRequest) -> Mount:
    """These are about what is beside trio's own manager."""
    found: Mount = request.param
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    return path


# The first call


async def _open_file(path: Path) -> object:
    async with await trio_uring.open_file(path) as opened:
        return await opened.read()


async def _read(path: Path) -> object:
    with open(path, "rb") as opened:
        return await lowlevel.read(opened, bytearray(9))


async def _batch(path: Path) -> object:
    batch = lowlevel.batch()
    batch.add(lowlevel.nop)
    return await batch.run()


async def _buffers(path: Path) -> object:
    with BufferPool(4, 16), lowlevel.RegisteredBuffer(bytearray(9)), Mailbox[int]():
        return True


async def _listen(path: Path) -> object:
    (listener,) = await trio_uring.open_tcp_listeners(0, host="127.0.0.1")
    await listener.aclose()
    return True


async def _ticks(path: Path) -> object:
    async with lowlevel.timeout_multishot(0.001) as ticks:
        return await ticks.__anext__()


FIRST_CALLS: dict[str, Callable[[Path], Awaitable[object]]] = {
    "open_file": _open_file,
    "Path.exists": lambda path: trio_uring.Path(path).exists(),
    "Path.read_bytes": lambda path: trio_uring.Path(path).read_bytes(),
    "read_file": trio_uring.read_file,
    "read": _read,
    "nop": lambda path: lowlevel.nop(),
    "batch": _batch,
    "buffers": _buffers,
    "listen": _listen,
    "ticks": _ticks,
}


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_it_needs_no_set_up(first: str, file: Path) -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError, match="no ring, at least not yet"):
            statistics()
        for _ in range(2):
            result = await FIRST_CALLS[first](file)
            assert result is None if first == "nop" else result
            assert isinstance(statistics(), UringStatistics)
            mounted.append(manager())
        assert not isinstance(trio.lowlevel.current_statistics().io_statistics, UringStatistics)

    mounted: list[Any] = []
    trio.run(main)
    assert mounted[0] is mounted[1]
    assert isinstance(mounted[0], AttachedManager)
    assert mounted[0].closed


@pytest.mark.trio
async def test_in_a_test_of_pytest_trio(file: Path) -> None:
    assert await trio_uring.Path(file).read_text() == "hello"
    assert isinstance(manager(), AttachedManager)


def test_on_anyio(file: Path) -> None:
    async def main() -> None:
        assert await trio_uring.Path(file).read_text() == "hello"
        with anyio.move_on_after(0.01) as scope:
            await lowlevel.timeout(1e6)
        assert scope.cancelled_caught

    anyio.run(main, backend="trio")


def test_as_a_guest_of_asyncio(bench: Bench) -> None:
    a, b = bench.sockets()

    async def guest() -> bytes:
        buffer = bytearray(9)
        return bytes(buffer[: await lowlevel.recv(a, buffer)])

    async def host() -> bytes:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=done.set_result
        )
        for _ in range(5):
            await asyncio.sleep(0.001)
        b.send(b"hello")
        result: bytes = (await done).unwrap()
        return result

    assert asyncio.run(host()) == b"hello"


def test_each_thread_its_own(file: Path) -> None:
    async def inner() -> AttachedManager:
        assert await trio_uring.read_file(file) == b"hello"
        found = manager()
        assert isinstance(found, AttachedManager)
        return found

    async def main() -> None:
        mine = await inner()
        assert await trio.to_thread.run_sync(trio.run, inner) is not mine
        assert await trio.to_thread.run_sync(trio.from_thread.run, inner) is mine
        assert await trio.to_thread.run_sync(manager_or_none) is None

    trio.run(main)


def test_a_run_that_wants_none() -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError, match="switched off"):
            await lowlevel.nop()
        assert manager_or_none() is None

    trio_uring.run(main, config=RingConfig(mode="off"))


def test_where_there_can_be_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: RingConfig) -> None:
        raise UnavailableError(errno.EPERM, "somebody forbids it")

    monkeypatch.setattr("trio_uring._core.Ring", refuse)

    async def main() -> None:
        with pytest.raises(UnavailableError, match=r"nop needs a ring, .* can have none: somebody forbids it"):
            await lowlevel.nop()
        if os.environ.get("TRIO_URING"):
            with pytest.raises(UnavailableError, match="somebody forbids it"):
                await trio_uring.Path(file).exists()
        else:
            assert await trio_uring.Path(file).is_mount() is False
        assert manager_or_none() is None

    trio.run(main)
    monkeypatch.setenv("TRIO_URING", "require")
    trio.run(main)


def test_not_outside_of_a_task() -> None:
    with pytest.raises(RuntimeError, match="async context"):
        lowlevel.batch()
    with pytest.raises(RuntimeError, match="async context"):
        lowlevel.notify_closing(0)


# While nothing is under way


async def _fall_quiet() -> None:
    while manager()._hooked:  # type: ignore[attr-defined]
        await trio.lowlevel.checkpoint()


def test_the_hooks_go_and_come_back(mount: Mount, bench: Bench) -> None:
    a, b = bench.sockets()

    async def main() -> None:
        for _ in range(3):
            await _fall_quiet()
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
                for _ in range(3 * _QUIET_TICKS):
                    await trio.lowlevel.checkpoint()
                assert manager()._hooked  # type: ignore[attr-defined]
                b.send(b"hello")
                assert await attempt.result() == 5

    mount.run(main)


def test_a_message_to_a_quiet_run(mount: Mount) -> None:
    made: list[Mailbox[int]] = []
    quiet = threading.Event()

    def send() -> None:
        quiet.wait()
        trio.run(made[0].send, 7)

    async def main() -> None:
        with Mailbox[int]() as mailbox:
            made.append(mailbox)
            await _fall_quiet()
            quiet.set()
            assert await mailbox.receive() == 7

    thread = threading.Thread(target=send)
    thread.start()
    mount.run(main)
    thread.join()


# The end of a run


def test_a_system_task_that_goes_on(mount: Mount, bench: Bench) -> None:
    a, b = bench.sockets()
    got: list[int] = []

    async def service() -> None:
        with trio.CancelScope(shield=True):
            for _ in range(3):
                got.append(await lowlevel.recv(a, bytearray(9)))
                b.send(b"again")
            await lowlevel.timeout(0.02)
            with pytest.raises(trio.BrokenResourceError):  # something of epoll's, too
                await trio.SocketStream(trio.socket.from_stdlib_socket(bench.new_socket())).send_all(b"x")

    async def main() -> None:
        trio.lowlevel.spawn_system_task(service)
        await trio.testing.wait_all_tasks_blocked()
        b.send(b"first")

    mount.run(main)
    assert got == [5, 5, 5]


@pytest.mark.parametrize("before", [True, False])
def test_an_asynchronous_generator_at_the_end(before: bool, file: Path) -> None:
    done: list[bytes] = []

    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                done.append(await trio_uring.read_file(file))
                await lowlevel.timeout(0.01)
                done.append(await trio_uring.read_file(file))

    async def main() -> None:
        if before:
            await lowlevel.nop()
        keep.append(generator())
        await anext(keep[0])

    keep: list[Any] = []
    trio.run(main)
    assert done == [b"hello", b"hello"]


# Many runs


def _memory() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("[io_uring]" in line for line in maps)


ROOT = pathlib.Path(__file__).parents[2]
RUNS = """
import os, sys, threading, trio, trio_uring
from tests.contract.test_attached import _mappings, _memory
from trio_uring import _core, lowlevel

threads, file = int(sys.argv[1]), sys.argv[2]

async def main():
    with trio.move_on_after(0):
        await lowlevel.timeout(1e6)
    assert await trio_uring.read_file(file) == b"hello"

def some_runs(times):
    for _ in range(times):
        trio.run(main)

def all_runs(times):
    workers = [threading.Thread(target=some_runs, args=(times // threads,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

all_runs(1000)
before, fds = _memory(), len(os.listdir("/proc/self/fd"))
all_runs(4000)
assert len(os.listdir("/proc/self/fd")) == fds
assert _memory() - before < 8 << 20, _memory() - before  # 2 KiB a run; the allocator keeps some for each thread
assert _mappings() == 0
assert len(_core._open_managers) == 0
"""


@pytest.mark.seconds(120)
@pytest.mark.parametrize("threads", [1, 8])
def test_runs_that_come_and_go(threads: int, file: Path) -> None:
    """In a process of their own, in which nothing else takes memory."""
    command = [sys.executable, "-c", RUNS, str(threads), str(file)]
    subprocess.run(command, check=True, timeout=110, cwd=ROOT)


# A ring that fails


class Failure(Exception):
    """What a hook is made to raise."""


FAIL_IN = {
    "before": ("manager", "before_wait"),
    "after": ("manager", "after_wait"),
    "tick": ("ring", "tick"),
    "process": ("manager", "process_events"),
    "register": ("ring", "register_eventfd"),
}


@pytest.fixture(params=FAIL_IN)
def fail(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Makes the next thing a hook does fail."""
    where, name = FAIL_IN[request.param]
    owner: Any = AttachedManager if where == "manager" else Ring
    patch = pytest.MonkeyPatch()
    broken = False

    def start() -> None:
        nonlocal broken
        patch.setattr(owner, name, raise_failure)
        if where == "manager":
            manager().force_wakeup()  # something to process
        broken = True

    def raise_failure(self: object, *_: object) -> None:
        nonlocal broken
        patch.undo()
        broken = False
        raise Failure

    yield start
    patch.undo()
    assert not broken, "the hook has not come by"


async def _iterate(multishot: Any) -> None:
    async with multishot as results:
        await results.__anext__()


def test_whoever_waits_hears_of_it(mount: Mount, bench: Bench, fail: Callable[[], None]) -> None:
    buffers = [bytearray(9) for _ in range(4)]
    mailboxes: list[Mailbox[int]] = []

    async def main() -> None:
        read_end, _ = bench.pipe()
        sockets = [bench.sockets() for _ in range(3)]
        batch, chain = lowlevel.batch(), lowlevel.chain()
        batch.add(lowlevel.read, read_end, buffers[0])
        batch.add(lowlevel.nop)
        chain.add(lowlevel.read, read_end, buffers[1])
        chain.add(lowlevel.nop)
        mailboxes.append(Mailbox())
        async with trio.open_nursery() as nursery:
            attempts = [
                await parked(nursery, call, *args)
                for call, *args in (
                    (lowlevel.read, read_end, buffers[2]),
                    (lowlevel.recv, sockets[0][0], buffers[3]),
                    (lowlevel.timeout, 1e6),
                    (batch.run,),
                    (chain.run,),
                    (_iterate, lowlevel.recv_multishot(sockets[1][0])),
                    (_iterate, lowlevel.accept_multishot(bench.listener())),
                    (mailboxes[0].receive,),
                )
            ]
            fail()
            for attempt in attempts:
                await attempt.settled()
                assert isinstance(attempt.error, RingError)
                assert "ring of this run has failed: Failure()" in str(attempt.error)
        for make in (lowlevel.chain, lowlevel.batch, Mailbox[int]):
            with pytest.raises(RingError, match="has failed"):
                make()
        with pytest.raises(RingError, match="has failed"):
            await lowlevel.nop()
        with pytest.raises(RingError, match="has failed"):
            await mailboxes[0].receive()
        with pytest.raises(RingError, match="has failed"):
            await trio_uring.Path("/").exists()
        for buffer in buffers:  # the kernel may still write there
            with pytest.raises(BufferError):
                buffer.append(0)
        await trio.sleep(0.001)  # the run goes on
        await trio.to_thread.run_sync(bool)

    mount.run(main)
    for buffer in buffers:
        buffer.append(0)


def test_who_waits_for_a_turn_hears_of_it(mount: Mount, bench: Bench, fail: Callable[[], None]) -> None:
    """For a slot, alone and with others, or for a place in the table of files."""

    async def main() -> None:
        read_end, _ = bench.pipe()
        async with trio.open_nursery() as nursery:
            attempts: list[Attempt[Any]] = [
                await parked(nursery, lowlevel.read, read_end, bytearray(1)) for _ in range(6)
            ]
            for _ in range(2):
                batch = lowlevel.batch()
                batch.extend(lowlevel.read, [(read_end, bytearray(1))] * 2)
                attempts.append(await parked(nursery, batch.run))
            places = await manager().registered.borrow_places(manager().registered.max_direct)
            attempts.append(await parked(nursery, manager().registered.borrow_places, 1))
            assert statistics().waiting_for_slot == 2 + 2
            fail()
            for attempt in attempts:
                await attempt.settled()
                assert isinstance(attempt.error, RingError)
            assert places

    mount.run(main, config=RingConfig(mode="require", entries=4, max_in_flight=4))


def test_what_has_come_is_not_lost(mount: Mount, bench: Bench, fail: Callable[[], None]) -> None:
    """Its task has it, though it has not run yet."""
    a, b = bench.sockets()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
            waits = await parked(nursery, lowlevel.timeout, 1e6)
            b.send(b"hello")
            spin_until(manager().ring.pending)
            manager().process_events(manager().ring.tick(0))
            fail()
            assert await attempt.result() == 5
            await waits.settled()
            assert isinstance(waits.error, RingError)

    mount.run(main)


def test_leaving_what_has_failed(mount: Mount, bench: Bench, fail: Callable[[], None]) -> None:
    a, _ = bench.sockets()

    async def main() -> None:
        async with lowlevel.recv_multishot(a) as chunks:
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, chunks.__anext__)
                fail()
                await attempt.settled()
            for call in (chunks.__anext__, chunks.stop):
                with pytest.raises(RingError, match="has failed"):
                    await call()

    mount.run(main)


def test_a_ring_that_is_gone(mount: Mount, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can drain it: what the kernel may use stays."""
    kept: list[object] = []
    monkeypatch.setattr(_core, "_kept_for_ever", kept)
    monkeypatch.setattr(_core, "DRAIN_SECONDS", 0)
    read_end, _ = bench.pipe()
    buffer = bytearray(9)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, lowlevel.read, read_end, buffer)

            def tick(self: Ring, timeout: float) -> list[int]:
                raise RingError("the kernel dropped a completion")

            monkeypatch.setattr(Ring, "tick", tick)
            with pytest.raises(RingError, match="dropped a completion"):
                await attempt.result()

    with pytest.warns(ResourceWarning, match="1 operations the kernel did not give back"):
        mount.run(main)
    assert len(kept) == 1
    with pytest.raises(BufferError):
        buffer.append(0)


async def test_a_child_whose_epoll_is_not_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told at its next tick, and the parent goes on."""
    monkeypatch.setattr(_trio_internals, "take_epoll_away", lambda error: False)
    a, b = bench.sockets()

    def child() -> tuple[str, bool]:
        current: Any = manager()
        current._ticks.before_io_wait(1.0)
        return str(current.failure), bool(current._operations()[0].task)

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(9))
        failure, waits = in_child(child)
        assert "run of its own" in failure
        assert not waits
        b.send(b"hello")
        assert await attempt.result() == 5


def test_there_is_no_epoll_to_take_away() -> None:
    async def main() -> bool:
        return _trio_internals.take_epoll_away(RingError())

    assert run_native(main) is False
    assert _trio_internals.take_epoll_away(RingError()) is False


# Ctrl-C


@pytest.mark.parametrize("first", ["read", "batch", "Path.read_bytes", "open_file"])
def test_ctrl_c_at_each_line(first: str, file: Path) -> None:
    """Mounting, submitting, reaping: it is raised in the end, and nothing is left behind."""

    def interrupted(n: int) -> bool:
        lines = 0

        async def main() -> None:
            nonlocal lines
            with interrupted_at_line(n) as stop:
                try:
                    await FIRST_CALLS[first](file)
                    await trio.lowlevel.checkpoint()
                finally:
                    lines = stop()

        try:
            trio.run(main)
        except KeyboardInterrupt:
            return True
        finally:
            assert manager_or_none() is None
        assert lines < n
        return False

    n, step = 1, 1 if first == "read" else 3
    while interrupted(n):
        n += step
    assert n > 50


# Closing


def test_notify_closing_tells_both(mount: Mount, bench: Bench) -> None:
    a, b = bench.sockets()

    async def main() -> None:
        fd = a.detach()
        async with trio.open_nursery() as nursery:
            trios = await parked(nursery, trio.lowlevel.wait_readable, fd)
            ours = await parked(nursery, lowlevel.recv, fd, bytearray(1))
            await lowlevel.close(fd)
            for error in ((await trios.settled()).error, (await ours.settled()).error):
                assert isinstance(error, trio.ClosedResourceError)
        assert b.recv(1) == b""

    mount.run(main)


HOOKS = ("task_scheduled", "before_task_step", "after_task_step", "before_io_wait", "after_io_wait")


class InHook(trio.abc.Instrument):
    """Calls ``action`` in the next call of a hook, once it is armed."""

    armed = False

    def __init__(self, hook: str, action: Callable[[], object]) -> None:
        self._action = action
        setattr(self, hook, self._call)

    def _call(self, _: object) -> None:
        if self.armed:
            trio.lowlevel.remove_instrument(self)
            self._action()


@pytest.mark.parametrize("ours_comes_first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_close_in_a_hook(mount: Mount, bench: Bench, hook: str, ours_comes_first: bool) -> None:
    """Somebody else's Instrument is called before or after the one that submits and reaps."""
    a, b = bench.sockets()
    fd = a.detach()
    buffers = [bytearray(9), bytearray(9)]

    def close() -> None:
        lowlevel.notify_closing(fd)
        os.close(fd)
        at_once.append(b.recv(1))

    at_once: list[bytes] = []
    instrument = InHook(hook, close)

    async def main() -> None:
        if not ours_comes_first:
            await _fall_quiet()
            trio.lowlevel.add_instrument(instrument)
        async with trio.open_nursery() as nursery:
            attempts: list[Attempt[Any]] = [
                await parked(nursery, trio.lowlevel.wait_readable, fd),
                await parked(nursery, lowlevel.recv, fd, buffers[0]),
                await parked(nursery, lowlevel.read, fd, buffers[1]),
                await parked(nursery, lowlevel.poll, fd, select.POLLIN),
            ]
            if ours_comes_first:
                trio.lowlevel.add_instrument(instrument)
            instrument.armed = True
            await trio.sleep(0.001)
            for attempt in attempts:
                await attempt.settled()
                assert isinstance(attempt.error, trio.ClosedResourceError)
        for buffer in buffers:
            buffer.append(0)

    mount.run(main)
    assert at_once == [b""]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_close_that_trio_alone_hears_of_in_a_hook(mount: Mount, bench: Bench, hook: str) -> None:
    """The ring keeps the file open and the buffer pinned, and its task can be cancelled."""
    a, _ = bench.sockets()
    fd = a.detach()
    buffer = bytearray(9)

    def close() -> None:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)

    async def main() -> None:
        instrument = InHook(hook, close)
        trio.lowlevel.add_instrument(instrument)
        async with trio.open_nursery() as nursery:
            trios = await parked(nursery, trio.lowlevel.wait_readable, fd)
            ours = await parked(nursery, lowlevel.recv, fd, buffer)
            instrument.armed = True
            await trio.sleep(0.001)
            await trios.settled()
            assert isinstance(trios.error, trio.ClosedResourceError)
            await trio.testing.wait_all_tasks_blocked()
            assert not ours.done
            with pytest.raises(BufferError):
                buffer.append(0)
            assert await ours.cancel()
        buffer.append(0)

    mount.run(main)


def test_trio_does_not_know_who_waits_here(mount: Mount, bench: Bench) -> None:
    """Nor does it say who waits there: nobody is told to be in another's way, and each gets what comes for it."""
    a, b = bench.sockets()

    async def main() -> None:
        for ours_first in (True, False):
            async with trio.open_nursery() as nursery:
                waits = partial(parked, nursery, trio.lowlevel.wait_readable, a)
                receives = partial(parked, nursery, lowlevel.recv, a, bytearray(9))
                ours = await receives() if ours_first else None
                trios = await waits()
                ours = ours or await receives()
                b.send(b"hello")
                assert await ours.result() == 5
                b.send(b"x")
                await trios.result()
                assert a.recv(9) == b"x"

    mount.run(main)


# The host of a guest run


class Asleep:
    """A guest run beside whose epoll a ring waits, while a worker thread sleeps."""

    def __init__(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        self.scope = trio.CancelScope()
        self.error: Exception | None = None
        self._host = Host()
        self._host.start_stock(attached_first(partial(self._main, call, *args)))
        while not self._worker_sleeps():
            self._host.step()

    async def _main(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        try:
            with self.scope:
                await call(*args)
        except Exception as exc:
            self.error = exc

    def _worker_sleeps(self) -> bool:
        found = manager_or_none()
        return found is not None and found._worker_waits and bool(found._in_kernel()) and self._host.todo.empty()

    def finish(self) -> None:
        self._host.finish()


def test_a_cancel_by_the_host(bench: Bench) -> None:
    for call in (lowlevel.recv, lowlevel.read):
        run = Asleep(call, bench.sockets()[0], bytearray(9))
        run.scope.cancel()
        assert manager().ring.staged == 0
        run.finish()
        assert run.scope.cancelled_caught


def test_a_close_by_the_host(bench: Bench) -> None:
    a, b = bench.sockets()
    fd = a.detach()
    run = Asleep(lowlevel.recv, fd, bytearray(9))
    lowlevel.notify_closing(fd)
    os.close(fd)
    assert b.recv(1) == b""
    run.finish()
    assert isinstance(run.error, trio.ClosedResourceError)


def test_data_wakes_the_worker(bench: Bench) -> None:
    a, b = bench.sockets()
    run = Asleep(lowlevel.recv, a, bytearray(9))
    b.send(b"hello")
    run.finish()
    assert run.error is None


def test_a_fork_by_the_host(bench: Bench) -> None:
    """The child's cannot go on with the run; the parent's can."""
    a, b = bench.sockets()
    run = Asleep(lowlevel.recv, a, bytearray(9))
    for touch in (run.scope.cancel, partial(lowlevel.notify_closing, a)):
        with pytest.raises(RingError, match="run of its own"):
            in_child(touch)
    b.send(b"hello")
    run.finish()
    assert run.error is None


def test_an_eventfd_wakes_it_each_time(mount: Mount) -> None:
    """A completion that an eventfd causes is signalled late, and only once for each registration."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        rounds = 100
        asked = threading.Semaphore(0)

        def write() -> None:
            for _ in range(rounds):
                asked.acquire()
                os.eventfd_write(fd, 1)

        async def main() -> None:
            for _ in range(rounds):
                asked.release()
                assert await lowlevel.read(fd, bytearray(8)) == 8

        thread = threading.Thread(target=write)
        thread.start()
        mount.run(main)
        thread.join()
    finally:
        os.close(fd)


def test_an_attempt_in_a_cancelled_scope_submits_nothing(mount: Mount) -> None:
    async def main() -> None:
        before = statistics().sqes
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, lowlevel.nop)
            attempt.scope.cancel()
            await attempt.settled()
        assert attempt.cancelled
        assert statistics().sqes <= before + 1  # the ring's own wake-up

    mount.run(main)
