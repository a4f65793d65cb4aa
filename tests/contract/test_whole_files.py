"""Whole files: what the standard library does with them, without its threads, and nothing lost or left behind."""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import (
    Attempt,
    crash,
    in_child,
    in_kernel_worker,
    interrupted_at_line,
    nothing_submitted,
    parked,
    run_native,
    run_to_a_crash,
    run_without_ring,
    spin_until,
)
from tests.unit.by_hand import pinned
from trio_uring import (
    UnavailableError,
    UnsupportedOperation,
    _file_ops,
    _page_cache,
    _whole_files,
    copy_file,
    lowlevel,
    read_file,
    read_files,
    send_file,
    statistics,
    write_file,
)
from trio_uring._page_cache import GUESS, read_cached
from trio_uring._whole_files import PIECE, PIPE_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from trio.lowlevel import Task

    from tests.helpers import Bench, Mount

GIB = 1 << 30
MIB = 1 << 20


def content_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def mount(*args: str) -> None:
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The directory of a file system of 1 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "none", os.fspath(directory))
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


class EachStep(trio.abc.Instrument):
    """Calls ``action`` after every step of ``task``."""

    def __init__(self, task: Task, action: Callable[[], object]) -> None:
        self._task = task
        self._action = action

    def after_task_step(self, task: Task) -> None:
        if task is self._task:
            self._action()


async def count_ticks(async_fn: Callable[..., Awaitable[object]], *args: object) -> int:
    """How many ticks a call may take, at the most, until it is done."""
    ticks = 0
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, async_fn, *args)
        while not attempt.done:
            await trio.lowlevel.checkpoint()
            ticks += 1
    return ticks


async def cancelled_after(ticks: int, async_fn: Callable[..., Awaitable[object]], *args: object) -> Attempt[Any]:
    async with trio.open_nursery() as nursery:
        attempt: Attempt[Any] = Attempt(nursery, async_fn, *args)
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        attempt.scope.cancel()
        await attempt.settled()
    if attempt.error is not None:
        raise attempt.error
    assert statistics().in_flight == 0
    return attempt


async def same_error(expected: Callable[[], object], call: Callable[[], Awaitable[object]]) -> None:
    """Both raise the same, and the same file is named."""
    with pytest.raises(OSError) as theirs:  # noqa: PT011
        expected()
    with pytest.raises(OSError) as ours:  # noqa: PT011
        await call()
    assert type(ours.value) is type(theirs.value)
    assert ours.value.errno == theirs.value.errno
    assert (ours.value.filename, ours.value.filename2) == (theirs.value.filename, theirs.value.filename2)


# Reading


@pytest.mark.parametrize("size", [0, 1, GUESS - 1, GUESS, GUESS + 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 77])
@pytest.mark.parametrize("as_argument", [str, os.fsencode, Path])
async def test_reading(bench: Bench, size: int, as_argument: Callable[[Path], Any]) -> None:
    content = content_of(size)
    found = await read_file(as_argument(bench.path(content)))
    assert type(found) is bytes
    assert found == content


async def test_a_small_cached_file_takes_one_wake_up(bench: Bench) -> None:
    path = bench.path(b"hello")
    await read_file(path)
    before = statistics().sqes
    assert await read_file(path) == b"hello"
    assert statistics().sqes - before == 1


