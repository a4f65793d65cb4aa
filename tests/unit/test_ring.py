"""The real ring alone: no trio, no tasks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import trio_uring
from trio_uring import RingConfig, RingError, UnavailableError, _errors, _native, _ring
from trio_uring._abi import CQE_F_MORE, NOP_INJECT_RESULT, SQE_IO_LINK, Opcode, Setup
from trio_uring._ring import INTERRUPTION, Ring, SQEs, SubmissionQueue, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.helpers import Bench

LONG = 10.0  # more than enough: a wait that should end early
SHORT = 0.01  # a wait that should not

IOSQE_BUFFER_SELECT = 1 << 5


@contextlib.contextmanager
def open_ring(*, enable: bool = True, **config: Any) -> Iterator[Ring]:
    ring = Ring(RingConfig(**{"entries": 8, "max_in_flight": 16, **config}))
    try:
        if enable:
            ring.enable()
        yield ring
    finally:
        ring.close()


@pytest.fixture
def ring() -> Iterator[Ring]:
    with open_ring() as ring:
        yield ring


def stage_nops(ring: SubmissionQueue, tokens: Sequence[int]) -> list[int]:
    return [ring.stage(Opcode.NOP, -1, 0, 0, 0, 0, token) for token in tokens]


def stage_poll(ring: SubmissionQueue, fd: int, token: int) -> int:
    return ring.stage(Opcode.POLL_ADD, fd, 0, 0, 0, select.POLLIN, token)


def cqes(events: list[int]) -> list[tuple[int, int, int]]:
    numbers = iter(events)
    return list(zip(numbers, numbers, numbers, strict=True))


def tokens(events: list[int]) -> list[int]:
    return events[::3]


def reap(ring: Ring, n: int) -> list[int]:
    """The user_data of ``n`` CQEs, however many ticks it takes, and of no more."""
    got: list[int] = []
    while len(got) < n:
        events = ring.tick(LONG)
        assert events, f"{n - len(got)} CQEs are missing"
        got += [token for token in tokens(events) if token != INTERRUPTION]
    assert ring.tick(SHORT) == []
    return got


def result_of(ring: Ring, *sqe: Any, **more: Any) -> int:
    """Submits one entry and waits for its result."""
    stage: Any = ring.stage
    stage(*sqe, 7, **more)
    ((token, res, _),) = cqes(ring.tick(LONG))
    assert token == 7
    return res


# Set-up


def test_the_ring_has_the_best_set_up_the_kernel_accepts() -> None:
    with open_ring() as ring:
        flags = ring.setup_flags
    assert flags in _ring._LADDER
    for better in _ring._LADDER[: _ring._LADDER.index(flags)]:
        attempt = _ring.lib.tu_new()
        assert _ring.lib.tu_open(attempt, 8, 16, better) == -errno.EINVAL
        _ring.lib.tu_free(attempt)


def test_flags_the_kernel_refuses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = Setup(1 << 31)
    with open_ring() as ring:
        best = ring.setup_flags
    monkeypatch.setattr(_ring, "_LADDER", (best | unknown, best))
    with open_ring() as ring:
        assert ring.setup_flags == best
    monkeypatch.setattr(_ring, "_LADDER", (best | unknown,))
    with pytest.raises(UnavailableError, match="refuses the ring's parameters"):
        Ring(RingConfig())


class Refusing:
    """The C side, but ring set-up fails."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.attempts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(_native.lib, name)

    def tu_open(self, *args: object) -> int:
        self.attempts += 1
        return -self.code


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_a_refused_ring_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refusing = Refusing(code)
    monkeypatch.setattr(_ring, "lib", refusing)
    with pytest.raises(UnavailableError) as caught:
        Ring(RingConfig())
    assert caught.value.errno == code
    assert refusing.attempts == 1, "only EINVAL means that other flags may do"


def test_no_fd_is_left_if_the_probe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ring: Any) -> frozenset[int]:
        raise UnavailableError(errno.EPERM, "no probe")

    monkeypatch.setattr(_ring, "_probe", broken)
    with pytest.raises(UnavailableError, match="no probe"):
        Ring(RingConfig())  # and `nothing_left_behind` looks for its fd


