"""The text layer of a file: what `io.TextIOWrapper` does, over a `Buffered` file.

The data path of a line: it comes out of an `io.StringIO` over the characters of the last *chunk*, whose C code finds
the line's end. When it does not find one, the task takes the turn and gets another chunk: the bytes of one ``read1`` of
the buffer below, through the codec's incremental decoder and `io.IncrementalNewlineDecoder`. Text that is written is
encoded at once and waits in the buffer below.

A text file's position is not a number of characters: it says where in the file to start decoding, in which state, and
how many characters to skip. `io` finds it by decoding the chunk again, and so does this: it lets an `io.TextIOWrapper`
read as many characters of the same bytes, and asks it. For that each chunk is kept with the decoder's state before it.

A read that fails half-way puts the chunks it has used back together, as one.
"""

from __future__ import annotations

import codecs
import io
import os
import struct
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from trio.lowlevel import checkpoint_if_cancelled

from ._binary_files import AsyncFile, Buffered, Reading, Turn, _Detached, as_size, lines_of, protected

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from ._binary_files import RawFile

_CHUNK_SIZE: Final = 8192
_COOKIE: Final = struct.Struct(
    "<qIII?"
)  # position, state of the decoder, bytes to feed, characters to skip, at the end?
_NO_BOM_IN_PIPES: Final = {"utf-16", "utf-32"}  # so has io it


class TextSettings(NamedTuple):
    """How text becomes bytes. What is wrong with it, `io.TextIOWrapper` has said."""

    encoding: str
    errors: str
    newline: str | None
    line_buffering: bool = False


class _Chunk(NamedTuple):
    """What was decoded at once.

    Attributes:
        state: flags of the decoder's state before it.
        kept: bytes of a character that the decoder had before it.
        data: what was decoded.
        text: what it gave.
    """

    state: int
    kept: bytes
    data: bytes
    text: str


class _ExoticLines:
    """Characters whose lines end with something else than ``\\n``; `io.StringIO` would translate them."""

    def __init__(self, text: str, end: str) -> None:
        self._text = text
        self._end = end
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int = -1) -> str:
        start = self._position
        self._position = len(self._text) if size < 0 else min(start + size, len(self._text))
        return self._text[start : self._position]

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def readline(self, limit: int = -1) -> str:
        found = self._text.find(self._end, self._position)
        size = -1 if found < 0 else found + len(self._end) - self._position
        if limit >= 0 and (size < 0 or size > limit):
            size = limit
        return self.read(size)


