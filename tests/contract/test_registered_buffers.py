"""Registered buffers: the same bytes as by the plain calls, in memory that is held as long as the kernel may use it."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import resource
import tempfile
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    Attempt,
    Mount,
    crash,
    drain,
    in_child,
    manager,
    parked,
    run_native,
    run_to_a_crash,
    run_without_ring,
)
from tests.unit.by_hand import no_garbage_collection, pinned
from trio_uring import UnavailableError, UnsupportedOperation, _registered, lowlevel, statistics
from trio_uring._abi import Opcode
from trio_uring.lowlevel import RegisteredBuffer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.helpers import Bench

NOBODY = 65534
RWF_NOWAIT = 8

# The same bytes as the plain calls

SIZE = 40
CONTENT = bytes(range(100, 200))
OFFSETS = st.sampled_from([-2, -1, 0]) | st.integers(0, 120)
PIECE = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda ends: (min(ends), max(ends) - min(ends)))
PIECES = st.lists(PIECE, max_size=6)

Transfer = tuple[list[tuple[int, int]], int]


@contextlib.contextmanager
def file_at(position: int) -> Iterator[int]:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(CONTENT)
        file.seek(position)
        yield file.fileno()


def _parts(buffer: bytearray, pieces: list[tuple[int, int]]) -> list[memoryview]:
    return [memoryview(buffer)[start : start + length] for start, length in pieces]


def _plainly(reads: bool, fd: int, buffer: bytearray, pieces: list[tuple[int, int]], offset: int) -> Any:
    parts = _parts(buffer, pieces)
    try:
        if offset == -1:
            return os.readv(fd, parts) if reads else os.writev(fd, parts)
        return os.preadv(fd, parts, offset) if reads else os.pwritev(fd, parts, offset)
    except OSError as exc:
        return exc.errno


async def _ours(reads: bool, fd: int, buffer: RegisteredBuffer, pieces: list[tuple[int, int]], offset: int) -> Any:
    try:
        if len(pieces) == 1:
            ((start, length),) = pieces
            one = lowlevel.read_fixed if reads else lowlevel.write_fixed
            return await one(fd, buffer, offset, start=start, length=length)
        many = lowlevel.readv_fixed if reads else lowlevel.writev_fixed
        return await many(fd, buffer, pieces, offset)
    except OSError as exc:
        return exc.errno


@settings(deadline=None, max_examples=150)
@given(
    transfers=st.lists(st.tuples(st.booleans(), PIECES, OFFSETS), min_size=1, max_size=5),
    position=st.integers(0, 110),
)
def test_the_same_as_the_plain_calls(transfers: list[tuple[bool, list[tuple[int, int]], int]], position: int) -> None:
    """Results, errors, what is in the buffer, what is in the file, and where the file's position is."""
    plain, registered = bytearray(range(SIZE)), bytearray(range(SIZE))

    async def main() -> list[Any]:
        with RegisteredBuffer(registered) as buffer:
            return [await _ours(reads, second, buffer, pieces, at) for reads, pieces, at in transfers]

    with file_at(position) as first, file_at(position) as second:
        expected = [_plainly(reads, first, plain, pieces, at) for reads, pieces, at in transfers]
        assert run_native(main) == expected
        assert registered == plain
        for look in (lambda fd: os.lseek(fd, 0, os.SEEK_CUR), lambda fd: os.pread(fd, 1000, 0)):
            assert look(second) == look(first)


async def test_by_default_all_of_it(bench: Bench) -> None:
    fd, data = bench.file(b"0123456789"), bytearray(6)
    with RegisteredBuffer(data) as buffer:
        assert buffer.size == 6
        assert await lowlevel.read_fixed(fd, buffer) == 6
        assert data == b"012345"
        assert await lowlevel.read_fixed(fd, buffer, start=2) == 4
        assert data == b"016789"
        assert await lowlevel.write_fixed(fd, buffer, 0, start=4) == 2
        assert os.pread(fd, 20, 0) == b"8923456789"


