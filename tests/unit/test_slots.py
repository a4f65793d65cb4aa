"""The part of an operation's life that is in C does what the Python way does, and leaves to it what is not ordinary."""

from __future__ import annotations

import errno
import gc
import sys
import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import outcome
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.by_hand import ByHand, ScriptedRing, kind, pinned
from trio_uring import RingConfig
from trio_uring._abi import CQE_BUFFER_SHIFT, CQE_F_BUFFER, CQE_F_MORE, SQE_BUFFER_SELECT, Opcode
from trio_uring._cancel import INDEX_MASK, Operation, State
from trio_uring._ring import SQE_SIZE, BufferRing, SubmissionQueue, ffi
from trio_uring._slots import Slot, complete_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.by_hand import Task

FD = 500_000
NOP = kind(Opcode.NOP)
ODD = replace(kind(Opcode.SEND, flags=0x10), ioprio=0x1234)
FLAGS = CQE_F_BUFFER | 3 << CQE_BUFFER_SHIFT


class Bench(ByHand):
    """A kernel by script."""

    ring: ScriptedRing

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ring = ScriptedRing(RingConfig(entries=2, max_in_flight=2))
        super().__init__(monkeypatch, self.ring)

    def complete(self, task: Task, res: int, flags: int = 0) -> None:
        self.ring.answer(task.token, res, flags)
        self.tick()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(monkeypatch)
    yield bench
    bench.ring.obliging = True
    bench.manager.close()


class Owner:
    """Whose fds nobody closes."""

    def __init__(self) -> None:
        self.ring = SubmissionQueue(1)

    def wake(self, task: object, value: object) -> None:
        pass

    def check_still_open(self, fd: int, siblings: object) -> None:
        pass


def new_slot() -> Operation:
    return Operation(5, Owner(), [], ())  # type: ignore[arg-type]


def begin(slot: Operation, *fields: Any, pin: Any = None, row: Any = NOP) -> Any:
    sqe_fd, off, addr, length, op_flags = fields or (FD, 0, 0, 0, 0)
    return slot.start(slot.owner.ring, row, "task", set(), 0.5, FD, sqe_fd, off, addr, length, op_flags, pin, None)


def entry(queue: SubmissionQueue) -> bytes:
    """The last one staged."""
    return bytes(ffi.buffer(queue._memory)[SQE_SIZE * (queue.staged - 1) : SQE_SIZE * queue.staged])


NUMBERS = st.integers(-(1 << 65), 1 << 65) | st.sampled_from([-1, 0, 1 << 31, 1 << 32, 1 << 63, 1 << 64])


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.none() | st.binary(max_size=9))
@example((-100, -1, (1 << 63) - 1, (1 << 32) - 1, (1 << 32) - 1), None)
@example((7, 1 << 62, 0, 9, 0x4000), b"bytes")
def test_an_entry_is_the_same(fields: tuple[int, ...], pin: bytes | None) -> None:
    """Or it is left to the Python way, and nothing has happened."""
    slot, theirs = new_slot(), SubmissionQueue(1)
    ours = slot.owner.ring
    before = slot.token
    started = begin(slot, *fields, pin=pin, row=ODD)
    if started is None:
        assert (ours.staged, slot.token, slot.state, slot.task) == (0, before, State.IDLE, None)
        if all(-1 << 31 <= value < 1 << 31 and (i < 2 or value >= 0) for i, value in enumerate(fields)):
            raise AssertionError("nothing is the matter with these")
        return
    buffer = None if pin is None else ffi.from_buffer(pin)
    sqe_fd, off, addr, length, op_flags = fields
    theirs.stage(ODD.head, sqe_fd, off, addr, length, op_flags, slot.token, buffer)
    assert entry(ours) == entry(theirs)
    assert (slot.fd, slot.pin, slot.since, slot.number) == (FD, pin, 0.5, 0)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("value", [None, "1", 1.5, True])
def test_no_numbers(position: int, value: object) -> None:
    fields: list[object] = [FD, 0, 0, 0, 0]
    fields[position] = value
    slot = new_slot()
    assert begin(slot, *fields) is None
    assert slot.owner.ring.staged == 0


