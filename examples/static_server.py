"""A static file server: h11 speaks HTTP, files and sockets share a ring, and the kernel moves the bytes between them.

``python examples/static_server.py DIRECTORY [--port 8000]``. GET and HEAD, one range, keep-alive. What a path may lead
to is the kernel's decision: ``openat2`` with RESOLVE_BENEATH follows nothing out of the directory. Ctrl-C or SIGTERM
ends it.
"""

from __future__ import annotations

import argparse
import mimetypes
import os
import re
import signal
import stat
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes

import h11
import trio

import trio_uring
from trio_uring import lowlevel

BENEATH = 0x08 | 0x02  # RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
MOST_CONNECTIONS = 1000
IDLE_SECONDS = 30
_RANGE = re.compile(rb"bytes=(\d*)-(\d*)")


class Length:
    """Stands for so many bytes that do not pass through h11."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Client:
    """A connection."""

    def __init__(self, root: int, stream: trio.SocketStream) -> None:
        self.root = root
        self.stream = stream
        self.http = h11.Connection(h11.SERVER)

    async def serve(self) -> None:
        """Answers requests until one side has enough."""
        try:
            while request := await self.next_request():
                await self.answer(request)
                if self.http.our_state is not h11.DONE:
                    break
                self.http.start_next_cycle()
        except h11.RemoteProtocolError as exc:
            if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self.say(exc.error_status_hint, b"Bad request\n", connection="close")

    async def next_request(self) -> h11.Request | None:
        """What a request carries is not for us."""
        request = None
        with trio.move_on_after(IDLE_SECONDS):
            while True:
                event = self.http.next_event()
                if event is h11.NEED_DATA:
                    self.http.receive_data(await self.stream.receive_some())
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    return request
                elif not isinstance(event, h11.Data):
                    break
        return None

    async def answer(self, request: h11.Request) -> None:
        if request.method not in (b"GET", b"HEAD"):
            await self.say(405, b"Method not allowed\n", allow="GET, HEAD")
            return
        name = unquote_to_bytes(request.target.partition(b"?")[0]).lstrip(b"/")
        if not name or name.endswith(b"/"):
            name += b"index.html"
        try:
            fd = await lowlevel.openat2(name, os.O_RDONLY, resolve=BENEATH, dir_fd=self.root)
        except (OSError, ValueError):  # missing, forbidden, outside, no name at all
            await self.say(404, b"Not found\n")
            return
        try:
            await self.send(fd, name, request)
        finally:
            os.close(fd)

    async def send(self, fd: int, name: bytes, request: h11.Request) -> None:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            await self.say(404, b"Not found\n")
            return
        size, status = info.st_size, 200
        headers = {
            "content-type": mimetypes.guess_type(os.fsdecode(name))[0] or "application/octet-stream",
            "accept-ranges": "bytes",
        }
        start, end = 0, size
        wanted = _RANGE.fullmatch(dict(request.headers).get(b"range", b""))
        if wanted is not None and any(wanted.groups()):
            first, last = (int(number) if number else None for number in wanted.groups())
            if first is None:
                start = max(0, size - (last or 0))
            else:
                start, end = first, size if last is None else min(last + 1, size)
            if start >= end:
                await self.say(416, b"", **{"content-range": f"bytes */{size}"})
                return
            status, headers["content-range"] = 206, f"bytes {start}-{end - 1}/{size}"
        await self.head(status, end - start, headers)
        if request.method == b"GET":
            await self.body(fd, start, end - start)
        self.http.send(h11.EndOfMessage())

    async def body(self, fd: int, start: int, count: int) -> None:
        placeholder: Any = Length(count)
        self.http.send_with_data_passthrough(h11.Data(data=placeholder))
        if await trio_uring.send_file(fd, self.stream, start, count) < count:
            raise trio.BrokenResourceError("the file has become shorter")

    async def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        headers["content-length"] = str(length)
        response = h11.Response(status_code=status, headers=list(headers.items()))
        await self.stream.send_all(self.http.send(response) or b"")

    async def say(self, status: int, text: bytes, **headers: str) -> None:
        """A response that is not a file."""
        await self.head(status, len(text), {"content-type": "text/plain", **headers})
        await self.stream.send_all(self.http.send(h11.Data(data=text)) or b"")
        self.http.send(h11.EndOfMessage())


async def main(directory: str, port: int) -> None:
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    places = trio.CapacityLimiter(MOST_CONNECTIONS)

    async def connection(stream: trio.SocketStream) -> None:
        async with places:
            try:
                await Client(root, stream).serve()
            except trio.BrokenResourceError:  # the client has gone
                pass

    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, connection, listeners))
            print(f"listening on port {listeners[0].socket.getsockname()[1]}", flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    os.close(root)
    print("done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serves the files of a directory.")
    parser.add_argument("directory")
    parser.add_argument("--port", type=int, default=0, help="on the loopback interface; default: any")
    args = parser.parse_args()
    trio_uring.run(main, args.directory, args.port, config=trio_uring.RingConfig(mode="require"))
