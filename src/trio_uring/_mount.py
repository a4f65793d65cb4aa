"""How a manager is tied to a run: the run's I/O manager *is* the ring.

trio makes its I/O manager by calling the module global ``TheIOManager`` in ``setup_runner``. While somebody wants
rings, a dispatching class stands there and decides for each run, in the thread that starts it: `run` asks for a ring
for the run it is about to start, `install` for every run from then on. Other runs get trio's own manager.
The dispatcher is a subclass of `UringIOManager`, so that what is patched on ``TheIOManager`` takes effect.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import threading
import warnings
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import trio

from . import _trio_internals
from ._attached import AttachedManager
from ._core import UringIOManager, UringStatistics, _this_thread, close_left_over, no_manager
from ._errors import FallbackWarning, UnavailableError
from ._ring import RingConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from typing_extensions import TypeVarTuple, Unpack

    Args = TypeVarTuple("Args")

T = TypeVar("T")


class _Requests(threading.local):
    """What this thread wants for the run it is about to start; None: no wish."""

    config: RingConfig | None = None
    beside: bool = False  # not as the run's own I/O manager


class Door(Protocol):
    """A name of trio's that leads unchanged programs to the ring; whoever comes from a run without one is sent back."""

    def open(self) -> None:
        """Puts ours in the place of trio's."""

    def close(self) -> None:
        """Puts trio's back."""


class MethodDoor:
    """A method of a class of trio's. What stands there when it closes is put back only if it is ours."""

    def __init__(self, owner: type[Any], name: str, stock: Any, ours: Any) -> None:
        self._owner = owner
        self._name = name
        self._stock = stock
        self._ours = functools.wraps(stock)(ours)

    def open(self) -> None:
        """Puts ours in the place of trio's."""
        setattr(self._owner, self._name, self._ours)

    def close(self) -> None:
        """Puts trio's back."""
        if vars(self._owner).get(self._name) is self._ours:
            setattr(self._owner, self._name, self._stock)


doors: Final[list[Door]] = []
"""Those that are open while somebody wants rings, and while there are runs that have one."""

_requests: Final = _Requests()
_lock: Final = threading.Lock()
_users = 0
_rings = 0
_doors_are_open = False
_installed: RingConfig | None = None
_stock: type[Any] = _trio_internals.io_manager_class()


class TheIOManager(UringIOManager):
    """Stands in trio's place of that name: makes the manager for the run that is being set up."""

    def __new__(cls) -> Any:
        config = _requests.config or _installed
        if config is None or config.effective_mode == "off" or _requests.beside:
            return _stock()
        close_left_over()
        manager = super().__new__(cls)
        try:
            UringIOManager.__init__(manager, config)
        except UnavailableError as exc:
            if config.effective_mode == "require":
                raise
            _warn(exc.strerror or str(exc))
            return _stock()
        _add_ring(1)
        return manager

    def __init__(self) -> None:
        """`__new__` has done it: whether there can be a ring decides which class is made."""

    def close(self) -> None:
        """See `UringIOManager`. Callable more than once."""
        first = not self.closed
        try:
            super().close()
        finally:
            if first:
                _add_ring(-1)


def _warn(reason: str, what: str = "io_uring is not used") -> None:
    warnings.warn(f"{what}: {reason}", FallbackWarning, stacklevel=5)


def _native_mount_possible(config: RingConfig) -> bool:
    """False, with a warning, if this trio's I/O manager cannot be replaced."""
    problem = _trio_internals.NATIVE_PROBLEM
    if problem is None:
        return True
    reason = f"trio {trio.__version__} has changed inside ({problem}); use the trio release this was tested with"
    if config.effective_mode == "require":
        raise UnavailableError(errno.EOPNOTSUPP, reason)
    if config.effective_mode == "auto":
        _warn(reason, "what is trio's own stays on epoll")
    return False


def _add_user(n: int) -> None:
    """Puts the dispatcher in place for the first who wants it; takes it away after the last, unless it is gone."""
    global _users, _stock
    with _lock:
        _users += n
        current = _trio_internals.io_manager_class()
        if _users > 0 and current is not TheIOManager:
            _stock = current
            _trio_internals.set_io_manager_class(TheIOManager)
        elif _users == 0 and current is TheIOManager:
            _trio_internals.set_io_manager_class(_stock)
        _see_to_doors()


def _add_ring(n: int) -> None:
    """Counts the runs that have a ring: they may outlast whoever wanted it."""
    global _rings
    with _lock:
        _rings += n
        _see_to_doors()


