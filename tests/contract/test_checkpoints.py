"""Every operation is a checkpoint, also when it succeeds at once; in a cancelled scope it submits nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.contract.cases import CASES
from tests.helpers import AfterStep, nothing_submitted
from trio_uring import lowlevel, statistics

if TYPE_CHECKING:
    from tests.helpers import Bench


@pytest.mark.parametrize("name", lowlevel.TABLE)
async def test_success_is_a_checkpoint(bench: Bench, name: str) -> None:
    call = CASES[name].ready(bench)
    with trio.testing.assert_checkpoints():
        await call()


@pytest.mark.parametrize("name", lowlevel.TABLE)
async def test_cancelled_on_entry_submits_nothing(bench: Bench, name: str) -> None:
    call = CASES[name].ready(bench)
    async with nothing_submitted():
        with trio.CancelScope() as scope:
            scope.cancel()
            with trio.testing.assert_checkpoints():
                await call()
        assert scope.cancelled_caught
    await call()  # as if it had not been tried


@pytest.mark.parametrize("name", lowlevel.TABLE)
async def test_cancelled_in_the_tick_that_staged_it_submits_nothing(bench: Bench, name: str) -> None:
    call = CASES[name].ready(bench)
    async with nothing_submitted():
        with trio.CancelScope() as scope:

            def cancel() -> None:
                assert [op.state for op in statistics().operations if op.operation == name] == ["STAGED"]
                scope.cancel()

            trio.lowlevel.add_instrument(AfterStep(trio.lowlevel.current_task(), cancel))
            await call()
        assert scope.cancelled_caught
    await call()
