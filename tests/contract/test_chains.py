"""Chains: the kernel does one step after the other, and between them a file need not have a number."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.contract.test_batch import errnos, inject
from tests.helpers import (
    Attempt,
    crash,
    drain,
    fork,
    in_kernel_worker,
    manager,
    nothing_submitted,
    parked,
    run_to_a_crash,
    run_without_ring,
    spin_until,
)
from tests.unit.by_hand import no_garbage_collection, pinned
from trio_uring import UnavailableError, UnsupportedOperation, _file_ops, lowlevel, statistics
from trio_uring._abi import Opcode
from trio_uring._errors import ChainBrokenError
from trio_uring._file_ops import AT_EMPTY_PATH
from trio_uring._registered import MAX_DIRECT
from trio_uring.lowlevel import Batch, Chain, batch, chain

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers import Bench, Mount
    from trio_uring.lowlevel import DirectFile


def fail(new: Chain, *, hard: bool = False) -> int:
    """Adds a step that fails with ENOENT."""
    add = new.add_hard if hard else new.add
    return add(lowlevel.openat, "/missing", os.O_RDONLY)


def is_broken_by(result: object, step: int) -> bool:
    return isinstance(result, ChainBrokenError) and (result.step, result.errno) == (step, errno.ECANCELED)


async def at_end(read_end: int) -> bool:
    """Nobody has the other end open any more."""
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(read_end)
    return os.read(read_end, 1) == b""


# One step after the other


async def test_steps_follow_one_another(bench: Bench) -> None:
    """The first one blocks, so nothing happens."""
    read_end, write_end = bench.pipe()
    fd, path = bench.file(), bench.directory / "new"
    new = chain()
    steps = [
        new.add(lowlevel.read, read_end, bytearray(1)),
        new.add(lowlevel.mkdirat, path),
        new.add(lowlevel.write, fd, b"hello"),
        new.add(lowlevel.fsync, fd=fd),
        new.add(lowlevel.nop),
    ]
    assert steps == [0, 1, 2, 3, 4]
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        assert not path.exists()
        os.write(write_end, b"x")
        assert await attempt.result() == [1, None, 5, None, None]
    assert path.is_dir()
    assert os.pread(fd, 9, 0) == b"hello"


async def test_one_submission_for_many_chains(bench: Bench) -> None:
    paths = [bench.path(b"%d" % n) for n in range(64)]
    buffers = [bytearray(9) for _ in paths]
    new = batch()
    for path, buffer in zip(paths, buffers, strict=True):
        steps = new.chain()
        file = steps.direct(lowlevel.openat, path, os.O_RDONLY)
        steps.add(lowlevel.read, file, buffer, 0)
    await trio.testing.wait_all_tasks_blocked()
    before = statistics()
    assert await new.run() == [value for n in range(64) for value in (None, len(str(n)))]
    after = statistics()
    assert after.sqes - before.sqes == 128
    assert after.submits - before.submits == 1
    assert [int(buffer.rstrip(b"\0")) for buffer in buffers] == list(range(64))


@pytest.mark.ring(entries=4)
async def test_a_chain_is_never_divided(bench: Bench) -> None:
    """Where a submission ends, the kernel would end the chain."""
    read_end, write_end = bench.pipe()
    for odd in range(4):
        new = batch()
        new.extend(lowlevel.nop, [()] * odd)
        for _ in range(20):
            steps = new.chain()
            steps.add(lowlevel.read, read_end, bytearray(1))
            steps.add(lowlevel.nop)
            fail(steps)
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, new.run)
            assert statistics().in_flight == 60, "a step has begun before its time"
            os.write(write_end, bytes(20))
            assert errnos(await attempt.result()) == [None] * odd + [1, None, errno.ENOENT] * 20


@pytest.mark.ring(entries=4)
async def test_a_chain_that_is_too_long(bench: Bench) -> None:
    buffer = bytearray(1)
    fd = bench.file(b"x")
    new = batch()
    new.add(lowlevel.write, fd, b"y")
    steps = new.chain()
    for _ in range(5):
        steps.add(lowlevel.read, fd, buffer, 0)
    async with nothing_submitted():
        with no_garbage_collection(), pytest.raises(ValueError, match="at most 4 steps") as caught:
            await new.run()
        assert not pinned(buffer)
        del caught
    steps = chain()
    for _ in range(4):
        steps.add(lowlevel.read, fd, buffer, 0)
    assert await steps.run() == [1] * 4


@pytest.mark.ring(max_in_flight=6)
async def test_a_chain_that_is_longer_than_what_can_be_in_flight(bench: Bench) -> None:
    fd = bench.file()
    new = batch()
    new.add(lowlevel.write, fd, b"y")
    steps = new.chain()
    for _ in range(4):
        steps.add(lowlevel.nop)
    async with nothing_submitted():
        with pytest.raises(ValueError, match="at most 3 steps"):
            await new.run()


@pytest.mark.ring(max_in_flight=3)
async def test_chains_in_parts(bench: Bench) -> None:
    """No chain is divided among them."""
    fd = bench.file(b"x")
    new = batch()
    for _ in range(7):
        steps = new.chain()
        steps.add(lowlevel.read, fd, bytearray(1), 0)
        fail(steps)
        new.add(lowlevel.nop)
    results = await new.run()
    assert errnos(results) == [1, errno.ENOENT, None] * 7


async def test_steps_with_something_between_them(bench: Bench) -> None:
    buffer = bytearray(1)
    fd = bench.file(b"x")
    new = batch()
    first, second = new.chain(), new.chain()
    first.add(lowlevel.nop)
    second.add(lowlevel.nop)
    for add in (first.add, first.add_hard):
        with no_garbage_collection(), pytest.raises(RuntimeError, match="nothing between") as caught:
            add(lowlevel.read, fd, buffer)
        assert not pinned(buffer)
        del caught
    with pytest.raises(RuntimeError, match="nothing between"):
        first.direct(lowlevel.openat, "/", os.O_RDONLY)
    second.add(lowlevel.nop)
    third = new.chain()
    assert third.add(lowlevel.nop) == 3
    assert await new.run() == [None] * 4


async def test_a_chain_that_has_been_run(bench: Bench) -> None:
    buffer = bytearray(1)
    fd = bench.file(b"x")
    new = chain()
    new.add(lowlevel.read, fd, buffer)
    assert await new.run() == [1]
    assert not pinned(buffer)
    for operation in (new.add, new.add_hard):
        with no_garbage_collection(), pytest.raises(RuntimeError, match="has been run") as caught:
            operation(lowlevel.read, fd, buffer)
        assert not pinned(buffer)
        del caught
    with pytest.raises(RuntimeError, match="has been run"):
        new.direct(lowlevel.openat, "/", os.O_RDONLY)
    with pytest.raises(RuntimeError, match="has been run"):
        await new.run()
    empty = batch()
    unused = empty.chain()
    assert await empty.run() == []
    with pytest.raises(RuntimeError, match="has been run"):
        unused.add(lowlevel.nop)


def test_a_run_without_a_ring() -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError):
            chain()

    run_without_ring(main)


async def test_one_direction_of_a_socket(bench: Bench) -> None:
    a, b = bench.sockets()
    new = chain()
    new.add(lowlevel.send, a, b"hello, ")
    new.add(lowlevel.send, a, b"world")
    new.add(lowlevel.recv, b, buffer := bytearray(20))
    assert await new.run() == [7, 5, 12]
    assert buffer.startswith(b"hello, world")

    new_batch = batch()
    for _ in range(2):
        new_batch.chain().add(lowlevel.send, a, b"x")
    with pytest.raises(trio.BusyResourceError):
        await new_batch.run()


# Broken


async def test_a_failure_breaks_a_chain(bench: Bench) -> None:
    fd = bench.file(b"x")
    new = batch()
    new.add(lowlevel.nop)
    steps = new.chain()
    steps.add(lowlevel.nop)
    broken = fail(steps)
    steps.add(lowlevel.write, fd, b"y")
    steps.add_hard(lowlevel.nop)
    steps.add(lowlevel.nop)
    new.add(lowlevel.nop)
    first, second, failed, *rest, last = await new.run()
    assert (first, second, last) == (None, None, None)
    assert type(failed) is FileNotFoundError
    assert failed.filename == "/missing"
    assert all(is_broken_by(result, broken) for result in rest)
    assert "openat" in str(rest[0])
    assert os.pread(fd, 9, 0) == b"x"


async def test_a_short_transfer_breaks_a_chain(bench: Bench) -> None:
    fd = bench.file(b"hello")
    new = chain()
    new.add(lowlevel.read, fd, bytearray(9), 0)
    new.add(lowlevel.nop)
    count, nothing = await new.run()
    assert count == 5
    assert is_broken_by(nothing, 0)


async def test_a_hard_link_holds(bench: Bench) -> None:
    fd = bench.file(b"hello")
    new = chain()
    new.add_hard(lowlevel.read, fd, bytearray(9), 0)
    fail(new, hard=True)
    new.add(lowlevel.nop)
    fail(new)
    new.add_hard(lowlevel.nop)
    new.add(lowlevel.nop)
    results = await new.run()
    assert errnos(results)[:4] == [5, errno.ENOENT, None, errno.ENOENT]
    assert type(results[1]) is type(results[3]) is FileNotFoundError
    assert is_broken_by(results[4], 3)
    assert is_broken_by(results[5], 3)


async def test_a_step_the_kernel_cannot_make_sense_of(bench: Bench) -> None:
    """It begins none of them."""
    read_end, write_end = bench.pipe()
    fd = bench.file(b"x")
    new = chain()
    new.add(lowlevel.write, fd, b"y")
    wrong = new.add(lowlevel.splice, read_end, -1, write_end, -1, 1, 0xFFFF)
    new.add(lowlevel.nop)
    first, failed, last = await new.run()
    assert is_broken_by(first, wrong)
    assert is_broken_by(last, wrong)
    assert failed.errno == errno.EINVAL
    assert os.pread(fd, 9, 0) == b"x"


async def test_a_timeout_is_no_failure() -> None:
    new = chain()
    new.add(lowlevel.timeout, 0.001)
    new.add(lowlevel.nop)
    assert await new.run() == [None, None]


async def test_fds_of_a_broken_chain_are_closed(bench: Bench) -> None:
    """An opened file, a socket, both ends of a pipe, a connection."""
    listener = bench.listener()
    client = bench.new_socket()
    client.connect(listener.getsockname())
    new = chain()
    new.add(lowlevel.openat, bench.path(), os.O_RDONLY)
    new.add(lowlevel.socket)
    new.add(lowlevel.pipe)
    new.add(lowlevel.accept, listener)
    broken = fail(new)
    new.add(lowlevel.nop)
    *opened, failed, _ = await new.run()
    assert failed.errno == errno.ENOENT
    assert all(is_broken_by(result, broken) for result in opened)
    with trio.fail_after(5):
        assert await lowlevel.recv(client, bytearray(1)) == 0


async def test_data_of_a_broken_chain_is_not_lost(bench: Bench) -> None:
    a, b = bench.sockets()
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bench.file().to_bytes(4, "little"))])
    new = chain()
    new.add(lowlevel.recvmsg, b, 9, socket.CMSG_SPACE(4))
    fail(new)
    (data, ancillary, _, _), _ = await new.run()
    assert data == b"x"
    bench.keep(int.from_bytes(ancillary[0][2], "little"))


async def test_fds_of_a_chain_that_holds_are_handed_over(bench: Bench) -> None:
    new = chain()
    new.add(lowlevel.openat, bench.path(b"x"), os.O_RDONLY)
    new.add(lowlevel.nop)
    fd, _ = await new.run()
    assert not os.get_inheritable(fd)
    assert os.read(bench.keep(fd), 9) == b"x"


async def test_nothing_of_a_chain_is_tried_again() -> None:
    new = batch()
    steps = new.chain()
    steps._add(1 << 2, inject(-errno.EINTR))
    steps.add(lowlevel.nop)
    interrupted, nothing = await new.run()
    assert interrupted.errno == errno.EINTR
    assert is_broken_by(nothing, 0)


# Direct descriptors


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # the listing's own
        return ""


async def test_a_file_without_a_number(bench: Bench) -> None:
    path = bench.directory / "new"
    new = chain()
    file = new.direct(lowlevel.openat, path, os.O_CREAT | os.O_RDWR, 0o600)
    new.add(lowlevel.write, file, b"hello", 0)
    new.add(lowlevel.fsync, file)
    new.add_hard(lowlevel.read, file, buffer := bytearray(9), 0)
    new.add(lowlevel.close, file)
    assert await new.run() == [None, 5, None, 5, None]
    assert buffer.startswith(b"hello")
    assert path.read_bytes() == b"hello"
    gate = bench.pipe()
    new = chain()
    file = new.direct(lowlevel.openat, path, os.O_RDONLY)
    new.add(lowlevel.read, gate[0], bytearray(1))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        assert os.fspath(path) not in [_target(fd) for fd in os.listdir("/proc/self/fd")]
        os.write(gate[1], b"x")
        await attempt.result()


@pytest.mark.parametrize("closed_by_a_step", [True, False])
async def test_openat2(bench: Bench, closed_by_a_step: bool) -> None:
    new = chain()
    file = new.direct(lowlevel.openat2, bench.path(b"hello"), os.O_RDONLY)
    new.add_hard(lowlevel.read, file, bytearray(9), 0)
    if closed_by_a_step:
        new.add(lowlevel.close, file)
    assert (await new.run())[:2] == [None, 5]


async def test_a_socket_without_a_number(bench: Bench) -> None:
    listener = bench.listener()
    new = chain()
    file = new.direct(lowlevel.socket, socket.AF_INET, socket.SOCK_STREAM)
    new.add(lowlevel.connect, file, listener.getsockname())
    new.add(lowlevel.send, file, b"hello")
    assert await new.run() == [None, None, 5]
    connection, _ = listener.accept()
    with connection:
        assert connection.recv(9) == b"hello"
        assert await at_end(connection.fileno())


async def test_a_connection_without_a_number(bench: Bench) -> None:
    listener = bench.listener()
    client = bench.new_socket()
    new = chain()
    connection = new.direct(lowlevel.accept, listener)
    new.add(lowlevel.recv, connection, buffer := bytearray(5))
    new.add(lowlevel.send, connection, b"world")
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        client.connect(listener.getsockname())
        client.send(b"hello")
        assert await attempt.result() == [None, 5, 5]
    assert buffer == b"hello"
    assert client.recv(9) == b"world"
    assert client.recv(9) == b""


WAYS_TO_END = ["done", "failed", "short", "cancelled", "closed by a step"]


@pytest.mark.parametrize("end", WAYS_TO_END)
async def test_what_no_step_closes_is_closed_in_the_end(bench: Bench, end: str) -> None:
    fifo = bench.fifo()
    read_end = bench.keep(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    blocked = bench.pipe()[0]
    new = chain()
    file = new.direct(lowlevel.openat, fifo, os.O_WRONLY)
    new.add(lowlevel.write, file, b"hello")
    if end == "failed":
        fail(new)
    elif end == "short":
        new.add(lowlevel.read, bench.file(), bytearray(1), 0)
    elif end == "cancelled":
        new.add(lowlevel.read, blocked, bytearray(1))
    elif end == "closed by a step":
        new.add(lowlevel.close, file)
    new.add(lowlevel.nop)
    if end == "cancelled":
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, new.run)
            assert not await attempt.cancel()
            results = attempt.value
    else:
        results = await new.run()
    assert results[:2] == [None, 5]
    assert os.read(read_end, 5) == b"hello"
    assert os.read(read_end, 5) == b"", "a writer is left"
    assert manager().registered.has_places(MAX_DIRECT)


async def test_places_are_used_again(bench: Bench) -> None:
    """More chains than there are places, for files that are left open."""
    path = bench.path(b"x")
    for _ in range(2):
        new = batch()
        for _ in range(MAX_DIRECT + 100):
            steps = new.chain()
            file = steps.direct(lowlevel.openat, path, os.O_RDONLY)
            steps.add(lowlevel.read, file, bytearray(1), 0)
        assert await new.run() == [None, 1] * (MAX_DIRECT + 100)
    assert manager().registered.has_places(MAX_DIRECT)


@pytest.mark.ring(entries=1024)
async def test_too_many_direct_descriptors_in_one_chain(bench: Bench) -> None:
    path = bench.path()
    new = chain()
    for _ in range(MAX_DIRECT // 4):
        new.direct(lowlevel.openat, path, os.O_RDONLY)
    assert await new.run() == [None] * (MAX_DIRECT // 4)
    new = chain()
    for _ in range(MAX_DIRECT // 4 + 1):
        new.direct(lowlevel.openat, path, os.O_RDONLY)
    with pytest.raises(ValueError, match="at most 256 direct"):
        await new.run()


def test_few_open_files_allowed(bench: Bench, mount: Mount) -> None:
    """The table has no more places than the process may have files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = bench.path(b"x")

    async def main() -> None:
        new = batch()
        for _ in range(300):
            steps = new.chain()
            file = steps.direct(lowlevel.openat, path, os.O_RDONLY)
            steps.add(lowlevel.read, file, bytearray(1), 0)
        with trio.fail_after(5):
            assert await new.run() == [None, 1] * 300

    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        mount.run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def blocked_with(bench: Bench, n: int) -> tuple[Batch, int]:
    """A batch with so many direct descriptors, and the fd that ends it when something is written."""
    read_end, write_end = bench.pipe()
    new = batch()
    for _ in range(n):
        new.chain().direct(lowlevel.openat, "/", os.O_RDONLY)
    new.add(lowlevel.read, read_end, bytearray(1))
    return new, write_end


