"""The life of operations, on a simulated ring: every order of results, cancels, closes and tear-down.

A state machine drives `UringIOManager.perform` by hand, as trio would: it parks and wakes tasks, calls abort functions
and delivers what the simulated kernel makes up. What must hold is in `LifeCycle.step`, its invariants and its end.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import select
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import outcome
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trio.lowlevel import Abort

from trio_uring import RingConfig, _core
from trio_uring._abi import CQE_F_NOTIF, Opcode
from trio_uring._cancel import INDEX_MASK, Kind, Operation, State
from trio_uring._core import POLL_IN, POLL_OUT, UringIOManager
from trio_uring._errors import ERESTARTS, INTERRUPTED
from trio_uring._ring import ffi
from trio_uring._zero_copy import SEND_ZC, _Release
from trio_uring.testing import PATTERN, SimulatedRing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Generator, Iterator

    from trio_uring._ring import Ring

SIZE: Final = 8
FDS: Final = range(500_000, 500_005)  # no real fds
NAMES: Final = ["read", "write", "recv", "send_zc", "open", "accept", "fsync", "wait_readable", "wait_writable"]
AGAIN: Final = ERESTARTS | {-errno.EINTR, -errno.EAGAIN}


class CancelledByTest(BaseException):
    """Stands for `trio.Cancelled`."""


def raise_cancel() -> NoReturn:
    raise CancelledByTest


class Parked(Exception):
    """The way a step ended: the task waits again."""


class Returned(Exception):
    """The way a step ended: the call has its result."""


@dataclass(eq=False)
class Call:
    """One call of `perform`, and the task that makes it."""

    name: str
    kind: Kind[Any]
    fd: int
    buffer: bytearray
    generator: Any = None
    releases: int = 0  # how often it was told that its buffer is free
    abort: Callable[[Any], Abort] | None = None
    operation: Operation | None = None  # what it waits for, or waited for until it was woken; None: a slot
    tokens: list[int] = field(default_factory=list)  # of its operations, readiness polls on the way left out
    value: Any = None  # what it is woken with
    parked: bool = False
    interruption: type[BaseException] | None = None  # what an interrupted operation means for it
    cancelled: bool = False
    closed: bool = False
    abandoned: bool = False
    done: bool = False

    def take_value(self) -> Any:
        """Nobody else may hold it: an exception in it refers to the frames it passes through."""
        value, self.value = self.value, None
        return value

    @property
    def pinned(self) -> bool:
        try:
            self.buffer.append(0)
        except BufferError:
            return True
        self.buffer.pop()
        return False

    @property
    def waits_for_readiness_on_the_way(self) -> bool:
        return self.operation is not None and self.operation.kind is not self.kind

    @property
    def is_settled(self) -> bool:
        """Nothing the kernel, the task or the disposal of its result may still do needs the buffer."""
        if self.done:
            return True
        if self.kind.dispose is not None or self.kind.decode is not None:
            return False
        if self.value is None or self.operation is None or self.waits_for_readiness_on_the_way:
            return False
        return not isinstance(self.value, int) or self.value not in AGAIN


class LifeCycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.calls: list[Call] = []
        self.woken: list[Call] = []  # in the order in which they were woken
        self.queue: list[Call] = []  # waiting for a slot
        self.of_token: dict[int, Call] = {}
        self.results: dict[int, int] = {}
        self.received: set[int] = set()  # tokens whose result was returned
        self.taken_back: set[int] = set()  # tokens the kernel must never see
        self.asked: set[int] = set()  # tokens the kernel must be asked to cancel
        self.targets: set[int] = set()  # tokens it was asked to cancel
        self.owned_fds: set[int] = set()
        self.running: Call | None = None
        gc.disable()  # nothing may depend on it: whatever is released is released at once
        # The order of a set of operations must not depend on their addresses, or no history can be repeated.
        self.patch.setattr(Operation, "__hash__", lambda operation: operation.token & INDEX_MASK)
        self.patch.setattr(_core, "current_task", lambda: self.running)
        self.patch.setattr(trio.lowlevel, "reschedule", self.end_wait_for_slot)

    @initialize(
        choices=st.randoms(use_true_random=False),
        max_in_flight=st.integers(1, 5),
        cq_entries=st.sampled_from([1, 2, 64]),
    )
    def begin(self, choices: random.Random, max_in_flight: int, cq_entries: int) -> None:
        config = RingConfig(entries=1, cq_entries=cq_entries, max_in_flight=max_in_flight)
        self.config = config
        self.ring = SimulatedRing(choices, config=config, rarity=3)
        self.patch.setattr(self.ring, "tick", self.recording_tick(self.ring.tick))
        self.manager = UringIOManager(config, ring=cast("Ring", self.ring))
        self.patch.setattr(self.manager, "wake", self.wake)
        self.kinds = self.make_kinds()

    def make_kinds(self) -> dict[str, Kind[Any]]:
        def row(name: str, opcode: Opcode, **more: Any) -> Kind[Any]:
            return Kind(name=name, opcode=opcode, since="", summary="", man="", **more)

        kinds = [
            row("read", Opcode.READ, result="count", wait_for=select.POLLIN),
            row("write", Opcode.WRITE, result="count"),
            row("recv", Opcode.RECV, result="count", direction="read", wait_for=select.POLLIN),
            SEND_ZC,
            row("open", Opcode.OPENAT, result="fd", dispose=self.dispose),
            row("accept", Opcode.ACCEPT, result="fd", direction="read", dispose=self.dispose),
            row("fsync", Opcode.FSYNC, result="nothing", success=frozenset({-errno.ENOBUFS})),
            POLL_IN,
            POLL_OUT,
        ]
        assert [kind.name for kind in kinds] == NAMES
        return {kind.name: kind for kind in kinds}

    def recording_tick(self, tick: Callable[[float], list[int]]) -> Callable[[float], list[int]]:
        def recording(timeout: float) -> list[int]:
            self.note_cancels()
            events = tick(timeout)
            numbers = iter(events)
            for token, res, flags in zip(numbers, numbers, numbers, strict=True):
                if token & INDEX_MASK >= 2:
                    assert token not in self.taken_back
                    if not flags & CQE_F_NOTIF:
                        self.results[token] = res
            return events

        return recording

    def dispose(self, fd: int, keep: Any) -> None:
        assert len(keep) == SIZE, "it must have what the operation kept"
        self.ring.close_fd(fd)

    # trio's part

    def wake(self, call: Call, value: object) -> None:
        assert call.parked, f"{call.name} is woken twice"
        call.parked = False
        call.abort = None
        call.value = value
        self.woken.append(call)

    def end_wait_for_slot(self, call: Call, value: object = None) -> None:
        if value is None:
            value = outcome.Value(None)
            assert call is self.queue[0], "first come, first served"
        self.queue.remove(call)
        self.wake(call, value)

    def abort(self, call: Call) -> None:
        assert call.abort is not None
        abort, call.abort = call.abort, None  # trio tries once
        with self.ending(call):
            succeeded = abort(raise_cancel) is Abort.SUCCEEDED
        if not succeeded:
            assert call.operation is not None
            assert not call.operation.kind.readiness, "its waiter is released at once"
            call.interruption = CancelledByTest
            return
        if call.operation is None:
            self.queue.remove(call)
        self.wake(call, outcome.capture(raise_cancel))

    @contextlib.contextmanager
    def ending(self, *calls: Call) -> Iterator[None]:
        """What they wait for ends inside: the kernel must not see it any more, or be asked to cancel it, once."""
        operations = [call.operation for call in calls if call.parked and call.operation is not None]
        staged = {operation.token for operation in operations if operation.state is State.STAGED}
        asked = {operation.token for operation in operations} - staged - self.asked
        yield
        self.taken_back |= staged
        self.asked |= asked
        assert self.tokens_in_use().isdisjoint(self.taken_back)
        self.note_cancels()
        assert self.targets == self.asked
        assert self.manager._cancels_asked == len(self.asked)

    def note_cancels(self) -> None:
        entries = (*self.ring.staging, *self.ring.in_flight)
        self.targets |= {entry.addr for entry in entries if entry.opcode == Opcode.ASYNC_CANCEL}

    def park(self, call: Call, trap: Any) -> None:
        call.parked = True
        call.abort = trap.abort_func
        call.interruption = None
        call.operation = getattr(trap.abort_func, "__self__", None)
        if call.operation is None:
            self.queue.append(call)
        else:
            token = call.operation.token
            assert token not in self.of_token, "a token is used twice"
            assert not call.closed, "an entry for a closed fd"
            self.check_alone(call, call.operation)
            self.of_token[token] = call
            if not call.waits_for_readiness_on_the_way:
                call.tokens.append(token)
        if call.cancelled:
            self.abort(call)

    def check_alone(self, call: Call, operation: Operation) -> None:
        for other in self.calls:
            if other.parked and other is not call and other.operation and other.fd == call.fd and not other.closed:
                direction = other.operation.kind.direction
                assert direction is None or direction != operation.kind.direction, "two in one direction"

    def step(self, call: Call, ways: set[type[BaseException]]) -> None:
        """The task runs until it parks or ends, and that in one of the expected ways."""
        self.running = call
        woken_with, operation = repr(call.value), call.operation
        res = call.value if isinstance(call.value, int) else 0
        try:
            trap = call.generator.send(call.take_value())
        except StopIteration as stop:
            way: type[BaseException] = Returned
            self.returned(call, stop.value)
        except OSError as exc:
            way, code = OSError, exc.errno
            assert code == -res
        except trio.BusyResourceError:
            way = trio.BusyResourceError
            assert self.somebody_else_uses(call), "not busy"
        except (CancelledByTest, trio.ClosedResourceError) as exc:
            way = type(exc)
        else:
            way = Parked
            self.park(call, trap)
            if call.operation is not None and call.kind.wait_for and res == -errno.EAGAIN:
                assert call.operation.kind.readiness
                assert call.cancelled or self.ring.staging[-1][7:9] == (call.kind.wait_for, call.operation.token)
        assert way in ways, f"{call.name}: {woken_with} from {operation!r} ended in {way}, not in one of {ways}"
        call.done = way is not Parked

    def returned(self, call: Call, value: int | None) -> None:
        if call.kind.readiness:
            return
        token = call.tokens[-1]
        assert value == (None if call.kind.result == "nothing" else self.results[token])
        self.received.add(token)
        if value is None:
            return
        if call.kind.result == "fd":
            self.owned_fds.add(value)
        if call.kind.opcode in (Opcode.READ, Opcode.RECV):
            assert call.buffer == bytes([PATTERN] * value).ljust(SIZE, b"\0")

    def somebody_else_uses(self, call: Call) -> bool:
        return any(c.fd == call.fd and not (c.done or c.closed or c is call) for c in self.calls)

    def ways_on(self, call: Call) -> set[type[BaseException]]:
        """How the next step may end, seeing what the task is woken with."""
        value = call.value
        if isinstance(value, outcome.Error):
            return {type(value.error)}
        if isinstance(value, int) and not call.waits_for_readiness_on_the_way:
            if value >= 0:
                return {Returned}
            if value in call.kind.success:  # what it means may be asked of the fd
                return {trio.ClosedResourceError if call.closed else Returned}
            if call.interruption is not None and value in INTERRUPTED:
                return {call.interruption}
            if value not in AGAIN or (value == -errno.EAGAIN and not call.kind.wait_for):
                return {OSError}
        # it goes on: has a slot now, has to try again, is ready to try again
        return {trio.ClosedResourceError} if call.closed else {Parked, trio.BusyResourceError}

    # Rules

    @precondition(lambda self: len(self.queue) < 3)
    @rule(name=st.sampled_from([*NAMES, "send_zc", "send_zc"]), fd=st.sampled_from(FDS))
    def start(self, name: str, fd: int) -> None:
        kind = self.kinds[name]
        buffer = bytearray(SIZE)
        call = Call(f"{name} {len(self.calls)}", kind, fd, buffer)
        if kind.readiness:
            call.generator = self.manager.perform(kind, fd, op_flags=1)
        elif kind is SEND_ZC:
            call.generator = self.send_zc(call)
        elif kind.result == "count":
            call.generator = self.manager.perform(kind, fd, -1, ffi.from_buffer(buffer), -1)
        else:
            call.generator = self.manager.perform(kind, fd, keep=ffi.from_buffer(buffer))
        self.calls.append(call)
        self.step(call, {Parked, trio.BusyResourceError})

    def send_zc(self, call: Call) -> Generator[Any, Any, int]:
        """As `lowlevel.send_zc` with an event."""

        class Event:
            def set(self) -> None:
                call.releases += 1

        release = _Release(cast("trio.Event", Event()))
        with release:
            return (
                yield from self.manager.perform(SEND_ZC, call.fd, 0, ffi.from_buffer(call.buffer), -1, 0, (release,))
            )

    @rule(timeout=st.sampled_from([0.0, 1.0]))
    def tick(self, timeout: float) -> None:
        self.manager.process_events(self.manager.get_events(timeout))

    @precondition(lambda self: self.woken)
    @rule(n=st.integers(0, 10))
    def resume_one(self, n: int) -> None:
        call = self.woken.pop(n % len(self.woken))
        self.step(call, self.ways_on(call))

    @precondition(lambda self: self.live_calls())
    @rule(turns=st.integers(1, 4))
    def let_it_run(self, turns: int) -> None:
        for _ in range(turns):
            self.tick(0.0)
            for _ in range(len(self.woken)):
                self.resume_one(0)

    @precondition(lambda self: self.live_calls())
    @rule(n=st.integers(0, 50), how=st.sampled_from(["cancel", "close", "abandon"]))
    def interfere(self, n: int, how: str) -> None:
        live = self.live_calls()
        call = live[n % len(live)]
        if how == "cancel":
            self.cancel(call)
        elif how == "close":
            self.close_fd(call.fd)
        elif call.operation is not None:
            self.abandon(call)

    def cancel(self, call: Call) -> None:
        call.cancelled = True
        if call.abort is not None:
            self.abort(call)

    def close_fd(self, fd: int) -> None:
        concerned = [call for call in self.live_calls() if call.fd == fd]
        asked_before = [call for call in concerned if call.operation and call.operation.state is State.CANCELLING]
        for call in concerned:
            call.closed = True
            if call.parked and call.operation is not None:
                call.interruption = call.interruption or trio.ClosedResourceError
        with self.ending(*concerned):
            self.manager.notify_closing(fd)
        assert not any(entry.fd == fd for entry in self.ring.staging), "an entry may meet a reused fd"
        for call in concerned:
            if call.parked:
                assert call.operation is not None
                assert not call.operation.kind.readiness, "its waiter is released at once"
                assert call.operation.state is State.CANCELLING
                targets = [entry.addr for entry in self.ring.staging]
                if call not in asked_before:  # a cancel that is asked again goes with the next tick
                    assert call.operation.token not in targets, "the kernel hears of it only later"

    def abandon(self, call: Call) -> None:
        with self.ending(call):
            call.generator.close()
        call.done = call.abandoned = True
        call.parked = False
        if call in self.woken:
            self.woken.remove(call)

    def live_calls(self) -> list[Call]:
        return [call for call in self.calls if not call.done]

    # What holds at any time

    def tokens_in_use(self) -> set[int]:
        """Tokens whose memory the kernel may use, now or from the next tick on."""
        entries = [e for e in (*self.ring.staging, *self.ring.in_flight) if e.user_data & INDEX_MASK >= 2]
        tokens = {entry.user_data for entry in entries}
        assert len(tokens) == len(entries), "a token is submitted twice"
        return tokens

    @invariant()
    def all_holds(self) -> None:
        self.buffers_are_pinned_while_the_kernel_may_use_them_and_no_longer()
        self.the_limit_is_kept()
        self.states_agree_with_the_ring()
        self.waiting_tasks_are_counted()

    def buffers_are_pinned_while_the_kernel_may_use_them_and_no_longer(self) -> None:
        in_use = self.tokens_in_use()
        for call in self.calls:
            if not in_use.isdisjoint(call.tokens) and not call.kind.readiness:
                assert call.pinned, f"{call.name} is not pinned"
            elif call.is_settled:
                assert not call.pinned, f"{call.name} is still pinned"
            if call.kind is SEND_ZC:
                free = call.done and not call.abandoned and in_use.isdisjoint(call.tokens)
                assert call.releases == free, f"{call.name} is told {call.releases} times that its buffer is free"

    def the_limit_is_kept(self) -> None:
        calls = [(token, self.of_token[token]) for token in self.tokens_in_use()]
        counted = [token for token, call in calls if token in call.tokens and not call.kind.readiness]
        assert len(counted) <= self.config.max_in_flight
        statistics = self.manager.statistics()
        assert statistics.in_flight <= self.config.max_in_flight
        assert statistics.waiting_for_slot == len(self.queue)
        handed_over = sum(isinstance(call.value, outcome.Value) for call in self.woken)
        idle = len(self.manager._idle)
        assert statistics.in_flight + handed_over + idle == statistics.peak <= self.config.max_in_flight, (
            "a slot is lost"
        )
        if self.queue:
            assert not idle
            assert statistics.peak == self.config.max_in_flight, "it waits for no reason"

    def states_agree_with_the_ring(self) -> None:
        staged = {entry.user_data for entry in self.ring.staging}
        in_flight = {entry.user_data for entry in self.ring.in_flight}
        for call in self.calls:
            if call.parked and call.operation is not None:
                state = call.operation.state
                token = call.operation.token
                if token in staged:
                    assert state is State.STAGED
                else:
                    assert state is (State.IN_FLIGHT if call.interruption is None else State.CANCELLING)
                    assert token in in_flight, "it waits for nothing"

    def waiting_tasks_are_counted(self) -> None:
        statistics = self.manager.statistics()
        kinds = [call.operation.kind for call in self.calls if call.parked and call.operation is not None]
        assert statistics.tasks_waiting_read == kinds.count(POLL_IN)
        assert statistics.tasks_waiting_write == kinds.count(POLL_OUT)

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
        live = self.live_calls()
        woken = list(self.woken)
        with self.ending(*live):
            self.manager.close()
        assert self.woken == woken, "woken after the end of the run"
        assert self.ring.closed
        in_flight = {entry.user_data for entry in self.ring.in_flight} & self.of_token.keys()
        assert not in_flight, "the ring was closed under the kernel's hands"
        for call in live:
            if call.abort is not None and call.operation is not None:
                assert call.abort(raise_cancel) is Abort.FAILED
            call.generator.close()
        for call in self.calls:
            assert not call.pinned, f"{call.name} is pinned for ever"
        assert self.ring.open_fds == self.owned_fds, "an fd was orphaned"
        won = sum(self.results[token] in INTERRUPTED for token in self.asked)
        assert (self.manager.cancels_won, self.manager.cancels_lost) == (won, len(self.asked) - won)
        for token, res in self.results.items():
            call = self.of_token[token]
            if res >= 0 and token in call.tokens and not call.kind.readiness:
                assert token in self.received or call.abandoned or call in live, f"{call.name} lost its result"


LifeCycle.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, report_multiple_bugs=False
)
TestLifeCycle = pytest.mark.seconds(300)(LifeCycle.TestCase)  # a failure takes its time to shrink
