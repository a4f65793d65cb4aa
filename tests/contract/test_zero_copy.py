"""Zero-copy sends: the buffer is held until the kernel no longer reads it, and whoever wants to know is told, once."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import socket
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.cases import full_tcp
from tests.helpers import (
    Attempt,
    Mount,
    crash,
    drain,
    in_child,
    manager,
    nothing_submitted,
    parked,
    run_native,
    run_to_a_crash,
    run_without_ring,
)
from tests.unit.by_hand import no_garbage_collection, pinned
from trio_uring import UnavailableError, _core, lowlevel, statistics
from trio_uring._ring import ffi
from trio_uring._zero_copy import SEND_ZC, _Release

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

SIZE = 200_000
NOBODY = 65534

CALLS: dict[str, Callable[..., Awaitable[int]]] = {
    "send_zc": lowlevel.send_zc,
    "sendmsg_zc": lambda sock, data, flags=0, **more: lowlevel.sendmsg_zc(sock, [data], (), flags, **more),
}
BOTH = pytest.mark.parametrize("name", CALLS)


class _Told:
    """A `trio.Event` that must not be set twice."""

    def __init__(self, log: list[str]) -> None:
        self._event = trio.Event()
        self._log = log
        self.is_set, self.wait = self._event.is_set, self._event.wait

    def set(self) -> None:
        assert not self.is_set()
        self._log.append("set")
        self._event.set()


def told(log: list[str] | None = None) -> Any:
    return _Told([] if log is None else log)


def deaf_pair(bench: Bench) -> tuple[socket.socket, int]:
    """A TCP socket with room for ``SIZE`` bytes, and a peer that has no room for them: the kernel must hold them."""
    listener, a = bench.listener(), bench.new_socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SIZE)
    a.connect(listener.getsockname())
    return a, bench.keep(listener.accept()[0].detach())


def owed() -> list[str]:
    """The states of sends that owe a CQE."""
    return [op.state for op in statistics().operations if op.operation.endswith("_zc")]


@BOTH
async def test_it_returns_when_the_buffer_is_free(bench: Bench, name: str) -> None:
    a, b = bench.sockets(socket.AF_INET)
    for size in (0, 1, 4096, 30_000):
        data = bytearray(os.urandom(size))
        assert await CALLS[name](a, data) == size
        assert not pinned(data)
        assert owed() == []
        assert drain(b.fileno(), size) == data


@BOTH
async def test_it_waits_for_a_peer_that_does_not_read(bench: Bench, name: str) -> None:
    a, b = deaf_pair(bench)
    data = bytearray(os.urandom(SIZE))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, CALLS[name], a, data)
        assert owed() == ["DETACHED"]
        assert pinned(data)
        assert drain(b, SIZE) == data
        assert await attempt.result() == SIZE
        assert not pinned(data)


@BOTH
async def test_with_an_event_it_returns_before(bench: Bench, name: str) -> None:
    """What is changed once the event is set, and not before, is not sent: the kernel has not copied it."""
    a, b = deaf_pair(bench)
    data = bytearray(os.urandom(SIZE))
    before, released = bytes(data), told()
    assert await CALLS[name](a, data, released=released) == SIZE
    await trio.testing.wait_all_tasks_blocked()
    assert not released.is_set()
    assert pinned(data)

    received = bytearray()
    while not released.is_set():
        received += os.read(b, 4096)
        await trio.lowlevel.checkpoint()
        assert released.is_set() or pinned(data)
    assert not pinned(data)
    data[:] = bytes(SIZE)
    received += drain(b, SIZE - len(received))
    assert received == before


async def test_the_kernel_reads_the_buffer_until_then(bench: Bench) -> None:
    """Why all this: here the kernel sends what was written too early."""
    a, b = deaf_pair(bench)
    data = bytearray(SIZE)
    released = told()
    assert await lowlevel.send_zc(a, data, released=released) == SIZE
    data[:] = b"\xff" * SIZE
    assert drain(b, SIZE).count(b"\xff") > SIZE // 2
    await released.wait()


@BOTH
async def test_cancelled_while_it_waits_for_the_release(bench: Bench, name: str) -> None:
    """What was sent is told; the kernel goes on reading."""
    a, b = deaf_pair(bench)
    data = bytearray(os.urandom(SIZE))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, CALLS[name], a, data)
        async with nothing_submitted():
            assert not await attempt.cancel()
        assert attempt.value == SIZE
        assert pinned(data)
    assert drain(b, SIZE) == data
    while owed():
        await trio.lowlevel.checkpoint()
    assert not pinned(data)
    assert statistics().in_flight == 0


@BOTH
async def test_cancelled_before_that_nothing_is_sent(bench: Bench, name: str) -> None:
    a, b, size = full_tcp(bench)
    data, released = bytearray(b"hello"), told()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lambda: CALLS[name](a, data, released=released))
        assert pinned(data)
        assert await attempt.cancel()
    await released.wait()
    assert not pinned(data)
    assert drain(b, size) == bytes(size)
    a.close()
    assert os.read(b, 1) == b""


@BOTH
@pytest.mark.parametrize("when", ["on entry", "staged"])
async def test_taken_back(bench: Bench, name: str, when: str) -> None:
    a, _ = bench.sockets(socket.AF_INET)
    data, released = bytearray(b"hello"), told()

    def cancel() -> None:
        attempt.scope.cancel()

    async with nothing_submitted(), trio.open_nursery() as nursery:
        attempt = Attempt(
            nursery,
            lambda: CALLS[name](a, data, released=released),
            once_parked=cancel if when == "staged" else None,
        )
        if when == "on entry":
            cancel()
        await attempt.settled()
        assert attempt.cancelled
        assert released.is_set()
        assert not pinned(data)


def _broken(bench: Bench) -> Any:
    a, _ = bench.sockets(socket.AF_INET)
    a.shutdown(socket.SHUT_WR)
    return a


FAILURES: dict[str, tuple[Callable[[Bench], Any], int]] = {
    "EPIPE": (_broken, errno.EPIPE),
    "EOPNOTSUPP": (lambda bench: bench.sockets()[0], errno.EOPNOTSUPP),
    "ENOTSOCK": (lambda bench: bench.file(), errno.ENOTSOCK),
    "EBADF": (lambda bench: 1 << 20, errno.EBADF),
    "EDESTADDRREQ": (lambda bench: bench.new_socket(kind=socket.SOCK_DGRAM), errno.EDESTADDRREQ),
}


@BOTH
@pytest.mark.parametrize("failure", FAILURES)
async def test_the_buffer_of_a_send_that_fails_is_free_too(bench: Bench, name: str, failure: str) -> None:
    target, code = FAILURES[failure]
    data, released = bytearray(b"hello"), told()
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        await CALLS[name](target(bench), data, released=released)
    assert raised.value.errno == code
    await released.wait()
    while owed():
        await trio.lowlevel.checkpoint()
    assert not pinned(data)


async def test_mistakes_in_hand_set_the_event_too(bench: Bench) -> None:
    a, _ = bench.sockets(socket.AF_INET)
    calls: list[Callable[[Any], Awaitable[int]]] = [
        lambda released: lowlevel.send_zc(a, 5, released=released),  # type: ignore[arg-type]
        lambda released: lowlevel.send_zc(None, b"", released=released),  # type: ignore[arg-type]
        lambda released: lowlevel.send_zc(a, b"", 1 << 40, released=released),
        lambda released: lowlevel.sendmsg_zc(a, [b""], [(1,)], released=released),  # type: ignore[list-item]
        lambda released: lowlevel.sendmsg_zc(a, [b""], address=5, released=released),
    ]
    for call in calls:
        released = told()
        with pytest.raises((TypeError, ValueError, AttributeError, OverflowError)):
            await call(released)
        assert released.is_set()


def test_without_a_ring() -> None:
    async def main() -> None:
        released = told()
        with pytest.raises(UnavailableError):
            await lowlevel.send_zc(0, b"", released=released)
        assert released.is_set()

    run_without_ring(main)


@BOTH
async def test_dontwait_does_not_wait(bench: Bench, name: str) -> None:
    a, b, size = full_tcp(bench)
    released = told()
    with pytest.raises(BlockingIOError):
        await CALLS[name](a, b"x", socket.MSG_DONTWAIT, released=released)
    await released.wait()
    drain(b, size)
    assert await CALLS[name](a, b"x", socket.MSG_DONTWAIT) == 1


@pytest.mark.parametrize("end", ["done", "cancelled", "closed"])
async def test_what_is_tried_again(bench: Bench, end: str) -> None:
    """The kernel answers EAGAIN, as some do for O_NONBLOCK, and owes a notification for that."""
    a, b, size = full_tcp(bench)
    data, released = bytearray(b"hello"), told()

    async def send() -> int:
        release = _Release(released)
        with release:
            return await manager().perform(
                SEND_ZC, a.fileno(), 0, ffi.from_buffer(data), -1, socket.MSG_DONTWAIT, (release,)
            )

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, send)
        assert not released.is_set()
        assert pinned(data)
        if end == "done":
            drain(b, size)
            assert await attempt.result() == 5
            assert drain(b, 5) == b"hello"
        elif end == "cancelled":
            assert await attempt.cancel()
        else:
            lowlevel.notify_closing(a)
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
    await released.wait()
    assert not pinned(data)


async def test_closed_while_it_waits_for_room(bench: Bench) -> None:
    a, _, _ = full_tcp(bench)
    data, released = bytearray(b"hello"), told()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lambda: lowlevel.send_zc(a, data, released=released))
        lowlevel.notify_closing(a)
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
    await released.wait()
    assert not pinned(data)


async def test_closed_while_it_waits_for_the_release(bench: Bench) -> None:
    """Everything was sent: that the socket is closed here is no failure."""
    a, b = deaf_pair(bench)
    data = bytearray(os.urandom(SIZE))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.send_zc, a, data)
        lowlevel.notify_closing(a)
        a.close()
        assert pinned(data)
        assert drain(b, SIZE) == data
        assert await attempt.result() == SIZE
    assert os.read(b, 1) == b""


async def test_the_socket_is_free_before_the_buffer_is(bench: Bench) -> None:
    a, b, size = full_tcp(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.send_zc, a, b"1")
        released = told()
        with pytest.raises(trio.BusyResourceError):
            await lowlevel.send_zc(a, b"2", released=released)
        assert released.is_set()
        drain(b, size)
        await attempt.result()
    a, b = deaf_pair(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.send_zc, a, bytes(SIZE))
        assert await lowlevel.send(a, b"x") == 1
        assert drain(b, SIZE + 1) == bytes(SIZE) + b"x"
        await attempt.result()


@BOTH
async def test_many_at_once(bench: Bench, name: str) -> None:
    pairs = [deaf_pair(bench) for _ in range(20)]
    buffers = [bytearray(os.urandom(SIZE)) for _ in pairs]
    events = [told() for _ in pairs]
    async with trio.open_nursery() as nursery:
        for (a, _), data, released in zip(pairs, buffers, events, strict=True):
            nursery.start_soon(lambda *args: CALLS[name](*args[:2], released=args[2]), a, data, released)
    assert all(map(pinned, buffers))
    for (_, b), data, released in zip(reversed(pairs), reversed(buffers), reversed(events), strict=True):
        assert drain(b, SIZE) == data
        await released.wait()
        assert not pinned(data)
    assert statistics().in_flight == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_to_an_address(bench: Bench, family: int) -> None:
    a, b = (bench.new_socket(family, socket.SOCK_DGRAM) for _ in range(2))
    b.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    ttl = (
        (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT) if family == socket.AF_INET6 else (socket.IPPROTO_IP, socket.IP_TTL)
    )
    item = (*ttl, (7).to_bytes(4, "little"))
    assert await lowlevel.sendmsg_zc(a, [b"he", bytearray(b"llo")], [item], address=b.getsockname()) == 5
    assert b.recv(9, socket.MSG_DONTWAIT) == b"hello"


@settings(deadline=None, max_examples=50)
@given(pieces=st.lists(st.lists(st.binary(max_size=9), max_size=8), min_size=1, max_size=4))
def test_the_bytes_of_sendmsg(pieces: list[list[bytes]]) -> None:
    """As the plain system call: what is sent, and how much."""

    async def main() -> list[int]:
        with ours:
            return [await lowlevel.sendmsg_zc(ours, each) for each in pieces]

    theirs, first_peer = _connected()
    ours, second_peer = _connected()
    with first_peer, second_peer:
        with theirs:
            counts = [theirs.sendmsg(each) for each in pieces]
        assert run_native(main) == counts
        for peer in (first_peer, second_peer):
            assert drain(peer.fileno(), sum(counts)) == b"".join(itertools.chain(*pieces))
            assert peer.recv(1) == b""


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


async def test_nothing_is_left_for_the_garbage_collector(bench: Bench) -> None:
    a, b = bench.sockets(socket.AF_INET)
    with no_garbage_collection():
        released = told()
        gone = weakref.ref(released)
        await lowlevel.send_zc(a, bytearray(10), released=released)
        await released.wait()
        del released
        await trio.lowlevel.checkpoint()
        assert gone() is None
    drain(b.fileno(), 10)


# The end of the run


def test_the_end_of_a_run_waits_for_the_kernel(mount: Mount, bench: Bench) -> None:
    """A peer that reads late."""
    a, b = deaf_pair(bench)
    data, released = bytearray(os.urandom(SIZE)), told()
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(drain(b, SIZE)))

    async def main() -> None:
        await lowlevel.send_zc(a, data, released=released)
        reader.start()

    mount.run(main)
    assert not pinned(data)
    reader.join()
    assert received == [data]


def test_a_crash_while_somebody_waits_for_the_release(mount: Mount, bench: Bench) -> None:
    """Nobody is told: whoever waits is gone, too."""
    a, b = deaf_pair(bench)
    targets = [a, full_tcp(bench)[0]]
    buffers = [bytearray(os.urandom(SIZE)) for _ in targets]
    reader = threading.Thread(target=drain, args=(b, SIZE))
    log: list[str] = []

    async def main() -> None:
        for target, data in zip(targets, buffers, strict=True):
            released = told(log)
            trio.lowlevel.spawn_system_task(released.wait)
            trio.lowlevel.spawn_system_task(partial(lowlevel.send_zc, target, data, released=released))
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(owed()) == ["DETACHED", "IN_FLIGHT"]
        reader.start()
        await crash()

    run_to_a_crash(mount, main)
    reader.join()
    assert not any(map(pinned, buffers))
    assert log == []


def test_a_peer_that_never_reads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends what the network stack still has to send: the memory is kept."""
    kept: list[Any] = []
    monkeypatch.setattr(_core, "_kept_for_ever", kept)
    monkeypatch.setattr(_core, "DRAIN_SECONDS", 0)
    a, _ = deaf_pair(bench)
    data = bytearray(SIZE)

    async def main() -> None:
        await lowlevel.send_zc(a, data, released=told())

    with pytest.warns(ResourceWarning, match="operations the kernel did not give back"):
        run_native(main)
    assert pinned(data)
    assert [operation.kind for operation in kept] == [SEND_ZC]
    kept.clear()
    gc.collect()
    assert not pinned(data)


def _exhaust_locked_memory() -> str:
    """What a process without privileges is told when too much is under way."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (3 << 20, 3 << 20))
    os.setresuid(NOBODY, NOBODY, NOBODY)
    failure = ""

    async def main() -> None:
        nonlocal failure
        sockets = []
        while not failure:
            listener, a = socket.socket(), socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            listener.listen()
            a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SIZE)
            a.connect(listener.getsockname())
            sockets += [a, listener.accept()[0], listener]
            released = told()
            try:
                await lowlevel.send_zc(a, bytes(SIZE), released=released)
            except OSError as exc:
                failure = str(exc)
                await released.wait()
        for sock in reversed(sockets):
            sock.close()

    run_native(main)
    return failure


@pytest.mark.skipif(os.geteuid() != 0, reason="limits concern users without privileges; to become one takes root")
def test_the_limit_of_locked_memory() -> None:
    assert "RLIMIT_MEMLOCK" in in_child(_exhaust_locked_memory)
