"""What is to be forgiven other people's packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    # trio-asyncio, when it is imported on Python 3.12 and 3.13
    config.addinivalue_line("filterwarnings", "ignore:'AbstractChildWatcher' is deprecated:DeprecationWarning")
