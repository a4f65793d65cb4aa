"""The end of a run, also a bad one: everything is cancelled and drained, then freed; what comes later is harmless."""

from __future__ import annotations

import gc
import os
import queue
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.helpers import (
    Host,
    Mount,
    crash,
    drain,
    give_way,
    in_kernel_worker,
    manager,
    manager_or_none,
    only_trio_complains,
    run_native,
    run_to_a_crash,
)
from trio_uring import RingError, _core, _file_ops, _ops, lowlevel
from trio_uring._cancel import Operation
from trio_uring._core import UringIOManager
from trio_uring.socket import from_stdlib_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

POISON = 0xA5
FAILS_THE_RUN = pytest.mark.native(
    "beside trio's own manager it fails those who wait, and not the run; see test_attached"
)


class Wreck:
    """Operations of many kinds in flight, in tasks that nobody waits for; what they leave behind is looked at later."""

    def __init__(self, bench: Bench) -> None:
        self.buffers: list[bytearray] = []
        self.silent: list[tuple[int, int]] = []
        self._bench = bench

    def buffer(self) -> bytearray:
        self.buffers.append(bytearray(4096))
        return self.buffers[-1]

    def pipe(self) -> int:
        self.silent.append(self._bench.pipe())
        return self.silent[-1][0]

    def _socket(self) -> socket.socket:
        a, b = self._bench.sockets()
        self.silent.append((a.fileno(), b.fileno()))
        return a

    def start(self, call: Callable[..., Awaitable[object]], *args: object) -> trio.lowlevel.Task:
        return trio.lowlevel.spawn_system_task(call, *args)

    async def float(self) -> None:
        bench, monkeypatch = self._bench, pytest.MonkeyPatch()
        try:
            for name in ("READ", "OPENAT"):
                monkeypatch.setattr(_file_ops, name, in_kernel_worker(getattr(_file_ops, name)))
            # What blocks there, not what a worker turns into a poll: a cancel at that moment is lost in the kernel.
            for _ in range(4):
                self.start(lowlevel.openat, bench.fifo(), os.O_RDONLY)
                self.start(lowlevel.read, bench.file(os.urandom(4096)), self.buffer())
            await trio.testing.wait_all_tasks_blocked()
        finally:
            monkeypatch.undo()
        for _ in range(4):
            for _ in range(2):
                self.start(lowlevel.read, self.pipe(), self.buffer())
            self.start(lowlevel.readv, self.pipe(), [self.buffer(), self.buffer()])
            self.start(lowlevel.recv, self._socket(), self.buffer())
            self.start(lowlevel.recvmsg, self._socket(), 4096, 4096)
            self.start(trio.lowlevel.wait_readable, self._socket())
        full, _, _ = bench.full_socket()
        self.start(lowlevel.send, full, self.buffer())
        self.start(lowlevel.accept, bench.listener())
        self.start(lowlevel.connect, bench.new_socket(), bench.deaf_listener().getsockname())
        self.start(lowlevel.timeout, 1e6)
        self.start(trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        for path in (bench.path(os.urandom(4096)), "/"):  # in a worker when the end comes
            self.start(lowlevel.statx, path)
        self.start(lowlevel.fsync, bench.file(b"x"))
        await trio.lowlevel.checkpoint()

    def inspect(self) -> None:
        """The kernel has let go of everything."""
        for buffer in self.buffers:
            buffer[:] = [POISON] * len(buffer)
            buffer.append(POISON)  # not pinned
        for _, write_end in self.silent:
            os.write(write_end, b"hello")
        for read_end, _ in self.silent:
            assert drain(read_end, 5) == b"hello"
        for buffer in self.buffers:
            assert set(buffer) == {POISON}


def test_a_crash_with_operations_in_flight(mount: Mount, bench: Bench) -> None:
    for _ in range(5):
        wreck = Wreck(bench)

        async def main(wreck: Wreck = wreck) -> None:
            await wreck.float()
            await crash()

        run_to_a_crash(mount, main)
        wreck.inspect()


def test_main_returns_before_the_system_tasks(mount: Mount, bench: Bench) -> None:
    wreck = Wreck(bench)
    mount.run(wreck.float)
    wreck.inspect()


def test_late_calls_are_harmless(mount: Mount, bench: Bench) -> None:
    """Aborts, closes and wake-ups that come after the end of the run."""
    wreck = Wreck(bench)
    late: list[UringIOManager] = []
    operations: list[Operation] = []

    async def main() -> None:
        await wreck.float()
        late.append(manager())
        operations.extend(manager()._operations())
        await crash()

    run_to_a_crash(mount, main)
    assert len(operations) > 10
    for operation in operations:
        assert operation.abort(lambda: pytest.fail("nobody is there to be cancelled")) is trio.lowlevel.Abort.FAILED
    for fd, _ in wreck.silent:
        late[0].notify_closing(fd)
    late[0].close()
    with pytest.raises(RingError, match="closed"):
        late[0].get_events(0)
    wreck.inspect()


def test_a_late_wakeup_writes_to_nobody(mount: Mount, bench: Bench) -> None:
    """The number of the eventfd may be somebody else's by then."""
    late: list[UringIOManager] = []

    async def main() -> None:
        late.append(manager())

    mount.run(main)
    pipes = [bench.pipe() for _ in range(50)]
    try:
        late[0].force_wakeup()
    except (OSError, RingError):
        pass
    for read_end, _ in pipes:
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)