async def test_batches_wait_for_places_in_turn(bench: Bench) -> None:
    quarter = MAX_DIRECT // 4
    ended: list[str] = []

    async def run(name: str, new: Batch) -> None:
        await new.run()
        ended.append(name)

    async with trio.open_nursery() as nursery:
        gates = []
        for n in range(4):
            new, gate = blocked_with(bench, quarter - (n == 3))
            gates.append(gate)
            nursery.start_soon(run, f"holder {n}", new)
        await trio.testing.wait_all_tasks_blocked()
        new, gate = blocked_with(bench, 2)  # there is one place
        gates.append(gate)
        nursery.start_soon(run, "waits first", new)
        await trio.testing.wait_all_tasks_blocked()
        new, gate = blocked_with(bench, 1)  # would fit, but comes later
        gates.append(gate)
        nursery.start_soon(run, "waits second", new)
        await trio.testing.wait_all_tasks_blocked()
        assert statistics().in_flight == 4
        os.write(gates[5], b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        os.write(gates[0], b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["holder 0", "waits second"]
        for gate in (*gates[1:5],):
            os.write(gate, b"x")
    assert manager().registered.has_places(MAX_DIRECT)


@pytest.mark.parametrize("end", ["cancelled", "closed"])
async def test_given_up_or_closed_while_waiting_for_places(bench: Bench, end: str) -> None:
    quarter = MAX_DIRECT // 4
    other, other_end = bench.pipe()
    os.write(other_end, b"not for you")
    buffer = bytearray(3)
    async with trio.open_nursery() as nursery:
        gates = []
        for _ in range(4):
            new, gate = blocked_with(bench, quarter)
            gates.append(gate)
            nursery.start_soon(new.run)
        await trio.testing.wait_all_tasks_blocked()
        source = bench.pipe()[0]
        new = batch()
        steps = new.chain()
        steps.direct(lowlevel.openat, "/", os.O_RDONLY)
        steps.add(lowlevel.read, source, buffer)
        attempt = await parked(nursery, new.run)
        if end == "cancelled":
            async with nothing_submitted():
                assert await attempt.cancel()
        else:
            lowlevel.notify_closing(source)
            os.dup2(other, source)
        for gate in gates:
            os.write(gate, b"x")
        if end == "closed":
            nothing, closed = await attempt.result()
            assert nothing is None
            assert isinstance(closed, trio.ClosedResourceError)
    assert not pinned(buffer)
    assert os.read(other, 99) == b"not for you"
    assert manager().registered.has_places(MAX_DIRECT)


# What a direct descriptor is not


async def test_of_another_batch(bench: Bench) -> None:
    buffer = bytearray(1)
    other = chain()
    file = other.direct(lowlevel.openat, "/", os.O_RDONLY)
    new = chain()
    new.add(lowlevel.nop)
    new.add(lowlevel.read, file, buffer)
    async with nothing_submitted():
        with no_garbage_collection(), pytest.raises(ValueError, match="belongs to another batch") as caught:
            await new.run()
        assert repr(file) in str(caught.value)
        assert not pinned(buffer)
        del caught
    assert await other.run() == [None]


async def test_outside_of_a_batch(bench: Bench) -> None:
    new = chain()
    file = new.direct(lowlevel.openat, "/", os.O_RDONLY)
    assert "DirectFile" in repr(file)
    async with nothing_submitted():
        with pytest.raises(OverflowError):
            await lowlevel.read(file, bytearray(1))
        with pytest.raises(OverflowError):
            await lowlevel.fsync(file)
        with pytest.raises(OverflowError):
            await lowlevel.splice(file, -1, 1, -1, 1)
    assert await new.run() == [None]


async def test_where_the_kernel_wants_a_number(bench: Bench) -> None:
    """It would take the place for one."""
    adds: tuple[Callable[[Chain, DirectFile], object], ...] = (
        lambda new, file: new.add(lowlevel.epoll_ctl, file, 1, 0, select.EPOLLIN),
        lambda new, file: new.add(lowlevel.waitid, os.P_PIDFD, file, os.WEXITED),
    )
    for add in adds:
        new = chain()
        file = new.direct(lowlevel.openat, "/", os.O_RDONLY)
        try:
            add(new, file)
        except OverflowError:
            continue
        async with nothing_submitted():
            with pytest.raises((OverflowError, ValueError), match=r"takes no direct|does not fit"):
                await new.run()


async def test_splice_from_a_file_without_a_number(bench: Bench) -> None:
    path = bench.path(b"hello")
    read_end, write_end = bench.pipe()
    new = chain()
    file = new.direct(lowlevel.openat, path, os.O_RDONLY)
    new.add(lowlevel.splice, file, 1, write_end, -1, 4)
    assert await new.run() == [None, 4]
    assert os.read(read_end, 9) == b"ello"
    other = chain()
    foreign = other.direct(lowlevel.openat, path, os.O_RDONLY)
    new = chain()
    new.add(lowlevel.nop)
    new.add(lowlevel.splice, foreign, 0, write_end, -1, 4)
    async with nothing_submitted():
        with pytest.raises(ValueError, match="belongs to another batch"):
            await new.run()


async def test_a_place_is_only_for_steps_behind_the_first(bench: Bench) -> None:
    """A place stays empty if the step that needs it is not done, for its other fd is closed."""
    source, target, unused = bench.pipe(), bench.pipe(), bench.pipe()
    os.write(source[1], b"hello")
    new = batch()
    steps = new.chain()
    steps.add(lowlevel.nop)
    steps.add(lowlevel.splice, source[0], -1, unused[1], -1, 5)
    new.add(lowlevel.splice, source[0], -1, target[1], -1, 5)
    taken = await manager().registered.borrow_places(MAX_DIRECT)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        lowlevel.notify_closing(unused[1])
        manager().registered.return_places(taken)
        nothing, closed, count = await attempt.result()
    assert (nothing, count) == (None, 5)
    assert isinstance(closed, trio.ClosedResourceError)
    assert os.read(target[0], 9) == b"hello"


async def test_locks_are_kept(bench: Bench) -> None:
    """A process loses its POSIX locks on a file when it closes any fd of it, a duplicate as well."""
    path = bench.path(b"x")
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        new = chain()
        new.add(lowlevel.nop)
        new.add(lowlevel.write, file, b"y", 0)
        new.add(lowlevel.fsync, file)
        assert await new.run() == [None, 1, None]
        pid = fork()
        if pid == 0:
            try:
                with open(path, "r+b") as other:
                    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0


async def test_a_number_cannot_follow(bench: Bench) -> None:
    """It may be another file's by then."""
    a, _ = bench.sockets()
    buffer = bytearray(1)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))]
    calls: list[tuple[Any, ...]] = [
        (lowlevel.close, 0),
        (lowlevel.epoll_ctl, 0, 1, 0, select.EPOLLIN),
        (lowlevel.waitid, os.P_PIDFD, 0, os.WEXITED),
        (lowlevel.async_cancel, 0),
        (lowlevel.statx, 0),
        (lowlevel.linkat, "", "/nowhere", AT_EMPTY_PATH),
        (lowlevel.sendmsg, a, [buffer], rights),
        (lowlevel.sendmsg_zc, a, [buffer], rights),
    ]
    for call in calls:
        new = chain()
        new.add(lowlevel.nop)
        kwargs: dict[str, Any] = {"src_dir_fd": 0} if call[0] is lowlevel.linkat else {}
        with no_garbage_collection(), pytest.raises(ValueError, match="cannot follow another step") as caught:
            new.add(*call, **kwargs)
        assert not pinned(buffer)
        del caught
        assert await new.run() == [None]


