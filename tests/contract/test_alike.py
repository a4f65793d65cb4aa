"""Many operations that differ in nothing but their arguments: C fills them, and nobody can tell but by the clock."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.test_batch import errnos
from tests.helpers import crash, nothing_submitted, parked, run_to_a_crash, spin_until
from tests.unit.by_hand import no_garbage_collection, pinned
from trio_uring import UnsupportedOperation, _file_ops, lowlevel, run, statistics
from trio_uring._batch import _Part
from trio_uring._cancel import nothing
from trio_uring._errors import ChainBrokenError
from trio_uring._ops import filler_of
from trio_uring._ring import SQE_SIZE, ffi
from trio_uring._rows import Column, DirectFile, Filled, as_direct, direct_form, fill_column
from trio_uring.lowlevel import TABLE, Chains, batch, chains

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers import Bench, Mount
    from trio_uring.lowlevel import Kind

FORMS = [kind for kind in TABLE.values() if kind.form is not None]


def bytes_of(sqes: Any, n: int) -> list[bytes]:
    return [bytes(ffi.buffer(sqes.memory)[SQE_SIZE * i : SQE_SIZE * (i + 1)]) for i in range(n)]


def is_filled(new: Any) -> bool:
    """Has C filled it?"""
    requests = new._requests if isinstance(new, lowlevel.Batch) else new._steps[-1]
    return isinstance(requests, Filled | Column)


# The same entries


def one_of(*things: Any) -> st.SearchStrategy[Any]:
    """Hashable or not."""
    return st.integers(0, len(things) - 1).map(things.__getitem__)


_INTS = st.one_of(
    st.integers(-3, 3),
    st.integers(-(1 << 33), 1 << 33),
    st.sampled_from([1 << 31, 1 << 32, 1 << 63, -(1 << 63), 1 << 70]),
)
_BUFFERS = (bytearray(b"abc"), bytearray(), array("i", [1, 2]), memoryview(bytearray(8))[2:5], mmap.mmap(-1, 10))
_ANYTHING = st.one_of(
    _INTS,
    one_of(*_BUFFERS, b"bytes", memoryview(b"abcd")[::2], None, True, 1.5),
    one_of("name", b"name", "", "nul\0", b"nul\0", "\udcff", "\ud800"),
)
_LIKELY = {
    "F": st.integers(-1, 5),
    "W": one_of(*_BUFFERS),
    "R": one_of(*_BUFFERS, b"bytes"),
    "P": st.sampled_from(["name", b"name", "n\u00e4me", "\udcff"]),
    "O": st.integers(-1, 1 << 40),
    "L": st.integers(0, 0o7777),
    "G": st.integers(0, (1 << 32) - 1),
}


@st.composite
def rows_of(draw: st.DrawFn, kind: Kind[Any]) -> list[tuple[Any, ...]]:
    """Mostly good."""
    assert kind.form is not None
    needed, _, optional = kind.form.letters.partition("|")
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        letters = (needed + optional)[: draw(st.integers(len(needed), len(needed + optional)))]
        row = [draw(_LIKELY[letter]) for letter in letters]
        if draw(st.integers(0, 9)) == 0:
            row[draw(st.integers(0, len(row) - 1))] = draw(_ANYTHING)
        if draw(st.integers(0, 19)) == 0:
            row.append(0)
        rows.append(tuple(row))
    return rows


def names_of(requests: list[tuple[Any, ...]]) -> list[bytes | None]:
    """The file names they have copies of, or None."""
    return [ffi.string(request[3]) if len(request) > 7 else None for request in requests]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
@given(data=st.data())
def test_what_c_fills_is_what_python_fills(kind: Kind[Any], direct: bool, data: st.DataObject) -> None:
    rows = data.draw(rows_of(kind))
    filler = filler_of(getattr(lowlevel, kind.name))
    file = None
    if direct:
        if kind.cloexec is None:
            return
        file = DirectFile.new()
        kind = direct_form(kind)
    column = fill_column(kind, rows, opened=file)
    try:
        requests = [filler(*row) for row in rows]
        if file is not None:
            requests = [as_direct(request, file) for request in requests]
        part = _Part(requests, {}, ())
        part.places = {} if file is None else {file: 4}
        expected = bytes_of(part.fill(), len(rows))
    except (AttributeError, TypeError, ValueError, OverflowError, BufferError):
        assert column is None
        return
    if column is None:  # Python knows of more than C, but not of exact ints and plain names and buffers
        letters = kind.form.letters.replace("|", "") if kind.form is not None else ""
        plain = [
            type(each) in (int, str, bytes) or letter in "WR"
            for row in rows
            for letter, each in zip(letters, row, strict=False)
        ]
        assert not all(plain)
        return
    filled = Filled([column]).weave([] if file is None else [4] * len(rows))
    actual = bytes_of(filled, len(rows))
    names = names_of(requests)
    for ours, theirs, name in zip(actual, expected, names, strict=True):
        if name is None:
            assert ours == theirs
            continue
        assert ours[:16] + ours[24:] == theirs[:16] + theirs[24:]
        assert ffi.string(ffi.cast("char *", int.from_bytes(ours[16:24], "little"))) == name


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
def test_what_c_fills_needs_no_more_than_that(kind: Kind[Any]) -> None:
    assert kind.decode in (None, nothing)
    assert kind.ordinary
    assert (kind.prelude, kind.direction, kind.fallback, kind.second_fd) == (None,) * 4


# Batches


async def test_reads_writes_and_opens(bench: Bench) -> None:
    paths = [missing(bench, str(number)) for number in range(40)]
    opens = batch()
    opens.extend(lowlevel.openat, ((path, os.O_CREAT | os.O_RDWR, 0o640) for path in paths))
    assert is_filled(opens)
    fds = await opens.run()
    try:
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == [os.fsdecode(path) for path in paths]
        assert not any(os.get_inheritable(fd) for fd in fds)
        writes = batch()
        writes.extend(lowlevel.write, ((fd, b"x" * number) for number, fd in enumerate(fds)))
        assert is_filled(writes)
        assert len(writes) == 40
        assert await writes.run() == list(range(40))
        buffers = [bytearray(50) for _ in fds]
        reads = batch()
        reads.extend(lowlevel.read, zip(fds, buffers, itertools.repeat(0)))
        assert is_filled(reads)
        before = statistics()
        assert await reads.run() == list(range(40))
        assert statistics().submits - before.submits == 1
        assert [buffer.rstrip(b"\0") for buffer in buffers] == [b"x" * number for number in range(40)]
    finally:
        for fd in fds:
            os.close(fd)


async def test_rows_that_add_to_their_batch(bench: Bench) -> None:
    """They come first; nothing is lost."""
    fd = bench.file(b"abc")
    buffers = [bytearray(1) for _ in range(3)]
    new = batch()

    def rows() -> Iterator[tuple[Any, ...]]:
        for offset, buffer in enumerate(buffers):
            new.add(lowlevel.nop)
            yield fd, buffer, offset

    new.extend(lowlevel.read, rows())
    assert await new.run() == [None] * 3 + [1] * 3
    assert b"".join(buffers) == b"abc"


class Backwards(tuple[Any, ...]):
    """Its arguments are not what it is made of."""

    def __iter__(self) -> Iterator[Any]:
        return iter([self[at] for at in range(len(self) - 1, -1, -1)])


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("make", [tuple, list, iter, "one list", Backwards])
async def test_rows_of_any_kind(bench: Bench, make: Any, chained: bool) -> None:
    """As `starmap` takes them: a list that changes from row to row, an iterator."""
    path = bench.path(b"abc")
    fd = os.open(path, os.O_RDONLY)
    buffers = [bytearray(1) for _ in range(3)]
    same: list[Any] = []

    def rows(file: int) -> Iterator[Any]:
        for offset, buffer in enumerate(buffers):
            row = [file, buffer, offset]
            if make == "one list":
                same[:] = row
                yield same
            else:
                yield Backwards(reversed(row)) if make is Backwards else make(row)

    try:
        if chained:
            new = chains()
            file = new.direct(lowlevel.openat, [(path, os.O_RDONLY)] * 3)
            new.add(lowlevel.read, rows(file))
            assert (await new.run())[1] == [1] * 3
        else:
            reads = batch()
            reads.extend(lowlevel.read, rows(fd))
            assert is_filled(reads)
            assert await reads.run() == [1] * 3
    finally:
        os.close(fd)
    assert b"".join(buffers) == b"abc"


class OddText(str):
    """Another name when it is encoded."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.removesuffix("?").encode(encoding, errors)


