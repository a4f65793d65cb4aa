"""Programs of other people's to talk to, on the ring."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import hypercorn
import hypercorn.trio
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def serving(app: Any, **settings: Any) -> AsyncIterator[str]:
    """Hypercorn's trio worker with an ASGI application, and its URL.

    Args:
        app: the application.
        settings: for `hypercorn.Config`.
    """
    config = hypercorn.Config()
    config.bind = ["127.0.0.1:0"]
    config.loglevel = "WARNING"
    for name, value in settings.items():
        setattr(config, name, value)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        serve: Any = partial(hypercorn.trio.serve, app, config, shutdown_trigger=stop.wait)
        (url,) = await nursery.start(serve)
        yield url
        stop.set()


@asynccontextmanager
async def on_the_ring(operations: int = 1) -> AsyncIterator[None]:
    """What happens inside hands at least so many operations to the kernel; the run's I/O manager is the ring."""
    assert isinstance(trio.lowlevel.current_statistics().io_statistics, trio_uring.UringStatistics)
    before = trio_uring.statistics().sqes
    yield
    assert trio_uring.statistics().sqes - before >= operations


def in_flight() -> list[str]:
    """The names of what the kernel is at now."""
    return [operation.operation for operation in trio_uring.statistics().operations]