@pytest.mark.parametrize("size", [10, GUESS, 3 * MIB])
async def test_reading_what_is_not_in_the_cache(bench: Bench, size: int) -> None:
    content = content_of(size)
    path = bench.path(content)
    fd = bench.keep(os.open(path, os.O_RDONLY))
    os.fsync(fd)
    for _ in range(3):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert await read_file(path) == content


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE, 5 * mmap.PAGESIZE, 5 * mmap.PAGESIZE + 1])
def test_what_the_cache_has_is_all_or_nothing(tmp_path: Path, size: int) -> None:
    """Whichever pages it has: a part is never taken for the whole file."""
    path, content = tmp_path / "file", content_of(size)
    path.write_bytes(content)
    pages = range(0, size, mmap.PAGESIZE)
    with open(path, "rb", 0) as file:
        fd = file.fileno()
        os.fsync(fd)
        for cached in itertools.product((False, True), repeat=len(pages)):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
            for page in itertools.compress(pages, cached):
                os.pread(fd, 1, page)
            for offset in {0, size // 2, size}:
                assert read_cached(fd, offset)[0] in (None, content[offset:])


@pytest.mark.parametrize("size", [0, 10, GUESS, GUESS + 1, PIECE + 1])
async def test_reading_where_no_read_can_refuse_to_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(_page_cache, "_RWF_NOWAIT", 0)
    content = content_of(size)
    path = bench.path(content)
    assert await read_file(path) == content
    assert [found async for found in read_files([path] * 3)] == [(path, content)] * 3


async def test_reading_from_memory_file_systems(small_disk: Path) -> None:
    for size in (0, 1, GUESS + 1):
        path = small_disk / f"{size}"
        path.write_bytes(content_of(size))
        assert await read_file(path) == content_of(size)
        assert await anext(read_files([path])) == (path, content_of(size))


@pytest.fixture
def large_proc_file() -> Iterator[str]:
    """More than `GUESS` bytes, that do not change, in a file without a size."""
    with subprocess.Popen(
        ["/bin/cat", "-", "x" * (GUESS + 5000)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as cat:
        path = f"/proc/{cat.pid}/cmdline"
        spin_until(lambda: Path(path).read_bytes())
        yield path


async def test_reading_what_has_no_size(large_proc_file: str) -> None:
    for path in (large_proc_file, "/proc/self/limits", "/proc/filesystems"):
        content = Path(path).read_bytes()
        assert os.path.getsize(path) == 0
        assert len(await read_file(path)) == len(content)
        assert [len(found) async for _, found in read_files([path])] == [len(content)]  # type: ignore[arg-type]


async def test_reading_what_is_shorter_than_its_size() -> None:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(path):
        pytest.skip("there is no such file here")
    assert os.path.getsize(path) > len(Path(path).read_bytes())
    assert await read_file(path) == Path(path).read_bytes()


async def test_reading_a_fifo(bench: Bench) -> None:
    """It is waited for until somebody writes, and read until nobody does."""
    path = bench.fifo()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, read_file, path)
        with open(path, "wb", 0) as fifo:
            fifo.write(b"hello")
            await trio.testing.wait_all_tasks_blocked()
            fifo.write(b", world")
        assert await attempt.result() == b"hello, world"
        attempt = await parked(nursery, read_file, path)
        os.close(os.open(path, os.O_WRONLY))
        assert await attempt.result() == b""
        attempt = await parked(nursery, read_file, path)
        assert await attempt.cancel()
        await write_with(path, content_of(3 * MIB), nursery)
        assert await read_file(path) == content_of(3 * MIB)


async def write_with(path: Path, content: bytes, nursery: trio.Nursery) -> None:
    nursery.start_soon(write_file, path, content)


async def test_reading_fails_as_open_does(bench: Bench) -> None:
    loop = bench.directory / "loop"
    loop.symlink_to(loop)
    for path in (bench.directory / "missing", bench.directory, bench.path() / "below", loop, "x" * 300):
        await same_error(Path(path).read_bytes, partial(read_file, path))
    with pytest.raises(ValueError, match="null byte"):
        await read_file("a\0b")
    with pytest.raises(TypeError):
        await read_file(3)  # type: ignore[arg-type]


async def test_a_read_error_names_the_file() -> None:
    """Its first page is not mapped."""
    with pytest.raises(OSError, match="/proc/self/mem") as caught:
        await read_file("/proc/self/mem")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("change", ["replaced", "removed", "grown", "shrunk"])
async def test_a_file_that_changes_while_it_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(_whole_files, "PIECE", GUESS)
    old, new = content_of(10 * GUESS), content_of(11 * GUESS)
    path, other = bench.path(old), bench.path(new)
    pieces = 0

    def act() -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 5:
            if change == "replaced":
                os.replace(other, path)
            elif change == "removed":
                os.unlink(path)
            elif change == "grown":
                with path.open("ab") as file:
                    file.write(b"more")
            else:
                os.truncate(path, 8 * GUESS)

    instrument = EachStep(trio.lowlevel.current_task(), act)
    trio.lowlevel.add_instrument(instrument)
    found = await read_file(path)
    trio.lowlevel.remove_instrument(instrument)
    assert pieces > 8
    assert found == {"grown": old + b"more", "shrunk": old[: 8 * GUESS]}.get(change, old)


def test_more_than_2_gib(bench: Bench) -> None:
    path = bench.path()
    with path.open("wb") as file:
        file.seek(2 * GIB + 5)
        file.write(b"end")

    async def main() -> None:
        content = await read_file(path)
        assert len(content) == 2 * GIB + 8
        assert content[-4:] == b"\0end"
        assert not any(content[:: MIB + 1])

    run_native(main)


# Writing


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 77])
async def test_writing(bench: Bench, size: int, atomic: bool) -> None:
    path, content = bench.path(b"something longer than nothing"), content_of(size)
    assert await write_file(path, content, atomic=atomic, sync=True) == size
    assert path.read_bytes() == content
    new = bench.directory / "new"
    assert await write_file(os.fsencode(new), bytearray(content), atomic=atomic) == size
    assert new.read_bytes() == content
    assert names_in(bench.directory) == sorted([path.name, "new"])


@pytest.mark.parametrize("atomic", [False, True])
async def test_any_buffer_can_be_written(bench: Bench, atomic: bool) -> None:
    path = bench.path(b"old")
    for data in (array.array("i", [1, 2]), memoryview(bytes(range(6))).cast("B", (2, 3)), array.array("d"), b""):
        assert await write_file(path, data, atomic=atomic) == memoryview(data).nbytes
        assert path.read_bytes() == bytes(data)
    path.write_bytes(b"old")
    for nothing in ("text", memoryview(b"abcdef")[::2], 3):
        with pytest.raises(TypeError):
            await write_file(path, nothing, atomic=atomic)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    buffer = bytearray(5)
    await write_file(path, buffer, atomic=atomic)
    assert not pinned(buffer)


async def test_writing_fails_as_open_does(bench: Bench) -> None:
    loop = bench.directory / "loop"
    loop.symlink_to(loop)
    names = names_in(bench.directory)
    missing = bench.directory / "missing"
    for atomic in (False, True):
        for path in (bench.directory, f"{missing}/", missing / "x", bench.directory / "loop", "x" * 300, ""):

            def write(path: Any = path) -> None:
                with open(path, "wb") as file:
                    file.write(b"x")

            async def write_here(path: Any = path, atomic: bool = atomic) -> None:
                await write_file(path, b"x", atomic=atomic)

            await same_error(write, write_here)
    assert names_in(bench.directory) == names


async def test_writing_to_a_fifo_waits_for_a_reader(bench: Bench) -> None:
    path = bench.fifo()
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, write_file, path, b"hello")
        assert await attempt.cancel()
        attempt = await parked(nursery, write_file, path, b"hello")
        assert await read_file(path) == b"hello"
        assert await attempt.result() == 5


