"""Cancelled or done, closed, reset, starved: every operation of a socket on the ring."""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import socket
from typing import Any

import pytest
import trio
import trio.testing

from tests.helpers import (
    Attempt,
    Mount,
    World,
    crash,
    fill,
    is_acknowledged,
    manager,
    nothing_submitted,
    parked,
    run_to_a_crash,
    sockets,
    spin_until,
)
from trio_uring import _registered, _ring, lowlevel, statistics
from trio_uring._abi import Opcode
from trio_uring._socket import RECV_SELECTING, UringSocket

BIG = bytes(n % 251 for n in range(4 << 20))
DATA = b"hello"

RECEIVES: dict[str, Any] = {
    "recv": lambda a: a.recv(9),
    "recv peek": lambda a: a.recv(9, socket.MSG_PEEK),
    "recv_into": lambda a: a.recv_into(bytearray(9)),
    "recv_into a view": lambda a: a.recv_into(memoryview(bytearray(9))),
    "recvfrom": lambda a: a.recvfrom(9),
    "recvfrom_into": lambda a: a.recvfrom_into(bytearray(9)),
    "recvmsg": lambda a: a.recvmsg(9),
    "recvmsg_into": lambda a: a.recvmsg_into([bytearray(9)]),
    "receive_some": lambda a: trio.SocketStream(a).receive_some(),
}
SENDS: dict[str, Any] = {
    "send": lambda a: a.send(BIG),
    "send a view": lambda a: a.send(memoryview(BIG)),
    "sendmsg": lambda a: a.sendmsg([BIG]),
    "send_all": lambda a: trio.SocketStream(a).send_all(BIG),
    "send_all a bytearray": lambda a: trio.SocketStream(a).send_all(bytearray(BIG)),
    "send_all a view": lambda a: trio.SocketStream(a).send_all(memoryview(BIG)),
    "wait_writable": lambda a: a.wait_writable(),
}
USES = RECEIVES | SENDS
ON_THE_RING = ["recv", "recv_into", "receive_some"]


async def full_pair(world: World, *, half_closed: bool = False) -> tuple[Any, Any, int]:
    """A connected pair, the first of which has no room left, and how many bytes wait in the second."""
    a, b = await world.pair("tcp")
    if half_closed:
        b.shutdown(socket.SHUT_WR)
    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = 0
    while more := fill(lambda: a._sock.send(bytes(65536))):
        size += more
        b.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        spin_until(lambda: is_acknowledged(a._sock))
    return a, b, size


async def blocked(world: World, name: str) -> tuple[Any, Any, int]:
    """A pair whose first socket this use has to wait for."""
    return await full_pair(world) if name in SENDS else (*await world.pair("tcp"), 0)


def read_to_the_end(sock: Any) -> int:
    """Blocks the run."""
    plain = sock._sock
    plain.settimeout(10)
    size = 0
    while chunk := plain.recv(1 << 20):
        size += len(chunk)
    return size


async def check_all_buffers_are_back() -> None:
    await trio.testing.wait_all_tasks_blocked()
    buffers = manager()._stream_buffers
    assert buffers is not None
    assert buffers.out == 0
    assert statistics().in_flight == 0


# Cancelled


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", USES)
async def test_in_a_cancelled_scope_nothing_happens(world: World, name: str) -> None:
    a, b = await world.pair("tcp")
    await b.send(DATA)
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            await USES[name](a)
        assert scope.cancelled_caught
    assert await a.recv(9) == DATA
    a.close()
    assert read_to_the_end(b) == 0


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", USES)
async def test_cancelled_before_it_is_submitted(world: World, name: str) -> None:
    a, b, size = await blocked(world, name)
    async with trio.open_nursery() as nursery, nothing_submitted():
        attempt = Attempt(nursery, USES[name], a, once_parked=lambda: attempt.scope.cancel())  # noqa: PLW0108 - not made yet
        await attempt.settled()
    assert attempt.cancelled
    await b.send(DATA)
    assert await a.recv(9) == DATA
    a.close()
    assert read_to_the_end(b) == size


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", USES)
async def test_cancelled_in_the_kernel(world: World, name: str) -> None:
    a, b, size = await blocked(world, name)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, USES[name], a)
        assert await attempt.cancel()
    await b.send(DATA)
    assert await a.recv(9) == DATA
    a.close()
    assert read_to_the_end(b) == size


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ON_THE_RING)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_cancelled_when_there_is_data(world: World, name: str, before: bool) -> None:
    """Just before the kernel has completed it, and just after: whatever it received is delivered."""

    def complete_and_cancel() -> None:
        manager().ring.flush()
        if not before:
            spin_until(manager().ring.pending)
        attempt.scope.cancel()

    for _ in range(20):
        a, b = await world.pair("pair stream")
        await b.send(DATA)
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, USES[name], a, once_parked=complete_and_cancel)
            await attempt.settled()
        if attempt.cancelled:
            assert before
            assert await a.recv(9) == DATA
        else:
            assert attempt.value in (DATA, 5)
            assert not a.is_readable()
    if name != "recv_into":
        await check_all_buffers_are_back()


