"""anyio on the ring: `trio_uring.install` before `anyio.run`, and the trio backend. The rest is as always."""

from __future__ import annotations

import anyio
from anyio.abc import SocketAttribute, SocketStream

import trio_uring


async def shout(client: SocketStream) -> None:
    async with client:
        async for data in client:
            await client.send(data.upper())


async def main() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, shout)
        async with await anyio.connect_tcp("127.0.0.1", listener.extra(SocketAttribute.local_port)) as stream:
            await stream.send(b"hello, ring")
            print((await stream.receive()).decode())
        tasks.cancel_scope.cancel()
    print("engine:", trio_uring.statistics().engine)


if __name__ == "__main__":
    trio_uring.install(trio_uring.RingConfig(mode="require"))
    anyio.run(main, backend="trio")
