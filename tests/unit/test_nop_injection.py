"""Results the kernel seldom gives, from the kernel: a NOP whose result is chosen, through a real ring.

The simulated ring says what such results do to an operation. Here the same comes through the kernel's own queues.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from trio.lowlevel import Abort

import trio_uring
from tests.helpers import Attempt, Bench, manager
from tests.unit.by_hand import ByHand, CancelledByTest, kind
from trio_uring import RingConfig
from trio_uring._abi import NOP_INJECT_RESULT, Opcode
from trio_uring._ring import Ring

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = RingConfig(entries=8, max_in_flight=16, mode="require")
NOP = kind(Opcode.NOP)
POSITIVE = 12345
ERESTARTSYS = 512


def as_length(res: int) -> int:
    """The result goes into a field without a sign."""
    return res & 0xFFFFFFFF


@pytest.fixture(scope="module", autouse=True)
def the_kernel_injects() -> None:
    ring = Ring(CONFIG)
    try:
        ring.enable()
        ring.stage(Opcode.NOP, -1, 0, 0, POSITIVE, NOP_INJECT_RESULT, 1)
        res = ring.tick(10)[1]
    finally:
        ring.close()
    if res != POSITIVE:
        pytest.skip("this kernel's NOP does not take its result from the entry (Linux 6.11 does)")


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHand]:
    by_hand = ByHand(monkeypatch, Ring(CONFIG))
    by_hand.tick()
    yield by_hand
    by_hand.manager.close()


@pytest.mark.parametrize("res", [0, POSITIVE, -1, -errno.EAGAIN, -ERESTARTSYS, -(1 << 31), (1 << 31) - 1])
def test_any_result_comes_through_the_ring(res: int) -> None:
    ring = Ring(CONFIG)
    try:
        ring.enable()
        ring.stage(Opcode.NOP, -1, 0, 0, as_length(res), NOP_INJECT_RESULT, 7)
        assert ring.tick(10) == [7, res, 0]
    finally:
        ring.close()


FAILURES = [errno.EAGAIN, errno.ENOBUFS, errno.ECANCELED, errno.EIO]
INTERRUPTIONS = [-errno.EINTR, -ERESTARTSYS, -ERESTARTSYS - 4]


async def nop(res: int, *, fd: int = -1, wait_for: int = 0) -> int:
    row = dataclasses.replace(NOP, wait_for=wait_for)
    return await manager().perform(row, fd, length=as_length(res), op_flags=NOP_INJECT_RESULT)


def test_a_result_is_returned() -> None:
    assert trio_uring.run(nop, POSITIVE, config=CONFIG) == POSITIVE


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_is_an_oserror(code: int) -> None:
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        trio_uring.run(nop, -code, config=CONFIG)
    assert caught.value.errno == code


async def until_submitted(n: int) -> None:
    """Returns when ``n`` more entries have gone to the kernel."""
    goal = trio_uring.statistics().sqes + n
    while trio_uring.statistics().sqes < goal:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("res", INTERRUPTIONS)
def test_an_interrupted_operation_is_tried_again_until_it_is_cancelled(res: int) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nop, res)
            await until_submitted(10)
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        assert trio_uring.statistics().in_flight == 0

    trio_uring.run(main, config=CONFIG)


def test_would_block_waits_for_readiness(bench: Bench) -> None:
    read_end, write_end = bench.pipe()

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def attempt() -> None:
                await nop(-errno.EAGAIN, fd=read_end, wait_for=select.POLLIN)

            nursery.start_soon(attempt)
            await trio.testing.wait_all_tasks_blocked()
            before = trio_uring.statistics()
            assert before.in_flight == 0, "it is not the NOP that waits"
            assert [row.fd for row in before.operations].count(read_end) == 1
            os.write(write_end, b"x")
            await until_submitted(4)  # at least: try again, wait again, twice
            nursery.cancel_scope.cancel()

    trio_uring.run(main, config=CONFIG)


# With a cancel on its way. A NOP is done as soon as it is submitted: here before anybody looks, so the cancel
# comes too late, and what it means is decided by the operation's own result.


@pytest.mark.parametrize("res", [-errno.ECANCELED, *INTERRUPTIONS])
def test_interrupted_with_a_cancel_pending_is_cancelled(by_hand: ByHand, res: int) -> None:
    task = by_hand.start(NOP, length=as_length(res), op_flags=NOP_INJECT_RESULT)
    by_hand.manager.ring.flush()
    assert by_hand.cancel(task) is Abort.FAILED
    by_hand.tick()
    assert isinstance(by_hand.resume(task).error, CancelledByTest)
    assert by_hand.manager.statistics().cancels_won == 1


@pytest.mark.parametrize("res", [-errno.ECANCELED, *INTERRUPTIONS])
def test_interrupted_with_a_close_pending_is_closed(by_hand: ByHand, res: int) -> None:
    fd = 500_000  # no real one; a NOP does not look at it
    task = by_hand.start(NOP, fd, length=as_length(res), op_flags=NOP_INJECT_RESULT)
    by_hand.manager.ring.flush()
    by_hand.manager.notify_closing(fd)
    by_hand.tick()
    assert isinstance(by_hand.resume(task).error, trio.ClosedResourceError)


@pytest.mark.parametrize("res", [0, POSITIVE])
def test_a_result_beats_a_cancel(by_hand: ByHand, res: int) -> None:
    task = by_hand.start(NOP, length=as_length(res), op_flags=NOP_INJECT_RESULT)
    by_hand.manager.ring.flush()
    by_hand.cancel(task)
    by_hand.tick()
    assert by_hand.resume(task).result == res
    assert by_hand.manager.statistics().cancels_lost == 1


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOBUFS, errno.EIO])
def test_a_failure_beats_a_cancel(by_hand: ByHand, code: int) -> None:
    task = by_hand.start(NOP, length=as_length(-code), op_flags=NOP_INJECT_RESULT)
    by_hand.manager.ring.flush()
    by_hand.cancel(task)
    by_hand.tick()
    error = by_hand.resume(task).error
    assert isinstance(error, OSError)
    assert error.errno == code


async def done_but_not_reaped_when_cancelled(res: int) -> Attempt[int]:
    def flush_and_cancel() -> None:
        manager().ring.flush()
        attempt.scope.cancel()
        assert trio_uring.statistics().cancels_asked == 1

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, nop, res, once_parked=flush_and_cancel)
    return attempt


@pytest.mark.parametrize("res", [-errno.ECANCELED, *INTERRUPTIONS])
def test_interrupted_with_a_cancel_pending_is_cancelled_in_a_run(res: int) -> None:
    attempt = trio_uring.run(done_but_not_reaped_when_cancelled, res, config=CONFIG)
    assert attempt.cancelled


def test_a_result_beats_a_cancel_in_a_run() -> None:
    attempt = trio_uring.run(done_but_not_reaped_when_cancelled, POSITIVE, config=CONFIG)
    assert not attempt.cancelled
    assert attempt.value == POSITIVE
