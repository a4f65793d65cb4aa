"""Multishot operations: each against the plain system call; what comes is delivered once, or left over, or closed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import itertools
import os
import re
import resource
import select
import signal
import socket
import time
import weakref
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import (
    AfterStep,
    Attempt,
    Host,
    crash,
    drain,
    fill,
    in_child,
    interrupted_at_line,
    manager,
    nothing_submitted,
    parked,
    run_to_a_crash,
    run_without_ring,
    spin_until,
)
from tests.unit.by_hand import no_garbage_collection
from trio_uring import RingError, UnavailableError, UnsupportedOperation, lowlevel, statistics
from trio_uring._errors import INTERRUPTED
from trio_uring._shots import Shots

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.helpers import Bench, Mount
    from trio_uring._multishot import Multishot

UNUSED_FD = 9999
WORDS = [b"one", b"two", b"three", b"four", b"five"]
RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


@dataclasses.dataclass
class Source:
    """Where the results of a multishot operation come from.

    Attributes:
        open: a new operation on it.
        feed: makes one result come, by plain system calls.
        read: what a result tells, to be compared; what it is made of is disposed of.
        oracle: the same as `read`, for what the plain system call returns.
        merges: results that nobody takes become one.
    """

    open: Callable[[], Multishot[Any]]
    feed: Callable[[], object]
    read: Callable[[Any], object]
    oracle: Callable[[], object]
    fd: int = -1
    merges: bool = False


def _words() -> Callable[[], bytes]:
    return itertools.cycle(WORDS).__next__


def _accepting(bench: Bench) -> Source:
    listener, word = bench.listener(), _words()

    def connect() -> None:
        client = bench.new_socket()
        client.connect(listener.getsockname())
        client.send(word())

    def read(fd: int) -> tuple[bytes, bool]:
        with socket.socket(fileno=fd) as sock:
            return sock.recv(9), sock.get_inheritable()

    return Source(
        lambda: lowlevel.accept_multishot(listener),
        connect,
        read,
        lambda: read(listener.accept()[0].detach()),
        listener.fileno(),
    )


def _receiving(bench: Bench) -> Source:
    a, b = bench.sockets(kind=socket.SOCK_SEQPACKET)
    word = _words()
    return Source(lambda: lowlevel.recv_multishot(a), lambda: b.send(word()), bytes, lambda: a.recv(9), a.fileno())


def _receiving_messages(bench: Bench) -> Source:
    a, b = bench.sockets(kind=socket.SOCK_DGRAM)
    b.bind(str(bench._new_path()))
    word = _words()

    def send() -> None:
        b.sendmsg([word()], [(*RIGHTS, b.fileno().to_bytes(4, "little"))])

    def read(message: tuple[bytes, Any, int, object]) -> object:
        data, ancdata, flags, address = message
        ((level, kind, fd),) = ancdata
        os.close(int.from_bytes(fd[:4], "little"))
        return data, level, kind, len(fd), flags & ~socket.MSG_CMSG_CLOEXEC, address

    size = socket.CMSG_SPACE(4)
    return Source(
        lambda: lowlevel.recvmsg_multishot(a, ancbufsize=size, flags=socket.MSG_CMSG_CLOEXEC),
        send,
        read,
        lambda: read(a.recvmsg(9, size)),
        a.fileno(),
    )


def _reading(bench: Bench) -> Source:
    read_end, write_end = bench.pipe(os.O_DIRECT)
    word = _words()
    return Source(
        lambda: lowlevel.read_multishot(read_end),
        lambda: os.write(write_end, word()),
        bytes,
        lambda: os.read(read_end, 9),
        read_end,
    )


def _polling(bench: Bench) -> Source:
    read_end, write_end = bench.pipe()
    poll = select.poll()
    poll.register(read_end, select.POLLIN)

    def oracle() -> int:
        ((_, events),) = poll.poll()
        return read(events)

    def read(events: int) -> int:
        os.read(read_end, 9)
        return events

    return Source(
        lambda: lowlevel.poll_multishot(read_end, select.POLLIN),
        lambda: os.write(write_end, b"x"),
        read,
        oracle,
        read_end,
        merges=True,
    )


def _ticking(bench: Bench) -> Source:
    ticks = 0.002
    return Source(
        lambda: lowlevel.timeout_multishot(ticks),
        lambda: None,
        lambda n: n > 0,
        lambda: not time.sleep(ticks),  # type: ignore[func-returns-value]
        merges=True,
    )


SOURCES: dict[str, Callable[[Bench], Source]] = {
    "accept_multishot": _accepting,
    "recv_multishot": _receiving,
    "recvmsg_multishot": _receiving_messages,
    "read_multishot": _reading,
    "poll_multishot": _polling,
    "timeout_multishot": _ticking,
}
EACH = pytest.mark.parametrize("name", lowlevel.MULTISHOT)
ON_FDS = pytest.mark.parametrize("name", sorted(lowlevel.MULTISHOT.keys() - {"timeout_multishot"}))
RECEIVES = ("recv_multishot", "recvmsg_multishot", "read_multishot")


def test_every_row_has_a_source() -> None:
    assert set(SOURCES) == set(lowlevel.MULTISHOT)


def states(name: str = "multishot") -> list[str]:
    """Of the multishot operations in flight."""
    return [op.state for op in statistics().operations if op.operation.endswith(name)]


def slots_in_use() -> int:
    return manager()._counted_slots - len(manager()._idle)


async def blocked() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def queued(shots: Multishot[Any], n: int = 1) -> None:
    """Waits until so much has come."""
    while len(shots._queue) < n:
        await lowlevel.timeout(0.001)


# What holds for each


@EACH
async def test_results_are_those_of_the_system_call(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    source.feed()
    expected = source.oracle()
    async with source.open() as shots:
        for _ in WORDS[1:]:  # the first was the oracle's
            source.feed()
            first = source.read(await anext(shots))
        assert not source.merges or first == expected
        for _ in WORDS:
            source.feed()
            item = source.read(await anext(shots))
            if type(expected) is type(item) and expected == item:
                break
        else:
            pytest.fail(f"{expected!r} was not among them")
    assert statistics().in_flight == slots_in_use() == 0
    assert shots.leftover == []


@EACH
async def test_one_submission_many_results(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    async with source.open() as shots:
        source.feed()
        source.read(await anext(shots))
        await blocked()
        before = [op.age for op in statistics().operations if op.operation == name]
        token = shots._shots.token if shots._shots else 0
        for _ in range(5):
            source.feed()
            source.read(await anext(shots))
        assert len(before) == 1
        assert shots._shots is not None
        assert shots._shots.token == token


@EACH
async def test_results_that_wait_come_in_order(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    expected = []
    async with source.open() as shots:
        source.feed()
        expected.append(source.read(await anext(shots)))
        for _ in range(4):
            source.feed()
        if source.merges:
            await queued(shots)
            source.read(await anext(shots))
            return
        await queued(shots, 4)
        expected += [source.read(await anext(shots)) for _ in range(4)]
        words = [each[0] if isinstance(each, tuple) else each for each in expected]
        assert words == WORDS


@EACH
async def test_everything_is_a_checkpoint(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    shots = source.open()
    with trio.testing.assert_checkpoints():
        await shots.__aenter__()
    source.feed()
    with trio.testing.assert_checkpoints():
        source.read(await anext(shots))  # waits
    source.feed()
    await queued(shots)
    with trio.testing.assert_checkpoints():
        source.read(await anext(shots))  # is there
    source.feed()
    await queued(shots)
    with trio.testing.assert_checkpoints():
        await shots.stop()
    with trio.testing.assert_checkpoints():
        source.read(await anext(shots))  # after the end
    for _ in range(2):
        with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
            await anext(shots)
    with trio.testing.assert_checkpoints():
        await shots.stop()
    with trio.testing.assert_checkpoints():
        await shots.__aexit__(None, None, None)
    with pytest.raises(RuntimeError, match="iterated inside"):
        await anext(shots)
    with pytest.raises(RuntimeError, match="entered once"):
        await shots.__aenter__()


@EACH
@pytest.mark.parametrize("when", ["not armed", "armed", "staged"])
@pytest.mark.parametrize("how", ["stop", "exit"])
async def test_the_end_is_a_checkpoint(bench: Bench, name: str, when: str, how: str) -> None:
    source = SOURCES[name](bench)
    async with trio.open_nursery() as nursery:
        shots = await source.open().__aenter__()
        if when == "armed":
            await (await parked(nursery, anext, shots)).cancel() if not source.fd < 0 else None
        elif when == "staged":
            shots._arm()
            assert states() == ["STAGED"]
        with trio.testing.assert_checkpoints():
            await (shots.stop() if how == "stop" else shots.__aexit__(None, None, None))
        assert states() == []
        if how == "stop":
            await shots.__aexit__(None, None, None)
    assert statistics().in_flight == slots_in_use() == 0


@EACH
async def test_cancelled_on_entry_nothing_is_submitted(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    source.feed()
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            with trio.testing.assert_checkpoints():
                await source.open().__aenter__()
        assert scope.cancelled_caught
    shots = source.open()
    async with shots:
        async with nothing_submitted():
            for call in (lambda: anext(shots), shots.stop):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    with trio.testing.assert_checkpoints():
                        await call()
                assert scope.cancelled_caught
            with trio.CancelScope() as scope:  # in the tick that staged it
                trio.lowlevel.add_instrument(AfterStep(trio.lowlevel.current_task(), scope.cancel))
                await anext(shots)
            assert scope.cancelled_caught
        source.read(await anext(shots))
    assert slots_in_use() == 0


@EACH
async def test_what_a_cancelled_wait_misses_comes_next(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    async with source.open() as shots:
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, anext, shots)
            await trio.lowlevel.checkpoint()
            assert await attempt.cancel()
            if source.fd >= 0:
                attempt = await parked(nursery, anext, shots)
                asked = statistics().cancels_asked
                assert await attempt.cancel()
                assert states() == ["IN_FLIGHT"]  # it goes on
                assert statistics().cancels_asked == asked
        for _ in range(3):
            source.feed()
            with trio.CancelScope() as scope:
                scope.cancel()
                await anext(shots)
            assert scope.cancelled_caught
            source.read(await anext(shots))


@EACH
async def test_a_cancelled_exit_waits_for_the_last_cqe(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    with trio.CancelScope() as scope:
        async with source.open() as shots:
            source.feed()
            source.read(await anext(shots))
            source.feed()
            scope.cancel()
        assert states() == []
        assert slots_in_use() == 0
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert statistics().cancels_asked == statistics().cancels_won + statistics().cancels_lost
    if name in RECEIVES:
        for item in shots.leftover:
            assert item == WORDS[1] or item[0] == WORDS[1]
    source.feed()
    source.oracle()  # nobody else takes it


@EACH
async def test_one_task_iterates(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    async with source.open() as shots, trio.open_nursery() as nursery:
        attempt = Attempt(nursery, anext, shots)
        while not shots._iterating:
            await trio.lowlevel.checkpoint()
        shots.wake()  # for nothing: as at a silent end
        with pytest.raises(trio.BusyResourceError, match="iterating"):
            await anext(shots)
        source.feed()
        source.read(await attempt.result())


@EACH
@pytest.mark.parametrize("how", ["stop", "exit"])
async def test_the_end_while_another_task_iterates(bench: Bench, name: str, how: str) -> None:
    """Right after it has armed the operation, and when the kernel has it."""
    for n in range(3):
        source = SOURCES[name](bench)
        async with trio.open_nursery() as nursery:
            shots = await source.open().__aenter__()
            attempt = Attempt(nursery, anext, shots)
            for _ in range(n):
                await trio.lowlevel.checkpoint()
            if how == "stop":
                await shots.stop()
            else:
                await shots.__aexit__(None, None, None)
            await attempt.settled()
            if attempt.error is None:
                assert source.merges
            else:
                assert isinstance(attempt.error, (StopAsyncIteration, RuntimeError))
            if how == "stop":
                await shots.__aexit__(None, None, None)
    assert statistics().in_flight == slots_in_use() == 0


@EACH
async def test_several_tasks_end_it(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    async with trio.open_nursery() as nursery:
        shots = await source.open().__aenter__()
        source.feed()
        source.read(await anext(shots))
        for _ in range(3):
            nursery.start_soon(shots.stop)
        await trio.lowlevel.checkpoint()
        await shots.__aexit__(None, None, None)
    assert statistics().in_flight == slots_in_use() == 0


@ON_FDS
@pytest.mark.parametrize("when", ["not armed", "staged", "in flight", "queued"])
@pytest.mark.parametrize("how", ["notify_closing", "close"])
async def test_its_fd_is_closed(bench: Bench, name: str, when: str, how: str) -> None:
    source = SOURCES[name](bench)
    fd = os.dup(source.fd)
    source.fd = fd
    shots = _on(name, fd)
    async with trio.open_nursery() as nursery, shots:
        attempt = None
        if when == "staged":
            shots._arm()
        elif when == "in flight":
            attempt = await parked(nursery, anext, shots)
        elif when == "queued":
            shots._arm()
            source.feed()
            await queued(shots)
        if how == "close":
            await lowlevel.close(fd)
        else:
            lowlevel.notify_closing(fd)
            os.close(fd)
        assert states() in ([], ["CANCELLING"])
        if attempt is not None:
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
        if when == "queued":
            item = await anext(shots)
            if name == "accept_multishot":
                os.close(item)
            elif name == "recvmsg_multishot":
                os.close(int.from_bytes(item[1][0][2][:4], "little"))
        for _ in range(2):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
                await anext(shots)
    assert statistics().in_flight == slots_in_use() == 0


def _on(name: str, fd: int) -> Multishot[Any]:
    function = getattr(lowlevel, name)
    more: dict[str, int] = {"ancbufsize": socket.CMSG_SPACE(4)} if name == "recvmsg_multishot" else {}
    made: Multishot[Any] = function(fd, select.POLLIN) if name == "poll_multishot" else function(fd, **more)
    return made


@ON_FDS
async def test_a_bad_fd(bench: Bench, name: str) -> None:
    for fd in (UNUSED_FD, -1):
        async with _on(name, fd) as shots:
            for _ in range(2):
                with trio.testing.assert_checkpoints(), pytest.raises(OSError, match="Bad file descriptor") as raised:
                    await anext(shots)
                assert raised.value.errno == errno.EBADF
    async with _on(name, 1 << 40) as shots, nothing_submitted():
        with pytest.raises(OverflowError, match="does not fit"):
            await anext(shots)
    assert slots_in_use() == 0


@EACH
async def test_what_the_kernel_lacks(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, source = lowlevel.MULTISHOT[name], SOURCES[name](bench)
    for opcode in row.needs:
        text = rf"lacks {name} \(IORING_OP_{row.opcode.name}\); Linux {re.escape(row.since)} brought it"
        with monkeypatch.context() as patch:
            patch.setattr(manager(), "_missing", frozenset({opcode}))
            with pytest.raises(UnsupportedOperation, match=text):
                source.open()


@EACH
def test_outside_of_a_run_and_without_a_ring(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    with pytest.raises(RuntimeError):
        source.open()

    async def main() -> None:
        with pytest.raises(UnavailableError, match="needs a ring"):
            source.open()

    run_without_ring(main)


@EACH
async def test_an_asynchronous_generator_around_it(bench: Bench, name: str) -> None:
    """Closed, it ends the operation: its slot is free, its fd can be used."""
    source = SOURCES[name](bench)

    async def results() -> AsyncIterator[object]:
        async with source.open() as shots:
            async for item in shots:
                yield source.read(item)

    for _ in range(3):
        source.feed()
        async with aclosing(results()) as items:  # type: ignore[type-var]
            await anext(items)
        assert statistics().in_flight == slots_in_use() == 0
    source.feed()
    source.oracle()


@ON_FDS
async def test_a_coroutine_closed_by_the_host(bench: Bench, name: str) -> None:
    """Nobody can wait for the last result there: it is disposed of when it comes; slot and pool are free."""
    source = SOURCES[name](bench)

    async def iterate() -> None:
        async with source.open() as shots:
            await anext(shots)

    class Closing(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            trio.lowlevel.remove_instrument(self)
            coroutine.close()

    coroutine = iterate()
    coroutine.send(None)  # it is at its checkpoint
    coroutine.send(outcome.Value(None))
    assert states() == ["STAGED"]
    trio.lowlevel.current_task().custom_sleep_data = None
    for submitted in (False, True):
        if submitted:
            coroutine = iterate()
            coroutine.send(None)
            coroutine.send(outcome.Value(None))
            manager().ring.flush()
            source.feed()
        trio.lowlevel.add_instrument(Closing())
        await blocked()
        await lowlevel.nop()
        await lowlevel.nop()
        assert statistics().in_flight == slots_in_use() == 0
    if name != "accept_multishot":
        manager()


@EACH
async def test_nothing_refers_to_it_afterwards(bench: Bench, name: str) -> None:
    source = SOURCES[name](bench)
    with no_garbage_collection():
        for _ in range(2):
            shots = source.open()
            async with shots:
                source.feed()
                source.read(await anext(shots))
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(shots)
            gone = weakref.ref(shots)
            del shots
            assert gone() is None


@EACH
async def test_slots_are_waited_for(bench: Bench, name: str) -> None:
    """A wait for a slot can be cancelled."""
    source = SOURCES[name](bench)
    manager()._config = dataclasses.replace(manager()._config, max_in_flight=1)
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        reader = await parked(nursery, lowlevel.recv, a, bytearray(1))
        entering = await parked(nursery, source.open().__aenter__)
        assert await entering.cancel()
        shots = source.open()
        entering = await parked(nursery, shots.__aenter__)
        b.send(b"x")
        await reader.result()
        await entering.result()
        source.feed()
        source.read(await anext(shots))
        await shots.__aexit__(None, None, None)


# The end of a run


@EACH
@pytest.mark.parametrize("when", ["waiting", "queued", "staged", "not armed"])
def test_a_crash(mount: Mount, bench: Bench, name: str, when: str) -> None:
    source = SOURCES[name](bench)

    async def use() -> None:
        async with source.open() as shots:
            if when == "waiting":
                await anext(shots)
            elif when != "not armed":
                shots._arm()
                if when == "queued":
                    await blocked()
                    source.feed()
            await trio.sleep_forever()

    async def main() -> None:
        trio.lowlevel.spawn_system_task(use)
        if when == "staged":
            await trio.lowlevel.checkpoint()
        elif source.fd < 0 and when != "not armed":
            for _ in range(20):
                await trio.lowlevel.checkpoint()
        else:
            await blocked()
            if when == "queued":
                await lowlevel.nop()
        await crash()

    run_to_a_crash(mount, main)


def test_a_crash_with_a_shared_pool(mount: Mount, bench: Bench) -> None:
    """One receive has the buffers, another waits for them: nobody is woken for what becomes free then."""
    pairs = [bench.sockets() for _ in range(3)]

    async def use(pool: lowlevel.BufferPool, a: socket.socket, greedy: bool) -> None:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            if not greedy:
                await anext(chunks)
            chunks._arm()
            await trio.sleep_forever()

    async def main() -> None:
        pool = lowlevel.BufferPool(2, 64)
        pairs[0][1].send(bytes(200))
        trio.lowlevel.spawn_system_task(use, pool, pairs[0][0], True)
        await blocked()
        assert pool.available == 0
        for a, b in pairs[1:]:
            trio.lowlevel.spawn_system_task(use, pool, a, False)
            b.send(b"x")
        await blocked()
        assert len(pool._starving) == 2
        await crash()

    run_to_a_crash(mount, main)


def test_memory_lives_as_long_as_the_kernel_uses_it(mount: Mount, bench: Bench) -> None:
    """Data that arrives as the run ends goes to its buffers; they are freed when the operation has ended."""
    a, b = bench.sockets()
    rings: list[Any] = []

    async def use() -> None:
        async with lowlevel.recv_multishot(a) as chunks:
            rings.append(weakref.ref(chunks._pool._ring))
            await anext(chunks)

    async def main() -> None:
        trio.lowlevel.spawn_system_task(use)
        await blocked()
        b.send(b"hello")
        await crash()

    run_to_a_crash(mount, main)
    gc.collect()
    assert rings[0]() is None
    b.send(b"again")
    assert a.recv(99).endswith(b"again")


def test_the_run_ends_first(mount: Mount, bench: Bench) -> None:
    """System tasks are cancelled when the main task is done: everything ends in good order."""
    pool_closed = []

    async def use(source: Source) -> None:
        async with source.open() as shots:
            shots._arm()
            try:
                await trio.sleep_forever()
            finally:
                pool_closed.append(source)

    async def main() -> None:
        for name in SOURCES:
            trio.lowlevel.spawn_system_task(use, SOURCES[name](bench))
        await blocked()

    mount.run(main)
    assert len(pool_closed) == len(SOURCES)


async def test_a_forked_child(bench: Bench) -> None:
    """It gives no buffer back to the parent's kernel, whose memory it shares; and it gets a clear error."""
    a, b = bench.sockets()
    with lowlevel.BufferPool(2, 64) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            b.send(b"x")
            assert await anext(chunks) == b"x"
            b.send(bytes(200))
            await queued(chunks, 2)
            tail = pool._ring._entries_pin[0].resv

            def child() -> int:
                chunks._clear()
                pool.provide()
                with pytest.raises(RingError, match="belongs to the parent"):
                    manager().get_events(0)
                with pytest.raises(RingError, match="belongs to the parent"):
                    manager().registered.close_buffers(pool._ring)
                tail: int = pool._ring._entries_pin[0].resv
                return tail

            assert in_child(child) == tail
            received = b""
            while len(received) < 200:
                received += await anext(chunks)
            assert received == bytes(200)


