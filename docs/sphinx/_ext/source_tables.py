"""Directives that show tables of the source: what the code decides by is what the reader sees.

``.. operation-table::``   `trio_uring.lowlevel.TABLE`
``.. multishot-table::``   `trio_uring.lowlevel.MULTISHOT`
``.. path-table::``        the methods of `trio_uring.Path` that do I/O, and where they do it
``.. state-table::``       the states of an operation, and what can happen in each
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from trio_uring import Path, _cancel
from trio_uring._path import RING_METHODS
from trio_uring.lowlevel import MULTISHOT, TABLE, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from docutils import nodes
    from sphinx.application import Sphinx


def list_table(widths: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(row)]
    return "\n".join(lines)


WHERE = {
    "inline": "while it is submitted",
    "waits": "while it is submitted, or when the fd is ready",
    "may block": "while it is submitted, or in a kernel thread",
    "worker": "in a kernel thread",
}


def kernel_side(kind: Kind[Any]) -> tuple[str, str]:
    """Where the kernel does it; whether it can be cancelled under way."""
    return WHERE[kind.runs], "yes" if kind.cancellable else "no"


class OperationTable(SphinxDirective):
    """Each operation with its opcode, the kernel that brought it, its result, and how the kernel does it."""

    def run(self) -> list[nodes.Node]:
        rows = [
            (
                f":func:`~trio_uring.lowlevel.{kind.name}`",
                kind.summary,
                f"``{kind.opcode.name}``",
                kind.since,
                kind.result,
                *kernel_side(kind),
                "an error" if kind.fallback is None else "the plain system call",
                f":manpage:`{kind.man}`",
            )
            for kind in TABLE.values()
        ]
        head = ("function", "what it does", "opcode", "Linux", "result", "done", "cancellable", "before", "man page")
        return self.parse_text_to_nodes(list_table("12 18 12 6 7 15 9 10 21", head, rows))


class MultishotTable(SphinxDirective):
    """Each multishot operation with its opcode and the kernel that brought it."""

    def run(self) -> list[nodes.Node]:
        rows = [
            (f":func:`~trio_uring.lowlevel.{kind.name}`", kind.summary, f"``{kind.opcode.name}``", kind.since)
            for kind in MULTISHOT.values()
        ]
        return self.parse_text_to_nodes(
            list_table("30 40 20 10", ("function", "what it does", "opcode", "Linux"), rows)
        )


class PathTable(SphinxDirective):
    """Each async method of `trio_uring.Path`: with which operations the ring does it, or that a thread does."""

    def run(self) -> list[nodes.Node]:
        rows = []
        for name, method in inspect.getmembers(Path, inspect.iscoroutinefunction):
            if name in RING_METHODS:
                opcodes = re.findall(r"IORING_OP_(\w+)", inspect.getdoc(method) or "")
                done = (
                    "on the ring: " + ", ".join(f"``{opcode}``" for opcode in opcodes) if opcodes else "nothing to do"
                )
                rows.append((f":meth:`~trio_uring.Path.{name}`", done))
            else:
                rows.append((f":meth:`~pathlib.Path.{name}`", "in a thread"))
        return self.parse_text_to_nodes(list_table("40 60", ("method", "done"), sorted(rows, key=_ring_first)))


def _ring_first(row: tuple[str, str]) -> bool:
    return row[1] == "in a thread"


class StateTable(SphinxDirective):
    """What the states mean, and each transition with the event that causes it."""

    def run(self) -> list[nodes.Node]:
        comments = ModuleAnalyzer.for_module(_cancel.__name__).find_attr_docs()

        def meaning(member: _cancel.State | _cancel.Event) -> str:
            return " ".join(comments[type(member).__name__, member.name]).strip()

        rows = []
        for state, transitions in _cancel.TRANSITIONS.items():
            about = (f"**{state.name}**", meaning(state))
            for event, after in transitions.items():
                rows.append((*about, f"{event.name}: {meaning(event)}", after.name))
                about = ("", "")
        return self.parse_text_to_nodes(list_table("14 30 42 14", ("state", "meaning", "event", "next"), rows))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("operation-table", OperationTable)
    app.add_directive("multishot-table", MultishotTable)
    app.add_directive("path-table", PathTable)
    app.add_directive("state-table", StateTable)
    return {"parallel_read_safe": True}
