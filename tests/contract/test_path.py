"""`trio_uring.Path` is `trio.Path`, does what pathlib does, and needs no thread for what it lists."""

from __future__ import annotations

import copy
import errno
import inspect
import io
import os
import pathlib
import pickle
import resource
import socket
import stat
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import trio_uring
from tests.helpers import (
    Attempt,
    in_child,
    interrupted_at_line,
    manager,
    nothing_submitted,
    run_native,
    run_without_ring,
)
from trio_uring import Path, UringStatistics
from trio_uring._abi import Opcode
from trio_uring._path import RING_METHODS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from tests.helpers import Bench, Mount

NOBODY = 65534
examples = partial(settings, deadline=None)

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


# A class of paths


def test_it_is_a_path_of_trios_and_of_pathlibs() -> None:
    path = Path("a", pathlib.Path("b"), trio.Path("c"))
    assert isinstance(path, trio.Path)
    assert isinstance(path, pathlib.PurePosixPath)
    assert (str(path), bytes(path), os.fspath(path)) == ("a/b/c", b"a/b/c", "a/b/c")
    assert repr(path) == "trio_uring.Path('a/b/c')"
    others: list[object] = [pathlib.PurePosixPath("a/b/c"), trio.Path("a/b/c"), Mine("a/b/c")]
    assert all(path == other and other == path for other in others)
    assert path.__eq__("a/b/c") is NotImplemented
    assert len({path, trio.Path(path), pathlib.Path(path)}) == 1
    assert Path("a") < pathlib.PurePosixPath("b") < Path("c")
    assert sorted([Path("b"), trio.Path("a")]) == [Path("a"), Path("b")]
    assert Path("/a b").as_uri() == "file:///a%20b"
    with pytest.raises(TypeError):
        Path(1)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        path.nonsense = 1  # type: ignore[attr-defined]


class Mine(Path):
    """Somebody's own."""

    __slots__ = ()


@pytest.mark.parametrize("cls", [Path, Mine])
def test_what_is_made_of_a_path_is_of_its_class(cls: type[Path]) -> None:
    path = cls("/a/b.c")
    made = [path / "d", "/x" / path, path.parent, *path.parents, path.with_suffix(".d"), path.joinpath("e")]
    made += [path.relative_to("/a"), copy.copy(path), copy.deepcopy(path)]
    assert {type(other) for other in made} == {cls}


def test_pickling() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copied = pickle.loads(pickle.dumps(Path("/a/b.c"), protocol))
        assert (type(copied), copied) == (Path, Path("/a/b.c"))


async def test_what_methods_return_is_of_its_class(tmp_path: pathlib.Path) -> None:
    path = Mine(tmp_path, "file")
    await path.touch()
    assert type(await path.rename(tmp_path / "other")) is Mine
    assert type(await (path.parent / "other").replace(path)) is Mine
    assert [type(each) for each in await path.parent.iterdir()] == [Mine]
    assert [type(each) for each in await path.parent.glob("*")] == [Mine]
    assert type(await path.resolve()) is type(await path.absolute()) is Mine
    assert type(await Mine.cwd()) is type(await Mine.home()) is Mine
    assert os.fspath(await Mine.cwd()) == os.getcwd()


def _methods(cls: type[object]) -> set[str]:
    return {name for name, value in inspect.getmembers(cls) if not name.startswith("_") and callable(value)}


def test_it_has_whatever_trios_has() -> None:
    assert _methods(Path) == _methods(trio.Path)
    for name in _methods(Path):
        assert inspect.iscoroutinefunction(getattr(Path, name)) == inspect.iscoroutinefunction(getattr(trio.Path, name))


@pytest.mark.parametrize("name", RING_METHODS)
def test_arguments_are_those_of_pathlib(name: str) -> None:
    def arguments(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(Path, name)) == arguments(getattr(pathlib.Path, name))


# What methods do: a history of calls, each made in both places

