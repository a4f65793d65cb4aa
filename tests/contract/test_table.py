"""Every operation of the table, in every way it can end. One without its cases fails."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.contract.cases import CASES
from tests.helpers import Attempt, manager, nothing_submitted, spin_until
from trio_uring import UnsupportedOperation, lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

ALL = pytest.mark.parametrize("name", lowlevel.TABLE)
WITH_FALLBACK = [name for name, kind in lowlevel.TABLE.items() if kind.fallback is not None]

# They name files by their path, or nothing at all.
WITHOUT_FD = {
    "socket",
    "pipe",
    "madvise",
    "getxattr",
    "setxattr",
    "futex_wait",
    "futex_wake",
    "futex_waitv",
    "timeout",
    "nop",
    "msg_ring",
}
# An open of a FIFO does not block as open(2) does, and nothing here makes a close block.
NEVER_SEEN_TO_BLOCK = {"openat", "openat2", "close"}


def test_every_row_has_its_cases() -> None:
    assert CASES.keys() == lowlevel.TABLE.keys()
    assert {name for name, case in CASES.items() if case.fails is None} == {"nop"}
    assert {name for name, case in CASES.items() if case.closed is None} == WITHOUT_FD
    blocking = {name for name, kind in lowlevel.TABLE.items() if kind.cancellable}
    assert {name for name, case in CASES.items() if case.blocked is not None} == blocking - NEVER_SEEN_TO_BLOCK


def _check_nothing_is_held() -> None:
    """By an operation that is over."""
    assert statistics().in_flight == 0
    for operation in manager()._idle:
        assert operation.pin is None
        assert operation.keep is None
        assert operation.task is None


def _what(exc: BaseException) -> dict[str, Any]:
    return {"class": type(exc), **{name: getattr(exc, name, None) for name in ("errno", "filename", "filename2")}}


async def _check_same_failure(call: Callable[[], Awaitable[object]], oracle: Callable[[], object]) -> None:
    with pytest.raises((OSError, ValueError, OverflowError)) as expected:
        oracle()
    with pytest.raises(type(expected.value)) as raised:
        await call()
    if isinstance(expected.value, OSError):
        assert _what(raised.value) == _what(expected.value)


@ALL
async def test_success(bench: Bench, name: str) -> None:
    await CASES[name].ready(bench)()
    _check_nothing_is_held()


@ALL
async def test_failure(bench: Bench, name: str) -> None:
    if (fails := CASES[name].fails) is not None:
        await _check_same_failure(*fails(bench))
        _check_nothing_is_held()


def _number_of_nothing() -> int:
    """Far above what is open: no other thread gets it next."""
    number = fcntl.fcntl(0, fcntl.F_DUPFD, 700)
    os.close(number)
    return number


@ALL
async def test_a_closed_fd(name: str) -> None:
    if (closed := CASES[name].closed) is not None:
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            await closed(_number_of_nothing())
        assert raised.value.errno == errno.EBADF
        _check_nothing_is_held()


@ALL
async def test_a_result_beats_a_cancel_that_comes_after_it(bench: Bench, name: str) -> None:
    def complete_and_cancel() -> None:
        manager().ring.flush()
        spin_until(manager().ring.pending)
        attempt.scope.cancel()

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, CASES[name].ready(bench), once_parked=complete_and_cancel)
        await attempt.result()
    _check_nothing_is_held()


@ALL
async def test_cancelled_as_soon_as_the_kernel_has_it(bench: Bench, name: str) -> None:
    """It ends either way, and if it is cancelled it has not happened."""

    def submit_and_cancel() -> None:
        manager().ring.flush()
        attempt.scope.cancel()

    call = CASES[name].ready(bench)
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, call, once_parked=submit_and_cancel)
        await attempt.settled()
    if attempt.cancelled:
        await call()
    assert attempt.error is None
    _check_nothing_is_held()


@ALL
async def test_a_kernel_that_lacks_it(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe does not find is named, with the kernel that brought it, or done without the ring."""
    call = CASES[name].ready(bench)
    kind = lowlevel.TABLE[name]
    for opcode in kind.needs:
        async with nothing_submitted():
            with monkeypatch.context() as patch:
                patch.setattr(manager(), "_missing", frozenset({opcode}))
                if kind.fallback is None:
                    with pytest.raises(UnsupportedOperation, match=rf"{name} .*{kind.opcode.name}.*{kind.since}"):
                        await call()
                else:
                    await CASES[name].ready(bench)()
    await call()


@pytest.mark.parametrize("name", WITH_FALLBACK)
async def test_failure_without_the_ring(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    assert case.fails is not None
    monkeypatch.setattr(manager(), "_missing", lowlevel.TABLE[name].needs)
    async with nothing_submitted():
        await _check_same_failure(*case.fails(bench))
        if case.closed is not None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                await case.closed(_number_of_nothing())


@pytest.mark.parametrize("name", WITH_FALLBACK)
async def test_the_fallback_is_a_checkpoint(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager(), "_missing", lowlevel.TABLE[name].needs)
    call = CASES[name].ready(bench)
    with trio.testing.assert_checkpoints():
        await call()
    with trio.CancelScope() as scope:
        scope.cancel()
        with trio.testing.assert_checkpoints():
            await CASES[name].ready(bench)()
    assert scope.cancelled_caught
