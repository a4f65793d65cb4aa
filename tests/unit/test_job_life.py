"""The life of jobs, on a simulated ring: completions in any order; cancels, closes, the end of the run in between.

As in `test_life_cycle`, a state machine plays trio's part by hand. A call is what a batch does: it borrows slots, runs
a `Job`, picks the results up.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import outcome
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trio.lowlevel import Abort

from tests.unit.by_hand import CancelledByTest, kind, pinned, raise_cancel
from trio_uring import RingConfig, _core
from trio_uring._abi import CQE_F_NOTIF, SQE_IO_HARDLINK, SQE_IO_LINK, Opcode
from trio_uring._cancel import INDEX_BITS, INDEX_MASK, Kind, Operation, State
from trio_uring._core import UringIOManager
from trio_uring._errors import INTERRUPTED, ChainBrokenError
from trio_uring._job import Job, values_of
from trio_uring._ring import SQEs, ffi, lib, pack_sqe
from trio_uring.testing import SimulatedRing

if TYPE_CHECKING:
    import random
    from collections.abc import Generator, Sequence

    from trio_uring._ring import Ring
    from trio_uring.testing import Entry

SIZE: Final = 8
FDS: Final = range(500_000, 500_003)  # no real fds
MAX_IN_FLIGHT: Final = 6
NAMES: Final = ["read", "write", "send_zc", "open", "fsync", "nop"]
LINKS: Final = [0, 0, SQE_IO_LINK, SQE_IO_HARDLINK]


@dataclass(eq=False)
class Call:
    """A task that runs a job."""

    name = "by hand"
    requests: list[tuple[Kind[Any], int, bytearray]]
    links: dict[int, int]
    generator: Any = None
    job: Job | None = None
    abort: Any = None
    value: Any = None  # what it is woken with
    parked: bool = False
    finished: int = 0  # how often it was over for the manager
    cancelled: bool = False
    done: bool = False
    abandoned: bool = False
    closed: set[int] = field(default_factory=set)  # positions
    results: dict[int, int] = field(default_factory=dict)  # what the kernel said

    @property
    def buffers(self) -> list[bytearray]:
        return [buffer for _, _, buffer in self.requests]


class JobLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.calls: list[Call] = []
        self.woken: list[Call] = []
        self.queue: list[Call] = []  # waiting for slots
        self.of_token: dict[int, Call] = {}
        self.owned_fds: set[int] = set()
        self.running: Call | None = None
        gc.disable()  # nothing may depend on it
        self.patch.setattr(Operation, "__hash__", lambda operation: operation.token & INDEX_MASK)
        self.patch.setattr(_core, "current_task", lambda: self.running)
        self.patch.setattr(trio.lowlevel, "reschedule", self.end_wait_for_slots)

    @initialize(choices=st.randoms(use_true_random=False), cq_entries=st.sampled_from([1, 2, 64]))
    def begin(self, choices: random.Random, cq_entries: int) -> None:
        config = RingConfig(entries=1, cq_entries=cq_entries, max_in_flight=MAX_IN_FLIGHT)
        self.ring = SimulatedRing(choices, config=config, rarity=3)
        self.patch.setattr(self.ring, "_post", self.recording_post)
        self.manager = UringIOManager(config, ring=cast("Ring", self.ring))
        self.patch.setattr(self.manager, "wake", self.wake)
        kinds = [
            kind(Opcode.READ),
            kind(Opcode.WRITE),
            kind(Opcode.SEND_ZC),
            kind(Opcode.OPENAT, result="fd", dispose=self.dispose),
            kind(Opcode.FSYNC, result="nothing"),
            kind(Opcode.NOP),
        ]
        self.kinds = dict(zip(NAMES, kinds, strict=True))

    def recording_post(self, entry: Entry, res: int, flags: int) -> None:
        call = self.of_token.get(entry.user_data & ~lib.TU_JOB_POSITION)
        if call is not None and not flags & CQE_F_NOTIF:
            position = entry.user_data >> INDEX_BITS & INDEX_MASK
            assert position not in call.results, "a step is done twice"
            call.results[position] = res
        SimulatedRing._post(self.ring, entry, res, flags)

    def dispose(self, fd: int, keep: Any) -> None:
        assert len(keep) == SIZE, "it must have what the operation kept"
        self.ring.close_fd(fd)  # fails if it is closed already

    # trio's part

    def wake(self, call: Call, value: object) -> None:
        assert call.parked, "woken twice"
        call.parked = False
        call.abort = None
        call.value = value
        self.woken.append(call)

    def end_wait_for_slots(self, call: Call, value: object = None) -> None:
        assert call is self.queue[0], "first come, first served"
        self.queue.remove(call)
        self.wake(call, outcome.Value(None) if value is None else value)

    def abort(self, call: Call) -> None:
        abort, call.abort = call.abort, None  # trio tries once
        staged = call.job is not None and call.job.state is State.STAGED
        if call.job is None:
            self.queue.remove(call)  # what it has got goes to the next
        if abort(raise_cancel) is Abort.SUCCEEDED:
            assert call.job is None or staged
            self.wake(call, outcome.capture(raise_cancel))
        else:
            assert call.job is not None
            assert not staged

    def run(self, call: Call) -> Generator[Any, Any, Any]:
        """What a batch does."""
        borrowed = yield from self.manager.borrow(len(call.requests), cast("Any", call), ())
        requests, sqes = self.fill(call)
        fds = [fd for _, fd, _ in call.requests]
        call.job = job = Job(
            self.manager,
            borrowed,
            requests,
            call.links,
            frozenset(),
            set(),
            partial(values_of, requests),
            lambda _: self.finish(call),
        )
        job.siblings = [self.manager.siblings_of(fd) for fd in set(fds)]
        del requests
        yield from self.manager.run_job(job, sqes.memory)
        return job.judge_all()

    def fill(self, call: Call) -> tuple[list[tuple[Any, ...]], SQEs]:
        requests: list[tuple[Any, ...]] = []
        sqes = SQEs(len(call.requests))
        memory, pointers = sqes.views()
        for position, (row, fd, buffer) in enumerate(call.requests):
            pin = ffi.from_buffer(buffer)
            requests.append((row, fd, 0, pin, SIZE, 0, pin))
            pack_sqe(memory, 64 * position, row.head | call.links.get(position, 0) << 8, fd, 0, 0, SIZE, 0)
            pointers[8 * position + 2] = pin
        return requests, sqes

    def finish(self, call: Call) -> None:
        call.finished += 1
        assert call.finished == 1, "its slots are given back twice"

    def step(self, call: Call) -> None:
        """The task runs until it parks or ends."""
        self.running = call
        value, call.value = call.value, None
        try:
            trap = call.generator.send(value)
        except StopIteration as stop:
            call.done = True
            self.returned(call, *stop.value)
        except CancelledByTest:
            call.done = True
            assert call.cancelled
            assert INTERRUPTED.issuperset(call.results.values()), "something was done"
        else:
            self.park(call, trap)
        del value

    def park(self, call: Call, trap: Any) -> None:
        call.parked = True
        call.abort = trap.abort_func
        if call.job is None:
            self.queue.append(call)
        else:
            assert call.job.token not in self.of_token, "a token is used twice"
            self.of_token[call.job.token] = call
        if call.cancelled:
            self.abort(call)

    def returned(self, call: Call, values: Sequence[Any], again: Sequence[tuple[int, Any]]) -> None:
        assert len(values) == len(call.results) == len(call.requests)
        for position, value in enumerate(values):
            row, res = call.requests[position][0], call.results[position]
            if res >= 0 and row.result == "fd":
                if isinstance(value, ChainBrokenError):
                    assert res not in self.ring.open_fds
                    assert value.step != position
                else:
                    assert value == res
                    self.owned_fds.add(res)
            elif res >= 0:
                assert value == (None if row.result == "nothing" else res), "a result is lost"
            elif isinstance(value, trio.ClosedResourceError):
                assert position in call.closed
            else:
                assert isinstance(value, OSError)
                assert value.errno == -res or (res in INTERRUPTED and value.errno == errno.ECANCELED)
            if isinstance(value, ChainBrokenError):
                assert call.results[value.step] != -errno.ECANCELED or value.step in call.closed or res >= 0
        for position, _ in again:
            assert position not in call.links
            assert position - 1 not in call.links
            assert call.job is not None
            assert position not in call.job.unwanted

    # Rules

    @precondition(lambda self: len(self.queue) < 3)
    @rule(
        requests=st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from(FDS), st.sampled_from(LINKS)),
            min_size=1,
            max_size=MAX_IN_FLIGHT,
        )
    )
    def start(self, requests: list[tuple[str, int, int]]) -> None:
        links = {position: link for position, (_, _, link) in enumerate(requests[:-1]) if link}
        call = Call([(self.kinds[name], fd, bytearray(SIZE)) for name, fd, _ in requests], links)
        call.generator = self.run(call)
        self.calls.append(call)
        self.step(call)

    @rule(timeout=st.sampled_from([0.0, 1.0]))
    def tick(self, timeout: float) -> None:
        self.manager.process_events(self.manager.get_events(timeout))

    @precondition(lambda self: self.woken)
    @rule(n=st.integers(0, 10))
    def resume(self, n: int) -> None:
        self.step(self.woken.pop(n % len(self.woken)))

    @precondition(lambda self: self.live())
    @rule(n=st.integers(0, 50))
    def cancel(self, n: int) -> None:
        live = self.live()
        call = live[n % len(live)]
        call.cancelled = True
        if call.abort is not None:
            self.abort(call)

    @rule(fd=st.sampled_from(FDS))
    def close(self, fd: int) -> None:
        for call in self.live():
            if call.parked and call.job is not None:
                call.closed.update(p for p, (_, named, _) in enumerate(call.requests) if named == fd)
        self.manager.notify_closing(fd)
        assert not any(entry.fd == fd for entry in self.ring.staging), "an entry may meet a reused fd"

    @precondition(lambda self: self.live())
    @rule(n=st.integers(0, 50))
    def abandon(self, n: int) -> None:
        live = self.live()
        call = live[n % len(live)]
        if call.job is None:
            return
        call.generator.close()
        call.done = call.abandoned = True
        call.parked = False
        if call in self.woken:
            self.woken.remove(call)

    def live(self) -> list[Call]:
        return [call for call in self.calls if not call.done]

    # What holds at any time

    def in_use(self) -> set[Call]:
        """Calls whose memory the kernel may use, now or from the next tick on."""
        entries = (*self.ring.staging, *self.ring.in_flight)
        tokens = {entry.user_data & ~lib.TU_JOB_POSITION for entry in entries if entry.user_data & lib.TU_JOB}
        return {self.of_token[token] for token in tokens}

    @invariant()
    def buffers_are_pinned_until_the_last_completion(self) -> None:
        in_use = self.in_use()
        for call in self.calls:
            if call in in_use:
                assert all(map(pinned, call.buffers))
                assert not call.finished
            elif call.finished:
                assert not any(map(pinned, call.buffers))

    @invariant()
    def no_slot_is_lost(self) -> None:
        statistics = self.manager.statistics()
        assert statistics.waiting_for_slot == len(self.queue)
        borrowed = sum(len(call.requests) for call in self.calls if call.job is not None and not call.finished)
        promised = sum(len(call.requests) for call in self.woken if call.job is None and not call.cancelled)
        waiting = sum(len(waiting.got) for waiting in self.manager._queue.values())
        cancelled = [call for call in self.woken if call.job is None and call.cancelled]
        total = borrowed + promised + waiting + len(self.manager._idle)
        if not cancelled:
            assert total == statistics.peak <= MAX_IN_FLIGHT

    @invariant()
    def a_parked_task_waits_for_something(self) -> None:
        in_use = self.in_use()
        for call in self.calls:
            if call.parked:
                assert call in self.queue or call in in_use

    @invariant()
    def the_ring_knows_the_jobs_that_are_not_over(self) -> None:
        jobs = sum(call.job is not None and not call.finished for call in self.calls)
        assert len(self.ring._jobs) == jobs

    # The end

    def teardown(self) -> None:
        try:
            if hasattr(self, "manager"):
                if sys.exc_info()[0] is None:
                    self.end()
                else:
                    with contextlib.suppress(Exception):
                        self.manager.close()
        finally:
            self.patch.undo()
            gc.enable()

    def end(self) -> None:
        live, woken = self.live(), list(self.woken)
        self.manager.close()
        assert self.woken == woken, "woken after the end of the run"
        for call in live:
            call.generator.close()
        assert not self.in_use()
        for call in self.calls:
            assert not any(map(pinned, call.buffers))
            assert call.finished == (call.job is not None)
            assert call.job is None or len(call.results) in (0, len(call.requests))
        assert self.ring.open_fds == self.owned_fds, "an fd was orphaned"


JobLife.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, report_multiple_bugs=False
)
TestJobLife = pytest.mark.seconds(300)(JobLife.TestCase)  # a failure takes its time to shrink