def _see_to_doors() -> None:
    global _doors_are_open
    wanted = _users > 0 or _rings > 0
    if wanted != _doors_are_open:
        _doors_are_open = wanted
        for door in doors:
            door.open() if wanted else door.close()


@contextlib.contextmanager
def _wanted_by_this_thread(config: RingConfig, *, beside: bool = False) -> Iterator[None]:
    before = _requests.config, _requests.beside
    _requests.config, _requests.beside = config, beside
    try:
        yield
    finally:
        _requests.config, _requests.beside = before


@contextlib.contextmanager
def _requested(config: RingConfig) -> Iterator[None]:
    _add_user(1)
    try:
        with _wanted_by_this_thread(config):
            yield
    finally:
        _add_user(-1)


def ring_wanted(config: RingConfig | None) -> contextlib.AbstractContextManager[None]:
    """Runs that this thread starts meanwhile have a ring."""
    config = config or RingConfig()
    return (_requested if _native_mount_possible(config) else _wanted_by_this_thread)(config)


def ring_wanted_beside(config: RingConfig) -> contextlib.AbstractContextManager[None]:
    """Runs that this thread starts meanwhile have trio's own I/O manager; the first call mounts a ring beside it."""
    return _wanted_by_this_thread(config, beside=True)


def _attach_config() -> RingConfig:
    return _requests.config or _installed or RingConfig()


def attach(purpose: str) -> UringIOManager:
    """Mounts a ring beside the I/O manager of the current run, which was started without one.

    Args:
        purpose: what needs it, for the error.

    Raises:
        UnavailableError: rings are switched off, or there can be none.
        RuntimeError: the caller is no task of a trio run.
    """
    trio.lowlevel.current_task()
    config = _attach_config()
    if config.effective_mode == "off":
        raise UnavailableError(errno.EOPNOTSUPP, f"{purpose} needs a ring, and for this trio run they are switched off")
    try:
        return AttachedManager(config)
    except UnavailableError as exc:
        reason = f"{purpose} needs a ring, and this trio run can have none: {exc.strerror}"
        raise UnavailableError(exc.errno, reason) from None


no_manager.mount = attach


def ring_at_hand() -> bool:
    """Is the caller a task of a run that has a ring? If it can have one, it has one now.

    Raises:
        UnavailableError: there can be none, and ``mode`` is ``"require"``.
    """
    if not trio.lowlevel.in_trio_task():
        return False
    if _this_thread.manager is cast("object", no_manager):
        try:
            attach("this method")
        except UnavailableError:
            if _attach_config().effective_mode == "require":
                raise
            return False
    return True


def run(
    async_fn: Callable[[Unpack[Args]], Awaitable[T]],
    *args: Unpack[Args],
    config: RingConfig | None = None,
    **trio_run_kwargs: Any,
) -> T:
    """`trio.run`, with a ring as the run's I/O manager.

    Args:
        async_fn, args: what to run.
        config: see `RingConfig`.
        trio_run_kwargs: for `trio.run`: ``clock``, ``instruments`` and so on.

    Raises:
        UnavailableError: ``mode`` is ``"require"`` and there can be no ring.

    Warns:
        FallbackWarning: ``mode`` is ``"auto"`` and there can be no ring, or none in the place of this trio's own I/O
            manager; the run uses that.
    """
    with ring_wanted(config):
        return trio.run(async_fn, *args, **trio_run_kwargs)


def install(config: RingConfig | None = None) -> None:
    """Gives a ring to every later run of this process, however it is started.

    That is `trio.run`, `trio.lowlevel.start_guest_run`, ``anyio.run(backend="trio")`` and whatever calls them.
    Runs that are under way keep what they have. Calling it again replaces the configuration.

    Args:
        config: see `RingConfig`.

    Raises:
        UnavailableError: ``mode`` is ``"require"`` and this trio cannot be mounted on.
    """
    global _installed
    config = config or RingConfig()
    if not _native_mount_possible(config):
        return
    first, _installed = _installed is None, config
    _add_user(1 if first else 0)


def installed() -> RingConfig | None:
    """What is installed."""
    return _installed


def uninstall() -> None:
    """Undoes `install`: later runs get trio's own I/O manager again. Does nothing if nothing is installed."""
    global _installed
    if _installed is not None:
        _installed = None
        _add_user(-1)


def statistics() -> UringStatistics:
    """The state of the current run's ring.

    Raises:
        RuntimeError: not inside a trio run.
        UnavailableError: the run has no ring.
    """
    trio.lowlevel.current_statistics()
    manager = _this_thread.manager
    if not isinstance(manager, UringIOManager):
        raise UnavailableError(errno.EOPNOTSUPP, "this trio run has no ring, at least not yet")
    return manager.statistics()