SHORT_NAMES = (
    "file missing directory directory/file directory/a directory/a/b link to-directory to-directory/file dangling"
)
NAMES = st.sampled_from([*SHORT_NAMES.split(), "circle", "file/below", "socket", "a", "a/b/c", ".", "..", "x" * 300])
STRANGE_NAMES = st.sampled_from(["\0", "file\0", "\udcff", "\ud800"])
MODES = st.sampled_from([0o777, 0o666, 0o700, 0o4755, 0o000])
ENCODINGS = st.sampled_from([None, "utf-8", "utf-16", "utf-8-sig", "latin-1", "shift_jis", "nonsense"])
ERRORS = st.sampled_from([None, "strict", "replace", "surrogateescape", "nonsense"])
TEXTS = st.text("a\r\n\xe9\u3042\udc80", max_size=20)
TARGETS = NAMES.map(lambda name: {"path": name})


def _call(name: str, *arguments: st.SearchStrategy[Any], **keywords: st.SearchStrategy[Any]) -> Any:
    chosen = st.fixed_dictionaries({}, optional=keywords)
    return st.tuples(NAMES | STRANGE_NAMES, st.just(name), st.tuples(*arguments), chosen)


HISTORIES = st.lists(
    st.one_of(
        *(_call(name) for name in sorted(RING_METHODS) if name.startswith("is_")),
        _call("exists"),
        _call("stat", follow_symlinks=st.booleans()),
        _call("lstat"),
        _call("samefile", TARGETS),
        _call("mkdir", mode=MODES, parents=st.booleans(), exist_ok=st.booleans()),
        _call("rmdir"),
        _call("unlink", missing_ok=st.booleans()),
        _call("rename", TARGETS),
        _call("replace", TARGETS),
        _call("symlink_to", TARGETS | NAMES, target_is_directory=st.booleans()),
        _call("hardlink_to", TARGETS),
        _call("touch", mode=MODES, exist_ok=st.booleans()),
        _call("read_bytes"),
        _call("write_bytes", st.binary(max_size=20)),
        _call("read_text", ENCODINGS, ERRORS),
        _call("write_text", TEXTS, ENCODINGS, ERRORS, st.sampled_from([None, "", "\n", "\r\n", "nonsense"])),
    ),
    min_size=1,
    max_size=10,
)


def furnish(directory: pathlib.Path) -> None:
    (directory / "file").write_text("some text\n")
    (directory / "directory").mkdir()
    (directory / "directory/file").touch()
    (directory / "link").symlink_to("file")
    (directory / "to-directory").symlink_to("directory")
    (directory / "dangling").symlink_to("nowhere")
    (directory / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.fspath(directory / "socket"))


def tree(directory: pathlib.Path) -> list[tuple[Any, ...]]:
    """What is below it: name, mode, number of names, and content or target."""
    found: list[tuple[Any, ...]] = []
    for top, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = os.path.join(top, name)
            status = os.lstat(path)
            what: Any = None
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path).replace(os.fspath(directory), "")
            elif stat.S_ISREG(status.st_mode):
                what = pathlib.Path(path).read_bytes()
            found.append((os.path.relpath(path, directory), status.st_mode, status.st_nlink, what))
    return sorted(found, key=repr)


def _told(result: Any, directory: str) -> Any:
    """What of a result or an error must be the same in both places."""
    if isinstance(result, OSError):
        names = [os.fspath(name) for name in (result.filename, result.filename2) if name is not None]
        return type(result).__name__, result.errno, [name.replace(directory, "") for name in names]
    if isinstance(result, Exception):
        return type(result).__name__  # what it says is Python's and changes
    if isinstance(result, os.stat_result):
        return stat.S_IFMT(result.st_mode), result.st_mode, result.st_nlink, result.st_uid, result.st_gid
    if isinstance(result, pathlib.PurePath):
        return os.fspath(result).replace(directory, "")
    return result


def _there(directory: str, argument: Any) -> Any:
    return os.path.join(directory, argument["path"]) if isinstance(argument, dict) else argument