def test_guests(bench: Bench) -> None:
    """Results wake the sleeping worker; a cancel by the host goes out at once."""
    a, b = bench.sockets()
    host = Host()
    scope = trio.CancelScope()
    received: list[bytes] = []

    async def main() -> None:
        with scope:
            async with lowlevel.recv_multishot(a) as chunks:
                async for chunk in chunks:
                    received.append(chunk)  # noqa: PERF401

    host.start(main)
    current = manager()
    for n in range(1, 4):
        while not (current._worker_waits and current.ring.staged == 0 and states_of(current) == ["IN_FLIGHT"]):
            if not host.todo.empty():
                host.step()
        b.send(b"%d" % n)
        while len(received) < n:
            host.step()
    while not (current._worker_waits and current.ring.staged == 0):
        if not host.todo.empty():
            host.step()
    scope.cancel()
    host.finish()
    assert received == [b"1", b"2", b"3"]
    assert scope.cancelled_caught


def states_of(current: Any) -> list[str]:
    return [op.state for op in current.statistics().operations if op.operation.endswith("multishot")]


# Ctrl-C


@pytest.mark.parametrize("name", ["accept_multishot", "recv_multishot", "recvmsg_multishot"])
def test_interrupted_at_every_line(mount: Mount, name: str) -> None:
    """No connection and no fd is lost on its way to the caller; nothing is in flight afterwards."""
    from pathlib import Path

    from tests.helpers import Bench

    for n in itertools.count(1):
        with _bench(Bench, Path("/nonexistent")) as bench:
            source, lines = _interruptible(bench, name), 0

            async def main(n: int = n, source: Source = source) -> None:
                nonlocal lines
                async with source.open() as shots:
                    shots._arm()
                    source.feed()
                    await queued(shots)
                    with interrupted_at_line(n) as stop:
                        try:
                            item = await anext(shots)
                        except KeyboardInterrupt:
                            lines = stop()
                            raise
                        lines = stop()
                        source.read(item)
                        await trio.lowlevel.checkpoint()

            try:
                mount.run(main)
            except KeyboardInterrupt:
                assert lines >= n
            else:
                assert lines < n
                break
    assert n > 5


