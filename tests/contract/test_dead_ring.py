"""A ring that dies under the run: whoever waits for it is told, what waits for anything else goes on, and the memory
that the kernel may still use stays where it is.

It dies as rings do not: from some moment on its fd leads elsewhere, and the kernel refuses whatever is asked of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import Attempt, Host, Mount, attached_first, manager, parked
from trio_uring import RingError, _core, lowlevel
from trio_uring.lowlevel import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers import Bench
    from trio_uring._cancel import Operation


def kill_ring() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, manager().ring.fd)
    os.close(null)


@contextlib.contextmanager
def something_is_kept() -> Iterator[None]:
    """The end of the run warns of what it cannot drain, and keeps it; for the time of this context."""
    kept: list[Operation] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_core, "_kept_for_ever", kept)
        with pytest.warns(ResourceWarning, match="the kernel did not give back"):
            yield
    assert kept


async def _first(multishot: Any) -> object:
    async with multishot as results:
        return await results.__anext__()


def test_whoever_waits_hears_of_it(mount: Mount, bench: Bench) -> None:
    buffers = [bytearray(9) for _ in range(4)]

    async def main() -> str:
        read_end, _ = bench.pipe()
        sockets = [bench.sockets()[0] for _ in range(3)]
        batch, chain, mailbox = lowlevel.batch(), lowlevel.chain(), Mailbox[int]()
        batch.add(lowlevel.read, read_end, buffers[0])
        batch.add(lowlevel.nop)
        chain.add(lowlevel.read, read_end, buffers[1])
        chain.add(lowlevel.nop)
        stream = trio.SocketStream(trio_uring.socket.from_stdlib_socket(sockets[2]))
        async with trio.open_nursery() as nursery:
            attempts: list[Attempt[Any]] = [
                await parked(nursery, call, *args)
                for call, *args in (
                    (lowlevel.read, read_end, buffers[2]),
                    (lowlevel.recv, sockets[0], buffers[3]),
                    (lowlevel.accept, bench.listener()),
                    (lowlevel.timeout, 1e6),
                    (batch.run,),
                    (chain.run,),
                    (_first, lowlevel.recv_multishot(sockets[1])),
                    (mailbox.receive,),
                    (stream.receive_some,),
                )
            ]
            kill_ring()
            for attempt in attempts:
                await attempt.settled()
                assert isinstance(attempt.error, RingError)
                assert "ring of this run has failed" in str(attempt.error)
        with pytest.raises(RingError, match="has failed"):
            await lowlevel.nop()
        with pytest.raises(RingError, match="has failed"):
            lowlevel.batch()
        with pytest.raises(RingError, match="has failed"):
            await stream.receive_some()
        for buffer in buffers:
            with pytest.raises(BufferError):
                buffer.append(0)
        await stream.aclose()
        return "the run goes on"

    with something_is_kept():
        assert mount.run(main) == "the run goes on"
        for buffer in buffers:
            with pytest.raises(BufferError):
                buffer.append(0)
    mount.run(lowlevel.nop)  # another run in this thread


def test_what_is_trios_goes_on(mount: Mount, bench: Bench) -> None:
    """Waits until something is ready, from before and from after; their cancels; closing; threads; time."""
    pipes = [bench.pipe() for _ in range(4)]

    async def waits() -> list[Attempt[None]]:
        return [await parked(nurseries[0], trio.lowlevel.wait_readable, read_end) for read_end, _ in pipes]

    async def check(waiting: list[Attempt[None]]) -> None:
        os.write(pipes[0][1], b"x")
        await waiting[0].result()
        os.read(pipes[0][0], 1)
        assert await waiting[1].cancel()
        lowlevel.notify_closing(pipes[2][0])
        assert isinstance((await waiting[2].settled()).error, trio.ClosedResourceError)
        with pytest.raises(trio.BusyResourceError):
            await trio.lowlevel.wait_readable(pipes[3][0])
        assert not waiting[3].done
        await waiting[3].cancel()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nurseries.append(nursery)
            before = await waits()
            reads = await parked(nursery, lowlevel.read, bench.pipe()[0], bytearray(1))
            kill_ring()
            assert isinstance((await reads.settled()).error, RingError)
            await check(before)
            await check(await waits())
            go = threading.Event()
            in_thread = Attempt(nursery, trio.to_thread.run_sync, go.wait)
            await trio.sleep(0.001)
            go.set()
            assert await in_thread.result()

    nurseries: list[trio.Nursery] = []
    with something_is_kept():
        mount.run(main)


def test_directions_are_told_apart(mount: Mount, bench: Bench) -> None:
    a, b = bench.sockets()
    full, other_end, _ = bench.full_socket()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            reads = await parked(nursery, lowlevel.read, bench.pipe()[0], bytearray(1))
            kill_ring()
            await reads.settled()
            readable = await parked(nursery, trio.lowlevel.wait_readable, a)
            await trio.lowlevel.wait_writable(a)
            writable = await parked(nursery, trio.lowlevel.wait_writable, full)
            other_end.send(b"x")
            await trio.lowlevel.wait_readable(full)
            assert not readable.done
            assert not writable.done
            b.close()
            other_end.close()
            await readable.result()
            await writable.result()

    with something_is_kept():
        mount.run(main)


def _step_until_asleep(host: Host) -> None:
    """Until a worker thread waits, and nobody else does anything."""
    while True:
        try:
            host.todo.get(timeout=0.05)()
        except queue.Empty:
            if manager()._worker_waits:
                return


@pytest.mark.parametrize("native", [True, False])
def test_the_host_of_a_guest_run_finds_out(native: bool, bench: Bench) -> None:
    """Its callback cancels something while a worker thread sleeps."""
    a, _ = bench.sockets()
    attempts: list[Attempt[int]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            attempts.append(Attempt(nursery, lowlevel.recv, a, bytearray(9)))

    host = Host()
    if native:
        host.start(main)
    else:
        host.start_stock(attached_first(main))
    _step_until_asleep(host)
    kill_ring()
    with something_is_kept():
        attempts[0].scope.cancel()
        host.finish()
    assert isinstance(attempts[0].error, RingError)
