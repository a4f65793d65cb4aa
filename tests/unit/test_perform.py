"""`UringIOManager.perform` and its surroundings, step by step against a kernel that answers what the test says."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.lowlevel import Abort

from tests.unit.by_hand import (
    ByHand,
    CancelledByTest,
    ScriptedRing,
    Task,
    kind,
    no_garbage_collection,
    pinned,
    raise_cancel,
)
from trio_uring import RingConfig, RingError, UnsupportedOperation, _core
from trio_uring._abi import CQE_F_MORE, CQE_F_NOTIF, Opcode
from trio_uring._cancel import State
from trio_uring._core import POLL_IN, POLL_OUT
from trio_uring._ring import ffi
from trio_uring._socket import RECV_SELECTING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_uring.testing import Entry

FD = 500_000  # no real one
SIZE = 8
ERESTARTSYS = 512
READ = kind(Opcode.READ, wait_for=select.POLLIN)
RECV = kind(Opcode.RECV, wait_for=select.POLLIN, direction="read")
WRITE = kind(Opcode.WRITE)
SEND_ZC = kind(Opcode.SEND_ZC, wait_for=select.POLLOUT, direction="write")
NOP = kind(Opcode.NOP)


class Bench(ByHand):
    """Two slots, and a kernel by script."""

    ring: ScriptedRing

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: RingConfig) -> None:
        self.ring = ScriptedRing(config)
        super().__init__(monkeypatch, self.ring)

    def on_buffer(self, row: Any, fd: int = FD) -> tuple[Task, bytearray]:
        buffer = bytearray(SIZE)
        return self.start(row, fd, -1, ffi.from_buffer(buffer), -1), buffer

    def receiving(self) -> Task:
        """A new task receives into whichever of the ring's buffers."""

        async def receive() -> bytes | None:
            waiting = self.manager.receive(RECV_SELECTING, FD, SIZE)
            return None if waiting is None else await waiting

        task = Task(receive())
        self._step(task)
        return task

    def cancels(self) -> list[Entry]:
        """What the next tick asks the kernel to cancel."""
        return [entry for entry in self.ring.staging if entry.opcode == Opcode.ASYNC_CANCEL]

    def complete(self, task: Task, res: int, flags: int = 0) -> None:
        """Its operation has a CQE."""
        self.ring.answer(task.token, res, flags)
        self.tick()

    def finish(self, task: Task, res: int) -> Task:
        self.complete(task, res)
        return self.resume(task)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(monkeypatch, RingConfig(entries=2, max_in_flight=2))
    with no_garbage_collection():
        yield bench
        bench.ring.obliging = True
        bench.manager.close()


# Results


@pytest.mark.parametrize("res", [0, 1, SIZE])
def test_a_result_is_returned(bench: Bench, res: int) -> None:
    task, _ = bench.on_buffer(READ)
    assert bench.finish(task, res).result == res


def test_a_failure_is_an_oserror_with_the_file_name(bench: Bench) -> None:
    task = bench.start(kind(Opcode.OPENAT), -100, filename="name")
    error = bench.finish(task, -errno.ENOENT).error
    assert type(error) is FileNotFoundError
    assert (error.errno, error.strerror, error.filename) == (errno.ENOENT, os.strerror(errno.ENOENT), "name")


def test_a_negative_result_may_be_a_success(bench: Bench) -> None:
    task = bench.start(kind(Opcode.TIMEOUT, success=frozenset({-errno.ETIME})))
    assert bench.finish(task, -errno.ETIME).result == -errno.ETIME


def test_an_operation_the_kernel_lacks_is_not_submitted(bench: Bench) -> None:
    task = bench.start(kind(Opcode.FIXED_FD_INSTALL, name="install", since="6.8"))
    assert isinstance(task.error, UnsupportedOperation)
    assert task.error.errno == errno.EOPNOTSUPP
    assert "FIXED_FD_INSTALL" in str(task.error)
    assert "6.8" in str(task.error)


