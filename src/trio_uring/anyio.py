"""anyio on the ring: its functions for files, streams and listeners, and `run`.

In a run that was started with a ring anyio's own sockets are the ring's already, as its trio backend makes them of
trio's. In any other run the functions here see to it that they are, and that there is a ring, if there can be one.
Files and paths go to the ring only by these names, or by ``install(files=True)``.

What is returned has anyio's own classes, so its wrappers, attributes and exceptions are as ever. Importing this imports
anyio; the rest of the package does without.

All of it needs anyio's trio backend. On asyncio these functions raise `RuntimeError`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.streams.file
import trio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.streams.stapled import MultiListener
from anyio.streams.tls import TLSStream
from trio.lowlevel import enable_ki_protection

from ._anyio_files import RingFile, for_anyio, on_trio, open_for_anyio
from ._binary_files import AsyncFile, protected
from ._mount import ring_at_hand, ring_wanted
from ._path import RING_METHODS, ring_or
from ._socket import on_the_ring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from typing_extensions import Self, TypeVarTuple, Unpack

    from ._ring import RingConfig

    Args = TypeVarTuple("Args")

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Awaitable[Any]]")

__all__ = [
    "FileReadStream",
    "FileWriteStream",
    "Path",
    "connect_tcp",
    "connect_unix",
    "create_tcp_listener",
    "create_unix_listener",
    "open_file",
    "run",
]


def run(
    func: Callable[[Unpack[Args]], Awaitable[T]],
    *args: Unpack[Args],
    config: RingConfig | None = None,
    backend: str = "trio",
    backend_options: dict[str, Any] | None = None,
) -> T:
    """`anyio.run` on the trio backend, with a ring as the run's I/O manager.

    Args:
        func, args: what to run.
        config: see `trio_uring.RingConfig`.
        backend: ``"trio"``, so that the arguments of `anyio.run` do here, too.
        backend_options: for `trio.run`: ``clock``, ``instruments`` and so on.

    Raises:
        ValueError: another backend is asked for.
        UnavailableError: ``mode`` is ``"require"`` and there can be no ring.

    Warns:
        FallbackWarning: see `trio_uring.run`.
    """
    if backend != "trio":
        raise ValueError(f'the ring is for anyio\'s trio backend, not for {backend!r}: say backend="trio", or nothing')
    with ring_wanted(config):
        return anyio.run(func, *args, backend="trio", backend_options=backend_options)


def _need_trio() -> None:
    if not on_trio():
        raise RuntimeError(
            "trio_uring.anyio needs anyio's trio backend, and this code does not run on it: start it with "
            'trio_uring.anyio.run(...) or anyio.run(..., backend="trio")'
        )


def _as_anyios(stock: F) -> Callable[[Callable[..., Awaitable[Any]]], F]:
    """Signature and types are those of anyio's function, in whichever release. What it makes is not lost to Ctrl-C."""

    def decorate(ours: Any) -> Any:
        ours.__signature__ = inspect.signature(stock)
        return enable_ki_protection(ours)

    return decorate


# Streams


