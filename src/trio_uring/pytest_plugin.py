"""A pytest plugin: chooses which tests have a ring, and fails those that leave something behind on it.

It works from outside of whatever starts the runs (pytest-trio, anyio's plugin, a test that calls `trio.run`): before a
test is set up it asks for rings, or switches them off, and after the test is torn down it looks what is left. A test
that has no `trio_uring` marker, in a session without that ini option, is none of its business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from . import _mount
from ._abi import Feature, Opcode, Setup
from ._core import InFlight, UringIOManager
from ._ring import RingConfig, capabilities, why_not
from .lowlevel import MULTISHOT, TABLE

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

MOUNTS: Final = ("native", "attached", "stock")
_POLLS: Final = frozenset({"wait_readable", "wait_writable"})  # they carry nothing, and trio's own are among them
_MARKERS: Final = (
    "trio_uring(mount, *, leaks=False, **config): the ring of the test's runs; see the documentation of trio_uring.",
    "trio_uring_needs(*names): skips the test where the kernel lacks one of these operations or features.",
)
_STANDARD: Final = 2  # pytest itself moves the standard streams about


@dataclasses.dataclass
class _Watch:
    """What a test that is looked after has had, and has left."""

    fds: dict[int, str]
    operations: list[InFlight] = dataclasses.field(default_factory=list)
    buffers: int = 0


_watched: Final[list[_Watch]] = []
"""That of the test under way, if it is looked after."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """See the documentation of pytest."""
    parser.addini(
        "trio_uring", "native, attached or stock: the mount of tests without a marker of that name", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    """See the documentation of pytest."""
    for line in _MARKERS:
        config.addinivalue_line("markers", line)


@pytest.fixture(params=MOUNTS)
def trio_uring_mount(request: pytest.FixtureRequest) -> str:
    """Runs a test on each mount; the name of the present one."""
    mount: str = request.param
    return mount


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """See the documentation of pytest."""
    mount, leaks, config = _wish_of(item)
    with contextlib.ExitStack() as stack:
        if mount in MOUNTS:
            stack.enter_context(_mounted(mount, config))
            if not leaks and mount != "stock":
                stack.enter_context(_looking())
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """See the documentation of pytest."""
    mount, _, _ = _wish_of(item)
    if mount and mount not in MOUNTS:
        raise pytest.UsageError(f"trio_uring: a mount is one of {', '.join(MOUNTS)}, not {mount!r}")
    for marker in item.iter_markers("trio_uring_needs"):
        for name in marker.args:
            if (reason := _why_not(name)) is not None:
                pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """See the documentation of pytest."""
    yield
    if _watched and (left := _left_by(_watched[-1])):
        pytest.fail("left behind by this test: " + "; ".join(left), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """What a fixture of a wider scope opens is not the test's."""
    if not _watched or fixturedef.scope == "function":
        return (yield)
    before = _open_fds()
    result = yield
    _watched[-1].fds.update({fd: what for fd, what in _open_fds().items() if before.get(fd) != what})
    return result


def _wish_of(item: pytest.Item) -> tuple[str, bool, dict[str, Any]]:
    """The mount, or nothing; whether it may leave something behind; what is said of the ring."""
    marker = item.get_closest_marker("trio_uring")
    args, config = ((), {}) if marker is None else (marker.args, dict(marker.kwargs))
    leaks = bool(config.pop("leaks", False))
    callspec = getattr(item, "callspec", None)
    mount = callspec.params.get("trio_uring_mount") if callspec is not None else None
    return mount or (args[0] if args else item.config.getini("trio_uring")), leaks, config


@contextlib.contextmanager
def _mounted(mount: str, config: dict[str, Any]) -> Iterator[None]:
    if mount == "native":
        with _mount.ring_wanted(RingConfig(**{"mode": "require", **config})):
            yield
    elif mount == "attached":
        with _mount.ring_wanted_beside(RingConfig(**{"mode": "require", **config})):
            yield
    else:
        before = os.environ.get("TRIO_URING")
        os.environ["TRIO_URING"] = "off"
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRIO_URING"]
            else:
                os.environ["TRIO_URING"] = before


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    """At the end of each run: what is still under way, before the ring is drained."""
    watch, close = _Watch(_open_fds()), UringIOManager.close

    def look_and_close(self: UringIOManager) -> None:
        if not self.closed:
            watch.operations += [each for each in self.statistics().operations if each.operation not in _POLLS]
            watch.buffers += self.registered.buffers_in_use
        close(self)

    UringIOManager.close = look_and_close  # type: ignore[method-assign]
    _watched.append(watch)
    try:
        yield
    finally:
        _watched.remove(watch)
        UringIOManager.close = close  # type: ignore[method-assign]


def _left_by(watch: _Watch) -> list[str]:
    left = [
        f"{each.operation} in flight on fd {each.fd}" + (" with its buffer" if each.state == "NOTIFYING" else "")
        for each in watch.operations
    ]
    if watch.buffers:
        left.append(f"{watch.buffers} registered buffers")
    return left + [f"fd {fd} ({what})" for fd, what in _open_fds().items() if watch.fds.get(fd) != what]


def _open_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) <= _STANDARD:
            continue
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return fds


def _why_not(name: str) -> str | None:
    """Why a test that needs an operation or a feature is to be skipped; None if it is not."""
    kind = TABLE.get(name) or MULTISHOT.get(name)
    needed = {name.upper()} if kind is None else {opcode.name for opcode in kind.needs}
    if not needed <= {*Opcode.__members__, *Feature.__members__, *Setup.__members__}:
        raise pytest.UsageError(f"trio_uring_needs: {name!r} is no operation or feature")
    if (reason := why_not()) is not None:
        return reason
    here = capabilities()
    lacking = needed.difference(here.operations, here.features, here.setup_flags)
    return f"this kernel's io_uring lacks {', '.join(sorted(lacking))}" if lacking else None
