"""Echo servers with thousands of connections that say nothing, or with one that says too much, beside the busy ones.

The busy ones have a message under way at all times; its latency is the time that the server needs for all of them.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ._harness import compare, heading, report
from ._network import HOST, Load, Server, discard, on_second_core, serve_echo, server

if TYPE_CHECKING:
    from collections.abc import Iterator

IDLE: Final = 9000
BUSY: Final = 100
POLITE: Final = 20
ROUND_TRIPS: Final = 2000
OTHER_FDS: Final = 100


def idle_possible() -> int:
    """How many idle connections to each of two servers this process may have."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return min(IDLE, (limit - OTHER_FDS) // 2 - BUSY)


@contextlib.contextmanager
def idle_connections(to: Server, connections: int) -> Iterator[None]:
    """Each has said something once."""
    loads = []
    while connections:
        loads.append(Load(to, min(connections, BUSY)))
        loads[-1].exchange(min(connections, BUSY))
        connections -= min(connections, BUSY)
    yield
    for load in loads:
        load.abandon()


class Memory(NamedTuple):
    """Bytes for each idle connection: what the process has, and what the kernel's slabs have for both its ends."""

    resident: float
    slabs: float


def slabs() -> int:
    with open("/proc/meminfo") as file:
        (line,) = (line for line in file if line.startswith("Slab:"))
    return int(line.split()[1]) * 1024


def memory(run: str, connections: int) -> Memory:
    with contextlib.ExitStack() as to_abandon, server(run, serve_echo) as one:
        busy = Load(one, BUSY)
        busy.exchange(ROUND_TRIPS)
        resident, in_slabs = one.memory(), slabs()
        to_abandon.enter_context(idle_connections(one, connections))
        return Memory((one.memory() - resident) / connections, (slabs() - in_slabs) / connections)


class Flooded:
    """Polite connections beside one that sends as much as it can, and takes what comes back."""

    def __init__(self, server: Server) -> None:
        self._polite = Load(server, POLITE)
        self._flood = socket.create_connection((HOST, server.port))
        self._flood.setblocking(False)
        self._block = bytes(65536)
        self._under_way = 0

    def _go_on(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._under_way += self._flood.send(self._block)
        with contextlib.suppress(BlockingIOError):
            self._under_way -= discard(self._flood)

    def p99(self, times: int) -> float:
        """See `Load.p99`, of the polite ones."""
        self._polite.watch(self._flood, select.EPOLLIN | select.EPOLLOUT, self._go_on)
        result = self._polite.p99(times)
        self._polite.watch(self._flood, 0, self._go_on)
        self._flood.setblocking(True)
        while self._under_way:
            self._under_way -= discard(self._flood)
        self._flood.setblocking(False)
        return result


def main(rounds: int) -> None:
    """`trio.SocketStream` on both sides."""
    idle = idle_possible()
    if idle < IDLE:
        print(f"\nRLIMIT_NOFILE allows for {idle} idle connections instead of {IDLE}")
    stock, ring = "in trio.run", "the same in trio_uring.run"
    with on_second_core() as remark:
        heading(f"idle_connections: memory for each of {idle}, beside {BUSY} busy ones", stock, ring, "KiB")
        pairs = [(memory("stock", idle), memory("ring", idle)) for _ in range(2)]
        a, b = zip(*pairs, strict=True)
        for name, field, target in (("resident", "resident", 1.0), ("kernel, both ends", "slabs", None)):
            values = [getattr(m, field) for m in a], [getattr(m, field) for m in b]
            report(name, *values, target=target, scale=1 / 1024)

        heading(f"99 % of {BUSY} busy connections are answered within{remark}", stock, ring, "us")
        with (
            contextlib.ExitStack() as to_abandon,
            server("stock", serve_echo) as one,
            server("ring", serve_echo) as two,
        ):
            for name, connections in (("none idle", 0), (f"{idle} idle", idle)):
                to_abandon.enter_context(idle_connections(one, connections))
                to_abandon.enter_context(idle_connections(two, connections))
                compare(
                    name,
                    partial(Load(one, BUSY).p99, ROUND_TRIPS),
                    partial(Load(two, BUSY).p99, ROUND_TRIPS),
                    rounds=rounds,
                    target=1.0,
                )

        heading(f"99 % of {POLITE} busy connections are answered within{remark}", stock, ring, "us")
        with server("stock", serve_echo) as one, server("ring", serve_echo) as two:
            for name, make in (("alone", partial(Load, connections=POLITE)), ("beside a flood", Flooded)):
                compare(
                    name,
                    partial(make(one).p99, ROUND_TRIPS),
                    partial(make(two).p99, ROUND_TRIPS),
                    rounds=rounds,
                    target=1.0,
                )
