"""A file on the ring does what the builtin `open`'s does, call for call.

There are two files with the same content; one is opened with `open`, the other with `open_file`. State machines make
the same calls on both and compare results, errors and positions, the cookies of `tell` included, and what is on disk.
A machine is synchronous and runs in a thread; each call goes to a run and back.
"""

from __future__ import annotations

import array
import codecs
import contextlib
import fcntl
import inspect
import io
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import trio_uring
from tests.helpers import run_native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

GIB: Final = 1 << 30
SECONDS_PER_CALL: Final = 10
SCALE: Final = settings().max_examples / 100  # of a profile

# What is in the files

ENCODINGS: Final = {
    "utf-8": "é日🎉",
    "utf-8-sig": "é日🎉\ufeff",
    "utf-16": "é日🎉\ufeff",
    "utf-16-le": "é日🎉\u0a0d",
    "utf-32": "é日🎉",
    "latin-1": "é\x85ÿ",
    "ascii": "\x7f",
    "shift_jis": "日本ｱソ",  # the second byte of the last is a backslash
    "iso2022_jp": "日本",
    "utf-7": "é日🎉+",
    "hz": "中文~",
}
"""With what there is in them beside ASCII."""

PLAIN: Final = "ab \n\n\r\r"
FOREIGN: Final = "é日中🎉\ud800"  # some encodings do not have it
MALFORMED: Final = [
    b"\xff",
    b"\xc3",  # the first of two bytes
    b"\xe6\x97",  # two of three
    b"\xed\xa0\x80",  # a surrogate
    b"\x00\xd8",  # half of a pair
    b"\xff\xfe",
    b"\x1b",
    b"\x1b$B",  # a shift with no way back
    b"~{",
    b"~",
    b"+2D0",
    b"+",
    b"\x93",
]
ERRORS: Final = [None, "strict", "replace", "ignore", "surrogateescape", "surrogatepass", "backslashreplace"]
NEWLINES: Final = [None, "", "\n", "\r", "\r\n"]
BOUNDARIES: Final = [7, 64, 4096, 8192, 8192]


