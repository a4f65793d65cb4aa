"""Prints a checksum for every regular file below a directory, in the format of sha256sum(1).

``python examples/checksum_tree.py DIRECTORY > SUMS`` writes what ``sha256sum --check SUMS`` verifies, in the order in
which files are done. What cannot be read is named on stderr, and the status is 1.

Some tasks read at the same time, each into a buffer of its own, so memory does not depend on how large the files are,
or how many: a directory is listed when the tasks have taken the files of the one before. Opening, reading and
closing is done on the ring; listing a directory takes a thread, as io_uring cannot do it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from typing import Final

import trio

import trio_uring

TASKS: Final = 32
PIECE: Final = 256 * 1024
ALGORITHMS: Final = sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake"))


class Checksummer:
    """Checksums of files, printed."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self.failed = False

    async def run(self, top: str) -> None:
        """All files below ``top``."""
        send, receive = trio.open_memory_channel[str](TASKS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._find_files, top, send)
            for _ in range(TASKS):
                nursery.start_soon(self._print_checksums, receive)

    async def _find_files(self, top: str, found: trio.MemorySendChannel[str]) -> None:
        async with found:
            directories = [top]
            while directories:
                directory = directories.pop()
                try:
                    below, files = await trio.to_thread.run_sync(list_directory, directory)
                except OSError as exc:
                    self._complain(exc)
                    continue
                directories += below
                for path in files:
                    await found.send(path)

    async def _print_checksums(self, files: trio.MemoryReceiveChannel[str]) -> None:
        buffer = bytearray(PIECE)
        async for path in files:
            try:
                checksum = await self._checksum(path, buffer)
            except OSError as exc:
                self._complain(exc)
            else:
                print(line(checksum, path))

    async def _checksum(self, path: str, buffer: bytearray) -> str:
        digest = hashlib.new(self._algorithm)
        async with await trio_uring.open_file(path, "rb", buffering=0) as file:
            while count := await file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()

    def _complain(self, exc: OSError) -> None:
        print(exc, file=sys.stderr)
        self.failed = True


def list_directory(directory: str) -> tuple[list[str], list[str]]:
    """The directories and the regular files in it; no symbolic links."""
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    return (
        [entry.path for entry in reversed(found) if entry.is_dir(follow_symlinks=False)],
        [entry.path for entry in found if entry.is_file(follow_symlinks=False)],
    )


def line(checksum: str, path: str) -> str:
    """As sha256sum writes it: a name with a newline or a backslash is escaped, and the line says so."""
    escaped = path.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
    mark = "" if escaped == path else "\\"
    return f"{mark}{checksum}  {escaped}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Prints a checksum for every file below a directory.")
    parser.add_argument("directory")
    parser.add_argument("--algorithm", default="sha256", choices=ALGORITHMS)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    checksummer = Checksummer(arguments.algorithm)
    trio_uring.run(checksummer.run, arguments.directory)
    return int(checksummer.failed)


if __name__ == "__main__":
    sys.exit(main())