async def _history(cls: type[trio.Path], directory: str, history: Sequence[Any]) -> list[Any]:
    told = []
    for name, method, arguments, keywords in history:
        path = cls(directory, name)
        try:
            result = await getattr(path, method)(*(_there(directory, each) for each in arguments), **keywords)
        except (OSError, ValueError, LookupError) as exc:
            result = exc
        else:
            assert not isinstance(result, pathlib.PurePath) or type(result) is type(path)
        told.append(_told(result, directory))
    return told


def _oracle_history(directory: str, history: Sequence[Any]) -> list[Any]:
    told: list[Any] = []
    for name, method, arguments, keywords in history:
        try:
            if method == "write_text":  # pathlib would find out when the file is empty already
                io.TextIOWrapper(io.BytesIO(), *arguments[1:]).write(arguments[0])
            function = getattr(pathlib.Path(directory, name), method)
            result = function(*(_there(directory, each) for each in arguments), **keywords)
        except (OSError, ValueError, LookupError) as exc:
            result = exc
        told.append(_told(result, directory))
    return told


@contextmanager
def two_places() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for each in (first, second):
            furnish(pathlib.Path(each))
        yield first, second


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@examples(max_examples=200)
@given(history=HISTORIES, mask=st.sampled_from([0o022, 0o077, 0]))
def test_a_history_of_calls(history: list[Any], mask: int) -> None:
    with two_places() as (here, there), umask(mask):
        assert run_native(_history, Path, here, history) == _oracle_history(there, history)
        assert tree(pathlib.Path(here)) == tree(pathlib.Path(there))


async def test_a_fifo(bench: Bench) -> None:
    path = bench.fifo()
    assert await Path(path).is_fifo()
    assert await Path(path).exists()
    assert not await Path(path).is_file()


PLACES = ["/", "/dev", "/dev/null", "/proc", "/proc/self", "/proc/self/cwd", "/proc/self/fd/0", "/proc/version", "."]


@pytest.mark.parametrize("name", PLACES)
async def test_what_is_no_file_of_ours(name: str) -> None:
    for method in sorted(RING_METHODS):
        if method.startswith("is_") or method in ("exists", "samefile"):
            arguments = ("/",) if method == "samefile" else ()
            assert await getattr(Path(name), method)(*arguments) == getattr(pathlib.Path(name), method)(*arguments)
    for ours, pathlibs in ((await Path(name).stat(), os.stat(name)), (await Path(name).lstat(), os.lstat(name))):
        assert type(ours) is os.stat_result
        assert (ours.st_dev, ours.st_ino, ours.st_mode) == (pathlibs.st_dev, pathlibs.st_ino, pathlibs.st_mode)


async def test_whatever_is_mounted() -> None:
    """Files may be mounted on, too."""
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        mount = line.split()[4]
        assert await Path(mount).is_mount() == pathlib.Path(mount).is_mount()


@pytest.mark.parametrize("mask", [0, 0o027])
@pytest.mark.parametrize("mode", [None, 0o700, 0o1750, 0o000])
async def test_modes(mode: int | None, mask: int, tmp_path: pathlib.Path) -> None:
    modes: dict[str, Any] = {} if mode is None else {"mode": mode}
    with umask(mask):
        for place, cls in (("here", Path), ("there", pathlib.Path)):
            (tmp_path / place).mkdir()
            for method, keywords in (("mkdir", {"parents": True}), ("touch", {})):
                result = getattr(cls(tmp_path, place, "a/b" if method == "mkdir" else "c"), method)(**keywords, **modes)
                if inspect.isawaitable(result):
                    await result
            await Path(tmp_path, place, "d").write_bytes(b"")
    assert [each[1] for each in tree(tmp_path / "here")] == [each[1] for each in tree(tmp_path / "there")]