class Fill(NamedTuple):
    """Lines of so many bytes, up to ``short`` bytes before the next multiple of ``boundary``; what may be cut in two.

    That comes last, a text, or the number of a character in `ENCODINGS`.
    """

    boundary: int
    short: int
    line: int
    then: str | int

    def after(self, size: int, unit: int) -> str:
        """What comes after ``size`` bytes, if a character has ``unit`` bytes."""
        missing = -(size + self.short) % self.boundary // unit
        lines = ("x" * (self.line - 1) + "\n") * (missing // self.line + 1)
        return lines[:missing]


THEN: Final = st.sampled_from(["", "\r\n", "\r", "\n", 0, 0, 1])
FILLS: Final = st.builds(
    Fill, st.sampled_from(BOUNDARIES), st.integers(0, 3), st.sampled_from([1, 2, 30, 100, 5000, 100_000]), THEN
)


def content_of(parts: Iterable[str | bytes | Fill], encoding: str) -> bytes:
    encoder = codecs.getincrementalencoder(encoding)("replace")
    unit = {"utf-16": 2, "utf-16-le": 2, "utf-32": 4}.get(encoding, 1)
    content = bytearray()
    for part in parts:
        if isinstance(part, bytes):
            content += part
        elif isinstance(part, str):
            content += encoder.encode(part)
        else:
            content += encoder.encode(part.after(len(content), unit))
            then = part.then
            content += encoder.encode(then if isinstance(then, str) else ENCODINGS[encoding][then:][:1])
    return bytes(content + encoder.encode("", True))


def texts(encoding: str, clean: bool) -> st.SearchStrategy[str]:
    alphabet = PLAIN + ENCODINGS[encoding]
    return st.text(alphabet if clean else alphabet + FOREIGN, max_size=12)


def contents(encoding: str, clean: bool) -> st.SearchStrategy[list[Any]]:
    part = texts(encoding, clean) | FILLS
    return st.lists(part if clean else part | st.sampled_from(MALFORMED), min_size=1, max_size=12)


# What is wrong with some Pythons


def _read1_forgets_writes() -> bool:
    """Text is read with it, too."""
    file = io.BufferedRandom(io.BytesIO(b"old"))  # type: ignore[arg-type]
    file.write(b"new")
    return file.read1(3) == b"old"


READ1_FORGETS_WRITES: Final = _read1_forgets_writes()
CRASHES_IN_THE_MIDDLE: Final = "iso2022_jp"  # where it does not know which set of characters it is in


# What is compared

Step = "Callable[[Any], Any]"


async def result_of(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def failure(exc: Exception) -> Any:
    if isinstance(exc, AttributeError):  # which names the class
        return (type(exc),)
    if isinstance(exc, OSError):
        return type(exc), exc.args, exc.filename
    if isinstance(exc, UnicodeEncodeError):
        return type(exc), exc.args[1:]  # after a BOM, io has UTF-16 written by another codec
    return type(exc), exc.args


async def outcome_of(step: Callable[[Any], Any], file: Any) -> Any:
    """What a call on one of the files comes to."""
    with trio.fail_after(SECONDS_PER_CALL):
        try:
            value = await result_of(step(file))
        except trio.TooSlowError:
            raise
        except Exception as exc:
            return failure(exc)
    return type(value), value


class Opening(NamedTuple):
    """How a file is opened, and what is in it.

    Attributes:
        clean: nothing that cannot be encoded or decoded.
        by: "path", or an "fd" at position ``start``, which may be "borrowed".
        lasts: how many calls it is not closed or detached.
    """

    parts: list[str | bytes | Fill]
    clean: bool
    lasts: int
    by: str
    start: int
    mode: str
    buffering: int
    encoding: str | None = None
    errors: str | None = None
    newline: str | None = None

    @property
    def codec(self) -> str:
        return self.encoding or "utf-8"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of `open` after the first."""
        return self.mode, self.buffering, self.encoding, self.errors, self.newline, self.by != "borrowed fd"


MODES: Final = ["r", "r", "r", "r", "r+", "r+", "r+", "w", "w+", "w+", "a", "a+", "x+"]
WAYS: Final = ["path", "path", "path", "fd", "borrowed fd"]


@st.composite
def openings(draw: st.DrawFn, modes: Sequence[str] = MODES, by: Sequence[str] = WAYS) -> Opening:
    how = draw(st.sampled_from(by))
    start = 0 if how == "path" else draw(st.sampled_from([0, 0, 1, 5]))
    mode = draw(st.sampled_from(modes))
    binary = draw(st.integers(0, 2)) == 2
    encoding = None if binary else draw(st.sampled_from(list(ENCODINGS)))
    clean = draw(st.booleans())
    parts = draw(contents(encoding or "utf-8", clean))
    lasts = draw(st.integers(0, 60))
    if binary:
        buffering = draw(st.sampled_from([-1, -1, 0, 2, 7, 64]))
        return Opening(parts, clean, lasts, how, start, mode + "b", buffering)
    buffering = draw(st.sampled_from([-1, -1, 1, 2, 7, 64]))
    errors, newline = draw(st.sampled_from(ERRORS)), draw(st.sampled_from(NEWLINES))
    return Opening(parts, clean, lasts, how, start, mode, buffering, encoding, errors, newline)


class Side:
    """One of the two: what is open, and where it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None
        self.fd = -1  # what it has been made of, if it was made of one; or the other end of a pipe

    def begin(self, opening: Opening) -> Any:
        """Puts on disk what there is to be; returns what to open."""
        if opening.by == "path" and "x" in opening.mode:
            return self.path
        self.path.write_bytes(content_of(opening.parts, opening.codec))
        if opening.by == "path":
            return self.path
        access = os.O_RDWR if "+" in opening.mode else os.O_RDONLY if "r" in opening.mode else os.O_WRONLY
        self.fd = os.open(self.path, access)
        os.lseek(self.fd, opening.start, os.SEEK_SET)
        return self.fd


def extents(path: Path) -> Iterator[tuple[int, bytes]]:
    """What is in a sparse file beside zeros, and its size."""
    with path.open("rb", 0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        with contextlib.suppress(OSError):  # holes up to the end
            while at < size:
                at = file.seek(at, os.SEEK_DATA)
                data = file.read(1 << 16)
                if data.strip(b"\0"):
                    yield at, data
                at += len(data)
    yield size, b""


# The machines

LOOKS: Final = ["closed", "encoding", "errors", "newlines", "line_buffering", "closefd", "mode"]
ASKS: Final = ["isatty", "readable", "writable", "seekable"]
COUNTS: Final = st.integers(0, 10) | st.sampled_from([63, 64, 100, 1000, 4095, 4096, 5000, 8190, 8192, 9000])
SIZES: Final = COUNTS | COUNTS | st.sampled_from([-1, None])
TIMES: Final = st.sampled_from([1, 1, 1, 2, 7, 64, 1000, 4097, 8192])
STARTS: Final = [0, 4 * GIB - 4096, 5 * GIB]
OFFSETS: Final = (
    st.just(0)
    | st.integers(-2, 20)
    | st.builds(lambda boundary, d: boundary + d, st.sampled_from(BOUNDARIES), st.integers(-2, 2))
)


READS: Final = ["read", "read1", "readall", "readinto", "readinto1", "readline", "readlines", "peek"]
OTHERS: Final = ["tell", "flush", "detach", "fileno"]


def when(condition: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A rule for files that are open."""
    return precondition(lambda self: not self.closed and condition(self))


reading = when(lambda self: self.fruitful)
reading_bytes = when(lambda self: self.fruitful and self.binary)
reading_buffered = when(lambda self: self.fruitful and self.binary and self.buffered)
writing = when(lambda self: self.writable)
opened = when(lambda self: True)
knowing_where = when(lambda self: not self.lost)
at_last = precondition(lambda self: self.calls >= self.opening.lasts)


class Twins(RuleBasedStateMachine):
    """The same calls on both.

    They may differ in this:

    * The words of an error of a file that is closed: there are several, and often two things wrong at a time.
    * What `tell` says of text, until the next `seek`: after bytes that cannot be decoded `io` names the start of the
      last chunk that could be, from where nobody would go on; after ``readlines`` it refuses, as it does after
      ``next``.
    * Mode ``a+``, a write that is not flushed: `io` goes on as if it were where the last read was, serves what it has
      in its buffer from there, and is wrong. So each is flushed.
    * A position after a write and a seek that fails: ``seek(0, 1)`` of `io` is not what `tell` says. So a seek that may
      fail comes after a flush.
    * UTF-16 and UTF-32 that begin with what cannot be encoded: `io` takes the BOM for written. So they do not.
    * ``newlines`` once it has been asked where it is: on the way to the answer `io` forgets what it has seen.
    * ``seekable``, if nobody asked before the first seek that fails: `io` takes that for an answer.

    Attributes:
        closed: they are.
        unflushed: something may not have been flushed.
        lost: they may not agree on the position.
        told: they have been asked for it.
        in_vain: how often at the end of the file somebody has tried to read on.
    """

    open_file: ClassVar[Any] = staticmethod(trio_uring.open_file)
    cookies = Bundle("cookies")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.sides = [Side(self.directory / "of io"), Side(self.directory / "ours")]
        self.calls = 0
        self.closed = self.unflushed = self.lost = self.told = False
        self.in_vain = 0

    @initialize(opening=openings())
    def open(self, opening: Opening) -> None:
        self.opening = opening
        self.open_both(*(side.begin(opening) for side in self.sides))
        self.check_disk()

    def open_both(self, of_io: Any, ours: Any) -> None:
        self.sides[0].file = open(of_io, *self.opening.arguments)  # noqa: SIM115 - closed by a rule
        self.sides[1].file = trio.from_thread.run(self.open_file, ours, *self.opening.arguments)
        self.both(lambda file: file.seekable())

    def both(self, step: Callable[[Any], Any], *, files: Iterable[Any] = ()) -> Any:
        """Makes a call on both files, or on those given, and returns what it comes to."""
        self.calls += 1
        expected, found = (
            trio.from_thread.run(outcome_of, step, file) for file in files or [side.file for side in self.sides]
        )
        if self.closed and issubclass(expected[0], Exception):
            expected, found = expected[:1], found[:1]
        assert found == expected, f"io: {expected!r:.500}, ours: {found!r:.500}"
        self.lost = self.lost or issubclass(expected[0], UnicodeError)
        return expected

    def check_disk(self) -> None:
        theirs, ours = self.sides
        assert ours.path.read_bytes() == theirs.path.read_bytes()

    def flushes(self, outcome: Any) -> None:
        if not issubclass(outcome[0], Exception):
            self.unflushed = False
            self.check_disk()

    @property
    def binary(self) -> bool:
        return not isinstance(self.sides[0].file, io.TextIOBase)

    @property
    def buffered(self) -> bool:
        return not isinstance(self.sides[0].file, io.RawIOBase)

    @property
    def readable(self) -> bool:
        return "r" in self.opening.mode or "+" in self.opening.mode

    @property
    def fruitful(self) -> bool:
        """There may be something to read."""
        return self.readable and self.in_vain < 2

    @property
    def writable(self) -> bool:
        return "r" not in self.opening.mode or "+" in self.opening.mode

    def teardown(self) -> None:
        try:
            if self.sides[1].file is not None:
                self.finish()
        finally:
            shutil.rmtree(self.directory)

    def finish(self) -> None:
        self.close()
        self.close()  # nothing happens
        self.check_disk()
        for side in self.sides:
            if self.opening.by == "borrowed fd":
                os.close(side.fd)

    # Reading

    def reads(self, step: Callable[[Any], Any], size: int | None = -1, *, lines: int = 0, once: bool = False) -> Any:
        """A call that reads.

        Args:
            step: the call.
            size: how many characters or bytes it asks for; by default for all.
            lines: how many lines it asks for.
            once: it is content with less than it asks for.
        """
        if READ1_FORGETS_WRITES and self.unflushed and (once or not self.binary):
            self.flush()
        outcome = self.both(step)
        self.in_vain += outcome[1:] in [(b"",), ("",), ([],)]
        return outcome

    @reading
    @rule(size=SIZES)
    def read(self, size: int | None) -> None:
        self.reads(lambda file: file.read(size), size)

    @reading
    @rule(size=SIZES)
    def readline(self, size: int | None) -> None:
        self.reads(lambda file: file.readline() if size is None else file.readline(size), size, lines=1)

    @reading
    @rule(hint=SIZES)
    def readlines(self, hint: int | None) -> None:
        self.reads(lambda file: file.readlines(hint))
        self.lost = self.lost or not self.binary

    @reading
    @rule(lines=st.sampled_from([1, 2, 3, 200]))
    def iterate(self, lines: int) -> None:
        async def step(file: Any) -> Any:
            found = []
            if hasattr(file, "__aiter__"):
                async for line in file:
                    found.append(line)
                    if len(found) == lines:
                        break
            else:  # not with next(): see above
                while len(found) < lines and (line := file.readline()):
                    found.append(line)
            return found

        self.reads(step, lines=lines)

    @reading_bytes
    @rule(size=COUNTS, code=st.sampled_from("BBH"))
    def readinto(self, size: int, code: str) -> None:
        self.read_into("readinto", size, code)

    @reading_buffered
    @rule(size=COUNTS, code=st.sampled_from("BBH"))
    def readinto1(self, size: int, code: str) -> None:
        self.read_into("readinto1", size, code)  # it may wait, even if it has something

    def read_into(self, name: str, size: int, code: str) -> None:
        async def step(file: Any) -> Any:
            buffer = array.array(code, [0] * size)
            return await result_of(getattr(file, name)(buffer)), buffer.tobytes()

        self.reads(step, 2 * size)

    @reading_buffered
    @rule(size=SIZES)
    def read1(self, size: int | None) -> None:
        self.reads(lambda file: file.read1() if size is None else file.read1(size), size, once=True)

    @reading_buffered
    @rule(size=COUNTS)
    def peek(self, size: int) -> None:
        self.reads(lambda file: file.peek(size), once=True)

    @when(lambda self: self.fruitful and not self.buffered)
    @rule()
    def readall(self) -> None:
        self.reads(lambda file: file.readall())

    # Writing

    def writes(self, step: Callable[[Any], Any], text: str = "") -> None:
        self.unflushed = True
        kind = self.both(step)[0]
        if kind is int and self.opening.buffering == 1 and not self.binary and {"\n", "\r"} & set(text):
            self.check_disk()  # a line end flushes
        if "a+" in self.opening.mode:
            self.flush()

    def texts(self) -> st.SearchStrategy[str]:
        clean = self.opening.clean or self.opening.encoding in ("utf-16", "utf-32")
        return texts(self.opening.codec, clean)

    @writing
    @rule(data=st.data(), times=TIMES)
    def write(self, data: st.DataObject, times: int) -> None:
        text = data.draw(self.texts()) * times

        async def step(file: Any) -> Any:
            if not self.binary:
                return await result_of(file.write(text))
            content = bytearray(text.encode("utf-8", "surrogatepass"))
            count = await result_of(file.write(content))
            content[:] = b"#" * len(content)  # it has been copied
            return count

        self.writes(step, text)

    @writing
    @rule(data=st.data())
    def writelines(self, data: st.DataObject) -> None:
        lines: list[Any] = data.draw(st.lists(self.texts(), max_size=4))
        if self.binary:
            lines = [line.encode("utf-8", "surrogatepass") for line in lines]
        self.writes(lambda file: file.writelines(iter(lines)))

    @writing
    @rule()
    def flush(self) -> None:
        self.flushes(self.both(lambda file: file.flush()))

    @writing
    @rule(size=st.none() | OFFSETS)
    def truncate(self, size: int | None) -> None:
        self.flushes(self.both(lambda file: file.truncate() if size is None else file.truncate(size)))

    # Positions

    @knowing_where
    @rule(target=cookies)
    def tell(self) -> Any:
        self.told = True
        outcome = self.both(lambda file: file.tell())
        return outcome[1] if outcome[0] is int else multiple()

    @opened
    @rule(cookie=cookies)
    def seek_back(self, cookie: int) -> None:
        self.seek(cookie)

    @opened
    @rule(offset=OFFSETS)
    def seek(self, offset: int) -> None:
        if self.opening.encoding == CRASHES_IN_THE_MIDDLE and offset and not offset >> 64 & 0xFFFFFFFF:
            return  # a position without a state
        if self.binary and offset >= 1 << 63:
            return  # a cookie of a text file that is detached
        if offset < 0 and self.unflushed:
            self.flush()
        if self.both(lambda file: file.seek(offset))[0] is int:
            self.lost = False
            self.in_vain = 0

    @knowing_where
    @rule(
        offset=st.just(0) | st.integers(-10, 10) | st.integers(-9000, 100),
        whence=st.sampled_from([1, 1, 1, 2, 2, 2, 3, 4, 5, -1]),
    )
    def seek_from(self, offset: int, whence: int) -> None:
        if self.opening.encoding == CRASHES_IN_THE_MIDDLE and whence == os.SEEK_CUR:
            return
        if (offset < 0 or whence > os.SEEK_END) and self.unflushed:
            self.flush()
        self.told = self.told or whence == os.SEEK_CUR
        self.both(lambda file: file.seek(offset, whence))
        self.in_vain = 0

    @reading
    @rule(size=COUNTS, further=COUNTS)
    def read_again(self, size: int, further: int) -> None:
        self.read(size)
        if not self.lost:
            cookie = self.tell()
            self.read(further)
            if isinstance(cookie, int):
                self.seek(cookie)
                self.read(further)

    # The rest

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*LOOKS, *ASKS]))
        if name == "newlines" and self.told:
            return
        self.both(lambda file: getattr(file, name)() if name in ASKS else getattr(file, name))

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """What a file does not have, does not do, or does no more."""
        names = [*READS, "write", *(OTHERS if self.closed else ())]
        if not self.closed:
            may = [name for name in READS if hasattr(self.sides[0].file, name)] if self.readable else []
            names = [name for name in names if name not in may]
        name = data.draw(st.sampled_from(names))
        arguments: tuple[Any, ...] = ()
        if "readinto" in name:
            arguments = (bytearray(3),)
        elif name == "write":
            arguments = ("text" if self.binary else b"bytes",)
        self.both(lambda file: getattr(file, name)(*arguments))
        self.lost = self.lost or name == "readlines"

    @knowing_where
    @rule()
    def tell_below(self) -> None:
        if self.unflushed:
            self.flush()  # io has a layer more that keeps text
        self.both(lambda file: (file.raw if self.binary else file.buffer).tell())

    @opened
    @at_last
    @rule()
    def detach(self) -> None:
        below: list[Any] = []

        async def step(file: Any) -> None:
            below.append(await result_of(file.detach()))

        self.flushes(self.both(step))
        if below:
            tops = [side.file for side in self.sides]
            for name in ["read", "tell", "flush", "detach", "readable", "fileno"]:
                self.both(partial(lambda name, file: getattr(file, name)(), name), files=tops)
            for side, file in zip(self.sides, below, strict=True):
                side.file = file

    @opened
    @at_last
    @rule()
    def close(self) -> None:
        self.both(lambda file: file.aclose() if hasattr(file, "aclose") else file.close())
        self.closed = True
        if self.opening.by == "borrowed fd":
            self.both(lambda fd: os.lseek(fd, 0, os.SEEK_CUR), files=[side.fd for side in self.sides])


class FromPipes(Twins):
    """Pipes with the same pieces in them; nothing is read that would have to wait."""

    @initialize(opening=openings(["r"], by=["fd"]))
    def open(self, opening: Opening) -> None:
        if opening.encoding and opening.errors in (None, "strict") and not opening.clean:
            opening = opening._replace(errors="replace")
        self.opening = opening
        self.content = content_of(opening.parts, opening.codec)
        self.fed = b""
        self.consumed = 0  # characters or bytes
        self.ended = False
        read_ends = []
        for side in self.sides:
            read_end, side.fd = os.pipe()
            read_ends.append(read_end)
        self.open_both(*read_ends)

    def check_disk(self) -> None:
        pass

    def finish(self) -> None:
        self.end()
        self.close()

    @when(lambda self: not self.ended)
    @rule(size=st.integers(1, 5) | st.sampled_from([64, 4096, 9000]))
    def feed(self, size: int) -> None:
        self.in_vain = 0
        piece = self.content[len(self.fed) :][:size]
        self.fed += piece
        for side in self.sides:
            os.write(side.fd, piece)

    @precondition(lambda self: self.fed == self.content)
    @rule()
    def end(self) -> None:
        if not self.ended:
            self.ended = True
            for side in self.sides:
                os.close(side.fd)

    def unread(self) -> Any:
        if self.binary:
            return self.fed[self.consumed :]
        decoder: Any = codecs.getincrementaldecoder(self.opening.codec)(self.opening.errors or "strict")
        if not self.opening.newline:
            decoder = io.IncrementalNewlineDecoder(decoder, self.opening.newline is None)
        try:
            return decoder.decode(self.fed)[self.consumed :]
        except UnicodeError:  # there is no BOM
            return ""

    def waits(self, size: int | None, lines: int, once: bool) -> bool:
        """Would io wait?"""
        if self.closed or self.ended:
            return False
        unread = self.unread()
        if once or (self.opening.buffering == 0 and not lines and size not in (-1, None)):
            return not unread
        if size is not None and 0 <= size <= len(unread) - (size == 0 and lines > 0):
            return False  # for a line of no characters io reads, too
        if self.binary:
            return not 0 < lines <= unread.count(b"\n")
        newline = self.opening.newline
        ends = sum(map(unread.count, "\n\r" if newline == "" else [newline or "\n"]))
        return not 0 < lines <= ends - unread.count("\r\n") * (newline == "")

    def reads(self, step: Callable[[Any], Any], size: int | None = -1, *, lines: int = 0, once: bool = False) -> Any:
        if self.waits(size, lines, once):
            return
        kind, *value = super().reads(step, size, lines=lines, once=once)
        if kind is tuple:  # of readinto
            self.consumed += value[0][0]
        elif kind is list:
            self.consumed += sum(map(len, value[0]))
        elif kind in (bytes, str):
            self.consumed += len(value[0])

    @reading_buffered
    @rule(size=COUNTS)
    def peek(self, size: int) -> None:
        if not self.waits(None, 0, True):
            self.both(lambda file: file.peek(size))

    @when(lambda self: self.ended)
    @at_last
    @rule()
    def detach(self) -> None:
        super().detach()


class ToPipes(Twins):
    """Pipes from which the same comes out."""

    @initialize(opening=openings(["w", "w", "a", "x"], by=["fd"]))
    def open(self, opening: Opening) -> None:
        self.opening = opening
        write_ends = []
        for side in self.sides:
            side.fd, write_end = os.pipe()
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
            os.set_blocking(side.fd, False)
            write_ends.append(write_end)
        self.received = [b"", b""]
        self.hung_up = False
        self.open_both(*write_ends)

    def both(self, step: Callable[[Any], Any], *, files: Iterable[Any] = ()) -> Any:
        outcome = super().both(step, files=files)
        self.drain()
        return outcome

    def drain(self) -> None:
        if self.hung_up:
            return
        for number, side in enumerate(self.sides):
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(side.fd, 1 << 20):
                    self.received[number] += piece

    def check_disk(self) -> None:
        assert self.received[1] == self.received[0]

    def finish(self) -> None:
        self.close()
        self.check_disk()
        self.hang_up()

    @when(lambda self: self.binary)  # io has a layer more that keeps text, and hears of it later
    @at_last
    @rule()
    def hang_up(self) -> None:
        if not self.hung_up:
            self.hung_up = True
            for side in self.sides:
                os.close(side.fd)


class Writers(Twins):
    """Two that append to one file."""

    @initialize(opening=openings(["a", "a", "a+"], by=["path"]))
    def open(self, opening: Opening) -> None:
        super().open(opening)
        self.others = [side.file for side in self.sides]
        self.open_both(*(side.path for side in self.sides))

    @opened
    @rule()
    def switch(self) -> None:
        if not self.binary and not self.closed:
            self.flush()  # io has a layer more that keeps text: what is on disk in between differs
        here = [side.file for side in self.sides]
        for side, file in zip(self.sides, self.others, strict=True):
            side.file = file
        self.others = here

    @when(lambda self: not self.readable)  # one may read what the other has cut off
    @rule(size=st.none() | st.integers(-1, 100))
    def truncate(self, size: int | None) -> None:
        super().truncate(size)

    def finish(self) -> None:
        self.close()
        self.switch()
        self.closed = False
        self.close()
        self.check_disk()


class Sparse(Twins):
    """What is beyond 4 GiB."""

    @initialize(opening=openings(["r", "r+", "r+"], by=["path"]))
    def open(self, opening: Opening) -> None:
        content = content_of(opening.parts, opening.codec)
        for side in self.sides:
            with side.path.open("wb") as file:
                for start in STARTS:
                    file.seek(start)
                    file.write(content)
        self.opening = opening
        self.open_both(*(side.path for side in self.sides))

    def check_disk(self) -> None:
        theirs, ours = (list(extents(side.path)) for side in self.sides)
        assert ours == theirs

    def reads(self, step: Callable[[Any], Any], size: int | None = -1, *, lines: int = 0, once: bool = False) -> Any:
        if once or (size is not None and size >= 0):  # else it reads GiBs
            super().reads(step, size, lines=lines, once=once)

    @opened
    @rule(start=st.sampled_from(STARTS), offset=OFFSETS)
    def seek_far(self, start: int, offset: int) -> None:
        self.seek(start + offset)

    @writing
    @rule(size=st.sampled_from([None, *STARTS]))
    def truncate(self, size: int | None) -> None:
        super().truncate(size)


# Opening


def furnish(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "directory").mkdir(parents=True)
    (directory / "file").write_bytes(b"content\r\n")
    (directory / "link").symlink_to("file")
    (directory / "dangling").symlink_to("nowhere")


async def what_was_opened(file: Any) -> Any:
    """What can be seen of it; it is closed. The fd's flags are those of `fcntl`."""
    seen = [await outcome_of(partial(lambda name, file: getattr(file, name), name), file) for name in [*LOOKS, "name"]]
    seen.append(fcntl.fcntl(file.fileno(), fcntl.F_GETFL))
    seen.append(os.get_inheritable(file.fileno()))
    calls = [*ASKS, "tell", "read", "aclose" if hasattr(file, "aclose") else "close"]
    return seen + [await outcome_of(partial(lambda name, file: getattr(file, name)(), name), file) for name in calls]


ODD: Final[list[dict[str, Any]]] = [
    *({"name": name} for name in ["file", "missing", "directory", "link", "dangling", "file/below", "", "nul\0"]),
    *({"mode": mode} for mode in ["", "+", "rw", "rr", "rbt", "r+w", "U", "rU", "b", "r++"]),
    *({"buffering": buffering} for buffering in [0, 1, -2]),
    *({"encoding": encoding} for encoding in ["nonsense", "hex", "UTF16", "", "nul\0"]),
    *({"errors": errors} for errors in ["nonsense", ""]),
    *({"newline": newline} for newline in ["x", "\n\r"]),
    {"closefd": False},
]


@settings(max_examples=round(300 * SCALE), deadline=None)
@given(
    form=st.sampled_from([str, os.fsencode, Path]),
    mode=st.sampled_from([mode + kind for mode in "rwax" for kind in ["", "b", "+", "+b", "t"]]),
    odd=st.just({}) | st.sampled_from(ODD),  # one thing: of two mistakes either may be found first
)
def test_opening(
    tmp_path_factory: pytest.TempPathFactory, form: Callable[[str], Any], mode: str, odd: dict[str, Any]
) -> None:
    how = {"name": "new" if "x" in mode else "file", "mode": mode, "buffering": -1, **odd}
    directory = tmp_path_factory.getbasetemp() / "opening"
    path = form(f"{directory}/{how.pop('name')}")

    async def compare() -> None:
        outcomes, trees = [], []
        for opening in open, trio_uring.open_file:
            furnish(directory)
            opened: list[Any] = []

            async def step(opening: Any) -> None:
                opened.append(await result_of(opening(path, **how)))  # noqa: B023

            failed = await outcome_of(step, opening)
            outcomes.append(await what_was_opened(opened[0]) if opened else failed)
            trees.append({each: each.read_bytes() for each in directory.rglob("*") if each.is_file()})
        assert outcomes[1] == outcomes[0]
        if opened or outcomes[0][0] is OSError:  # io may have emptied the file before it sees what is wrong
            assert trees[1] == trees[0]

    run_native(compare)


# The tests of the machines


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    chosen = settings(max_examples=round(examples * SCALE), stateful_step_count=steps, deadline=None)
    run_native(trio.to_thread.run_sync, partial(run_state_machine_as_test, machine, settings=chosen))


@pytest.mark.seconds(60 * SCALE)
def test_files() -> None:
    run_machine(Twins, 600, 30)


@pytest.mark.parametrize("machine", [FromPipes, ToPipes, Writers, Sparse])
@pytest.mark.seconds(60 * SCALE)
def test_machine(machine: type[Twins]) -> None:
    run_machine(machine, 150, 30)
