"""Many alike: requests that differ only in their arguments, whose SQEs C fills.

The call of a filler and the object that holds a buffer cost more than what the kernel does for a small read. Where
operations are alike both are left out.

The data path: rows of arguments go to ``native/fill.c``, which makes an SQE of each and takes an export of its buffer.
A `Column` is one operation for each row, `Filled` one or more columns side by side: chains of which each column is a
step. What is seldom asked for, a single request as `UringIOManager.perform` takes it, is read from its SQE: to make it
anew from its row would run code of the caller's, which may raise, where nobody expects it.

Who owns what: a column owns its rows and exports. `Filled`, some chains of some columns, shares in them; it is what a
batch, then a `Job`, has in place of a list of requests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final, cast, overload

from ._cancel import nothing
from ._job import whole
from ._ring import SQEs

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from ._cancel import Kind

_file_numbers: Final = count(-1, -1)
_LANE_BITS: Final = 20  # a batch has no more requests than that counts
_BEYOND_FDS: Final = 1 << 40


class DirectFile(int):
    """A file that a chain opens without an fd. It stands for one in later steps of its batch, and nowhere else:
    its value fits no field for an fd. For chains that are all alike one object stands for the file of each.
    """

    __slots__ = ()

    @classmethod
    def new(cls) -> DirectFile:
        """One that there has not been."""
        return cls((next(_file_numbers) << _LANE_BITS) - _BEYOND_FDS)

    def of(self, lane: int) -> DirectFile:
        """That of one of many chains."""
        return DirectFile(self - lane)

    def __repr__(self) -> str:
        return f"<DirectFile {-(self + _BEYOND_FDS) >> _LANE_BITS}>"


@functools.cache
def direct_form(kind: Kind[Any]) -> Kind[None]:
    """The same operation, when what it opens becomes a direct descriptor."""
    form = kind.form
    if form is not None:
        form = form._replace(letters=form.letters.replace("G", "D"), op_flags=form.op_flags & ~os.O_CLOEXEC)
    return cast(
        "Kind[None]",
        replace(kind, result="nothing", decode=nothing, dispose=None, fallback=None, form=form),
    )


def as_direct(request: tuple[Any, ...], file: DirectFile) -> tuple[Any, ...]:
    """The same request, when what it opens becomes a direct descriptor: no flag for exec, as none is left by then."""
    kind, fd, off, pin, length, op_flags, keep, filename, addr, via, _ = whole(request)
    if kind.cloexec == "op_flags":
        op_flags &= ~os.O_CLOEXEC
    elif kind.cloexec == "off":
        off &= ~os.O_CLOEXEC
    elif kind.cloexec == "open_how":
        keep.flags &= ~os.O_CLOEXEC
    else:
        del request, pin, keep  # a traceback keeps this frame
        raise TypeError(f"{kind.name} cannot open a direct descriptor")
    return direct_form(kind), fd, off, pin, length, op_flags, keep, filename, addr, via, file


def request_of(
    filler: Callable[..., tuple[Any, ...]],
    row: tuple[Any, ...],
    lane: int,
    opened: DirectFile | None,
    files: Container[object],
) -> tuple[Any, ...]:
    """What a row asks for, in Python, in one of many chains: ``opened`` and ``files`` stand for the files of each."""
    request = filler(*[each.of(lane) if type(each) is DirectFile and each in files else each for each in row])
    return request if opened is None else as_direct(request, opened.of(lane))


class Column:
    """One operation for each of many rows of arguments. Made by `fill_column`.

    Args:
        kind: the row of the operation table.
        rows: the arguments.
        opened: what stands for the direct descriptors that are opened, if they are.
        used: what stands for those that are named, if they are.
        sqes: the rows' SQEs.
        pins: what holds their buffers.
    """

    def __init__(
        self,
        kind: Kind[Any],
        rows: list[tuple[Any, ...]],
        opened: DirectFile | None,
        used: DirectFile | None,
        sqes: SQEs,
        pins: Any,
    ) -> None:
        self.kind = kind
        self.rows = rows
        self.opened = opened
        self.used = used
        self.sqes = sqes
        self._pins = pins

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, lane: int) -> tuple[Any, ...]:
        fd, off, addr, length, op_flags = self.sqes.fields(lane)
        opened = None if self.opened is None else self.opened.of(lane)
        filename = None
        if not _names_fd(self.kind):
            filename = self.rows[lane][0]
        elif self.used is not None:
            fd = self.used.of(lane)
        return self.kind, fd, off, None, length, op_flags, self._pins, filename, addr, None, opened

    def fds(self, start: int, end: int) -> set[int]:
        """What these rows name."""
        return {row[0] for row in self.rows[start:end]} if _names_fd(self.kind) and self.used is None else set()

    def files(self, start: int, end: int) -> Iterable[int]:
        """The direct descriptors that these rows open."""
        return () if self.opened is None else range(self.opened - start, self.opened - end, -1)


def _names_fd(kind: Kind[Any]) -> bool:
    return kind.form is not None and "F" in kind.form.letters


def fill_column(
    kind: Kind[Any],
    rows: list[tuple[Any, ...]],
    opened: DirectFile | None = None,
    used: DirectFile | None = None,
) -> Column | None:
    """The rows as a `Column`, or None if there is anything in them that C does not know."""
    if kind.form is None or not rows or (used is not None and not _names_fd(kind)):
        return None
    filled = SQEs.of_rows(kind.head, kind.form, rows, used)
    return None if filled is None else Column(kind, rows, opened, used, *filled)


class Filled(Sequence["tuple[Any, ...]"]):
    """Requests that C has filled: chains of so many steps, one behind the other.

    Args:
        columns: the steps.
        links: what ties each step to the next: ``IOSQE_*`` flags.
        start, end: which of the chains.

    Attributes:
        lanes: how many chains.
        steps: of how many steps each.
        kinds: of what kinds.
        opened: how many direct descriptors each opens.
    """

    def __init__(
        self, columns: list[Column], links: Sequence[int] = (), start: int = 0, end: int | None = None
    ) -> None:
        self.lanes = (len(columns[0]) if end is None else end) - start
        self.steps = len(columns)
        self.kinds = {column.kind for column in columns}
        self.opened = len([None for column in columns if column.opened is not None])
        self._columns = columns
        self._links = links
        self._start = start

    def __len__(self) -> int:
        return self.lanes * self.steps

    def __bool__(self) -> bool:
        return True

    @overload
    def __getitem__(self, position: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, position: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self._columns[position % self.steps][self._start + position // self.steps]

    def part(self, start: int, end: int) -> Filled:
        """Some of the chains, or all of them."""
        return Filled(self._columns, self._links, start, end)

    def clear(self) -> None:
        """Lets go of everything. Parts keep the columns."""
        self._columns = []
        self.lanes = 0

    def links(self) -> dict[int, int]:
        """The flags of each position that another one follows."""
        links: dict[int, int] = {}
        for step, flags in enumerate(self._links):
            links.update(dict.fromkeys(range(step, len(self), self.steps), flags))
        return links

    def fds(self) -> set[int]:
        """What they name."""
        start, end = self._start, self._start + self.lanes
        return set().union(*[column.fds(start, end) for column in self._columns])

    def files(self) -> list[int]:
        """The direct descriptors that are opened."""
        start, end = self._start, self._start + self.lanes
        return [file for column in self._columns for file in column.files(start, end)]

    def weave(self, places: Sequence[int]) -> SQEs:
        """The SQEs in their order, but for their user_data.

        Args:
            places: in the ring's table, one for each of `files`.
        """
        if self.steps == 1 and not places and self.lanes == len(self._columns[0]):
            return self._columns[0].sqes
        whose: dict[int, Sequence[int]] = {}
        sqes = SQEs(len(self))
        for step, column in enumerate(self._columns):
            opened = used = None
            if column.opened is not None:
                first = len(whose) * self.lanes
                opened = whose[column.opened] = places[first : first + self.lanes]
            if column.used is not None:
                used = whose[column.used]
            link = [*self._links, 0][step]
            sqes.weave(column.sqes, self._start, self.lanes, self.steps, step, link, opened, used)
        return sqes

    def values(self, results: list[int]) -> list[Any]:
        """What the caller gets for results that are all good."""
        values: list[Any] = results
        for step, column in enumerate(self._columns):
            if column.kind.decode is nothing:
                values[step :: self.steps] = [None] * self.lanes
        return values
