"""`trio_uring.anyio`: files, paths and streams over files keep what anyio says of its own, without threads."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.streams.file
import pytest
import trio
import trio.testing
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteReceiveStream, ByteSendStream
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.file import FileStreamAttribute
from anyio.streams.text import TextReceiveStream, TextSendStream

import trio_uring
import trio_uring.anyio as ours
from tests.contract.test_path import made_ready, needs_a_thread
from tests.helpers import parked
from trio_uring import AsyncFile
from trio_uring._path import RING_METHODS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path as StdlibPath

needs_derived_paths = pytest.mark.skipif(
    not hasattr(anyio.Path("."), "limiter"), reason="what is derived from a path is of its class since anyio 4.14"
)


@pytest.fixture
def path(tmp_path: StdlibPath) -> StdlibPath:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nthree")
    return path


async def without_a_thread(call: Callable[[], Awaitable[Any]]) -> None:
    assert not await needs_a_thread(call)


# Files


async def test_text_and_bytes(tmp_path: StdlibPath) -> None:
    async def use() -> None:
        async with await ours.open_file(tmp_path / "file", "w", encoding="utf-8", newline="\r\n") as file:
            assert isinstance(file, anyio.AsyncFile)
            assert await file.write("\xf6ne\ntwo\n") == 8
        async with await ours.open_file(tmp_path / "file", "rb") as binary:
            assert await binary.read() == "\xf6ne\r\ntwo\r\n".encode()
            assert await binary.seek(0) == 0
            assert await binary.readline() == "\xf6ne\r\n".encode()
            wrapped: object = binary.wrapped
            assert isinstance(wrapped, AsyncFile)
        async with await ours.open_file(tmp_path / "file", encoding="utf-8") as file:
            assert [line async for line in file] == ["\xf6ne\n", "two\n"]
        assert file.closed

    await without_a_thread(use)


async def test_attributes_of_files(path: StdlibPath) -> None:
    async with await ours.open_file(path, "rb") as file:
        attributes: Any = file
        assert attributes.extra(FileStreamAttribute.path) == path
        assert attributes.extra(FileStreamAttribute.fileno) == attributes.fileno()
        assert attributes.extra(FileStreamAttribute.file) is file.wrapped


async def test_an_open_that_fails(tmp_path: StdlibPath) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await ours.open_file(tmp_path / "nothing")
    assert caught.value.filename == str(tmp_path / "nothing")


async def test_a_cancelled_open(tmp_path: StdlibPath) -> None:
    os.mkfifo(tmp_path / "fifo")
    with anyio.move_on_after(0.01) as scope:
        await ours.open_file(tmp_path / "fifo", "wb")
    assert scope.cancelled_caught


# Paths


@pytest.mark.parametrize("name", sorted(RING_METHODS.keys() - {"is_junction"}))
async def test_methods_of_paths(name: str, tmp_path: StdlibPath) -> None:
    await without_a_thread(made_ready(name, tmp_path, ours.Path))


async def test_a_path_is_anyios(tmp_path: StdlibPath) -> None:
    path = ours.Path(tmp_path) / "file"
    assert isinstance(path, anyio.Path)
    assert (str(path), os.fspath(path)) == (str(tmp_path / "file"), str(tmp_path / "file"))
    assert path == anyio.Path(tmp_path, "file")
    assert hash(path) == hash(anyio.Path(tmp_path, "file"))
    await path.touch(0o600)
    assert stat.S_IMODE((await path.stat()).st_mode) == 0o600
    async with await path.open("w") as file:
        assert isinstance(file, anyio.AsyncFile)
        await file.write("text")
    assert await path.read_text() == "text"
    assert [each async for each in ours.Path(tmp_path).iterdir()] == [path]
    await path.chmod(0o644)
    with pytest.raises(FileNotFoundError):
        await (path.parent / "nothing").stat()


@needs_derived_paths
async def test_derived_paths(tmp_path: StdlibPath) -> None:
    path = ours.Path(tmp_path, "file")
    await path.write_bytes(b"bytes")
    derived = [path.parent, path / "x", path.with_name("y"), path.joinpath("z"), *path.parents, await path.absolute()]
    derived += [each async for each in path.parent.iterdir()]
    derived += [each async for each in path.parent.glob("*")]
    derived += [await path.rename(tmp_path / "moved")]
    assert {type(each) for each in derived} == {ours.Path}


# Streams over files


async def test_reading(path: StdlibPath) -> None:
    async def use() -> None:
        async with await ours.FileReadStream.from_path(path) as stream:
            assert isinstance(stream, ByteReceiveStream)
            assert isinstance(stream, anyio.streams.file.FileReadStream)
            assert await stream.receive(3) == b"one"
            assert await stream.tell() == 3
            assert await stream.receive() == b"\ntwo\nthree"
            for _ in range(2):
                with pytest.raises(EndOfStream):
                    await stream.receive()
            assert await stream.seek(-5, os.SEEK_END) == 8
            assert [data async for data in stream] == [b"three"]
            with pytest.raises(ValueError, match="positive"):
                await stream.receive(0)
        with pytest.raises(ClosedResourceError):
            await stream.receive()

    await without_a_thread(use)


async def test_writing(path: StdlibPath) -> None:
    async def use() -> None:
        async with await ours.FileWriteStream.from_path(path) as stream:
            assert isinstance(stream, ByteSendStream)
            assert isinstance(stream, anyio.streams.file.FileWriteStream)
            await stream.send(b"first")
        with pytest.raises(ClosedResourceError):
            await stream.send(b"more")
        async with await ours.FileWriteStream.from_path(path, append=True) as stream:
            await stream.send(b", second")
        assert path.read_bytes() == b"first, second"

    await without_a_thread(use)


async def test_attributes_of_streams(path: StdlibPath) -> None:
    async with await ours.open_file(path, "rb") as file, ours.FileReadStream(file) as stream:
        assert stream.extra(FileStreamAttribute.path) == path
        assert os.path.samestat(os.fstat(stream.extra(FileStreamAttribute.fileno)), path.stat())
        ring_file: Any = stream.extra(FileStreamAttribute.file)
        assert await ring_file.read(3) == b"one"
        assert ring_file is file.wrapped
        assert await stream.receive(4) == b"\ntwo"


async def test_a_stream_over_a_file_of_the_packages_own(path: StdlibPath) -> None:
    async with ours.FileReadStream(await trio_uring.open_file(path, "rb")) as stream:
        assert await stream.receive() == path.read_bytes()


async def test_a_stream_over_another_file(path: StdlibPath) -> None:
    wrong: Any
    with open(path, "rb") as wrong:
        for cls in (ours.FileReadStream, ours.FileWriteStream):
            with pytest.raises(TypeError, match="a file of open_file, not BufferedReader"):
                cls(wrong)


async def test_broken(tmp_path: StdlibPath) -> None:
    async with await ours.open_file("/dev/full", "wb", 0) as file:
        with pytest.raises(BrokenResourceError) as caught:
            await ours.FileWriteStream(file).send(b"x")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


async def test_a_wrong_direction(path: StdlibPath) -> None:
    """anyio takes the error of a file that cannot do it for that of one that is closed."""
    async with ours.FileWriteStream(await ours.open_file(path, "rb")) as stream:
        with pytest.raises(ClosedResourceError):
            await stream.send(b"x")


async def test_closing_is_not_cancelled(tmp_path: StdlibPath) -> None:
    stream = await ours.FileWriteStream.from_path(tmp_path / "file")
    await stream.send(b"buffered")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await stream.aclose()
    assert scope.cancelled_caught
    assert (tmp_path / "file").read_bytes() == b"buffered"


async def test_closing_waits_for_the_buffer_to_be_written(tmp_path: StdlibPath) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        stream = await ours.FileWriteStream.from_path(tmp_path / "fifo")
        await stream.send(bytes(65536))  # which fills the pipe
        await stream.send(b"buffered")
        async with trio.open_nursery() as nursery:
            closing = await parked(nursery, stream.aclose)
            closing.scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not closing.done
            assert os.read(reader, 65536) == bytes(65536)
            await closing.settled()
        assert closing.cancelled
        assert os.read(reader, 100) == b"buffered"
    finally:
        os.close(reader)


async def test_a_receive_can_be_cancelled(tmp_path: StdlibPath) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(os.open(tmp_path / "fifo", os.O_RDWR), "wb") as writer:
        async with await ours.open_file(tmp_path / "fifo", "rb", 0) as file, trio.open_nursery() as nursery:
            stream = ours.FileReadStream(file)
            assert await (await parked(nursery, stream.receive)).cancel()
            writer.write(b"hello")
            writer.flush()
            assert await stream.receive() == b"hello"


async def test_every_call_is_a_checkpoint(path: StdlibPath) -> None:
    """Those apart that a buffer serves, and closing a file with nothing to write."""
    async with await ours.FileReadStream.from_path(path) as reading:
        for call in (partial(reading.receive, 1), partial(reading.seek, 0), reading.tell):
            with trio.testing.assert_checkpoints():
                await call()
    async with await ours.FileWriteStream.from_path(path) as writing:
        with trio.testing.assert_checkpoints():
            await writing.send(bytes(1_000_000))
        await writing.send(b"x")
        with trio.testing.assert_checkpoints():
            await writing.aclose()


async def test_wrapped(path: StdlibPath) -> None:
    async def use() -> None:
        async with await ours.FileReadStream.from_path(path) as reading:
            buffered = BufferedByteReceiveStream(reading)
            assert await buffered.receive_until(b"\n", 100) == b"one"
            assert await buffered.receive_exactly(3) == b"two"
        async with TextSendStream(await ours.FileWriteStream.from_path(path), "latin-1") as writing:
            await writing.send("sch\xf6n")
        async with TextReceiveStream(await ours.FileReadStream.from_path(path), "latin-1") as text:
            assert [part async for part in text] == ["sch\xf6n"]

    await without_a_thread(use)


async def test_from_a_file_into_a_socket(path: StdlibPath) -> None:
    left, right = trio_uring.socket.socketpair()
    with contextlib.ExitStack() as stack:
        for each in (left, right):
            stack.enter_context(each)
        async with await ours.FileReadStream.from_path(path) as stream:
            async for data in stream:
                await left.send(data)
        assert await right.recv(100) == path.read_bytes()
