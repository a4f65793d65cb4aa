"""A TCP proxy: passes on what comes, both ways, each end of stream by itself, no faster than the other side takes.

``python examples/tcp_proxy.py --listen 8000 example.org:80``. Ctrl-C or SIGTERM ends it, and the connections.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial

import trio

import trio_uring


async def pump(source: trio.SocketStream, target: trio.SocketStream, broken: trio.CancelScope) -> None:
    """One direction. The next receive waits until the last piece is sent."""
    try:
        async for data in source:
            await target.send_all(data)
        await target.send_eof()
    except trio.BrokenResourceError:  # a reset: both sides get to know
        broken.cancel()


async def relay(host: str, port: int, client: trio.SocketStream) -> None:
    """One connection."""
    try:
        server = await trio.open_tcp_stream(host, port)
    except OSError as exc:
        print(f"{host}:{port}: {exc}", file=sys.stderr)
        return
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(pump, client, server, nursery.cancel_scope)
        nursery.start_soon(pump, server, client, nursery.cancel_scope)


async def main(listen: int, host: str, port: int) -> None:
    listeners = await trio.open_tcp_listeners(listen, host="127.0.0.1")
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, partial(relay, host, port), listeners))
            print(f"listening on port {listeners[0].socket.getsockname()[1]}", flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    print("done", flush=True)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Passes TCP connections on.")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="on the loopback interface; default: any")
    parser.add_argument("target", type=_address, metavar="HOST:PORT")
    args = parser.parse_args()
    trio_uring.run(main, args.listen, *args.target)
