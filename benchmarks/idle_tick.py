"""A scheduler tick with one task that only makes checkpoints: what the ring costs when nobody uses it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from ._harness import compare, heading, ring_run, time_tasks
from .syscalls import count

if TYPE_CHECKING:
    from collections.abc import Callable

    from .syscalls import Mark

TICKS: Final = 5000


async def loop(times: int) -> None:
    for _ in range(times):
        await trio.lowlevel.checkpoint()


def calls_per_tick(run: Callable[..., object]) -> float | None:
    async def counted(mark: Mark) -> None:
        await loop(10)
        mark()
        await loop(1000)
        mark()

    calls = count(lambda mark: run(counted, mark))
    return None if calls is None else calls / 1000


def main(rounds: int) -> None:
    """One task, no I/O."""
    calls = calls_per_tick(trio.run), calls_per_tick(ring_run)
    heading("idle_tick: a checkpoint in a loop", "trio.run", "trio_uring.run")
    compare(
        "idle_tick",
        partial(trio.run, time_tasks, loop, 1, TICKS),
        partial(ring_run, time_tasks, loop, 1, TICKS),
        rounds=rounds,
        target=1.0,
        calls=calls,
    )
