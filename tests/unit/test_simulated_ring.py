"""The simulated ring does everything it promises, and nothing else."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from typing import Any

import pytest

from trio_uring import RingConfig, RingError
from trio_uring._abi import CQE_F_MORE, CQE_F_NOTIF, SQE_IO_HARDLINK, SQE_IO_LINK, Opcode
from trio_uring._ring import INTERRUPTION, Ring, SQEs, SubmissionQueue, ffi, lib, pack_sqe
from trio_uring.testing import PATTERN, Entry, SimulatedRing

TAME = 0
SIZE = 10


class Tame:
    """The tame kernel."""

    def randrange(self, n: int, /) -> int:
        return TAME


def stage(
    ring: SubmissionQueue, opcode: Opcode, token: int, *, addr: int = 0, length: int = 0, op_flags: int = 0
) -> int:
    return ring.stage(int(opcode), 5, 0, addr, length, op_flags, token)


def run_dry(ring: SimulatedRing) -> list[tuple[int, int, int]]:
    """All CQEs, those of interrupted waits left out."""
    cqes = []
    while ring.staged or ring.in_flight:
        events = iter(ring.tick(1.0))
        cqes += [cqe for cqe in zip(events, events, events, strict=True) if cqe[0] != INTERRUPTION]
    assert ring.tick(1.0) in ([], [INTERRUPTION, 0, 0])
    return cqes


def histories(seeds: range = range(400)) -> list[SimulatedRing]:
    return [SimulatedRing(random.Random(seed), config=RingConfig(entries=4, cq_entries=4)) for seed in seeds]


def results_of(opcode: Opcode, *, length: int = 0, op_flags: int = 0) -> Counter[int]:
    buffer = ffi.new("char[]", SIZE)
    addr = int(ffi.cast("uintptr_t", buffer))
    seen: Counter[int] = Counter()
    for ring in histories():
        stage(ring, opcode, 7, addr=addr, length=length, op_flags=op_flags)
        seen.update(res for _, res, flags in run_dry(ring) if not flags & CQE_F_NOTIF)
    return seen


def test_the_tame_kernel_does_everything_at_once_and_in_order() -> None:
    ring = SimulatedRing(Tame())
    for token in range(1, 6):
        stage(ring, Opcode.WRITE, token, length=SIZE)
    assert ring.tick(0) == [number for token in range(1, 6) for number in (token, SIZE, 0)]
    assert ring.tick(1.0) == []


def test_a_seed_repeats_a_history() -> None:
    def history(seed: int) -> list[tuple[int, int, int]]:
        ring = SimulatedRing(random.Random(seed))
        for token in range(1, 20):
            stage(ring, Opcode.SEND_ZC, token, length=SIZE)
        return run_dry(ring)

    assert history(1) == history(1) != history(2)


def test_completions_come_in_every_order() -> None:
    orders = set()
    for ring in histories():
        for token in (1, 2, 3):
            stage(ring, Opcode.POLL_ADD, token)
        orders.add(tuple(token for token, _, _ in run_dry(ring)))
    assert len(orders) == 6


FAULTS = {-errno.EINTR, -errno.EAGAIN, -errno.ENOBUFS, -512}


def test_transfers_are_short_and_fail() -> None:
    assert set(results_of(Opcode.SEND, length=SIZE)) == FAULTS | set(range(1, SIZE + 1))
    assert set(results_of(Opcode.RECV, length=SIZE)) == FAULTS | set(range(SIZE + 1))
    assert set(results_of(Opcode.FSYNC)) == FAULTS | {0}


def test_some_operations_do_not_fail() -> None:
    assert set(results_of(Opcode.POLL_ADD, op_flags=4)) == {4}
    assert set(results_of(Opcode.TIMEOUT)) == {-errno.ETIME}
    assert set(results_of(Opcode.CLOSE)) == {0}
    assert set(results_of(Opcode.RECV_ZC)) == {-errno.EINVAL}
    assert set(results_of(Opcode.READ_MULTISHOT)) == FAULTS  # there are no buffers


def test_faults_are_the_tests_choice() -> None:
    ring = SimulatedRing(faults=())
    for token in range(200):
        stage(ring, Opcode.FSYNC, token + 1)
    assert {res for _, res, _ in run_dry(ring)} == {0}


def test_a_read_fills_what_it_reports_and_no_more() -> None:
    for ring in histories(range(100)):
        buffer = ffi.new("char[]", SIZE)
        ring.stage(int(Opcode.READ), 5, 0, 0, SIZE, 0, 7, buffer)
        ((_, res, _),) = run_dry(ring)
        count = max(res, 0)
        assert bytes(ffi.buffer(buffer)) == bytes([PATTERN]) * count + bytes(SIZE - count)


def test_a_zero_copy_send_ends_with_its_notification() -> None:
    shapes = set()
    for ring in histories():
        stage(ring, Opcode.SEND_ZC, 7, length=SIZE)
        cqes = run_dry(ring)
        assert {token for token, _, _ in cqes} == {7}
        shapes.add(tuple((res if res < 0 else SIZE, flags) for _, res, flags in cqes))
    results = {(SIZE, CQE_F_MORE), *((fault, CQE_F_MORE) for fault in FAULTS)}
    notifications = {(SIZE, CQE_F_NOTIF), (-(1 << 31), CQE_F_NOTIF)}
    alone = {((fault, 0),) for fault in FAULTS}
    assert shapes == alone | {(result, notification) for result in results for notification in notifications}


def test_every_outcome_of_a_cancel_in_every_order() -> None:
    seen = set()
    for ring in histories(range(4000)):
        stage(ring, Opcode.SEND, 7, length=1)
        stage(ring, Opcode.ASYNC_CANCEL, 1, addr=7)
        seen.add(tuple((token, res) for token, res, _ in run_dry(ring)))
    own = {1, *FAULTS}
    ends = {-errno.ECANCELED, -errno.EINTR, -512, *own}
    pairs = {((7, res), (1, answer)) for answer in (0, -errno.EALREADY) for res in ends}
    pairs |= {((7, res), (1, -errno.ENOENT)) for res in own}
    assert seen == pairs | {(cancel, target) for target, cancel in pairs}


@pytest.mark.parametrize("opcode", [Opcode.SEND, Opcode.SEND_ZC])
def test_a_cancel_of_what_has_its_result_finds_nothing(opcode: Opcode) -> None:
    for ring in histories(range(100)):
        stage(ring, opcode, 7, length=1)
        while not ring.pending():
            ring.flush()
        stage(ring, Opcode.ASYNC_CANCEL, 1, addr=7)
        assert (1, -errno.ENOENT, 0) in run_dry(ring)


def test_a_cancel_of_nothing_finds_nothing() -> None:
    for ring in histories(range(20)):
        stage(ring, Opcode.ASYNC_CANCEL, 1, addr=7)
        assert run_dry(ring) == [(1, -errno.ENOENT, 0)]


def test_fds_are_accounted_for() -> None:
    ring = SimulatedRing(Tame())
    for token, opcode in enumerate((Opcode.OPENAT, Opcode.OPENAT2, Opcode.ACCEPT, Opcode.SOCKET), 1):
        stage(ring, opcode, token)
    first, second, *others = fds = [res for _, res, _ in run_dry(ring)]
    assert ring.open_fds == set(fds)
    ring.close_fd(first)
    ring.stage(int(Opcode.CLOSE), second, 0, 0, 0, 0, 7)
    ring.stage(int(Opcode.CLOSE), second, 0, 0, 0, 0, 8)
    assert run_dry(ring) == [(7, 0, 0), (8, -errno.EBADF, 0)]
    assert ring.open_fds == set(others)
    with pytest.raises(OSError, match="Bad file"):
        ring.close_fd(first)
    with pytest.raises(OSError, match="Bad file"):
        os.close(others[0])  # never a real one


def test_the_completion_queue_overflows() -> None:
    ring = SimulatedRing(Tame(), config=RingConfig(entries=2, cq_entries=3))
    for token in range(1, 9):
        stage(ring, Opcode.NOP, token)
    assert [len(ring.tick(0)) // 3 for _ in range(4)] == [3, 3, 2, 0]
    assert ring.counters()["overflows"] == 5
    assert ring.counters()["cqes"] == ring.counters()["sqes"] == 8


def test_entries_are_left_when_the_kernel_takes_only_some() -> None:
    seen = set()
    for ring in histories():
        for token in range(1, 4):
            stage(ring, Opcode.POLL_ADD, token)
        events = ring.tick(0)
        seen.add(ring.staged)
        assert ring.counters()["stalls"] == (ring.staged > 0)
        assert [entry.user_data for entry in ring.staging] == [1, 2, 3][3 - ring.staged :]
        assert events or not ring.staged, "[] says that the time-out expired"
    assert seen == {0, 1, 2, 3}


def test_a_wait_ends_for_nothing_now_and_then() -> None:
    answers = {tuple(ring.tick(1.0)) for ring in histories()}
    assert answers == {(), (INTERRUPTION, 0, 0)}


def test_neutralised_entries_are_never_seen() -> None:
    ring = SimulatedRing(Tame())
    numbers = [stage(ring, Opcode.NOP, token) for token in range(1, 6)]
    for number in (numbers[0], numbers[2], numbers[4]):
        ring.neutralise(number)
    assert [entry.user_data for entry in ring.staging] == [2, 4]
    assert [token for token, _, _ in run_dry(ring)] == [2, 4]
    assert ring.counters()["sqes"] == 2


def test_what_is_in_flight_stays_so_until_its_last_cqe_is_handed_out() -> None:
    ring = SimulatedRing(Tame())
    stage(ring, Opcode.SEND_ZC, 7, length=1)
    assert not ring.in_flight
    ring.flush()
    assert tuple(entry.user_data for entry in ring.in_flight) == (7,)
    assert ring.pending()
    assert ring.tick(0) == [7, 1, CQE_F_MORE, 7, 0, CQE_F_NOTIF]
    assert not ring.in_flight
    assert not ring.pending()


# Chains and jobs


def run_chain(ring: SimulatedRing, *steps: tuple[Opcode, int]) -> list[tuple[int, int]]:
    """Steps 1, 2 and so on: opcode and link flag; the results as they come."""
    for token, (opcode, link) in enumerate(steps, 1):
        ring.stage(opcode | link << 8, 5, 0, 0, SIZE, 0, token)
    return [(token, res) for token, res, _ in run_dry(ring)]


def test_steps_of_a_chain_follow_one_another() -> None:
    for ring in histories(range(100)):
        steps = [(Opcode.POLL_ADD, SQE_IO_LINK), (Opcode.POLL_ADD, SQE_IO_HARDLINK), (Opcode.POLL_ADD, 0)]
        assert run_chain(ring, *steps, (Opcode.CLOSE, 0))[0][0] in (1, 4)
        assert ring.counters()["sqes"] == 4
    orders = {tuple(run_chain(ring, *steps)) for ring in histories(range(100))}
    assert orders == {((1, 0), (2, 0), (3, 0))}


def test_a_failed_or_short_step_ends_its_chain() -> None:
    ways = set()
    for ring in histories():
        cqes = run_chain(ring, (Opcode.WRITE, SQE_IO_LINK), (Opcode.POLL_ADD, SQE_IO_HARDLINK), (Opcode.POLL_ADD, 0))
        (_, res), *others = cqes
        assert others == ([(2, 0), (3, 0)] if res == SIZE else [(2, -errno.ECANCELED), (3, -errno.ECANCELED)])
        ways.add("done" if res == SIZE else "short" if res > 0 else "failed")
    assert ways == {"done", "short", "failed"}


def test_a_hard_link_holds() -> None:
    ways = set()
    for ring in histories(range(100)):
        (_, res), second = run_chain(ring, (Opcode.FSYNC, SQE_IO_HARDLINK), (Opcode.POLL_ADD, 0))
        assert second == (2, 0)
        ways.add(res)
    assert len(ways) > 1


def test_a_chain_is_taken_as_a_whole() -> None:
    for ring in histories():
        stage(ring, Opcode.NOP, 1)
        for token, link in ((2, SQE_IO_LINK), (3, SQE_IO_LINK), (4, 0), (5, 0)):
            ring.stage(Opcode.NOP | link << 8, 5, 0, 0, 0, 0, token)
        ring.tick(0)
        assert ring.staged in (0, 1, 4, 5)


def test_a_cancel_finds_no_step_that_has_not_begun() -> None:
    answers = set()
    for ring in histories():
        ring.stage(Opcode.POLL_ADD | SQE_IO_LINK << 8, 5, 0, 0, 0, 0, 7)
        stage(ring, Opcode.POLL_ADD, 8)
        ring.flush()
        seen = {entry.user_data for entry in ring.in_flight}
        assert seen == {7, 8}
        done = [token for token, _, _ in zip(*[iter(ring.tick(0))] * 3, strict=True)]
        stage(ring, Opcode.ASYNC_CANCEL, 1, addr=8)
        answer = next(res for token, res, _ in run_dry(ring) if token == 1)
        answers.add((7 in done, answer == -errno.ENOENT))
    assert answers >= {(False, True), (True, True), (True, False)}


def new_job(ring: SimulatedRing, size: int, *, each: bool = False) -> tuple[Any, Any, int]:
    results = ffi.new("int32_t[]", size)
    token = lib.TU_JOB | 3 << 40 | 5
    job = ffi.new("struct tu_job *", (token, results, size, size, each))
    ring.set_job(5, job)
    return job, results, token


def stage_job(ring: SimulatedRing, token: int, *opcodes: Opcode) -> None:
    sqes = SQEs(len(opcodes))
    memory, _ = sqes.views()
    for position, opcode in enumerate(opcodes):
        pack_sqe(memory, 64 * position, opcode, 5, 0, 0, SIZE, 0)
    ring.stage_job(sqes.memory, len(opcodes), token)


def test_a_job_is_counted_off() -> None:
    for ring in histories(range(100)):
        job, results, token = new_job(ring, 3)
        stage_job(ring, token, Opcode.POLL_ADD, Opcode.SEND_ZC, Opcode.POLL_ADD)
        assert run_dry(ring) == [(token, 3, 0)]
        assert (results[0], results[2], job.left) == (0, 0, 0)
        assert results[1] > 0 or results[1] in FAULTS
        assert ring.counters()["cqes"] in (3, 4)


def test_of_a_job_that_is_watched_each_completion_is_told() -> None:
    for ring in histories(range(100)):
        _job, _results, token = new_job(ring, 3, each=True)
        stage_job(ring, token, Opcode.POLL_ADD, Opcode.SEND_ZC, Opcode.FSYNC)
        *told, last = run_dry(ring)
        assert last == (token, 3, 0)
        assert len(told) == 2
        assert {flags for _, _, flags in told} == {CQE_F_MORE}


def test_what_belongs_to_no_job_is_passed_through() -> None:
    ring = SimulatedRing(Tame())
    job, results, token = new_job(ring, 1)
    stage_job(ring, token + (1 << 40), Opcode.NOP)
    assert run_dry(ring) == [(token + (1 << 40), 0, 0)]
    stage_job(ring, token, Opcode.NOP, Opcode.NOP)
    assert run_dry(ring) == [(token, 1, 0), (token | 1 << 20, 0, 0)]
    stage_job(ring, token, Opcode.NOP)
    assert run_dry(ring) == [(token, 0, 0)], "it is over"
    job.left = 1
    ring.set_job(5, ffi.NULL)
    ring.set_job(5, ffi.NULL)
    stage_job(ring, token, Opcode.NOP)
    assert run_dry(ring) == [(token, 0, 0)]
    assert results[0] == 0


def test_an_entry_is_decoded() -> None:
    ring = SimulatedRing()
    ring.stage(Opcode.SEND | 0x10 << 8 | 0x1234 << 16, -100, -1, 1 << 63, 0xFFFFFFFF, 0x80000000, (1 << 63) - 1)
    assert ring.staging == (
        Entry(
            opcode=Opcode.SEND,
            flags=0x10,
            ioprio=0x1234,
            fd=-100,
            off=-1,
            addr=1 << 63,
            length=0xFFFFFFFF,
            op_flags=0x80000000,
            user_data=(1 << 63) - 1,
        ),
    )


def test_an_eventfd_tells_of_completions() -> None:
    ring = SimulatedRing(Tame())
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        ring.register_eventfd(fd)
        stage(ring, Opcode.NOP, 7)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        ring.flush()
        assert os.eventfd_read(fd) == 1
    finally:
        os.close(fd)


def test_after_close_every_use_is_an_error() -> None:
    ring = SimulatedRing()
    ring.enable()
    ring.close()
    ring.close()
    for use in (
        ring.enable,
        ring.flush,
        ring.pending,
        ring.counters,
        lambda: ring.tick(0),
        lambda: ring.register_eventfd(1),
    ):
        with pytest.raises(RingError):
            use()


def test_a_forked_child_cannot_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = SimulatedRing()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert ring.forked
    with pytest.raises(RingError):
        ring.tick(0)


def test_it_has_what_the_manager_uses_of_a_ring() -> None:
    public = {name for name in vars(Ring) if not name.startswith("_")}
    assert public - {"fd", "setup_flags", "features"} <= {*dir(SimulatedRing()), "config", "supported"}