async def test_a_device_is_written_but_not_replaced() -> None:
    assert await write_file("/dev/null", b"x") == 1
    for path, code in (("/dev/null", errno.EINVAL), ("/dev/full", errno.EINVAL)):
        with pytest.raises(OSError, match="regular") as caught:
            await write_file(path, b"x", atomic=True)
        assert (caught.value.errno, caught.value.filename) == (code, path)
        assert stat.S_ISCHR(os.stat(path).st_mode)
    with pytest.raises(OSError, match="/dev/full") as caught:
        await write_file("/dev/full", b"x")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("atomic", [False, True])
async def test_permissions(bench: Bench, atomic: bool) -> None:
    before = os.umask(0o022)
    try:
        for mode in (0o600, 0o664, 0o444, 0o755):
            path = bench.path(b"old")
            path.chmod(mode)
            await write_file(path, b"new", atomic=atomic)
            assert stat.S_IMODE(path.stat().st_mode) == mode
        new = bench.directory / "new"
        await write_file(new, b"new", atomic=atomic)
        assert stat.S_IMODE(new.stat().st_mode) == 0o644
    finally:
        os.umask(before)


async def test_the_owner_stays(bench: Bench) -> None:
    path = bench.path(b"old")
    try:
        os.chown(path, 12345, 23456)
    except PermissionError:
        pytest.skip("only root can give files away")
    await write_file(path, b"new", atomic=True)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("atomic", [False, True])
async def test_symbolic_links_are_followed(bench: Bench, atomic: bool) -> None:
    below = bench.directory / "below"
    below.mkdir()
    target = below / "target"
    (below / "link").symlink_to("target")
    link = bench.directory / "link"
    link.symlink_to("below/link")
    for content in (b"new", b"newer"):  # first it does not exist
        await write_file(link, content, atomic=atomic)
        assert link.is_symlink()
        assert (below / "link").is_symlink()
        assert target.read_bytes() == content
    assert names_in(below) == ["link", "target"]


async def test_a_relative_path(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.directory)
    await write_file("x", b"x", atomic=True)
    assert await read_file("x") == b"x"


async def test_the_old_content_stays_readable(bench: Bench) -> None:
    path = bench.path(b"old")
    with path.open("rb") as reader:
        await write_file(path, b"new", atomic=True)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


async def test_what_is_atomic_is_synced_before_it_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data before the renaming, the directory behind it."""
    calls: list[tuple[str, bool]] = []
    for name in ("fsync", "renameat2"):
        real = getattr(lowlevel, name)

        async def spy(fd: Any, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> None:
            calls.append((name, isinstance(fd, int) and stat.S_ISDIR(os.fstat(fd).st_mode)))
            await real(fd, *args, **kwargs)

        monkeypatch.setattr(_whole_files, name, spy)
    await write_file(bench.path(b"old"), b"new", atomic=True)
    assert calls == [("fsync", False), ("renameat2", False), ("fsync", True)]
    calls.clear()
    await write_file(bench.path(), b"new", sync=True)
    await write_file(bench.path(), b"new")
    assert calls == [("fsync", False)]


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_full_disk(small_disk: Path, atomic: bool) -> None:
    path = small_disk / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space") as caught:
        await write_file(path, bytes(2 * MIB), atomic=atomic)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, os.fspath(path))
    assert names_in(small_disk) == ["file"]
    if atomic:
        assert path.read_bytes() == b"old"
    else:
        assert not any(path.read_bytes())
    await write_file(path, b"new", atomic=atomic)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_read_only_file_system(small_disk: Path, atomic: bool) -> None:
    path = small_disk / "file"
    path.write_bytes(b"old")
    mount("-o", "remount,ro", os.fspath(small_disk))
    await same_error(lambda: path.write_bytes(b"new"), lambda: write_file(path, b"new", atomic=atomic))
    assert path.read_bytes() == b"old"


def test_a_directory_without_the_right_to_write(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = bench.path(b"old")
    path.chmod(0o666)
    bench.directory.chmod(0o555)

    def as_nobody() -> tuple[str, int | None, object]:
        if os.getuid() == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        os.chdir(bench.directory)

        async def main() -> tuple[str, int | None, object]:
            try:
                await write_file(path.name, b"new", atomic=True)
            except OSError as exc:
                return type(exc).__name__, exc.errno, exc.filename
            return "", 0, None

        return run_native(main)

    directories = [*bench.directory.parents][:-1]
    modes = {directory: stat.S_IMODE(directory.stat().st_mode) for directory in directories}
    try:
        for directory, mode in modes.items():
            if mode & 0o005 != 0o005:
                directory.chmod(mode | 0o005)
        assert in_child(as_nobody) == ("PermissionError", errno.EACCES, path.name)
    finally:
        for directory, mode in modes.items():
            if mode & 0o005 != 0o005:
                directory.chmod(mode)
        bench.directory.chmod(0o755)
    assert path.read_bytes() == b"old"
    assert names_in(bench.directory) == [path.name]


REWRITING = """
import itertools, sys, trio_uring

async def main():
    for n in itertools.count():
        await trio_uring.write_file(sys.argv[1], bytes([n % 256]) * (1 << 20), atomic=True)
        print(n, flush=True)

