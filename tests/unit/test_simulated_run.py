"""A real trio run on a simulated kernel: trio's own scheduling and cancelling, and results in every order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import trio

import trio_uring
from tests.helpers import manager
from tests.unit.by_hand import kind, no_garbage_collection, pinned
from trio_uring import RingConfig, _core
from trio_uring._abi import Opcode
from trio_uring._ring import ffi
from trio_uring.testing import SimulatedRing

if TYPE_CHECKING:
    from trio_uring._cancel import Kind

FDS = range(500_000, 500_004)
SIZE = 8
CALLS = 12
EXPECTED = (OSError, trio.BusyResourceError, trio.ClosedResourceError)


class Program:
    """Tasks that do all kinds of operations, and one that gets in their way."""

    def __init__(self, seed: int, ring: SimulatedRing) -> None:
        self.random = random.Random(seed)
        self.ring = ring
        self.owned: set[int] = set()
        self.buffers: list[bytearray] = []
        self.ended = 0

        def dispose(fd: int, keep: Any) -> None:
            ring.close_fd(fd)

        self.kinds = [
            kind(Opcode.READ, wait_for=1),
            kind(Opcode.WRITE),
            kind(Opcode.SEND_ZC, wait_for=4, direction="write"),
            kind(Opcode.OPENAT, result="fd", dispose=dispose),
            kind(Opcode.ACCEPT, result="fd", dispose=dispose, direction="read", wait_for=1),
            kind(Opcode.FSYNC, result="nothing"),
        ]

    async def call(self, row: Kind[Any], fd: int, scope: trio.CancelScope) -> None:
        buffer = bytearray(SIZE)
        self.buffers.append(buffer)
        with scope:
            for _ in range(3):
                try:
                    res = await manager().perform(row, fd, -1, ffi.from_buffer(buffer), -1)
                except EXPECTED:
                    continue
                if row.result == "fd":
                    self.owned.add(res)
        self.ended += 1

    async def main(self) -> None:
        scopes = [trio.CancelScope() for _ in range(CALLS)]
        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(self.call, self.random.choice(self.kinds), self.random.choice(FDS), scope)
            for _ in range(self.random.randrange(10)):
                await trio.lowlevel.checkpoint()
                if self.random.randrange(2):
                    self.random.choice(scopes).cancel()
                else:
                    trio.lowlevel.notify_closing(self.random.choice(FDS))


@pytest.mark.parametrize("seed", range(60))
def test_a_run(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    config = RingConfig(entries=1, cq_entries=1 + seed % 3, max_in_flight=1 + seed % 5)
    ring = SimulatedRing(random.Random(seed), config=config, rarity=3)
    monkeypatch.setattr(_core, "Ring", lambda config: ring)
    program = Program(seed, ring)
    with no_garbage_collection():
        trio_uring.run(program.main, config=config)
        assert program.ended == CALLS
        assert ring.closed
        assert ring.open_fds == program.owned
        assert not any(pinned(buffer) for buffer in program.buffers)
