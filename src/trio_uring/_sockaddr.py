"""sockaddr and cmsg: between the kernel's bytes and what the standard library's socket module shows."""

from __future__ import annotations

import operator
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FAMILY: Final = struct.Struct("=H")
_INET: Final = struct.Struct("=H2s4s8x")
_INET6: Final = struct.Struct("=H2s4s16sI")
_NETLINK: Final = struct.Struct("=H2xII")
_VSOCK: Final = struct.Struct("=H2xII")
_CMSG: Final = struct.Struct("@Nii")
_SUN_PATH_SIZE: Final = 108
_ALIGN: Final = struct.calcsize("@N")

Ancillary = tuple[int, int, bytes]


def encode_address(address: object) -> bytes:
    """The sockaddr for ``(ip, port)``, ``(ip, port, flowinfo, scope_id)`` or a UNIX path (``b"\\0..."`` if abstract).

    Raises:
        ValueError: the host is not a numeric IP address, or the port or path is out of range.
        TypeError: the address has no such form.
    """
    if isinstance(address, str | bytes | os.PathLike):
        return _encode_unix(os.fsencode(address))
    if isinstance(address, tuple) and len(address) in (2, 4):
        host, port, *rest = address
        if not 0 <= operator.index(port) <= 0xFFFF:
            raise ValueError(f"port must be 0 to 65535, not {port}")
        wire_port = operator.index(port).to_bytes(2, "big")
        if rest or ":" in host:
            return _encode_inet6(host, wire_port, *rest)
        return _INET.pack(socket.AF_INET, wire_port, _numeric(socket.AF_INET, host or "0.0.0.0"))
    raise TypeError(f"an address is (ip, port), (ip, port, flowinfo, scope_id) or a UNIX path, not {address!r}")


def _encode_unix(path: bytes) -> bytes:
    end = b"" if path.startswith(b"\0") or not path else b"\0"
    if len(path + end) > _SUN_PATH_SIZE:
        raise ValueError(f"a UNIX socket path has at most {_SUN_PATH_SIZE - len(end)} bytes, this one {len(path)}")
    return _FAMILY.pack(socket.AF_UNIX) + path + end


def _encode_inet6(host: str, wire_port: bytes, flowinfo: int = 0, scope_id: int = 0) -> bytes:
    host, _, interface = host.partition("%")
    if interface:
        scope_id = int(interface) if interface.isdecimal() else socket.if_nametoindex(interface)
    if not (0 <= flowinfo <= 0xFFFFF and 0 <= scope_id <= 0xFFFFFFFF):
        raise ValueError(f"flowinfo has 20 bits and scope_id 32, not {flowinfo}, {scope_id}")
    packed = _numeric(socket.AF_INET6, host or "::")
    return _INET6.pack(socket.AF_INET6, wire_port, flowinfo.to_bytes(4, "big"), packed, scope_id)


def _numeric(family: int, host: str) -> bytes:
    try:
        return socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"{host!r} is not a numeric IP address; resolve names with trio.socket.getaddrinfo") from None


def decode_address(raw: bytes) -> Any:
    """A sockaddr as the socket module shows it; ``(family, bytes)`` for a family it does not know; None if empty."""
    if len(raw) < _FAMILY.size:
        return None
    (family,) = _FAMILY.unpack_from(raw)
    if family == socket.AF_INET:
        _, port, ip = _INET.unpack_from(raw)
        return socket.inet_ntop(family, ip), int.from_bytes(port, "big")
    if family == socket.AF_INET6:
        _, port, flowinfo, ip, scope_id = _INET6.unpack_from(raw)
        return (
            socket.inet_ntop(family, ip),
            int.from_bytes(port, "big"),
            int.from_bytes(flowinfo, "big"),
            scope_id,
        )
    if family == socket.AF_UNIX:
        path = raw[_FAMILY.size :]
        return path if path.startswith(b"\0") else os.fsdecode(path.split(b"\0", 1)[0])
    if family == socket.AF_NETLINK:
        return _NETLINK.unpack_from(raw)[1:]
    if family == socket.AF_VSOCK:
        return _VSOCK.unpack_from(raw)[:0:-1]
    return family, raw[_FAMILY.size :]


def _padded(size: int) -> int:
    return (size + _ALIGN - 1) & ~(_ALIGN - 1)


def encode_ancillary(ancdata: Iterable[tuple[int, int, Any]]) -> bytes:
    """The control buffer for ``(level, type, data)`` items, as in `socket.socket.sendmsg`."""
    out = bytearray()
    for level, kind, data in ancdata:
        payload = bytes(memoryview(data).cast("B")) if len(data) else b""
        out += _CMSG.pack(socket.CMSG_LEN(len(payload)), level, kind)
        out += payload
        out += bytes(_padded(len(out)) - len(out))
    return bytes(out)


def decode_ancillary(control: bytes) -> list[Ancillary]:
    """The ``(level, type, data)`` items of a control buffer, as in `socket.socket.recvmsg`."""
    items: list[Ancillary] = []
    at = 0
    while at + _CMSG.size <= len(control):
        size, level, kind = _CMSG.unpack_from(control, at)
        start, end = at + socket.CMSG_LEN(0), min(at + size, len(control))
        if end < start:
            break
        items.append((level, kind, control[start:end]))
        at = _padded(at + size)
    return items


def descriptors(items: Sequence[Ancillary]) -> list[int]:
    """The file descriptors that arrived with SCM_RIGHTS."""
    return [
        fd
        for level, kind, data in items
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("@i", data[: len(data) & ~3])
    ]