class OddBytes(bytes):
    """Another name when it is exported, from Python 3.12 on."""

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(b"no end")


@pytest.mark.parametrize("odd", [lambda path: OddText(os.fsdecode(path) + "?"), OddBytes])
async def test_names_of_a_subclass(bench: Bench, odd: Any) -> None:
    """As in a single operation, whatever C could make of it."""
    path = os.fsencode(bench.path())
    opens = batch()
    opens.extend(lowlevel.openat, [(odd(path), os.O_RDONLY)])
    (fd,) = await opens.run()
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == os.fsdecode(path)
    finally:
        os.close(fd)


async def test_with_others_added(bench: Bench) -> None:
    fd = bench.file(b"abc")
    buffers = [bytearray(1) for _ in range(6)]
    new = batch()
    new.extend(lowlevel.read, [(fd, buffers[0], 0), (fd, buffers[1], 1)])
    assert new.add(lowlevel.read, fd, buffers[2], 2) == 2
    new.extend(lowlevel.read, [(fd, buffers[3], 0), (fd, buffers[4], 1)])
    steps = new.chain()
    steps.add(lowlevel.nop)
    assert steps.add(lowlevel.read, fd, buffers[5], 2) == 6
    assert await new.run() == [1, 1, 1, 1, 1, None, 1]
    assert b"".join(buffers) == b"abcabc"