@contextmanager
def _bench(cls: Any, path: Any) -> Iterator[Bench]:
    bench = cls(path)
    try:
        yield bench
    finally:
        bench.close()


def _interruptible(bench: Bench, name: str) -> Source:
    if name != "recvmsg_multishot":
        return SOURCES[name](bench)
    a, b = bench.sockets()
    size = socket.CMSG_SPACE(4)

    def read(message: Any) -> None:
        os.close(int.from_bytes(message[1][0][2][:4], "little"))

    return Source(
        lambda: lowlevel.recvmsg_multishot(a, ancbufsize=size),
        lambda: b.sendmsg([b"x"], [(*RIGHTS, b.fileno().to_bytes(4, "little"))]),
        read,
        lambda: None,
    )


def test_ctrl_c_while_it_waits(mount: Mount, bench: Bench) -> None:
    for name in SOURCES:
        source = SOURCES[name](bench)
        if source.fd < 0:
            continue

        async def main(source: Source = source) -> None:
            async with source.open() as shots, trio.open_nursery() as nursery:
                nursery.start_soon(_interrupt_when_blocked)
                await anext(shots)

        with pytest.RaisesGroup(KeyboardInterrupt):
            mount.run(main)


async def _interrupt_when_blocked() -> None:
    await blocked()
    signal.raise_signal(signal.SIGINT)