def test_making_directories_where_there_is_no_directory() -> None:
    """The current one is gone, so there is nothing to begin with."""
    history: list[Any] = [(name, "mkdir", (), {"parents": True}) for name in ("a", "a/b")]

    def ask() -> tuple[list[Any], list[Any]]:
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            os.rmdir(directory)
            os.mkdir(directory)  # for the context manager
            return run_native(_history, Path, "", history), _oracle_history("", history)

    ours, pathlibs = in_child(ask)
    assert ours == pathlibs
    assert {told[0] for told in ours} == {"FileNotFoundError"}


async def test_touch_sets_the_times_of_what_is_there(bench: Bench) -> None:
    path = bench.path(b"content")
    os.utime(path, (1, 1))
    await Path(path).touch()
    assert path.stat().st_mtime > 1
    assert path.read_bytes() == b"content"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_looked_at() -> None:
    """Root may look at everything, so somebody else asks."""
    names = ["directory/file", "directory", "directory/a", "new"]
    methods = [name for name in sorted(RING_METHODS) if name.startswith("is_")]
    methods += ["exists", "stat", "mkdir", "rmdir", "unlink", "touch"]
    history: list[Any] = [(name, method, (), {}) for method in methods for name in names]

    def ask() -> tuple[list[Any], list[Any]]:
        os.setgroups([])
        os.setuid(NOBODY)
        return run_native(_history, Path, directory, history), _oracle_history(directory, history)

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        furnish(pathlib.Path(directory))
        os.chmod(os.path.join(directory, "directory"), 0o700)
        ours, pathlibs = in_child(ask)
        assert ours == pathlibs
        assert {told[1] for told in ours if isinstance(told, tuple)} >= {errno.EACCES}


def test_questions_when_no_fd_is_left(tmp_path: pathlib.Path) -> None:
    furnish(tmp_path)
    names = ["file", "directory", "missing", "link", "to-directory", "dangling", "circle"]
    history: list[Any] = [(name, method, (), {}) for name in names for method in ("exists", "is_dir")]

    async def without_fds() -> list[Any]:
        with open("/dev/null") as lowest:
            first_unused = lowest.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_unused, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with pytest.raises(OSError, match="Too many open files"):
            await Path(tmp_path).touch(exist_ok=False)
        return await _history(Path, os.fspath(tmp_path), history)

    assert in_child(lambda: run_native(without_fds)) == _oracle_history(os.fspath(tmp_path), history)


# Where things are done


async def needs_a_thread(call: Callable[[], Awaitable[object]]) -> bool:
    """Makes the call where no thread is to be had; if it wants one it is cancelled."""
    limiter = trio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    me = object()
    await limiter.acquire_on_behalf_of(me)
    threads = set(threading.enumerate())
    try:
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, call)
            while not attempt.done and limiter.statistics().tasks_waiting == 0:
                await trio.lowlevel.checkpoint()
            if attempt.done:
                await attempt.result()
                assert set(threading.enumerate()) <= threads
                return False
            assert await attempt.cancel()
            return True
    finally:
        limiter.release_on_behalf_of(me)
        limiter.total_tokens = before


ARGUMENTS: dict[str, tuple[Any, ...]] = {"write_bytes": (b"bytes",), "write_text": ("text",)}


def made_ready(name: str, directory: pathlib.Path, cls: Callable[..., Any] = Path) -> Callable[[], Awaitable[object]]:
    """A call of a method that succeeds, and does all it can do on the ring."""
    path, other = directory / "it", directory / "other"
    other.touch()
    if name == "rmdir":
        path.mkdir()
    elif name not in ("mkdir", "touch", "symlink_to", "hardlink_to"):
        path.touch()
    arguments = ARGUMENTS.get(name, ())
    if name in ("rename", "replace", "samefile", "hardlink_to", "symlink_to"):
        arguments = (other,)
    method = getattr(cls(path), name)

    async def call() -> object:
        result = await method(*arguments)
        if isinstance(result, (trio.abc.AsyncResource, anyio.abc.AsyncResource)):
            await result.aclose()
        return result

    return call


@pytest.mark.parametrize("name", RING_METHODS)
async def test_it_needs_no_thread(name: str, tmp_path: pathlib.Path) -> None:
    assert not await needs_a_thread(made_ready(name, tmp_path))


