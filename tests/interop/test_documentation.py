"""The Python blocks of the documentation that need other people's packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.test_examples import INTEROP_BLOCKS, run_block

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("place", INTEROP_BLOCKS)
def test_block(place: str, tmp_path: Path) -> None:
    run_block(INTEROP_BLOCKS[place], tmp_path, "-W", "ignore::DeprecationWarning")  # of theirs


def test_there_are_some() -> None:
    assert len(INTEROP_BLOCKS) >= 4
