"""trio's functions that make streams and listeners, over sockets of the ring.

In a run that was started with a ring they do what trio's do: there trio's sockets are the ring's. In any other run
they see to it that what they return is, and that there is a ring, if there can be one.
"""

from __future__ import annotations

import errno
import socket as stdlib_socket
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import enable_ki_protection

from ._mount import ring_at_hand
from ._multishot import accept_multishot
from ._socket import UringSocket, on_the_ring

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable

    from typing_extensions import Self

_OF_ONE_CONNECTION: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
        errno.ETIMEDOUT,
    }
)
"""Errors of an accept that concern the connection it was about, as accept(2) has it."""

OverSocket = TypeVar("OverSocket", trio.SocketStream, trio.SocketListener)


def _over_ours(made: OverSocket) -> OverSocket:
    ring_at_hand()
    made.socket = on_the_ring(made.socket)
    return made


@enable_ki_protection
async def open_tcp_stream(
    host: str | bytes, port: int, *, happy_eyeballs_delay: float | None = 0.25, local_address: str | None = None
) -> trio.SocketStream:
    """`trio.open_tcp_stream`: connects to a host, by whichever of its addresses answers first.

    Args:
        host: a name or an address.
        port: the port number.
        happy_eyeballs_delay: seconds until the next address is tried as well; None: when the one before has failed.
        local_address: the address to connect from.

    Raises:
        OSError: no address could be connected to.

    Cancelled, it leaves no connection. IORING_OP_CONNECT, Linux 5.5.
    """
    return _over_ours(
        await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay, local_address=local_address)
    )


@enable_ki_protection
async def open_unix_socket(filename: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> trio.SocketStream:
    """`trio.open_unix_socket`: connects to a UNIX socket.

    Args:
        filename: its path.

    Raises:
        OSError: it cannot be connected to.

    Cancelled, it leaves no connection. IORING_OP_CONNECT, Linux 5.5.
    """
    return _over_ours(await trio.open_unix_socket(filename))


@enable_ki_protection
async def open_tcp_listeners(
    port: int, *, host: str | bytes | None = None, backlog: int | None = None
) -> list[trio.SocketListener]:
    """`trio.open_tcp_listeners`: listens for TCP connections, on each address of the host.

    Args:
        port: the port number; 0 is any free one.
        host: a name or an address; None is every interface.
        backlog: how many connections may wait to be accepted; None is as many as the kernel allows.

    Raises:
        OSError: an address cannot be listened on.

    Returns:
        listeners whose ``accept`` is IORING_OP_ACCEPT, Linux 5.5.
    """
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    return [_over_ours(listener) for listener in listeners]


async def serve_tcp(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """`trio.serve_tcp`: listens for TCP connections and runs a task for each, until it is cancelled.

    Args:
        handler: called with the stream of each connection, which is closed when it returns.
        port, host, backlog: see `open_tcp_listeners`.
        handler_nursery: where the tasks live; by default in a nursery of its own.
        task_status: for ``nursery.start``, which returns the listeners.

    Raises:
        OSError: an address cannot be listened on.
    """
    listeners = await open_tcp_listeners(port, host=host, backlog=backlog)
    await trio.serve_listeners(handler, listeners, handler_nursery=handler_nursery, task_status=task_status)


class AcceptAhead(trio.abc.Listener[trio.SocketStream]):
    """A listener that accepts before it is asked to: one submission for all connections, instead of one for each. That
    pays where they come in bursts. For `trio.serve_listeners`, or in an ``async with`` of your own.

    Args:
        listener: what to accept from; it is closed with this one.
        limit: with so many connections waiting to be taken, no more are accepted, and those who come wait in the
            listener's backlog. Up to a backlog's worth may be in excess.

    IORING_OP_ACCEPT, multishot, Linux 5.19.
    """

    def __init__(self, listener: trio.SocketListener, limit: int = 64) -> None:
        sock = listener.socket
        self._listener = listener
        self._is_like = sock.family, sock.type, sock.proto
        self._connections = accept_multishot(sock.fileno(), stdlib_socket.SOCK_NONBLOCK, limit=limit)
        self._begun = False

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        await self._connections.__aenter__()
        self._begun = True
        return self

    @enable_ki_protection
    async def accept(self) -> trio.SocketStream:
        """Takes a connection; waits for one if there is none. Cancelled, it leaves what comes to the next call.

        Raises:
            trio.ClosedResourceError: it was closed, or stopped and there are no more.
            OSError: the next connection could not be accepted (EMFILE, say); another try may be worth while.
        """
        while True:
            try:
                fd = await self._connections.__anext__()
            except StopAsyncIteration:
                raise trio.ClosedResourceError("this listener has stopped") from None
            except OSError as exc:
                if exc.errno not in _OF_ONE_CONNECTION:
                    raise
            else:
                return trio.SocketStream(UringSocket(stdlib_socket.socket(*self._is_like, fileno=fd)))

    async def stop(self) -> None:
        """Accepts no more. Those that have been accepted are still to be taken."""
        await self._connections.stop()

    @enable_ki_protection
    async def aclose(self) -> None:
        """Closes the listener, and the connections that nobody has taken."""
        try:
            if self._begun:
                self._begun = False
                await self._connections.__aexit__(None, None, None)
        finally:
            await self._listener.aclose()
