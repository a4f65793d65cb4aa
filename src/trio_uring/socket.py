"""`trio.socket`, whose constructors make sockets of the ring: `UringSocket`.

In a run that was started with a ring trio's own do so, too; these do it in every run, which gets a ring if it has none
and can have one.
"""

from __future__ import annotations

import socket as _stdlib_socket
from typing import SupportsIndex as _SupportsIndex

import trio as _trio
from trio.lowlevel import enable_ki_protection as _enable_ki_protection
from trio.socket import *  # noqa: F403 - whatever is there

from ._mount import ring_at_hand as _ring_at_hand
from ._socket import UringSocket as UringSocket
from ._socket import on_the_ring as _on_the_ring


def from_stdlib_socket(sock: _stdlib_socket.socket) -> UringSocket:  # type: ignore[no-redef]
    """See `trio.socket.from_stdlib_socket`."""
    _ring_at_hand()
    return UringSocket(sock)


@_enable_ki_protection  # type: ignore[no-redef]
def socket(
    family: int = _stdlib_socket.AF_INET,
    type: int = _stdlib_socket.SOCK_STREAM,
    proto: int = 0,
    fileno: int | None = None,
) -> _trio.socket.SocketType:
    """See `trio.socket.socket`; a custom socket factory has the first word here, too."""
    _ring_at_hand()
    return _on_the_ring(_trio.socket.socket(family, type, proto, fileno))


@_enable_ki_protection  # type: ignore[no-redef]
def socketpair(
    family: int | None = None,
    type: int = _stdlib_socket.SOCK_STREAM,
    proto: int = 0,
) -> tuple[UringSocket, UringSocket]:
    """See `trio.socket.socketpair`."""
    _ring_at_hand()
    left, right = _stdlib_socket.socketpair(family, type, proto)
    return UringSocket(left), UringSocket(right)


@_enable_ki_protection  # type: ignore[no-redef]
def fromfd(
    fd: _SupportsIndex,
    family: int = _stdlib_socket.AF_INET,
    type: int = _stdlib_socket.SOCK_STREAM,
    proto: int = 0,
) -> _trio.socket.SocketType:
    """See `trio.socket.fromfd`: a socket on a duplicate of the fd."""
    _ring_at_hand()
    return _on_the_ring(_trio.socket.fromfd(fd, family, type, proto))