async def extend_and_run(new: lowlevel.Batch, *rows: tuple[Any, ...]) -> None:
    new.extend(lowlevel.read, rows)
    await new.run()


@pytest.mark.parametrize("row", [(1.5, b""), (0, "x"), (0,), (0, bytearray(1), 0, 0, 0), (0, bytearray(1), "x")])
async def test_a_bad_row(bench: Bench, row: tuple[Any, ...]) -> None:
    """The error is that of the operation, and nothing is held."""
    buffer = bytearray(1)
    new = batch()
    with no_garbage_collection(), pytest.raises((TypeError, AttributeError, ValueError)) as caught:
        await extend_and_run(new, (bench.file(), buffer), row)
    del caught, new
    assert not pinned(buffer)


async def test_buffers_are_held_until_it_is_over(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    buffers = [bytearray(1) for _ in range(3)]
    new = batch()
    new.extend(lowlevel.read, [(read_end, buffer) for buffer in buffers])
    assert is_filled(new)
    assert all(map(pinned, buffers))
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        assert all(map(pinned, buffers))
        os.write(write_end, b"abc")
        with no_garbage_collection():
            assert await attempt.result() == [1, 1, 1]
            assert not any(map(pinned, buffers))
    assert sorted(b"".join(buffers)) == sorted(b"abc")


async def test_what_is_cancelled_holds_nothing(bench: Bench) -> None:
    """Not while its exception is looked at either."""
    read_end, _ = bench.pipe()
    buffer = bytearray(1)
    new = batch()
    new.extend(lowlevel.read, [(read_end, buffer)])
    held = []

    async def look() -> None:
        try:
            await new.run()
        except trio.Cancelled:
            held.append(pinned(buffer))
            raise

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, look)
        assert await attempt.cancel()
    assert held == [False]


