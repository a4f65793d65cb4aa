"""`install(files=True)`: names of trio and anyio lead to the ring, where there is one, and nowhere else."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from anyio import Path as AnyioPath
from trio import Path as TrioPath
from trio import open_file as bound_before

import trio_uring
from tests.contract.test_path import made_ready, needs_a_thread
from tests.helpers import REQUIRED
from trio_uring import AsyncFile, RingConfig
from trio_uring._path import RING_METHODS

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

WITHOUT_RING = RingConfig(mode="off")
STOCK_FILES: dict[Any, type] = {trio: type(trio.wrap_file(io.BytesIO())), anyio: anyio.AsyncFile}


def names() -> dict[tuple[Any, str], object]:
    """What stands where something of ours may stand."""
    functions: dict[tuple[Any, str], object] = {(package, "open_file"): package.open_file for package in (trio, anyio)}
    for cls in (trio.Path, anyio.Path):
        functions |= {(cls, name): value for name, value in vars(cls).items() if callable(value)}
    return functions


STOCK = names()


@contextmanager
def files_installed() -> Iterator[None]:
    trio_uring.install(REQUIRED, files=True)
    try:
        yield
    finally:
        trio_uring.uninstall()
    assert names() == STOCK


# What leads to the ring


@pytest.mark.parametrize("name", sorted(RING_METHODS.keys() - {"is_junction"}))
@pytest.mark.parametrize("cls", [trio.Path, anyio.Path])
def test_methods_of_paths(cls: type[Any], name: str, tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        assert not await needs_a_thread(made_ready(name, tmp_path, cls))

    with files_installed():
        trio.run(main)


@pytest.mark.parametrize("package", [trio, anyio])
def test_open_file(package: Any, tmp_path: pathlib.Path) -> None:
    async def use() -> None:
        async with await package.open_file(tmp_path / "file", "w") as file:
            await file.write("one\ntwo\n")
        async with await package.Path(tmp_path, "file").open() as opened:
            assert [line async for line in opened] == ["one\n", "two\n"]
        for each in (file, opened):
            assert isinstance(each, STOCK_FILES[package])
            assert isinstance(each if package is trio else each.wrapped, AsyncFile)  # type: ignore[attr-defined]

    async def main() -> None:
        assert not await needs_a_thread(use)

    with files_installed():
        trio.run(main)


@pytest.mark.skipif(not hasattr(anyio.AsyncFile, "limiter"), reason="anyio has them since 4.14")
def test_a_limiter_of_anyios(tmp_path: pathlib.Path) -> None:
    """There is no thread to be limited; other paths get it handed on."""

    async def main() -> None:
        limiter = anyio.CapacityLimiter(1)
        async with await anyio.open_file(tmp_path / "file", "wb", limiter=limiter) as file:
            assert file.limiter is limiter
            await file.write(b"bytes")
        async with await anyio.Path(tmp_path, "file", limiter=limiter).open() as file:
            assert file.limiter is limiter
        for method in (anyio.Path.rename, anyio.Path.replace):
            moved = await method(anyio.Path(tmp_path, "file", limiter=limiter), anyio.Path(tmp_path, "moved"))
            assert (type(moved), moved.limiter) == (anyio.Path, limiter)
            assert await moved.read_bytes() == b"bytes"
            os.rename(moved, tmp_path / "file")

    with files_installed():
        anyio.run(main, backend="trio")


def test_a_file_of_anyios_is_as_anyio_says(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with await anyio.open_file(tmp_path / "file", "w+b") as file:
            assert await file.write(b"one\ntwo\n") == 8
            assert await file.seek(whence=os.SEEK_SET, offset=4) == await file.tell() == 4
            assert await file.read(size=2) == b"tw"
            await file.writelines([b"!", b"!"])
            await file.flush()
            assert await file.truncate(size=7) == 7
            await file.seek(0)
            buffer = bytearray(3)
            assert (await file.readinto(buffer), bytes(buffer)) == (3, b"one")
            assert (await file.readline(), await file.readlines()) == (b"\n", [b"tw!"])
            assert (file.name, file.mode, file.closed) == (str(tmp_path / "file"), "rb+", False)
            assert os.fstat(file.fileno()).st_size == 7  # type: ignore[operator]
        assert file.closed

        file = await anyio.open_file(tmp_path / "file", "ab")
        with anyio.CancelScope() as scope:
            await file.write(b"end")
            scope.cancel()
            await file.aclose()
        assert not scope.cancelled_caught
        assert await anyio.Path(tmp_path, "file").read_bytes() == b"one\ntw!end"

    with files_installed():
        anyio.run(main, backend="trio")


def test_anyio_iterates_as_ever(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        directory = anyio.Path(tmp_path)
        await (directory / "file").touch()
        assert [path async for path in directory.iterdir()] == [directory / "file"]
        assert [path async for path in directory.glob("*")] == [directory / "file"]

    with files_installed():
        anyio.run(main, backend="trio")


def test_runs_that_ask_for_a_ring_themselves(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        assert not await needs_a_thread(trio.Path(tmp_path).exists)

    with files_installed():
        trio_uring.run(main, config=REQUIRED)


# What names are


def test_classes_stay_what_they_are() -> None:
    before = trio.Path("made before")
    with files_installed():
        assert (trio.Path, anyio.Path) == (TrioPath, AnyioPath)
        assert type(trio.Path("a")) is trio.PosixPath
        assert repr(trio.Path("a")) == "trio.Path('a')"
        assert type(pickle.loads(pickle.dumps(before))) is trio.PosixPath


def test_functions_look_like_those_they_stand_for() -> None:
    with files_installed():
        replaced = {place: now for place, now in names().items() if now is not STOCK[place]}
        assert len(replaced) == 2 + 2 * len(RING_METHODS)
        for place, now in replaced.items():
            stock: Any = STOCK[place]
            assert inspect.iscoroutinefunction(now)
            assert inspect.signature(now) == inspect.signature(stock)
            assert (now.__name__, now.__qualname__, now.__doc__) == (stock.__name__, stock.__qualname__, stock.__doc__)


def test_names_bound_before(tmp_path: pathlib.Path) -> None:
    """A class, its objects and subclasses do not care; a function somebody has is trio's own."""

    class Mine(anyio.Path):
        pass

    paths: list[Any] = [TrioPath(tmp_path), AnyioPath(tmp_path), Mine(tmp_path)]

    async def main() -> None:
        for path in paths:
            assert not await needs_a_thread(path.exists)
        async with await bound_before(tmp_path / "file", "w") as file:
            assert type(file) is STOCK_FILES[trio]

    with files_installed():
        trio.run(main)