async def test_an_accept_that_wins_against_its_cancel(world: World) -> None:
    listener = await world.listener(socket.AF_INET)

    def complete_and_cancel() -> None:
        manager().ring.flush()
        spin_until(manager().ring.pending)
        attempt.scope.cancel()

    client = world.new()
    await client.connect(listener.getsockname())
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, listener.accept, once_parked=complete_and_cancel)
        sock, address = await attempt.result()
    assert world.own(sock).getpeername() == client.getsockname() == address


@pytest.mark.parametrize("name", ["send_all", "send_all a bytearray", "send_all a view"])
@pytest.mark.usefixtures("traffic")
async def test_what_a_cancelled_send_all_has_sent_is_a_prefix(world: World, name: str) -> None:
    a, b = await world.pair("tcp")
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, USES[name], a)
        got = bytearray(await b.recv(100_000))
        await trio.testing.wait_all_tasks_blocked()
        assert await attempt.cancel()
    a.close()
    while chunk := await b.recv(1 << 20):
        got += chunk
    assert 100_000 < len(got) < len(BIG)
    assert BIG.startswith(got)


# Closed


CLOSES: dict[str, Any] = {
    "close": lambda a: a.close(),
    "detach": lambda a: os.close(a.detach()),
    "with": lambda a: a.__exit__(None, None, None),
}


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("name", USES)
async def test_close_wakes_who_waits_and_the_peer_at_once(world: World, name: str, how: str) -> None:
    a, b, size = await blocked(world, name)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, USES[name], a)
        CLOSES[how](a)
        assert read_to_the_end(b) == size
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()
    assert a.fileno() == -1


@pytest.mark.parametrize("how", CLOSES)
async def test_close_of_a_listener_and_of_a_connecting_socket(world: World, bench: Any, how: str) -> None:
    listener = await world.listener(socket.AF_INET)
    client = world.new()
    address = bench.deaf_listener().getsockname()
    async with trio.open_nursery() as nursery:
        accept = await parked(nursery, listener.accept)
        connect = await parked(nursery, client.connect, address)
        for sock, attempt in ((listener, accept), (client, connect)):
            CLOSES[how](sock)
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()


@pytest.mark.native("the close comes inside of an Instrument, where a ring beside trio's manager may not add its own")
@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("when", ["staged", "in flight", "partly done"])
@pytest.mark.parametrize("name", USES)
async def test_nothing_crosses_to_the_next_owner_of_the_number(world: World, name: str, when: str, how: str) -> None:
    """The number is another's in the same tick."""
    a, b, _ = await blocked(world, name)
    new, peer = await world.pair("tcp")
    await peer.send(b"for the new owner")
    fd = a.fileno()

    def replace() -> None:
        CLOSES[how](a)
        os.dup2(new.fileno(), fd)

    async with trio.open_nursery() as nursery:
        if when == "staged":
            attempt = Attempt(nursery, USES[name], a, once_parked=replace)
        else:
            attempt = await parked(nursery, USES[name], a)
            if when == "partly done" and name.startswith("send_all"):
                for _ in range(4):
                    await b.recv(1 << 18)
                await trio.testing.wait_all_tasks_blocked()
                assert not attempt.done
            replace()
        try:
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
            assert await new.recv(99) == b"for the new owner"
            await trio.testing.wait_all_tasks_blocked()
            assert not peer.is_readable()
        finally:
            os.close(fd)