async def test_too_many_pieces(bench: Bench) -> None:
    fd = bench.file(bytes(3000))
    with RegisteredBuffer(bytearray(9)) as buffer:
        assert await lowlevel.readv_fixed(fd, buffer, [(0, 2)] * 1024, 0) == 2048
        with pytest.raises(OSError, match="Invalid argument"):
            await lowlevel.readv_fixed(fd, buffer, [(0, 1)] * 1025, 0)


async def test_in_a_batch(bench: Bench) -> None:
    content = os.urandom(64 * 100)
    fd, data = bench.file(content), bytearray(len(content))
    with RegisteredBuffer(data) as buffer:
        batch = lowlevel.batch()
        for at in reversed(range(0, len(content), 100)):
            batch.add(lowlevel.read_fixed, fd, buffer, at, start=at, length=100)
        assert await batch.run() == [100] * 64
    assert data == content
    assert not pinned(data)


# Memory

BLOCKED: dict[str, Callable[[int, RegisteredBuffer], Awaitable[int]]] = {
    "read_fixed": lowlevel.read_fixed,
    "readv_fixed": lambda fd, buffer: lowlevel.readv_fixed(fd, buffer, [(0, 3), (3, 6)]),
    "write_fixed": lowlevel.write_fixed,
    "writev_fixed": lambda fd, buffer: lowlevel.writev_fixed(fd, buffer, [(0, 3), (3, 6)]),
}


async def test_it_is_held_while_it_is_registered() -> None:
    for data in (bytearray(10), bytearray(100_000)):
        with RegisteredBuffer(data) as buffer:
            assert pinned(data)
        assert not pinned(data)
        buffer.close()


@pytest.mark.parametrize("end", ["done", "cancelled", "closed"])
@pytest.mark.parametrize("name", BLOCKED)
async def test_closed_while_it_is_used(bench: Bench, name: str, end: str) -> None:
    """The kernel goes on with it; who comes after it, in the same place, has nothing to do with that."""
    data, others = bytearray(b"123456789"), bytearray(b"abcdefghi")
    reads = name.startswith("read")
    if reads:
        (fd, peer), size = bench.pipe(), 0
    else:
        peer, fd, size = bench.full_pipe()
    buffer = RegisteredBuffer(data)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, BLOCKED[name], fd, buffer)
        buffer.close()
        assert pinned(data)
        with RegisteredBuffer(others) as other:
            assert other._index == buffer._index
            if end == "done" and reads:
                os.write(peer, b"ABCDEFGHI")
            elif end == "done":
                drain(peer, size)
            elif end == "cancelled":
                attempt.scope.cancel()
            else:
                lowlevel.notify_closing(fd)
            assert pinned(data)
            await attempt.settled()
    assert not pinned(data)
    assert bytes(others) == b"abcdefghi"
    assert bytes(data) == (b"ABCDEFGHI" if end == "done" and reads else b"123456789")
    if end == "done":
        assert attempt.value == 9
        assert reads or os.read(peer, 99) == data
    elif end == "cancelled":
        assert attempt.cancelled
    else:
        assert isinstance(attempt.error, trio.ClosedResourceError)


@pytest.mark.parametrize("name", BLOCKED)
async def test_closed_while_an_operation_is_staged(bench: Bench, name: str) -> None:
    """The operation comes first, although the next one to have the place is registered before the tick."""
    data, others = bytearray(b"123456789"), bytearray(b"abcdefghi")
    fd = bench.file(b"ABCDEFGHI")
    buffer = RegisteredBuffer(data)

    def replace() -> None:
        buffer.close()
        replaced.append(RegisteredBuffer(others))

    replaced: list[RegisteredBuffer] = []
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, BLOCKED[name], fd, buffer, once_parked=replace)
        assert await attempt.result() == 9
    replaced[0].close()
    assert bytes(others) == b"abcdefghi"
    assert bytes(data) == (b"ABCDEFGHI" if name.startswith("read") else b"123456789")
    assert os.pread(fd, 9, 0) == data
    assert not pinned(data)