# What does not lead to the ring


async def use_files(packages: tuple[Any, ...], directory: pathlib.Path) -> None:
    """As threads have it."""
    for package in packages:
        async with await package.open_file(directory / "file", "w") as file:
            assert type(file) is STOCK_FILES[package]
        assert await package.Path(directory, "file").read_text() == ""
        assert not await package.Path(directory, "nothing").exists()


def wait_for_anyios_threads() -> None:
    """On asyncio it tells them to end, and does not wait."""
    for thread in threading.enumerate():
        if thread.name == "AnyIO worker thread":
            thread.join()


def test_a_run_without_a_ring(tmp_path: pathlib.Path) -> None:
    with files_installed():
        trio_uring.run(use_files, (trio, anyio), tmp_path, config=WITHOUT_RING)


def test_anyio_on_asyncio(tmp_path: pathlib.Path) -> None:
    with files_installed():
        anyio.run(use_files, (anyio,), tmp_path, backend="asyncio")
    wait_for_anyios_threads()


def test_the_host_of_a_guest_run(tmp_path: pathlib.Path) -> None:
    """The ring is its thread's, but not its own."""

    async def guest() -> bool:
        await trio.lowlevel.checkpoint()
        return await needs_a_thread(trio.Path(tmp_path).exists)

    async def host() -> bool:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=done.set_result
        )
        await use_files((anyio,), tmp_path)
        result: bool = (await done).unwrap()
        return result

    with files_installed():
        assert not asyncio.run(host())
    wait_for_anyios_threads()


def test_without_files() -> None:
    with files_installed():
        trio_uring.install(REQUIRED)
        assert names() == STOCK


# Putting names back


def test_installing_again_replaces_the_choice() -> None:
    with files_installed():
        for files in (True, False, True, True):
            trio_uring.install(REQUIRED, files=files)
            assert (names() != STOCK) == files
    trio_uring.uninstall()
    assert names() == STOCK


def test_what_somebody_has_kept_is_stock_after_uninstall(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        kept, exists = trio.open_file, trio.Path(tmp_path).exists
        assert not await needs_a_thread(exists)
        trio_uring.uninstall()
        assert await needs_a_thread(exists)
        async with await kept(tmp_path / "file", "w") as file:
            assert type(file) is STOCK_FILES[trio]

    with files_installed():
        trio.run(main)


def test_what_somebody_has_patched_over_stays(tmp_path: pathlib.Path) -> None:
    calls = []
    trio_uring.install(REQUIRED, files=True)
    ours: Any = trio.Path.exists

    async def exists(self: trio.Path) -> bool:
        calls.append(self)
        result: bool = await ours(self)
        return result

    async def main(threaded: bool) -> None:
        assert await needs_a_thread(trio.Path(tmp_path).exists) == threaded

    setattr(trio.Path, "exists", exists)  # noqa: B010
    try:
        trio_uring.uninstall()
        assert names() == STOCK | {(trio.Path, "exists"): exists}
        trio_uring.run(main, True, config=REQUIRED)
        assert len(calls) == 1

        trio_uring.install(REQUIRED, files=True)  # over theirs, which calls what ours was
        try:
            trio_uring.run(main, False, config=REQUIRED)
            assert len(calls) == 1
            trio_uring.run(trio.Path(tmp_path).exists, config=WITHOUT_RING)
            assert len(calls) == 2
        finally:
            trio_uring.uninstall()
        assert names() == STOCK | {(trio.Path, "exists"): exists}
    finally:
        setattr(trio.Path, "exists", STOCK[trio.Path, "exists"])  # noqa: B010


# anyio is not needed


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True)


def test_without_anyio() -> None:
    _run("""
        import sys
        sys.modules["anyio"] = None
        import trio, trio_uring

        async def main():
            await trio.Path("/").exists()
            assert trio_uring.statistics().sqes > 0

        trio_uring.install(trio_uring.RingConfig(mode="require"), files=True)
        trio.run(main)
        trio_uring.uninstall()
    """)


def test_who_does_not_ask_for_files_does_not_import_anyio() -> None:
    _run("""
        import sys, trio_uring
        trio_uring.install()
        trio_uring.uninstall()
        assert "anyio" not in sys.modules
    """)