# The kernel ends it

CODES = [-errno.ECANCELED, -errno.EINTR, -512, -errno.ENOBUFS]


@EACH
async def test_it_is_armed_again_after_a_silent_end(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a result or without; while a task waits, and before one asks."""
    source = SOURCES[name](bench)
    complete, silent = Shots.complete, itertools.cycle([True, False])

    def end(self: Shots, token: int, res: int, flags: int) -> None:
        ends = flags & 2 and res not in INTERRUPTED and next(silent)
        complete(self, token, res, flags)
        if ends and self.armed:
            self.receiver._stop()  # type: ignore[attr-defined]

    monkeypatch.setattr(Shots, "complete", end)
    tokens = set()
    async with source.open() as shots:
        for _ in range(9):
            source.feed()
            source.read(await anext(shots))
            assert shots._shots is not None
            tokens.add(shots._shots.token)
    assert len(tokens) > 2


@pytest.mark.ring(entries=2, cq_entries=4)
@pytest.mark.parametrize("name", ["accept_multishot", "recv_multishot", "read_multishot", "recvmsg_multishot"])
async def test_the_completion_queue_overflows(bench: Bench, name: str) -> None:
    """The kernel ends the operation with a good result then. Nothing is lost."""
    source, expected = SOURCES[name](bench), itertools.cycle(WORDS)
    async with source.open() as shots:
        for _ in range(3):
            for _ in range(16):
                source.feed()
            items = [source.read(await anext(shots)) for _ in range(16)]
            words = [item[0] if isinstance(item, tuple) else item for item in items]
            assert words == [*itertools.islice(expected, 16)]
        overflows = statistics().overflows
    assert overflows > 0
    assert shots.leftover == []


# Buffers


async def receive_all(chunks: Any, n: int) -> bytes:
    received = b""
    while len(received) < n:
        received += await anext(chunks)
    return received


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
async def test_a_pool_too_small(bench: Bench, count: int, incremental: bool) -> None:
    """ENOBUFS again and again; every byte arrives, in order."""
    a, b = bench.sockets()
    data = os.urandom(50_000)
    with lowlevel.BufferPool(count, 100, incremental=incremental) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            b.sendall(data)
            assert await receive_all(chunks, len(data)) == data
            assert pool.available == count
        assert pool.available == count


async def test_buffers_are_shared_by_small_portions(bench: Bench) -> None:
    a, b = bench.sockets()
    with lowlevel.BufferPool(2, 4096, incremental=True) as pool:
        if not pool._ring.incremental:
            pytest.skip("this kernel cannot do that")
        async with lowlevel.recv_multishot(a, pool) as chunks:
            for i in range(2000):
                b.send(b"%d" % i)
                if i % 3 == 2:
                    assert await receive_all(chunks, len(f"{i - 2}{i - 1}{i}")) == b"%d%d%d" % (i - 2, i - 1, i)
            b.send(b"x")
            await queued(chunks)
            assert pool.available == 2


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
async def test_messages_are_not_cut_at_the_end_of_a_buffer(bench: Bench, kind: socket.SocketKind) -> None:
    a, b = bench.sockets(kind=kind)
    with lowlevel.BufferPool(8, 4096, incremental=True) as pool:
        for call in (lowlevel.recv_multishot, lowlevel.recvmsg_multishot):
            with pytest.raises(ValueError, match="incremental=False"):
                call(a, pool)
        with pytest.raises(ValueError, match="incremental=False"):
            lowlevel.recvmsg_multishot(bench.sockets()[0], pool)
        with pytest.raises(ValueError, match="incremental=False"):
            lowlevel.read_multishot(bench.pipe(os.O_DIRECT)[0], pool)
    for shared in (None, lowlevel.BufferPool(8, 16384)):
        async with lowlevel.recv_multishot(a, shared) as chunks:
            for size in (10_000, 10_000, 16_000, 1, 16_384, 5):
                b.send(bytes(size))
                assert len(await anext(chunks)) == size
        async with lowlevel.recvmsg_multishot(a, shared) as messages:
            for size in (10_000, 16_000, 1, 16_240, 5):
                b.send(bytes(size))
                data, _, flags, _ = await anext(messages)
                assert (len(data), flags & socket.MSG_TRUNC) == (size, 0)
        if shared is not None:
            shared.close()


async def test_a_pool_is_shared_with_a_slow_receiver(bench: Bench) -> None:
    """It keeps the buffers it has not emptied; the others go on with the rest, and with all once it takes its share."""
    (slow, to_slow), (fast, to_fast) = bench.sockets(), bench.sockets()
    data = os.urandom(20_000)
    with lowlevel.BufferPool(8, 64) as pool:
        async with lowlevel.recv_multishot(slow, pool, limit=4) as lazy, lowlevel.recv_multishot(fast, pool) as busy:
            to_slow.sendall(data)
            lazy._arm()
            await blocked()
            kept = len(lazy._queue)
            assert 0 < kept <= 8
            to_fast.sendall(data)
            async with trio.open_nursery() as nursery:
                reader = Attempt(nursery, receive_all, busy, len(data))
                await blocked()
                if kept == 8:
                    assert not reader.done
                    assert pool._starving
                lazily = bytearray()
                while len(lazily) < len(data):
                    lazily += await anext(lazy)
                assert await reader.result() == data
            assert lazily == data


async def test_the_end_while_another_task_waits_for_buffers(bench: Bench) -> None:
    for how in ("stop", "exit", "close"):
        (a, to_a), (b, to_b) = bench.sockets(), bench.sockets()
        with lowlevel.BufferPool(1, 64) as pool:
            async with lowlevel.recv_multishot(a, pool) as greedy, trio.open_nursery() as nursery:
                to_a.send(b"hello")
                greedy._arm()
                await queued(greedy)
                starving = await lowlevel.recv_multishot(b, pool).__aenter__()
                to_b.send(b"x")
                attempt = await parked(nursery, anext, starving)
                if how == "stop":
                    await starving.stop()
                elif how == "close":
                    lowlevel.notify_closing(b)
                if how != "close":
                    await starving.__aexit__(None, None, None)
                await attempt.settled()
                if how == "close":
                    await starving.__aexit__(None, None, None)
                assert isinstance(attempt.error, trio.ClosedResourceError if how == "close" else StopAsyncIteration)
                assert not pool._starving
                assert await anext(greedy) == b"hello"


async def test_views(bench: Bench) -> None:
    a, b = bench.sockets()
    with lowlevel.BufferPool(2, 64) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            views = chunks.views()
            assert aiter(views) is views
            b.send(b"hello")
            view = await anext(views)
            memory = view.__enter__()
            assert bytes(memory) == b"hello"
            part = memory[1:3]
            for i in range(500):  # nothing overwrites it meanwhile
                b.send(b"%d" % i)
                async with aclosing_view(await anext(views)) as other:
                    assert bytes(other) == b"%d" % i
                assert bytes(memory) == b"hello"
            with pytest.raises(BufferError):
                view.__exit__()
            assert pool.available == 1
            part.release()
            view.release()
            view.release()
            assert pool.available == 2
            with pytest.raises(ValueError, match="released"):
                bytes(memory)


@contextmanager
def _entered(view: lowlevel.BufferView) -> Iterator[memoryview]:
    with view as memory:
        yield memory


class aclosing_view:  # noqa: N801
    def __init__(self, view: lowlevel.BufferView) -> None:
        self._view = view

    async def __aenter__(self) -> memoryview:
        return self._view.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self._view.__exit__()


async def test_views_are_the_buffer_itself(bench: Bench) -> None:
    a, b = bench.sockets()
    with lowlevel.BufferPool(1, 64) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            b.send(b"hello")
            with await anext(chunks.views()) as memory:
                pool._ring._memory[:1] = b"J"
                assert bytes(memory) == b"Jello"


async def test_who_keeps_all_views_stops_the_receive(bench: Bench) -> None:
    a, b = bench.sockets()
    with lowlevel.BufferPool(2, 64) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks, trio.open_nursery() as nursery:
            views = []
            for word in (b"one", b"two"):
                b.send(word)
                views.append(await chunks.next_view())
            b.send(b"three")
            attempt = await parked(nursery, anext, chunks)
            assert [bytes(view.__enter__()) for view in views] == [b"one", b"two"]
            views[0].release()
            assert await attempt.result() == b"three"
            views[1].release()


async def test_a_forgotten_view(bench: Bench) -> None:
    """Its buffer comes back when it is collected, in whatever thread that is."""
    a, b = bench.sockets()
    with lowlevel.BufferPool(1, 64) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks, trio.open_nursery() as nursery:
            for elsewhere in (False, True):
                b.send(b"one")
                cycle: list[Any] = [await chunks.next_view()]
                b.send(b"two")
                attempt = await parked(nursery, anext, chunks)
                cycle.append(cycle)
                if not elsewhere:
                    cycle.clear()
                else:
                    with no_garbage_collection():
                        del cycle
                        await trio.to_thread.run_sync(gc.collect)
                assert await attempt.result() == b"two"
            assert pool.available == 1


def test_a_view_outlives_the_pool_and_the_run(mount: Mount, bench: Bench) -> None:
    a, b = bench.sockets()

    async def main() -> lowlevel.BufferView:
        with lowlevel.BufferPool(1, 64) as pool:
            async with lowlevel.recv_multishot(a, pool) as chunks:
                b.send(b"hello")
                view = await chunks.next_view()
        assert bytes(view.__enter__()) == b"hello"
        return view

    view: Any = mount.run(main)
    assert bytes(view.__enter__()) == b"hello"
    view.release()
    view = mount.run(main)
    del view
    gc.collect()


async def test_pools_come_and_go(bench: Bench) -> None:
    """Numbers are used again; a pool that failed to open takes none; nothing is left to the kernel."""
    groups = set()
    a, b = bench.sockets()
    for i in range(300):
        async with lowlevel.recv_multishot(a) as chunks:
            groups.add(chunks._pool.group)
            b.send(b"%d" % i)
            assert await anext(chunks) == b"%d" % i
    with pytest.raises((OSError, OverflowError)):
        lowlevel.BufferPool(32768, 1 << 30)
    with lowlevel.BufferPool(1, 64) as pool:
        groups.add(pool.group)
    assert len(groups) == 1


async def test_pools_that_cannot_be(bench: Bench) -> None:
    a, _ = bench.sockets()
    async with nothing_submitted():
        for count, size in ((0, 1), (3, 1), (65536, 1), (-1, 1), (1, 0), (1, (1 << 30) + 1)):
            with pytest.raises(ValueError, match="must be"):
                lowlevel.BufferPool(count, size)
        pool = lowlevel.BufferPool(1, 64)
        for call in (lowlevel.recv_multishot, lowlevel.recvmsg_multishot, lowlevel.read_multishot):
            with pytest.raises(ValueError, match="limit"):
                call(a, limit=0)
        with pytest.raises(ValueError, match="have no room"):
            lowlevel.recvmsg_multishot(a, pool)
        with pytest.raises(ValueError, match="have no room"):
            lowlevel.recvmsg_multishot(a, ancbufsize=20_000)
        for call in (lowlevel.recv_multishot, lowlevel.recvmsg_multishot):
            with pytest.raises(ValueError, match="negative"):
                call(a, flags=-1)
        with pytest.raises(ValueError, match="negative"):
            lowlevel.recvmsg_multishot(a, ancbufsize=-1)
        lowlevel.recv_multishot(a, pool)  # never entered: it uses nothing
        entered = lowlevel.recv_multishot(a, pool)
        async with entered:
            with pytest.raises(RuntimeError, match="1 multishot receives use this pool"):
                pool.close()
            with pytest.raises(trio.BusyResourceError):
                await lowlevel.recv_multishot(a, pool).__aenter__()
            with trio.CancelScope() as scope:
                scope.cancel()
                await lowlevel.recv_multishot(bench.sockets()[0], pool).__aenter__()
        pending = lowlevel.recv_multishot(a, pool)
        pool.close()
        pool.close()
        with pytest.raises(ValueError, match="closed"):
            lowlevel.recv_multishot(a, pool)
        with pytest.raises(ValueError, match="closed"):
            await pending.__aenter__()
        assert slots_in_use() == 0


def test_a_pool_of_another_run(mount: Mount, bench: Bench) -> None:
    a, _ = bench.sockets()

    async def main() -> lowlevel.BufferPool:
        return lowlevel.BufferPool(1, 64)

    pool: Any = mount.run(main)

    async def use() -> None:
        with pytest.raises(ValueError, match="another trio run"):
            lowlevel.recv_multishot(a, pool)

    mount.run(use)
    pool.close()


# Streams and messages


async def test_the_end_of_a_stream(bench: Bench) -> None:
    for call, family in ((lowlevel.recv_multishot, socket.AF_INET), (lowlevel.recvmsg_multishot, socket.AF_UNIX)):
        a, b = bench.sockets(family)
        b.send(b"hello")
        b.shutdown(socket.SHUT_WR)
        async with call(a) as shots:
            received = [each async for each in shots]
            assert len(received) == 1
            assert received[0] == b"hello" or received[0][0] == b"hello"
            with pytest.raises(StopAsyncIteration):
                await anext(shots)
            if isinstance(shots, lowlevel.Messages):
                assert shots._pool.available == shots._pool.count
    read_end, write_end = bench.pipe()
    os.write(write_end, b"hello")
    os.close(write_end)
    bench.closed(write_end)
    async with lowlevel.read_multishot(read_end) as chunks:
        assert [each async for each in chunks] == [b"hello"]


async def test_a_connection_is_reset(bench: Bench) -> None:
    a, b = bench.sockets(socket.AF_INET)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    async with lowlevel.recv_multishot(a) as chunks:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, anext, chunks)
            b.close()
            with pytest.raises(ConnectionResetError):
                await attempt.result()
        assert [each async for each in chunks] == []


@pytest.mark.parametrize("incremental", [False, True])
async def test_empty_datagrams(bench: Bench, incremental: bool) -> None:
    a, b = bench.sockets(kind=socket.SOCK_DGRAM)
    words = [b"", b"one", b"", b"", b"two", b""]
    for call in (lowlevel.recv_multishot, lowlevel.recvmsg_multishot):
        with lowlevel.BufferPool(2, 4096) as pool:
            async with call(a, pool) as shots:
                for word in words:
                    b.send(word)
                received = [await anext(shots) for _ in words]
                assert [each if isinstance(each, bytes) else each[0] for each in received] == words
                assert pool.available == 2
                assert not incremental or pool._ring._used == [0, 0]


def _receiver(bench: Bench, family: int) -> tuple[socket.socket, socket.socket]:
    receiver, sender = (bench.new_socket(family, socket.SOCK_DGRAM) for _ in range(2))
    if family == socket.AF_UNIX:
        receiver.bind(str(bench.directory / "receiver"))
        sender.bind(str(bench.directory / "sender"))
    else:
        receiver.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sender.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    sender.connect(receiver.getsockname())
    return receiver, sender


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
async def test_addresses_and_truncation(bench: Bench, family: int) -> None:
    receiver, sender = _receiver(bench, family)
    with lowlevel.BufferPool(4, 244) as pool:
        async with lowlevel.recvmsg_multishot(receiver, pool) as messages:
            for size in (5, 99, 100, 101, 10_000, 0):
                sender.send(bytes(size))
                data, ancdata, flags, address = await anext(messages)
                sender.send(bytes(size))
                await messages.stop() if size < 0 else None
                other = await anext(messages)
                assert (data, ancdata, address) == (bytes(min(size, 100)), [], sender.getsockname())
                assert bool(flags & socket.MSG_TRUNC) is (size > 100)
                assert other == (data, ancdata, flags, address)


async def test_truncation_without_a_message(bench: Bench) -> None:
    """With MSG_TRUNC the result is the datagram's size; the chunk is what there is of it."""
    receiver, sender = _receiver(bench, socket.AF_INET)
    with lowlevel.BufferPool(4, 8) as pool:
        async with lowlevel.recv_multishot(receiver, pool, flags=socket.MSG_TRUNC) as chunks:
            for word in (b"hello", b"hello, world"):
                sender.send(word)
                assert await anext(chunks) == word[:8]


async def test_ancillary_data(bench: Bench) -> None:
    """What does not fit is cut, with MSG_CTRUNC, and closed by the kernel."""
    a, b = bench.sockets()
    files = [bench.file(), bench.file()]
    rights = (*RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in files))
    async with lowlevel.recvmsg_multishot(a, ancbufsize=socket.CMSG_SPACE(4)) as messages:
        b.sendmsg([b"x"], [rights])
        data, ((level, kind, fds),), flags, _ = await anext(messages)
        assert (data, level, kind) == (b"x", *RIGHTS)
        assert flags & socket.MSG_CTRUNC or len(fds) == 8
        for i in range(0, len(fds), 4):
            os.close(int.from_bytes(fds[i : i + 4], "little"))
        b.send(b"y")
        assert (await anext(messages))[:2] == (b"y", [])