@pytest.mark.parametrize("pin", [bytearray(1), memoryview(b"x"), "x", 5])
def test_no_pointer(pin: object) -> None:
    slot = new_slot()
    assert begin(slot, pin=pin) is None
    assert (slot.owner.ring.staged, slot.pin) == (0, None)


def test_the_staging_area_grows() -> None:
    slots = [new_slot() for _ in range(9)]
    queue = slots[0].owner.ring
    for slot in slots:
        slot.owner = slots[0].owner
    waiting = [begin(slot, pin=bytes([i])) for i, slot in enumerate(slots)]
    assert queue.staged == 9
    assert [slot.number for slot in slots] == list(range(9))
    found = [int.from_bytes(queue._bytes[SQE_SIZE * i + 16 : SQE_SIZE * i + 24], "little") for i in range(9)]
    assert found == [int(ffi.cast("uintptr_t", ffi.from_buffer(slot.pin))) for slot in slots]
    del waiting
    assert {slot.state for slot in slots} == {State.IDLE}


@pytest.mark.parametrize("first", [None, 5, [], Slot()])
def test_what_is_no_queue(first: Any) -> None:
    slot = new_slot()
    slot.owner.ring = first  # type: ignore[misc]
    with pytest.raises(TypeError):
        begin(slot)
    with pytest.raises(TypeError):
        new_slot().receive(first, NOP, "task", set(), 0, FD, 5, BufferRing(ScriptedRing(RingConfig()), 1, 1, 1))


# Waiting