@pytest.mark.ring(max_in_flight=8)
async def test_buffers_are_asked_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither parts, nor errors, nor what is tried again, nor what is added behind them needs another export: an
    array may be read-only by then."""
    fd = bench.file(b"abcde")
    read_end, write_end = bench.pipe()
    os.set_blocking(read_end, False)
    buffers = [bytearray(1) for _ in range(6)]
    for more in ([], [(lowlevel.nop,)]):
        new = batch()
        pieces = [(fd, buffer, offset) for offset, buffer in enumerate(buffers[:5])]
        new.extend(lowlevel.read, [*pieces, (read_end, buffers[5]), (-1, bytearray(1))])
        assert is_filled(new)
        with monkeypatch.context() as patch:
            patch.delattr(_file_ops, "from_buffer")
            for operation in more:
                new.add(*operation)
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, new.run)
                os.write(write_end, b"f")
                *results, failed = (await attempt.result())[:7]
        assert results == [1] * 6
        assert failed.errno == errno.EBADF
        assert b"".join(buffers) == b"abcdef"
        assert not any(map(pinned, buffers))


async def test_a_batch_that_is_not_run(bench: Bench) -> None:
    buffers = [bytearray(1) for _ in range(3)]
    new = batch()
    new.extend(lowlevel.read, [(bench.file(), buffer) for buffer in buffers])
    with no_garbage_collection():
        del new
        assert not any(map(pinned, buffers))


async def test_errors_are_those_of_each(bench: Bench) -> None:
    there, nowhere = os.fsencode(bench.path()), missing(bench)
    new = batch()
    new.extend(lowlevel.openat, [(nowhere, os.O_RDONLY), (there, os.O_RDONLY), (nowhere, os.O_RDONLY)])
    assert is_filled(new)
    first, fd, third = await new.run()
    os.close(fd)
    for error in (first, third):
        assert isinstance(error, FileNotFoundError)
        assert error.filename == nowhere


async def test_what_is_tried_again(bench: Bench) -> None:
    """A read of a non-blocking pipe waits, as it does alone."""
    pipes = [bench.pipe() for _ in range(3)]
    buffers = [bytearray(1) for _ in pipes]
    for read_end, _ in pipes:
        os.set_blocking(read_end, False)
    new = batch()
    new.extend(lowlevel.read, [(read_end, buffer) for (read_end, _), buffer in zip(pipes, buffers, strict=True)])
    assert is_filled(new)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        for _, write_end in pipes:
            os.write(write_end, b"x")
        assert await attempt.result() == [1, 1, 1]
    assert b"".join(buffers) == b"xxx"


async def test_cancelled(bench: Bench) -> None:
    """What has been done is not lost; what has not is cancelled."""
    pipes = [bench.pipe() for _ in range(4)]
    buffers = [bytearray(1) for _ in pipes]
    for done in (0, 2):
        for _, write_end in pipes[:done]:
            os.write(write_end, b"x")
        new = batch()
        new.extend(lowlevel.read, [(read_end, buffer) for (read_end, _), buffer in zip(pipes, buffers, strict=True)])
        assert is_filled(new)
        async with trio.open_nursery() as nursery:
            attempt = await parked(nursery, new.run)
            assert await attempt.cancel() is (done == 0)
            assert done == 0 or errnos(attempt.value) == [1] * done + [errno.ECANCELED] * (4 - done)
        assert not any(map(pinned, buffers))


async def test_in_a_cancelled_scope_nothing_is_submitted(bench: Bench) -> None:
    buffer = bytearray(1)
    new = batch()
    new.extend(lowlevel.read, [(bench.file(b"x"), buffer)])
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            await new.run()
        assert scope.cancelled_caught
    assert not pinned(buffer)


@pytest.mark.ring(max_in_flight=8)
async def test_parts(bench: Bench) -> None:
    fd = bench.file(bytes(range(21)))
    buffers = [bytearray(1) for _ in range(21)]
    new = batch()
    new.extend(lowlevel.read, [(fd, buffer, offset) for offset, buffer in enumerate(buffers)])
    assert is_filled(new)
    assert await new.run() == [1] * 21
    assert b"".join(buffers) == bytes(range(21))
    assert statistics().peak <= 2


async def test_an_fd_that_is_closed_meanwhile(bench: Bench) -> None:
    """Before it begins, and in flight."""
    for early in (True, False):
        pipes = [bench.pipe() for _ in range(2)]
        buffers = [bytearray(1) for _ in pipes]
        new = batch()
        new.extend(lowlevel.read, [(read_end, buffer) for (read_end, _), buffer in zip(pipes, buffers, strict=True)])
        assert is_filled(new)
        async with trio.open_nursery() as nursery:
            if early:
                others = batch()
                others.extend(lowlevel.read, [(read_end, bytearray(1)) for read_end, _ in pipes])
            attempt = await parked(nursery, new.run)
            lowlevel.notify_closing(pipes[0][0])
            os.write(pipes[1][1], b"y")
            first, second = await attempt.result()
            assert isinstance(first, trio.ClosedResourceError)
            assert second == 1


@pytest.mark.ring(max_in_flight=8)
async def test_an_fd_that_is_closed_before_its_part_begins(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    late, fill = bench.pipe()
    buffers = [bytearray(1) for _ in range(3)]
    new = batch()
    new.extend(lowlevel.read, [(read_end, buffers[0]), (read_end, buffers[1]), (late, buffers[2])])
    assert is_filled(new)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, new.run)
        lowlevel.notify_closing(late)
        os.write(fill, b"not to be read")
        os.write(write_end, b"xy")
        *good, closed = await attempt.result()
    assert good == [1, 1]
    assert isinstance(closed, trio.ClosedResourceError)
    assert os.read(late, 100) == b"not to be read"


def test_a_run_that_crashes(mount: Mount, bench: Bench) -> None:
    """The memory is the kernel's until it is done."""
    read_end, write_end = bench.pipe()
    buffers = [bytearray(1) for _ in range(3)]

    async def main() -> None:
        new = batch()
        new.extend(lowlevel.read, [(read_end, buffer) for buffer in buffers])
        async with trio.open_nursery() as nursery:
            await parked(nursery, new.run)
            await crash()

    run_to_a_crash(mount, main)
    os.write(write_end, b"xyz")
    assert b"".join(buffers) == bytes(3)
    assert not any(map(pinned, buffers))