async def test_what_needs_a_thread(tmp_path: pathlib.Path) -> None:
    path = Path(tmp_path)
    for call in (path.resolve, path.iterdir, path.touch, partial(path.chmod, 0o700), partial(path.glob, "*")):
        assert await needs_a_thread(call)


@pytest.mark.parametrize("name", RING_METHODS)
async def test_the_kernel_does_it(name: str, tmp_path: pathlib.Path) -> None:
    call = made_ready(name, tmp_path)
    before = trio_uring.statistics().sqes
    await call()
    assert trio_uring.statistics().sqes > before or name == "is_junction"


@pytest.mark.parametrize("name", RING_METHODS)
def test_without_a_ring_it_is_trios(name: str, tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        assert not isinstance(trio.lowlevel.current_statistics().io_statistics, UringStatistics)
        call = made_ready(name, tmp_path)
        assert await needs_a_thread(call)
        await call()

    run_without_ring(main)


@pytest.mark.parametrize("name", ["mkdir", "rename", "symlink_to", "unlink"])
async def test_a_kernel_that_lacks_the_operation(name: str, tmp_path: pathlib.Path) -> None:
    """A thread does it."""
    call = made_ready(name, tmp_path)
    manager()._missing = frozenset({Opcode.MKDIRAT, Opcode.RENAMEAT, Opcode.SYMLINKAT, Opcode.UNLINKAT})
    await call()


# Cancellation


@pytest.mark.parametrize("name", RING_METHODS)
async def test_it_is_a_checkpoint(name: str, tmp_path: pathlib.Path) -> None:
    call = made_ready(name, tmp_path)
    before = tree(tmp_path)
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            with trio.testing.assert_checkpoints():
                await call()
        assert scope.cancelled_caught
    assert tree(tmp_path) == before
    with trio.testing.assert_checkpoints():
        await call()


@pytest.mark.parametrize("name", ["mkdir", "rmdir", "unlink", "rename", "symlink_to", "hardlink_to", "touch"])
async def test_cancelled_or_done(name: str, tmp_path: pathlib.Path) -> None:
    """What is done is reported as done, and what was cancelled has done nothing."""
    outcomes = set()
    for number in range(60):
        directory = tmp_path / str(number)
        directory.mkdir()
        call = made_ready(name, directory)
        before = tree(directory)
        async with trio.open_nursery() as nursery:
            attempt = Attempt(nursery, call)
            for _ in range(number % 6):
                await trio.lowlevel.checkpoint()
            if number % 6 == 5:
                await attempt.settled()
            cancelled = await attempt.cancel()
        assert (tree(directory) == before) == cancelled
        outcomes.add(cancelled)
    assert outcomes == {True, False}


async def test_cancelled_questions_leave_no_fd(tmp_path: pathlib.Path) -> None:
    for number in range(200):
        async with trio.open_nursery() as nursery:
            calls = (Path(tmp_path).exists, Path(tmp_path, str(number)).touch)
            attempts: list[Attempt[Any]] = [Attempt(nursery, call) for call in calls]
            for _ in range(number % 4):
                await trio.lowlevel.checkpoint()
            for attempt in attempts:
                await attempt.cancel()


@pytest.mark.parametrize("name", ["exists", "touch", "open"])
def test_interrupted_it_leaves_no_fd(mount: Mount, name: str, tmp_path: pathlib.Path) -> None:
    """Whichever line of ours a Ctrl-C meets."""

    def interrupted(n: int) -> bool:
        lines = 0

        async def main() -> None:
            nonlocal lines
            with interrupted_at_line(n) as stop:
                try:
                    await made_ready(name, tmp_path)()
                    await trio.lowlevel.checkpoint()
                finally:
                    lines = stop()

        try:
            mount.run(main)
        except KeyboardInterrupt:
            return True
        finally:
            (tmp_path / "it").unlink(missing_ok=True)
        assert lines < n
        return False

    n = 1
    while interrupted(n):
        n += 7
    assert n > 10
