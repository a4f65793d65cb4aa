"""Reads Python's standard library with threads and with io_uring, serves it over TCP, and checks every byte.

One `trio_uring.run` does all of it:

1. Every file below the standard library's directory is read with `trio.open_file` and with `trio.Path.read_bytes`,
   which hand each operation to a thread; with `trio_uring.lowlevel`, which does not; and, to see what is left to gain,
   with calls that block the event loop.
2. A server on the ring sends the same files over loopback TCP to plain trio clients. One client stops reading; the
   server cancels that transfer at its deadline, while the others go on.
3. A table of what it cost.

If a digest is wrong, a transfer broken or a file descriptor leaked, the program ends with status 1.

``make run`` starts it; ``python examples/main_job.py --limit 200`` is the quick version.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import resource
import socket
import statistics
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

import trio_uring
from trio_uring import lowlevel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.syscalls import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from benchmarks.syscalls import Mark

    Reader = Callable[[str], Awaitable[bytes | bytearray]]

TASKS: Final = 32  # read at the same time; trio starts up to 40 threads
SAMPLE: Final = 200  # files that are read once more under ptrace, to count system calls
ENOUGH_SECONDS: Final = 40.0  # no new round after this time
CLIENTS: Final = 8
MOST_SECONDS: Final = 60.0  # for serving everything
GRACE_SECONDS: Final = 2.0  # the deadline of a transfer is this, and its size at the slowest rate the server bears:
SLOWEST: Final = 32 * 1024 * 1024  # bytes per second
REQUIRE_RING: Final = trio_uring.RingConfig(mode="require")


# Ways to read a file


async def with_open_file(path: str) -> bytes:
    """Three trips to a thread."""
    async with await trio.open_file(path, "rb") as file:
        return await file.read()


async def with_read_bytes(path: str) -> bytes:
    """One trip to a thread: the best that trio has."""
    return await trio.Path(path).read_bytes()


async def on_the_ring(path: str) -> bytearray:
    """No thread. What 32 tasks ask for goes to the kernel with one system call."""
    fd = await lowlevel.openat(path, os.O_RDONLY)
    try:
        content = bytearray(os.fstat(fd).st_size)  # does not block: the file is open
        filled = 0
        while filled < len(content):
            n = await lowlevel.read(fd, memoryview(content)[filled:], filled)
            if n == 0:
                raise EOFError(f"{path} has become shorter")
            filled += n
        return content
    finally:
        with trio.CancelScope(shield=True):
            await lowlevel.close(fd)


async def blocking(path: str) -> bytes:
    """What a trio program must not do: nothing else runs until the disk has answered."""
    return Path(path).read_bytes()


READERS: Final[dict[str, Reader]] = {
    "trio.open_file": with_open_file,
    "trio.Path.read_bytes": with_read_bytes,
    "trio_uring": on_the_ring,
    "blocking": blocking,
}


async def read_all(read: Reader, paths: Sequence[str], tasks: int = TASKS) -> dict[str, bytes | bytearray]:
    """Reads the files, ``tasks`` of them at a time."""
    contents: dict[str, bytes | bytearray] = {}
    queue = iter(paths)

    async def reader() -> None:
        for path in queue:
            contents[path] = await read(path)

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(reader)
    return contents


# What it costs


@dataclass(frozen=True)
class Cost:
    """What one pass over all files took."""

    seconds: float
    switches: int
    threads: int
    enters: int


def switches_by_thread() -> Counter[str]:
    """How often each thread of this process has been switched away from."""
    switches: Counter[str] = Counter()
    for status in Path("/proc/self/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
            continue
        switches[status.parent.name] = sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return switches


async def measure(read: Reader, paths: Sequence[str], expected: dict[str, str]) -> Cost:
    """Reads all files, then, with the clock stopped, checks them."""
    threads_before, enters_before = switches_by_thread(), trio_uring.statistics().enters
    usage_before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    contents = await read_all(read, paths)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ran = switches_by_thread() - threads_before
    for path in paths:
        check(path, contents[path], expected)
    return Cost(
        seconds=seconds,
        switches=usage.ru_nvcsw + usage.ru_nivcsw - usage_before.ru_nvcsw - usage_before.ru_nivcsw,
        threads=len({*ran, str(os.getpid())}),
        enters=trio_uring.statistics().enters - enters_before,
    )


def count_system_calls(read: Reader, paths: Sequence[str]) -> float | None:
    """System calls for each file, read one by one in a child process; None where counting them is forbidden."""

    async def counted(mark: Mark) -> None:
        await read_all(read, paths, tasks=1)  # starts the thread
        mark()
        await read_all(read, paths, tasks=1)
        mark()

    calls = count(lambda mark: trio_uring.run(counted, mark, config=REQUIRE_RING))
    return None if calls is None else calls / len(paths)


# The files


def find_files(limit: int | None) -> list[str]:
    """The regular files of the standard library, without what others have installed there; spread out if limited."""
    found = []
    for directory, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = sorted({*below} - {"site-packages", "dist-packages"})
        paths = (os.path.join(directory, name) for name in sorted(names))
        found += [path for path in paths if os.path.isfile(path) and os.access(path, os.R_OK)]
    return found if limit is None else found[:: max(1, len(found) // limit)][:limit]


def digest(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def check(path: str, content: bytes | bytearray, expected: dict[str, str]) -> None:
    if digest(content) != expected[path]:
        raise AssertionError(f"{path}: the content is wrong")


# The server: a request is a file's number in 4 bytes, an answer its size in 8 bytes and its content


class Server:
    """Serves files on the ring: file descriptors and `trio_uring.lowlevel`, nothing else."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.cut_off = trio.Event()

    async def serve(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                fd, _ = await lowlevel.accept(listener)
                nursery.start_soon(self.serve_connection, fd)

    async def serve_connection(self, fd: int) -> None:
        request = bytearray(4)
        try:
            while await lowlevel.recv(fd, request, socket.MSG_WAITALL) == len(request):
                content = await on_the_ring(self.paths[int.from_bytes(request, "big")])
                if not await self.send(fd, [len(content).to_bytes(8, "big"), content]):
                    self.cut_off.set()
                    break
        finally:
            with trio.CancelScope(shield=True):
                await lowlevel.close(fd)

    async def send(self, fd: int, answer: Sequence[bytes | bytearray]) -> bool:
        """False if the deadline passed first. The kernel says how much it has sent by then, so nothing is in doubt."""
        size = sum(map(len, answer))
        sent = 0
        with trio.move_on_after(GRACE_SECONDS + size / SLOWEST):
            sent = await lowlevel.sendmsg(fd, answer, flags=socket.MSG_WAITALL)
        return sent == size


# The clients: plain trio


async def receive_exactly(stream: trio.SocketStream, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        more = await stream.receive_some(min(size - len(data), 1 << 20))
        if not more:
            raise EOFError(f"the server closed the connection after {len(data)} of {size} bytes")
        data += more
    return data


async def fetch(stream: trio.SocketStream, number: int) -> bytearray:
    await stream.send_all(number.to_bytes(4, "big"))
    return await receive_exactly(stream, int.from_bytes(await receive_exactly(stream, 8), "big"))


async def client(
    port: int, numbers: Sequence[int], server: Server, expected: dict[str, str], fetched: Counter[str]
) -> None:
    """Fetches its share of the files, and goes on until the server has cut off the client that is stuck."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        for done, number in enumerate(itertools.cycle(numbers), 1):
            after = server.cut_off.is_set()
            check(server.paths[number], await fetch(stream, number), expected)
            fetched["after the cut" if after else "before"] += 1
            if after and done >= len(numbers):
                break


async def stuck_client(port: int, number: int, server: Server) -> None:
    """Asks for a file and does not read it."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(number.to_bytes(4, "big"))
        await server.cut_off.wait()
        try:
            await receive_exactly(stream, 8 + os.path.getsize(server.paths[number]))
        except (EOFError, trio.BrokenResourceError):
            return
    raise AssertionError("the stuck transfer was complete after all")


async def serve_and_fetch(paths: Sequence[str], expected: dict[str, str]) -> None:
    server = Server(paths)
    largest = max(range(len(paths)), key=lambda number: os.path.getsize(paths[number]))
    fetched: Counter[str] = Counter()
    start = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # so that a stuck client is noticed
        port = listener.getsockname()[1]
        async with trio.open_nursery() as serving:
            serving.start_soon(server.serve, listener)
            async with trio.open_nursery() as clients:
                clients.start_soon(stuck_client, port, largest, server)
                for first in range(min(CLIENTS, len(paths))):
                    numbers = range(first, len(paths), CLIENTS)
                    clients.start_soon(client, port, numbers, server, expected, fetched)
            serving.cancel_scope.cancel()
    print(
        f"  {fetched.total()} files in {time.perf_counter() - start:.1f} s, every digest right; the stuck transfer "
        f"was cut off,\n  {fetched['after the cut']} other transfers began after that and are complete"
    )


# The job


async def job(paths: Sequence[str], expected: dict[str, str]) -> dict[str, list[Cost]]:
    open_before = len(os.listdir("/proc/self/fd"))
    started = time.perf_counter()
    costs: dict[str, list[Cost]] = {name: [] for name in READERS}
    for number in range(1, 4):
        for name, read in READERS.items():
            print(f"  round {number}, {name:20} ", end="", flush=True)
            cost = await measure(read, paths, expected)
            costs[name].append(cost)
            print(f"{cost.seconds:6.2f} s, every digest right")
        if time.perf_counter() - started > ENOUGH_SECONDS:
            break

    print(f"Serving them over TCP to {CLIENTS} clients and one that does not read", flush=True)
    with trio.fail_after(MOST_SECONDS):
        await serve_and_fetch(paths, expected)

    ring = trio_uring.statistics()
    open_after = len(os.listdir("/proc/self/fd"))
    print(
        f"  in flight {ring.in_flight}, open files {open_before} before and {open_after} after, "
        f"peak {ring.peak} operations, {ring.cancels_asked} cancelled"
    )
    if ring.in_flight or ring.cancels_asked == 0 or open_after != open_before:
        raise AssertionError(f"something is left over, or nothing was cancelled: {ring}")
    return costs


def print_table(costs: dict[str, list[Cost]], calls: dict[str, float | None], files: int, size: int) -> None:
    def row(title: str, cells: list[str]) -> None:
        print(f"{title:34}" + "".join(f"{cell:>21}" for cell in cells))

    def median(what: Callable[[Cost], float]) -> list[float]:
        return [statistics.median(map(what, passes)) for passes in costs.values()]

    ring = costs["trio_uring"]
    ratios = [
        statistics.median(one.seconds / other.seconds for one, other in zip(passes, ring, strict=True))
        for passes in costs.values()
    ]
    print()
    row("", list(costs))
    row("files per second", [f"{n:,.0f}" for n in median(lambda cost: files / cost.seconds)])
    row("time, the ring's being 1", [f"{n:.1f}" for n in ratios])
    row("system calls per file, one by one", ["n/a" if n is None else f"{n:.1f}" for n in calls.values()])
    row("io_uring_enter calls per file", [f"{n:.2f}" for n in median(lambda cost: cost.enters / files)])
    row("context switches per file", [f"{n:.2f}" for n in median(lambda cost: cost.switches / files)])
    row("threads that ran", [f"{n:.0f}" for n in median(lambda cost: cost.threads)])
    print(
        f"\n{files} files, {size / 1e6:.0f} MB, in the page cache, {TASKS} at a time; medians of {len(ring)} rounds."
        f"\nSystem calls are counted with ptrace, in a child that reads {min(SAMPLE, files)} of them one by one."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Reads and serves the standard library, with threads and with io_uring."
    )
    parser.add_argument("--limit", type=int, help="at most so many files")
    args = parser.parse_args()

    reason = trio_uring.why_not()
    if reason is not None:
        sys.exit(f"io_uring is not available: {reason}")
    print(trio_uring.capabilities())

    paths = find_files(args.limit)
    print(f"\nReading {len(paths)} files below {sysconfig.get_path('stdlib')}", flush=True)
    expected = {path: digest(Path(path).read_bytes()) for path in paths}
    print("  counting system calls", flush=True)
    sample = paths[:: max(1, len(paths) // SAMPLE)][:SAMPLE]
    calls = {name: count_system_calls(read, sample) for name, read in READERS.items()}
    costs = trio_uring.run(job, paths, expected, config=REQUIRE_RING)
    print_table(costs, calls, len(paths), sum(map(os.path.getsize, paths)))


if __name__ == "__main__":
    main()
