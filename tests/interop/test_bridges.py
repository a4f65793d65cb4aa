"""asyncio inside of trio, and trio's functions from functions that are not async: on the ring."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import greenback
import pytest
import trio
import trio.testing
import trio_asyncio

import trio_uring
import trio_uring.anyio
from tests.interop.servers import on_the_ring
from trio_uring import lowlevel

if TYPE_CHECKING:
    from pathlib import Path

native = pytest.mark.native("it knows nothing of a ring, so it must be the run's")


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def ask_from_asyncio(port: int, path: Path) -> tuple[bytes, bytes]:
    """Streams of asyncio, and a file of ours by way of trio."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\n")
    answer = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    await writer.wait_closed()
    return answer, await trio_asyncio.trio_as_aio(trio_uring.read_file)(path)


@native
async def test_trio_asyncio(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    async with on_the_ring(), trio.open_nursery() as nursery:
        listeners: Any = await nursery.start(trio.serve_tcp, echo, 0)
        port = listeners[0].socket.getsockname()[1]
        async with trio_asyncio.open_loop():
            ask: Any = trio_asyncio.aio_as_trio(ask_from_asyncio)
            assert await ask(port, tmp_path / "file") == (b"hello\n", b"content")
        nursery.cancel_scope.cancel()


@native
async def test_anyio_in_the_asyncio_of_trio_asyncio(tmp_path: Path) -> None:
    """There anyio's backend is asyncio's, though trio runs."""

    async def refuse() -> None:
        with pytest.raises(RuntimeError, match="needs anyio's trio backend"):
            await trio_uring.anyio.open_file(tmp_path / "file", "w")

    async with trio_asyncio.open_loop():
        run: Any = trio_asyncio.aio_as_trio(refuse)
        await run()


ANYIOS_FILES = """\
import trio_asyncio  # before anyio's backend asks for asyncio's functions: it replaces some
import anyio
import trio_uring

async def in_asyncio():
    async with await anyio.open_file("file", "w") as file:
        await file.write("con")
    async with await anyio.Path("file").open("a") as file:
        await file.write("tent")

async def main():
    async with trio_asyncio.open_loop():
        await trio_asyncio.aio_as_trio(in_asyncio)()
    before = trio_uring.statistics().sqes
    print(await anyio.Path("file").read_text(), trio_uring.statistics().sqes > before)

trio_uring.install(trio_uring.RingConfig(mode="require"), files=True)
trio_asyncio.run(main)
"""


def test_anyios_files_in_the_asyncio_of_trio_asyncio(tmp_path: Path) -> None:
    """There they are anyio's, also if its names lead here."""
    command = [sys.executable, "-c", ANYIOS_FILES]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=25)
    assert done.stdout == "content True\n", done.stderr


async def test_greenback(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def read() -> bytes:
        fd = greenback.await_(lowlevel.openat(tmp_path / "file", os.O_RDONLY))
        try:
            buffer = bytearray(100)
            return bytes(buffer[: greenback.await_(lowlevel.read(fd, buffer, 0))])
        finally:
            greenback.await_(lowlevel.close(fd))

    await greenback.ensure_portal()
    assert read() == b"content"

    def wait() -> None:
        with pytest.raises(trio.Cancelled):
            greenback.await_(lowlevel.read(read_end, bytearray(1)))
        raise KeyError("it goes on")

    read_end, write_end = os.pipe()
    try:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:  # noqa: ASYNC100 - greenback awaits
                nursery.start_soon(_cancel_when_blocked, scope)
                with pytest.raises(KeyError, match="it goes on"):
                    wait()
    finally:
        os.close(read_end)
        os.close(write_end)


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()
