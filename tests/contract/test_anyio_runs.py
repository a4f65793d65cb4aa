"""Runs of anyio's on the ring: `trio_uring.anyio.run`, worker threads and processes, the pytest plugin; and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.to_process
import anyio.to_thread
import pytest
import trio
import trio.testing

import trio_uring
import trio_uring.anyio as ours
from tests.contract.test_mount import without_io_uring
from tests.contract.test_path import needs_a_thread
from tests.helpers import REQUIRED, installed, manager_or_none
from trio_uring import FallbackWarning, RingConfig, UnavailableError, lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

WITHOUT_RING = RingConfig(mode="off")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    return path


async def read(path: Path) -> bytes:
    fd = await lowlevel.openat(path, os.O_RDONLY)
    try:
        buffer = bytearray(100)
        return bytes(buffer[: await lowlevel.read(fd, buffer, 0)])
    finally:
        await lowlevel.close(fd)


# run


async def engine(*args: object) -> tuple[object, ...]:
    await anyio.lowlevel.checkpoint()
    manager = manager_or_none()
    assert manager is not None
    assert manager.native
    return (trio_uring.statistics().engine, *args)


def test_run() -> None:
    assert ours.run(engine, 1, "two") == ("io_uring", 1, "two")
    assert ours.run(engine, config=REQUIRED, backend="trio") == ("io_uring",)


def test_run_hands_on_the_backends_options() -> None:
    async def main() -> float:
        before = anyio.current_time()
        await anyio.sleep(1000)
        return anyio.current_time() - before

    options = {"clock": trio.testing.MockClock(autojump_threshold=0)}
    assert ours.run(main, config=REQUIRED, backend_options=options) == 1000


def test_run_raises_what_the_function_raises() -> None:
    async def main() -> None:
        raise KeyError("nothing but this")

    with pytest.raises(KeyError, match="nothing but this"):
        ours.run(main, config=REQUIRED)


def test_run_without_a_ring() -> None:
    async def main() -> bool:
        await anyio.lowlevel.checkpoint()
        return manager_or_none() is None

    assert ours.run(main, config=WITHOUT_RING)


def test_run_where_there_can_be_no_ring() -> None:
    def auto() -> None:
        with pytest.warns(FallbackWarning, match="seccomp"):
            ours.run(anyio.sleep, 0, config=RingConfig(mode="auto"))

    without_io_uring(errno.EPERM, auto)
    with pytest.raises(UnavailableError, match="seccomp"):
        without_io_uring(errno.EPERM, partial(ours.run, anyio.sleep, 0, config=REQUIRED))


def test_run_on_asyncio() -> None:
    with pytest.raises(ValueError, match=r'not for \'asyncio\': say backend="trio"'):
        ours.run(engine, backend="asyncio")


def test_run_inside_of_a_run() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="Already running"):
            ours.run(engine)

    ours.run(main)


def test_anyio_has_no_option_for_it() -> None:
    """If this fails, the documentation must no longer say so."""
    with pytest.raises(TypeError):
        anyio.run(engine, backend="trio", backend_options={"config": REQUIRED})


# Other backends, and runs without a ring


def calls(path: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {
        "open_file": lambda: ours.open_file(path, "w"),
        "connect_tcp": lambda: ours.connect_tcp("127.0.0.1", 1),
        "connect_unix": lambda: ours.connect_unix(path),
        "create_tcp_listener": lambda: ours.create_tcp_listener(local_host="127.0.0.1"),
        "create_unix_listener": lambda: ours.create_unix_listener(path),
        "FileReadStream": lambda: ours.FileReadStream.from_path(path),
        "FileWriteStream": lambda: ours.FileWriteStream.from_path(path),
        "Path": lambda: ours.Path(path).touch(),
    }


@pytest.mark.parametrize("name", calls("nowhere"))
def test_on_asyncio(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'anyio\.run\(\.\.\., backend="trio"\)'):
        anyio.run(calls(str(tmp_path / "file"))[name], backend="asyncio")
    assert not os.listdir(tmp_path)


def test_in_the_host_of_a_guest_run(tmp_path: Path) -> None:
    async def host() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            trio.sleep, 0, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=done.set_result
        )
        with pytest.raises(RuntimeError, match='backend="trio"'):
            await ours.open_file(tmp_path / "file", "w")
        (await done).unwrap()

    with installed():
        asyncio.run(host())


async def use_without_a_ring(directory: Path, reason: str) -> None:
    """Sockets and paths do without; a file says what is missing."""
    with pytest.raises(UnavailableError, match=reason):
        await ours.open_file(directory / "file", "w")
    assert await needs_a_thread(ours.Path(directory).exists)
    async with (
        await ours.create_unix_listener(directory / "socket") as listener,
        await ours.connect_unix(directory / "socket") as stream,
        await listener.accept() as peer,
    ):
        await stream.send(b"hello")
        assert await peer.receive() == b"hello"
    assert manager_or_none() is None


def test_where_rings_are_switched_off(tmp_path: Path) -> None:
    trio_uring.run(use_without_a_ring, tmp_path, "switched off", config=WITHOUT_RING)


def test_where_there_can_be_no_ring(tmp_path: Path) -> None:
    run = partial(anyio.run, use_without_a_ring, tmp_path, "seccomp", backend="trio")
    without_io_uring(errno.EPERM, run)


def test_where_a_ring_is_required(tmp_path: Path) -> None:
    """Nothing is made, so nothing is left."""

    async def main() -> None:
        for call in calls(str(tmp_path / "file")).values():
            with pytest.raises(UnavailableError, match="seccomp"):
                await call()
        assert not os.listdir(tmp_path)

    without_io_uring(errno.EPERM, partial(_with_mode_in_environment, main))


def _with_mode_in_environment(main: Callable[[], Awaitable[None]]) -> None:
    os.environ["TRIO_URING"] = "require"  # of a child
    anyio.run(main, backend="trio")


def test_the_first_call_attaches_a_ring(tmp_path: Path) -> None:
    """In any run of anyio's: each of these functions does."""

    async def main(call: Callable[[], Awaitable[Any]]) -> None:
        assert manager_or_none() is None
        with contextlib.suppress(OSError):  # nobody listens
            await close(await call())
        assert manager_or_none() is not None
        (tmp_path / "file").unlink(missing_ok=True)

    for call in calls(str(tmp_path / "file")).values():
        anyio.run(main, call, backend="trio")