async def test_fds_nobody_takes_are_closed(bench: Bench) -> None:
    """Their messages are left over, without them."""
    a, b = bench.sockets(kind=socket.SOCK_SEQPACKET)
    ancillary = [(*RIGHTS, bench.file().to_bytes(4, "little"))]
    async with lowlevel.recvmsg_multishot(a, ancbufsize=socket.CMSG_SPACE(4)) as messages:
        messages._arm()
        for i in range(10):
            b.sendmsg([b"%d" % i], ancillary)
        b.send(b"none")
        await queued(messages, 8)
    rest = [message[0] for message in messages.leftover]
    assert rest == [b"%d" % i for i in range(10)][: len(rest)]
    assert all(message[1] == [] for message in messages.leftover)


async def test_what_is_left_over(bench: Bench) -> None:
    a, b = bench.sockets(kind=socket.SOCK_DGRAM)
    async with lowlevel.recv_multishot(a) as chunks:
        chunks._arm()
        for word in WORDS:
            b.send(word)
        await queued(chunks, 5)
        assert await anext(chunks) == WORDS[0]
    assert chunks.leftover == WORDS[1:]
    async with lowlevel.recv_multishot(a) as chunks:
        chunks._arm()
        for word in WORDS:
            b.send(word)
        await queued(chunks, 5)
        await chunks.stop()
        b.send(b"after")
        assert [each async for each in chunks] == WORDS
    assert chunks.leftover == []
    assert a.recv(9) == b"after"


