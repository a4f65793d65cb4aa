"""``python -m benchmarks [NAME...]``: each benchmark in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Final

import trio_uring

from ._harness import ROOT, describe_machine

BENCHMARKS: Final = (
    "reads",
    "files",
    "whole_files",
    "batch",
    "multishot",
    "pyaio",
    "idle_tick",
    "echo",
    "sockets",
    "http",
    "idle_connections",
    "cancel",
    "mounts",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The ring against what it replaces.")
    parser.add_argument("name", nargs="*", help=f"which: {', '.join(BENCHMARKS)}; by default all")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of rounds of each comparison (default: 31)")
    args = parser.parse_args()
    names = args.name or BENCHMARKS
    unknown = sorted({*names} - {*BENCHMARKS})
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    reason = trio_uring.why_not()
    if reason is not None:
        sys.exit(f"io_uring is not available: {reason}")
    print(describe_machine(), flush=True)
    failed = []
    for name in names:
        command = f"from benchmarks.{name} import main; main({args.rounds})"
        if subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode != 0:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
