"""pytest: which way the trio runs of a test get to io_uring, and what the test leaves behind.

``_trio_uring_pytest`` is what pytest knows, with the options and the markers; it comes here when a test asks for
something. It is of no concern who starts the runs: pytest-trio, anyio's plugin, or the test itself.

The mount is set up before the first fixture of a test and undone after its last tear-down. pytest-trio runs a test and
its async fixtures in one run, anyio's plugin in one for each test, or in one for as long as an async fixture lives.

What is left behind is seen at two moments:

* **at the end of a run**, when all its tasks have ended and nothing has been cancelled yet: operations that nobody
  waits for, and the buffers they and the ring hold. Afterwards the run drains its ring, and nothing is to be seen;
* **after the test's last tear-down**: file descriptors that were not there before its first set-up.

Fixtures with a wider scope than the test may keep what they open. So what appears while one of them is set up is left
out, and runs that have begun before or there are not looked at.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast, get_args

import pytest

from . import _mount, _routes
from ._abi import Feature, Setup
from ._core import _open_managers, at_close
from ._errors import UnavailableError
from ._ring import PREFERRED, RingConfig, capabilities
from .lowlevel import MULTISHOT, TABLE

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from ._core import InFlight, UringIOManager

    T = TypeVar("T")

__all__ = ["Plugin"]

Mount = Literal["native", "attached", "stock"]

_MOUNTS: Final = get_args(Mount)
_SETUP_FLAGS: Final = [name for name, flag in Setup.__members__.items() if flag in PREFERRED]


class Plugin:
    """The hooks around a test.

    Args:
        config: pytest's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._default = config.getoption("trio_uring") or config.getini("trio_uring")
        self._leaks = config.getini("trio_uring_leaks")
        self._test = contextlib.ExitStack()
        self._watch: _Watch | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, T, T]:
        """Undoes the mount, whatever has ended the test, even Ctrl-C."""
        with self._test:
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Mounts, before the first fixture."""
        markers = list(item.iter_markers("trio_uring"))  # the closest first
        options: dict[str, Any] = {"mode": "require"}
        for marker in reversed(markers):
            options.update(marker.kwargs)
        leaks = options.pop("leaks", self._leaks)
        config = RingConfig(**options)
        mount = self._mount_of(item, markers)
        if mount is None and markers:
            pytest.fail("the trio_uring marker names no mount, and neither does an option", pytrace=False)
        for marker in item.iter_markers("trio_uring_needs"):
            _skip_without(marker.args, mount)
        if mount is not None:
            self._test.enter_context(_mounted(mount, config))
        if mount in ("native", "attached") and not leaks:
            self._watch = _Watch()
            self._test.enter_context(self._watch.over_runs())

    def _mount_of(self, item: pytest.Item, markers: list[pytest.Mark]) -> Mount | None:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        named = [mount for marker in markers for mount in marker.args]
        mount = parameters.get("trio_uring_mount") or (named or [self._default])[0] or None
        if mount is not None and mount not in _MOUNTS:
            pytest.fail(f"trio_uring: a mount is one of {', '.join(_MOUNTS)}, not {mount!r}", pytrace=False)
        if "trio_uring_mount" in parameters and mount != "stock":
            _skip_without((), mount)
        return cast("Mount | None", mount)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, T, T]:
        """What fixtures of a wider scope open is not the test's."""
        if self._watch is None or fixturedef.scope == "function":
            return (yield)
        with self._watch.looking_away():
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """A test that has not passed keeps what its traceback names."""
        if call.excinfo is not None:
            self._watch = None

    @pytest.hookimpl(wrapper=True, trylast=True)  # inside of what redirects output, as the set-up is
    def pytest_runtest_teardown(self) -> Generator[None, T, T]:
        """Looks for what is left, after the last fixture."""
        try:
            result = yield
        finally:
            watch, self._watch = self._watch, None
        left = [] if watch is None else watch.left_behind()
        if left:
            pytest.fail("left behind by this test: " + "; ".join(left), pytrace=False)
        return result


