"""trio's functions that make streams and listeners, over sockets of the ring.

In a run that was started with a ring they do what trio's do: there trio's sockets are the ring's. In any other run
they see to it that what they return is, and that there is a ring, if there can be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from ._mount import ring_at_hand
from ._socket import on_the_ring

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable

OverSocket = TypeVar("OverSocket", trio.SocketStream, trio.SocketListener)


def _over_ours(made: OverSocket) -> OverSocket:
    ring_at_hand()
    made.socket = on_the_ring(made.socket)
    return made


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


async def open_unix_socket(filename: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> trio.SocketStream:
    """`trio.open_unix_socket`: connects to a UNIX socket.

    Args:
        filename: its path.

    Raises:
        OSError: it cannot be connected to.

    Cancelled, it leaves no connection. IORING_OP_CONNECT, Linux 5.5.
    """
    return _over_ours(await trio.open_unix_socket(filename))


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
