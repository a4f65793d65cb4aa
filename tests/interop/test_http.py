"""httpx and httpcore, through trio and through anyio, and Hypercorn's trio worker: unchanged, on the ring."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anyio
import httpcore
import httpx
import pytest
import trio
import trustme

from tests.helpers import run_native
from tests.interop.servers import in_flight, on_the_ring, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]

pytestmark = pytest.mark.native("they know nothing of a ring, so it must be the run's")

LARGE = os.urandom(3_000_000)
BACKENDS = {"trio": httpcore.TrioBackend, "anyio": httpcore.AnyIOBackend}


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers with what it was sent; at ``/waiting`` with the operations in flight, and at ``/never`` not at all."""
    if scope["type"] == "lifespan":
        for step in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{step}"
            await send({"type": f"lifespan.{step}.complete"})
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] == "/never":
        await trio.sleep_forever()
    if scope["path"] == "/waiting":
        await trio.testing.wait_all_tasks_blocked()
        body = " ".join(in_flight()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


async def test_httpx() -> None:
    async with on_the_ring(), serving(app) as url, httpx.AsyncClient() as client:
        assert (await client.post(url, content=b"hello")).text == "hello"
        assert "recv" in (await client.get(f"{url}/waiting")).text.split()
        assert (await client.post(url, content=LARGE)).content == LARGE


@pytest.mark.parametrize("backend", BACKENDS)
async def test_httpcore(backend: str) -> None:
    async with (
        on_the_ring(),
        serving(app) as url,
        httpcore.AsyncConnectionPool(network_backend=BACKENDS[backend]()) as pool,
    ):
        response = await pool.request("POST", url, content=LARGE)
        assert (response.status, response.content) == (200, LARGE)
        response = await pool.request("GET", f"{url}/waiting")
        assert "recv" in response.content.decode().split()


async def test_many_at_once() -> None:
    answers: list[str] = []

    async def ask(number: int) -> None:
        answers.append((await client.post(url, content=str(number))).text)

    async with (
        on_the_ring(100),
        serving(app) as url,
        httpx.AsyncClient() as client,
        anyio.create_task_group() as tasks,
    ):
        for number in range(100):
            tasks.start_soon(ask, number)
    assert sorted(answers, key=int) == [str(number) for number in range(100)]


async def test_streams_of_unknown_length() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(LARGE), 100_000):
            yield LARGE[start : start + 100_000]
            await anyio.sleep(0)

    async with (
        on_the_ring(),
        serving(app) as url,
        httpx.AsyncClient() as client,
        client.stream("POST", url, content=parts()) as response,
    ):
        assert b"".join([part async for part in response.aiter_raw()]) == LARGE


async def test_giving_up() -> None:
    async with on_the_ring(), serving(app, graceful_timeout=0.01) as url, httpx.AsyncClient() as client:
        with anyio.move_on_after(0.05) as scope:
            await client.get(f"{url}/never")
        assert scope.cancelled_caught
        with pytest.raises(httpx.ReadTimeout):
            await client.get(f"{url}/never", timeout=0.05)
        assert (await client.post(url, content=b"still here")).text == "still here"


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, str]:
    """What Hypercorn's configuration has for them; ``ca`` is who has signed."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    paths = {name: str(tmp_path / f"{name}.pem") for name in ("certfile", "keyfile", "ca")}
    certificate.private_key_pem.write_to_path(paths["keyfile"])
    with open(paths["certfile"], "wb") as file:
        file.writelines(blob.bytes() for blob in certificate.cert_chain_pems)
    authority.cert_pem.write_to_path(paths["ca"])
    return paths


@pytest.mark.parametrize("http2", [False, True])
async def test_https(http2: bool, certificates: dict[str, str]) -> None:
    trust = ssl.create_default_context(cafile=certificates.pop("ca"))
    async with (
        on_the_ring(),
        serving(app, **certificates) as url,
        httpx.AsyncClient(verify=trust, http2=http2) as client,
    ):
        assert url.startswith("https:")
        response = await client.post(url, content=LARGE)
        assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert response.content == LARGE


@pytest.mark.parametrize("backend", BACKENDS)
async def test_https_of_httpcore(backend: str, certificates: dict[str, str]) -> None:
    trust = ssl.create_default_context(cafile=certificates.pop("ca"))
    async with (
        on_the_ring(),
        serving(app, **certificates) as url,
        httpcore.AsyncConnectionPool(ssl_context=trust, network_backend=BACKENDS[backend]()) as pool,
    ):
        response = await pool.request("POST", url, content=LARGE)
        assert (response.status, response.content) == (200, LARGE)


def test_hypercorns_own_worker_process(tmp_path: Path) -> None:
    """``hypercorn --worker-class trio``: an application that installs rings when it is imported has one."""
    application = """
        import trio_uring

        trio_uring.install(trio_uring.RingConfig(mode="require"))

        async def app(scope, receive, send):
            if scope["type"] == "http":
                engine = trio_uring.statistics().engine.encode()
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": engine})
            else:
                for step in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{step}.complete"})
    """
    (tmp_path / "application.py").write_text(textwrap.dedent(application))
    command = [sys.executable, "-m", "hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:0", "application:app"]

    async def ask(url: str) -> str:
        async with httpx.AsyncClient() as client:
            text: str = (await client.get(url)).text
            return text

    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if found := re.search(r"Running on (http://\S+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            assert run_native(ask, found[1]) == "io_uring"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