async def _over_ours(make: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    _need_trio()
    ring_at_hand()
    made = await make(*args, **kwargs)
    _put_on_the_ring(made)
    return made


def _put_on_the_ring(made: Any) -> None:
    if isinstance(made, MultiListener):
        for listener in made.listeners:
            _put_on_the_ring(listener)
    elif isinstance(made, TLSStream):
        _put_on_the_ring(made.transport_stream)
    else:
        # anyio has no public name for what its trio backend puts streams over, and no public way to have it put them
        # over a given socket of trio's. Where this name is gone, they stay on trio's, and wait where trio waits.
        sock = getattr(made, "_trio_socket", None)
        if isinstance(sock, trio.socket.SocketType):
            made._trio_socket = on_the_ring(sock)


@_as_anyios(anyio.connect_tcp)
async def connect_tcp(*args: Any, **kwargs: Any) -> Any:
    """`anyio.connect_tcp`: connects to a host, by whichever of its addresses answers first, and speaks TLS if asked to.

    Returns:
        an `anyio.abc.SocketStream`, or an `anyio.streams.tls.TLSStream` over one.

    Raises:
        OSError: no address could be connected to.
        RuntimeError: anyio does not run on trio.

    Cancelled, it leaves no connection. IORING_OP_CONNECT, Linux 5.5.
    """
    return await _over_ours(anyio.connect_tcp, *args, **kwargs)


@_as_anyios(anyio.connect_unix)
async def connect_unix(*args: Any, **kwargs: Any) -> Any:
    """`anyio.connect_unix`: connects to a UNIX socket.

    Returns:
        an `anyio.abc.UNIXSocketStream`.

    Raises:
        OSError: it cannot be connected to.
        RuntimeError: anyio does not run on trio.

    Cancelled, it leaves no connection. IORING_OP_CONNECT, Linux 5.5.
    """
    return await _over_ours(anyio.connect_unix, *args, **kwargs)


@_as_anyios(anyio.create_tcp_listener)
async def create_tcp_listener(*args: Any, **kwargs: Any) -> Any:
    """`anyio.create_tcp_listener`: listens for TCP connections.

    Returns:
        an `anyio.abc.Listener` whose ``accept`` is IORING_OP_ACCEPT, Linux 5.5; what it returns are streams as those of
        `connect_tcp`.

    Raises:
        OSError: an address cannot be listened on.
        RuntimeError: anyio does not run on trio.
    """
    return await _over_ours(anyio.create_tcp_listener, *args, **kwargs)


@_as_anyios(anyio.create_unix_listener)
async def create_unix_listener(*args: Any, **kwargs: Any) -> Any:
    """`anyio.create_unix_listener`: listens on a UNIX socket, whose name anyio makes in a thread.

    Returns:
        an `anyio.abc.SocketListener` whose ``accept`` is IORING_OP_ACCEPT, Linux 5.5; what it returns are streams as
        those of `connect_unix`.

    Raises:
        OSError: it cannot be listened on.
        RuntimeError: anyio does not run on trio.
    """
    return await _over_ours(anyio.create_unix_listener, *args, **kwargs)


# Files


@_as_anyios(anyio.open_file)
async def open_file(*args: Any, **kwargs: Any) -> Any:
    """`anyio.open_file`, on the ring; see `trio_uring.open_file`. IORING_OP_OPENAT, Linux 5.6.

    There is no thread for a ``limiter`` to limit; the file has it as an attribute.

    Returns:
        an `anyio.AsyncFile`. It also has the attributes of `anyio.streams.file.FileStreamAttribute`.

    Raises:
        OSError: as `open`, with the path as its ``filename``.
        UnavailableError: the run can have no ring.
        RuntimeError: anyio does not run on trio.

    An open that is cancelled leaves no fd.
    """
    _need_trio()
    return await open_for_anyio(*args, **kwargs)


def _ring_wanted_by_path() -> bool:
    _need_trio()
    return ring_at_hand()


class Path(anyio.Path):
    """`anyio.Path` on the ring, with the methods of `trio_uring.Path`. What that leaves to threads is anyio's own.

    Where there can be no ring, all of them use threads. Paths that are derived from one are of this class since anyio
    4.14; before, they are anyio's own.

    Raises:
        RuntimeError: anyio does not run on trio.
    """

    __slots__ = ()


def _put_methods_on_the_ring() -> None:
    for name, method in RING_METHODS.items():
        stock = getattr(anyio.Path, name, None)
        if stock is not None:
            ours = functools.wraps(stock)(ring_or(stock, for_anyio(method), _ring_wanted_by_path))
            ours.__doc__ = method.__doc__
            setattr(Path, name, ours)


_put_methods_on_the_ring()


@contextlib.contextmanager
def _as_stream_errors() -> Iterator[None]:
    try:
        yield
    except ValueError:  # of a file that is closed
        raise ClosedResourceError from None
    except OSError as exc:
        raise BrokenResourceError from exc


def _unwrapped(file: object) -> Any:
    """The file itself, of which anyio's classes take any."""
    unwrapped = file.wrapped if isinstance(file, RingFile) else file
    if not isinstance(unwrapped, AsyncFile):
        raise TypeError(f"expected a file of open_file, not {type(file).__name__}")
    return unwrapped


@protected
class FileReadStream(anyio.streams.file.FileReadStream):
    """`anyio.streams.file.FileReadStream` on the ring: a stream of the bytes of a file.

    Its methods are checkpoints where those of `trio_uring.AsyncFile` are.

    Args:
        file: one of `open_file`, or of `trio_uring.open_file`, in a binary mode.
    """

    def __init__(self, file: anyio.AsyncFile[bytes] | AsyncFile) -> None:
        self._ring_file = _unwrapped(file)
        super().__init__(self._ring_file)

    @classmethod
    @enable_ki_protection
    async def from_path(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a file to read it.

        Raises:
            OSError: it cannot be opened.
            RuntimeError: anyio does not run on trio.
        """
        return cls(await open_file(path, "rb"))

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes, up to so many. IORING_OP_READ, Linux 5.6.

        Raises:
            ClosedResourceError: the file is closed.
            BrokenResourceError: it cannot be read.
            EndOfStream: that was all.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        with _as_stream_errors():
            data: bytes = await self._ring_file.read(max_bytes)
        if not data:
            raise EndOfStream
        return data

    async def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """As `io.IOBase.seek`."""
        result: int = await self._ring_file.seek(position, whence)
        return result

    async def tell(self) -> int:
        """As `io.IOBase.tell`."""
        result: int = await self._ring_file.tell()
        return result

    async def aclose(self) -> None:
        """Closes the file; also if it is cancelled."""
        await self._ring_file.aclose()


@protected
class FileWriteStream(anyio.streams.file.FileWriteStream):
    """`anyio.streams.file.FileWriteStream` on the ring: a stream into a file.

    Its methods are checkpoints where those of `trio_uring.AsyncFile` are.

    Args:
        file: one of `open_file`, or of `trio_uring.open_file`, in a binary mode.
    """

    def __init__(self, file: anyio.AsyncFile[bytes] | AsyncFile) -> None:
        self._ring_file = _unwrapped(file)
        super().__init__(self._ring_file)

    @classmethod
    @enable_ki_protection
    async def from_path(cls, path: str | os.PathLike[str], append: bool = False) -> Self:
        """Opens a file to write it, from its beginning or at its end.

        Raises:
            OSError: it cannot be opened.
            RuntimeError: anyio does not run on trio.
        """
        return cls(await open_file(path, "ab" if append else "wb"))

    async def send(self, item: bytes) -> None:
        """Writes to the file's buffer; `aclose` writes that to the file. IORING_OP_WRITE, Linux 5.6.

        Raises:
            ClosedResourceError: the file is closed.
            BrokenResourceError: it cannot be written.
        """
        with _as_stream_errors():
            await self._ring_file.write(item)

    async def aclose(self) -> None:
        """Closes the file; also if it is cancelled."""
        await self._ring_file.aclose()
