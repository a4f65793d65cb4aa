"""cat: writes files, or what comes in, to standard output.

``python examples/cat.py [-n] [FILE...]``; ``-`` is standard input, ``-n`` numbers the lines.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import trio_uring

BLOCK = 1 << 18


async def copy(names: list[str], number: bool) -> int:
    """Returns the exit status."""
    status = 0
    numbers = itertools.count(1)
    async with await trio_uring.open_file(sys.stdout.fileno(), "wb", BLOCK, closefd=False) as output:
        for name in names:
            source = sys.stdin.fileno() if name == "-" else name
            try:
                async with await trio_uring.open_file(source, "rb", closefd=name != "-") as file:
                    if number:
                        async for line in file:
                            await output.write(b"%6d\t%s" % (next(numbers), line))
                    else:
                        while data := await file.read1(BLOCK):
                            await output.write(data)
                            await output.flush()
            except BrokenPipeError:
                raise
            except OSError as exc:
                print(f"cat: {name}: {exc.strerror}", file=sys.stderr)
                status = 1
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="cat", description="Writes files to standard output, through a ring.")
    parser.add_argument("file", nargs="*", default=["-"], help="- is standard input, as is none")
    parser.add_argument("-n", "--number", action="store_true", help="number the lines")
    args = parser.parse_args()
    try:
        return trio_uring.run(copy, args.file, args.number, config=trio_uring.RingConfig(mode="require"))
    except BrokenPipeError:  # nobody reads any more
        return 1
    except trio_uring.UnavailableError as exc:
        sys.exit(f"cat: {exc.strerror}")


if __name__ == "__main__":
    sys.exit(main())
