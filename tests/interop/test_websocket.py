"""trio-websocket, unchanged, on the ring."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import trio
import trio_websocket

from tests.interop.servers import in_flight, on_the_ring

pytestmark = pytest.mark.native("it knows nothing of a ring, so it must be the run's")

LARGE = os.urandom(500_000)


async def handle(request: Any) -> None:
    websocket = await request.accept()
    try:
        while True:
            message = await websocket.get_message()
            await websocket.send_message(" ".join(in_flight()) if message == "waiting" else message)
    except trio_websocket.ConnectionClosed:
        pass


async def test_messages_both_ways() -> None:
    async with on_the_ring(), trio.open_nursery() as nursery:
        serve: Any = partial(trio_websocket.serve_websocket, handle, "127.0.0.1", 0, None)
        server = await nursery.start(serve)
        async with trio_websocket.open_websocket("127.0.0.1", server.port, "/", use_ssl=False) as websocket:
            for message in ("hello", b"bytes", LARGE):
                await websocket.send_message(message)
                assert await websocket.get_message() == message
            await websocket.send_message("waiting")
            assert "recv" in (await websocket.get_message()).split()
        assert websocket.closed is not None
        assert websocket.closed.code == 1000
        nursery.cancel_scope.cancel()


async def test_many_clients() -> None:
    answers: list[int] = []

    async def talk(number: int) -> None:
        async with trio_websocket.open_websocket("127.0.0.1", server.port, "/", use_ssl=False) as websocket:
            for step in range(10):
                await websocket.send_message(f"{number} {step}")
                assert await websocket.get_message() == f"{number} {step}"
        answers.append(number)

    async with on_the_ring(200), trio.open_nursery() as servers:
        serve: Any = partial(trio_websocket.serve_websocket, handle, "127.0.0.1", 0, None)
        server = await servers.start(serve)
        async with trio.open_nursery() as clients:
            for number in range(20):
                clients.start_soon(talk, number)
        servers.cancel_scope.cancel()
    assert sorted(answers) == list(range(20))