def raised_by(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as exc:
        return exc
    raise AssertionError("nothing")


def test_the_result_comes_bare_or_in_an_outcome(bench: Bench) -> None:
    for value in (7, outcome.Value(7)):
        task = bench.start(NOP)
        bench.complete(task, 7)
        task.value = value
        assert bench.resume(task).result == 7


@pytest.mark.parametrize("set_trace", [sys.settrace, sys.setprofile])
def test_the_result_comes_under_a_tracer(bench: Bench, set_trace: Callable[[Any], None]) -> None:
    """Python then calls methods that it does not call otherwise."""
    before = sys.gettrace() if set_trace is sys.settrace else sys.getprofile()
    set_trace(lambda *_: None)
    try:
        task = bench.start(NOP)
        bench.complete(task, 7)
        bench.resume(task)
    finally:
        set_trace(before)
    assert task.result == 7


@pytest.mark.parametrize("thrown", [(KeyError("x"),), (KeyError, "x"), (KeyError, KeyError("x"), None), (KeyError,)])
def test_what_is_thrown_comes_out(thrown: tuple[Any, ...]) -> None:
    async def coroutine() -> None:
        try:
            raise ValueError
        except ValueError:
            await waiting

    slot = new_slot()
    waiting = begin(slot)
    running = coroutine()
    assert running.send(None) is slot.trap
    slot.task = None  # it has been let go
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12 for more than one argument
        error = raised_by(lambda: running.throw(*thrown))
    assert isinstance(error, KeyError)
    assert error.args == (("x",) if len(thrown) > 1 or thrown != (KeyError,) else ())
    assert isinstance(error.__context__, ValueError)


@pytest.mark.parametrize("how", ["throw", "close"])
def test_an_operation_whose_coroutine_ends_is_given_up(bench: Bench, how: str) -> None:
    task = bench.start(kind(Opcode.READ), FD, 0, ffi.from_buffer(buffer := bytearray(8)), -1)
    operation = task.operation
    assert operation is not None
    bench.tick()
    if how == "throw":
        assert isinstance(raised_by(lambda: task.generator.throw(KeyError())), KeyError)
    else:
        task.generator.close()
    assert operation.state is State.DETACHED
    assert pinned(buffer)
    bench.ring.answer(operation.token, 8, 0)
    bench.tick()
    assert not pinned(buffer)


@pytest.mark.parametrize("how", ["throw", "close"])
def test_the_next_life_is_not_touched(bench: Bench, how: str) -> None:
    """The slot of a task that was let go may serve another before this one runs again."""
    first = bench.start(NOP)
    bench.cancel(first)
    second = bench.start(NOP)
    operation = second.operation
    assert operation is first.operation
    assert operation is not None
    if how == "throw":
        raised_by(lambda: first.generator.throw(KeyError()))
    else:
        first.generator.close()
    assert operation.state is State.STAGED
    assert operation.task is cast("object", second)
    bench.tick()
    bench.complete(second, 3)
    assert bench.resume(second).result == 3


def test_a_cycle_is_found() -> None:
    class Frame:
        waiting: object

    frame, slot = Frame(), new_slot()
    frame.waiting = begin(slot)
    slot.task = frame  # type: ignore[assignment]
    gone = weakref.ref(frame)
    del frame, slot
    gc.collect()
    assert gone() is None


def test_what_is_thrown_is_an_exception() -> None:
    slot = new_slot()
    with pytest.raises(TypeError):
        begin(slot).throw(5)
    assert slot.state is State.IDLE


def test_nobody_waits_for_what_is_over(bench: Bench) -> None:
    task = bench.start(NOP)
    operation = task.operation
    assert operation is not None
    bench.cancel(task)
    with pytest.raises(RuntimeError, match="over"):
        operation.wait(None).__await__().send(None)


def test_what_is_dropped_unawaited_is_given_up(bench: Bench) -> None:
    """As if its coroutine had ended: nobody is woken for it."""
    buffer = bytearray(8)
    slot = bench.manager._new_slot([], ())
    queue, row = bench.ring, kind(Opcode.READ)
    pin = ffi.from_buffer(buffer)
    dropped = [slot.start(queue, row, "task", set(), 0, FD, FD, 0, 0, 8, 0, pin, None)]
    del pin
    bench.tick()
    dropped.clear()
    assert state_of(slot) is State.DETACHED
    assert pinned(buffer)
    bench.ring.answer(slot.token, 8, 0)
    bench.tick()
    assert state_of(slot) is State.IDLE
    assert not pinned(buffer)


def state_of(slot: Operation) -> State:
    return slot.state


class Staging:
    """Garbage, whose finaliser stages and, if asked to, submits."""

    def __init__(self, bench: Bench, flush: bool) -> None:
        self.bench = bench
        self.flush = flush
        self.itself = self

    def __del__(self) -> None:
        self.bench.manager.ask_cancel(1 << 30, 0)
        if self.flush:
            self.bench.ring.flush()


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("extra", [None, (0, 0, 0, 0)])
def test_a_finaliser_may_stage_at_any_time(bench: Bench, flush: bool, extra: Any) -> None:
    """A garbage collection while something is staged costs nobody an entry, whatever the threshold."""
    threshold = gc.get_threshold()
    try:
        for n in range(1, 40):
            gc.collect()
            Staging(bench, flush)
            gc.set_threshold(n)
            task = bench.start(NOP, FD, extra=extra)
            gc.set_threshold(0)
            tokens = bench.ring._taken + [entry.user_data for entry in bench.ring.staging if entry.opcode == Opcode.NOP]
            assert tokens.count(task.token) == 1
            bench.complete(task, n)
            assert bench.resume(task).result == n
            assert bench.ring.staged == 0
    finally:
        gc.set_threshold(*threshold)
        gc.collect()


# Completions


def test_those_behind_a_failure_can_be_gone_on_with() -> None:
    class Fails:
        def complete(self, token: int, res: int, flags: int) -> None:
            raise RuntimeError(res)

    class Notes:
        def complete(self, token: int, res: int, flags: int) -> None:
            seen.append((token, res, flags))

    seen: list[tuple[int, int, int]] = []
    cqes = iter([1, 5, 6, 0, 7, 8, 1 << 20 | 1, -5, 9])
    with pytest.raises(RuntimeError, match="7"):
        complete_all([Fails(), Notes()], cqes, print)
    complete_all([Fails(), Notes()], cqes, print)
    assert seen == [(1, 5, 6), (1 << 20 | 1, -5, 9)]
    with pytest.raises(IndexError):
        complete_all([], iter([1, 2, 3]), print)


@pytest.mark.parametrize("res", [0, 7, -errno.EIO, -errno.EAGAIN])
@pytest.mark.parametrize("flags", [0, CQE_F_MORE])
@pytest.mark.parametrize("row", [NOP, kind(Opcode.SEND_ZC), kind(Opcode.READ, released=lambda keep: None)])
def test_a_completion_means_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, res: int, flags: int, row: Any
) -> None:
    """As `Operation.complete` does it."""
    found = []
    for in_python in (False, True):
        if in_python:
            monkeypatch.setattr(
                "trio_uring._core.complete_all",
                lambda slots, cqes, wake: [
                    slots[token & INDEX_MASK].complete(token, next(cqes), next(cqes)) for token in cqes
                ],
            )
        task = bench.start(row, FD)
        operation = task.operation
        assert operation is not None
        bench.complete(task, res, flags)
        fields = (operation.state, operation.res, operation.pin, operation.keep, operation in operation.siblings)
        before = (*fields, operation.task is cast("object", task), task.woken, repr(task.value))
        if flags:
            bench.complete(task, 0, 0)
        bench.resume(task)
        found.append((before, repr(task.result), repr(task.error), operation.state))
        if task.parked:
            bench.complete(task, 0, 0)
            bench.resume(task)
    assert found[0] == found[1]