@contextlib.contextmanager
def _mounted(mount: Mount, config: RingConfig) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_routes.installed_instead(config if mount == "native" else None))
        if mount == "attached":
            stack.enter_context(_mount.ring_wanted_beside(config))
        elif mount == "stock":
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("TRIO_URING", "off")
        yield


# What the kernel must offer


def _skip_without(names: Iterable[str], mount: Mount | None) -> None:
    __tracebackhide__ = True
    if mount == "stock":
        pytest.skip("needs a ring, and on stock trio there is none")
    try:
        here = capabilities()
    except UnavailableError as exc:
        pytest.skip(exc.strerror or str(exc))
    offered = {*here.operations, *here.features, *here.setup_flags}
    lacking = sorted(set[str]().union(*(_needed(name) for name in names)) - offered)
    if lacking:
        pytest.skip(f"this kernel's io_uring lacks {', '.join(lacking)}")


def _needed(name: str) -> set[str]:
    kind = TABLE.get(name) or MULTISHOT.get(name)
    if kind is not None:
        return {opcode.name for opcode in kind.needs}
    if name in Feature.__members__ or name in _SETUP_FLAGS:
        return {name}
    pytest.fail(
        f"trio_uring_needs: {name!r} is no operation of trio_uring.lowlevel, no feature "
        f"({', '.join(Feature.__members__)}) and no set-up flag ({', '.join(_SETUP_FLAGS)})",
        pytrace=False,
    )


# What is left behind


class _Watch:
    """Over one test, from before its first set-up to after its last tear-down."""

    def __init__(self) -> None:
        self._left: list[str] = []
        self._fds = _open_fds()
        self._runs = set(_open_managers)

    @contextlib.contextmanager
    def over_runs(self) -> Iterator[None]:
        """Looks at what runs leave that end meanwhile."""
        at_close.append(self._run_ends)
        try:
            yield
        finally:
            at_close.remove(self._run_ends)

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """What comes up meanwhile is to stay."""
        fds, runs = _open_fds(), set(_open_managers)
        try:
            yield
        finally:
            self._fds.update(_new(_open_fds(), fds))
            self._runs |= _open_managers - runs

    def left_behind(self) -> list[str]:
        """A few words for each thing."""
        if self._new_fds():
            gc.collect()  # what nobody has a hold of any more, Python complains about by itself
        return [*self._left, *[f"fd {fd} ({_describe(fd, what)})" for fd, what in self._new_fds().items()]]

    def _new_fds(self) -> dict[int, str]:
        of_runs = {fd for manager in tuple(_open_managers) for fd in manager.fds()}  # which may end with a fixture
        return {fd: what for fd, what in _new(_open_fds(), self._fds).items() if fd not in of_runs}

    def _run_ends(self, manager: UringIOManager) -> None:
        if manager in self._runs:
            return
        self._left.extend(_operation_left(operation, pinned) for operation, pinned in manager.unfinished())
        registered = manager.registered.buffers_in_use
        if registered:
            self._left.append(f"{registered} registered buffers")


def _operation_left(operation: InFlight, pinned: int) -> str:
    task = f" of task {operation.task!r}" if operation.task else ""
    buffer = f" with its buffer of {pinned} bytes" if pinned else ""
    return f"{operation.operation} in flight on fd {operation.fd}{task} ({operation.state}){buffer}"


def _open_fds() -> dict[int, str]:
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            pass
    return fds


def _new(now: dict[int, str], before: dict[int, str]) -> dict[int, str]:
    return {fd: what for fd, what in now.items() if before.get(fd) != what}


def _describe(fd: int, what: str) -> str:
    if not what.startswith("socket:"):
        return what
    with socket.socket(fileno=os.dup(fd)) as sock:
        return f"{what}, {sock!r}".replace(f"fd={sock.fileno()}, ", "")