@FAILS_THE_RUN
def test_results_nobody_can_take_are_disposed_of(mount: Mount, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run crashes when connections and files have arrived, before their tasks run: no fd stays open."""
    listener = bench.listener()
    a, b = bench.sockets()
    process_events = UringIOManager.process_events
    armed: list[bool] = []

    def process_and_crash(self: UringIOManager, events: list[int]) -> None:
        process_events(self, events)
        if armed and events:
            armed.clear()
            raise RuntimeError("after the fact")

    monkeypatch.setattr(UringIOManager, "process_events", process_and_crash)

    async def main() -> None:
        wreck = Wreck(bench)
        wreck.start(lowlevel.accept, listener)
        wreck.start(lowlevel.recvmsg, b, 9, socket.CMSG_SPACE(4))
        await trio.testing.wait_all_tasks_blocked()
        bench.new_socket().connect(listener.getsockname())
        a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bench.file().to_bytes(4, "little"))])
        wreck.start(lowlevel.openat, bench.path(), os.O_RDONLY)
        wreck.start(lowlevel.socket)
        armed.append(True)
        await trio.sleep_forever()

    with only_trio_complains():
        with pytest.raises(trio.TrioInternalError) as raised:
            mount.run(main)
        assert str(raised.value.__cause__) == "after the fact"
        del raised


@FAILS_THE_RUN
def test_the_rest_of_a_tick_is_processed_when_one_fails(
    mount: Mount, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processing of one completion fails; the fds that came with it in the same tick are closed."""
    complete = Operation.complete
    monkeypatch.setattr(_core, "DRAIN_SECONDS", 0.1)
    kept: list[Operation] = []
    monkeypatch.setattr(_core, "_kept_for_ever", kept)

    def fail_for_nops(self: Operation, token: int, res: int, flags: int) -> None:
        if self.kind.name == "nop":
            raise RuntimeError("in the middle")
        complete(self, token, res, flags)

    monkeypatch.setattr(Operation, "complete", fail_for_nops)
    monkeypatch.setattr(_ops, "NOP", replace(_ops.NOP, staged=id))  # its CQE is none for C

    async def main() -> None:
        wreck = Wreck(bench)
        for _ in range(3):
            wreck.start(lowlevel.openat, bench.path(), os.O_RDONLY)
        wreck.start(lowlevel.nop)
        for _ in range(3):
            wreck.start(lowlevel.openat, bench.path(), os.O_RDONLY)
        await trio.sleep_forever()

    def run() -> None:
        try:
            mount.run(main)
        except trio.TrioInternalError as exc:
            if str(exc.__cause__) != "in the middle":
                raise

    with only_trio_complains(), pytest.warns(ResourceWarning, match="1 operations the kernel did not give back"):
        run()
    assert [operation.kind.name for operation in kept] == ["nop"]


@FAILS_THE_RUN
@pytest.mark.parametrize("method", ["process_events", "get_events"])
def test_a_failing_manager_ends_the_run(
    mount: Mount, bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(UringIOManager, method)
    armed: list[bool] = []

    def fail(self: UringIOManager, argument: Any) -> Any:
        result = original(self, argument) if method == "process_events" else None
        if armed:
            armed.clear()
            raise RuntimeError("a bug")
        return original(self, argument) if method == "get_events" else result

    monkeypatch.setattr(UringIOManager, method, fail)
    wreck = Wreck(bench)

    async def main() -> None:
        await wreck.float()
        armed.append(True)
        await trio.sleep_forever()

    with only_trio_complains():
        try:
            mount.run(main)
        except trio.TrioInternalError as exc:
            assert str(exc.__cause__) == "a bug"  # noqa: PT017
        except RuntimeError as exc:  # trio.run calls get_events outside of what it guards
            assert (str(exc), method, mount.name != "guest") == ("a bug", "get_events", True)  # noqa: PT017
    wreck.inspect()


def test_what_cannot_be_drained_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better memory that is never freed than memory that is freed too early."""
    kept: list[Operation] = []
    monkeypatch.setattr(_core, "_kept_for_ever", kept)
    monkeypatch.setattr(_core, "DRAIN_SECONDS", 0)
    read_end, _ = bench.pipe()
    buffer = bytearray(10)

    async def main() -> None:
        trio.lowlevel.spawn_system_task(lowlevel.read, read_end, buffer)
        await trio.testing.wait_all_tasks_blocked()
        await crash()

    with pytest.warns(ResourceWarning, match="operations the kernel did not give back"):
        run_to_a_crash(Mount("native", run_native), main)
    assert "read" in [operation.kind.name for operation in kept]
    with pytest.raises(BufferError):
        buffer.append(0)
    kept.clear()
    gc.collect()
    buffer.append(0)


def _abandon(async_fn: Callable[..., Awaitable[object]], steps: int) -> UringIOManager:
    """A guest run whose host goes away after some steps, or when there is nothing more to do."""
    host = Host()
    host.start(async_fn)
    for _ in range(steps):
        try:
            host.todo.get(timeout=0.05)()
        except queue.Empty:
            if manager()._worker_waits:  # it may as well not have come to that yet
                break
    return manager()


def _collect_all(until: Callable[[], bool]) -> None:
    """Collects garbage until that has had its effect: a worker thread may be about to let go of the run."""
    for _ in range(3000):
        if until():
            return
        gc.collect()
        give_way()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 100])
def test_an_abandoned_guest_run(bench: Bench, steps: int) -> None:
    """Its host forgets it; the garbage collector tears it down."""
    wreck = Wreck(bench)

    async def main() -> None:
        await wreck.float()
        await trio.sleep_forever()

    with only_trio_complains():
        _abandon(main, steps).force_wakeup()  # a worker that sleeps would keep the run alive
        _collect_all(lambda: manager_or_none() is None)
    wreck.inspect()


def test_an_abandoned_guest_run_with_results(bench: Bench) -> None:
    """What the kernel has done for it by then is disposed of, whether it was reaped or not."""
    listener = bench.listener()

    async def open_file() -> None:
        bench.keep(await lowlevel.openat(bench.path(), os.O_RDONLY))

    async def accept() -> None:
        bench.keep((await lowlevel.accept(listener))[0])

    async def main() -> None:
        for _ in range(3):
            trio.lowlevel.spawn_system_task(open_file)
        trio.lowlevel.spawn_system_task(accept)
        bench.new_socket().connect(listener.getsockname())
        await trio.sleep_forever()

    for steps in range(10):
        with only_trio_complains():
            _abandon(main, steps).force_wakeup()
            _collect_all(lambda: manager_or_none() is None)


def test_abandoned_with_its_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the ring is gone: nobody can drain it, so the memory is kept, with a warning."""
    kept: list[Operation] = []
    monkeypatch.setattr(_core, "_kept_for_ever", kept)
    read_end, _ = bench.pipe()

    async def main() -> None:
        trio.lowlevel.spawn_system_task(lowlevel.read, read_end, bytearray(10))
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep_forever()

    def start() -> None:
        wakeups.append(_abandon(main, 100).force_wakeup)

    wakeups: list[Callable[[], None]] = []
    for _ in range(5):
        with only_trio_complains(), pytest.warns(ResourceWarning, match="did not give back"):  # noqa: PT031
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
            wakeups.pop()()
            _collect_all(lambda: bool(kept))
        assert "read" in [operation.kind.name for operation in kept]
        kept.clear()


def test_a_task_that_is_gone(mount: Mount, bench: Bench) -> None:
    """Its coroutine was closed while it waited: what arrives for it is disposed of."""
    listener = bench.listener()
    a, b = bench.sockets()

    async def main() -> None:
        wreck = Wreck(bench)
        tasks = [
            wreck.start(lowlevel.accept, listener),
            wreck.start(lowlevel.read, wreck.pipe(), wreck.buffer()),
            wreck.start(from_stdlib_socket(a).recv, 9),
        ]
        await trio.testing.wait_all_tasks_blocked()
        for task in tasks:
            task.coro.close()
        b.send(b"hello")
        bench.new_socket().connect(listener.getsockname())
        await trio.testing.wait_all_tasks_blocked()
        wreck.inspect()
        await crash()

    run_to_a_crash(mount, main)


def test_a_task_that_is_gone_before_it_runs(mount: Mount, bench: Bench) -> None:
    """Its operation was only staged, or had its result already."""

    async def main() -> None:
        fd = bench.file(b"hello")
        buffer = bytearray(9)

        def start() -> Any:
            coroutine = lowlevel.read(fd, buffer)
            assert coroutine.send(None) is not None  # staged
            return coroutine

        for _ in range(3):
            start().close()
            buffer.append(0)
        await trio.testing.wait_all_tasks_blocked()
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        await lowlevel.nop()

    mount.run(main)


def test_outcomes_of_dead_runs_are_no_cycles(mount: Mount, bench: Bench) -> None:
    """An operation that ends in an exception leaves nothing to the garbage collector."""
    a, _ = bench.sockets()

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await lowlevel.recv(a, bytearray(9))

    async def failed() -> None:
        try:
            await lowlevel.read(-1, bytearray(9))
        except OSError:
            pass

    async def closed() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_closed, a)
            await trio.testing.wait_all_tasks_blocked()
            lowlevel.notify_closing(a)

    async def main() -> dict[str, list[Any]]:
        garbage: dict[str, list[Any]] = {}
        for call in (cancelled, failed, closed):
            await call()
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                await call()
                gc.collect()
                garbage[call.__name__] = [thing for thing in gc.garbage if isinstance(thing, BaseException)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
        return garbage

    assert mount.run(main) == {"cancelled": [], "failed": [], "closed": []}


async def _expect_closed(sock: socket.socket) -> None:
    try:
        await lowlevel.recv(sock, bytearray(9))
    except trio.ClosedResourceError:
        pass


def test_outcome_is_what_trio_expects() -> None:
    """A wake-up with an error is raised in the task."""

    async def main() -> None:
        task = trio.lowlevel.current_task()
        async with trio.open_nursery() as nursery:

            async def wake() -> None:
                manager().wake(task, outcome.Error(KeyError(5)))

            nursery.start_soon(wake)
            with pytest.raises(KeyError):
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    run_native(main)
