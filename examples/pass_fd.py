"""File descriptors over a UNIX socket: a parent opens files and a port, a child that can open neither uses them.

``python examples/pass_fd.py FILE...``: the child gets each file, and a listening socket to serve the checksums on. The
parent connects to it and writes what it gets, as ``sha256sum`` does.
"""

from __future__ import annotations

import array
import hashlib
import os
import socket
import sys
from functools import partial

import trio

import trio_uring

RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS
ROOM = socket.CMSG_SPACE(array.array("i").itemsize)


async def send_fd(channel: trio.socket.SocketType, name: str, fd: int) -> None:
    await channel.sendmsg([os.fsencode(name)], [(*RIGHTS, array.array("i", [fd]))])


async def receive_fd(channel: trio.socket.SocketType) -> tuple[str, int]:
    name, ancillary, _, _ = await channel.recvmsg(4096, ROOM)
    ((*kind, data),) = ancillary
    assert tuple(kind) == RIGHTS
    return os.fsdecode(name), array.array("i", data)[0]


async def parent(names: list[str]) -> None:
    ours, theirs = trio.socket.socketpair(type=socket.SOCK_SEQPACKET)  # which keeps messages apart
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    command = [sys.executable, __file__, "--child", str(theirs.fileno()), str(len(names))]
    async with trio.open_nursery() as nursery:
        with ours:
            with theirs:
                await nursery.start(partial(trio.run_process, command, pass_fds=[theirs.fileno()]))
            for name in names:
                async with await trio_uring.open_file(name, "rb") as file:
                    await send_fd(ours, name, file.fileno())
            address = listener.socket.getsockname()
            await send_fd(ours, "port", listener.socket.fileno())
        await listener.aclose()  # the child has it
        async with await trio.open_tcp_stream(*address) as stream:
            async for data in stream:
                sys.stdout.write(data.decode())


async def child(channel_fd: int, count: int) -> None:
    lines = []
    with trio.socket.fromfd(channel_fd, socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        os.close(channel_fd)  # `fromfd` has made a copy
        for _ in range(count):
            name, fd = await receive_fd(channel)
            digest = hashlib.sha256()
            async with await trio_uring.open_file(fd, "rb") as file:
                while data := await file.read1(1 << 20):
                    digest.update(data)
            lines.append(f"{digest.hexdigest()}  {name}\n")
        _, fd = await receive_fd(channel)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    async with listener, await listener.accept() as stream:
        await stream.send_all("".join(lines).encode())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        trio_uring.run(child, int(sys.argv[2]), int(sys.argv[3]))
    else:
        trio_uring.run(parent, sys.argv[1:])
