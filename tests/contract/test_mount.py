"""Which runs get a ring: those that were asked to have one, and no others."""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import REQUIRED, Host, in_child, installed, manager
from trio_uring import FallbackWarning, RingConfig, UnavailableError, UringStatistics, _trio_internals, lowlevel
from trio_uring._core import UringIOManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SYSCALL_IO_URING_SETUP = 425
OTHER = RingConfig(entries=8, mode="require")


@pytest.fixture(autouse=True)
def stock_manager_stands_again() -> Iterator[None]:
    before = _trio_internals.io_manager_class()
    yield
    assert _trio_internals.io_manager_class() is before


async def has_ring() -> bool:
    return isinstance(trio.lowlevel.current_statistics().io_statistics, UringStatistics)


async def entries() -> int:
    return manager().ring.config.entries


async def talk() -> None:
    """Something that works on any I/O manager."""
    a, b = trio.socket.socketpair()
    with a, b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.recv, 5)
            await trio.testing.wait_all_tasks_blocked()
            await a.send(b"hello")


def test_run_is_trios_run() -> None:
    async def main(*args: int) -> Any:
        assert await has_ring()
        await trio.sleep(1000)
        return args, trio.current_time()

    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio_uring.run(main, 1, 2, clock=clock) == ((1, 2), 1000)

    async def fail() -> None:
        raise KeyError(5)

    with pytest.raises(KeyError):
        trio_uring.run(fail)
    with pytest.raises(TypeError, match="async function"):
        trio_uring.run(lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="nonsense"):
        trio_uring.run(has_ring, nonsense=5)


def test_each_run_has_a_ring_of_its_own() -> None:
    rings = []

    async def main() -> None:
        rings.append(manager().ring)

    for _ in range(3):
        trio_uring.run(main, config=REQUIRED)
    assert len(set(map(id, rings))) == 3
    assert all(ring.closed for ring in rings)


def test_other_threads_keep_what_they_have() -> None:
    async def main() -> None:
        assert await trio.to_thread.run_sync(trio.run, has_ring) is False
        assert await trio.to_thread.run_sync(lambda: trio_uring.run(entries, config=OTHER)) == 8
        assert await has_ring()
        assert await entries() == REQUIRED.entries

    trio_uring.run(main, config=REQUIRED)

    async def plain_main() -> None:
        assert await trio.to_thread.run_sync(trio_uring.run, has_ring) is True
        assert await has_ring() is False
        await talk()

    trio.run(plain_main)


def test_many_runs_at_once() -> None:
    """They start and end in any order; each thread gets what it asks for."""
    barrier = threading.Barrier(6)
    wrong = []

    def work(ring: bool) -> None:
        for _ in range(20):
            barrier.wait()
            if (trio_uring.run(has_ring, config=REQUIRED) if ring else trio.run(has_ring)) is not ring:
                wrong.append(ring)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_install_and_uninstall() -> None:
    assert trio.run(has_ring) is False
    with installed():
        assert trio.run(has_ring) is True
        assert anyio.run(has_ring, backend="trio") is True
        host = Host()
        host.start(has_ring)  # installs once more, uninstalls
        assert host.finish() is True
    assert trio.run(has_ring) is False
    trio_uring.uninstall()
    trio_uring.uninstall()
    assert trio.run(has_ring) is False


def test_install_is_for_every_thread() -> None:
    async def main() -> None:
        assert await trio.to_thread.run_sync(trio.run, has_ring) is True

    with installed():
        trio.run(main)


def test_installing_again_replaces_the_configuration() -> None:
    with installed():
        assert trio.run(entries) == REQUIRED.entries
        trio_uring.install(OTHER)
        assert trio.run(entries) == OTHER.entries
    assert trio.run(has_ring) is False


def test_runs_under_way_keep_what_they_have() -> None:
    async def main() -> None:
        before = await has_ring()
        with installed():
            assert await has_ring() is before
            await talk()
        assert await has_ring() is before
        await talk()

    trio.run(main)
    trio_uring.run(main, config=REQUIRED)


