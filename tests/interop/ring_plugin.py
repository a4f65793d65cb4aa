"""A pytest plugin for trio's own test suite: puts every run, and its files, on the ring, and writes down how each test
ended. Counts what came to us.

Environment: RESULTS names the JSON file to write; RING=1 asks for the ring.
"""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio._core._run as trio_run

import trio_uring
from trio_uring import _routes
from trio_uring._core import UringIOManager
from trio_uring._path import RING_METHODS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from trio_uring.lowlevel import Kind

_outcomes: dict[str, str] = {}
_managers: collections.Counter[str] = collections.Counter()
_files: collections.Counter[str] = collections.Counter()
_operations: collections.Counter[str] = collections.Counter()


def _counted(name: str, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def counted(*args: Any, **kwargs: Any) -> Any:
        _files[name] += 1
        return await function(*args, **kwargs)

    return counted


def _counting(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(self: UringIOManager, kind: Kind[Any], *args: Any, **kwargs: Any) -> Any:
        _operations[kind.name] += 1
        return function(self, kind, *args, **kwargs)

    return counted


def pytest_configure() -> None:
    """Installs the ring, and counts each run's I/O manager, the operations, and what of trio's file API came to us."""
    if os.environ["RING"] == "1":
        vars(_routes)["open_file"] = _counted("open_file", trio_uring.open_file)
        for name, method in RING_METHODS.items():
            RING_METHODS[name] = _counted(f"Path.{name}", method)
        for name in ("perform", "receive"):
            setattr(UringIOManager, name, _counting(getattr(UringIOManager, name)))
        trio_uring.install(trio_uring.RingConfig(mode="require"), files=True)
    setup_runner = trio_run.setup_runner

    def counting_setup_runner(*args: Any, **kwargs: Any) -> Any:
        runner = setup_runner(*args, **kwargs)
        is_ring = isinstance(runner.io_manager, UringIOManager)
        _managers["UringIOManager" if is_ring else type(runner.io_manager).__name__] += 1
        return runner

    trio_run.setup_runner = counting_setup_runner


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The worst phase of a test is its outcome."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Writes the results."""
    results = {"outcomes": _outcomes, "managers": _managers, "files": _files, "operations": _operations}
    Path(os.environ["RESULTS"]).write_text(json.dumps(results))
