"""A ring beside trio's own I/O manager, mounted by the first call in a stock run, against a run that has it from the
start, and against none.
"""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from trio_uring import lowlevel

from . import idle_tick, reads
from ._harness import compare, heading, ring_run, time_tasks

if TYPE_CHECKING:
    from ._harness import Loop

READS: Final = {1: 3000, 100: 60}
ROUND_TRIPS: Final = 2000
RUNS: Final = 100


async def lowlevel_round_trips(times: int) -> float:
    """Two tasks that send each other one byte."""
    here, there = socket.socketpair()
    with here, there:

        async def answer() -> None:
            buffer = bytearray(1)
            while await lowlevel.recv(there, buffer):
                await lowlevel.send(there, buffer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            buffer = bytearray(1)
            start = time.perf_counter()
            for _ in range(times):
                await lowlevel.send(here, b"x")
                await lowlevel.recv(here, buffer)
            duration = time.perf_counter() - start
            here.shutdown(socket.SHUT_WR)
    return duration / times


async def stock_round_trips(times: int) -> float:
    """The same with trio's sockets."""
    here, there = trio.socket.socketpair()
    with here, there:

        async def answer() -> None:
            while data := await there.recv(1):
                await there.send(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            start = time.perf_counter()
            for _ in range(times):
                await here.send(b"x")
                await here.recv(1)
            duration = time.perf_counter() - start
            here.shutdown(socket.SHUT_WR)
    return duration / times


async def idle_beside_a_ring(loop: Loop, tasks: int, times: int) -> float:
    await lowlevel.nop()
    return await time_tasks(loop, tasks, times)


def time_runs(main: Any) -> float:
    """Seconds for a run from its start to its end."""
    start = time.perf_counter()
    for _ in range(RUNS):
        trio.run(main)
    return (time.perf_counter() - start) / RUNS


def main(rounds: int) -> None:
    """Each cost on the attached mount, against the native one and stock trio."""
    fd = reads.cached_file()
    ring, threads = reads.ring_loop(fd), reads.threads_loop(fd)
    heading("mounts: attached against native", "trio_uring.run", "trio.run, a ring mounted beside")
    for tasks, times in READS.items():
        native, attached = (partial(run, time_tasks, ring, tasks, times) for run in (ring_run, trio.run))
        compare(f"{tasks} small reads", native, attached, rounds=rounds)
    compare(
        "lone ping-pong",
        partial(ring_run, lowlevel_round_trips, ROUND_TRIPS),
        partial(trio.run, lowlevel_round_trips, ROUND_TRIPS),
        rounds=rounds,
    )
    heading("mounts: attached against stock trio", "trio.run, threads and epoll", "trio.run, a ring mounted beside")
    for tasks, times in READS.items():
        stock, attached = (
            partial(trio.run, time_tasks, loop, tasks, max(times // slower, 5))
            for loop, slower in ((threads, 10), (ring, 1))
        )
        compare(f"{tasks} small reads", stock, attached, rounds=rounds)
    compare(
        "lone ping-pong",
        partial(trio.run, stock_round_trips, ROUND_TRIPS),
        partial(trio.run, lowlevel_round_trips, ROUND_TRIPS),
        rounds=rounds,
    )
    compare(
        "idle tick",
        partial(trio.run, time_tasks, idle_tick.loop, 1, idle_tick.TICKS),
        partial(trio.run, idle_beside_a_ring, idle_tick.loop, 1, idle_tick.TICKS),
        rounds=rounds,
        target=0.97,
    )
    heading("mounts: a run that mounts", "trio.run of a checkpoint", "trio.run of a nop on the ring", "us per run")
    compare("run", partial(time_runs, trio.lowlevel.checkpoint), partial(time_runs, lowlevel.nop), rounds=rounds)
    os.close(fd)