@protected
class TextFile(AsyncFile):
    """A text file, as `io.TextIOWrapper`.

    Args:
        buffer: the file below.
        settings: how its bytes become text.
        mode: as it was given.
    """

    __slots__ = (
        "_buffer",
        "_bytes_per_char",
        "_chars",
        "_chunk",
        "_decoder",
        "_encoder",
        "_line_ends",
        "_log",
        "_mode",
        "_settings",
    )

    def __init__(self, buffer: Buffered, settings: TextSettings, mode: str) -> None:
        self._buffer = buffer
        self._raw = buffer._raw
        self._turn = buffer._turn
        self._settings = settings
        self._mode = mode
        codec = codecs.lookup(settings.encoding)
        newline = settings.newline
        self._line_ends: Any = ("\n", "\r") if newline == "" else newline or "\n"
        self._decoder: Any = None
        if buffer.readable():
            assert codec.incrementaldecoder is not None
            self._decoder = codec.incrementaldecoder(settings.errors)
            if not newline:
                self._decoder = io.IncrementalNewlineDecoder(self._decoder, translate=newline is None)
        self._encoder: Any = None
        if buffer.writable():
            assert codec.incrementalencoder is not None
            self._encoder = codec.incrementalencoder(settings.errors)
            if buffer._tell() != 0 if buffer.seekable() else codec.name in _NO_BOM_IN_PIPES:
                self._encoder.setstate(0)  # the file has begun: no BOM
        self._log: list[_Chunk] | None = None
        self._bytes_per_char = 0.0
        self._set_chunk(None)

    @property
    def buffer(self) -> Buffered:
        """The binary file below."""
        return self._buffer

    @property
    def mode(self) -> str:
        """The mode, as it was given."""
        return self._mode

    @property
    def encoding(self) -> str:
        """The encoding's name."""
        return self._settings.encoding

    @property
    def errors(self) -> str:
        """What is done about text that cannot be decoded or encoded."""
        return self._settings.errors

    @property
    def newlines(self) -> str | tuple[str, ...] | None:
        """The line ends seen so far, if they are translated or all recognised."""
        found: str | tuple[str, ...] | None = getattr(self._decoder, "newlines", None)
        return found

    @property
    def line_buffering(self) -> bool:
        """Does a line end flush it?"""
        return self._settings.line_buffering

    @property
    def write_through(self) -> bool:
        """Does the buffer below get everything at once? Always so; `io` keeps text in a buffer of its own besides."""
        return False

    def readable(self) -> bool:
        """Can it be read?"""
        return self._buffer.readable()

    def writable(self) -> bool:
        """Can it be written?"""
        return self._buffer.writable()

    async def detach(self) -> Buffered:
        """Flushes and returns the binary file below. This one is of no use any more."""
        await self.flush()
        buffer = self._buffer
        gone = _Detached("underlying buffer has been detached")
        self._buffer, self._raw = cast("Buffered", gone), cast("RawFile", gone)
        self._set_chunk(None)
        self._turn = Turn()
        self._turn.close()
        return buffer

    # Reading

    async def read(self, size: int | None = -1, /) -> str:
        """Reads ``size`` characters, fewer only at the end of the file; without a size everything up to the end."""
        size = as_size(size)
        turn = self._turn
        if size >= 0 and turn.served < turn.limit:
            text: str = self._chars.read(size)
            if text and len(text) == size:
                turn.served += 1
                return text
            self._chars.seek(self._chars.tell() - len(text))
        self._check_readable()
        if not turn.take():
            await turn.wait()
        with Reading(self, turn):
            return await (self._read_all() if size < 0 else self._read(size))

    async def readline(self, size: int | None = -1, /) -> str:
        """Reads a line, of at most ``size`` characters. Empty at the end of the file."""
        limit = as_size(size)
        turn = self._turn
        if turn.served < turn.limit:
            line = self._line_of_chunk(limit)
            if line:
                turn.served += 1
                return line
        self._check_readable()
        if not turn.take():
            await turn.wait()
        with Reading(self, turn):
            return await self._readline(limit)

    async def _lines(self) -> AsyncGenerator[str | None, None]:
        yield None
        turn = self._turn
        ready = 0  # how many whole lines there are, while nobody else uses the file
        while True:
            ready = ready or self._lines_in_chunk()
            if ready and (turn.served < turn.limit or turn.extend()):
                batch = min(ready, turn.limit - turn.served)
                turn.served = mark = turn.served + batch
                for line in islice(self._chars, batch):
                    yield line
                    if turn.served != mark:
                        ready = 0
                        break
                else:
                    ready -= batch
            elif line := self._line_of_two_chunks():
                yield line
            else:
                ready = 0
                line = await self.readline()
                if not line:
                    return
                yield line

    def _lines_in_chunk(self) -> int:
        """How many whole lines there are to come."""
        if self._chunk is None:
            return 0
        count, start = self._chunk.text.count, self._chars.tell()
        if self._settings.newline == "":
            return count("\n", start) + count("\r", start) - count("\r\n", start)
        return count(self._line_ends, start)

    def _line_of_chunk(self, limit: int) -> str:
        """A whole line, or as much of it as may be; else nothing."""
        chars = self._chars
        line: str = chars.readline(limit)
        if line and (line.endswith(self._line_ends) or len(line) == limit):
            return line
        chars.seek(chars.tell() - len(line))
        return ""

    def _line_of_two_chunks(self) -> str:
        """A line that begins in this chunk and ends in the next one, if that has been read ahead; else nothing."""
        chunk, chars, turn = self._chunk, self._chars, self._turn
        if chunk is None or isinstance(chars, _ExoticLines) or turn.served >= turn.limit:
            return ""
        data = self._buffer._read1_ahead(_CHUNK_SIZE)
        if data is None:
            return ""
        used = chars.tell()
        start: str = chars.read()
        next_chunk = self._decode(data)
        end: str = self._chars.readline()
        if not end.endswith(self._line_ends):
            self._put_back([chunk, next_chunk], used)
            return ""
        turn.served += 1
        return start + end

    def _set_chunk(self, chunk: _Chunk | None) -> None:
        """Its text is what is read next."""
        self._chunk = chunk
        text = "" if chunk is None else chunk.text
        newline = self._settings.newline
        if newline is not None and newline.startswith("\r"):
            self._chars: Any = _ExoticLines(text, newline)
        else:
            self._chars = io.StringIO(text, "" if newline == "" else "\n")

    async def _fetch(self, hint: int = 0) -> bool:
        """Gets the next chunk; False at the end of the file."""
        size = max(_CHUNK_SIZE, int(max(self._bytes_per_char, 1.0) * hint))
        data = self._buffer._read1_ahead(size)
        if data is None:
            data = await self._buffer._read1(size)
        chunk = self._decode(data)
        return bool(data or chunk.text)

    def _decode(self, data: bytes) -> _Chunk:
        """Makes the next chunk of it."""
        decoder = self._decoder
        kept, state = decoder.getstate()
        text = decoder.decode(data, not data)
        self._bytes_per_char = len(data) / len(text) if text else 0.0
        chunk = _Chunk(state, kept, data, text)
        if self._log is not None:
            self._log.append(chunk)
        self._set_chunk(chunk)
        return chunk

    async def _read(self, size: int) -> str:
        text: str = self._chars.read(size)
        if len(text) == size:
            return text
        pieces = [text]
        missing = size - len(text)
        while missing > 0 and await self._fetch(missing):
            text = self._chars.read(missing)
            missing -= len(text)
            pieces.append(text)
        return "".join(pieces)

    async def _read_all(self) -> str:
        with Reading(self._buffer):
            data = await self._buffer._read_all()
        text: str = self._decoder.decode(data, True)
        before: str = self._chars.read()
        self._set_chunk(None)
        return before + text if before else text

    async def _readline(self, limit: int) -> str:
        line = self._line_of_chunk(limit)
        if line or (limit == 0 and self._chunk is not None and self._chunk.text):
            return line
        text = self._chars.read()
        pieces = [text]
        length = len(text)
        while await self._fetch():
            first = self._chars.read(1)
            if not first:  # a part of a character
                continue
            if first == "\n" and self._line_ends == "\r\n" and text.endswith("\r"):  # cut in two by the chunk's end
                return "".join((*pieces, first))
            self._chars.seek(0)
            text = self._chars.readline(limit - length if limit >= 0 else -1)
            pieces.append(text)
            length += len(text)
            if length == limit or text.endswith(self._line_ends):
                return "".join(pieces)
        self._set_chunk(None)
        return "".join(pieces)

    async def _readlines(self, hint: int) -> list[str]:
        self._check_readable()
        return await lines_of(self._readline, hint)

    def _begin_reading(self) -> tuple[int, list[_Chunk]]:
        self._log = log = [] if self._chunk is None else [self._chunk]
        return self._chars.tell(), log

    def _end_reading(self, mark: tuple[int, list[_Chunk]], exc: BaseException | None) -> None:
        self._log = None
        if exc is not None and not isinstance(exc, UnicodeError):  # as with io, what cannot be decoded has been read
            used, chunks = mark
            self._put_back(chunks, used)

    def _put_back(self, chunks: list[_Chunk], used: int) -> None:
        """Makes one chunk of them, of which ``used`` characters have been read."""
        if chunks:
            data, text = b"".join(chunk.data for chunk in chunks), "".join(chunk.text for chunk in chunks)
            self._set_chunk(chunks[0]._replace(data=data, text=text))
            self._chars.seek(used)

    # Writing

    async def write(self, text: str, /) -> int:
        """Writes text; returns how many characters, which are all. With line buffering a line end flushes."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._check_writable()
        buffer, encoder, turn = self._buffer, self._encoder, self._turn
        size = len(text)
        flush = self._settings.line_buffering and ("\n" in text or "\r" in text)
        if self._settings.newline in ("\r", "\r\n"):
            text = text.replace("\n", self._settings.newline)
        if turn.served < turn.limit and not flush and size <= buffer._room:
            await checkpoint_if_cancelled()
            state = encoder.getstate()
            data = encoder.encode(text)
            if len(data) <= buffer._room:
                turn.served += 1
                buffer._take(data)
                self._forget_chunk()
                return size
            encoder.setstate(state)
        async with turn:
            self._check_open()
            state = encoder.getstate()
            data = encoder.encode(text)
            try:
                await buffer._write(data, len(data), 0 if flush else buffer._size)
            except BaseException:
                encoder.setstate(state)
                raise
            self._forget_chunk()
        return size

    def _forget_chunk(self) -> None:
        if self._decoder is not None:
            self._set_chunk(None)
            self._decoder.reset()

    async def _drain(self) -> None:
        await self._buffer._drain()

    def _leave(self) -> None:
        self._buffer._leave()

    async def _flush(self) -> None:
        await self._buffer._flush()

    @property
    def _has_unwritten(self) -> bool:
        return self._buffer._has_unwritten

    # Position

    async def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to what `tell` has returned, or with 0 to the start, the current position (1) or the end (2)."""
        self._check_open()
        self._check_seekable()
        async with self._turn:
            await self._turn.checkpoint()
            self._check_open()
            if whence == os.SEEK_CUR:
                if target != 0:
                    raise io.UnsupportedOperation("can't do nonzero cur-relative seeks")
                await self._flush()
                target = self._tell()
            elif whence == os.SEEK_END:
                if target != 0:
                    raise io.UnsupportedOperation("can't do nonzero end-relative seeks")
                return await self._seek_to_end()
            elif whence != os.SEEK_SET:
                raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
            if target < 0:
                raise ValueError(f"negative seek position {target}")
            await self._seek(target)
            return target

    async def tell(self) -> int:
        """The position, for `seek`. Its value means nothing else."""
        self._check_open()
        self._check_seekable()
        async with self._turn:
            await self._turn.checkpoint()
            self._check_open()
            await self._flush()
            return self._tell()

    async def truncate(self, size: int | None = None, /) -> int:
        """Sets the file's size in bytes; by default to the position of the buffer below."""
        self._check_open()
        self._buffer._check_can_truncate()
        async with self._turn:
            self._check_open()
            return await self._buffer._truncate(size)

    def _tell(self) -> int:
        position = self._buffer._tell()
        chunk = self._chunk
        if chunk is None:
            return position
        data = chunk.kept + chunk.data
        position -= len(data)
        used = self._chars.tell()
        if not used:
            return position | chunk.state << 64
        before = b"" if position == 0 else b"\0"  # decoders are told when they are at the start of a file
        encoding, errors, newline, _ = self._settings
        chunk_again = io.TextIOWrapper(io.BytesIO(before + data), encoding, errors, newline)
        chunk_again._CHUNK_SIZE = len(data) + 1  # type: ignore[attr-defined]
        chunk_again.seek(len(before) | chunk.state << 64)
        chunk_again.read(used)
        return chunk_again.tell() - len(before) + position

    async def _seek(self, cookie: int) -> None:
        await self._flush()
        position, state, feed, skip, at_end = _COOKIE.unpack(cookie.to_bytes(_COOKIE.size, "little"))
        buffer, decoder = self._buffer, self._decoder
        here = buffer._tell()
        try:
            await buffer._seek(position, os.SEEK_SET)
            data = await buffer._read(feed) if skip else b""
        except BaseException:
            await buffer._seek(here, os.SEEK_SET)
            raise
        if decoder is not None:
            if position == state == 0:
                decoder.reset()
            else:
                decoder.setstate((b"", state))
            text = decoder.decode(data, at_end) if skip else ""
            self._set_chunk(_Chunk(state, b"", data, text))
            if len(text) < skip:
                raise OSError("can't restore logical file position")
            self._chars.seek(skip)
        self._restart_encoder(position == state == 0)

    async def _seek_to_end(self) -> int:
        await self._flush()
        position = await self._buffer._seek(0, os.SEEK_END)
        self._forget_chunk()
        self._restart_encoder(position == 0)
        return position

    def _restart_encoder(self, at_start: bool) -> None:
        if self._encoder is None:
            return
        if at_start:
            self._encoder.reset()
        else:
            self._encoder.setstate(0)

    def _check_open(self, what: str = "") -> None:
        if self._raw.closed:
            raise ValueError("I/O operation on closed file.")

    def _check_readable(self) -> None:
        self._check_open()
        if self._decoder is None:
            raise io.UnsupportedOperation("not readable")

    def _check_writable(self) -> None:
        self._check_open()
        if self._encoder is None:
            raise io.UnsupportedOperation("not writable")

    def _check_seekable(self) -> None:
        if not self.seekable():
            raise io.UnsupportedOperation("underlying stream is not seekable")