async def test_closed_while_it_waits_for_another_try(bench: Bench) -> None:
    """The kernel did not have the operation then, and finds another buffer, or none: nothing is written anywhere."""
    for replaced in (False, True):
        data, others = bytearray(9), bytearray(9)
        read_end, write_end = bench.pipe()
        buffer = RegisteredBuffer(data)
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, partial(lowlevel.read_fixed, read_end, buffer, flags=RWF_NOWAIT))
            buffer.close()
            other = RegisteredBuffer(others) if replaced else None
            os.write(write_end, b"hello")
            with pytest.raises(OSError, match="Bad address") as raised:
                await attempt.result()
            assert raised.value.errno == errno.EFAULT
        if other is not None:
            other.close()
        assert data == others == bytes(9)
        assert not pinned(data)


async def test_tried_again(bench: Bench) -> None:
    data = bytearray(9)
    read_end, write_end = bench.pipe()
    with RegisteredBuffer(data) as buffer:
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, lambda: lowlevel.read_fixed(read_end, buffer, flags=RWF_NOWAIT))
            os.write(write_end, b"hello")
            assert await attempt.result() == 5
    assert data == b"hello\0\0\0\0"


async def test_places_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(_registered.MAX_FIXED_BUFFERS + 100):
        RegisteredBuffer(bytearray(10)).close()
    buffers = [RegisteredBuffer(bytearray(10)) for _ in range(_registered.MAX_FIXED_BUFFERS)]
    assert len({buffer._index for buffer in buffers}) == len(buffers)
    data = bytearray(10)
    with pytest.raises(OSError, match="at most 1024") as raised:
        RegisteredBuffer(data)
    assert raised.value.errno == errno.ENOBUFS
    assert not pinned(data)
    buffers.pop().close()
    RegisteredBuffer(data).close()