def test_what_does_not_fit_is_not_submitted(bench: Bench) -> None:
    task = bench.start(NOP, 1 << 40)
    assert isinstance(task.error, OverflowError)
    assert bench.manager.statistics().in_flight == 0
    assert bench.finish(bench.start(NOP), 0).result == 0


@pytest.mark.parametrize("res", [-errno.EINTR, *range(-ERESTARTSYS - 4, -ERESTARTSYS + 1)])
def test_an_interrupted_operation_is_tried_again(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(WRITE)
    first = bench.ring.staging[-1]
    assert bench.finish(task, res).parked
    again = bench.ring.staging[-1]
    assert again == first._replace(user_data=again.user_data)
    assert again.user_data != first.user_data
    assert pinned(buffer)
    assert bench.finish(task, SIZE).result == SIZE


@pytest.mark.parametrize(("row", "poll"), [(RECV, POLL_IN), (SEND_ZC, POLL_OUT)])
def test_what_would_block_is_tried_again_when_the_fd_is_ready(bench: Bench, row: Any, poll: Any) -> None:
    task, buffer = bench.on_buffer(row)
    first = bench.ring.staging[-1]
    assert bench.finish(task, -errno.EAGAIN).parked
    assert task.operation is not None
    assert task.operation.kind is poll
    assert bench.ring.staging[-1][:5] == (Opcode.POLL_ADD, 0, 0, FD, 0)
    assert pinned(buffer)
    assert bench.finish(task, row.wait_for).parked
    assert bench.ring.staging[-1]._replace(user_data=0) == first._replace(user_data=0)
    assert bench.finish(task, 3).result == 3


def test_would_block_is_an_answer_where_nobody_waits(bench: Bench) -> None:
    task, _ = bench.on_buffer(WRITE)
    assert isinstance(bench.finish(task, -errno.EAGAIN).error, BlockingIOError)


# Cancel


def test_a_cancel_before_the_tick_submits_nothing(bench: Bench) -> None:
    task, buffer = bench.on_buffer(READ)
    assert bench.cancel(task) is Abort.SUCCEEDED
    assert isinstance(bench.resume(task).error, CancelledByTest)
    assert FD not in {entry.fd for entry in bench.ring.staging}
    assert not pinned(buffer)
    assert bench.manager.statistics().cancels_asked == 0


@pytest.mark.parametrize("res", [-errno.ECANCELED, -errno.EINTR, -ERESTARTSYS, -ERESTARTSYS - 4])
def test_a_cancel_that_wins(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(READ)
    bench.tick()
    assert bench.cancel(task) is Abort.FAILED
    assert (bench.ring.staging[-1].opcode, bench.ring.staging[-1].addr) == (Opcode.ASYNC_CANCEL, task.token)
    assert task.parked
    assert pinned(buffer)
    assert isinstance(bench.finish(task, res).error, CancelledByTest)
    assert bench.manager.cancels_won == 1


@pytest.mark.parametrize("res", [0, SIZE])
def test_a_cancel_that_comes_too_late(bench: Bench, res: int) -> None:
    task, _ = bench.on_buffer(READ)
    bench.tick()
    bench.cancel(task)
    assert bench.finish(task, res).result == res
    assert bench.manager.cancels_lost == 1


def test_a_failure_in_spite_of_a_cancel_is_reported(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    bench.tick()
    bench.cancel(task)
    error = bench.finish(task, -errno.EIO).error
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO


def test_ecanceled_that_nobody_asked_for_is_an_oserror(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    error = bench.finish(task, -errno.ECANCELED).error
    assert isinstance(error, OSError)
    assert error.errno == errno.ECANCELED


def test_a_slot_forgets_who_was_cancelled_in_it(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    bench.tick()
    bench.cancel(task)
    bench.finish(task, SIZE)
    other, _ = bench.on_buffer(READ)
    assert other.operation is task.operation
    assert bench.finish(other, -errno.EINTR).parked, "tried again"


def test_a_poll_is_released_at_once(bench: Bench) -> None:
    task = bench.start(POLL_IN, FD)
    bench.tick()
    token = task.token
    assert bench.cancel(task) is Abort.SUCCEEDED
    assert isinstance(bench.resume(task).error, CancelledByTest)
    assert bench.ring.staging[-1].addr == token
    bench.ring.answer(token, -errno.ECANCELED, 0)
    bench.tick()
    assert bench.manager.statistics().operations == ()


# Memory


@pytest.mark.parametrize("res", [0, SIZE, -errno.EIO])
def test_a_buffer_is_free_once_the_last_cqe_is_there(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(READ)
    assert pinned(buffer)
    bench.complete(task, res)
    assert not pinned(buffer)
    bench.resume(task)


def test_a_failure_that_means_success_frees_the_buffer_too(bench: Bench) -> None:
    task, buffer = bench.on_buffer(kind(Opcode.WRITE, success=frozenset({-errno.EINTR})))
    bench.complete(task, -errno.EINTR)
    assert not pinned(buffer)
    assert bench.resume(task).result == -errno.EINTR


def raise_again(task: Task) -> None:
    assert task.error is not None
    raise task.error


@pytest.mark.parametrize("res", [-errno.EIO, -errno.EAGAIN])
def test_an_error_in_hand_does_not_hold_the_buffer(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(WRITE)
    bench.finish(task, res)
    with pytest.raises(OSError, match=os.strerror(-res)):
        raise_again(task)
    assert not pinned(buffer)


@pytest.mark.parametrize("res", [-errno.ECANCELED, -errno.EINTR, -ERESTARTSYS])
def test_a_cancellation_in_hand_does_not_hold_the_buffer(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(WRITE)
    bench.tick()
    bench.cancel(task)
    bench.finish(task, res)
    assert isinstance(task.error, CancelledByTest)
    assert not pinned(buffer)


def test_a_cancel_while_it_waits_for_readiness_frees_the_buffer_at_once(bench: Bench) -> None:
    task, buffer = bench.on_buffer(READ)
    bench.finish(task, -errno.EAGAIN)
    bench.tick()
    bench.cancel(task)
    bench.resume(task)
    assert isinstance(task.error, CancelledByTest)
    assert not pinned(buffer)


@pytest.mark.parametrize("in_kernel", [False, True])
def test_a_cancellation_leaves_no_garbage(bench: Bench, in_kernel: bool) -> None:
    task, _ = bench.on_buffer(READ)
    if in_kernel:
        bench.tick()
        bench.cancel(task)
        bench.complete(task, -errno.ECANCELED)
    else:
        bench.cancel(task)
    bench.resume(task)
    assert task.error is not None
    error = weakref.ref(task.error)
    task.error = None
    assert error() is None, "it refers to itself"


@pytest.mark.parametrize("notification", [0, -(1 << 31)])
def test_zero_copy_holds_the_buffer_until_its_notification(bench: Bench, notification: int) -> None:
    task, buffer = bench.on_buffer(SEND_ZC)
    token = task.token
    bench.complete(task, 5, CQE_F_MORE)
    assert bench.resume(task).result == 5
    assert pinned(buffer)
    bench.ring.answer(token, notification, CQE_F_NOTIF)
    bench.tick()
    assert not pinned(buffer)


def test_zero_copy_may_notify_before_the_task_runs(bench: Bench) -> None:
    task, buffer = bench.on_buffer(SEND_ZC)
    bench.ring.answer(task.token, 5, CQE_F_MORE, task.token, -(1 << 31), CQE_F_NOTIF)
    bench.tick()
    assert not pinned(buffer)
    assert bench.resume(task).result == 5


def test_zero_copy_that_fails_may_owe_a_notification(bench: Bench) -> None:
    task, buffer = bench.on_buffer(SEND_ZC)
    token = task.token
    bench.complete(task, -errno.ENOBUFS, CQE_F_MORE)
    error = bench.resume(task).error
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOBUFS
    assert pinned(buffer)
    bench.ring.answer(token, 0, CQE_F_NOTIF)
    bench.tick()
    assert not pinned(buffer)


def test_zero_copy_is_tried_again_while_the_first_try_still_owes_its_notification(bench: Bench) -> None:
    task, buffer = bench.on_buffer(SEND_ZC)
    first = task.token
    bench.complete(task, -errno.EINTR, CQE_F_MORE)
    assert bench.resume(task).parked
    second = task.token
    assert second & 0xFFFFF != first & 0xFFFFF, "another slot"
    bench.complete(task, SIZE, CQE_F_MORE)
    assert bench.resume(task).result == SIZE
    for token in (first, second):
        assert pinned(buffer)
        bench.ring.answer(token, 0, CQE_F_NOTIF)
        bench.tick()
    assert not pinned(buffer)


@pytest.mark.parametrize("res", [-errno.EINTR, -errno.EAGAIN])
def test_zero_copy_is_tried_again_after_its_notification(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(SEND_ZC)
    first = bench.ring.staging[-1]
    bench.ring.answer(task.token, res, CQE_F_MORE, task.token, 0, CQE_F_NOTIF)
    bench.tick()
    bench.resume(task)
    if res == -errno.EAGAIN:
        bench.finish(task, select.POLLOUT)
    assert bench.ring.staging[-1].addr == first.addr
    assert pinned(buffer)


# Slots


def test_the_limit_is_kept_and_waiting_is_fair(bench: Bench) -> None:
    tasks = [bench.start(NOP) for _ in range(5)]
    assert bench.manager.statistics().in_flight == 2
    assert bench.manager.statistics().waiting_for_slot == 3
    for i in range(3):
        bench.finish(tasks[i], 0)
        assert [task.woken for task in tasks[i + 2 :]] == [True] + [False] * (2 - i)
        assert bench.resume(tasks[i + 2]).parked
        assert bench.manager.statistics().in_flight == 2
    assert bench.manager.statistics().peak == 2


def test_readiness_polls_do_not_count(bench: Bench) -> None:
    for fd in range(FD, FD + 5):
        bench.start(POLL_IN, fd)
    assert bench.manager.statistics().in_flight == 0
    assert bench.manager.statistics().tasks_waiting_read == 5


def test_a_wait_for_a_slot_is_cancelled(bench: Bench) -> None:
    tasks = [bench.start(NOP) for _ in range(4)]
    assert bench.cancel(tasks[2]) is Abort.SUCCEEDED
    assert isinstance(bench.resume(tasks[2]).error, CancelledByTest)
    bench.finish(tasks[0], 0)
    assert bench.resume(tasks[3]).parked
    assert bench.manager.statistics().waiting_for_slot == 0


def test_a_slot_is_passed_on_by_who_cannot_use_it(bench: Bench) -> None:
    bench.on_buffer(RECV)
    holder = bench.start(NOP)
    too_many, _ = bench.on_buffer(RECV)
    last = bench.start(NOP)
    bench.finish(holder, 0)
    assert isinstance(bench.resume(too_many).error, trio.BusyResourceError)
    assert bench.resume(last).parked


# Busy


@pytest.mark.parametrize(("first", "second"), [(RECV, RECV), (RECV, POLL_IN), (POLL_IN, RECV), (POLL_OUT, SEND_ZC)])
def test_one_task_in_one_direction(bench: Bench, first: Any, second: Any) -> None:
    bench.on_buffer(first)
    task, buffer = bench.on_buffer(second)
    assert isinstance(task.error, trio.BusyResourceError)
    assert not pinned(buffer)


@pytest.mark.parametrize(("first", "second"), [(RECV, SEND_ZC), (READ, READ), (POLL_IN, POLL_OUT), (WRITE, RECV)])
def test_not_in_each_others_way(bench: Bench, first: Any, second: Any) -> None:
    bench.on_buffer(first)
    assert bench.on_buffer(second)[0].parked


def test_a_released_poll_is_not_busy(bench: Bench) -> None:
    task = bench.start(POLL_IN, FD)
    bench.tick()
    bench.cancel(task)
    assert bench.on_buffer(RECV)[0].parked


# Close


def close_error(task: Task) -> bool:
    return isinstance(task.error, trio.ClosedResourceError)


def test_what_is_staged_when_its_fd_is_closed_is_never_submitted(bench: Bench) -> None:
    tasks = [bench.on_buffer(READ)[0], bench.start(POLL_IN, FD), bench.start(POLL_OUT, FD)]
    bench.manager.notify_closing(FD)
    assert FD not in {entry.fd for entry in bench.ring.staging}
    assert all(close_error(bench.resume(task)) for task in tasks)


def test_what_is_in_flight_when_its_fd_is_closed_is_cancelled_at_once(bench: Bench) -> None:
    task, buffer = bench.on_buffer(READ)
    poll = bench.start(POLL_IN, FD)
    bench.tick()
    bench.manager.notify_closing(FD)
    assert not bench.ring.staged
    assert close_error(bench.resume(poll))
    assert task.parked
    assert pinned(buffer)
    assert close_error(bench.finish(task, -errno.ECANCELED))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["cancel", "close"], CancelledByTest),
        (["close", "cancel"], CancelledByTest),
        (["close"], trio.ClosedResourceError),
    ],
)
def test_closed_and_cancelled(bench: Bench, events: list[str], expected: type[BaseException]) -> None:
    task, _ = bench.on_buffer(READ)
    bench.tick()
    for event in events:
        if event == "cancel":
            bench.cancel(task)
        else:
            bench.manager.notify_closing(FD)
    assert isinstance(bench.finish(task, -errno.ECANCELED).error, expected)
    assert bench.manager.statistics().cancels_asked == 1


@pytest.mark.parametrize("receives", [False, True])
def test_a_cancel_that_comes_between_two_tries_is_asked_again(bench: Bench, receives: bool) -> None:
    """The kernel does not find the operation, which goes on. What it does not find because it has ended is let be."""
    task = bench.receiving() if receives else bench.on_buffer(RECV)[0]
    bench.tick()
    bench.cancel(task)
    for _ in range(3):
        (cancel,) = bench.cancels()
        assert cancel.addr == task.token
        bench.ring.answer(cancel.user_data, -errno.ENOENT, 0)
        bench.tick()
    assert isinstance(bench.finish(task, -errno.ECANCELED).error, CancelledByTest)
    bench.ring.answer(cancel.user_data, -errno.ENOENT, 0)
    bench.tick()
    assert not bench.cancels()
    assert bench.manager.statistics().cancels_asked == 1


def test_a_result_that_was_there_first_survives_a_close(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    bench.complete(task, SIZE)
    bench.manager.notify_closing(FD)
    assert bench.resume(task).result == SIZE


@pytest.mark.parametrize("res", [-errno.EINTR, -errno.EAGAIN, -ERESTARTSYS])
def test_nothing_is_tried_again_on_a_closed_fd(bench: Bench, res: int) -> None:
    task, buffer = bench.on_buffer(READ)
    bench.complete(task, res)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))
    assert FD not in {entry.fd for entry in bench.ring.staging}
    assert not pinned(buffer)


@pytest.mark.parametrize("res", [-errno.EINTR, -ERESTARTSYS])
def test_nothing_is_received_again_from_a_closed_fd(bench: Bench, res: int) -> None:
    task = bench.receiving()
    bench.complete(task, res)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))
    assert FD not in {entry.fd for entry in bench.ring.staging}


def test_nothing_is_tried_again_on_an_fd_closed_when_it_became_ready(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    bench.finish(task, -errno.EAGAIN)
    bench.complete(task, select.POLLIN)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))
    assert FD not in {entry.fd for entry in bench.ring.staging}


def test_an_fd_closed_when_it_became_half_closed_is_not_waited_for(bench: Bench) -> None:
    task, _ = bench.on_buffer(SEND_ZC)
    bench.finish(task, -errno.EAGAIN)
    bench.complete(task, select.POLLRDHUP)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))


