"""pytest-trio on the ring: ``pytest examples/test_with_pytest_trio.py``. See conftest.py beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

import trio_uring
from trio_uring import lowlevel

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.trio
async def test_there_is_a_ring() -> None:
    assert trio_uring.statistics().engine == "io_uring"


@pytest.mark.trio
async def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "greeting").write_bytes(b"hello")
    fd = await lowlevel.openat(tmp_path / "greeting", os.O_RDONLY)
    buffer = bytearray(16)
    assert await lowlevel.read(fd, buffer, 0) == 5
    assert buffer[:5] == b"hello"
    await lowlevel.close(fd)


@pytest.mark.trio
async def test_stock_trio_sockets(nursery: trio.Nursery) -> None:
    here, there = trio.socket.socketpair()
    with here, there:
        nursery.start_soon(there.send, b"hello")
        assert await here.recv(16) == b"hello"
