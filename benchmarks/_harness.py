"""Paired measurements: short rounds, the two sides in turn, the median of the rounds' ratios."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import TypeVarTuple, Unpack

    Args = TypeVarTuple("Args")

    Loop = Callable[[int], Awaitable[object]]
    """Does an operation so many times, one after the other."""

    Round = Callable[[], float]
    """One round of one side; returns the cost of one operation, in seconds."""

T = TypeVar("T")

ROOT: Final = Path(__file__).parent.parent
CORES: Final = sorted(os.sched_getaffinity(0))


def ring_run(async_fn: Callable[[Unpack[Args]], Awaitable[T]], *args: Unpack[Args]) -> T:
    """`trio_uring.run`, without a fallback: that would be measured as the ring."""
    return trio_uring.run(async_fn, *args, config=trio_uring.RingConfig(mode="require"))


async def time_tasks(loop: Loop, tasks: int, times: int) -> float:
    """Seconds per operation of ``tasks`` tasks that each do ``times`` operations, once all are started and warm."""
    warm = 0
    all_warm, go = trio.Event(), trio.Event()

    async def one_task() -> None:
        nonlocal warm
        await loop(2)
        warm += 1
        if warm == tasks:
            all_warm.set()
        await go.wait()
        await loop(times)

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(one_task)
        await all_warm.wait()
        start = time.perf_counter()
        go.set()
    return (time.perf_counter() - start) / (tasks * times)


def compare(
    name: str,
    a: Round,
    b: Round,
    *,
    rounds: int,
    target: float | None = None,
    calls: tuple[float | None, float | None] | None = None,
    calls_target: float | None = None,
) -> None:
    """Measures both sides ``rounds`` times, in turn, and prints one line.

    Args:
        name: what is measured.
        a, b: what the ring is compared with; the ring.
        rounds: how many pairs; a ratio is taken of each.
        target: what the ratio should be at least.
        calls: system calls per operation of ``a`` and ``b``; None is "cannot be counted here".
        calls_target: how many of them ``b`` should make at most.
    """
    a(), b()  # warm-up
    costs: dict[Round, list[float]] = {a: [], b: []}
    for number in range(rounds):
        for measure in (a, b) if number % 2 == 0 else (b, a):
            gc.collect()
            costs[measure].append(measure())
    report(name, costs[a], costs[b], target=target, calls=calls, calls_target=calls_target)


def report(
    name: str,
    a: list[float],
    b: list[float],
    *,
    target: float | None = None,
    calls: tuple[float | None, float | None] | None = None,
    calls_target: float | None = None,
    scale: float = 1e6,
) -> None:
    """Prints one line about what was measured in pairs.

    Args:
        name: what was measured.
        a, b: the cost of one operation: of what the ring is compared with; of the ring.
        target, calls, calls_target: as for `compare`.
        scale: what the costs are multiplied with before they are printed.
    """
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    ratio = statistics.median(ratios)
    columns = [f"{name:24}", *map(_spread, ([cost * scale for cost in a], [cost * scale for cost in b], ratios))]
    if target is not None:
        columns.append(f"{f'at least {target:.3g}':14} {'met' if ratio >= target else 'MISSED'}")
    elif ratio < 1:
        columns.append("B is slower")
    if calls is not None:
        columns.append(f"system calls {' : '.join('n/a' if n is None else f'{n:.3f}' for n in calls)}")
        if calls_target is not None and calls[1] is not None:
            columns.append(f"at most {calls_target:.3g} {'met' if calls[1] <= calls_target else 'MISSED'}")
    print("  ".join(columns).rstrip(), flush=True)


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values)
    return f"{middle:7.2f} [{low:.2f} {high:.2f}]".ljust(24)


def heading(title: str, a: str, b: str, unit: str = "us per operation") -> None:
    """Says what the columns of the following lines are."""
    print(f"\n{title}\n  A  {a}\n  B  {b}\n")
    print(f"{unit:24}  {'A':24}  {'B':24}  {'A / B':24}  median [quartiles]", flush=True)


def describe_machine() -> str:
    """What the numbers were measured on."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    capabilities = trio_uring.capabilities()
    return "\n".join(
        (
            f"machine   {os.cpu_count()} x {models[0] if models else platform.machine()}",
            f"load      {os.getloadavg()[0]:.2f}",
            f"kernel    {capabilities.kernel}",
            f"set-up    {' '.join(capabilities.setup_flags)}",
            f"python    {platform.python_implementation()} {sys.version.split()[0]}",
            f"trio      {metadata.version('trio')}",
            f"liburing  {capabilities.liburing}",
        )
    )


def pin(process: int, core: int) -> bool:
    """Keeps a process (0: this one) on one of the first two cores; False if there are not two."""
    if len(CORES) < 2:
        return False
    os.sched_setaffinity(process, {CORES[core]})
    return True