def test_a_task_that_waits_for_a_slot_does_not_use_a_closed_fd(bench: Bench) -> None:
    holders = [bench.start(NOP), bench.start(NOP)]
    task, buffer = bench.on_buffer(READ)
    other = bench.start(NOP)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))
    assert not pinned(buffer)
    assert bench.manager.statistics().waiting_for_slot == 1
    for holder in holders:
        bench.finish(holder, 0)
    bench.resume(other)
    assert bench.start(NOP).operation is not None


def test_a_slot_handed_to_a_closed_fd_is_passed_on(bench: Bench) -> None:
    holders = [bench.start(NOP), bench.start(NOP)]
    task, _ = bench.on_buffer(READ)
    bench.finish(holders[0], 0)
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(task))
    bench.finish(holders[1], 0)
    for _ in range(2):
        assert bench.start(NOP).operation is not None, "its slot is free again"


def test_a_reused_number_is_not_busy(bench: Bench) -> None:
    task, _ = bench.on_buffer(RECV)
    bench.tick()
    bench.manager.notify_closing(FD)
    other, _ = bench.on_buffer(RECV)
    assert other.parked, "another file with the same number"
    bench.manager.notify_closing(FD)
    assert close_error(bench.resume(other))
    assert close_error(bench.finish(task, -errno.ECANCELED))
    assert bench.manager.statistics().cancels_asked == 1, "the first is not concerned by the second close"