async def test_connections_nobody_takes_are_closed(bench: Bench) -> None:
    listener = bench.listener()
    async with lowlevel.accept_multishot(listener) as connections:
        connections._arm()
        clients = [bench.new_socket() for _ in range(5)]
        for client in clients:
            client.connect(listener.getsockname())
        await queued(connections, 5)
        os.close(await anext(connections))
    for client in clients:
        assert client.recv(1) == b""


# Limits


async def test_a_slow_receiver_pushes_its_peer_back(bench: Bench) -> None:
    a, b = bench.sockets(socket.AF_INET)
    b.setblocking(False)
    with lowlevel.BufferPool(4, 4096) as pool:
        async with lowlevel.recv_multishot(a, pool) as chunks:
            chunks._arm()
            sent = 0
            for _ in range(100):
                more = fill(lambda: b.send(bytes(65536)))
                sent += more
                await blocked()
                if not more:
                    break
            assert sum(len(item[1]) for item in chunks._queue) <= 4 * 4096
            with pytest.raises(BlockingIOError):
                b.send(b"x")
            received = 0
            while received < sent:
                received += len(await anext(chunks))
            assert received == sent


@pytest.mark.parametrize("call", [lowlevel.recv_multishot, lowlevel.read_multishot])
async def test_no_more_than_the_limit(bench: Bench, call: Callable[..., Any]) -> None:
    """Beyond it come only those that are on their way."""
    a, b = bench.sockets(kind=socket.SOCK_SEQPACKET)
    with lowlevel.BufferPool(256, 64) as pool:
        async with call(a, pool, limit=4) as chunks:
            for i in range(100):
                chunks._may_be_armed() and not chunks._shots.armed and chunks._arm()
                b.send(b"%d" % i)
                await blocked()
            assert 4 <= len(chunks._queue) <= 5
            assert states() == []
            assert [await anext(chunks) for _ in range(100)] == [b"%d" % i for i in range(100)]


