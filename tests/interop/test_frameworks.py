"""Starlette and quart-trio, unchanged, on the ring."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import quart_trio
import trio
from starlette.applications import Starlette
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient

import trio_uring
from tests.contract.test_path import needs_a_thread
from tests.helpers import REQUIRED, installed
from tests.interop.servers import on_the_ring, serving

if TYPE_CHECKING:
    from pathlib import Path

native = pytest.mark.native("they know nothing of a ring, so it must be the run's")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    return path


def starlette(file: Path) -> Starlette:
    async def engine(request: Any) -> PlainTextResponse:
        await trio.lowlevel.checkpoint()
        return PlainTextResponse(trio_uring.statistics().engine)

    async def download(request: Any) -> FileResponse:
        return FileResponse(file, stat_result=file.stat())  # which it would ask for in a thread of its own

    async def echo(websocket: Any) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    return Starlette(routes=[Route("/", engine), Route("/file", download), WebSocketRoute("/echo", echo)])


def test_starlettes_test_client(file: Path) -> None:
    """It runs the application in a thread of its own."""
    with installed(), TestClient(starlette(file), backend="trio") as client:
        assert client.get("/").text == "io_uring"
        assert client.get("/file").content == file.read_bytes()
        with client.websocket_connect("/echo") as websocket:
            websocket.send_text("hello")
            assert websocket.receive_text() == "hello"


def test_file_response(file: Path) -> None:
    """What it does with anyio's names for files needs no thread."""

    async def main() -> None:
        async with on_the_ring(), serving(starlette(file)) as url, httpx.AsyncClient() as client:

            async def get() -> None:
                assert (await client.get(f"{url}/file")).content == file.read_bytes()
                part = await client.get(f"{url}/file", headers={"Range": "bytes=1000-100999"})
                assert (part.status_code, part.content) == (206, file.read_bytes()[1000:101_000])

            assert not await needs_a_thread(get)

    trio_uring.install(REQUIRED, files=True)
    try:
        trio.run(main)
    finally:
        trio_uring.uninstall()


@native
async def test_quart_trio(file: Path) -> None:
    app = quart_trio.QuartTrio(__name__)

    async def engine() -> str:
        return trio_uring.statistics().engine

    async def size() -> str:
        async with trio.open_nursery() as nursery:  # it is trio that runs it
            nursery.start_soon(trio.sleep, 0)
        return str(len(await trio_uring.read_file(file)))

    app.add_url_rule("/", view_func=engine)
    app.add_url_rule("/size", view_func=size)
    async with on_the_ring(), serving(app) as url, httpx.AsyncClient() as client:
        assert (await client.get(url)).text == "io_uring"
        assert (await client.get(f"{url}/size")).text == "300000"
    response = await app.test_client().get("/")
    assert await response.get_data(as_text=True) == "io_uring"