async def test_what_cannot_be_direct(bench: Bench) -> None:
    buffer = bytearray(1)
    new = chain()
    with no_garbage_collection(), pytest.raises(TypeError, match="read cannot open") as caught:
        new.direct(lowlevel.read, 0, buffer)
    assert not pinned(buffer)
    del caught
    with pytest.raises(TypeError):
        new.direct(lowlevel.pipe)
    with pytest.raises(TypeError, match="not an operation"):
        new.direct(trio.sleep, 1)
    assert new.add(lowlevel.nop) == 0
    assert await new.run() == [None]


# Numbers that others may close


async def test_a_step_names_the_file_of_the_time_of_submission(bench: Bench) -> None:
    """The number is another file's when its turn comes."""
    read_end, write_end = bench.pipe()
    path, other = bench.path(), bench.file()
    fd = os.open(path, os.O_RDWR)
    source, target = bench.pipe(), bench.pipe()
    spliced_to = os.dup(target[1])
    os.write(source[1], b"spliced")
    new = chain()
    new.add(lowlevel.read, read_end, bytearray(1))
    new.add(lowlevel.write, fd, b"hello", 0)
    new.add(lowlevel.splice, source[0], -1, spliced_to, -1, 7)
    new.add(lowlevel.write, fd, b"HE", 0)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        for number in (fd, spliced_to):  # without a word to anybody
            os.dup2(other, number)
            bench.keep(number)
        os.write(write_end, b"x")
        assert await attempt.result() == [1, 5, 7, 2]
    assert os.fstat(other).st_size == 0
    assert path.read_bytes() == b"HEllo"
    assert os.read(target[0], 99) == b"spliced"


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "cancelled while staged", "busy"])
async def test_no_duplicate_is_left(bench: Bench, end: str) -> None:
    """The peer sees the end when the fd is closed."""
    read_end, write_end = bench.pipe()
    gate, opener = bench.pipe()
    a, _ = bench.sockets()
    new = batch()
    steps = new.chain()
    steps.add(lowlevel.read, gate, bytearray(1))
    if end == "failed":
        fail(steps)
    steps.add(lowlevel.write, write_end, b"x")
    if end == "busy":
        new.add(lowlevel.recv, a, bytearray(1))
        new.add(lowlevel.recv, a, bytearray(1))
        with pytest.raises(trio.BusyResourceError):
            await new.run()
    else:
        async with trio.open_nursery() as nursery:
            if end == "cancelled while staged":
                scope = nursery.cancel_scope
                await Attempt(nursery, new.run, once_parked=scope.cancel).settled()
            else:
                attempt = await parked(nursery, new.run)
                if end == "cancelled":
                    assert await attempt.cancel()
                else:
                    os.write(opener, b"x")
                    await attempt.result()
    bench.closed(write_end)
    os.close(write_end)
    if end == "done":
        assert os.read(read_end, 1) == b"x"
    assert os.read(read_end, 1) == b""