trio_uring.run(main)
"""


@pytest.mark.seconds(90)
def test_a_killed_process_leaves_one_content_or_the_other(bench: Bench) -> None:
    path = bench.path(bytes(MIB))
    sizes = random.Random(5)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", REWRITING, os.fspath(path)], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            for _ in range(sizes.randrange(1, 4)):
                assert process.stdout.readline()
            for _ in range(sizes.randrange(100_000)):  # to be at another point of the next one
                pass
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content == content[:1] * MIB
    for name in names_in(bench.directory):
        assert name == path.name or (name.startswith(".write-") and name.endswith(".tmp"))
    assert run_native(write_file, path, b"new") == 3


KILLED_AT_A_LINE = """
import os, signal, sys, trio_uring

path, left = sys.argv[1], int(sys.argv[2])

def trace(frame, event, argument):
    global left
    if "/trio_uring/" not in frame.f_code.co_filename:
        return None
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

async def main():
    sys.settrace(trace)
    await trio_uring.write_file(path, b"new" * 1000, atomic=True)
    sys.settrace(None)

trio_uring.run(main)
"""


@pytest.mark.seconds(90)
def test_killed_at_any_line_it_leaves_one_content_or_the_other(bench: Bench) -> None:
    """Between any two steps, that is."""
    path = bench.path(b"old")
    line, status, contents = 1, -signal.SIGKILL, []
    while status == -signal.SIGKILL:
        command = [sys.executable, "-c", KILLED_AT_A_LINE, os.fspath(path), str(line)]
        status = subprocess.run(command, check=False).returncode
        contents.append(path.read_bytes())
        assert contents[-1] in (b"old", b"new" * 1000)
        path.write_bytes(b"old")
        line += 31
    assert status == 0
    assert contents.count(b"old") > 10
    assert contents.count(b"new" * 1000) > 1, "it was never killed behind the renaming"


# Copying


def matches(path: Path, content: bytes) -> bool:
    return path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, PIPE_SIZE - 1, PIPE_SIZE, PIPE_SIZE + 1, 9 * PIPE_SIZE + 77])
async def test_copying(bench: Bench, size: int) -> None:
    content = content_of(size)
    src, dst, new = bench.path(content), bench.path(b"something longer" * 10), bench.directory / "new"
    dst.chmod(0o600)
    src.chmod(0o755)
    reports: list[tuple[int, int]] = []
    assert await copy_file(src, dst, progress=lambda *report: reports.append(report)) == size
    assert await copy_file(os.fsencode(src), os.fspath(new)) == size
    assert matches(dst, content)
    assert matches(new, content)
    assert stat.S_IMODE(dst.stat().st_mode) == 0o600
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask()
    assert reports[0] == (0, size)
    assert reports[-1] == (size, size)
    assert reports == sorted(reports)
    assert len(reports) == 1 + -(-size // PIPE_SIZE)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


async def test_holes_stay_holes(bench: Bench) -> None:
    src, dst = bench.path(), bench.directory / "dst"
    with src.open("wb") as file:
        for at in (40 * MIB, 80 * MIB):
            file.seek(at)
            file.write(content_of(70_000))
        file.truncate(120 * MIB)
    if src.stat().st_blocks * 512 > MIB:
        pytest.skip("this file system knows no holes")
    reports: list[tuple[int, int]] = []
    assert await copy_file(src, dst, progress=lambda *report: reports.append(report)) == 120 * MIB
    assert matches(dst, src.read_bytes())
    assert dst.stat().st_blocks * 512 <= MIB
    assert reports[-1] == (120 * MIB, 120 * MIB)
    assert reports == sorted(reports)


async def test_only_a_hole(bench: Bench) -> None:
    src, dst = bench.path(), bench.directory / "dst"
    os.truncate(src, 5 * MIB)
    assert await copy_file(src, dst) == 5 * MIB
    assert matches(dst, bytes(5 * MIB))


async def test_no_holes_are_made_in_a_device(bench: Bench) -> None:
    """Nor is its size set."""
    src = bench.path()
    os.truncate(src, 5 * MIB)
    assert await copy_file(src, "/dev/null") == 5 * MIB
    assert await copy_file("/dev/null", bench.path(b"old")) == 0


async def test_copying_what_has_no_size(bench: Bench, large_proc_file: str) -> None:
    dst = bench.path(b"old")
    reports: list[tuple[int, int]] = []
    for path in ("/proc/filesystems", large_proc_file):
        size = await copy_file(path, dst, progress=lambda *report: reports.append(report))
        assert size == len(dst.read_bytes()) == len(Path(path).read_bytes())
        assert reports[-1] == (size, size)


async def test_copying_where_nothing_can_be_spliced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(_whole_files._Copy, "_copy_pieces", refuse)
    src, dst = bench.path(content_of(3 * MIB)), bench.path()
    os.truncate(src, 20 * MIB)  # it has looked for holes by then
    reports: list[tuple[int, int]] = []
    assert await copy_file(src, dst, progress=lambda *report: reports.append(report)) == 20 * MIB
    assert matches(dst, src.read_bytes())
    assert reports[-1] == (20 * MIB, 20 * MIB)


@pytest.mark.ring(entries=4)
async def test_copying_with_a_small_ring(bench: Bench) -> None:
    """It has no room for the chain."""
    src, dst = bench.path(content_of(3 * MIB)), bench.path()
    assert await copy_file(src, dst) == 3 * MIB
    assert matches(dst, src.read_bytes())


async def test_the_pipe_is_small(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, argument: int) -> None:
        assert command == fcntl.F_SETPIPE_SZ
        raise PermissionError

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    content = content_of(3 * MIB)
    dst = bench.path()
    assert await copy_file(bench.path(content), dst) == 3 * MIB
    assert matches(dst, content)


async def test_a_source_that_is_cut_short(bench: Bench) -> None:
    content = content_of(20 * MIB)
    src, dst = bench.path(content), bench.path()

    def progress(done: int, total: int) -> None:
        os.truncate(src, 5 * MIB + 7)

    assert await copy_file(src, dst, progress=progress) == 5 * MIB + 7
    assert matches(dst, content[: 5 * MIB + 7])


async def test_before_linux_6_9(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ftruncate(fd: int, length: int) -> None:
        raise UnsupportedOperation

    monkeypatch.setattr(_whole_files, "ftruncate", ftruncate)
    src, dst = bench.path(), bench.directory / "dst"
    os.truncate(src, 5 * MIB)
    assert await copy_file(src, dst) == 5 * MIB
    assert dst.stat().st_size == 5 * MIB


async def test_copying_fails_as_shutil_does(bench: Bench) -> None:
    path, other, missing = bench.path(b"x"), bench.path(b"y"), bench.directory / "missing"
    hard, soft, fifo = bench.directory / "hard", bench.directory / "soft", bench.fifo()
    os.link(path, hard)
    soft.symlink_to(path)
    for src, dst in (
        (missing, other),
        (path, missing / "x"),
        (path, bench.directory),
        (bench.directory, other),
        (path, path),
        (path, hard),
        (soft, path),
        (path, soft),
        (fifo, other),
        (path, fifo),
    ):
        await same_error(partial(shutil.copyfile, src, dst), partial(copy_file, src, dst))
    assert (path.read_bytes(), other.read_bytes()) == (b"x", b"y")
    with pytest.raises(shutil.SameFileError, match="same file"):
        await copy_file(path, soft)


async def test_copying_to_a_full_disk(bench: Bench, small_disk: Path) -> None:
    src, dst = bench.path(bytes(20 * MIB)), small_disk / "dst"
    with pytest.raises(OSError, match="No space") as caught:
        await copy_file(src, dst)
    assert caught.value.errno == errno.ENOSPC
    assert (caught.value.filename, caught.value.filename2) == (os.fspath(src), os.fspath(dst))


async def test_an_error_in_progress_ends_the_copy(bench: Bench) -> None:
    def progress(done: int, total: int) -> None:
        if done:
            raise KeyError(done)

    for size in (1, 20 * MIB):
        with pytest.raises(KeyError):
            await copy_file(bench.path(bytes(size)), bench.path(), progress=progress)


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_blocks_are_shared_where_they_can_be(tmp_path: Path, kind: str) -> None:
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"there is no mkfs.{kind} here")
    image, directory = tmp_path / "image", tmp_path / "mounted"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run([f"mkfs.{kind}", image], check=True, capture_output=True)
    mount("-o", "loop", os.fspath(image), os.fspath(directory))
    try:
        content = content_of(200 * MIB + 5)
        src, dst = directory / "src", directory / "dst"
        src.write_bytes(content)
        reports: list[tuple[int, int]] = []

        async def main() -> None:
            assert await copy_file(src, dst, progress=lambda *report: reports.append(report)) == len(content)
            assert await copy_file(src, directory / "another") == len(content)  # there is no room for it

        run_native(main)
        assert matches(dst, content)
        assert reports[0] == (0, len(content))
        assert reports[-1] == (len(content), len(content))
        assert len(reports) == 1 + -(-len(content) // _whole_files.CLONE)
    finally:
        subprocess.run(["umount", directory], check=True)


# Reading many


async def read_all(paths: list[Any], **options: int) -> list[tuple[Any, bytes | OSError]]:
    return [found async for found in read_files(paths, **options)]


@pytest.mark.parametrize("concurrency", [1, 7, 64, 1000])
async def test_reading_many(bench: Bench, concurrency: int) -> None:
    contents = [content_of(n * 601) for n in range(300)]
    paths = [bench.path(content) for content in contents]
    assert await read_all(paths, concurrency=concurrency) == list(zip(paths, contents, strict=True))


async def test_no_files() -> None:
    async with nothing_submitted():
        assert await read_all([]) == []


async def test_errors_are_in_their_places(bench: Bench) -> None:
    good, missing = bench.path(b"x"), bench.directory / "missing"
    found = await read_all([good, missing, os.fsencode(missing), bench.directory, good])
    assert [path for path, _ in found] == [good, missing, os.fsencode(missing), bench.directory, good]
    assert found[0][1] == found[4][1] == b"x"
    for (_, error), code, name in zip(
        found[1:4],
        (errno.ENOENT, errno.ENOENT, errno.EISDIR),
        (os.fspath(missing), os.fsencode(missing), os.fspath(bench.directory)),
        strict=True,
    ):
        assert isinstance(error, OSError)
        assert (error.errno, error.filename) == (code, name)


async def test_what_is_no_path_is_raised_in_its_place(bench: Bench) -> None:
    good = bench.path(b"x")
    paths: list[Any] = [good, good, "a\0b", good, 3.5, good]
    contents = read_files(paths)
    found: list[object] = []
    while True:
        try:
            found.append((await anext(contents))[1])
        except StopAsyncIteration:
            break
        except (TypeError, ValueError) as exc:
            found.append(type(exc))
    assert found == [b"x", b"x", ValueError, b"x", TypeError, b"x"]


@pytest.mark.parametrize("max_bytes", [1, 5000, 400_000, 5 * MIB])
async def test_what_is_held_is_bounded(bench: Bench, max_bytes: int) -> None:
    sizes = [0, 1, 5000, 5001, GUESS, GUESS + 1, 399_999, 400_001, 3 * MIB, 1] * 5
    paths = [bench.path(content_of(size)) for size in sizes]
    contents = read_files(paths, max_bytes=max_bytes)
    seen = 0
    async for path, found in contents:
        held = [found, *(each for _, each in contents._read)]
        assert sum(len(each) for each in held if isinstance(each, bytes)) <= max_bytes
        assert path is paths[seen]
        if sizes[seen] <= max_bytes:
            assert found == content_of(sizes[seen])
        else:
            assert isinstance(found, OSError)
            assert (found.errno, found.filename) == (errno.EFBIG, os.fspath(path))
            assert f"more than {max_bytes} bytes" in str(found)
        seen += 1
    assert seen == len(paths)


async def test_what_has_no_end_is_too_large() -> None:
    _, found = await anext(read_files(["/dev/zero"], max_bytes=MIB))
    assert isinstance(found, OSError)
    assert found.errno == errno.EFBIG


async def test_of_what_has_no_size_only_what_fits_is_held(bench: Bench, large_proc_file: str) -> None:
    large = large_proc_file
    small = bench.path(b"x")
    found = await read_all([small, large, small, large, "/proc/cpuinfo", small], max_bytes=1000)
    assert [each if isinstance(each, bytes) else each.errno for _, each in found] == [
        b"x",
        errno.EFBIG,
        b"x",
        errno.EFBIG,
        errno.EFBIG if len(Path("/proc/cpuinfo").read_bytes()) > 1000 else Path("/proc/cpuinfo").read_bytes(),
        b"x",
    ]
    size = len(Path(large).read_bytes())
    assert size > GUESS
    lengths = [len(each) for _, each in await read_all([small, large, small]) if isinstance(each, bytes)]
    assert lengths == [1, size, 1]


async def test_files_that_are_not_in_the_cache(bench: Bench) -> None:
    contents = [content_of(n * 3000) for n in range(100)]
    paths = [bench.path(content) for content in contents]
    os.sync()
    for path in paths[::2]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert [found for _, found in await read_all(paths)] == contents


async def test_a_file_that_grows_while_it_is_read(bench: Bench) -> None:
    paths = [bench.path(content_of(GUESS + 1)) for _ in range(3)]
    steps = 0

    def grow() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:  # they are open
            with paths[1].open("ab") as file:
                file.write(b"more" * 100_000)

    instrument = EachStep(trio.lowlevel.current_task(), grow)
    trio.lowlevel.add_instrument(instrument)
    found = await read_all(paths)
    trio.lowlevel.remove_instrument(instrument)
    assert [each for _, each in found] == [path.read_bytes() for path in paths]


async def test_paths_are_taken_when_they_are_needed(bench: Bench) -> None:
    path = bench.path(b"x")
    taken = 0

    def paths() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    contents = read_files(paths(), concurrency=10)
    assert taken == 0
    for _ in range(10):
        await anext(contents)
        assert taken == 10
    await anext(contents)
    assert taken == 20


async def test_one_task_at_a_time(bench: Bench) -> None:
    contents = read_files([bench.path(b"x")] * 3)
    refused = []

    def join_in() -> None:
        with pytest.raises(trio.BusyResourceError):
            contents.__anext__().send(None)
        refused.append(True)

    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, contents.__anext__, once_parked=join_in)
        assert (await attempt.result())[1] == b"x"
    assert refused
    assert len([found async for found in contents]) == 2


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_bytes": 0}])
def test_bounds_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        read_files([], **options)


async def test_a_cancelled_iteration_goes_on(bench: Bench) -> None:
    contents = [content_of(n * 3001) for n in range(80)]
    paths = [bench.path(content) for content in contents]
    found: list[bytes | OSError] = []
    iterator = read_files(paths, concurrency=16)
    ticks = 0
    while len(found) < len(paths):
        ticks = (ticks + 1) % 8
        attempt = await cancelled_after(ticks, iterator.__anext__)
        if not attempt.cancelled:
            found.append(attempt.value[1])
    assert found == contents
    with pytest.raises(StopAsyncIteration):
        await anext(iterator)


async def test_an_iteration_cancelled_while_some_files_are_not_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_file_ops, "OPENAT", in_kernel_worker(_file_ops.OPENAT))  # there the open of a FIFO waits
    path, fifo = bench.path(b"x"), bench.fifo()
    await go_on_after_a_cancel(path, fifo)


async def test_an_iteration_cancelled_while_some_files_are_not_read(bench: Bench) -> None:
    path, fifo = bench.path(content_of(GUESS + 1)), bench.fifo()
    await go_on_after_a_cancel(path, fifo)


async def go_on_after_a_cancel(path: Path, fifo: Path) -> None:
    iterator = read_files([path, fifo, path])
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, iterator.__anext__)
        while statistics().in_flight > 1:
            await trio.lowlevel.checkpoint()
        assert await attempt.cancel()
        nursery.start_soon(write_file, fifo, b"hello")
        found = [each async for each in iterator]
    assert found == [(path, path.read_bytes()), (fifo, b"hello"), (path, path.read_bytes())]


async def test_each_step_looks_for_a_cancel(bench: Bench) -> None:
    iterator = read_files([bench.path(b"x")] * 3)
    await anext(iterator)
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(iterator)
        assert scope.cancelled_caught
    assert len([found async for found in iterator]) == 2


# Sending


async def received(stream: trio.abc.ReceiveStream, content: bytearray) -> None:
    async for chunk in stream:
        content += chunk


def socket_streams(bench: Bench) -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = (trio.socket.from_stdlib_socket(sock) for sock in bench.sockets(socket.AF_INET))
    return trio.SocketStream(ours), trio.SocketStream(theirs)


def any_streams(bench: Bench) -> tuple[trio.abc.SendStream, trio.abc.ReceiveStream]:
    return trio.testing.memory_stream_one_way_pair()


@pytest.mark.parametrize("new_streams", [socket_streams, any_streams])
async def test_sending(bench: Bench, new_streams: Callable[[Bench], tuple[Any, Any]]) -> None:
    content = content_of(5 * MIB + 7)
    path, end = bench.path(content), len(content)
    ours, theirs = new_streams(bench)
    got = bytearray()
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(received, theirs, got)
        assert await send_file(path, ours) == end
        assert await send_file(os.fsencode(path), ours, 3, 10) == 10
        with path.open("rb") as file:
            file.seek(5)
            assert await send_file(file, ours, end - 3, 10) == 3
            assert await send_file(file.fileno(), ours, offset=MIB, count=2 * MIB) == 2 * MIB
            assert file.tell() == 5
        assert await send_file(path, ours, count=0) == 0
        assert await send_file(path, ours, end) == 0
        assert await send_file(path, ours, 1 << 60) == 0
        assert await send_file("/proc/cpuinfo", ours) == len(Path("/proc/cpuinfo").read_bytes())
        await ours.aclose()
    expected = content + content[3:13] + content[-3:] + content[MIB : 3 * MIB]
    assert got[: len(expected)] == expected


async def test_the_kernel_sends_to_a_socket_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.SocketStream, "send_all", None)
    ours, theirs = socket_streams(bench)
    async with ours, theirs:
        assert await send_file(bench.path(b"hello"), ours) == 5
        assert await theirs.receive_some(9) == b"hello"


async def test_sending_where_nothing_can_be_spliced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def splice(*args: object) -> int:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(_whole_files, "splice", splice)
    ours, theirs = socket_streams(bench)
    async with ours, theirs:
        assert await send_file(bench.path(b"hello"), ours) == 5
        assert await theirs.receive_some(9) == b"hello"


async def test_sending_what_cannot_be_sent(bench: Bench) -> None:
    for ours, theirs in (socket_streams(bench), any_streams(bench)):
        async with ours, theirs:
            with pytest.raises(FileNotFoundError, match="missing"):
                await send_file(bench.directory / "missing", ours)
            with pytest.raises(IsADirectoryError) as caught:
                await send_file(bench.directory, ours)
            assert caught.value.filename == os.fspath(bench.directory)
            with pytest.raises(OSError, match="seek"):
                await send_file(bench.fifo(), ours)
            for arguments in ((-1, None), (0, -1)):
                with pytest.raises(ValueError, match="negative"):
                    await send_file(bench.path(), ours, *arguments)


async def test_sending_to_a_stream_that_is_gone(bench: Bench) -> None:
    path = bench.path(bytes(20 * MIB))
    ours, theirs = socket_streams(bench)
    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, send_file, path, ours)
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await attempt.result()
    await ours.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await send_file(path, ours)
    ours, theirs = socket_streams(bench)
    async with theirs, trio.open_nursery() as nursery:
        attempt = await parked(nursery, send_file, path, ours)
        await ours.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await attempt.result()


async def test_two_senders(bench: Bench) -> None:
    path = bench.path(bytes(20 * MIB))
    ours, theirs = socket_streams(bench)
    async with ours, theirs, trio.open_nursery() as nursery:
        attempt = await parked(nursery, send_file, path, ours)
        while not trio.lowlevel.current_statistics().io_statistics.tasks_waiting_write:
            await trio.lowlevel.checkpoint()
        with pytest.raises(trio.BusyResourceError):
            await send_file(path, ours)
        with pytest.raises(trio.BusyResourceError):
            await ours.send_all(b"x")
        assert await attempt.cancel()


# Cancelled


@pytest.mark.parametrize("name", ["read", "write", "replace", "copy", "send", "send any"])
async def test_cancelled_before(bench: Bench, name: str) -> None:
    path, dst = bench.path(b"old"), bench.path(b"old")
    streams = [socket_streams(bench), any_streams(bench)]
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "read": lambda: read_file(path),
        "write": lambda: write_file(dst, b"new"),
        "replace": lambda: write_file(dst, b"new", atomic=True),
        "copy": lambda: copy_file(path, dst),
        "send": lambda: send_file(path, streams[0][0]),
        "send any": lambda: send_file(path, streams[1][0]),
    }
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            await calls[name]()
        assert scope.cancelled_caught
    assert dst.read_bytes() == b"old"
    for ours, theirs in streams:
        await ours.aclose()
        await theirs.aclose()


@pytest.mark.parametrize("size", [10, 3 * GUESS])
async def test_a_read_cancelled_at_any_time(bench: Bench, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(_whole_files, "PIECE", GUESS)
    content = content_of(size)
    path = bench.path(content)
    for nowait in (_page_cache._RWF_NOWAIT, 0):
        monkeypatch.setattr(_page_cache, "_RWF_NOWAIT", nowait)
        for ticks in range(await count_ticks(read_file, path) + 2):
            attempt = await cancelled_after(ticks, read_file, path)
            assert attempt.cancelled or attempt.value == content


async def replace(path: Path, content: bytes) -> int:
    return await write_file(path, content, atomic=True)


async def test_a_replacement_cancelled_at_any_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled or done, and so is the file."""
    monkeypatch.setattr(_whole_files, "PIECE", GUESS)
    path = bench.path(bytes(3 * GUESS))
    outcomes: list[bool] = []
    ticks = 0
    while outcomes.count(False) < 3:  # a tick may be short, and the disk slow
        old, new = path.read_bytes(), bytes([len(outcomes) % 256]) * (3 * GUESS)
        attempt = await cancelled_after(ticks, replace, path, new)
        assert path.read_bytes() == (old if attempt.cancelled else new)
        assert names_in(bench.directory) == [path.name]
        outcomes.append(attempt.cancelled)
        ticks += 1 + ticks // 8
    assert True in outcomes