async def test_it_is_armed_again_when_half_of_the_limit_is_taken(bench: Bench) -> None:
    a, b = bench.sockets(kind=socket.SOCK_DGRAM)
    async with lowlevel.recv_multishot(a, limit=4) as chunks:
        b.send(b"x")
        await anext(chunks)
        for _ in range(4):
            b.send(b"x")
        await queued(chunks, 4)
        await blocked()
        assert states() == []
        await anext(chunks)
        assert states() == []
        await anext(chunks)
        assert states() == ["STAGED"]
        assert len(chunks._queue) == 2


async def test_no_more_connections_than_the_limit(bench: Bench) -> None:
    """Up to a backlog comes in excess; later clients wait."""
    listener = bench.listener(backlog=4)
    async with lowlevel.accept_multishot(listener, limit=3) as connections:
        connections._arm()
        waiting = []
        for _ in range(40):
            client = bench.new_socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            waiting.append(client)
            await blocked()
        assert 3 <= len(connections._queue) <= 3 + 5
        assert states() == []
        connected = select.select([], waiting, [], 0)[1]
        assert len(connected) <= 3 + 2 * 5
        for _ in range(len(connected)):
            os.close(await anext(connections))


@pytest.mark.parametrize("limit", [1, 2])
async def test_a_small_limit(bench: Bench, limit: int) -> None:
    listener = bench.listener(backlog=64)
    async with lowlevel.accept_multishot(listener, limit=limit) as connections:
        for _ in range(5):
            for i in range(20):
                client = bench.new_socket()
                client.connect(listener.getsockname())
                client.send(b"%d" % i)
            for i in range(20):
                with socket.socket(fileno=await anext(connections)) as sock:
                    assert sock.recv(9) == b"%d" % i


# Errors


async def test_no_fds_are_left(bench: Bench) -> None:
    """EMFILE is raised once for each try; then it goes on."""
    listener = bench.listener()
    client = bench.new_socket()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with lowlevel.accept_multishot(listener) as connections:
        client.connect(listener.getsockname())
        top = os.dup(client.fileno())
        os.close(top)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        try:
            for _ in range(3):
                with pytest.raises(OSError, match="Too many open files") as raised:
                    await anext(connections)
                assert raised.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(await anext(connections))


@pytest.mark.parametrize("queue", [0, 2])
async def test_results_come_before_an_error(bench: Bench, queue: int) -> None:
    listener = bench.listener()
    async with lowlevel.accept_multishot(listener) as connections:
        connections._arm()
        for _ in range(queue):
            bench.new_socket().connect(listener.getsockname())
        await queued(connections, queue)
        await blocked()
        await lowlevel.async_cancel(listener)
        for _ in range(queue):
            os.close(await anext(connections))
        with pytest.raises(OSError, match="canceled"):
            await anext(connections)
        bench.new_socket().connect(listener.getsockname())
        os.close(await anext(connections))


