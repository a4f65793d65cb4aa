"""From ``scope.cancel()`` to the moment the cancelled task runs again, for a receive the kernel waits in."""

from __future__ import annotations

import socket
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from trio_uring import lowlevel

from ._harness import compare, heading, ring_run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CANCELS: Final = 300


async def median_latency(make_receive: Callable[[socket.socket], Callable[[], Awaitable[object]]]) -> float:
    here, there = socket.socketpair()
    receive = make_receive(here)
    latencies = []
    cancelled_at = 0.0

    async def victim(scope: trio.CancelScope, resumed: trio.Event) -> None:
        with scope:
            try:
                await receive()
            finally:
                latencies.append(time.perf_counter() - cancelled_at)
        resumed.set()

    async with trio.open_nursery() as nursery:
        for _ in range(CANCELS):
            scope, resumed = trio.CancelScope(), trio.Event()
            nursery.start_soon(victim, scope, resumed)
            for _ in range(3):  # until the request is with the kernel
                await trio.lowlevel.checkpoint()
            cancelled_at = time.perf_counter()
            scope.cancel()
            await resumed.wait()
            assert scope.cancelled_caught
    here.close()
    there.close()
    return statistics.median(latencies)


def stock_receive(sock: socket.socket) -> Callable[[], Awaitable[object]]:
    wrapped = trio.socket.from_stdlib_socket(sock)
    return lambda: wrapped.recv(64)


def ring_receive(sock: socket.socket) -> Callable[[], Awaitable[object]]:
    buffer = bytearray(64)
    return lambda: lowlevel.recv(sock, buffer)


def main(rounds: int) -> None:
    """A receive on a socketpair."""
    heading(
        "cancel: from cancel() to resumed", "trio.socket, recv(64)", "trio_uring.lowlevel.recv", "us, median of a round"
    )
    compare(
        "cancel",
        partial(trio.run, median_latency, stock_receive),
        partial(ring_run, median_latency, ring_receive),
        rounds=rounds,
        target=1 / 1.3,
    )