@pytest.mark.native("the close comes inside of an Instrument, where a ring beside trio's manager may not add its own")
@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("name", ["send_all", "send_all a bytearray", "send_all a view"])
async def test_the_rest_of_a_send_all_does_not_cross_either(world: World, name: str, how: str) -> None:
    """A part is sent, the task does not know it yet, and the number is another's."""
    a, b = await world.pair("tcp")
    new, peer = await world.pair("tcp")
    fd = a.fileno()

    def replace() -> None:
        manager().ring.flush()
        CLOSES[how](a)
        os.dup2(new.fileno(), fd)

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, USES[name], a, once_parked=replace)
        try:
            with pytest.raises(trio.ClosedResourceError):
                await attempt.result()
            await trio.testing.wait_all_tasks_blocked()
            assert not peer.is_readable()
        finally:
            os.close(fd)
    assert 0 < read_to_the_end(b) < len(BIG)


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("traffic")
async def test_reused_numbers_under_load(world: World) -> None:
    """Each connection gets its own bytes, though numbers of fds are closed and given again all the time, with
    operations in flight.
    """
    rounds, serial = 150, itertools.count(1)

    async def one_after_another() -> None:
        for _ in range(rounds):
            number = next(serial)
            a, b = sockets().socketpair()
            stamp = number.to_bytes(4, "big")
            with a, b:
                async with trio.open_nursery() as nursery:
                    waiting = Attempt(nursery, a.recv, 100)
                    sending = Attempt(nursery, trio.SocketStream(b).send_all, stamp * (5 + 50_000 * (number % 3 == 0)))
                    await trio.lowlevel.checkpoint()
                    (a if number % 2 else b).close()
                    await waiting.settled()
                    (b if number % 2 else a).close()
                    await sending.settled()
                for attempt in (waiting, sending):
                    assert attempt.error is None or isinstance(
                        attempt.error, trio.ClosedResourceError | trio.BrokenResourceError | OSError
                    )
                if waiting.error is None:
                    assert waiting.value == (stamp * 25)[: len(waiting.value)]

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one_after_another)
    await check_all_buffers_are_back()


# Peers


@pytest.mark.parametrize("name", RECEIVES)
async def test_one_byte_at_a_time(world: World, name: str) -> None:
    a, b = await world.pair("tcp")
    async with trio.open_nursery() as nursery:
        for n in range(30):
            attempt = await parked(nursery, RECEIVES[name], a)
            await b.send(bytes([n]))
            result = await attempt.result()
            size = result if isinstance(result, int) else result[0]
            assert size in (1, n, bytes([n]))
            if "peek" in name:
                assert await a.recv(9) == bytes([n])


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ["send", "send_all", "sendmsg"])
async def test_a_peer_that_resets(world: World, name: str) -> None:
    a, b, _ = await full_pair(world)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", [1, 0]).tobytes())
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, SENDS[name], a)
        b.close()
        with pytest.raises(trio.BrokenResourceError if name == "send_all" else ConnectionResetError):
            await attempt.result()


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ["send", "send_all", "sendmsg"])
async def test_a_peer_that_has_half_closed_and_stalls(world: World, name: str) -> None:
    """It costs nothing to wait for it, it can be cancelled, and it gets everything once it reads."""
    a, b, size = await full_pair(world, half_closed=True)
    async with trio.open_nursery() as nursery:
        cancelled = await parked(nursery, SENDS[name], a)
        assert await cancelled.cancel()
        attempt = await parked(nursery, SENDS[name], a)
        before = statistics().cqes
        await trio.sleep(0.05)
        assert statistics().cqes - before < 10
        got = 0
        while not attempt.done:
            got += len(await b.recv(1 << 20) if b.is_readable() else b"")
            await trio.lowlevel.checkpoint()
    a.close()
    got += read_to_the_end(b)
    assert got == size + (len(BIG) if name == "send_all" else attempt.value)


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("name", ["send", "send_all"])
async def test_a_send_when_somebody_has_made_the_socket_block(world: World, name: str) -> None:
    """The mode is of the open file, which a child may share. The task waits, and not the run."""
    a, b, size = await full_pair(world)
    os.set_blocking(a.fileno(), True)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, SENDS[name], a)
        got = 0
        while not attempt.done:
            got += len(await b.recv(1 << 20) if b.is_readable() else b"")
            await trio.lowlevel.checkpoint()
    a.close()
    got += read_to_the_end(b)
    assert got == size + (len(BIG) if name == "send_all" else attempt.value)


