"""A pytest plugin for trio's own test suite: puts every run on the ring, and writes down how each test ended.

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
from trio_uring._core import UringIOManager

if TYPE_CHECKING:
    import pytest

_outcomes: dict[str, str] = {}
_managers: collections.Counter[str] = collections.Counter()


def pytest_configure() -> None:
    """Installs the ring, and counts the class of every run's I/O manager."""
    if os.environ["RING"] == "1":
        trio_uring.install(trio_uring.RingConfig(mode="require"))
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
    results = {"outcomes": _outcomes, "managers": _managers}
    Path(os.environ["RESULTS"]).write_text(json.dumps(results))