def test_what_is_out_of_the_ordinary_stays_so(bench: Bench) -> None:
    """Also if its entry is filled in Python, in a slot that was ordinary before."""
    released: list[object] = []
    row = kind(Opcode.READ, released=released.append)
    task = bench.start(NOP)
    bench.complete(task, 0)
    bench.resume(task)
    task = bench.start(row, FD, keep="what it keeps", extra=(0, 0, 0, 0))
    bench.complete(task, 0)
    bench.resume(task)
    assert released == ["what it keeps"]
    task = bench.start(NOP, FD, extra=(0, 0, 0, 0))
    bench.complete(task, 5)
    assert bench.resume(task).result == 5


def test_a_former_life_is_noticed(bench: Bench) -> None:
    task = bench.start(NOP)
    bench.tick()
    bench.ring.answer(task.token - (1 << 20), 0, 0)
    with pytest.raises(Exception, match="former life"):
        bench.tick()


# Provided buffers


@pytest.fixture
def buffers() -> BufferRing:
    return BufferRing(ScriptedRing(RingConfig()), 4, 16, 1)


def test_a_buffer_is_copied_and_goes_back(buffers: BufferRing) -> None:
    for n in range(10):
        buffers.view[48:64] = bytes([n] * 16)
        assert buffers.copy(FLAGS, n) == bytes([n] * n)
        at = buffers._entries_pin[(4 + n) % 4]
        assert (at.addr, at.len, at.bid) == (buffers.memory + 48, 16, 3)
        assert buffers._entries_pin[0].resv == 5 + n
    assert buffers.out == 0


@pytest.mark.parametrize(
    ("flags", "length"), [(0, 1), (CQE_F_BUFFER | 4 << CQE_BUFFER_SHIFT, 1), (FLAGS, 17), (FLAGS, -1)]
)
def test_no_such_buffer(buffers: BufferRing, flags: int, length: int) -> None:
    with pytest.raises(ValueError, match="no such buffer"):
        buffers.copy(flags, length)


def receiving(slot: Operation, buffers: BufferRing) -> Any:
    row = kind(Opcode.RECV, flags=SQE_BUFFER_SELECT)
    waiting = slot.receive(slot.owner.ring, row, "task", set(), 0.0, FD, 16, buffers)
    assert waiting is not None
    return waiting


@pytest.mark.parametrize("flags", [FLAGS, 0])
def test_what_is_received_is_picked_up(buffers: BufferRing, flags: int) -> None:
    slot = new_slot()
    waiting = receiving(slot, buffers)
    buffers.view[48:50] = b"hi"
    complete_all([None] * 5 + [slot], iter([slot.token, 2 if flags else 0, flags]), lambda task, value: None)
    assert slot.state is State.SETTLED
    stop = raised_by(lambda: waiting.send(2 if flags else 0))
    assert isinstance(stop, StopIteration)
    assert stop.value == (b"hi" if flags else b"")
    assert (slot.state, slot.task, slot.home) == (State.IDLE, None, [slot])


def test_without_a_buffer_there_is_another_way(buffers: BufferRing) -> None:
    slot = new_slot()
    waiting = receiving(slot, buffers)
    complete_all([None] * 5 + [slot], iter([slot.token, -errno.ENOBUFS, 0]), print)
    stop = raised_by(lambda: waiting.send(-errno.ENOBUFS))
    assert isinstance(stop, StopIteration)
    assert stop.value is None
    assert (slot.state, slot.home) == (State.IDLE, [slot])
