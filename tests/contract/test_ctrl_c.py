"""Ctrl-C ends what waits in the ring, and finds nothing half done."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, interrupted_at_line, parked
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Bench, Mount


class BeforeSleep(trio.abc.Instrument):
    """Starts ``action`` in a thread of its own, or in this one, when the run is about to sleep."""

    def __init__(self, action: Callable[[], object], *, in_thread: bool = False) -> None:
        self._thread = threading.Thread(target=action)
        self._start = self._thread.start if in_thread else self._thread.run

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 1:
            trio.lowlevel.remove_instrument(self)
            self._start()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


ACTIONS = {
    "before the wait": (_interrupt, False),
    "from a thread": (_interrupt_main_thread, True),
    "to another thread": (_interrupt, True),  # it does nothing about it; the run has to be woken
}


@pytest.mark.parametrize("action", ACTIONS)
def test_in_recv(mount: Mount, bench: Bench, action: str) -> None:
    a, b = bench.sockets()
    function, in_thread = ACTIONS[action]
    for _ in range(10):
        interruption = BeforeSleep(function, in_thread=in_thread)

        async def main(interruption: BeforeSleep = interruption) -> None:
            trio.lowlevel.add_instrument(interruption)
            try:
                await lowlevel.recv(a, bytearray(9))
            finally:
                assert statistics().in_flight == 0

        with pytest.raises(KeyboardInterrupt):
            mount.run(main)
        interruption.join()
        b.send(b"hello")
        assert a.recv(9) == b"hello"


def test_with_other_tasks(mount: Mount, bench: Bench) -> None:
    """The others are cancelled in good order."""
    a, b = bench.sockets()
    attempts: list[Attempt[Any]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            attempts.extend([await parked(nursery, lowlevel.read, a, bytearray(1)) for _ in range(3)])
            trio.lowlevel.add_instrument(BeforeSleep(_interrupt))
            await trio.sleep_forever()

    with pytest.RaisesGroup(KeyboardInterrupt):
        mount.run(main)
    assert all(attempt.done for attempt in attempts)
    b.send(b"x")
    assert a.recv(9) == b"x"


@pytest.mark.parametrize("data", [b"", b"hello"], ids=["blocked", "ready"])
def test_at_every_line(mount: Mount, data: bytes) -> None:
    """Between the call and the park, at submission, at completion, at the pick-up: no operation and no byte is lost."""
    for n in itertools.count(1):
        a, b = socket.socketpair()
        with a, b:
            b.send(data)
            lines, received, buffer = _run_interrupted_at(mount, n, a)
            buffer.append(0)
            if received is not None:
                assert buffer[:received] == data
            elif data:
                assert a.recv(9, socket.MSG_DONTWAIT) == data
        if lines < n:
            break
    assert n > 20


def _run_interrupted_at(mount: Mount, n: int, sock: socket.socket) -> tuple[int, int | None, bytearray]:
    """How many lines there were; what recv returned, if it did; its buffer."""
    lines = 0
    received = None
    buffer = bytearray(9)

    async def main() -> None:
        nonlocal lines, received
        with interrupted_at_line(n) as stop:
            try:
                received = await lowlevel.recv(sock, buffer)
                await trio.lowlevel.checkpoint()
            finally:
                lines = stop()
                assert statistics().in_flight == 0

    async def main_with_deadline() -> None:
        with trio.move_on_after(1):  # nobody interrupts it the last time
            await main()

    try:
        mount.run(main_with_deadline, clock=trio.testing.MockClock(autojump_threshold=0))
    except KeyboardInterrupt:
        assert lines >= n
    else:
        assert lines < n
    return lines, received, buffer