async def test_what_cannot_be(bench: Bench) -> None:
    file = bench.file(b"hello")
    read_end, _ = bench.pipe()
    failures: list[tuple[Multishot[Any], int]] = [
        (lowlevel.read_multishot(file), errno.EBADFD),
        (lowlevel.recv_multishot(file), errno.ENOTSOCK),
        (lowlevel.recv_multishot(read_end), errno.ENOTSOCK),
        (lowlevel.recvmsg_multishot(file), errno.ENOTSOCK),
        (lowlevel.accept_multishot(file), errno.ENOTSOCK),
        (lowlevel.accept_multishot(bench.new_socket()), errno.EINVAL),
        (lowlevel.recv_multishot(bench.new_socket()), errno.ENOTCONN),
        (lowlevel.recv_multishot(bench.sockets()[0], flags=socket.MSG_WAITALL), errno.EINVAL),
    ]
    for shots, code in failures:
        async with shots:
            for _ in range(2):
                with pytest.raises(OSError, match=re.escape(os.strerror(code))) as raised:
                    await anext(shots)
                assert raised.value.errno == code
    for seconds in (0, -1, float("nan"), 1e-9):
        with pytest.raises(ValueError, match="at least"):
            lowlevel.timeout_multishot(seconds)
    with pytest.raises(ValueError, match="negative"):
        lowlevel.timeout_multishot(1, -1)
    with pytest.raises(OverflowError, match="32 bits"):
        lowlevel.timeout_multishot(1, 1 << 32)
    with pytest.raises(OverflowError, match="32 bits"):
        lowlevel.poll_multishot(read_end, 1 << 32)
    with pytest.raises(ValueError, match="negative"):
        lowlevel.accept_multishot(read_end, -1)


@pytest.mark.native("each I/O manager knows who waits with it")
async def test_busy_for_trio(bench: Bench) -> None:
    listener = bench.listener()
    async with lowlevel.accept_multishot(listener):
        with pytest.raises(trio.BusyResourceError):
            await trio.lowlevel.wait_readable(listener)


async def test_busy(bench: Bench) -> None:
    """One direction of a socket has one user."""
    listener = bench.listener()
    a, b = bench.sockets()
    takers: list[tuple[Callable[[], Multishot[Any]], list[Callable[[], Awaitable[object]]]]] = [
        (
            lambda: lowlevel.accept_multishot(listener),
            [
                lambda: lowlevel.accept(listener),
                lowlevel.accept_multishot(listener).__aenter__,
            ],
        ),
        (
            lambda: lowlevel.recv_multishot(a),
            [
                lambda: lowlevel.recv(a, bytearray(1)),
                lowlevel.recv_multishot(a).__aenter__,
                lowlevel.recvmsg_multishot(a).__aenter__,
            ],
        ),
    ]
    for opens, others in takers:
        async with opens():
            for other in others:
                with pytest.raises(trio.BusyResourceError):
                    await other()
    await lowlevel.send(a, b"x")
    assert b.recv(1) == b"x"
    async with trio.open_nursery() as nursery:
        reader = await parked(nursery, lowlevel.recv, a, bytearray(1))
        with pytest.raises(trio.BusyResourceError):
            await lowlevel.recv_multishot(a).__aenter__()
        acceptor = await parked(nursery, lowlevel.accept, listener)
        with pytest.raises(trio.BusyResourceError):
            await lowlevel.accept_multishot(listener).__aenter__()
        await reader.cancel()
        await acceptor.cancel()
    assert slots_in_use() == 0


# Others


@pytest.mark.parametrize("blocking", [True, False])
async def test_what_can_be_read(bench: Bench, blocking: bool) -> None:
    for read_end, write_end in _readable(bench):
        os.set_blocking(read_end, blocking)
        async with lowlevel.read_multishot(read_end) as chunks, trio.open_nursery() as nursery:
            for _ in range(3):
                attempt = await parked(nursery, anext, chunks)
                os.write(write_end, b"hello\n\0\0")
                assert b"hello" in await attempt.result()
                if len(chunks._queue):
                    await anext(chunks)


def _readable(bench: Bench) -> list[tuple[int, int]]:
    eventfd = bench.keep(os.eventfd(0))
    a, b = bench.sockets()
    return [bench.pipe(), bench.pipe(os.O_DIRECT), (eventfd, eventfd), (a.fileno(), b.fileno())]


async def test_a_terminal(bench: Bench) -> None:
    master, slave = os.openpty()
    bench.keep(master), bench.keep(slave)
    for fd in (master, slave):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
    async with lowlevel.read_multishot(slave) as chunks:
        for word in WORDS:
            os.write(master, word + b"\n")
            assert await anext(chunks) == word + b"\n"
        os.write(master, b"\4")
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_events_are_added_up(bench: Bench) -> None:
    a, b = bench.sockets()
    async with lowlevel.poll_multishot(a, select.POLLIN | select.POLLOUT) as events:
        assert await anext(events) == select.POLLOUT
        b.send(b"x")
        await queued(events)
        b.shutdown(socket.SHUT_WR)
        await blocked()
        assert len(events._queue) == 1
        both = await anext(events)
        assert both & (select.POLLIN | select.POLLRDHUP) == select.POLLIN | select.POLLRDHUP


@pytest.mark.parametrize("count", [1, 3])
async def test_a_number_of_ticks(bench: Bench, count: int) -> None:
    begin = time.monotonic()
    async with lowlevel.timeout_multishot(0.005, count) as ticks:
        heard = [n async for n in ticks]
    assert sum(heard) == count
    assert time.monotonic() - begin >= 0.005 * count
    assert slots_in_use() == 0


async def test_ticks_nobody_hears_are_added_up(bench: Bench) -> None:
    async with lowlevel.timeout_multishot(0.001) as ticks:
        await anext(ticks)
        end = time.monotonic() + 0.02
        spin_until(lambda: time.monotonic() > end)
        await lowlevel.timeout(0.005)
        assert len(ticks._queue) == 1
        assert await anext(ticks) > 1


async def test_ticks_end_whenever_it_is(bench: Bench) -> None:
    """A cancel that comes between two ticks finds nothing; it is repeated."""
    for i in range(200):
        async with lowlevel.timeout_multishot(2e-4) as ticks:
            await anext(ticks)
            end = time.monotonic() + 1e-5 * (i % 30)
            spin_until(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
    assert statistics().cancels_asked == statistics().cancels_won + statistics().cancels_lost


async def test_the_statistics_name_it(bench: Bench) -> None:
    a, _ = bench.sockets()
    async with lowlevel.recv_multishot(a) as chunks:
        assert states() == []
        chunks._arm()
        await blocked()
        (op,) = [op for op in trio_uring.statistics().operations if op.operation == "recv_multishot"]
        assert (op.fd, op.state) == (a.fileno(), "IN_FLIGHT")
        assert statistics().in_flight == 1


def test_drain_is_used() -> None:
    assert drain is not None
