"""Every pair of a state and an event: what the table says is what an operation does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import outcome
import pytest
import trio

from tests.unit.by_hand import kind, raise_cancel
from trio_uring import RingError
from trio_uring._abi import CQE_F_MORE, CQE_F_NOTIF, Opcode
from trio_uring._cancel import TRANSITIONS, Event, Kind, Operation, State
from trio_uring._core import POLL_IN
from trio_uring._ring import SubmissionQueue
from trio_uring._shots import Shots

if TYPE_CHECKING:
    from trio.lowlevel import Task

TASK = cast("Task", object())
RESULT = 7
SEND_ZC = kind(Opcode.SEND_ZC)


class Manager:
    """An `Owner` that takes notes."""

    def __init__(self) -> None:
        self.ring = SubmissionQueue()
        self.cancels_won = 0
        self.cancels_lost = 0
        self.cancels_asked = 0
        self.woken: list[object] = []

    def wake(self, task: Task | None, value: object) -> None:
        assert task is TASK
        self.woken.append(value)

    def ask_cancel(self, token: int, notice: int, *, again: bool = False) -> None:
        self.cancels_asked += 1

    def hand_over(self, operation: Operation) -> None:
        raise AssertionError("nobody waits")

    def buffer_unread(self, flags: int) -> None:
        raise AssertionError("no operation here takes a provided buffer")

    def check_still_open(self, fd: int, siblings: set[Operation]) -> None:
        raise AssertionError("no operation here is tried again")

    def released(self, operation: Operation) -> None:
        raise AssertionError("it does not want to know")


class Life:
    """One operation, and all that can happen to it."""

    def __init__(self, kind: Kind[Any] = SEND_ZC) -> None:
        self.manager = Manager()
        self.pool: list[Operation] = []
        self.disposed: list[int] = []
        self.operation = operation = Operation(5, self.manager, self.pool, ())
        operation.task = TASK
        operation.kind = kind
        operation.siblings = set()

    def happens(self, event: Event) -> None:
        operation = self.operation
        if event is Event.STAGE:
            token = operation.begin()
            operation.number = self.manager.ring.stage(int(operation.kind.head), 0, 0, 0, 0, 0, token)
            operation.pin = bytearray(1)
            operation.siblings.add(operation)
        elif event is Event.SUBMIT:
            self.manager.ring._consumed(self.manager.ring.staged)
        elif event in (Event.ABORT, Event.RELEASE):
            operation.abort(raise_cancel)
        elif event is Event.CLOSE:
            operation.fd_closing(operation.fd)
        elif event is Event.ABANDON:
            operation.abandon()
        elif event is Event.RESULT_CQE:
            operation.complete(operation.token, RESULT, CQE_F_MORE)
        elif event is Event.LAST_CQE:
            # A kernel that has posted the result posts the notification.
            notified = operation.state is State.NOTIFYING
            operation.complete(operation.token, 0 if notified else RESULT, CQE_F_NOTIF if notified else 0)
        else:
            operation.pick_up()


WAYS = {
    State.IDLE: (),
    State.STAGED: (Event.STAGE,),
    State.IN_FLIGHT: (Event.STAGE, Event.SUBMIT),
    State.CANCELLING: (Event.STAGE, Event.SUBMIT, Event.CLOSE),
    State.NOTIFYING: (Event.STAGE, Event.SUBMIT, Event.RESULT_CQE),
    State.DETACHED: (Event.STAGE, Event.SUBMIT, Event.ABANDON),
    State.SETTLED: (Event.STAGE, Event.SUBMIT, Event.LAST_CQE),
}
# What happens to an operation with one result.
ONE_RESULT = {
    state: {event: after for event, after in row.items() if event is not Event.SHOT}
    for state, row in TRANSITIONS.items()
}
ROWS = [(state, event, after) for state, row in ONE_RESULT.items() for event, after in row.items()]
# `perform` stages only what it takes from the pool, and submitting knows nothing of operations.
NO_ROWS = [
    (state, event)
    for state in State
    for event in Event
    if event not in TRANSITIONS[state]
    and event not in (Event.STAGE, Event.SUBMIT, Event.RELEASE, Event.SHOT)
    and (state, event) != (State.STAGED, Event.LAST_CQE)  # nobody looks: what the kernel has not got it cannot answer
]


def life_in(state: State, kind: Kind[Any] = SEND_ZC) -> Life:
    life = Life(kind)
    for event in WAYS[state]:
        life.happens(event)
    assert life.operation.state is state
    return life


def kind_for(event: Event) -> Kind[Any]:
    return POLL_IN if event is Event.RELEASE else SEND_ZC


@pytest.mark.parametrize(("state", "event", "after"), ROWS)
def test_a_row_of_the_table_is_what_happens(state: State, event: Event, after: State) -> None:
    life = life_in(state, kind_for(event))
    life.happens(event)
    assert life.operation.state is after


@pytest.mark.parametrize(("state", "event"), NO_ROWS)
def test_what_is_not_in_the_table_changes_nothing(state: State, event: Event) -> None:
    life = life_in(state)
    woken = list(life.manager.woken)
    try:
        life.happens(event)
    except RingError:
        pass
    else:
        # It may come late, from the clean-up of a task whose run is over.
        assert event in (Event.ABORT, Event.ABANDON)
    assert life.operation.state is state
    assert life.manager.woken == woken
    assert life.manager.cancels_asked == (state in (State.CANCELLING, State.DETACHED))


@pytest.mark.parametrize("event", [Event.RESULT_CQE, Event.LAST_CQE])
@pytest.mark.parametrize("state", [State.IDLE, State.SETTLED])
def test_a_cqe_that_nobody_asked_for_is_an_error(state: State, event: Event) -> None:
    with pytest.raises(RingError):
        life_in(state).happens(event)


@pytest.mark.parametrize("state", State)
def test_a_cqe_for_a_former_life_is_an_error(state: State) -> None:
    operation = life_in(state).operation
    with pytest.raises(RingError, match="former life"):
        operation.complete(operation.token - (1 << 20), 0, 0)
    assert operation.state is state


@pytest.mark.parametrize("state", State)
def test_an_operation_is_in_the_pool_exactly_when_it_is_idle(state: State) -> None:
    for event, after in ONE_RESULT[state].items():
        life = life_in(state, kind_for(event))
        life.happens(event)
        was_taken = state is not State.IDLE
        assert life.pool == [life.operation] * (after is State.IDLE and was_taken)


@pytest.mark.parametrize("state", State)
def test_memory_is_held_exactly_while_the_kernel_may_use_it(state: State) -> None:
    held = {State.STAGED, State.IN_FLIGHT, State.CANCELLING, State.NOTIFYING, State.DETACHED}
    for event, after in ONE_RESULT[state].items():
        life = life_in(state, kind_for(event))
        life.happens(event)
        assert (life.operation.pin is not None) == (after in held)


@pytest.mark.parametrize("state", State)
def test_a_task_waits_in_these_states(state: State) -> None:
    waits = {State.STAGED, State.IN_FLIGHT, State.CANCELLING}
    for event, after in ONE_RESULT[state].items():
        life = life_in(state, kind_for(event))
        before = len(life.manager.woken)
        life.happens(event)
        # Aborted with success: trio itself wakes it. Abandoned: there is no task any more.
        by_itself = event in (Event.ABORT, Event.RELEASE, Event.ABANDON)
        woken = state in waits and after not in waits and not by_itself
        assert len(life.manager.woken) - before == woken
        assert (life.operation.task is TASK) == (after not in (State.IDLE, State.DETACHED))


def test_closing_wakes_with_an_error_what_can_be_released() -> None:
    for state, row in ((State.STAGED, SEND_ZC), (State.IN_FLIGHT, POLL_IN)):
        life = life_in(state, row)
        life.happens(Event.CLOSE)
        (value,) = life.manager.woken
        assert isinstance(value, outcome.Error)
        assert isinstance(value.error, trio.ClosedResourceError)


def test_the_kernel_is_asked_once() -> None:
    life = life_in(State.IN_FLIGHT)
    for event in (Event.CLOSE, Event.ABORT, Event.CLOSE, Event.ABANDON, Event.CLOSE):
        life.happens(event)
    assert life.manager.cancels_asked == 1


@pytest.mark.parametrize(("res", "won"), [(0, 0), (1, 0), (-5, 0), (-11, 0), (-125, 1), (-4, 1), (-512, 1), (-516, 1)])
@pytest.mark.parametrize("state", [State.CANCELLING, State.DETACHED])
@pytest.mark.parametrize("flags", [0, CQE_F_MORE])
def test_cancels_are_counted_by_their_outcome(state: State, res: int, won: int, flags: int) -> None:
    life = life_in(state)
    life.operation.complete(life.operation.token, res, flags)
    assert (life.manager.cancels_won, life.manager.cancels_lost) == (won, 1 - won)
    if flags:
        life.operation.complete(life.operation.token, 0, CQE_F_NOTIF)
    assert life.manager.cancels_won + life.manager.cancels_lost == 1


@pytest.mark.parametrize("outcome", ["abandoned in flight", "abandoned when settled", "a failure", "received"])
def test_a_result_nobody_takes_is_disposed_of(outcome: str) -> None:
    disposed: list[tuple[int, Any]] = []
    life = life_in(State.IN_FLIGHT, kind(Opcode.ACCEPT, dispose=lambda res, keep: disposed.append((res, keep))))
    operation = life.operation
    operation.keep = keep = object()
    if outcome != "abandoned when settled":
        operation.abandon() if outcome != "received" else None
    operation.complete(operation.token, -5 if outcome == "a failure" else RESULT, 0)
    if outcome == "received":
        operation.pick_up()
    operation.abandon()
    assert disposed == ([(RESULT, keep)] if "abandoned" in outcome else [])
    assert operation.keep is None


# Multishot


class Receiver:
    """A receiver that takes notes."""

    def __init__(self) -> None:
        self.received: list[tuple[int, int]] = []
        self.discarded: list[tuple[int, int]] = []
        self.closed = 0
        self.forsaken = 0

    def receive(self, res: int, flags: int) -> None:
        self.received.append((res, flags))

    def discard(self, res: int, flags: int) -> None:
        self.discarded.append((res, flags))

    def fd_closed(self) -> None:
        self.closed += 1

    def fail(self, error: RingError) -> None:
        raise AssertionError("this ring does not fail")

    def forsake(self) -> None:
        self.forsaken += 1


class MultishotLife:
    """One multishot operation, armed and submitted."""

    def __init__(self) -> None:
        self.manager = Manager()
        self.receiver = Receiver()
        borrowed = Operation(5, self.manager, [], ())
        self.shots = Shots(self.manager, borrowed, kind(Opcode.ACCEPT), 3, self.receiver)
        self.arm()
        self.manager.ring._consumed(self.manager.ring.staged)

    def arm(self) -> None:
        self.shots.arm(lambda token: self.manager.ring.stage(Opcode.ACCEPT, 3, 0, 0, 0, 0, token))


@pytest.mark.parametrize("state", [state for state, row in TRANSITIONS.items() if Event.SHOT in row])
def test_a_shot_changes_no_state_and_reaches_whoever_is_there(state: State) -> None:
    life = MultishotLife()
    if state is State.CANCELLING:
        life.shots.stop()
    elif state is State.DETACHED:
        life.shots.abandon()
    life.shots.complete(life.shots.token, RESULT, CQE_F_MORE)
    assert life.shots.state is TRANSITIONS[state][Event.SHOT] is state
    notes = life.receiver.discarded if state is State.DETACHED else life.receiver.received
    assert notes == [(RESULT, CQE_F_MORE)]
    life.shots.complete(life.shots.token, -125, 0)
    assert not life.shots.armed
    assert notes[1:] == [(-125, 0)]
    assert life.manager.cancels_asked == (state is not State.IN_FLIGHT)


def test_a_multishot_operation_has_many_lives() -> None:
    life = MultishotLife()
    first = life.shots.token
    life.shots.complete(first, RESULT, 0)
    assert not life.shots.armed
    with pytest.raises(RingError):
        life.shots.complete(first, RESULT, 0)
    life.arm()
    with pytest.raises(RingError, match="former life"):
        life.shots.complete(first, RESULT, 0)
    assert life.shots.state is State.STAGED
    assert not life.shots.stop()
    assert life.manager.ring.staged == life.manager.cancels_asked == 0


@pytest.mark.parametrize("staged", [False, True])
def test_a_multishot_operation_hears_that_its_fd_is_closed(staged: bool) -> None:
    life = MultishotLife()
    if staged:
        life.shots.complete(life.shots.token, RESULT, 0)
        life.arm()
    life.shots.fd_closing(3)
    assert life.receiver.closed == 1
    assert life.shots.armed is not staged
    assert life.manager.cancels_asked == (not staged)
    life.shots.abandon()
    assert life.receiver.forsaken == 1
    assert life.manager.cancels_asked == (not staged)
