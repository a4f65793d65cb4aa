"""`open_file` and `AsyncFile`: the interface of `io`, on files of every kind, and what a cancel leaves behind.

That results and positions are those of `io`, whatever is done in whatever order, is in `test_file_equality`.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import itertools
import mmap
import os
import pty
import stat
import sys
import tempfile
import tty
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests import libc
from tests.helpers import (
    Attempt,
    drain,
    drop_from_cache,
    in_kernel_worker,
    interrupted_at_line,
    nothing_submitted,
    parked,
    run_without_ring,
)
from trio_uring import (
    AsyncFile,
    UnavailableError,
    UnsupportedOperation,
    _binary_files,
    _file_ops,
    _files,
    _page_cache,
    aligned_buffer,
    open_file,
    statistics,
)
from trio_uring._binary_files import CALLS_PER_CHECKPOINT
from trio_uring._page_cache import GUESS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.helpers import Bench, Mount

LAYERS = [
    ("rb", 0),
    ("wb", 0),
    ("ab", 0),
    ("r+b", 0),
    ("rb", -1),
    ("wb", -1),
    ("ab", -1),
    ("xb", -1),
    ("r+b", -1),
    ("w+b", -1),
    ("a+b", -1),
    ("r", -1),
    ("w", -1),
    ("a", -1),
    ("x", -1),
    ("r+", -1),
    ("w+", 1),
    ("a+", 2),
]
NOT_OURS = {
    "close",  # `aclose`
    "reconfigure",
}
TEXT = "one\ntwo\nthree\nno end"


# Opening


def _public(file: object) -> set[str]:
    return {name for name in dir(file) if not name.startswith("_")}


@pytest.mark.parametrize(("mode", "buffering"), LAYERS)
async def test_it_has_what_the_io_object_has(bench: Bench, mode: str, buffering: int) -> None:
    path = bench.directory / "new" if "x" in mode else bench.path(b"some\ntext\n")
    with open(path, mode, buffering) as expected:
        if "x" in mode:
            os.unlink(path)
        async with await open_file(path, mode, buffering) as file:
            assert isinstance(file, AsyncFile)
            more = {name for name in _public(AsyncFile) if not hasattr(io.TextIOWrapper, name)} - {"mode"}
            assert _public(file) - more == _public(expected) - NOT_OURS
            assert _public(file) >= _public(trio.wrap_file(expected)) - {"wrapped"} - ({"detach"} - _public(expected))
            assert all(hasattr(file, name) for name in _public(file))
            for name in ("name", "mode", "closed", "encoding", "errors", "newlines", "line_buffering", "closefd"):
                assert getattr(file, name, None) == getattr(expected, name, None), name
            for name in ("readable", "writable", "seekable", "isatty"):
                assert getattr(file, name)() == getattr(expected, name)(), name
            assert await file.tell() == expected.tell()
            with pytest.raises(AttributeError):
                file.no_such_attribute  # type: ignore[attr-defined]  # noqa: B018
        assert file.closed
        expected.close()
        for name in ("name", "mode", "closed"):
            assert getattr(file, name) == getattr(expected, name), name


def _dup(path: Path) -> Any:
    def opener(name: str, flags: int) -> int:
        fd = os.open(path, flags)
        os.set_inheritable(fd, True)
        return fd

    return opener


BAD_ARGUMENTS: list[tuple[Any, ...]] = [
    (None,),
    (1.5,),
    (-1,),
    ("a\0b",),
    ("FILE", "z"),
    ("FILE", ""),
    ("FILE", "rw"),
    ("FILE", "rbt"),
    ("FILE", "r++"),
    ("FILE", "U"),
    ("FILE", 5),
    ("FILE", "rb", -1, "utf-8"),
    ("FILE", "rb", -1, None, "strict"),
    ("FILE", "rb", -1, None, None, ""),
    ("FILE", "r", 0),
    ("FILE", "r", 1.5),
    ("FILE", "r", 1 << 70),
    ("FILE", "r", -1, 5),
    ("FILE", "r", -1, None, 5),
    ("FILE", "r", -1, None, None, 5),
    ("FILE", "r", -1, "no-such-encoding"),
    ("FILE", "r", -1, "rot13"),
    ("FILE", "r", -1, None, None, "x"),
    ("FILE", "r", -1, None, None, None, False),
    ("FILE", "r", -1, None, None, None, True, lambda *_: -1),
    ("FILE", "r", -1, None, None, None, True, lambda *_: "x"),
    ("FILE", "r", -1, None, None, None, True, 5),
    ("FILE", "x"),
    ("DIRECTORY",),
    ("DIRECTORY", "w"),
    ("DIRECTORY", "rb", 0),
    ("DIRECTORY/nothing",),
    ("FILE/nothing",),
    (b"/nothing/at/all",),
    (987_654,),
]


@pytest.mark.parametrize("number", range(len(BAD_ARGUMENTS)))
async def test_what_open_refuses(bench: Bench, number: int) -> None:
    file, *rest = BAD_ARGUMENTS[number]
    if isinstance(file, str):
        file = file.replace("FILE", str(bench.path(b"x"))).replace("DIRECTORY", str(bench.directory))
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever it is
        open(file, *rest)  # noqa: SIM115
    with pytest.raises(expected.type) as raised:
        await open_file(file, *rest)
    assert str(raised.value) == str(expected.value)
    for attribute in ("errno", "filename"):
        assert getattr(raised.value, attribute, None) == getattr(expected.value, attribute, None)


async def test_a_read_only_directory(bench: Bench) -> None:
    os.chmod(bench.directory, 0o500)
    try:
        if os.access(bench.directory, os.W_OK):
            os.chmod(bench.directory, 0o700)
            pytest.skip("the superuser may write anywhere")
        with pytest.raises(PermissionError) as raised:
            await open_file(bench.directory / "new", "w")
        assert raised.value.filename == str(bench.directory / "new")
    finally:
        os.chmod(bench.directory, 0o700)


async def test_line_buffering_of_bytes_warns(bench: Bench) -> None:
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="line buffering"):
            file = await open_file(bench.path(), "wb", 1)
        await file.aclose()


async def test_permissions_and_inheritance(bench: Bench) -> None:
    before = os.umask(0o027)
    try:
        async with await open_file(bench.directory / "new", "w") as file:
            assert stat.S_IMODE((await file.stat()).st_mode) == 0o640
            assert not os.get_inheritable(file.fileno())
        async with await open_file(bench.path(), opener=_dup(bench.path())) as file:
            assert not os.get_inheritable(file.fileno())
    finally:
        os.umask(before)


async def test_paths_of_every_type(bench: Bench) -> None:
    path = bench.path(b"content")
    for name in (path, str(path), os.fsencode(path)):
        async with await open_file(name, "rb") as file:
            assert file.name == os.fspath(name)
            assert await file.read() == b"content"


async def test_an_fd(bench: Bench) -> None:
    fd = os.open(bench.path(b"content"), os.O_RDONLY)
    async with await open_file(fd, closefd=False) as file:
        assert file.name == file.fileno() == fd
        assert await file.read(3) == "con"
    assert file.closed
    os.lseek(fd, 0, os.SEEK_SET)
    async with await open_file(fd, "rb") as binary:
        assert await binary.read() == b"content"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


async def test_an_fd_is_left_where_io_leaves_it(bench: Bench) -> None:
    content = os.urandom(200_000)
    for mode in ("rb", "r+b"):
        for size in (3, 5000, 100_000):
            positions = []
            for opened in (open, open_file):
                fd = os.open(bench.path(content), os.O_RDWR)
                shared = bench.keep(os.dup(fd))
                file: Any = opened(fd, mode)
                if opened is open:
                    for _ in range(0, size, 100):
                        file.read(100)
                    file.close()
                else:
                    async with await file as file:
                        for _ in range(0, size, 100):
                            await file.read(100)
                positions.append(os.lseek(shared, 0, os.SEEK_CUR))
            assert positions[0] == positions[1]


async def test_an_fd_that_open_refuses_stays_open_or_not_as_with_io(bench: Bench) -> None:
    directory = bench.keep(os.open(bench.directory, os.O_RDONLY))
    with pytest.raises(IsADirectoryError) as raised:
        await open_file(directory)
    assert raised.value.filename == directory
    os.fstat(directory)
    read_end, _ = bench.pipe()
    with pytest.raises(io.UnsupportedOperation, match="not seekable"):
        await open_file(read_end, "r+")
    bench.closed(read_end)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read_end)


async def test_the_opener(bench: Bench) -> None:
    path = bench.path(b"x")
    seen = []

    def opener(name: str, flags: int) -> int:
        seen.append((name, flags))
        return os.open(path, flags)

    for mode in ("r", "wb", "a+", "r+b"):
        with open("anything", mode, opener=opener):
            pass
        async with await open_file("anything", mode, opener=opener):
            pass
    assert seen[::2] == seen[1::2]


def test_outside_of_a_ring(bench: Bench) -> None:
    path = bench.path(b"x")
    fd = bench.file(b"x")

    async def main() -> None:
        for what in (path, fd):
            with pytest.raises(UnavailableError, match="needs a ring"):
                await open_file(what, closefd=what is path)
        with pytest.raises(UnavailableError, match="needs a ring"):
            await open_file(path, opener=_dup(path))

    run_without_ring(main)


# Reading and writing


async def test_text(bench: Bench) -> None:
    path = bench.directory / "new"
    async with await open_file(path, "w", encoding="utf-16") as file:
        assert await file.write("grüße\n") == 6
        await file.writelines(["a\n", "b"])
    assert path.read_text("utf-16") == "grüße\na\nb"
    async with await open_file(path, "a", encoding="utf-16") as file:
        await file.write("c")
    assert path.read_bytes() == "grüße\na\nbc".encode("utf-16")
    async with await open_file(path, encoding="utf-16") as file:
        assert [line async for line in file] == ["grüße\n", "a\n", "bc"]
        assert file.newlines == "\n"
        await file.seek(0)
        assert await file.readline() == "grüße\n"
        where = await file.tell()
        assert await file.readlines() == ["a\n", "bc"]
        await file.seek(where)
        assert await file.read(3) == "a\nb"


async def test_bytes(bench: Bench) -> None:
    path = bench.directory / "new"
    async with await open_file(path, "wb") as writer:
        assert await writer.write(bytearray(b"one\n")) == 4
        assert await writer.write(memoryview(b"two\nthree")) == 9
        assert path.read_bytes() == b""
    async with await open_file(path, "rb") as reader:
        assert await reader.peek() == b"one\ntwo\nthree"
        assert await reader.read1(2) == b"on"
        assert await reader.readline() == b"e\n"
        buffer = bytearray(3)
        assert await reader.readinto(buffer) == 3
        assert buffer == b"two"
        assert [line async for line in reader] == [b"\n", b"three"]


async def _as_io(bench: Bench, content: bytes, calls: list[tuple[Any, ...]], *args: Any) -> None:
    """Does the same to a file of each kind."""
    with open(bench.path(content), *args) as expected:
        async with await open_file(bench.path(content), *args) as file:
            for name, *arguments in calls:
                results: list[Any] = []
                for one in (expected, file):
                    try:
                        result = getattr(one, name)(*arguments)
                        results.append(await result if one is file else result)
                    except Exception as exc:
                        results.append((type(exc), str(exc)))
                assert results[0] == results[1], (name, *arguments)


async def test_the_window_is_that_of_io(bench: Bench) -> None:
    """How much `peek` and `read1` give, before and after seeking, tells where it is."""
    content = b"".join(b"%d\n" % n for n in range(20_000))
    back_and_forth: list[tuple[Any, ...]] = [("seek", -5, 1), ("peek",), ("seek", 20, 1), ("peek",), ("tell",)]
    for how in (("read", 10), ("readline",), ("read1", 5), ("read", 10_000), ("readinto", bytearray(7)), ("peek",)):
        await _as_io(bench, content, [("read", 100), how, *back_and_forth, ("read1", 1 << 20), *back_and_forth], "rb")
        await _as_io(bench, content, [how, ("read1", 1 << 20), *back_and_forth, how, *back_and_forth], "rb")
        await _as_io(bench, content, [how, ("read", 5000), ("flush",), *back_and_forth, how, *back_and_forth], "r+b")
        await _as_io(bench, content, [how, ("write", b"x"), ("flush",), ("readline",), ("readline",)], "r+b")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig", "utf-7", "shift_jis", "hz"])
async def test_positions_are_those_of_io(bench: Bench, encoding: str) -> None:
    content = "".join(f"{n} 日本 \r\n{n}\r" for n in range(600)).encode(encoding)
    calls: list[tuple[Any, ...]] = [("readline",), ("tell",), ("read", 9), ("tell",), ("read", 3000), ("tell",)] * 4
    for newline in (None, "", "\r"):
        await _as_io(bench, content, calls, "r", -1, encoding, None, newline)


async def test_what_cannot_be_decoded_has_been_read(bench: Bench) -> None:
    content = b"one\ntwo\n" + b"x" * 9000 + b"\xff" + b"y" * 9000
    calls: list[tuple[Any, ...]] = [("readline",), ("read", 20_000), ("tell",), ("read", 5), ("tell",)]
    await _as_io(bench, content, calls, "r", -1, "ascii")


@pytest.mark.parametrize("size", [7, GUESS - 1, GUESS])
@pytest.mark.parametrize("cached", [True, False])
async def test_a_small_file_is_one_operation_or_none(bench: Bench, size: int, cached: bool) -> None:
    path = bench.path(bytes(range(1, 8)) * (size // 7) + bytes(size % 7))
    content = path.read_bytes()
    for mode in ("rb", "r+b", "r"):
        async with await open_file(path, mode, encoding=None if "b" in mode else "latin-1") as file:
            if not cached:
                drop_from_cache(file.fileno())
            before = statistics().sqes
            found = await file.read()
            assert (found if isinstance(found, bytes) else found.encode("latin-1")) == content
            assert statistics().sqes == before + (not cached or size == GUESS)
            assert await file.tell() == size
            assert len(await file.read()) == 0


async def test_the_rest_of_a_small_file(bench: Bench) -> None:
    """Some of it has been read, read ahead or written before."""
    path, content = bench.path(), os.urandom(50_000)
    for steps in ([10], [5000], [5000, 9000, 9000], [0]):
        path.write_bytes(content)
        async with await open_file(path, "r+b") as file:
            start = sum([len(await file.read(step)) for step in steps])
            assert await file.read() == content[start:]
            assert await file.tell() == len(content)
        async with await open_file(path, "r+b") as file:
            await file.seek(start)
            await file.write(b"new")
            assert await file.read() == content[start + 3 :]
            assert await file.tell() == len(content)


async def test_a_small_file_that_has_grown(bench: Bench) -> None:
    """By more than the page cache has: nothing is missing."""
    path = bench.path(bytes(mmap.PAGESIZE))
    async with await open_file(path, "rb") as file:
        with open(path, "ab") as other:
            other.write(b"x" * mmap.PAGESIZE)
            other.flush()
            os.fsync(other.fileno())
            os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(path, "rb", 0) as other_reader:
            os.posix_fadvise(other_reader.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            other_reader.read(1)
        assert await file.read() == bytes(mmap.PAGESIZE) + b"x" * mmap.PAGESIZE


async def test_direct_reads_are_left_to_the_ring(bench: Bench) -> None:
    """They would wait, asked or not."""
    path = bench.path(bytes(mmap.PAGESIZE))

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags)

    async with await open_file(path, "rb", opener=opener) as file:
        before = statistics().sqes
        assert len(await file.read()) == mmap.PAGESIZE
        assert statistics().sqes == before + 1


async def test_reading_a_small_file_in_a_cancelled_scope(bench: Bench) -> None:
    async with await open_file(bench.path(b"content"), "rb") as file:
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.read()
        assert scope.cancelled_caught
        assert await file.read() == b"content"


async def test_unbuffered(bench: Bench) -> None:
    path = bench.path()
    async with await open_file(path, "r+b", 0) as file:
        assert await file.write(b"one\ntwo\nthree") == 13
        assert path.read_bytes() == b"one\ntwo\nthree"
        assert await file.seek(0) == 0
        assert await file.readline() == b"one\n"
        assert await file.read(2) == b"tw"
        assert await file.readall() == b"o\nthree"
        assert await file.truncate(3) == 3
        assert await file.read() == b""
    assert path.read_bytes() == b"one"


async def test_lines_longer_than_everything(bench: Bench) -> None:
    lines = ["x" * size + "\n" for size in (3, 5_000, 70_000, 1, 600_000)] + ["end"]
    path = bench.path("".join(lines).encode())
    async with await open_file(path) as text, await open_file(path, "rb") as binary:
        assert [line async for line in text] == lines
        assert [line.decode() async for line in binary] == lines


async def test_a_crlf_that_two_chunks_share(bench: Bench) -> None:
    for before in range(8185, 8195):
        lines = ["x" * before + "\r\n", "\r\r\n", "y\n\r\n", "z\r"]
        path = bench.path("".join(lines).encode())
        for newline in ("\r\n", "", None):
            with open(path, newline=newline) as expected:
                async with await open_file(path, newline=newline) as file:
                    assert [line async for line in file] == list(expected)
                    assert file.newlines == expected.newlines


async def test_what_is_read_ahead_is_nobodys_business(bench: Bench) -> None:
    """A long read in small pieces moves the fd further than the file; writing, truncating, detaching know it."""
    content = os.urandom(1 << 20)
    path = bench.path(content)
    file = await open_file(path, "r+b")
    assert b"".join([await file.read(1000) for _ in range(200)]) == content[:200_000]
    assert await file.tell() == 200_000
    await file.write(b"new")
    await file.flush()
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 200_003
    assert await file.read(5) == content[200_003:200_008]
    assert await file.truncate() == 200_008
    async with await file.detach() as raw:
        assert await raw.read() == b""
    assert path.read_bytes() == content[:200_000] + b"new" + content[200_003:200_008]


async def test_detach(bench: Bench) -> None:
    path = bench.path(TEXT.encode())
    text = await open_file(path, "r+")
    assert await text.readline() == "one\n"
    buffered = await text.detach()
    assert repr(text) == "<trio_uring.AsyncFile [detached]>"
    uses: list[Callable[[], Awaitable[object]]] = [text.read, text.aclose, text.flush, text.tell]
    for use in uses:
        with pytest.raises(ValueError, match="underlying buffer has been detached"):
            await use()
    raw = await buffered.detach()
    uses = [buffered.read, buffered.aclose, buffered.flush, buffered.tell]
    for use in uses:
        with pytest.raises(ValueError, match="raw stream has been detached"):
            await use()
    assert await raw.tell() == len(TEXT)
    await raw.aclose()


async def test_the_layers_below(bench: Bench) -> None:
    path = bench.path(b"one\ntwo\n")
    async with await open_file(path, "r+") as file:
        assert await file.buffer.raw.read(4) == b"one\n"
        assert await file.readline() == "two\n"
        await file.buffer.aclose()
        assert file.closed
        with pytest.raises(ValueError, match="closed file"):
            await file.readline()


async def test_what_the_mode_forbids(bench: Bench) -> None:
    for mode, buffering, method, *args in (
        ("rb", 0, "write", b"x"),
        ("wb", 0, "read"),
        ("wb", 0, "readline"),
        ("rb", -1, "write", b"x"),
        ("rb", -1, "truncate"),
        ("rb", -1, "writelines", [b"x"]),
        ("wb", -1, "read"),
        ("wb", -1, "read1"),
        ("wb", -1, "readinto", bytearray(1)),
        ("wb", -1, "readinto1", bytearray(1)),
        ("wb", -1, "readline"),
        ("wb", -1, "readlines"),
        ("r", -1, "write", "x"),
        ("r", -1, "truncate"),
        ("w", -1, "read"),
        ("w", -1, "readline"),
        ("w", -1, "readlines"),
        ("r+", -1, "write", b"x"),
        ("r+b", -1, "write", "x"),
        ("r+b", -1, "readinto", b"x"),
        ("r+b", -1, "readinto", 5),
        ("rb", -1, "read", "x"),
        ("rb", -1, "read", -2),
        ("r", -1, "seek", 1, 1),
        ("r", -1, "seek", 1, 2),
        ("r", -1, "seek", -1),
        ("r", -1, "seek", 0, 7),
        ("rb", -1, "seek", 0, 7),
        ("rb", -1, "seek", -1),
        ("rb", 0, "seek", -1),
        ("rb", -1, "seek", "x"),
    ):
        path = bench.path(b"content")
        with open(path, mode, buffering) as file, pytest.raises(Exception) as expected:  # noqa: PT011
            getattr(file, method)(*args)
        async with await open_file(path, mode, buffering) as ours:
            with pytest.raises(expected.type):
                await getattr(ours, method)(*args)


@pytest.mark.parametrize(("mode", "buffering"), [("rb", 0), ("r+b", -1), ("rb", -1), ("wb", -1), ("r+", -1)])
async def test_after_closing(bench: Bench, mode: str, buffering: int) -> None:
    file = await open_file(bench.path(TEXT.encode()), mode, buffering)
    if file.readable():
        await file.readline()
    await file.aclose()
    await file.aclose()
    assert file.closed
    assert "[closed]" in repr(file)
    data = "x" if hasattr(file, "encoding") else b"x"
    calls: dict[str, tuple[Any, ...]] = {
        "read": (1,),
        "read1": (1,),
        "readall": (),
        "readinto": (bytearray(1),),
        "readinto1": (bytearray(1),),
        "readline": (),
        "readlines": (),
        "__anext__": (),
        "peek": (),
        "write": (data,),
        "writelines": ([data],),
        "seek": (0,),
        "tell": (),
        "truncate": (),
        "flush": (),
        "fsync": (),
        "datasync": (),
        "pread": (1, 0),
        "pwrite": (b"x", 0),
        "preadv": ([bytearray(1)], 0),
        "pwritev": ([b"x"], 0),
        "stat": (),
        "allocate": (0, 1),
        "advise": (0, 1, 0),
    }
    for name in calls.keys() & {*dir(file)}:
        with pytest.raises((ValueError, io.UnsupportedOperation)):
            await getattr(file, name)(*calls[name])
    for name in ("fileno", "isatty", "seekable"):
        with pytest.raises(ValueError, match="closed file"):
            getattr(file, name)()


# Straight to the ring


async def test_reads_and_writes_at_an_offset(bench: Bench) -> None:
    path = bench.path(b"0123456789")
    async with await open_file(path, "r+b") as file:
        assert await file.read(1) == b"0"
        assert await file.pread(3, 4) == b"456"
        assert await file.pread(30, 8) == b"89"
        assert await file.pread(1, 10) == b""
        assert await file.pread(0, 0) == b""
        assert await file.pwrite(b"ab", 2) == 2
        buffers = [bytearray(2), bytearray(3)]
        assert await file.preadv(buffers, 1) == 5
        assert buffers == [b"1a", b"b45"]
        assert await file.pwritev([b"x", b"yz"], 9) == 3
        assert await file.tell() == 1
        for call in (file.pread(1, -1), file.pwrite(b"", -1), file.preadv([], -1), file.pwritev([], -1)):
            with pytest.raises(OSError, match="negative") as raised:
                await call
            assert raised.value.errno == errno.EINVAL
    assert path.read_bytes() == b"01ab45678xyz"
    assert bytes(4) == b"\0\0\0\0"  # what reads fill is never an object somebody else has


@pytest.mark.parametrize("place", [None, "/dev/shm"])
@pytest.mark.parametrize("size", [100, GUESS, GUESS + 1])
async def test_a_pread_of_what_the_page_cache_has(bench: Bench, place: str | None, size: int) -> None:
    """It is one without the ring, where the file system knows such a read, and a checkpoint; the end of the file is
    left to the ring.
    """
    content = os.urandom(GUESS + 5000)
    with tempfile.NamedTemporaryFile(dir=place or bench.directory) as whole:
        whole.write(content)
        whole.flush()
        async with await open_file(whole.name, "rb", 0) as file:
            for offset, cached in ((0, True), (4999, True), (len(content) - 50, False), (0, True), (0, False)):
                if place is None and offset == 0 and not cached:
                    drop_from_cache(file.fileno())
                before = statistics().sqes
                with trio.testing.assert_checkpoints():
                    assert await file.pread(size, offset) == content[offset : offset + size]
                at_once = place is None and size <= GUESS and cached
                assert statistics().sqes == before + (not at_once), offset
            with pytest.raises(ValueError, match="negative"):
                await file.pread(-1, 0)
            assert await file.tell() == 0


async def test_a_pread_of_what_the_page_cache_has_is_left_to_the_ring_where_it_would_wait(bench: Bench) -> None:
    """With ``O_DIRECT``, whether asked not to wait or not."""
    path = bench.path(bytes(mmap.PAGESIZE))
    fd = os.open(path, os.O_RDONLY)
    for name, opener in ((path, os.open), (fd, None)):
        async with await open_file(name, "rb", 0, opener=opener) as file:
            before = statistics().sqes
            assert await file.pread(10, 0) == bytes(10)
            assert statistics().sqes == before + 1


async def test_sync_flushes(bench: Bench) -> None:
    path = bench.path()
    async with await open_file(path, "w") as file:
        for sync in (file.fsync, file.datasync):
            before = path.read_text()
            await file.write("x")
            await sync()
            assert path.read_text() == before + "x"


async def test_allocate_and_advise(bench: Bench) -> None:
    path = bench.path()
    async with await open_file(path, "r+b") as file:
        await file.allocate(0, 10_000)
        assert (await file.stat()).st_size == 10_000
        await file.allocate(0, 20_000, libc.FALLOC_FL_KEEP_SIZE)
        assert os.fstat(file.fileno()) == await file.stat()
        await file.advise(0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Invalid argument"):
            await file.advise(0, 0, 77)


async def test_truncate_where_the_kernel_cannot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(fd: int, size: int) -> None:
        raise UnsupportedOperation(errno.EOPNOTSUPP, "this kernel lacks ftruncate")

    monkeypatch.setattr(_binary_files, "ftruncate", missing)
    path = bench.path(b"content")
    async with await open_file(path, "r+b") as file:
        assert await file.truncate(3) == 3
    assert path.read_bytes() == b"con"


def test_aligned_buffers() -> None:
    for size, alignment in ((1, 1), (4096, 4096), (100, 512), (5000, 1 << 21), (1 << 20, 1 << 16)):
        buffer = aligned_buffer(size, alignment)
        assert len(buffer) == size
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % alignment == 0
        assert bytes(buffer) == bytes(size)
        buffer[-1] = 1
    for wrong in ((0, 4096), (-1, 4096), (10, 0), (10, 3), (10, -4)):
        with pytest.raises(ValueError, match="must be"):
            aligned_buffer(*wrong)


# Files of every kind


async def test_direct_io(bench: Bench) -> None:
    content = os.urandom(3 * 4096)
    path = bench.path(content)
    try:
        os.close(os.open(path, os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")

    def direct(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_DIRECT)

    async with await open_file(path, "r+b", 0, opener=direct) as file:
        buffer = aligned_buffer(2 * 4096)
        assert await file.readinto(buffer) == len(buffer)
        assert buffer == content[: len(buffer)]
        assert await file.preadv([buffer], 4096) == len(buffer)
        assert buffer == content[4096:]
        buffer[:] = bytes(len(buffer))
        assert await file.pwrite(buffer, 0) == len(buffer)
        await file.seek(0)
        buffer[:4] = b"data"
        assert await file.write(buffer[:4096]) == 4096
    assert path.read_bytes() == b"data" + bytes(2 * 4096 - 4) + content[2 * 4096 :]


async def test_append(bench: Bench) -> None:
    path = bench.path(b"0")
    async with await open_file(path, "ab") as a, await open_file(path, "ab", 0) as b:
        assert await a.tell() == await b.tell() == 1
        await a.write(b"a1")
        await b.write(b"b1")
        await a.flush()
        await b.write(b"b2")
        await a.write(b"a2")
    assert path.read_bytes() == b"0b1a1b2a2"
    async with await open_file(path, "a+") as file:
        await file.seek(0)
        assert await file.read(2) == "0b"
        await file.write("end")
    assert path.read_bytes() == b"0b1a1b2a2end"


async def test_a_deleted_file(bench: Bench) -> None:
    path = bench.path(b"content")
    async with await open_file(path, "r+") as file:
        os.unlink(path)
        assert await file.read() == "content"
        await file.write(" and more")
        await file.seek(0)
        assert await file.read() == "content and more"
        assert (await file.stat()).st_nlink == 0
    assert not path.exists()


async def test_beyond_4_gib(bench: Bench) -> None:
    path = bench.path(b"start")
    far = (5 << 30) + 7
    async with await open_file(path, "r+b") as file:
        assert await file.seek(far) == far
        await file.write(b"far\nend")
        assert await file.tell() == far + 7
        await file.seek(-3, os.SEEK_END)
        assert await file.read() == b"end"
        assert await file.pread(3, far) == b"far"
    async with await open_file(path) as text:
        await text.seek(far)
        assert await text.readline() == "far\n"
        where = await text.tell()
        assert where == far + 4
        await text.seek(where)
        assert await text.read() == "end"
    assert path.stat().st_blocks < 1000


@contextmanager
def wide_memory(size: int) -> Iterator[Any]:
    """Memory of that size, all of whose parts are the same 64 MiB."""
    part = 64 << 20
    calls = ctypes.CDLL(None, use_errno=True)
    calls.mmap.restype = ctypes.c_size_t
    calls.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    calls.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    fd = os.memfd_create("part")
    os.ftruncate(fd, part)
    start = calls.mmap(0, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)  # NORESERVE
    try:
        for offset in range(0, size, part):
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10  # MAP_FIXED
            address = calls.mmap(start + offset, min(part, size - offset), protection, flags, fd, 0)
            assert address == start + offset
        yield (ctypes.c_char * size).from_address(start)
    finally:
        calls.munmap(start, size)
        os.close(fd)


@pytest.mark.seconds(120)
def test_beyond_2_gib_in_one_call(mount: Mount, bench: Bench) -> None:
    if mount.name != "native":
        pytest.skip("once is enough")
    size = (2 << 30) + 8192
    path = bench.path()
    os.truncate(path, size + 100)
    with open(path, "r+b") as file:
        file.seek(size - 1)
        file.write(b"!")

    async def main(memory: Any) -> None:
        async with await open_file(path, "rb") as file:
            assert await file.readinto(memory) == size
            assert await file.tell() == size
        assert memory[size - 1] == b"!"
        async with await open_file("/dev/null", "wb") as null:
            assert await null.write(memory) == size
        async with await open_file("/dev/null", "wb", 0) as null:
            assert await null.write(memory) == 0x7FFFF000

    with wide_memory(size) as memory:
        mount.run(main, memory)


async def test_proc_and_dev() -> None:
    async with await open_file("/proc/self/status") as file:
        names = [line.partition(":")[0] async for line in file]
    assert names[0] == "Name"
    assert "Threads" in names
    async with await open_file("/proc/self/cmdline", "rb") as binary:
        assert Path(sys.executable).name.encode() in await binary.read()
    async with await open_file("/dev/null", "r+b") as null:
        assert await null.write(b"x" * 10_000) == 10_000
        assert await null.read() == b""
    async with await open_file("/dev/zero", "rb") as zero:
        assert await zero.read(100_000) == bytes(100_000)
        assert await zero.read1(5) == bytes(5)
    async with await open_file("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        assert "never" in await file.read()


async def test_a_device_that_fails() -> None:
    """No address 0 is mapped, so reading and writing it is EIO."""
    async with await open_file("/proc/self/mem", "rb") as file:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                await file.read(1)
            assert await file.tell() == 0
    writer = await open_file("/proc/self/mem", "r+b")
    await writer.write(b"x")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            await writer.flush()
        assert await writer.tell() == 1
    with pytest.raises(OSError, match="Input/output error"):
        await writer.aclose()
    assert writer.closed


async def test_a_read_that_an_error_cuts_short(bench: Bench) -> None:
    """The first page can be read, the second cannot. What came before the error is not lost."""
    size = 2 * mmap.PAGESIZE
    fd = bench.file(bytes(size))
    with mmap.mmap(fd, size) as pages:
        pages[:4] = b"page"
        os.truncate(fd, mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        async with await open_file("/proc/self/mem", "rb", 0) as raw:
            await raw.seek(start)
            assert await raw.read(size) == pages[: mmap.PAGESIZE]
            assert await raw.tell() == start + mmap.PAGESIZE
            await raw.seek(start)
            assert await raw.readinto(bytearray(size)) == mmap.PAGESIZE
            with pytest.raises(OSError, match="Input/output error"):
                await raw.read(1)
        async with await open_file("/proc/self/mem", "rb") as file:
            await file.seek(start)
            with pytest.raises(OSError, match="Input/output error"):
                await file.read(size)
            assert await file.tell() == start
            assert await file.read(4) == b"page"


async def test_a_pipe(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    bench.closed(write_end)
    async with await open_file(read_end) as reader:
        async with await open_file(write_end, "w") as writer:
            assert not writer.seekable()
            for file in (reader, writer):
                with pytest.raises(io.UnsupportedOperation, match="not seekable"):
                    await file.tell()
            await writer.write("one\ntwo")
            await writer.flush()
            assert await reader.readline() == "one\n"
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, reader.readline)
                await writer.write(" and a half\nend")
                await writer.flush()
                assert await attempt.result() == "two and a half\n"
        assert await reader.read() == "end"
        assert await reader.readline() == ""


async def test_a_pipe_that_does_not_block(bench: Bench) -> None:
    """Unlike `io`, which gives None or raises, it waits."""
    read_end, write_end = bench.pipe(os.O_NONBLOCK)
    bench.closed(read_end)
    async with await open_file(read_end, "rb") as reader, trio.open_nursery() as nursery:
        attempt = await parked(nursery, reader.read, 3)
        os.write(write_end, b"ab")
        await trio.testing.wait_all_tasks_blocked()
        os.write(write_end, b"cd")
        assert await attempt.result() == b"abc"


async def test_a_fifo_to_read(bench: Bench) -> None:
    """Opening it does not wait; reading it waits for a writer, who has perhaps written and gone."""
    path = bench.fifo()
    async with await open_file(path) as reader, trio.open_nursery() as nursery:
        attempt = await parked(nursery, reader.read)
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"con")
        await trio.testing.wait_all_tasks_blocked()
        os.write(fd, b"tent")
        os.close(fd)
        assert await attempt.result() == "content"
        assert await reader.read() == ""


async def test_a_fifo_to_write(bench: Bench) -> None:
    """Opening it waits for a reader, and can be cancelled."""
    path = bench.fifo()
    async with trio.open_nursery() as nursery:
        attempt = Attempt(nursery, open_file, path, "w")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await attempt.cancel()
        attempt = Attempt(nursery, open_file, path, "w")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not attempt.done
        read_end = bench.keep(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        async with await attempt.result() as writer:
            await writer.write("content")
    assert os.read(read_end, 100) == b"content"


async def test_a_terminal() -> None:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    async with await open_file(ours, "r+b", 0) as keyboard:
        async with await open_file(os.ttyname(theirs), "w", opener=lambda *_: os.dup(theirs)) as screen:
            assert screen.isatty()
            assert screen.line_buffering
            await screen.write("no line yet")
            await screen.write(", a line\nand")
            seen = b""
            while len(seen) < 23:
                seen += await keyboard.read(100)
            assert seen == b"no line yet, a line\nand"
        async with await open_file(theirs) as terminal, trio.open_nursery() as nursery:
            attempt = await parked(nursery, terminal.readline)
            await keyboard.write(b"typ")
            await trio.testing.wait_all_tasks_blocked()
            await keyboard.write(b"ed\n")
            assert await attempt.result() == "typed\n"


@contextmanager
def small_disk(bench: Bench, size: int) -> Iterator[Path]:
    where = bench.directory / "disk"
    where.mkdir()
    mount = ctypes.CDLL(None, use_errno=True)
    if mount.mount(b"tmpfs", os.fsencode(where), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield where
    finally:
        assert mount.umount2(os.fsencode(where), 2) == 0


async def test_a_full_disk(bench: Bench) -> None:
    with small_disk(bench, 1 << 16) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1 << 15))
        file = await open_file(disk / "new", "wb", 1 << 16)
        data = os.urandom(50_000)
        await file.write(data)
        with pytest.raises(OSError, match="No space left"):
            await file.flush()
        assert await file.tell() == len(data)
        with pytest.raises(OSError, match="No space left"):
            await file.write(bytes(1 << 17))
        assert await file.tell() == len(data)
        ballast.unlink()
        await file.flush()
        assert (disk / "new").read_bytes() == data
        await file.write(bytes(20_000))
        with pytest.raises(OSError, match="No space left"):
            await file.aclose()
        assert file.closed


# Cancelled


READS: dict[str, tuple[str, int, Callable[[Any], Awaitable[Any]]]] = {
    "raw readall": ("rb", 0, lambda file: file.readall()),
    "raw readline": ("rb", 0, lambda file: file.readline()),
    "raw readlines": ("rb", 0, lambda file: file.readlines()),
    "read": ("rb", -1, lambda file: file.read()),
    "read(n)": ("rb", -1, lambda file: file.read(100_000)),
    "read(n), small buffer": ("rb", 2, lambda file: file.read(100_000)),
    "readinto": ("rb", -1, lambda file: file.readinto(bytearray(100_000))),
    "readinto, small buffer": ("rb", 2, lambda file: file.readinto(bytearray(100_000))),
    "readline": ("rb", -1, lambda file: file.readline()),
    "readline, small buffer": ("rb", 2, lambda file: file.readline()),
    "readline(n)": ("rb", -1, lambda file: file.readline(100_000)),
    "readlines": ("rb", -1, lambda file: file.readlines()),
    "iteration": ("rb", -1, lambda file: file.__anext__()),
    "text read": ("r", -1, lambda file: file.read()),
    "text read(n)": ("r", -1, lambda file: file.read(100_000)),
    "text readline": ("r", -1, lambda file: file.readline()),
    "text readline, small buffer": ("r", 2, lambda file: file.readline()),
    "text readlines": ("r", -1, lambda file: file.readlines()),
    "text iteration": ("r", -1, lambda file: file.__anext__()),
}
BEGINNING = "é" * 9  # every line of it is incomplete


@pytest.mark.parametrize("name", READS)
async def test_a_cancelled_read_loses_nothing(bench: Bench, name: str) -> None:
    mode, buffering, call = READS[name]
    many = "lines" in name
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    bench.closed(write_end)
    expected = b""
    async with await open_file(read_end, mode, buffering, None if "b" in mode else "utf-8") as file:
        for part in ("1", BEGINNING, "x\n2" if many else "x", "é", "y" * 9000):
            data = part.encode()
            for piece in (data[:1], data[1:]):
                os.write(write_end, piece)
                expected += piece
                async with trio.open_nursery() as nursery:
                    attempt = await parked(nursery, call, file)
                    assert await attempt.cancel()
        os.close(write_end)
        rest = await file.read()
    assert (rest if isinstance(rest, bytes) else rest.encode()) == expected


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
async def test_a_cancelled_read_of_text_keeps_its_lines(bench: Bench, newline: str | None) -> None:
    text = "a\r\nbé\rc\nd\r\n\r\re"
    expected = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline=newline)
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    async with await open_file(read_end, encoding="utf-8", newline=newline) as file:
        for byte in text.encode():
            os.write(write_end, bytes([byte]))
            async with trio.open_nursery() as nursery:
                attempt = await parked(nursery, file.read, 100)
                assert await attempt.cancel()
        bench.closed(write_end)
        os.close(write_end)
        assert [line async for line in file] == list(expected)
        assert file.newlines == expected.newlines


async def test_a_cancelled_read_of_a_file_leaves_its_position(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of its operations meets the cancel."""
    monkeypatch.setattr(_page_cache, "_RWF_NOWAIT", 0)
    content = "".join(f"{n} é\n" for n in range(5000)).encode()
    path = bench.path(content)
    for mode, n in (("r", 1), ("rb", 2), ("r+b", 2)):
        encoding = None if "b" in mode else "utf-8"
        with open(path, mode, encoding=encoding) as expected:
            async with await open_file(path, mode, encoding=encoding) as file:
                for read, *args in (("read", 30_001), ("readlines",), ("read",)):
                    assert await file.readline() == expected.readline()
                    where = await file.tell()
                    assert where == expected.tell()
                    with cancelled_at_fetch(1 if read == "read" and not args else n, monkeypatch) as scope:
                        await getattr(file, read)(*args)
                    assert scope.cancelled_caught
                    assert await file.tell() == where
                assert await file.readline() == expected.readline()
                assert await file.tell() == expected.tell()
                assert await file.read() == expected.read()


