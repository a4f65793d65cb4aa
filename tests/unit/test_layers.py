"""Imports run one way, and one file alone knows trio from inside."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest
import trio

import trio_uring

SOURCE: Final = Path(trio_uring.__file__).parent

# From the bottom up. A module imports from the layers below its own, never from its own or above.
LAYERS: Final = (
    {"_abi", "_errors", "_native", "_trio_internals", "_sockaddr", "_page_cache"},
    {"_slots"},
    {"_ring", "_structs"},
    {"_cancel"},
    {"_job", "_shots", "_registered"},
    {"_rows"},
    {"_core"},
    {"_attached"},
    {"_mount"},
    {"_ops", "_fallback"},
    {"_file_ops", "_socket_ops", "_other_ops", "_zero_copy", "_mailbox", "_multishot"},
    {"_batch"},
    {"_binary_files"},
    {"_text_files"},
    {"_files", "_pipes", "_socket", "_whole_files"},
    {"_path"},
    {"_anyio_files"},
    {"_routes", "_streams"},
    {"_net"},
    {"lowlevel", "testing", "socket", "anyio"},
    {"pytest_plugin"},
    {"_cli"},
    {"__init__", "__main__"},
)
LAYER: Final = {module: i for i, layer in enumerate(LAYERS) for module in layer}

# What may import less than its layer allows.
ONLY: Final = {
    "_errors": set[str](),
    "_trio_internals": set[str](),
    "_ring": {"_abi", "_errors", "_native", "_slots"},
    "testing": {"_abi", "_errors", "_ring"},
}

PRIVATE_OF_TASK: Final = {name for name in dir(trio.lowlevel.Task) if name.startswith("_") and not name.endswith("__")}


def module_name(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES: Final = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(tree: ast.AST, path: Path) -> set[str]:
    """The modules of this package that the file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trio_uring.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level == 0 and module[0] == "trio_uring":
                module = module[1:]
            elif node.level != len(path.relative_to(SOURCE).parts):
                continue  # another package's, or a package's own
            modules = module[:1] or [alias.name for alias in node.names]
            found |= {name if name in LAYER else "__init__" for name in modules}
    return found


def trio_private_names(tree: ast.AST) -> list[str]:
    """What it names of trio that trio does not offer."""

    def private(name: str) -> bool:
        return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("trio.") and private(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "trio":
            found += [f"{node.module}.{alias.name}" for alias in node.names if private(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if (whole.startswith("trio.") and private(whole)) or node.attr in PRIVATE_OF_TASK:
                found.append(whole)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_its_layer(name: str) -> None:
    assert module_name(FILES[name]) in LAYER, "give it a place in LAYERS"


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name: str) -> None:
    path = FILES[name]
    module = module_name(path)
    imported = imports(ast.parse(path.read_text()), path) - {module}
    upwards = {other for other in imported if LAYER[other] >= LAYER[module]}
    assert not upwards
    assert imported <= ONLY.get(module, imported)


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone_touches_trios_private_names(name: str) -> None:
    names = trio_private_names(ast.parse(FILES[name].read_text()))
    assert (names != []) == (name == "_trio_internals.py"), names


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from . import _core", {"_core"}),
        ("from . import lowlevel, _ring", {"lowlevel", "_ring"}),
        ("from ._core import x", {"_core"}),
        ("def f():\n    from ._ops import read", {"_ops"}),
        ("if TYPE_CHECKING:\n    from ._ops import read", {"_ops"}),
        ("import trio_uring._core", {"_core"}),
        ("from trio_uring import run", {"__init__"}),
        ("from trio_uring import lowlevel", {"lowlevel"}),
        ("from trio_uring._cancel import Kind", {"_cancel"}),
        ("from trio._core import _run\nimport os.path\nfrom os import path", set()),
    ],
)
def test_imports_are_found(code: str, expected: set[str]) -> None:
    assert imports(ast.parse(code), SOURCE / "_x.py") == expected


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from trio._core import _run", True),
        ("from trio import _core", True),
        ("import trio._core._run", True),
        ("trio._core.x()", True),
        ("trio.lowlevel._x", True),
        ("def f(task):\n    return task._runner", True),
        ("import trio.lowlevel\ntrio.lowlevel.current_task().coro", False),
        ("from ._core import x\nself._task = trio.__version__", False),
    ],
)
def test_private_names_are_found(code: str, found: bool) -> None:
    assert bool(trio_private_names(ast.parse(code))) is found