async def test_a_bad_fd_is_the_steps_own_error(bench: Bench) -> None:
    new = chain()
    new.add(lowlevel.nop)
    new.add(lowlevel.write, 1 << 20, b"x")
    new.add(lowlevel.nop)
    nothing, bad, broken = await new.run()
    assert nothing is None
    assert bad.errno == errno.EBADF
    assert is_broken_by(broken, 1)


async def test_too_many_open_files(bench: Bench) -> None:
    """A directory has to be duplicated."""
    fd, buffer = bench.file(), bytearray(1)
    directory = bench.keep(os.open(bench.directory, os.O_RDONLY))
    lowest_free = os.dup(0)
    os.close(lowest_free)
    new = chain()
    new.direct(lowlevel.openat, "/", os.O_RDONLY)
    new.add(lowlevel.write, fd, buffer)
    new.add(lowlevel.mkdirat, "never made", dir_fd=directory)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with nothing_submitted():
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            with no_garbage_collection(), pytest.raises(OSError, match="Too many open files") as caught:
                await new.run()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not pinned(buffer)
        del caught
    assert statistics().in_flight == 0
    assert await batch().run() == []


async def test_names_relative_to_the_current_directory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second directory of a rename is no fd here."""
    old, new_name = bench.path(b"x"), bench.directory / "renamed"
    new = chain()
    new.add(lowlevel.nop)
    new.add(lowlevel.renameat2, old, new_name)
    new.add(lowlevel.linkat, new_name, old)
    assert await new.run() == [None, None, None]
    assert old.read_bytes() == new_name.read_bytes() == b"x"


# Closed


@pytest.mark.parametrize("stage", ["staged", "in flight"])
async def test_a_step_whose_fd_is_closed(bench: Bench, stage: str) -> None:
    """The step itself is told so; it breaks the chain."""
    pipes = [bench.pipe() for _ in range(2)]
    other, other_end = bench.pipe()
    os.write(other_end, b"not for you")
    new = chain()
    for read_end, _ in pipes:
        new.add(lowlevel.read, read_end, bytearray(1))
    new.add(lowlevel.nop)

    def close_and_reuse() -> None:
        lowlevel.notify_closing(pipes[1][0])
        os.dup2(other, pipes[1][0])

    async with trio.open_nursery() as nursery:
        if stage == "staged":
            attempt = Attempt(nursery, new.run, once_parked=close_and_reuse)
        else:
            attempt = await parked(nursery, new.run)
            close_and_reuse()
        await trio.testing.wait_all_tasks_blocked()
        assert not attempt.done
        os.write(pipes[0][1], b"x")
        count, closed, broken = await attempt.result()
    assert count == 1
    assert isinstance(closed, trio.ClosedResourceError)
    assert is_broken_by(broken, 1)
    assert os.read(other, 99) == b"not for you"


async def test_a_step_whose_fd_is_closed_behind_a_hard_link(bench: Bench) -> None:
    pipes = [bench.pipe() for _ in range(3)]
    new = chain()
    for read_end, _ in pipes:
        new.add_hard(lowlevel.read, read_end, bytearray(1))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        lowlevel.notify_closing(pipes[0][0])
        lowlevel.notify_closing(pipes[1][0])
        await trio.testing.wait_all_tasks_blocked()
        os.write(pipes[2][1], b"x")
        first, second, third = await attempt.result()
    assert isinstance(first, trio.ClosedResourceError)
    assert isinstance(second, trio.ClosedResourceError)
    assert third == 1


# Cancelled


@pytest.mark.parametrize("n", [1, 200])
@pytest.mark.parametrize("hard", [True, False])
async def test_every_later_step_is_cancelled(bench: Bench, hard: bool, n: int) -> None:
    read_end, write_end = bench.pipe()
    new = batch()
    for _ in range(n):
        steps = new.chain()
        for _ in range(4):
            (steps.add_hard if hard else steps.add)(lowlevel.read, read_end, bytearray(1))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        with trio.fail_after(10, shield=True):
            assert await attempt.cancel()
    assert statistics().in_flight == 0
    os.write(write_end, b"x")
    assert os.read(read_end, 9) == b"x"


@pytest.mark.parametrize("ticks", range(4))
async def test_cancelled_before_the_kernel_begins_a_step(bench: Bench, ticks: int) -> None:
    """It does so some time after the completion of the one before, for some twenty chains at a time."""
    read_end, write_end = bench.pipe()
    for _ in range(3):
        new = batch()
        for _ in range(80):
            steps = new.chain()
            steps.add(lowlevel.nop)
            steps.add(lowlevel.read, read_end, bytearray(1))
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            with trio.fail_after(5, shield=True):
                attempt.scope.cancel()
                await attempt.settled()
        if not attempt.cancelled:
            assert {*errnos(attempt.value)} <= {None, errno.ECANCELED}
    os.write(write_end, b"x")
    assert os.read(read_end, 9) == b"x"


async def test_cancelled_between_its_steps(bench: Bench) -> None:
    """What is done is done: an fd is handed over, not closed."""
    read_end, _ = bench.pipe()
    new = chain()
    new.add(lowlevel.openat, bench.path(b"x"), os.O_RDONLY)
    new.add(lowlevel.read, read_end, bytearray(1))
    new.add(lowlevel.nop)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        assert not await attempt.cancel()
    fd = attempt.value[0]
    assert os.read(bench.keep(fd), 9) == b"x"
    assert errnos(attempt.value) == [fd, errno.ECANCELED, errno.ECANCELED]
    assert not isinstance(attempt.value[2], ChainBrokenError)


async def test_cancelled_while_a_kernel_worker_has_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_file_ops, "READ", in_kernel_worker(_file_ops.READ))
    read_end, _ = bench.pipe()
    for _ in range(20):
        new = chain()
        for _ in range(3):
            new._add(1 << 3, (_file_ops.READ, read_end, -1, None, 0, 0))
        new.add_hard(lowlevel.readv, read_end, [bytearray(1)])
        new.add(lowlevel.readv, read_end, [bytearray(1)])
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, new.run)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(10, shield=True):
                attempt.scope.cancel()
                await attempt.settled()
        assert statistics().in_flight == 0


# What the kernel lacks


async def test_no_fallback_in_a_chain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = bench.new_socket()
    for first in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(manager(), "_missing", frozenset({Opcode.BIND}))
            new = chain()
            if first:
                new.add(lowlevel.bind, sock, ("127.0.0.1", 0))
            new.add(lowlevel.nop)
            if not first:
                new.add(lowlevel.bind, sock, ("127.0.0.1", 0))
            async with nothing_submitted():
                with pytest.raises(UnsupportedOperation, match="lacks bind"):
                    await new.run()
            new = chain()
            new.add(lowlevel.bind, sock, ("127.0.0.1", 0))  # on its own it can
            if first:
                assert await new.run() == [None]
    with monkeypatch.context() as patch:
        patch.setattr(manager(), "_missing", frozenset({Opcode.SOCKET}))
        new = chain()
        new.direct(lowlevel.socket)
        with pytest.raises(UnsupportedOperation, match="lacks socket"):
            await new.run()


# The end of the run


def test_a_crash_with_chains_in_flight(mount: Mount, bench: Bench) -> None:
    fifo = bench.fifo()
    read_end = bench.keep(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    gate, target = bench.pipe(), bench.pipe()
    path = bench.path()
    buffer = bytearray(5)

    async def main() -> None:
        for add_hard in (True, False):
            new = batch()
            steps = new.chain()
            file = steps.direct(lowlevel.openat, fifo, os.O_WRONLY)
            steps.add(lowlevel.write, file, b"hello")
            steps.add(lowlevel.openat, path, os.O_RDONLY)
            (steps.add_hard if add_hard else steps.add)(lowlevel.read, gate[0], buffer)
            steps.add(lowlevel.read, gate[0], buffer)
            steps.add(lowlevel.write, target[1], b"x")
            trio.lowlevel.spawn_system_task(new.run)
        await trio.testing.wait_all_tasks_blocked()
        another = chain()
        another.direct(lowlevel.openat, fifo, os.O_WRONLY)
        another.add(lowlevel.openat, path, os.O_RDONLY)
        trio.lowlevel.spawn_system_task(another.run)
        await trio.lowlevel.checkpoint()
        await crash()

    run_to_a_crash(mount, main)
    assert not pinned(buffer)
    assert drain(read_end, 10) == b"hellohello"
    spin_until(lambda: select.select([read_end], [], [], 0)[0])
    assert os.read(read_end, 1) == b""
    bench.closed(target[1])
    os.close(target[1])
    assert os.read(target[0], 1) == b"", "a duplicate is left"


async def test_an_unused_chain_leaves_nothing(bench: Bench) -> None:
    buffer = bytearray(1)
    new = chain()
    file = new.direct(lowlevel.openat, "/", os.O_RDONLY)
    new.add(lowlevel.read, file, buffer)
    assert pinned(buffer)
    with no_garbage_collection():
        del new
    assert not pinned(buffer)
    assert manager().registered.has_places(MAX_DIRECT)