@contextmanager
def cancelled_at_fetch(n: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[trio.CancelScope]:
    """Cancels what happens inside when the file is read for the n-th time."""
    fetch = _binary_files.RawFile._fetch
    counter = itertools.count(1)

    async def cancelling(self: Any, size: int) -> bytes:
        if next(counter) == n:
            scope.cancel()
        return await fetch(self, size)

    with monkeypatch.context() as patch, trio.CancelScope() as scope:
        patch.setattr(_binary_files.RawFile, "_fetch", cancelling)
        yield scope


@pytest.mark.parametrize("buffering", [-1, 2, 10_000])
async def test_a_cancelled_write_has_taken_nothing(bench: Bench, buffering: int) -> None:
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    file = await open_file(write_end, "wb", buffering)
    expected = bytes(size)
    async with trio.open_nursery() as nursery:
        while len(expected) < size + 30_000:  # what the buffer takes
            data = os.urandom(999)
            attempt = Attempt(nursery, file.write, data)
            await trio.testing.wait_all_tasks_blocked()
            if not attempt.done:
                assert await attempt.cancel()
                break
            assert await attempt.result() == len(data)
            expected += data
        for data in (b"a", os.urandom(100), os.urandom(100_000)):
            with trio.move_on_after(0) as scope:
                await file.write(data)
                expected += data
            if not scope.cancelled_caught:
                continue
            attempt = Attempt(nursery, file.write, data)
            await trio.testing.wait_all_tasks_blocked()
            if not attempt.done:
                assert await attempt.cancel()
            else:
                expected += data
        flushing = await parked(nursery, file.flush)
        assert await flushing.cancel()
        nursery.start_soon(file.aclose)
        assert await trio.to_thread.run_sync(drain, read_end, len(expected)) == expected


async def test_a_write_that_is_cancelled_half_way_is_taken(bench: Bench) -> None:
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    data = os.urandom(300_000)
    async with await open_file(write_end, "wb") as file, trio.open_nursery() as nursery:
        attempt = await parked(nursery, file.write, data)
        drain(read_end, size)
        await trio.testing.wait_all_tasks_blocked()
        assert not attempt.done
        assert not await attempt.cancel()
        assert attempt.value == len(data)
        nursery.start_soon(file.flush)
        assert await trio.to_thread.run_sync(drain, read_end, len(data)) == data


async def test_a_cancelled_write_of_text(bench: Bench) -> None:
    """Neither its text nor its codec's state: the escape sequences come once."""
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    file = await open_file(write_end, "w", 1, encoding="iso2022_jp")
    async with trio.open_nursery() as nursery:
        for text in ("日\n", "本\n", "abc\n"):
            attempt = await parked(nursery, file.write, text)
            assert await attempt.cancel()
        await file.write("日本")
        attempt = await parked(nursery, file.write, "\n")
        assert await attempt.cancel()
        drain(read_end, size)
        await file.write("\n")
    await file.aclose()
    assert os.read(read_end, 100).decode("iso2022_jp") == "日本\n"


async def test_a_cancelled_write_leaves_the_codec_as_it_was(bench: Bench) -> None:
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    async with await open_file(write_end, "w", 1, encoding="utf-8-sig") as file, trio.open_nursery() as nursery:
        attempt = await parked(nursery, file.write, "x\n")
        assert await attempt.cancel()
        drain(read_end, size)
        await file.write("y\n")
        assert os.read(read_end, 100) == "y\n".encode("utf-8-sig")


async def test_a_bom_in_a_pipe_is_that_of_io(bench: Bench) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le"):
        read_end, write_end = bench.pipe()
        with open(write_end, "w", encoding=encoding, closefd=False) as expected:
            expected.write("x")
        async with await open_file(write_end, "w", encoding=encoding, closefd=False) as file:
            await file.write("x")
        received = os.read(read_end, 100)
        half = len(received) // 2
        assert received[:half] == received[half:]


async def test_a_cancelled_seek_of_text_moves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.path(b"".join(b"%d\n" % n for n in range(10_000)))
    cookie = 20_000 | 10 << 96 | 5 << 128  # decode ten bytes there, skip five characters
    with open(path) as expected:
        expected.seek(cookie)
        async with await open_file(path) as file:
            assert await file.readline() == "0\n"
            where = await file.tell()
            with cancelled_at_fetch(1, monkeypatch) as scope:
                await file.seek(cookie)
            assert scope.cancelled_caught
            assert await file.tell() == where
            await file.seek(where)
            assert await file.readline() == "1\n"
            await file.seek(cookie)
            assert await file.read() == expected.read()


async def test_a_cancelled_flush_can_be_repeated(bench: Bench) -> None:
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    data = os.urandom(200_000)
    async with await open_file(write_end, "wb", 1 << 20) as file, trio.open_nursery() as nursery:
        await file.write(data)
        received = drain(read_end, size)[:0]
        while True:
            attempt = Attempt(nursery, file.flush)
            await trio.testing.wait_all_tasks_blocked()
            if attempt.done:
                break
            assert await attempt.cancel()
            received += os.read(read_end, 50_000)
        assert received + drain(read_end, len(data) - len(received)) == data


METHODS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "read": lambda file: file.read(1),
    "read all": lambda file: file.read(),
    "readline": lambda file: file.readline(),
    "readlines": lambda file: file.readlines(),
    "iteration": lambda file: file.__anext__(),
    "write": lambda file: file.write("x" if hasattr(file, "encoding") else b"x"),
    "large write": lambda file: file.write(("x" if hasattr(file, "encoding") else b"x") * 100_000),
    "writelines": lambda file: file.writelines(["x" if hasattr(file, "encoding") else b"x"]),
    "seek": lambda file: file.seek(0),
    "tell": lambda file: file.tell(),
    "truncate": lambda file: file.truncate(1),
    "flush": lambda file: file.flush(),
    "fsync": lambda file: file.fsync(),
    "datasync": lambda file: file.datasync(),
    "pread": lambda file: file.pread(1, 0),
    "pwrite": lambda file: file.pwrite(b"x", 0),
    "preadv": lambda file: file.preadv([bytearray(1)], 0),
    "pwritev": lambda file: file.pwritev([b"x"], 0),
    "stat": lambda file: file.stat(),
    "allocate": lambda file: file.allocate(0, 100_000),
    "advise": lambda file: file.advise(0, 0, 0),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short ago the last checkpoint was, the buffer serves no more calls than it may in a row."""
    monkeypatch.setattr(_binary_files, "CHECKPOINT_SECONDS", -1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("mode", "buffering"), [("r+b", 0), ("r+b", -1), ("r+", -1)])
@pytest.mark.parametrize("name", METHODS)
async def test_every_method_is_a_checkpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, buffering: int
) -> None:
    """With an empty buffer, and nothing to be had at once. In a cancelled scope nothing happens."""
    monkeypatch.setattr(_page_cache, "_RWF_NOWAIT", 0)
    path = bench.path(TEXT.encode())
    async with await open_file(path, mode, buffering) as file:
        await file.seek(4)
        if name in ("write", "writelines") and buffering:  # the buffer takes it
            for _ in range(CALLS_PER_CHECKPOINT):
                await METHODS["write"](file)
            await file.flush()
            os.truncate(path, 0)
            for _ in range(CALLS_PER_CHECKPOINT):
                await METHODS["write"](file)
        before, size = path.read_bytes(), await file.tell() if name not in ("write", "writelines") else 0
        async with nothing_submitted():
            with trio.CancelScope() as scope:
                scope.cancel()
                await METHODS[name](file)
            assert scope.cancelled_caught
        assert path.read_bytes() == before
        if name not in ("write", "writelines"):
            assert await file.tell() == size
            with trio.testing.assert_checkpoints():
                await METHODS[name](file)


async def test_writing_to_the_buffer_in_a_cancelled_scope(bench: Bench) -> None:
    path = bench.path()
    for mode, data in (("wb", b"content"), ("w", "content")):
        async with await open_file(path, mode) as file:
            with trio.CancelScope() as scope:
                scope.cancel()
                await file.write(data)
            assert scope.cancelled_caught
        assert path.read_bytes() == b""


async def test_closing_in_a_cancelled_scope(bench: Bench) -> None:
    path = bench.path()
    for mode, data in (("wb", b"content"), ("w", "content")):
        file = await open_file(path, mode)
        await file.write(data)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.aclose()
        assert scope.cancelled_caught
        assert file.closed
        assert path.read_bytes() == b"content"


async def test_opening_in_a_cancelled_scope(bench: Bench) -> None:
    path = bench.path()
    fd = bench.file()
    async with nothing_submitted():
        for kwargs in ({"file": path}, {"file": fd}, {"file": path, "opener": _dup(path)}):
            with trio.CancelScope() as scope:
                scope.cancel()
                await open_file(**kwargs)
            assert scope.cancelled_caught
    os.fstat(fd)


@pytest.mark.seconds(120)
async def test_10000_cancelled_opens_leave_no_fd(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """That there is none left, `nothing_left_behind` looks. The cancel comes before the kernel opens, or after."""
    monkeypatch.setattr(_files, "OPENAT", in_kernel_worker(_file_ops.OPENAT))
    path = bench.path(b"content")
    won = 0
    for number in range(10_000):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if number % 2:
                    nursery.start_soon(_cancel_soon, scope, number % 7)
                else:
                    scope.deadline = trio.current_time() + (number % 11) * 1e-6
                file = await open_file(path)
                won += 1
                await file.aclose()
                nursery.cancel_scope.cancel()
    assert 0 < won < 10_000


async def _cancel_soon(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


# Checkpoints


class _Steps(trio.abc.Instrument):
    """Counts the steps of a task."""

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += task is self.task


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ["r", "rb"])
async def test_the_buffer_serves_so_many_calls_in_a_row(bench: Bench, mode: str) -> None:
    path = bench.path(b"x\n" * 1000)
    calls: list[Callable[[Any], Awaitable[Any]]] = [
        lambda file: file.__anext__(),
        lambda file: file.readline(),
        lambda file: file.read(1),
    ]
    if mode == "rb":
        calls += [lambda file: file.read1(1), lambda file: file.peek(), lambda file: file.readinto(bytearray(1))]
    for call in calls:
        async with await open_file(path, mode) as file:
            await file.readline()
            counter = _Steps()
            trio.lowlevel.add_instrument(counter)
            for _ in range(CALLS_PER_CHECKPOINT):
                await call(file)
            assert counter.steps == 0
            await call(file)
            assert counter.steps == 1
            trio.lowlevel.remove_instrument(counter)


@pytest.mark.usefixtures("impatient")
async def test_the_buffer_takes_so_many_writes_in_a_row(bench: Bench) -> None:
    for mode, data in (("w", "x"), ("wb", b"x")):
        async with await open_file(bench.path(), mode) as file:
            counter = _Steps()
            trio.lowlevel.add_instrument(counter)
            for _ in range(CALLS_PER_CHECKPOINT):
                await file.write(data)
            assert counter.steps == 0
            await file.write(data)
            assert counter.steps == 1
            trio.lowlevel.remove_instrument(counter)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ["r", "rb"])
async def test_a_loop_over_lines_lets_others_run_and_can_be_cancelled(bench: Bench, mode: str) -> None:
    async with await open_file(bench.path(b"x\n" * 1000), mode) as file:
        counter = _Steps()
        trio.lowlevel.add_instrument(counter)
        lines = 0
        with trio.CancelScope() as scope:
            async for _ in file:
                lines += 1
                if lines == 550:
                    scope.cancel()
        trio.lowlevel.remove_instrument(counter)
        assert scope.cancelled_caught
        assert 550 <= lines <= 551 + CALLS_PER_CHECKPOINT
        assert counter.steps >= 5
        assert len(await file.read()) == 2 * (1000 - lines)


@pytest.mark.parametrize("newline", [None, "", "\r", "\r\n"])
async def test_a_loop_over_lines_sees_what_else_is_done_with_the_file(bench: Bench, newline: str | None) -> None:
    content = b"".join(b"%d\r\n" % n for n in range(500))
    for mode in ("r", "rb", "r+"):
        text = None if "b" in mode else newline
        with open(bench.path(content), mode, newline=text) as expected:
            async with await open_file(bench.path(content), mode, newline=text) as file:
                for number in range(3):
                    async for line in file:
                        assert line == expected.readline()
                        assert await file.tell() == expected.tell()
                        if number == 0:
                            assert await file.read(3) == expected.read(3)
                        elif number == 1:
                            assert await file.__anext__() == expected.readline()
                        elif await file.tell() > 1000:
                            await file.seek(0)
                            break
                        if await file.tell() > 2000:
                            break
                    expected.seek(await file.tell())
                async for _ in file:
                    await file.aclose()
                    with pytest.raises(ValueError, match="closed file"):
                        await file.__anext__()
                    break


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ["r", "rb"])
async def test_a_loop_over_lines_that_are_read_ahead(bench: Bench, mode: str) -> None:
    """With a checkpoint due anywhere in a chunk."""
    path = bench.path(b"".join(b"%0100d\n" % n for n in range(3000)))
    for first in range(0, CALLS_PER_CHECKPOINT, 7):
        with open(path, mode) as expected:
            async with await open_file(path, mode) as file:
                for _ in range(first):
                    assert await file.readline() == expected.readline()
                assert [line async for line in file] == [*expected]


async def test_leaving_a_loop_over_lines_early_is_nothing_to_warn_of(bench: Bench) -> None:
    async with await open_file(bench.path(b"1\n2\n3\n")) as file:
        async for line in file:
            assert line == "1\n"
            break
        gc.collect()
        assert [line async for line in file] == ["2\n", "3\n"]


# Several tasks


async def test_tasks_take_turns(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    bench.closed(write_end)
    lines = [f"{n} {'x' * (n * 37 % 9000)}\n" for n in range(300)]
    received: list[str] = []

    async def write(file: AsyncFile, start: int) -> None:
        for line in lines[start::5]:
            await file.write(line)

    async def read(file: AsyncFile) -> None:
        while line := await file.readline():
            received.append(line)

    async with (
        await open_file(read_end) as reader,
        trio.open_nursery() as readers,
        await open_file(write_end, "w") as writer,
        trio.open_nursery() as writers,
    ):
        for start in range(5):
            writers.start_soon(write, writer, start)
            readers.start_soon(read, reader)
    assert sorted(received) == sorted(lines)


async def test_one_that_waits_for_its_turn_can_be_cancelled(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    bench.closed(read_end)
    async with await open_file(read_end, "rb") as file, trio.open_nursery() as nursery:
        first = await parked(nursery, file.readline)
        second = await parked(nursery, file.readline)
        third = await parked(nursery, file.readline)
        assert await second.cancel()
        os.write(write_end, b"1\n2\n")
        assert await first.result() == b"1\n"
        assert await third.result() == b"2\n"


async def test_closing_ends_a_read(bench: Bench) -> None:
    for mode, buffering in (("rb", 0), ("rb", -1), ("r", -1)):
        read_end, write_end = bench.pipe()
        bench.closed(read_end)
        file = await open_file(read_end, mode, buffering)
        async with trio.open_nursery() as nursery:
            reader = await parked(nursery, file.read)
            waiter = await parked(nursery, file.readline)
            await file.aclose()
            assert isinstance((await reader.settled()).error, trio.ClosedResourceError)
            assert isinstance((await waiter.settled()).error, ValueError)
        with pytest.raises(BrokenPipeError):
            os.write(write_end, b"x")


async def test_closing_waits_for_a_write(bench: Bench) -> None:
    read_end, write_end, size = bench.full_pipe()
    bench.closed(write_end)
    file = await open_file(write_end, "wb")
    await file.write(b"content")
    async with trio.open_nursery() as nursery:
        flushing = await parked(nursery, file.flush)
        closing = await parked(nursery, file.aclose)
        closing.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not closing.done
        drain(read_end, size)
        await flushing.result()
        assert (await closing.settled()).cancelled
    assert file.closed
    assert os.read(read_end, 100) == b"content"


# Closed by nobody, or badly


async def test_a_file_that_nobody_closes(bench: Bench) -> None:
    path = bench.path()
    for mode, data in (("w", "content"), ("wb", b"content")):
        file = await open_file(path, mode)
        await file.write(data)
        fd = file.fileno()
        with pytest.warns(ResourceWarning, match="unclosed file .*name=.*[^d].>"):  # noqa: PT031
            del file
            gc.collect()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
        assert path.read_bytes() == b"content"
    fd = bench.file()
    file = await open_file(fd, closefd=False)
    del file
    os.fstat(fd)


async def test_closing_when_the_flush_fails(bench: Bench) -> None:
    for mode, data in (("wb", b"x"), ("w", "x")):
        read_end, write_end = bench.pipe()
        bench.closed(read_end)
        bench.closed(write_end)
        file = await open_file(write_end, mode)
        await file.write(data)
        os.close(read_end)
        with pytest.raises(BrokenPipeError):
            await file.aclose()
        assert file.closed
        await file.aclose()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(write_end)


async def test_a_buffer_is_free_after_the_call(bench: Bench) -> None:
    """Also while the error of a call is being handled."""
    read_end, write_end = bench.pipe()
    bench.closed(write_end)
    for buffering in (0, -1):
        opened: Any = await open_file(bench.path(b"x" * 10_000), "r+b", buffering)
        async with opened as file:
            buffer = bytearray(9_000)
            assert await file.readinto(buffer) == 9_000
            buffer.clear()
            buffer += b"x" * 50_000
            await file.write(buffer)
            buffer.clear()
    bench.closed(read_end)
    os.close(read_end)
    async with await open_file(write_end, "wb", 0) as file:
        buffer = bytearray(50_000)
        try:
            await file.write(buffer)
        except BrokenPipeError:
            buffer.clear()


def test_ctrl_c_loses_nothing(mount: Mount, bench: Bench) -> None:
    """Wherever it comes, the next read goes on from there."""
    lines = [b"%d" % n + b"x" * 50 + b"\n" for n in range(20)]
    path = bench.path(b"".join(lines))

    async def main(line: int) -> bool:
        received: list[bytes] = []
        async with await open_file(path, "rb", 16) as file:
            with interrupted_at_line(line) as stop:
                try:
                    while data := await file.readline():
                        received.append(data)
                    await trio.lowlevel.checkpoint()
                    return stop() < line
                except KeyboardInterrupt:
                    pass
            received += [data async for data in file]
        assert received == lines
        return False

    for line in itertools.count(1, 7):
        if mount.run(main, line):
            break
    assert line > 50


async def test_a_line_that_has_gone_leaves_nothing_to_write(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    bench.closed(write_end)
    file = await open_file(write_end, "w", 1)
    await file.write("line\n")
    async with nothing_submitted():
        await file.aclose()
    assert os.read(read_end, 9) == b"line\n"


async def test_a_line_of_no_characters_reads_no_further(bench: Bench) -> None:
    path = bench.path(bytes(20_000))
    async with await open_file(path, "r+", encoding="latin-1") as file:
        assert len(await file.read(8192)) == 8192  # just what is decoded at once
        assert await file.readline(0) == ""
        await file.write("x")
        assert await file.tell() == 8193
    assert path.read_bytes().index(b"x") == 8192
