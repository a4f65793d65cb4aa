"""What is public is listed, sorted, documented; and the table of operations names every function of `lowlevel`."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

import trio_uring
import trio_uring.anyio
import trio_uring.testing
from trio_uring import lowlevel
from trio_uring._abi import Opcode

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = [trio_uring, lowlevel, trio_uring.anyio, trio_uring.testing]


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def defined_in(module: types.ModuleType) -> set[str]:
    """Its public names, without what it only uses."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "annotations"  # of __future__
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "trio_uring").startswith("trio_uring")
    }


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted(module: types.ModuleType) -> None:
    assert module.__all__ == sorted(set(module.__all__), key=sort_key)


@pytest.mark.parametrize("module", [trio_uring, lowlevel])
def test_all_is_exact(module: types.ModuleType) -> None:
    modules = {name for name in module.__all__ if isinstance(getattr(module, name), types.ModuleType)}
    assert set(module.__all__) - modules == defined_in(module)


def test_all_of_testing_is_what_it_defines() -> None:
    module = trio_uring.testing
    own = {name for name in defined_in(module) if getattr(getattr(module, name), "__module__", "") == module.__name__}
    assert set(module.__all__) == own | {"PATTERN"}


def public_objects() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        yield module.__name__, module
        for name in module.__all__:
            value = getattr(module, name)
            whole = f"{module.__name__}.{name}"
            if inspect.isclass(value) or inspect.isroutine(value):
                yield whole, value
            if inspect.isclass(value):
                for attribute, member in vars(value).items():
                    if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                        yield f"{whole}.{attribute}", member


PUBLIC = dict(public_objects())


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name: str) -> None:
    documentation = PUBLIC[name].__doc__
    assert documentation
    # What `dataclass` and `NamedTuple` make up is no documentation.
    assert not documentation.startswith(f"{name.split('.')[-1]}(")


def test_importing_the_package_imports_neither_test_tools_nor_anyio() -> None:
    unwanted = ["pytest", "hypothesis", "anyio", "trio_uring.testing"]
    code = f"import sys, trio_uring; print(*sorted(set({unwanted}) & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


# The table

FUNCTIONS = {name for name in lowlevel.__all__ if inspect.iscoroutinefunction(getattr(lowlevel, name))}


def test_every_function_has_a_row_and_every_row_a_function() -> None:
    assert set(lowlevel.TABLE) == FUNCTIONS


@pytest.mark.parametrize("name", lowlevel.TABLE)
def test_a_row(name: str) -> None:
    row = lowlevel.TABLE[name]
    assert row.name == name
    assert isinstance(row.opcode, Opcode)
    major, minor = map(int, row.since.split("."))
    assert (5, 1) <= (major, minor) <= (6, 18)
    assert row.summary
    assert not row.summary.endswith(".")
    assert row.man.endswith(("(2)", "(3)"))
    assert (row.result == "fd") <= (row.dispose is not None), "who closes an fd that nobody receives?"
    assert not row.readiness, "those are the manager's own"


@pytest.mark.parametrize("name", lowlevel.TABLE)
def test_a_docstring_names_the_operation_and_its_kernel(name: str) -> None:
    row = lowlevel.TABLE[name]
    documentation = inspect.getdoc(getattr(lowlevel, name)) or ""
    assert f"IORING_OP_{row.opcode.name}" in documentation
    assert f"Linux {row.since}" in documentation


@pytest.mark.parametrize("name", lowlevel.MULTISHOT)
def test_a_multishot_row(name: str) -> None:
    row = lowlevel.MULTISHOT[name]
    function = getattr(lowlevel, name)
    assert row.name == name == function.__name__
    assert name in lowlevel.__all__
    assert row.summary
    assert not row.summary.endswith(".")
    assert row.man.endswith("(7)")
    documentation = inspect.getdoc(function) or ""
    assert f"IORING_OP_{row.opcode.name}" in documentation
    assert f"Linux {row.since}" in " ".join(documentation.split())


def test_every_multishot_function_has_a_row() -> None:
    assert {name for name in lowlevel.__all__ if name.endswith("_multishot")} == set(lowlevel.MULTISHOT)