@pytest.mark.parametrize(
    ("wrong", "error"), [(bytearray(), ValueError), (b"read-only", BufferError), (5, TypeError)], ids=repr
)
async def test_no_buffer_to_register(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        RegisteredBuffer(wrong)
    if isinstance(wrong, bytearray):
        assert not pinned(wrong)


async def test_too_large() -> None:
    with mmap.mmap(-1, (1 << 30) + 1) as memory, pytest.raises(ValueError, match="1073741825"):
        RegisteredBuffer(memory)


PLACES: list[tuple[int, int]] = [(-1, 1), (0, -1), (0, 11), (10, 1), (11, 0), (1 << 70, 1)]


@pytest.mark.parametrize(("start", "length"), PLACES)
async def test_outside_of_the_buffer(bench: Bench, start: int, length: int) -> None:
    fd = bench.file(bytes(100))
    with RegisteredBuffer(bytearray(10)) as buffer:
        calls: list[Callable[[], Awaitable[int]]] = [
            lambda: lowlevel.read_fixed(fd, buffer, start=start, length=length),
            lambda: lowlevel.write_fixed(fd, buffer, start=start, length=length),
            lambda: lowlevel.readv_fixed(fd, buffer, [(0, 1), (start, length)]),
            lambda: lowlevel.writev_fixed(fd, buffer, [(0, 1), (start, length)]),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="10 bytes"):
                await call()
    assert statistics().in_flight == 0


async def test_after_close(bench: Bench) -> None:
    fd = bench.file(b"x")
    with RegisteredBuffer(bytearray(10)) as buffer:
        pass
    for call in BLOCKED.values():
        with pytest.raises(ValueError, match="no longer registered"):
            await call(fd, buffer)


async def test_another_run(bench: Bench) -> None:
    """It is of no use there, and cannot be closed there."""
    fd = bench.file(b"hello")
    data = bytearray(9)
    failures: list[BaseException] = []

    async def use() -> None:
        with pytest.raises(ValueError, match="another trio run") as raised:
            await lowlevel.read_fixed(fd, buffer)
        failures.append(raised.value)

    def in_thread() -> None:
        run_native(use)
        with pytest.raises(RuntimeError) as raised:
            buffer.close()
        failures.append(raised.value)

    with RegisteredBuffer(data) as buffer:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert len(failures) == 2
        assert pinned(data)
        assert await lowlevel.read_fixed(fd, buffer) == 5
    assert not pinned(data)


async def test_a_kernel_that_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(9)
    for opcode in (Opcode.READ_FIXED, Opcode.SOCKET):
        monkeypatch.setattr(manager(), "_missing", frozenset({opcode}))
        with pytest.raises(UnsupportedOperation, match=r"Linux 5\.19"):
            RegisteredBuffer(data)
        assert not pinned(data)


def test_without_a_ring() -> None:
    async def main() -> None:
        with pytest.raises(UnavailableError):
            RegisteredBuffer(bytearray(1))

    run_without_ring(main)


# The end of the run


def test_it_outlives_its_run(mount: Mount, bench: Bench) -> None:
    data = bytearray(9)

    async def main() -> RegisteredBuffer:
        return RegisteredBuffer(data)

    buffer = mount.run(main)
    assert pinned(data)

    async def another() -> None:
        with pytest.raises(ValueError, match="another trio run"):
            await lowlevel.read_fixed(bench.file(b"x"), buffer)

    mount.run(another)
    buffer.close()
    assert not pinned(data)
    buffer.close()


def test_a_crash_while_it_is_used(mount: Mount, bench: Bench) -> None:
    data = bytearray(4096)
    read_end, write_end = bench.pipe()

    async def main() -> None:
        buffer = RegisteredBuffer(data)
        for _ in range(3):
            trio.lowlevel.spawn_system_task(lowlevel.read_fixed, read_end, buffer)
        trio.lowlevel.spawn_system_task(lowlevel.readv_fixed, read_end, buffer, [(0, 9), (9, 9)])
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.spawn_system_task(lowlevel.read_fixed, read_end, buffer)
        await trio.lowlevel.checkpoint()
        await crash()

    run_to_a_crash(mount, main)
    assert not pinned(data)
    os.write(write_end, b"hello")
    assert os.read(read_end, 9) == b"hello"
    assert data == bytes(4096)


def test_nothing_is_left_for_the_garbage_collector(mount: Mount, bench: Bench) -> None:
    fd, data = bench.file(b"hello"), bytearray(9)

    async def main() -> None:
        with RegisteredBuffer(data) as buffer:
            await lowlevel.read_fixed(fd, buffer)
            await lowlevel.readv_fixed(fd, buffer, [(0, 9)])
        with pytest.raises(ValueError, match="no longer"):
            await lowlevel.read_fixed(fd, buffer)
        with pytest.raises(OSError, match="Bad file"), RegisteredBuffer(data) as buffer:
            await lowlevel.read_fixed(1 << 20, buffer)

    gc.collect()
    with no_garbage_collection():
        mount.run(main)
        assert not pinned(data)


# The limit of locked memory


def _register_too_much() -> tuple[int, str, bool, int]:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _registered.MAX_FIXED_BUFFERS = 1  # type: ignore[misc]
    data = bytearray(16 << 20)

    async def main() -> tuple[int, str, bool, int]:
        with pytest.raises(OSError, match="RLIMIT_MEMLOCK") as raised:
            RegisteredBuffer(data)
        assert raised.value.errno is not None
        read_end, write_end = os.pipe()
        os.write(write_end, b"hello")
        with RegisteredBuffer(bytearray(1 << 20)) as buffer:  # the place is free
            count = await lowlevel.read_fixed(read_end, buffer)
        return raised.value.errno, str(raised.value), pinned(data), count

    return run_native(main)


@pytest.mark.skipif(os.geteuid() != 0, reason="limits concern users without privileges; to become one takes root")
def test_the_limit_of_locked_memory() -> None:
    code, message, held, count = in_child(_register_too_much)
    assert (code, held, count) == (errno.ENOMEM, False, 5)
    assert "ulimit -l" in message
    assert "8388608 bytes" in message
