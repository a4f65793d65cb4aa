"""Multishot operations on a simulated kernel that ends them as it likes: nothing is lost, doubled or left behind."""

from __future__ import annotations

import contextlib
import random
import socket
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import trio_uring
from tests.helpers import crash, manager, only_trio_complains
from trio_uring import RingConfig, _core, _multishot, lowlevel
from trio_uring.testing import SimulatedRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._multishot import Multishot

FIRST_FD = 500_000
TURNS = 10
NOTHING = object()


class Program:
    """Tasks that each iterate over a multishot operation, and one that gets in their way.

    Args:
        choices: what happens.
        ring: the kernel.
    """

    def __init__(self, choices: random.Random, ring: SimulatedRing) -> None:
        self.choices = choices
        self.ring = ring
        self.owned: set[int] = set()
        self.received: dict[int, bytearray] = {}
        self.ticks = 0

    def rarely(self) -> bool:
        return self.choices.randrange(4) == 3

    async def main(self) -> None:
        limit = 1 + self.choices.randrange(4)
        incremental = self.choices.randrange(2) == 1
        with self.pool(incremental) as shared, self.pool(False) as plain:
            receives = [
                (FIRST_FD, partial(lowlevel.recv_multishot, pool=shared)),
                (FIRST_FD + 1, partial(lowlevel.recv_multishot, pool=shared)),
                (FIRST_FD + 2, partial(lowlevel.read_multishot, pool=plain)),
            ]
            uses: list[tuple[Multishot[Any], Callable[[Any], None]]] = []
            for fd, call in receives:
                self.received[fd] = received = bytearray()
                uses.append((call(fd, limit=limit), received.extend))
            uses.append((lowlevel.accept_multishot(FIRST_FD + 3, limit=limit), self.owned.add))
            uses.append((lowlevel.poll_multishot(FIRST_FD + 4, 1), self.count))
            uses.append((lowlevel.timeout_multishot(1), self.count))
            scopes = [trio.CancelScope() for _ in uses]
            async with trio.open_nursery() as nursery:
                for (stream, take), scope in zip(uses, scopes, strict=True):
                    nursery.start_soon(self.use, stream, take, scope)
                for _ in range(self.choices.randrange(20)):
                    await trio.lowlevel.checkpoint()
                    if self.rarely():
                        trio.lowlevel.notify_closing(FIRST_FD + self.choices.randrange(5))
                    elif self.rarely():
                        scopes[self.choices.randrange(len(scopes))].cancel()
            for stream, take in uses:
                assert not stream._queue
                if take != self.count:
                    for item in stream.leftover:
                        take(item)
            for pool in (shared, plain):
                assert pool.available == pool.count
        assert trio_uring.statistics().in_flight == 0
        assert manager()._counted_slots == len(manager()._idle)

    def pool(self, incremental: bool) -> lowlevel.BufferPool:
        return lowlevel.BufferPool(
            1 << self.choices.randrange(3), 1 + self.choices.randrange(6), incremental=incremental
        )

    def count(self, item: int) -> None:
        assert item > 0
        self.ticks += item

    async def use(self, stream: Multishot[Any], take: Callable[[Any], None], scope: trio.CancelScope) -> None:
        """Iterates, with cancels and errors in between."""
        with scope, contextlib.suppress(trio.ClosedResourceError):
            async with stream:
                for _ in range(TURNS):
                    with trio.CancelScope() as impatience, contextlib.suppress(OSError):
                        impatience.cancel() if self.rarely() else None
                        try:
                            take(await stream.__anext__())
                        except (StopAsyncIteration, trio.ClosedResourceError):
                            break
                    if self.choices.randrange(TURNS) == TURNS - 1:
                        await stream.stop()

    def check(self) -> None:
        for fd, data in self.received.items():
            assert data == bytes(n % 256 for n in range(self.ring.received[fd]))
        assert self.ring.open_fds == self.owned


def run(choices: random.Random, **config: Any) -> None:
    size = RingConfig(entries=1, **config)
    ring = SimulatedRing(choices, config=size, rarity=4)
    program = Program(choices, ring)
    with (
        mock.patch.object(_core, "Ring", return_value=ring),
        mock.patch.object(_multishot, "_kind_of_socket", return_value=socket.SOCK_STREAM),
        mock.patch.object(_multishot, "close_result", lambda fd, keep: ring.close_fd(fd)),
    ):
        trio_uring.run(program.main, config=size)
    program.check()


@settings(max_examples=60, deadline=None)
@given(choices=st.randoms(use_true_random=False))
def test_nothing_is_lost(choices: random.Random) -> None:
    run(choices)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_with_little_room(seed: int) -> None:
    run(random.Random(seed), cq_entries=1 + seed % 3, max_in_flight=1 + seed % 7)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_left_by_a_run_that_is_torn_down(seed: int) -> None:
    """Connections that have come, and that come while the ring is drained, are closed."""
    choices = random.Random(seed)
    ring = SimulatedRing(choices, rarity=10)

    async def main() -> None:
        async with lowlevel.accept_multishot(FIRST_FD, limit=100) as connections:
            for _ in range(1 + choices.randrange(5)):
                ring.close_fd(await connections.__anext__())
            await trio.lowlevel.checkpoint()
            await crash()

    with (
        mock.patch.object(_core, "Ring", return_value=ring),
        mock.patch.object(_multishot, "close_result", lambda fd, keep: ring.close_fd(fd)),
        only_trio_complains(),
        contextlib.suppress(trio.TrioInternalError, OSError),
    ):
        trio_uring.run(main)
    assert ring.open_fds == set()