async def test_a_write_cancelled_at_any_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has some first part."""
    monkeypatch.setattr(_whole_files, "PIECE", GUESS)
    path, content = bench.path(), content_of(4 * GUESS)
    for ticks in range(min(200, await count_ticks(write_file, path, content) + 2)):
        path.write_bytes(content)
        attempt = await cancelled_after(ticks, write_file, path, content)
        found = path.read_bytes()
        assert content.startswith(found)
        if not attempt.cancelled:
            assert found == content


async def test_a_copy_cancelled_at_any_time(bench: Bench) -> None:
    content = content_of(40 * PIPE_SIZE)
    src, dst = bench.path(content), bench.path()
    for ticks in [*range(20), *range(20, 300, 20)]:
        attempt = await cancelled_after(ticks, copy_file, src, dst)
        found = dst.read_bytes()
        assert content.startswith(found)
        assert attempt.cancelled or len(found) == len(content)
    assert await copy_file(src, dst) == len(content)
    assert matches(dst, content)


async def test_a_cancelled_send(bench: Bench) -> None:
    content = content_of(20 * MIB)
    path = bench.path(content)
    for new_streams in (socket_streams, any_streams):
        for ticks in (1, 3, 10, 30):
            ours, theirs = new_streams(bench)
            got = bytearray()
            async with ours, theirs:
                attempt = await cancelled_after(ticks, send_file, path, ours)
                assert attempt.cancelled or new_streams is any_streams
                await ours.aclose()
                await received(theirs, got)
            assert content.startswith(got)


def test_10_000_cancelled_opens(bench: Bench) -> None:
    path = bench.path(b"x")

    async def main() -> None:
        fds = len(os.listdir("/proc/self/fd"))

        async def one(ticks: int) -> None:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read_file, path)
                    nursery.start_soon(replace, bench.directory / "new", b"x")
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

        for number in range(100):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(one, number % 4)
        assert len(os.listdir("/proc/self/fd")) == fds
        assert set(names_in(bench.directory)) <= {path.name, "new"}

    run_native(main)


# The end of the run, and runs without a ring


def test_a_crash_leaves_nothing_open(mount: Mount, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = bench.fifo(), bench.fifo()
    large = bench.path(bytes(20 * MIB))

    async def main() -> None:
        ours, _theirs = socket_streams(bench)
        trio.lowlevel.spawn_system_task(read_file, read)
        trio.lowlevel.spawn_system_task(write_file, write, b"x")
        trio.lowlevel.spawn_system_task(read_files([read]).__anext__)
        trio.lowlevel.spawn_system_task(send_file, large, ours)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.spawn_system_task(copy_file, large, bench.path())
        trio.lowlevel.spawn_system_task(replace, bench.directory / "new", bytes(MIB))
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        await crash()

    run_to_a_crash(mount, main)


def test_without_a_ring(bench: Bench) -> None:
    path = bench.path(b"x")

    async def main() -> None:
        for call in (
            lambda: read_file(path),
            lambda: write_file(path, b"y"),
            lambda: write_file(path, b"y", atomic=True),
            lambda: copy_file(path, bench.directory / "new"),
            lambda: anext(read_files([path])),
        ):
            with pytest.raises(UnavailableError, match="needs a ring"):
                await call()

    run_without_ring(main)
    assert path.read_bytes() == b"x"
    assert names_in(bench.directory) == [path.name]


# Ctrl-C


async def _read_a_few(directory: Path) -> None:
    async for _ in read_files([*[directory / "large"] * 2, Path("/proc/self/status")]):
        pass


INTERRUPTED: dict[str, Callable[[Path], Awaitable[object]]] = {
    "read_file": lambda directory: read_file(directory / "large"),
    "read_file of /proc": lambda directory: read_file("/proc/self/status"),
    "write_file": lambda directory: write_file(directory / "new", b"x"),
    "write_file, atomic": lambda directory: write_file(directory / "large", b"x", atomic=True),
    "copy_file": lambda directory: copy_file(directory / "large", directory / "new"),
    "read_files": _read_a_few,
}


@pytest.mark.seconds(120)
@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_it_leaves_nothing(mount: Mount, name: str, tmp_path: Path) -> None:
    """Whichever line of ours a Ctrl-C meets: no fd (every test looks for those), no temporary file."""

    def interrupted(n: int) -> bool:
        lines = 0

        async def main() -> None:
            nonlocal lines
            with interrupted_at_line(n) as stop:
                try:
                    await INTERRUPTED[name](tmp_path)
                    await trio.lowlevel.checkpoint()
                finally:
                    lines = stop()

        (tmp_path / "large").write_bytes(bytes(GUESS + 1))
        try:
            mount.run(main)
        except KeyboardInterrupt:
            return True
        finally:
            assert {path.name for path in tmp_path.iterdir()} <= {"large", "new"}
            assert (tmp_path / "large").read_bytes() in (bytes(GUESS + 1), b"x")
        assert lines < n
        return False

    n = 1
    while interrupted(n):
        n += 11
    assert n > 20
