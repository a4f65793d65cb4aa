"""`install` and `uninstall`: rings for runs nobody here starts, and files on them for programs that do not know us.

With ``files=True`` names of trio and anyio lead here. Each of them looks, at every call, whether the caller is a task
of a run with a ring, and else calls what stood there before; so other runs, and anyio on asyncio, have what they had.

* ``trio.Path`` and ``anyio.Path`` stay the classes they are, and their methods are replaced in them. So it does not
  matter who has imported them when, or made objects of them; ``isinstance``, pickles and subclasses are not affected.
* ``trio.open_file`` and ``anyio.open_file`` are functions, replaced in their packages. A module that has done
  ``from trio import open_file`` before keeps trio's, and with it threads.

What trio's names return is an `AsyncFile`, which trio's class of files, being an abstract base class, is told to take
for an instance. What anyio's return is in `_anyio_files`.

A name is put back only where what is found there is ours: somebody may have patched it since, and may call ours from
there. That, and a name somebody has kept, does from then on what stood there before.
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from typing import TYPE_CHECKING, Any, Final

import trio

from . import _mount
from ._binary_files import AsyncFile
from ._core import on_ring
from ._files import open_file
from ._path import RING_METHODS, ring_or

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ._ring import RingConfig

_lock: Final = threading.Lock()
routes: Final[list[_Route]] = []
"""Those that are open."""


class _Route:
    """A name of somebody else's that leads here."""

    def __init__(
        self,
        owner: Any,
        name: str,
        ours: Callable[..., Awaitable[Any]],
        also_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._also_wanted = also_wanted
        self._owner = owner
        self._name = name
        self._open = True
        self._stock = getattr(owner, name)
        self._routed = functools.wraps(self._stock)(ring_or(self._stock, ours, self._wanted))
        setattr(owner, name, self._routed)

    def close(self) -> None:
        self._open = False
        if vars(self._owner).get(self._name) is self._routed:
            setattr(self._owner, self._name, self._stock)

    def _wanted(self) -> bool:
        return self._open and on_ring() and self._also_wanted()


def _open_routes() -> None:
    type(trio.wrap_file(io.BytesIO())).register(AsyncFile)
    routes.append(_Route(trio, "open_file", open_file))
    routes.extend(_Route(trio.Path, name, method) for name, method in RING_METHODS.items())
    try:
        import anyio
    except ImportError:
        return
    from ._anyio_files import for_anyio, on_trio, open_for_anyio

    routes.append(_Route(anyio, "open_file", open_for_anyio, on_trio))
    routes.extend(
        _Route(anyio.Path, name, for_anyio(method), on_trio)
        for name, method in RING_METHODS.items()
        if name in vars(anyio.Path)
    )


def _close_routes() -> None:
    while routes:
        routes.pop().close()


def install(config: RingConfig | None = None, *, files: bool = False) -> None:
    """Gives a ring to every later run of this process, however it is started.

    That is `trio.run`, `trio.lowlevel.start_guest_run`, ``anyio.run(backend="trio")`` and whatever calls them.
    Runs that are under way keep what they have. Calling it again replaces the configuration.

    Args:
        config: see `RingConfig`.
        files: puts the files of programs that do not know this package on the ring: in runs that have one,
            ``trio.open_file``, ``anyio.open_file`` and the methods of ``trio.Path`` and ``anyio.Path`` do what
            `open_file` and `Path` do. Everywhere else they do what they always did.

    Raises:
        UnavailableError: ``mode`` is ``"require"`` and this trio cannot be mounted on.
    """
    _mount.install(config)
    with _lock:
        _close_routes()
        if files:
            _open_routes()


def uninstall() -> None:
    """Undoes `install`: later runs get trio's own I/O manager again, and files trio's and anyio's own functions.

    Does nothing if nothing is installed.
    """
    _mount.uninstall()
    with _lock:
        _close_routes()


@contextlib.contextmanager
def installed_instead(config: RingConfig | None) -> Iterator[None]:
    """`install` for a while, or nothing installed if there is no configuration; then again what was before."""
    before, files = _mount.installed(), bool(routes)
    try:
        _set(config, files=False)
        yield
    finally:
        _set(before, files=files)


def _set(config: RingConfig | None, *, files: bool) -> None:
    if config is None:
        uninstall()
    else:
        install(config, files=files)