async def test_what_the_kernel_lacks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import manager

    monkeypatch.setattr(manager(), "_missing", frozenset({TABLE["read"].opcode}))
    buffer = bytearray(1)
    new = batch()
    new.extend(lowlevel.read, [(bench.file(b"x"), buffer)])
    assert is_filled(new)
    async with nothing_submitted():
        with no_garbage_collection(), pytest.raises(UnsupportedOperation, match="read") as caught:
            await new.run()
    del caught
    assert not pinned(buffer)


# Chains that are all alike


def missing(bench: Bench, name: str = "missing") -> bytes:
    return os.fsencode(bench.directory / name)


def small_files(bench: Bench, n: int) -> list[bytes]:
    return [os.fsencode(bench.path(b"%d" % number)) for number in range(n)]


def open_and_read(paths: list[Any], buffers: list[bytearray]) -> Chains:
    new = chains()
    file = new.direct(lowlevel.openat, [(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths])
    new.add(lowlevel.read, [(file, buffer, 0) for buffer in buffers])
    return new


def is_broken(write_end: int) -> bool:
    """Nobody has the pipe open for reading."""
    try:
        os.write(write_end, b"x")
    except BrokenPipeError:
        return True
    return False


@pytest.mark.parametrize("n", [1, 40])
async def test_alike(bench: Bench, n: int) -> None:
    paths = small_files(bench, n)
    buffers = [bytearray(9) for _ in paths]
    new = open_and_read(paths, buffers)
    assert is_filled(new)
    await lowlevel.nop()
    before = statistics()
    opened, counts = await new.run()
    after = statistics()
    assert opened == [None] * n
    assert [bytes(buffer[:count]) for buffer, count in zip(buffers, counts, strict=True)] == [
        b"%d" % i for i in range(n)
    ]
    assert (after.sqes - before.sqes, after.submits - before.submits) == (2 * n, 1)
    assert not any(map(pinned, buffers))


async def test_steps_that_c_does_not_know(bench: Bench) -> None:
    """They are as good: a hard link, a close, a path-like path, an fd behind the first step."""
    paths = [Path(os.fsdecode(path)) for path in small_files(bench, 5)]
    log = bench.file()
    buffers = [bytearray(9) for _ in paths]
    new = chains()
    file = new.direct(lowlevel.openat, [(path, os.O_RDONLY) for path in paths])
    assert not is_filled(new)
    new.add_hard(lowlevel.read, [(file, buffer, 0) for buffer in buffers])
    assert is_filled(new)
    new.add(lowlevel.close, [(file,)] * 5)
    new.add(lowlevel.write, [(log, b"x", number) for number in range(5)])
    assert not is_filled(new)
    assert await new.run() == [[None] * 5, [1] * 5, [None] * 5, [1] * 5]
    assert os.pread(log, 9, 0) == b"xxxxx"
    assert not any(map(pinned, buffers))


async def test_two_files_in_a_chain(bench: Bench) -> None:
    """Each step has the file of its own chain."""
    paths = small_files(bench, 6)
    buffers = [[bytearray(9) for _ in paths] for _ in range(2)]
    new = chains()
    first = new.direct(lowlevel.openat, [(path, os.O_RDONLY) for path in paths])
    second = new.direct(lowlevel.openat, [(path, os.O_RDONLY) for path in reversed(paths)])
    new.add_hard(lowlevel.read, [(first, buffer) for buffer in buffers[0]])
    new.add_hard(lowlevel.read, [(second, buffer) for buffer in buffers[1]])
    new.add_hard(lowlevel.read, [(first, bytearray(1)) for _ in paths])
    assert all(isinstance(step, Column) for step in new._steps)
    assert await new.run() == [[None] * 6, [None] * 6, [1] * 6, [1] * 6, [0] * 6]
    assert b"".join(buffer[:1] for buffer in buffers[0]) == b"012345"
    assert b"".join(buffer[:1] for buffer in buffers[1]) == b"543210"


async def test_a_broken_chain_leaves_the_others_alone(bench: Bench) -> None:
    paths = small_files(bench, 4)
    os.unlink(paths[2])
    buffers = [bytearray(9) for _ in paths]
    new = open_and_read(paths, buffers)
    opened, counts = await new.run()
    assert errnos(opened) == [None, None, errno.ENOENT, None]
    assert opened[2].filename == paths[2]
    assert errnos(counts) == [1, 1, errno.ECANCELED, 1]
    assert isinstance(counts[2], ChainBrokenError)
    assert counts[2].step == 4, "its place in the batch"


async def test_soft_and_hard_links(bench: Bench) -> None:
    """A short read breaks the chain where the link is a soft one."""
    (path,) = small_files(bench, 1)
    log = missing(bench, "log")
    for hard in (False, True):
        new = chains()
        file = new.direct(lowlevel.openat, [(path, os.O_RDONLY)])
        (new.add_hard if hard else new.add)(lowlevel.read, [(file, bytearray(9))])
        new.add(lowlevel.openat, [(log, os.O_CREAT | os.O_WRONLY)])
        assert all(isinstance(step, Column) for step in new._steps)
        _, _, (fd,) = await new.run()
        assert isinstance(fd, int) is hard
        if hard:
            os.close(fd)


async def test_a_hard_link_behind_a_close(bench: Bench) -> None:
    """A step that takes nothing but the file opens none."""
    (path,) = small_files(bench, 1)
    for hard in (False, True):
        new = chains()
        file = new.direct(lowlevel.openat, [(path, os.O_RDONLY)])
        new.add(lowlevel.close, [(file,)])
        (new.add_hard if hard else new.add)(lowlevel.close, [(file,)])
        new.add(lowlevel.nop, [()])
        _, closed, again, (last,) = await new.run()
        assert errnos(closed + again) == [None, errno.EBADF]
        assert isinstance(last, ChainBrokenError) is not hard


@pytest.mark.ring(max_in_flight=24)
async def test_alike_in_parts(bench: Bench) -> None:
    """The files and buffers of each part are its own; errors, too."""
    paths = small_files(bench, 20)
    os.unlink(paths[7])
    buffers = [bytearray(9) for _ in paths]
    new = open_and_read(paths, buffers)
    assert is_filled(new)
    opened, counts = await new.run()
    assert [error.filename for error in opened if error is not None] == [paths[7]]
    assert errnos(counts) == [1] * 7 + [errno.ECANCELED] + [1] * 2 + [2] * 10
    assert [bytes(buffer.rstrip(b"\0")) for buffer in buffers] == [b"%d" % i if i != 7 else b"" for i in range(20)]
    assert statistics().peak <= 6


@pytest.mark.ring(entries=2)
async def test_alike_but_too_long(bench: Bench) -> None:
    buffer = bytearray(9)
    new = chains()
    file = new.direct(lowlevel.openat, [(missing(bench), os.O_CREAT | os.O_RDWR)])
    for _ in range(2):
        new.add_hard(lowlevel.read, [(file, buffer)])
    async with nothing_submitted():
        with no_garbage_collection(), pytest.raises(ValueError, match="at most 2 steps") as caught:
            await new.run()
    del caught
    assert not pinned(buffer)


async def test_files_of_chains_are_closed(bench: Bench) -> None:
    """However they end."""
    ends = [bench.pipe() for _ in range(3)]
    names = [f"/proc/self/fd/{read_end}" for read_end, _ in ends]
    new = chains()
    file = new.direct(lowlevel.openat, [(name, os.O_RDONLY) for name in names])
    new.add(lowlevel.read, [(file, bytearray(1)) for _ in names])
    assert is_filled(new)
    async with trio.open_nursery() as nursery:
        before = statistics().cqes
        attempt = await parked(nursery, new.run)
        while statistics().cqes < before + 3:  # a worker of the kernel opens them
            await trio.lowlevel.checkpoint()
        for read_end, _ in ends:
            os.close(read_end)
        assert not await attempt.cancel()
    opened, counts = attempt.value
    assert opened == [None] * 3, "done, so not lost"
    assert errnos(counts) == [errno.ECANCELED] * 3
    for read_end, write_end in ends:
        bench.closed(read_end)
        spin_until(partial(is_broken, write_end))


async def test_bad_steps(bench: Bench) -> None:
    buffers = [bytearray(1) for _ in range(2)]
    path = missing(bench)
    fd = bench.file(b"x")
    new, other = chains(), chains()
    foreign = other.direct(lowlevel.openat, [(path, os.O_RDONLY)] * 2)
    with pytest.raises(TypeError, match="not an operation"):
        new.add(print, [()])  # type: ignore[arg-type]
    with no_garbage_collection(), pytest.raises(TypeError, match="read cannot open") as caught:
        new.direct(lowlevel.read, [(fd, buffer) for buffer in buffers])
    del caught
    file = new.direct(lowlevel.openat, [(path, os.O_RDONLY)] * 2)
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"arguments for {n} chains, but there are 2"):
            new.add(lowlevel.nop, [()] * n)
    with no_garbage_collection(), pytest.raises(ValueError, match="names an fd by its number"):
        new.add(lowlevel.close, [(fd,)] * 2)
    with no_garbage_collection(), pytest.raises(TypeError) as caught:
        new.add(lowlevel.read, [(file, buffers[0]), (file, "x")])
    del caught
    assert not any(map(pinned, buffers))
    new.add(lowlevel.read, [(foreign, buffer) for buffer in buffers])
    with no_garbage_collection(), pytest.raises(ValueError, match="belongs to another batch") as caught2:
        await new.run()
    del caught2
    assert not any(map(pinned, buffers))


