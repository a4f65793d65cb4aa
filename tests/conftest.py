"""What holds for every test: it ends in time, and it leaves nothing behind."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import re
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

from tests.helpers import MOUNTS, Bench, Mount, World, manager_or_none
from trio_uring import RingConfig, _mount, _routes, _trio_internals
from trio_uring._core import UringIOManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

T = TypeVar("T")

SECONDS = 30
_CACHED_THREAD = re.compile(r"Trio thread \d+")  # idle: at work it has the name of its job


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    config.addinivalue_line("markers", "seconds(n): how long the test may take before it fails")
    config.addinivalue_line("markers", "ring(**config): the RingConfig of an async test")
    config.addinivalue_line(
        "markers", "native(why): for runs whose I/O manager is the ring, not for those beside trio's"
    )


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """An async test that no other plugin claims runs on every mount."""
    if inspect.iscoroutinefunction(obj) and collector.istestfunction(obj, name):
        marks = {mark.name for mark in getattr(obj, "pytestmark", ())}
        if not marks & {"trio", "anyio"}:
            pytest.mark.usefixtures("mount")(obj)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj) or "mount" not in pyfuncitem.fixturenames:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    marker = pyfuncitem.get_closest_marker("ring")
    config = RingConfig(mode="require", **(marker.kwargs if marker else {}))
    mount = pyfuncitem.funcargs["mount"]
    assert isinstance(mount, Mount)
    mount.run(functools.partial(pyfuncitem.obj, **arguments), config=config)
    return True


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Things to do I/O on."""
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture(params=MOUNTS)
def mount(request: pytest.FixtureRequest) -> Mount:
    """Each way to tie a ring to a run; ``mount.run`` runs an async function on it."""
    mount = MOUNTS[request.param]
    marker = request.node.get_closest_marker("native")
    if marker and not mount.native:
        pytest.skip(marker.args[0])
    return mount


@pytest.fixture
def doors_open() -> Iterator[None]:
    """trio's names for sockets lead here in runs that have a ring: also in a guest run, which outlives `install`."""
    _mount._add_user(1)
    try:
        yield
    finally:
        _mount._add_user(-1)


@pytest.fixture
def world(tmp_path: Path, doors_open: None) -> Iterator[World]:
    """trio's sockets, on the ring."""
    world = World(str(tmp_path))
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(params=[True, False], ids=["lone", "busy"])
def traffic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A run that has, or has not, more to do than one thing at a time. Is it alone?"""
    alone: bool = request.param
    monkeypatch.setattr(UringIOManager, "is_lone", lambda self: alone)
    return alone


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails: with an exception in the main thread, again and again if something swallows it."""
    marker = request.node.get_closest_marker("seconds")
    seconds = marker.args[0] if marker else SECONDS

    def expired(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds, 3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_SOURCE = os.path.dirname(_mount.__file__)
_TESTS = os.path.dirname(__file__)
_MAY_USE_THREADS = {
    os.path.join(_SOURCE, "_path.py"): {"either", "is_mount", "touch"},  # as documented; when, its own tests know
    os.path.join(_SOURCE, "_mount.py"): {"run"},  # below everything that runs
    os.path.join(_SOURCE, "anyio.py"): {"run", "_over_ours"},  # names of hosts and sockets, as anyio does it
    os.path.join(_SOURCE, "_trio_internals.py"): {"resolve"},  # names of hosts, as trio does it
}


def _uses_threads_without_need(frame: FrameType | None) -> bool:
    """Is it our code, rather than a test's, that has something done in a thread?"""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_TESTS):
            return False
        if file.startswith(_SOURCE):
            return function not in _MAY_USE_THREADS.get(file, ())
        frame = frame.f_back
    return False


@pytest.fixture(autouse=True)
def no_thread_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring needs no thread, and what is on the ring asks for none."""

    def checked(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def check(*args: Any, **kwargs: Any) -> T:
            assert not _uses_threads_without_need(sys._getframe(1)), "what is on the ring goes to a thread"
            return function(*args, **kwargs)

        return check

    monkeypatch.setattr(threading.Thread, "start", checked(threading.Thread.start))
    monkeypatch.setattr(trio.to_thread, "run_sync", checked(trio.to_thread.run_sync))


@pytest.fixture(autouse=True)
def hooks_are_calm(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What goes wrong in an Instrument of ours, trio only logs."""
    yield
    records = [record.getMessage() for record in caplog.get_records("call") if record.name == "trio.abc.Instrument"]
    assert not [message for message in records if "trio_uring" in message]


def _open_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            pass
    return fds


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not _CACHED_THREAD.fullmatch(thread.name)}


def _children() -> str:
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read()


def _forget_run() -> None:
    """The time limit has ended the last test in the middle of its run; the next one is to have a chance."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
    if trio.lowlevel.in_trio_run():
        pytest.exit("a run cannot be ended; no other can start in this thread", returncode=1)


@pytest.fixture(autouse=True)
def nothing_left_behind(time_limit: None) -> Iterator[None]:
    """Open fds (a ring is one), threads, children, what stands in trio's place for its I/O manager and under its names:
    all as before.
    """
    if trio.lowlevel.in_trio_run():
        _forget_run()
    fds, threads, children = _open_fds(), _threads(), _children()
    yield
    assert _trio_internals.io_manager_class() is not _mount.TheIOManager, "still installed"
    assert not _routes.routes, "names of trio still lead here"
    assert manager_or_none() is None, "a run's manager is still there"
    assert _threads() <= threads, "threads left"
    assert _children() == children, "child processes left"
    if _open_fds() != fds:
        gc.collect()  # a traceback may hold a socket; one that nobody closed warns, which is an error
    after = _open_fds()
    assert {fd: what for fd, what in after.items() if fds.get(fd) != what} == {}, "fds left open"
    assert {fd: what for fd, what in fds.items() if fd not in after} == {}, "foreign fds closed"