@pytest.mark.parametrize("fd", [-1, -100])
def test_negative_numbers_are_no_fds(bench: Bench, fd: int) -> None:
    task = bench.start(NOP, fd)
    bench.manager.notify_closing(fd)
    bench.tick()
    bench.manager.notify_closing(fd)
    assert bench.finish(task, 0).result == 0


# Statistics


def test_only_waiting_tasks_are_counted_as_waiting(bench: Bench) -> None:
    task = bench.start(POLL_IN, FD)
    bench.start(POLL_OUT, FD)
    statistics = bench.manager.statistics()
    assert (statistics.tasks_waiting_read, statistics.tasks_waiting_write) == (1, 1)
    bench.complete(task, select.POLLIN)
    assert bench.manager.statistics().tasks_waiting_read == 0


def test_the_live_table(bench: Bench) -> None:
    task, _ = bench.on_buffer(READ)
    (row,) = bench.manager.statistics().operations
    assert (row.operation, row.fd, row.task, row.state) == ("read", FD, Task.name, "STAGED")
    assert row.age >= 0
    bench.tick()
    task.generator.close()
    (row,) = bench.manager.statistics().operations
    assert (row.task, row.state) == (None, "DETACHED")
    bench.ring.answer(task.token, 0, 0)
    bench.tick()
    assert bench.manager.statistics().operations == ()


