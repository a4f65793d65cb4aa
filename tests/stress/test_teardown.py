"""Runs that end with work in flight, many times: no buffer is written to afterwards, nothing is left."""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import trio_uring
from tests.helpers import (
    MOUNTS,
    REQUIRED,
    Mount,
    crash,
    drain,
    in_kernel_worker,
    only_trio_complains,
)
from trio_uring import _file_ops, _socket_ops, lowlevel
from trio_uring._cancel import Operation
from trio_uring._core import UringIOManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.helpers import Bench

POISON = b"\xa5"
SIZE = 256
PIPES = 8
ROUNDS = 300
FILE_SIZE = 1 << 20


def _is_sanitised() -> bool:
    """Under AddressSanitizer freed memory is kept for a while."""
    return "libasan" in Path("/proc/self/maps").read_text()


class Writer:
    """A thread that writes into pipes at the moment at which a run ends."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        self._go.acquire()
        for fd in self._fds:
            os.write(fd, b"x" * SIZE)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def go(self) -> None:
        self._go.release()

    def __exit__(self, *_: object) -> None:
        self._go.release()
        self._thread.join()


async def _end(writer: Writer, how: str, spins: int) -> None:
    writer.go()
    for _ in range(spins):
        os.sched_yield()
    if how == "crash":
        await crash()


@pytest.mark.parametrize("how", ["return", "crash"])
@pytest.mark.parametrize("where", ["worker", "poll"])
def test_buffers_are_not_written_to_afterwards(
    mount: Mount, bench: Bench, where: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data arrives as the run ends. What was read was read before the end; the rest is in the pipe."""
    if where == "worker":
        monkeypatch.setattr(_file_ops, "READ", in_kernel_worker(_file_ops.READ))
    pipes = [bench.pipe() for _ in range(PIPES)]
    poisoned: list[bytearray] = []
    for i in range(ROUNDS):
        buffers = [bytearray(SIZE) for _ in pipes]
        taken: dict[int, int] = {}

        async def read(n: int, buffers: list[bytearray] = buffers, taken: dict[int, int] = taken) -> None:
            taken[n] = await lowlevel.read(pipes[n][0], buffers[n])

        async def main(writer: Writer, i: int = i) -> None:
            for n in range(PIPES):
                trio.lowlevel.spawn_system_task(read, n)
            for _ in range(i % 3):
                await trio.lowlevel.checkpoint()
            await _end(writer, how, i % 50)

        with Writer([write_end for _, write_end in pipes]) as writer:
            snapshots = _run_to_its_end(mount, main, how, buffers, writer)
        poisoned += buffers
        for n, (read_end, write_end) in enumerate(pipes):
            assert snapshots[n] in (bytes(SIZE), b"x" * SIZE)
            if how == "return":  # its task has it if it was read
                assert (snapshots[n] == b"x" * SIZE) == (taken.get(n) == SIZE)
            os.write(write_end, b"y")  # bait for a reader that should be gone
            rest = drain(read_end, 1 if snapshots[n] == b"x" * SIZE else SIZE + 1)
            assert rest.endswith(b"y")
    assert all(buffer == POISON * SIZE for buffer in poisoned)


@pytest.mark.parametrize("how", ["return", "crash"])
def test_files_and_fds(mount: Mount, bench: Bench, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end while kernel workers read much of a file, open files, look at them, accept connections."""
    for module, names in ((_file_ops, ("READ", "OPENAT", "STATX")), (_socket_ops, ("SOCKET",))):
        for name in names:
            monkeypatch.setattr(module, name, in_kernel_worker(getattr(module, name)))
    path = bench.path(b"x" * FILE_SIZE)
    fd = bench.keep(os.open(path, os.O_RDONLY))
    listener = bench.listener(backlog=4096)
    buffers = [bytearray(FILE_SIZE) for _ in range(4)]

    async def close_result(call: Any, *args: Any) -> None:
        result = await call(*args)
        os.close(result[0] if isinstance(result, tuple) else result)

    for i in range(ROUNDS):

        async def main(i: int = i) -> None:
            for buffer in buffers:
                trio.lowlevel.spawn_system_task(lowlevel.read, fd, buffer, 0)
                trio.lowlevel.spawn_system_task(lowlevel.statx, path)
                trio.lowlevel.spawn_system_task(close_result, lowlevel.openat, path, os.O_RDONLY)
                trio.lowlevel.spawn_system_task(close_result, lowlevel.socket)
            trio.lowlevel.spawn_system_task(close_result, lowlevel.accept, listener)
            for _ in range(i % 3):
                await trio.lowlevel.checkpoint()
            client = bench.new_socket()
            client.connect(listener.getsockname())
            client.close()
            if how == "crash":
                await crash()

        _run_to_its_end(mount, main, how, buffers)
        assert all(buffer.count(POISON) == FILE_SIZE for buffer in buffers)


def _run_to_its_end(
    mount: Mount, main: Callable[..., Awaitable[None]], how: str, buffers: list[bytearray], *args: object
) -> list[bytes]:
    """Runs it, and overwrites the buffers as soon as the run is over. Returns what was in them."""
    with only_trio_complains() if how == "crash" else nullcontext():
        try:
            mount.run(main, *args)
        except trio.TrioInternalError:
            assert how == "crash"
        before = [bytes(buffer) for buffer in buffers]
        for buffer in buffers:
            buffer[:] = POISON * len(buffer)
    for buffer in buffers:
        buffer += b"not pinned"
        del buffer[-10:]
    return before


def _managers_and_operations() -> Counter[str]:
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, UringIOManager | Operation))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("name", MOUNTS)
def test_thousands_of_short_runs(bench: Bench, name: str) -> None:
    """Each leaves nothing: no fd, no memory, no object."""
    run = MOUNTS[name].run
    a, b = bench.sockets()

    async def main() -> None:
        trio.lowlevel.spawn_system_task(lowlevel.recv, a, bytearray(1 << 16))
        await trio.lowlevel.checkpoint()
        await lowlevel.send(b, b"x", 0)
        await lowlevel.nop()

    def runs(n: int) -> int:
        for _ in range(n):
            run(main)
        gc.collect()
        return _resident()

    before = runs(200)
    objects = _managers_and_operations()
    fds = len(os.listdir("/proc/self/fd"))
    after = runs(2000)
    assert len(os.listdir("/proc/self/fd")) == fds
    assert _managers_and_operations() == objects
    if not _is_sanitised():
        assert after - before < 8 << 20  # a ring is more than 24 KiB


def test_rings_come_and_go_in_threads() -> None:
    """As a server with a run for each worker thread has them."""

    def work() -> None:
        for _ in range(50):
            trio_uring.run(lowlevel.nop, config=REQUIRED)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