async def test_chains_that_have_been_run(bench: Bench) -> None:
    buffer = bytearray(9)
    new = open_and_read(small_files(bench, 1), [buffer])
    await new.run()
    with no_garbage_collection(), pytest.raises(RuntimeError, match="have been run"):
        new.add(lowlevel.read, [(bench.file(), buffer)])
    with pytest.raises(RuntimeError, match="has been run"):
        await new.run()


async def test_chains_in_another_run(bench: Bench) -> None:
    """It does not take them; they are still good in their own."""
    buffer = bytearray(9)
    new = open_and_read(small_files(bench, 1), [buffer])

    async def other() -> None:
        with pytest.raises(RuntimeError, match="in the trio run that made it"):
            await new.run()

    await trio.to_thread.run_sync(partial(run, other))
    assert await new.run() == [[None], [1]]


async def test_no_chains() -> None:
    assert await chains().run() == []
    new = chains()
    file = new.direct(lowlevel.openat, [])
    new.add(lowlevel.read, [])
    assert await new.run() == [[], []]
    assert "DirectFile" in repr(file)


async def test_many_files(bench: Bench) -> None:
    """More than there are places in the ring's table."""
    (path,) = small_files(bench, 1)
    buffers = [bytearray(1) for _ in range(3000)]
    new = open_and_read([path] * 3000, buffers)
    assert is_filled(new)
    opened, counts = await new.run()
    assert (opened, counts) == ([None] * 3000, [1] * 3000)
    assert b"".join(buffers) == b"0" * 3000