def test_too_many_open_files() -> None:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(UnavailableError, match="too many files") as caught:
            Ring(RingConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


def test_the_probe(ring: Ring) -> None:
    assert {Opcode.NOP, Opcode.READ, Opcode.ASYNC_CANCEL} <= ring.supported
    assert not ring.supported & set(range(200, 256))


@pytest.mark.parametrize(("entries", "cq_entries"), [(1, 1), (2, 2), (3, 3), (8, 100)])
def test_sizes(entries: int, cq_entries: int) -> None:
    with open_ring(entries=entries, cq_entries=cq_entries) as ring:
        sq, cq = ring.entries
        assert entries <= sq < 2 * entries
        assert cq_entries <= cq < 2 * max(cq_entries, 2)


def test_repr(ring: Ring) -> None:
    stage_nops(ring, [1, 2])
    assert f"fd={ring.fd}" in repr(ring)
    assert "staged=2" in repr(ring)


# Jobs

NOP = int(Opcode.NOP)
SLOT = 5
TOKEN = lib.TU_JOB | 7 << 40 | SLOT


class CountedJob:
    """Requests of which the ring counts the completions off."""

    def __init__(self, ring: Ring, size: int, *, slot: int = SLOT, each: bool = False) -> None:
        self._results = ffi.new("int32_t[]", size)
        self.token = TOKEN - SLOT + slot
        self.struct = ffi.new("struct tu_job *", (self.token, self._results, size, size, each))
        ring.set_job(slot, self.struct)

    @property
    def results(self) -> list[int]:
        return list(self._results)

    def cqe(self, position: int, res: int) -> tuple[int, int, int]:
        """What is told of one request."""
        return self.token | position << 20, res, CQE_F_MORE

    @property
    def end(self) -> tuple[int, int, int]:
        return self.token, self.struct.size, 0


def entries(*sqes: tuple[int, ...]) -> SQEs:
    """Of each the first fields: head, fd, off, addr, length, op flags."""
    made = SQEs(len(sqes))
    memory, _ = made.views()
    for n, sqe in enumerate(sqes):
        _ring.pack_sqe(memory, 64 * n, *sqe, *[0] * (6 - len(sqe)))
    return made


def stage_job(ring: Ring, token: int, *sqes: tuple[int, ...]) -> int:
    return ring.stage_job(entries(*sqes).memory, len(sqes), token)


def a_nop(res: int) -> tuple[int, ...]:
    return NOP, -1, 0, 0, res & 0xFFFFFFFF, NOP_INJECT_RESULT


def test_a_wait_goes_on_although_completions_of_a_job_are_there(ring: Ring) -> None:
    job = CountedJob(ring, 2)
    _keep, timeout = a_timeout(5)
    stage_job(ring, job.token, (NOP, -1), timeout)
    ring.flush()
    assert ring.pending()
    assert cqes(ring.tick(LONG)) == [job.end]


@pytest.mark.parametrize("slot", [SLOT, 64, 5000])
def test_a_job_is_counted_off(ring: Ring, slot: int) -> None:
    job = CountedJob(ring, 3, slot=slot)
    first = stage_nops(ring, [1])
    number = stage_job(ring, job.token, (NOP, -1), a_nop(-errno.EBADF), a_nop(7))
    last = stage_nops(ring, [2])
    assert [number, *last] == [first[0] + 1, first[0] + 4]
    events = cqes(ring.tick(LONG))
    assert events == [(1, 0, 0), job.end, (2, 0, 0)]
    assert job.results == [0, -errno.EBADF, 7]
    assert job.struct.left == 0
    assert ring.counters()["cqes"] == 5
    assert ring.counters()["submits"] == 1


def test_of_a_job_that_is_watched_each_completion_is_told(ring: Ring) -> None:
    job = CountedJob(ring, 3, each=True)
    stage_job(ring, job.token, (NOP, -1), a_nop(-errno.EBADF), (NOP, -1))
    assert cqes(ring.tick(LONG)) == [job.cqe(0, 0), job.cqe(1, -errno.EBADF), job.end]


def a_timeout(milliseconds: int) -> tuple[Any, tuple[int, ...]]:
    """What it needs to be kept for it, and its fields."""
    time = ffi.new("struct __kernel_timespec *", (0, milliseconds * 1_000_000))
    return time, (int(Opcode.TIMEOUT), -1, 0, int(ffi.cast("uintptr_t", time)), 1)


def test_a_wait_goes_on_while_only_a_job_goes_on(ring: Ring) -> None:
    job = CountedJob(ring, 2)
    _keep, timeout = a_timeout(5)
    stage_job(ring, job.token, (NOP, -1), timeout)
    assert cqes(ring.tick(LONG)) == [job.end]
    assert ring.counters()["enters"] > 1
    assert job.results == [0, -errno.ETIME]


def test_but_not_beyond_its_time_out(ring: Ring, bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    timeouts = [a_timeout(n) for n in range(1, 6)]
    job = CountedJob(ring, 6)
    poll = int(Opcode.POLL_ADD), read_end, 0, 0, 0, select.POLLIN
    stage_job(ring, job.token, *[fields for _, fields in timeouts], poll)
    start = time.monotonic()
    while events := ring.tick(SHORT):
        assert tokens(events) == [INTERRUPTION]
    assert SHORT <= time.monotonic() - start < LONG
    assert ring.tick(0) == []
    os.write(write_end, b"x")
    assert cqes(ring.tick(LONG)) == [job.end]
    assert ring.tick(SHORT) == []


def test_completions_of_a_former_job_are_passed_through(ring: Ring) -> None:
    """Whoever gets them can complain."""
    job = CountedJob(ring, 2)
    stale = job.token + (1 << 40)
    stage_job(ring, stale, (NOP, -1), (NOP, -1))
    assert cqes(ring.tick(LONG)) == [(stale, 0, 0), (stale | 1 << 20, 0, 0)]
    assert job.results == [lib.TU_PENDING, lib.TU_PENDING]
    assert job.struct.left == 2


def test_positions_a_job_does_not_have_are_passed_through(ring: Ring) -> None:
    job = CountedJob(ring, 2)
    stage_job(ring, job.token, (NOP, -1), (NOP, -1), (NOP, -1))
    assert cqes(ring.tick(LONG)) == [job.end, (job.token | 2 << 20, 0, 0)]
    stage_job(ring, job.token, (NOP, -1))
    assert cqes(ring.tick(LONG)) == [(job.token, 0, 0)], "it is over"


def test_without_its_job_a_completion_is_passed_through(ring: Ring) -> None:
    job = CountedJob(ring, 2)
    ring.set_job(SLOT, ffi.NULL)
    ring.set_job(SLOT, ffi.NULL)
    stage_job(ring, job.token, (NOP, -1), (NOP, -1))
    assert cqes(ring.tick(LONG)) == [(job.token, 0, 0), (job.token | 1 << 20, 0, 0)]
    stage_job(ring, lib.TU_JOB | 123456, (NOP, -1))
    assert tokens(ring.tick(LONG)) == [lib.TU_JOB | 123456]


def test_a_zero_copy_send_in_a_job(ring: Ring, bench: Bench) -> None:
    """Its result counts, and its notification ends it."""
    a, b = bench.sockets(socket.AF_INET)
    data = ffi.new("char[]", 1000)
    job = CountedJob(ring, 2)
    send = int(Opcode.SEND_ZC), a.fileno(), 0, int(ffi.cast("uintptr_t", data)), 1000
    stage_job(ring, job.token, send, (NOP, -1))
    assert cqes(ring.tick(LONG)) == [job.end]
    assert job.results == [1000, 0]
    assert ring.counters()["cqes"] == 3
    assert len(b.recv(2000)) == 1000


def test_more_requests_than_the_rings_hold() -> None:
    with open_ring(entries=4, cq_entries=4) as ring:
        job = CountedJob(ring, 3000)
        stage_job(ring, job.token, *[a_nop(n) for n in range(3000)])
        assert cqes(ring.tick(LONG)) == [job.end]
        assert job.results == list(range(3000))


def test_a_job_is_taken_back(ring: Ring) -> None:
    job = CountedJob(ring, 3)
    number = stage_job(ring, job.token, *[(NOP, -1)] * 3)
    stage_nops(ring, [1])
    for n in reversed(range(3)):
        ring.neutralise(number + n)
    assert cqes(ring.tick(LONG)) == [(1, 0, 0)]
    assert job.struct.left == 3


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("before", range(4))
def test_a_chain_is_never_divided(bench: Bench, before: int, flush: bool) -> None:
    """Where a submission ends, the kernel ends a chain."""
    read_end, write_end = bench.pipe()
    poll = int(Opcode.POLL_ADD) | SQE_IO_LINK << 8, read_end, 0, 0, 0, select.POLLIN
    with open_ring(entries=4) as ring:
        stage_nops(ring, [1] * before)
        job = CountedJob(ring, 12, each=True)
        stage_job(ring, job.token, *[poll, (NOP | SQE_IO_LINK << 8, -1), (NOP, -1)] * 4)
        if flush:
            ring.flush()
        assert all(token == 1 for token in tokens(ring.tick(SHORT)))
        assert job.struct.left == 12
        os.write(write_end, b"x")
        while job.struct.left:
            assert ring.tick(LONG)
        assert job.results == [select.POLLIN, 0, 0] * 4


def test_a_table_of_files(ring: Ring, bench: Bench) -> None:
    ring.register_files(100)
    path = ffi.new("char[]", os.fsencode(bench.fifo()))
    read_end = bench.keep(os.open(ffi.string(path), os.O_RDONLY | os.O_NONBLOCK))
    places = [3, 4, 5, 90]
    for place in places:
        index = 0, 0, place + 1, 0
        assert result_of(ring, Opcode.OPENAT, -100, 0, 0, 0, os.O_WRONLY, pin=path, extra=index) == 0
    ring.clear_files(places[:3])
    with pytest.raises(BlockingIOError):
        os.read(read_end, 1)
    ring.clear_files([*places, 1, 0])
    assert os.read(read_end, 1) == b""
    ring.clear_files([])
    with pytest.raises(OSError, match="Invalid argument"):
        ring.clear_files([100])


# The tick


def test_a_tick_submits_and_reaps(ring: Ring) -> None:
    stage_nops(ring, [1, 2, 3])
    assert cqes(ring.tick(LONG)) == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert not ring.staged
    counters = ring.counters()
    assert (counters["sqes"], counters["cqes"], counters["submits"]) == (3, 3, 1)


@pytest.mark.parametrize("timeout", [0, SHORT])
def test_nothing_is_the_answer_if_the_time_out_expired(ring: Ring, timeout: float) -> None:
    start = time.monotonic()
    assert ring.tick(timeout) == []
    assert time.monotonic() - start >= timeout


def test_a_wait_ends_with_the_first_completion(ring: Ring, bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    stage_poll(ring, read_end, 7)
    assert ring.tick(0) == []
    os.write(write_end, b"x")
    assert cqes(ring.tick(LONG)) == [(7, select.POLLIN, 0)]


def test_with_nothing_to_do_there_is_no_system_call(ring: Ring) -> None:
    before = ring.counters()["enters"]
    for _ in range(10):
        assert ring.tick(0) == []
    assert ring.counters()["enters"] == before


def test_what_is_there_already_is_reaped_without_a_system_call(ring: Ring) -> None:
    stage_nops(ring, [1, 2])
    ring.flush()
    before = ring.counters()["enters"]
    assert tokens(ring.tick(LONG)) == [1, 2]
    assert ring.counters()["enters"] == before


def test_submit_wait_and_reap_are_one_system_call(ring: Ring) -> None:
    ring.tick(0)
    before = ring.counters()["enters"]
    stage_nops(ring, range(1, 9))
    assert tokens(ring.tick(LONG)) == list(range(1, 9))
    assert ring.counters()["enters"] == before + 1


@pytest.mark.parametrize("entries", [1, 2, 4])
@pytest.mark.parametrize("flush", [False, True])
def test_more_operations_than_the_submission_queue_holds(entries: int, flush: bool) -> None:
    with open_ring(entries=entries, max_in_flight=600) as ring:
        stage_nops(ring, range(1, 601))
        if flush:
            ring.flush()
            assert not ring.staged
            assert ring.pending()
        assert reap(ring, 600) == list(range(1, 601))
        assert ring.counters()["sqes"] == 600


def test_the_completion_queue_overflows_and_nothing_is_lost() -> None:
    with open_ring(entries=2, cq_entries=2) as ring:
        stage_nops(ring, range(1, 801))
        assert sorted(reap(ring, 800)) == list(range(1, 801))
        assert ring.counters()["overflows"] > 0
        assert ring.counters()["cqes"] == 800


def test_more_completions_than_one_tick_hands_over() -> None:
    per_tick = _ring.lib.TU_CQES_PER_TICK
    n = 3 * per_tick
    with open_ring(max_in_flight=n) as ring:
        stage_nops(ring, range(1, n + 1))
        assert len(tokens(ring.tick(LONG))) == per_tick
        assert sorted(reap(ring, n - per_tick)) == list(range(per_tick + 1, n + 1))


def test_a_tick_reaps_more_than_the_kernel_does_at_once() -> None:
    """Deferred work is done in pieces; what is behind a flood of messages does not wait for a tick for each piece."""
    n = 500
    with open_ring(max_in_flight=n) as ring, open_ring() as other:
        for token in range(1, n + 1):
            assert result_of(other, Opcode.MSG_RING, ring.fd, token, 0, 0, 0) == 0
        assert tokens(ring.tick(LONG)) == list(range(1, n + 1))
        assert ring.counters()["overflows"] == 0


def test_pending(ring: Ring) -> None:
    assert not ring.pending()
    stage_nops(ring, [1])
    assert not ring.pending(), "it is only staged"
    ring.flush()
    assert ring.pending()
    ring.tick(0)
    assert not ring.pending()


def test_more_flag_reaches_python(ring: Ring, bench: Bench) -> None:
    poll_add_multi = 1
    read_end, write_end = bench.pipe()
    os.write(write_end, b"x")
    ring.stage(Opcode.POLL_ADD, read_end, 0, 0, poll_add_multi, select.POLLIN, 7)
    ((token, res, flags),) = cqes(ring.tick(LONG))
    assert (token, res, flags & CQE_F_MORE) == (7, select.POLLIN, CQE_F_MORE)


# Staging


def test_staging_grows_and_keeps_what_it_has() -> None:
    queue = SubmissionQueue(capacity=2)
    pins = [ffi.new("char[]", 8) for _ in range(9)]
    numbers = [queue.stage(i, i, i, 0, i, i, i, pin) for i, pin in enumerate(pins)]
    assert numbers == list(range(9))
    entries = [ffi.unpack(ffi.cast("uint64_t *", queue._memory) + 8 * i, 8) for i in range(9)]
    for i, (head_fd, off, addr, length_flags, user_data, *rest) in enumerate(entries):
        assert head_fd == length_flags == i | i << 32
        assert (off, user_data, rest) == (i, i, [0, 0, 0])
        assert addr == int(ffi.cast("uintptr_t", pins[i]))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("nops", [0, 3])
def test_a_finaliser_may_come_just_behind_a_tick(
    ring: Ring, flush: bool, nops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it stages goes to the kernel, and what the tick has submitted does not go there again."""
    tick = _ring._tick
    stage_nops(ring, range(1, nops + 1))

    def interrupted(*args: Any) -> int:
        got: int = tick(*args)
        monkeypatch.undo()
        stage_nops(ring, [8])
        if flush:
            ring.flush()
            stage_nops(ring, [9])
        return got

    monkeypatch.setattr(_ring, "_tick", interrupted)
    found = [*tokens(ring.tick(0)), *tokens(ring.tick(0)), *tokens(ring.tick(0))]
    assert sorted(found) == [*range(1, nops + 1), 8, *([9] if flush else [])]
    assert ring.counters()["sqes"] == len(found)
    assert ring.staged == 0


def test_more_than_the_first_staging_area_holds(ring: Ring) -> None:
    stage_nops(ring, range(1, 2001))
    assert ring.staged == 2000
    assert sorted(reap(ring, 2000)) == list(range(1, 2001))


def test_numbers_tell_who_has_an_entry(ring: Ring) -> None:
    first = stage_nops(ring, [1])[0]
    assert ring.is_staged(first)
    ring.flush()
    second = stage_nops(ring, [2])[0]
    assert not ring.is_staged(first)
    assert ring.is_staged(second)
    assert (first, second) == (0, 1)
    assert tokens(ring.tick(LONG)) == [1, 2]
    assert not ring.is_staged(second)


@pytest.mark.parametrize("taken_back", [[0], [2], [4], [0, 1, 2], [4, 3], [3, 4], [0, 2, 4], []])
def test_what_is_taken_back_is_never_submitted(ring: Ring, taken_back: list[int]) -> None:
    numbers = stage_nops(ring, range(10, 15))
    for i in taken_back:
        ring.neutralise(numbers[i])
    left = [10 + i for i in range(5) if i not in taken_back]
    assert reap(ring, len(left)) == left
    assert ring.counters()["sqes"] == len(left)


def test_if_everything_is_taken_back_there_is_no_system_call(ring: Ring) -> None:
    before = ring.counters()["enters"]
    for number in stage_nops(ring, [1, 2, 3]):
        ring.neutralise(number)
    assert ring.tick(0) == []
    assert ring.counters()["enters"] == before
    stage_nops(ring, [4])
    assert tokens(ring.tick(LONG)) == [4]


def test_the_number_of_the_last_entry_is_used_again(ring: Ring) -> None:
    ring.neutralise(stage_nops(ring, [1])[0])
    assert ring.staged == 0
    assert stage_nops(ring, [2]) == [0]
    assert tokens(ring.tick(LONG)) == [2]


GOOD = (0, -1, 0, 0, 0, 0, 1)
TOO_BIG = [
    (1 << 32, *GOOD[1:]),
    (-1, *GOOD[1:]),
    (0, 1 << 31, *GOOD[2:]),
    (0, -1, 1 << 63, *GOOD[3:]),
    (0, -1, 0, -1, *GOOD[4:]),
    (0, -1, 0, 1 << 64, *GOOD[4:]),
    (0, -1, 0, 0, -1, 0, 1),
    (0, -1, 0, 0, 1 << 32, 0, 1),
    (0, -1, 0, 0, 0, -1, 1),
    (0, -1, 0, 0, 0, 1 << 32, 1),
    (0, -1, 0, 0, 0, 0, -1),
    (0, -1, 0, 0, 0, 0, 1 << 64),
]


@pytest.mark.parametrize("values", TOO_BIG)
def test_values_that_do_not_fit(ring: Ring, values: tuple[int, int, int, int, int, int, int]) -> None:
    with pytest.raises(OverflowError, match="does not fit"):
        ring.stage(*values)
    assert ring.staged == 0


@pytest.mark.parametrize("extra", [(1 << 16, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1 << 31, 0), (0, 0, 0, 1 << 64)])
def test_extra_values_that_do_not_fit(ring: Ring, extra: tuple[int, int, int, int]) -> None:
    with pytest.raises(OverflowError):
        ring.stage(*GOOD, extra=extra)
    assert ring.staged == 0


@pytest.mark.parametrize("wrong", [{"fd": "1"}, {"off": None}, {"length": 1.5}, {"pin": "no pointer"}, {"pin": 5}])
def test_values_of_the_wrong_type(ring: Ring, wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = dict(
        zip(("head", "fd", "off", "addr", "length", "op_flags", "user_data"), GOOD, strict=True)
    )
    with pytest.raises(TypeError):
        ring.stage(**{**good, **wrong})
    assert ring.staged == 0
    stage_nops(ring, [2])
    assert tokens(ring.tick(LONG)) == [2]


# Operations


def test_a_pin_is_the_address(ring: Ring, bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    data, buffer = b"hello", bytearray(5)
    assert result_of(ring, Opcode.WRITE, write_end, -1, 0, 5, 0, pin=ffi.from_buffer(data)) == 5
    assert result_of(ring, Opcode.READ, read_end, -1, 0, 5, 0, pin=ffi.from_buffer(buffer)) == 5
    assert buffer == data


def test_a_failure_is_a_negative_errno(ring: Ring) -> None:
    assert result_of(ring, Opcode.FSYNC, 1 << 30, 0, 0, 0, 0) == -errno.EBADF


def test_a_cancel_by_user_data(ring: Ring, bench: Bench) -> None:
    read_end, _ = bench.pipe()
    stage_poll(ring, read_end, 7)
    ring.flush()
    ring.stage(Opcode.ASYNC_CANCEL, -1, 0, 7, 0, 0, 8)
    assert sorted(cqes(ring.tick(LONG))) == [(7, -errno.ECANCELED, 0), (8, 0, 0)]


def needs(ring: Ring, opcode: Opcode) -> None:
    if opcode not in ring.supported:
        pytest.skip(f"this kernel lacks {opcode.name}")


def test_an_opcode_newer_than_many_headers(ring: Ring, bench: Bench) -> None:
    needs(ring, Opcode.FTRUNCATE)
    fd = bench.file(b"hello")
    assert result_of(ring, Opcode.FTRUNCATE, fd, 3, 0, 0, 0) == 0
    assert os.fstat(fd).st_size == 3


def test_an_opcode_no_kernel_has(ring: Ring) -> None:
    assert result_of(ring, 250, -1, 0, 0, 0, 0) == -errno.EINVAL


def test_extra_file_index(ring: Ring, bench: Bench) -> None:
    source, sink = bench.pipe(), bench.pipe()
    os.write(source[1], b"hello")
    no_offset = (1 << 64) - 1
    assert result_of(ring, Opcode.SPLICE, sink[1], -1, no_offset, 5, 0, extra=(0, 0, source[0], 0)) == 5
    assert os.read(sink[0], 5) == b"hello"


def test_extra_buf_index(ring: Ring, bench: Bench) -> None:
    group, number, storage = 3, 9, ffi.new("char[]", 8)
    address = int(ffi.cast("uintptr_t", storage))
    assert result_of(ring, Opcode.PROVIDE_BUFFERS, 1, number, address, 8, 0, extra=(group, 0, 0, 0)) == 0
    read_end, write_end = bench.pipe()
    os.write(write_end, b"hello")
    ring.stage(Opcode.READ | IOSQE_BUFFER_SELECT << 8, read_end, -1, 0, 8, 0, 7, extra=(group, 0, 0, 0))
    ((_, res, flags),) = cqes(ring.tick(LONG))
    assert (res, flags >> 16) == (5, number)
    assert ffi.buffer(storage)[:5] == b"hello"


def test_extra_personality(ring: Ring) -> None:
    assert result_of(ring, Opcode.NOP, -1, 0, 0, 0, 0, extra=(0, 9, 0, 0)) == -errno.EINVAL
    assert result_of(ring, Opcode.NOP, -1, 0, 0, 0, 0) == 0, "the next user of that place has none"


def test_extra_addr3(ring: Ring) -> None:
    needs(ring, Opcode.FUTEX_WAIT)
    futex2_size_u32, mask = 2, 0xFFFFFFFF
    futex = ctypes.c_uint32(1)
    wait = (Opcode.FUTEX_WAIT, futex2_size_u32, 0, ctypes.addressof(futex), 0, 0)
    assert result_of(ring, *wait, extra=(0, 0, 0, mask)) == -errno.EAGAIN  # it is not 0
    assert result_of(ring, *wait, extra=(0, 0, 0, 0)) == -errno.EINVAL  # an empty mask


# Signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals the handler of SIGUSR1 has seen."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def bombarded() -> Iterator[None]:
    """SIGUSR1 for this thread, again and again: one arrives while it waits."""
    me, enough = threading.get_ident(), threading.Event()

    def bombard() -> None:
        while not enough.wait(0.002):
            signal.pthread_kill(me, signal.SIGUSR1)

    thread = threading.Thread(target=bombard)
    try:
        thread.start()
        yield
    finally:
        enough.set()
        thread.join()


@pytest.mark.parametrize("staged", [False, True])
def test_a_wait_that_a_signal_ends_is_no_time_out(ring: Ring, bench: Bench, handled: list[int], staged: bool) -> None:
    read_end, write_end = bench.pipe()
    if staged:
        stage_poll(ring, read_end, 7)
    with bombarded():
        assert ring.tick(LONG) == [INTERRUPTION, 0, 0]
    assert handled
    assert not ring.staged
    os.write(write_end, b"x")
    assert tokens(ring.tick(LONG if staged else SHORT)) == [7] * staged


def test_an_exception_from_a_signal_handler_submits_nothing_twice(ring: Ring, bench: Bench) -> None:
    class FromHandler(Exception):
        pass

    armed = False

    def handler(number: int, frame: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise FromHandler

    def wait() -> None:
        nonlocal armed
        armed = True
        while True:
            ring.tick(LONG)

    read_end, write_end = bench.pipe()
    stage_poll(ring, read_end, 7)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with bombarded(), pytest.raises(FromHandler):
            wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    os.write(write_end, b"x")
    assert reap(ring, 1) == [7]
    assert ring.counters()["sqes"] == 1


def test_an_exception_from_a_signal_handler_loses_no_completion(ring: Ring, bench: Bench) -> None:
    class FromHandler(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise FromHandler

    read_end, write_end = os.pipe()
    os.close(read_end)
    bench.keep(write_end)
    data = ffi.from_buffer(b"x")
    ring.stage(Opcode.WRITE, write_end, -1, 0, 1, 0, 7, data)  # the signal comes with the result
    before = signal.signal(signal.SIGPIPE, handler)
    try:
        with pytest.raises(FromHandler):
            ring.tick(LONG)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert cqes([*ring.rescued, *ring.tick(SHORT)]) == [(7, -errno.EPIPE, 0)]


# Threads


def in_thread(function: Callable[[], object]) -> None:
    """Calls it in another thread; raises what it raises."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()


def test_another_thread_may_not_use_it(ring: Ring) -> None:
    if Setup.SINGLE_ISSUER not in ring.setup_flags:
        pytest.skip("this kernel lets any thread submit")
    stage_nops(ring, [1])
    for use in (lambda: ring.tick(0), ring.flush, lambda: ring.register_eventfd(0)):
        with pytest.raises(RingError, match="another thread"):
            in_thread(use)
    assert reap(ring, 1) == [1], "submitted once"


def test_any_thread_may_ask_whether_something_is_pending(ring: Ring) -> None:
    stage_nops(ring, [1])
    ring.flush()
    in_thread(ring.pending)


def test_a_ring_belongs_to_the_thread_that_enables_it() -> None:
    with open_ring(enable=False) as ring:

        def use() -> None:
            ring.enable()
            stage_nops(ring, [1])
            assert tokens(ring.tick(LONG)) == [1]

        in_thread(use)


def test_a_ring_that_is_not_enabled_cannot_be_used() -> None:
    with open_ring(enable=False) as ring:
        stage_nops(ring, [1])
        with pytest.raises(RingError, match="not enabled"):
            ring.tick(0)
        with pytest.raises(RingError, match="not enabled"):
            ring.flush()
        ring.enable()
        assert reap(ring, 1) == [1], "submitted once"


# Eventfd


def test_an_eventfd_is_signalled_by_the_kernel(ring: Ring, bench: Bench) -> None:
    fd = bench.keep(os.eventfd(0, os.EFD_NONBLOCK))
    read_end, write_end = bench.pipe()
    ring.register_eventfd(fd)
    stage_poll(ring, read_end, 7)
    ring.flush()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    os.write(write_end, b"x")
    assert select.select([fd], [], [], LONG)[0] == [fd]
    assert ring.pending()
    assert tokens(ring.tick(0)) == [7]


# Close


def test_a_closed_ring_says_so() -> None:
    with open_ring() as ring:
        stage_nops(ring, [1])
    ring.close()
    assert ring.closed
    assert repr(ring) == "<Ring closed>"
    uses: list[Callable[[], object]] = [
        lambda: ring.tick(0),
        ring.flush,
        ring.pending,
        ring.enable,
        ring.counters,
        lambda: ring.register_eventfd(0),
        lambda: (ring.fd, ring.features, ring.setup_flags, ring.entries, ring.forked),
    ]
    for use in uses:
        with pytest.raises(RingError, match="closed"):
            use()


def test_closing_closes_the_fd() -> None:
    with open_ring() as ring:
        fd = ring.fd
        os.fstat(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_forgotten_ring_is_closed() -> None:
    ring = Ring(RingConfig())
    fd = ring.fd
    del ring
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# Fork


def in_child(function: Callable[[], object]) -> bool:
    """Calls it in a forked child: did it return?"""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_cannot_touch_the_ring(ring: Ring, bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    stage_poll(ring, read_end, 7)
    ring.flush()
    stage_nops(ring, [8])
    fd = ring.fd

    def child() -> None:
        assert ring.forked
        for use in (lambda: ring.tick(0), ring.flush, ring.pending, ring.enable, lambda: ring.register_eventfd(0)):
            with pytest.raises(RingError, match="parent"):
                use()
        assert ring.staged == 1
        ring.close()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    assert in_child(child)
    assert not ring.forked
    os.write(write_end, b"x")
    assert sorted(reap(ring, 2)) == [7, 8]


def test_a_forked_child_may_have_a_ring_of_its_own(ring: Ring) -> None:
    def child() -> None:
        with open_ring() as own:
            stage_nops(own, [1])
            assert tokens(own.tick(LONG)) == [1]
            assert not own.forked

    assert in_child(child)
    stage_nops(ring, [2])
    assert tokens(ring.tick(LONG)) == [2]


# A thread of the kernel polls the submission queue


@pytest.mark.parametrize(("entries", "n"), [(8, 5), (4, 600)])
@pytest.mark.parametrize("flush", [False, True])
def test_sqpoll(entries: int, n: int, flush: bool) -> None:
    with open_ring(entries=entries, max_in_flight=600, sqpoll=True) as ring:
        assert Setup.SQPOLL in ring.setup_flags
        stage_nops(ring, range(1, n + 1))
        if flush:
            ring.flush()
        assert sorted(reap(ring, n)) == list(range(1, n + 1))
        assert ring.counters()["sqes"] == n


# The configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {"entries": 0},
        {"entries": 32769},
        {"cq_entries": 255},
        {"cq_entries": 65537},
        {"max_in_flight": 0},
        {"max_in_flight": 1 << 20},
        {"max_workers": (-1, 0)},
        {"max_workers": (0, -1)},
        {"mode": "maybe"},
    ],
)
def test_a_configuration_that_cannot_be(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name.removeprefix("cq_")):
        RingConfig(**wrong)


@pytest.mark.parametrize(
    ("config", "cq_entries"),
    [
        ({}, 16384),
        ({"max_in_flight": 1}, 512),
        ({"entries": 4, "max_in_flight": 100}, 100),
        ({"max_in_flight": 1 << 17}, 65536),
        ({"cq_entries": 300}, 300),
    ],
)
def test_the_completion_queue_is_sized_to_the_limit(config: dict[str, Any], cq_entries: int) -> None:
    assert RingConfig(**config).effective_cq_entries == cq_entries


@pytest.mark.parametrize(
    ("variable", "effective"), [(None, "require"), ("", "require"), ("off", "off"), ("AUTO", "auto")]
)
def test_the_environment_overrides_the_mode(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, effective: str
) -> None:
    if variable is None:
        monkeypatch.delenv("TRIO_URING", raising=False)
    else:
        monkeypatch.setenv("TRIO_URING", variable)
    assert RingConfig(mode="require").effective_mode == effective


def test_the_environment_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_URING", "maybe")
    with pytest.raises(ValueError, match="TRIO_URING"):
        _ = RingConfig().effective_mode
    with pytest.raises(ValueError, match="TRIO_URING"):
        trio_uring.is_available()


# Is it available?


def test_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIO_URING", raising=False)
    assert trio_uring.is_available()
    assert trio_uring.why_not() is None
    capabilities = trio_uring.capabilities()
    assert capabilities.kernel == os.uname().release
    assert "NOP" in capabilities.operations
    assert set(capabilities.operations) | set(capabilities.missing) == {opcode.name for opcode in Opcode}
    assert not set(capabilities.operations) & set(capabilities.missing)
    assert json.loads(json.dumps(capabilities.as_dict())) == capabilities.as_dict()
    for word in (capabilities.kernel, capabilities.liburing, *capabilities.setup_flags, *capabilities.features):
        assert word in str(capabilities)


def test_switched_off_by_the_environment_without_a_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ring(config: RingConfig) -> Ring:
        raise AssertionError("some sandboxes kill for less")

    monkeypatch.setenv("TRIO_URING", "off")
    monkeypatch.setattr(_ring, "Ring", no_ring)
    assert not trio_uring.is_available()
    assert "TRIO_URING" in (trio_uring.why_not() or "")
    with pytest.raises(UnavailableError):
        trio_uring.capabilities()


@pytest.mark.parametrize(
    ("code", "disabled", "seccomp", "words"),
    [
        (errno.EPERM, 2, False, "every process (kernel.io_uring_disabled is 2)"),
        (errno.EPERM, 1, False, "processes outside kernel.io_uring_group"),
        (errno.EPERM, 2, True, "sysctl kernel.io_uring_disabled=0"),
        (errno.EACCES, 1, False, "kernel.io_uring_disabled is 1"),
        (errno.EPERM, 0, True, "seccomp"),
        (errno.ENOSYS, 0, True, "seccomp"),
        (errno.EACCES, 0, True, "seccomp"),
        (errno.ENOSYS, 2, False, "Linux 5.11"),
        (errno.ENOSYS, 0, False, "Linux 5.11"),
        (errno.ENOMEM, 0, False, "ulimit -l"),
        (errno.EMFILE, 0, False, "ulimit -n"),
        (errno.ENFILE, 0, True, "too many files"),
        (errno.EINVAL, 0, False, "Linux 6.1"),
        (errno.EPERM, 0, False, os.strerror(errno.EPERM)),
        (errno.EIO, 2, True, os.strerror(errno.EIO)),
    ],
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, code: int, disabled: int, seccomp: bool, words: str) -> None:
    monkeypatch.delenv("TRIO_URING", raising=False)
    monkeypatch.setattr(_errors, "_io_uring_disabled", lambda: disabled)
    monkeypatch.setattr(_errors, "_seccomp_filter_active", lambda: seccomp)
    monkeypatch.setattr(_ring, "lib", Refusing(code))
    reason = trio_uring.why_not()
    assert reason is not None
    assert words in reason
    assert not trio_uring.is_available()
    with pytest.raises(UnavailableError) as caught:
        trio_uring.capabilities()
    assert (caught.value.errno, caught.value.strerror) == (code, reason)


@pytest.mark.parametrize(("text", "value"), [("0\n", 0), ("1\n", 1), ("2\n", 2), ("?\n", 0), (None, 0)])
def test_reading_the_sysctl(monkeypatch: pytest.MonkeyPatch, text: str | None, value: int) -> None:
    read_from(monkeypatch, "/proc/sys/kernel/io_uring_disabled", text)
    assert _errors._io_uring_disabled() == value


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n", True),
        ("Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t0\n", False),
        ("Name:\tSeccomp:\t2\n", False),
        (None, False),
    ],
)
def test_reading_the_seccomp_status(monkeypatch: pytest.MonkeyPatch, text: str | None, active: bool) -> None:
    read_from(monkeypatch, "/proc/self/status", text)
    assert _errors._seccomp_filter_active() is active


def read_from(monkeypatch: pytest.MonkeyPatch, name: str, text: str | None) -> None:
    """The file has this content; None: there is no such file."""

    def read_text(path: Path) -> str:
        assert str(path) == name
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