async def close(made: Any) -> None:
    if made is not None:
        await made.aclose()


# Worker threads and processes


async def test_worker_threads(file: Path) -> None:
    def in_thread() -> bytes:
        anyio.from_thread.check_cancelled()
        assert anyio.from_thread.run_sync(manager_or_none) is mine
        assert manager_or_none() is None
        return anyio.from_thread.run(read, file)

    mine = manager_or_none()
    assert await anyio.to_thread.run_sync(in_thread) == b"hello"


async def test_many_worker_threads(file: Path) -> None:
    results = []

    async def one() -> None:
        results.append(await anyio.to_thread.run_sync(anyio.from_thread.run, read, file))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one)
    assert results == [b"hello"] * 20


def test_a_blocking_portal(file: Path) -> None:
    """Its run is in a thread of its own."""
    with installed(), anyio.from_thread.start_blocking_portal("trio") as portal:
        assert portal.call(engine) == ("io_uring",)
        futures = [portal.start_task_soon(read, file) for _ in range(10)]
        assert [future.result() for future in futures] == [b"hello"] * 10
    with anyio.from_thread.start_blocking_portal("trio") as portal:
        assert portal.call(read, file) == b"hello"  # on an attached ring


async def test_worker_processes() -> None:
    assert await anyio.to_process.run_sync(os.getpid) != os.getpid()
    with anyio.move_on_after(0.05) as scope:
        await anyio.to_process.run_sync(_forever, cancellable=True)
    assert scope.cancelled_caught


def _forever() -> None:
    import time

    while True:
        time.sleep(1)


async def test_processes() -> None:
    done = await anyio.run_process([sys.executable, "-c", "print(input()[::-1])"], input=b"hello\n")
    assert done.stdout == b"olleh\n"
    with pytest.raises(subprocess.CalledProcessError):
        await anyio.run_process(["false"])
    async with await anyio.open_process(["cat"], stderr=None) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"there and back")
        assert await process.stdout.receive() == b"there and back"
        with anyio.move_on_after(0.01) as scope:
            await process.stdout.receive()
        assert scope.cancelled_caught
        await process.stdin.aclose()
        assert await process.wait() == 0


# anyio's pytest plugin

TESTS = """
    import os

    import anyio
    import pytest
    import trio
    import trio_uring
    import trio_uring.anyio
    from anyio.abc import SocketAttribute

    pytestmark = pytest.mark.anyio


    @pytest.fixture
    def anyio_backend():
        return "trio"


    @pytest.fixture
    async def file(tmp_path):
        async with await trio_uring.anyio.open_file(tmp_path / "file", "w+b") as file:
            yield file


    async def test_file(file):
        await file.write(b"hello")
        await file.seek(0)
        assert await file.read() == b"hello"
        assert trio_uring.statistics().engine == "io_uring"


    async def test_native():
        assert trio.lowlevel.current_statistics().io_statistics is not None
        assert isinstance(trio.lowlevel.current_statistics().io_statistics, trio_uring.UringStatistics) == NATIVE


    async def test_streams():
        async with await trio_uring.anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(SocketAttribute.local_port)
            async with await trio_uring.anyio.connect_tcp("127.0.0.1", port) as stream:
                async with await listener.listeners[0].accept() as peer:
                    with anyio.move_on_after(0.01) as scope:
                        await peer.receive()
                    assert scope.cancelled_caught
                    await stream.send(b"hello")
                    assert await peer.receive() == b"hello"
        assert trio_uring.statistics().sqes > 0
"""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_pytest_plugin(native: bool, alone: bool, tmp_path: Path) -> None:
    """Beside pytest-trio, too, which leaves tests with anyio's marker alone."""
    conftest = 'import trio_uring\ntrio_uring.install(trio_uring.RingConfig(mode="require"))\n' if native else ""
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(textwrap.dedent(TESTS).replace("NATIVE", str(native)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if alone:
        command += ["-p", "no:trio"]
    done = subprocess.run([*command, str(tmp_path)], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert "3 passed" in done.stdout, done.stdout