# The end of a run


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench that the test closes."""
    bench = Bench(monkeypatch, RingConfig(entries=2, max_in_flight=2))
    monkeypatch.setattr(_core, "_kept_for_ever", [])
    monkeypatch.setattr(_core, "DRAIN_SECONDS", 0.01)
    with no_garbage_collection():
        yield bench
        assert bench.ring.closed


def test_a_run_ends_when_the_last_cqe_is_there(ending: Bench) -> None:
    task, buffer = ending.on_buffer(READ)
    ending.tick()
    staged = ending.start(NOP)
    token = task.token
    ending.ring.answer()
    ending.ring.answer(token, -errno.ECANCELED, 0)
    ending.manager.close()
    assert not ending.ring.script
    task.generator.close()
    staged.generator.close()
    assert not pinned(buffer)


def test_memory_the_kernel_does_not_give_back_is_kept_for_ever(ending: Bench) -> None:
    task, buffer = ending.on_buffer(READ)
    ending.tick()
    with pytest.warns(ResourceWarning, match="1 operations the kernel did not give back"):
        ending.manager.close()
    task.generator.close()
    assert pinned(buffer)
    assert [operation.state for operation in _core._kept_for_ever] == [State.DETACHED]
    _core._kept_for_ever.clear()


def test_memory_is_kept_for_ever_if_draining_fails(ending: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(timeout: float) -> list[int]:
        raise RingError("broken")

    task, buffer = ending.on_buffer(READ)
    ending.tick()
    monkeypatch.setattr(ending.ring, "tick", broken)
    with pytest.warns(ResourceWarning, match="1 operations"), contextlib.suppress(RingError):
        ending.manager.close()
    task.generator.close()
    assert pinned(buffer)
    _core._kept_for_ever.clear()


def test_the_rest_of_a_tick_that_failed_is_not_lost(ending: Bench) -> None:
    tasks = [ending.start(NOP), ending.start(NOP)]
    ending.tick()
    nonsense = 1 << 40 | tasks[0].token
    ending.ring.answer(nonsense, 0, 0, tasks[0].token, 0, 0, tasks[1].token, 0, 0)
    with pytest.raises(RingError, match="former life"):
        ending.tick()
    ending.manager.close()  # or the two could not be drained, and it would warn
    for task in tasks:
        task.generator.close()


def test_an_fd_that_nobody_receives_is_closed(ending: Bench) -> None:
    disposed = []
    row = kind(Opcode.OPENAT, dispose=lambda res, keep: disposed.append((res, keep)))
    keep = object()
    tasks = [ending.start(row, keep=keep), ending.start(row, keep=keep)]
    ending.complete(tasks[0], FD)  # its task does not run any more
    ending.ring.answer(tasks[1].token, FD + 1, 0)
    ending.manager.close()
    assert disposed == [(FD, keep), (FD + 1, keep)]
    for task in tasks:
        task.generator.close()
    assert len(disposed) == 2


def test_who_waits_for_a_slot_gets_none_from_a_closing_run(ending: Bench) -> None:
    tasks = [ending.start(NOP) for _ in range(3)]
    ending.manager.close()
    assert tasks[2].parked
    for task in tasks:
        task.generator.close()


def test_late_calls_are_harmless(ending: Bench) -> None:
    task, _ = ending.on_buffer(READ)
    ending.tick()
    ending.ring.answer(task.token, SIZE, 0)
    ending.manager.close()
    ending.manager.close()
    assert task.abort is not None
    assert task.abort(raise_cancel) is Abort.FAILED
    ending.manager.notify_closing(FD)
    task.generator.close()


def test_a_forked_child_drains_nothing(ending: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = ending.on_buffer(READ)
    ending.tick()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        ending.manager.close()
    task.generator.close()


# Tear-down of a task while its run goes on


def test_an_abandoned_operation_is_cancelled_and_its_memory_kept(bench: Bench) -> None:
    task, buffer = bench.on_buffer(READ)
    bench.tick()
    token = task.token
    task.generator.close()
    assert bench.ring.staging[-1].addr == token
    assert pinned(buffer)
    bench.ring.answer(token, -errno.ECANCELED, 0)
    bench.tick()
    assert not pinned(buffer)


def test_an_abandoned_operation_that_is_only_staged_is_taken_back(bench: Bench) -> None:
    task, buffer = bench.on_buffer(READ)
    task.generator.close()
    assert FD not in {entry.fd for entry in bench.ring.staging}
    assert not pinned(buffer)


# Waking up


def test_force_wakeup_is_a_cqe_of_its_own(bench: Bench) -> None:
    (poll,) = bench.ring.staging
    assert poll.opcode == Opcode.POLL_ADD
    bench.manager.force_wakeup()
    bench.manager.force_wakeup()
    bench.ring.answer(poll.user_data, select.POLLIN, 0)
    bench.tick()
    assert bench.ring.staging == (poll,), "armed again"
    with pytest.raises(BlockingIOError):
        os.eventfd_read(poll.fd)
