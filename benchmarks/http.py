"""Unchanged HTTP programs in `trio.run` and in `trio_uring.run`: Hypercorn as the server, httpx as the client."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from ._harness import compare, heading, ring_run
from ._network import HOST, on_second_core, server

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._network import Server

CONNECTIONS: Final = 64
FETCHES: Final = 50
BODY: Final = b"hello, world\n"
_REQUESTS: Final = re.compile(r"(\d+) requests in ")
_FAILURES: Final = re.compile(r"Socket errors|Non-2xx")


async def serve_hello() -> None:
    """What ``hypercorn --worker-class trio`` does in its one worker."""
    import hypercorn.trio

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})

    listener = socket.create_server((HOST, 0))
    config = hypercorn.Config()
    config.loglevel = "WARNING"
    config.bind = [f"fd://{listener.detach()}"]
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(hypercorn.trio.serve, app, config, mode="asgi"))
        print(url.rpartition(":")[2], flush=True)


def cpu_under_wrk(wrk: str, server: Server) -> float:
    """CPU seconds of the server for one request."""
    command = [wrk, "--threads=1", f"--connections={CONNECTIONS}", "--duration=1s", url_of(server)]
    start = server.cpu_time()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    elapsed = server.cpu_time() - start
    requests = _REQUESTS.search(output)
    assert requests is not None, output
    assert not _FAILURES.search(output), output
    return elapsed / int(requests[1])


def url_of(server: Server) -> str:
    return f"http://{HOST}:{server.port}/"


async def fetch(url: str, tasks: int, clock: Callable[[], float]) -> float:
    """Seconds, by a clock, for one request of a client that has so many under way. httpx goes through anyio."""
    import httpcore
    import httpx

    transport = httpx.AsyncHTTPTransport()
    # By itself it would go to trio directly; that it can do otherwise has no public name in httpx.
    transport._pool = httpcore.AsyncConnectionPool(network_backend=httpcore.AnyIOBackend())
    async with httpx.AsyncClient(transport=transport) as client:

        async def some(times: int) -> None:
            for _ in range(times):
                response = await client.get(url)
                assert response.content == BODY

        async def all_tasks(times: int) -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(some, times)

        await all_tasks(1)
        start = clock()
        await all_tasks(FETCHES // tasks)
        return (clock() - start) / (FETCHES // tasks * tasks)


def main(rounds: int) -> None:
    """The server in both runs, then the client, which fetches from the one in `trio.run`."""
    for package in ("hypercorn", "httpx"):
        if importlib.util.find_spec(package) is None:
            print(f"http: not measured: pip install {package}")
            return
    with on_second_core() as remark, server("stock", serve_hello) as stock, server("ring", serve_hello) as ring:
        heading(
            f"http: Hypercorn, its trio worker, {CONNECTIONS} connections: CPU time of the server{remark}",
            "in trio.run",
            "the same in trio_uring.run",
            "us per request",
        )
        wrk = shutil.which("wrk")
        if wrk is None:
            print("under wrk: not measured: apt-get install wrk")
        else:
            compare(
                "under wrk",
                partial(cpu_under_wrk, wrk, stock),
                partial(cpu_under_wrk, wrk, ring),
                rounds=min(rounds, 11),
                target=1.05,
            )
        heading(
            "httpx on anyio, fetching from it",
            "in trio.run",
            "the same in trio_uring.run",
            "us per request",
        )
        for tasks in (1, 10):
            for name, clock in (("", time.perf_counter), (", CPU", time.process_time)):
                compare(
                    f"{tasks} at a time{name}",
                    partial(trio.run, fetch, url_of(stock), tasks, clock),
                    partial(ring_run, fetch, url_of(stock), tasks, clock),
                    rounds=min(rounds, 15),
                    target=1.0,
                )