@pytest.mark.usefixtures("traffic")
async def test_a_peer_that_has_half_closed_and_stalls_takes_no_worker(world: World) -> None:
    """The kernel tries again whenever it polls; after 128 tries a thread of its own would wait for it."""
    a, _, _ = await full_pair(world, half_closed=True)
    async with trio.open_nursery() as nursery:
        await parked(nursery, trio.SocketStream(a).send_all, BIG)
        for _ in range(300):
            await trio.lowlevel.checkpoint()
            await lowlevel.nop()
        workers = [name for name in map(thread_name, os.listdir("/proc/self/task")) if name.startswith("iou-wrk")]
        assert not workers
        nursery.cancel_scope.cancel()


def thread_name(thread: str) -> str:
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read()


# The ring's buffers


@pytest.fixture
def few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registered, "STREAM_BUFFERS", 2)


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("few_buffers", "traffic")
async def test_more_is_ready_than_there_are_buffers(world: World) -> None:
    pairs = [await world.pair("pair stream") for _ in range(40)]
    got: dict[int, bytes] = {}

    async def receive(number: int, a: Any) -> None:
        data = b""
        while chunk := await a.recv(100_000):
            data += chunk
        got[number] = data

    async with trio.open_nursery() as nursery:
        for number, (a, _) in enumerate(pairs):
            nursery.start_soon(receive, number, a)
        for size in (1, 3, 16383, 16384, 16385, 40_000):
            await trio.testing.wait_all_tasks_blocked()
            for number, (_, b) in enumerate(pairs):
                assert b._sock.send(bytes([number]) * size) == size
        for _, b in pairs:
            b.close()
    assert got == {number: bytes([number]) * (1 + 3 + 16383 + 16384 + 16385 + 40_000) for number in range(40)}
    await check_all_buffers_are_back()


@pytest.mark.usefixtures("few_buffers", "traffic")
@pytest.mark.parametrize("name", ["recv", "receive_some"])
async def test_what_has_been_received_stays(world: World, name: str) -> None:
    """Although what comes next comes by the same buffers."""
    a, b = await world.pair("pair stream")
    received = []
    for n in range(9):
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, USES[name], a)
            await b.send(bytes([n]))
            received.append(await attempt.result())
    assert [type(data) for data in received] == [bytes] * 9
    assert b"".join(received) == bytes(range(9))


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("few_buffers", "traffic")
async def test_buffers_come_back_whatever_becomes_of_a_receive(world: World) -> None:
    """Cancelled with and without data, closed, ended, reset."""
    for n in range(60):
        a, b = await world.pair("tcp")

        def late(n: int = n, a: Any = a) -> None:
            manager().ring.flush()
            if n % 5 == 0:
                spin_until(manager().ring.pending)
            if n % 2:
                a.close()
            else:
                attempt.scope.cancel()  # noqa: B023

        if n % 3:
            await b.send(DATA)
        else:
            b.close()
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, a.recv, 100, once_parked=late)
            await attempt.settled()
        a.close()
        b.close()
    await check_all_buffers_are_back()
    a, b = await world.pair("tcp")
    for _ in range(5):
        await b.send(DATA)
        receiving = manager().receive(RECV_SELECTING, a.fileno(), 100)
        assert receiving is not None
        assert await receiving == DATA
    await check_all_buffers_are_back()


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("few_buffers", "traffic")
async def test_what_nobody_receives_keeps_no_buffer(world: World) -> None:
    """The coroutine is closed when the kernel has put something into one."""
    a, b = await world.pair("pair stream")
    for _ in range(5):
        await b.send(DATA)
        coroutine = a.recv(9)
        assert coroutine.send(None) is not None
        manager().ring.flush()
        spin_until(manager().ring.pending)
        coroutine.close()
        await trio.testing.wait_all_tasks_blocked()
    await check_all_buffers_are_back()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, a.recv, 9)
        assert [op.operation for op in statistics().operations if op.fd == a.fileno()] == ["recv"]  # or it has none
        assert await attempt.cancel()


