"""Batches and chains race with cancels, closes and their peers: nothing is lost, or done twice, or left."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import Attempt, drain, manager, parked
from tests.stress.test_races import Partner
from tests.unit.by_hand import pinned
from trio_uring import lowlevel, statistics
from trio_uring._registered import MAX_DIRECT
from trio_uring.lowlevel import batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers import Bench

ROUNDS = 1500


@pytest.fixture
def partner() -> Iterator[Partner]:
    partner = Partner()
    yield partner
    partner.close()


def received(attempt: Attempt[list[Any]], buffers: list[bytearray]) -> bytes:
    """What the reads that were done have read."""
    if attempt.cancelled:
        return b""
    counts = [0 if isinstance(result, OSError) else result for result in attempt.value]
    return b"".join(bytes(buffer[:count]) for buffer, count in zip(buffers, counts, strict=True))


async def test_a_cancel_races_with_the_data(bench: Bench, partner: Partner) -> None:
    """Each byte is read by the batch or left in its pipe."""
    pipes = [bench.pipe() for _ in range(3)]
    ways: Counter[int] = Counter()
    for n in range(ROUNDS):
        buffers = [bytearray(1) for _ in pipes]
        new = batch()
        new.extend(lowlevel.read, ((pipe[0], buffer) for pipe, buffer in zip(pipes, buffers, strict=True)))
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            for _ in range(n % 3):
                await trio.lowlevel.checkpoint()
            partner.begin(lambda: [os.write(write_end, b"x") for _, write_end in pipes[:2]])
            if n % 2:
                partner.result()
            attempt.scope.cancel()
            await attempt.settled()
        if not n % 2:
            partner.result()
        got = len(received(attempt, buffers))
        left = b""
        for read_end, _ in pipes:
            os.set_blocking(read_end, False)
            try:
                left += os.read(read_end, 9)
            except BlockingIOError:
                pass
            os.set_blocking(read_end, True)
        assert got + len(left) == 2
        assert not any(map(pinned, buffers))
        ways[got] += 1
    assert statistics().in_flight == 0
    assert ways[0]


async def test_a_cancel_races_with_a_chain(bench: Bench, partner: Partner) -> None:
    """What the first step has read, the second has written, or has not."""
    source, target = bench.pipe(), bench.pipe()
    fd = bench.file(b"x")
    for n in range(ROUNDS):
        new = batch()
        steps = new.chain()
        buffer = bytearray(1)
        (steps.add_hard if n % 4 < 2 else steps.add)(lowlevel.read, source[0], buffer)
        steps.add(lowlevel.write, target[1], b"y")
        steps.add(lowlevel.read, fd, bytearray(1), 0)
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, new.run)
            partner.begin(lambda: os.write(source[1], b"x"))
            if n % 2:
                partner.result()
            attempt.scope.cancel()
            await attempt.settled()
        if not n % 2:
            partner.result()
        results = [0, 0, 0] if attempt.cancelled else attempt.value
        first, second = (result == 1 for result in results[:2])
        if not first:
            assert os.read(source[0], 9) == b"x"
        if second:
            assert os.read(target[0], 9) == b"y"
            assert first or n % 4 < 2
    for read_end, _ in (source, target):
        os.set_blocking(read_end, False)
        with pytest.raises(BlockingIOError):
            os.read(read_end, 1)
    assert statistics().in_flight == 0


async def test_a_cancel_races_with_opens(bench: Bench) -> None:
    """Each fd is handed over or closed; in the end none is left."""
    path = bench.path(b"x")
    read_end, _ = bench.pipe()
    for n in range(ROUNDS):
        new = batch()
        new.extend(lowlevel.openat, [(path, os.O_RDONLY)] * 3)
        steps = new.chain()
        file = steps.direct(lowlevel.openat, path, os.O_RDONLY)
        steps.add(lowlevel.read, file, bytearray(1), 0)
        steps.add(lowlevel.openat, path, os.O_RDONLY)
        if n % 3 == 0:
            steps.add(lowlevel.read, read_end, bytearray(1))
        elif n % 3 == 1:
            steps.add(lowlevel.openat, "/missing", os.O_RDONLY)
            steps.add(lowlevel.nop)
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            for _ in range(n % 5):
                await trio.lowlevel.checkpoint()
            attempt.scope.cancel()
            await attempt.settled()
        if not attempt.cancelled:
            for position in (0, 1, 2, 5):
                if isinstance(attempt.value[position], int):
                    os.close(attempt.value[position])
    assert statistics().in_flight == 0
    assert manager().registered.has_places(MAX_DIRECT)


async def test_a_close_races_with_the_data(bench: Bench, partner: Partner) -> None:
    """The read of a closed fd is told so or done; the number may be reused at once."""
    decoy = bench.pipe()
    os.write(decoy[1], b"decoy")
    for n in range(ROUNDS):
        read_end, write_end = os.pipe()
        other_end, feed = os.pipe()
        buffers = [bytearray(1), bytearray(1)]
        new = batch()
        new.add(lowlevel.read, read_end, buffers[0])
        new.add(lowlevel.read, other_end, buffers[1])
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            for _ in range(2 + n % 3):  # it has begun
                await trio.lowlevel.checkpoint()
            partner.begin(partial(os.write, write_end, b"x"))
            if n % 2:
                partner.result()
            lowlevel.notify_closing(read_end)
            os.dup2(decoy[0], read_end)
            os.write(feed, b"y")
            first, second = await attempt.result()
        if not n % 2:
            wrote = partner._done.get()  # EPIPE, if the pipe had no reader any more
            assert wrote == 1 or isinstance(wrote, BrokenPipeError)
        assert second == 1
        assert isinstance(first, trio.ClosedResourceError) or (first, bytes(buffers[0])) == (1, b"x")
        for fd in (read_end, write_end, other_end, feed):
            os.close(fd)
    assert drain(decoy[0], 5) == b"decoy"


@pytest.mark.seconds(60)
@pytest.mark.ring(entries=16, max_in_flight=64)
@pytest.mark.parametrize("seed", range(3))
async def test_everything_at_once(bench: Bench, seed: int) -> None:
    """Tasks run batches and chains of all shapes, while others cancel them and close their fds."""
    choices = random.Random(seed)
    pipes = [os.pipe() for _ in range(6)]
    path = bench.path(b"hello")
    buffers: list[bytearray] = []
    outcomes: Counter[str] = Counter()

    def add_something(add: Any, files: list[Any]) -> None:
        read_end, write_end = choices.choice(pipes)
        buffer = bytearray(choices.randrange(1, 9))
        buffers.append(buffer)
        what = choices.randrange(7)
        if what < 2:
            add(lowlevel.read, read_end, buffer)
        elif what < 4:
            add(lowlevel.write, write_end, buffer)
        elif what == 4 and files:
            add(lowlevel.read, choices.choice(files), buffer, 0)
        elif what == 5:
            add(lowlevel.openat, path, os.O_RDONLY)
        else:
            add(lowlevel.nop)

    async def work(scope: trio.CancelScope) -> None:
        new = batch()
        for _ in range(choices.randrange(1, 8)):
            if choices.randrange(2):
                add_something(new.add, [])
                continue
            steps = new.chain()
            files = [steps.direct(lowlevel.openat, path, os.O_RDONLY)] if choices.randrange(2) else []
            for _ in range(choices.randrange(1, 5)):
                add_something(choices.choice([steps.add, steps.add_hard]), files)
        with scope:
            results = await new.run()
            for result in results:
                outcomes[type(result).__name__] += 1
                if isinstance(result, int) and result > 8:  # an fd: no count is as large
                    os.close(result)
            return
        outcomes["Cancelled"] += 1

    with trio.fail_after(50):
        for _ in range(40):
            scopes = [trio.CancelScope() for _ in range(12)]
            async with trio.open_nursery() as nursery:
                for scope in scopes:
                    nursery.start_soon(work, scope)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
                    if choices.randrange(3):
                        choices.choice(scopes).cancel()
                    else:
                        n = choices.randrange(len(pipes))
                        fds, pipes[n] = pipes[n], os.pipe()
                        for fd in fds:
                            lowlevel.notify_closing(fd)
                            os.close(fd)
                for scope in scopes:
                    scope.cancel()
            assert statistics().in_flight == 0
            assert not any(map(pinned, buffers))
            buffers.clear()
    assert statistics().peak <= 64
    assert manager().registered.has_places(MAX_DIRECT)
    assert {"int", "OSError", "ClosedResourceError", "ChainBrokenError", "Cancelled"} <= outcomes.keys(), outcomes
    for fds in pipes:
        for fd in fds:
            os.close(fd)


@pytest.mark.ring(entries=64)
async def test_a_storm_on_chains(bench: Bench) -> None:
    """10,000 requests in chains, cancelled at once, before the kernel has begun them all."""
    read_end, write_end = bench.pipe()
    for ticks in (0, 1, 2, 5):
        new = batch()
        for n in range(2500):
            steps = new.chain()
            steps.add(lowlevel.nop)
            for _ in range(3):
                (steps.add_hard if n % 2 else steps.add)(lowlevel.read, read_end, bytearray(1))
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            with trio.fail_after(20, shield=True):
                attempt.scope.cancel()
                await attempt.settled()
        if not attempt.cancelled:
            seen = {result.errno if isinstance(result, OSError) else result for result in attempt.value}
            assert seen <= {None, errno.ECANCELED}
        assert statistics().in_flight == 0
    os.write(write_end, b"x")
    assert os.read(read_end, 9) == b"x"
