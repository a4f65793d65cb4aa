"""Cancelled or done: never both, never lost, and nothing leaks."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.contract.cases import BLOCKING, CASES
from tests.helpers import Attempt, drain, give_way, in_kernel_worker, manager, nothing_submitted, parked, spin_until
from trio_uring import _file_ops, lowlevel, statistics
from trio_uring._cancel import Operation
from trio_uring._errors import ERESTARTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers import Bench

STORM = 10_000


@pytest.mark.parametrize("name", BLOCKING)
async def test_cancelled_means_not_done(bench: Bench, name: str) -> None:
    blocked = CASES[name].blocked
    assert blocked is not None
    call, unblock = blocked(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, call)
        assert [op.state for op in statistics().operations if op.operation == name] == ["IN_FLIGHT"]
        before = statistics()
        assert await attempt.cancel()
        after = statistics()
        assert after.cancels_asked - before.cancels_asked == 1
        assert after.cancels_won - before.cancels_won == 1
        assert after.in_flight == 0
    unblock()
    await call()


async def test_two_scopes_ask_once(bench: Bench) -> None:
    read_end, _ = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.read, read_end, bytearray(1))
        attempt.scope.cancel()
        nursery.cancel_scope.cancel()
    assert statistics().cancels_asked == 1


async def test_what_a_cancelled_send_has_sent_is_returned(bench: Bench) -> None:
    a, b = bench.sockets()
    data = os.urandom(8 << 20)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_blocked, scope)
            sent = await lowlevel.send(a, data, socket.MSG_WAITALL)
            assert 0 < sent < len(data)
            assert statistics().cancels_lost == 1
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert drain(b.fileno(), sent) == data[:sent]
    with pytest.raises(BlockingIOError):
        b.recv(1, socket.MSG_DONTWAIT)


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


async def test_what_a_cancelled_recv_has_received_is_returned(bench: Bench) -> None:
    a, b = bench.sockets()
    buffer = bytearray(10)
    b.send(b"hel")
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, buffer, socket.MSG_WAITALL)
        assert not await attempt.cancel()
        assert attempt.value == 3
        assert buffer[:3] == b"hel"
    b.send(b"lo")
    assert await lowlevel.recv(a, buffer) == 2


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ``res`` of every CQE of an operation, as they come."""
    seen = []
    complete = Operation.complete

    def spy(self: Operation, token: int, res: int, flags: int) -> None:
        seen.append(res)
        complete(self, token, res, flags)

    monkeypatch.setattr(Operation, "complete", spy)
    return seen


@pytest.fixture
def fifo(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FIFO, the opening of which blocks, as nobody has it open."""
    monkeypatch.setattr(_file_ops, "OPENAT", in_kernel_worker(_file_ops.OPENAT))
    return bench.fifo()


async def test_restart_codes_of_a_cancelled_operation_are_a_cancel(fifo: Path, results: list[int]) -> None:
    for _ in range(1000):  # if the cancel comes before the kernel's worker begins, the code is another one
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, lowlevel.openat, fifo, os.O_RDONLY)
            assert await attempt.cancel()
        if ERESTARTS.intersection(results):
            return
    pytest.fail("the kernel never gave a restart code")


async def test_an_fd_that_wins_against_its_cancel_is_handed_over(fifo: Path, bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.openat, fifo, os.O_RDONLY)
        writer = bench.keep(_open_writer(fifo))
        spin_until(manager().ring.pending)
        assert not await attempt.cancel()
        reader = bench.keep(attempt.value)
        os.write(writer, b"hello")
        assert os.read(reader, 9) == b"hello"
    assert statistics().cancels_lost == 1


def _open_writer(fifo: Path) -> int:
    """Opens it as soon as a reader has begun to."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            give_way()


async def test_an_accept_never_loses_a_connection(bench: Bench) -> None:
    """The client connects in the tick in which the accept is cancelled: accepted, or left for the next one."""
    listener = bench.listener()
    rounds = 100
    for _ in range(rounds):
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, lowlevel.accept, listener)
            with socket.socket() as client:
                client.connect(listener.getsockname())
                fd, address = await lowlevel.accept(listener) if await attempt.cancel() else attempt.value
                assert address == client.getsockname()
                os.close(fd)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


async def test_shielded_operation_goes_on(bench: Bench) -> None:
    a, b = bench.sockets()
    buffer = bytearray(9)

    async def shielded() -> None:
        with trio.CancelScope(shield=True):
            assert await lowlevel.recv(a, buffer) == 5

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, shielded)
        async with nothing_submitted():
            attempt.scope.cancel()
        b.send(b"hello")
        await attempt.result()


async def test_a_cancel_nobody_here_asked_for_is_an_error(bench: Bench) -> None:
    a, _ = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.recv, a, bytearray(1))
        assert await lowlevel.async_cancel(a) == 1
        with pytest.raises(OSError, match="cancel") as raised:
            await attempt.result()
    assert raised.value.errno == errno.ECANCELED


@pytest.mark.native("trio's own waits are epoll's")
async def test_a_cancelled_wait_for_readiness_is_released_at_once(bench: Bench) -> None:
    a, b = bench.sockets()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, trio.lowlevel.wait_readable, a)
        attempt.scope.cancel()
        another = Attempt(nursery, trio.lowlevel.wait_readable, a)  # not busy
        await attempt.settled()
        assert attempt.cancelled
        b.send(b"x")
        await another.result()
    await trio.testing.wait_all_tasks_blocked()
    assert statistics().cancels_asked == 1
    assert {op.operation for op in statistics().operations if op.fd == a.fileno()} == set()


async def _all(nursery: trio.Nursery, call: Any, *args: object) -> list[Attempt[Any]]:
    attempts: list[Attempt[Any]] = [Attempt(nursery, call, *args) for _ in range(STORM)]
    await trio.testing.wait_all_tasks_blocked()
    return attempts


@pytest.mark.ring(entries=64)
async def test_a_storm_of_cancels(bench: Bench) -> None:
    """10,000 operations cancelled at once through a queue of 64 entries: none is forgotten."""
    read_end, write_end = bench.pipe()
    async with trio.open_nursery() as nursery:
        attempts = await _all(nursery, lowlevel.read, read_end, bytearray(1))
        before = statistics()
        assert before.in_flight == STORM
        for attempt in attempts:
            attempt.scope.cancel()
        for attempt in attempts:
            await attempt.settled()
        assert all(attempt.cancelled for attempt in attempts)
    after = statistics()
    assert after.cancels_won == after.cancels_asked == STORM
    assert after.enters - before.enters < 500
    assert after.in_flight == 0
    os.write(write_end, b"x")
    assert os.read(read_end, 9) == b"x"


@pytest.mark.ring(entries=64)
async def test_a_storm_of_staged_operations_taken_back(bench: Bench) -> None:
    read_end, _ = bench.pipe()
    async with nothing_submitted(), trio.open_nursery() as nursery:
        attempts = [Attempt(nursery, lowlevel.read, read_end, bytearray(1)) for _ in range(STORM // 10)]
        for attempt in attempts:
            attempt.scope.cancel()  # before it starts: it parks in a cancelled scope
    assert all(attempt.cancelled for attempt in attempts)