@pytest.mark.parametrize("traffic", [False], indirect=True)
@pytest.mark.usefixtures("doors_open", "traffic")
@pytest.mark.parametrize("when", ["waits", "has data", "has been cancelled"])
def test_a_run_that_crashes(mount: Mount, when: str) -> None:
    """With receives and a large send in flight."""
    a, b = socket.socketpair()
    with b:

        async def main() -> None:
            ours = sockets().from_stdlib_socket(a)
            stream = trio.SocketStream(ours)

            def late() -> None:
                manager().ring.flush()
                spin_until(manager().ring.pending)

            async with trio.open_nursery() as nursery:
                await parked(nursery, stream.send_all, bytearray(BIG))
                if when == "waits":
                    await parked(nursery, stream.receive_some)
                elif when == "has data":
                    b.send(DATA)
                    Attempt(nursery, stream.receive_some, once_parked=late)
                else:
                    attempt = await parked(nursery, stream.receive_some)
                    attempt.scope.cancel()
                await crash()

        run_to_a_crash(mount, main)
        a.close()


@pytest.mark.ring(max_in_flight=2)
@pytest.mark.usefixtures("traffic")
async def test_sockets_need_not_wait_their_turn(world: World, bench: Any) -> None:
    """Others have all there is, for as long as they like."""
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            await parked(nursery, lowlevel.read, bench.pipe()[0], bytearray(9))
        listener = await world.listener(socket.AF_INET)
        accept = await parked(nursery, listener.accept)
        a = world.new()
        await a.connect(listener.getsockname())
        b = world.own((await accept.result())[0])
        for name in ON_THE_RING:
            receive = await parked(nursery, USES[name], a)
            assert statistics().in_flight == 2
            await b.send(DATA)
            assert await receive.result() in (DATA, len(DATA))
        send = await parked(nursery, USES["send_all"], a)
        got = 0
        while got < len(BIG):
            got += len(await b.recv(1 << 20))
        await send.result()
        assert await a.send(DATA) == len(DATA)
        nursery.cancel_scope.cancel()


# Kernels that lack something


@pytest.mark.usefixtures("traffic", "doors_open")
@pytest.mark.parametrize("opcode", [Opcode.SOCKET, Opcode.RECV, Opcode.SEND, Opcode.ACCEPT, Opcode.CONNECT])
def test_a_kernel_that_lacks_it(mount: Mount, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, opcode: Opcode) -> None:
    """The other way is trio's own."""
    probe = _ring._probe
    monkeypatch.setattr(_ring, "_probe", lambda ring: probe(ring) - {opcode})

    async def use(kind: str) -> None:
        a, b = [stack.enter_context(UringSocket(sock._sock)) for sock in await world.pair(kind)]
        for call in RECEIVES.values():
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, call, a)
                await b.send(DATA)
                await attempt.result()
            while a.is_readable():
                await a.recv(9)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.SocketStream(a).send_all, BIG)
            got = b""
            while len(got) < len(BIG):
                got += await b.recv(1 << 20)
        assert got == BIG

    for kind in ("tcp", "unix"):
        with contextlib.closing(World(str(tmp_path))) as world, contextlib.ExitStack() as stack:
            mount.run(use, kind)


async def test_buffers_the_kernel_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(manager().registered, "open_stream_buffers", refuse)
    a, b = await world.pair("tcp")
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, a.recv, 9)
            await b.send(DATA)
            assert await attempt.result() == DATA


# Fairness


async def test_one_that_floods_does_not_starve_others(world: World) -> None:
    """Between two requests of a modest client, one that sends all the time is served a few times, not for ever."""
    flood, flooded = await world.pair("tcp")
    modest = [await world.pair("tcp") for _ in range(5)]
    turns = 0
    longest = 0

    async def take_flood() -> None:
        nonlocal turns
        stream = trio.SocketStream(flooded)
        while await stream.receive_some():
            turns += 1

    async def send_flood() -> None:
        stream = trio.SocketStream(flood)
        while flood.fileno() >= 0:
            with contextlib.suppress(trio.ClosedResourceError):
                await stream.send_all(BIG)

    async def echo(a: Any) -> None:
        stream = trio.SocketStream(a)
        while data := await stream.receive_some():
            await stream.send_all(data)

    async def ask(b: Any) -> None:
        nonlocal longest
        stream = trio.SocketStream(b)
        for _ in range(50):
            before = turns
            await stream.send_all(b"ping")
            assert await stream.receive_some() == b"ping"
            longest = max(longest, turns - before)
        b.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_flood)
        nursery.start_soon(send_flood)
        async with trio.open_nursery() as asking:
            for a, b in modest:
                nursery.start_soon(echo, a)
                asking.start_soon(ask, b)
        flood.close()
    assert turns
    assert longest < 60
