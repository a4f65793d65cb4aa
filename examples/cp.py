"""``cp`` with a progress bar: copies files with `trio_uring.copy_file`, and no thread.

``python examples/cp.py SOURCE... TARGET``: the target is a file, or a directory for any number of files. A copy gets
the permissions of its source, as with ``cp``. Ctrl-C ends it, and says which copy is incomplete.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import tqdm
import trio

import trio_uring

tqdm.tqdm.monitor_interval = 0  # otherwise it starts a thread


async def copy_with_bar(source: Path, target: Path, show: bool) -> None:
    """Copies one file; the bar appears when it can be opened."""
    is_new = not target.exists()
    bar: tqdm.tqdm[NoReturn] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm.tqdm(
                desc=source.name, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=not show
            )
        bar.update(done - bar.n)

    try:
        await trio_uring.copy_file(source, target, progress=progress)
    except trio.Cancelled:
        print(f"\n{target} is incomplete", file=sys.stderr)
        raise
    finally:
        if bar is not None:
            bar.close()
    if is_new:
        shutil.copymode(source, target)


async def copy_all(sources: list[Path], target: Path, show: bool) -> int:
    """Copies the files one after the other; returns how many could not be copied."""
    failed = 0
    for source in sources:
        try:
            await copy_with_bar(source, target / source.name if target.is_dir() else target, show)
        except OSError as exc:
            print(f"cp: {exc}", file=sys.stderr)
            failed += 1
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies files with io_uring.")
    parser.add_argument("source", nargs="+", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if len(args.source) > 1 and not args.target.is_dir():
        parser.error(f"{os.fspath(args.target)!r} is not a directory")
    reason = trio_uring.why_not()
    if reason is not None:
        sys.exit(f"io_uring is not available: {reason}")
    try:
        failed = trio_uring.run(copy_all, args.source, args.target, not args.quiet)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