def test_run_asks_for_itself_only() -> None:
    """Its configuration goes before the installed one, and is gone after it."""
    with installed(OTHER):
        assert trio_uring.run(entries, config=REQUIRED) == REQUIRED.entries
        assert trio.run(entries) == OTHER.entries
        assert trio_uring.run(has_ring, config=RingConfig(mode="off")) is False
        assert trio.run(has_ring) is True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("environment", "mode", "expected"),
    [
        (None, "auto", True),
        (None, "require", True),
        (None, "off", False),
        ("", "off", False),
        ("off", "auto", False),
        ("OFF", "require", False),
        ("auto", "off", True),
        ("require", "off", True),
    ],
)
def test_modes(environment: str | None, mode: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if environment is None:
        monkeypatch.delenv("TRIO_URING", raising=False)
    else:
        monkeypatch.setenv("TRIO_URING", environment)
    config = RingConfig(mode=mode)
    assert trio_uring.run(has_ring, config=config) is expected
    with installed(config):
        assert trio.run(has_ring) is expected


def test_nonsense_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_URING", "maybe")
    with pytest.raises(ValueError, match='TRIO_URING must be "auto", "require" or "off", not \'maybe\''):
        trio_uring.run(has_ring)


def _forbid_io_uring(code: int) -> None:
    """A seccomp filter, as container runtimes have it."""

    def instruction(code: int, yes: int, no: int, k: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    program = ctypes.create_string_buffer(
        instruction(0x20, 0, 0, 0)  # the system call's number
        + instruction(0x15, 0, 1, SYSCALL_IO_URING_SETUP)
        + instruction(0x06, 0, 0, 0x00050000 | code)  # this error
        + instruction(0x06, 0, 0, 0x7FFF0000)  # or go ahead
    )
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()


def without_io_uring(code: int, function: Callable[[], Any]) -> Any:
    def child() -> Any:
        _forbid_io_uring(code)
        return function()

    return in_child(child)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_a_sandbox_forbids_it(code: int) -> None:
    def auto() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trio_uring.run(talk)
            assert trio_uring.run(has_ring) is False
            with installed(RingConfig()):
                trio.run(talk)
        assert {warning.category for warning in caught} == {FallbackWarning}
        assert len(caught) == 3
        return [str(warning.message) for warning in caught]

    for message in without_io_uring(code, auto):
        assert message.startswith("io_uring is not used: a seccomp filter forbids io_uring")
    assert without_io_uring(code, trio_uring.is_available) is False
    assert "seccomp" in without_io_uring(code, trio_uring.why_not)

    def require() -> None:
        try:
            trio_uring.run(talk, config=REQUIRED)
        finally:
            assert trio.run(has_ring) is False
            trio.run(talk)

    with pytest.raises(UnavailableError, match="seccomp") as raised:
        without_io_uring(code, require)
    assert raised.value.errno == code

    def off() -> bool:
        warnings.simplefilter("error")
        return trio_uring.run(has_ring, config=RingConfig(mode="off"))

    assert without_io_uring(code, off) is False


def test_a_trio_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trio_internals, "NATIVE_PROBLEM", "no such thing any more")
    with pytest.warns(FallbackWarning, match="no such thing any more"):
        trio_uring.run(talk)
    with pytest.warns(FallbackWarning):
        trio_uring.install()
    assert trio.run(has_ring) is False
    trio_uring.uninstall()
    with pytest.raises(UnavailableError, match="has changed inside"):
        trio_uring.run(talk, config=REQUIRED)
    with pytest.raises(UnavailableError, match="has changed inside"):
        trio_uring.install(REQUIRED)
    assert trio_uring.run(has_ring, config=RingConfig(mode="off")) is False


def test_what_is_patched_on_trios_class_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As trio's own tests do."""
    calls = []
    original = UringIOManager.get_events

    def get_events(self: UringIOManager, timeout: float) -> list[int]:
        calls.append(timeout)
        return original(self, timeout)

    async def main() -> None:
        monkeypatch.setattr(_trio_internals.io_manager_class(), "get_events", get_events)
        await trio.lowlevel.checkpoint()
        await lowlevel.nop()

    with installed():
        trio.run(main)
    assert calls


def test_the_class_that_stands_there_is_a_manager() -> None:
    with installed():
        assert issubclass(_trio_internals.io_manager_class(), UringIOManager)
