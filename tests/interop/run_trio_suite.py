"""Runs trio's own test suite on its own I/O manager and on the ring, and compares test by test.

On the ring trio's file API is ours, too, and its sockets. Exits non-zero if a test fails or is skipped on the ring that
is not on stock trio, if a run's I/O manager was not the ring, or if the tests of files or sockets did not come to ours.
Arguments go to pytest:
``--run-slow`` runs the slow tests too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 900
FILES = {"open_file", "Path.open", "Path.mkdir", "Path.write_bytes", "Path.is_dir", "Path.is_file"}
"""What of the file API trio's tests use, and the ring has."""
SOCKETS = {"accept", "connect", "recv", "send", "wait_readable", "wait_writable", "write"}
"""The operations that trio's tests of sockets, streams and pipes come to."""


def run_suite(*, ring: bool, arguments: list[str]) -> dict[str, Any]:
    """One run of the suite in a process of its own; how each test ended, and the I/O managers that were used."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.json")
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--pyargs", "trio", "-p", "trio._tests.pytest_plugin"),
                *("-p", "ring_plugin", "-p", "no:cacheprovider", "--skip-optional-imports"),
                *("-o", "faulthandler_timeout=60", "-W", "ignore::pytest.PytestUnknownMarkWarning", *arguments),
            ],
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": str(HERE), "RESULTS": str(results), "RING": "1" if ring else "0"},
            timeout=SECONDS,
            check=False,
        )
        loaded: dict[str, Any] = json.loads(results.read_text())
        return loaded


def main(arguments: list[str]) -> int:
    """Runs both and prints the differences."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    stock = run_suite(ring=False, arguments=arguments)
    ring = run_suite(ring=True, arguments=arguments)
    worse = [
        f"{test}: {stock['outcomes'].get(test, 'absent')} on stock trio, {outcome} on the ring"
        for test, outcome in sorted(ring["outcomes"].items())
        if outcome != "passed" and stock["outcomes"].get(test) != outcome
    ]
    absent = sorted(stock["outcomes"].keys() - ring["outcomes"].keys())
    print(f"\nstock trio: I/O managers {stock['managers']}")
    print(f"on the ring: I/O managers {ring['managers']}")
    print(f"on the ring: files {ring['files']}")
    print(f"on the ring: operations {ring['operations']}")
    print(f"{len(ring['outcomes'])} tests on the ring, {len(stock['outcomes'])} on stock trio")
    for line in [*worse, *(f"{test}: not run on the ring" for test in absent)]:
        print(line)
    proven = list(ring["managers"]) == ["UringIOManager"] and "UringIOManager" not in stock["managers"]
    if not arguments:  # the whole suite
        proven = proven and ring["files"].keys() >= FILES and not stock["files"]
        proven = proven and ring["operations"].keys() >= SOCKETS and not stock["operations"]
    if worse or absent or not proven:
        print("trio's test suite: the ring is NOT as good as stock trio")
        return 1
    print("trio's test suite: the ring fails and skips nothing that stock trio does not")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
