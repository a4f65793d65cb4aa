"""Many alike: requests that differ only in their arguments, whose SQEs C fills.

The call of a filler and the object that holds a buffer cost more than what the kernel does for a small read. Where
operations are alike both are left out.

The data path: rows of arguments go to ``native/fill.c``, which makes an SQE of each and takes an export of its buffer.
A `Column` is one operation for each row, `Filled` one or more columns side by side: chains of which each column is a
step. What is seldom asked for, a single request as `UringIOManager.perform` takes it, is made anew from its row.

Who owns what: a column owns its rows and exports. `Filled` owns the columns, and is what a batch, then a `Job`, has in
place of a list of requests.
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
    """What a row asks for in one of many chains: ``opened`` and ``files`` stand for the files of each."""
    request = filler(*[each.of(lane) if type(each) is DirectFile and each in files else each for each in row])
    return request if opened is None else as_direct(request, opened.of(lane))


class Column:
    """One operation for each of many rows of arguments. Made by `fill_column`.

    Args:
        kind: the row of the operation table.
        filler: makes a request of a row.
        rows: the arguments.
        start: the number of the first row's chain.
        opened: what stands for the direct descriptors that are opened, if they are.
        used: what stands for those that are named, if they are.
        sqes: the rows' SQEs.
    """

    def __init__(
        self,
        kind: Kind[Any],
        filler: Callable[..., tuple[Any, ...]],
        rows: list[tuple[Any, ...]],
        start: int,
        opened: DirectFile | None,
        used: DirectFile | None,
        sqes: SQEs,
    ) -> None:
        self.kind = kind
        self.opened = opened
        self.used = used
        self.sqes = sqes
        self._filler = filler
        self.rows = rows
        self._start = start

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, lane: int) -> tuple[Any, ...]:
        return request_of(self._filler, self.rows[lane], self._start + lane, self.opened, {self.used})

    def part(self, start: int, end: int) -> Column:
        """Some of the rows."""
        return self if end - start == len(self.rows) else cast("Column", self._fill(start, end))

    def _fill(self, start: int, end: int) -> Column | None:
        kind, used = self.kind, self.used
        return fill_column(kind, self._filler, self.rows[start:end], self._start + start, self.opened, used)

    def fds(self) -> set[int]:
        """What they name."""
        return {row[0] for row in self.rows} if _names_fd(self.kind) and self.used is None else set()

    def files(self) -> Iterable[int]:
        """The direct descriptors that are opened."""
        if self.opened is None:
            return ()
        first = self.opened - self._start
        return range(first, first - len(self), -1)


def _names_fd(kind: Kind[Any]) -> bool:
    return kind.form is not None and "F" in kind.form.letters


def fill_column(
    kind: Kind[Any],
    filler: Callable[..., tuple[Any, ...]],
    rows: list[tuple[Any, ...]],
    start: int = 0,
    opened: DirectFile | None = None,
    used: DirectFile | None = None,
) -> Column | None:
    """The rows as a `Column`, or None if there is anything in them that C does not know."""
    if kind.form is None or not rows or (used is not None and not _names_fd(kind)):
        return None
    sqes = SQEs.of_rows(kind.head, kind.form, rows, used)
    return None if sqes is None else Column(kind, filler, rows, start, opened, used, sqes)


class Filled(Sequence["tuple[Any, ...]"]):
    """Requests that C has filled: chains of so many steps, one behind the other.

    Args:
        columns: the steps.
        links: what ties each step to the next: ``IOSQE_*`` flags.

    Attributes:
        lanes: how many chains.
        steps: of how many steps each.
        kinds: of what kinds.
        opened: how many direct descriptors each opens.
    """

    def __init__(self, columns: list[Column], links: Sequence[int] = ()) -> None:
        self.lanes = len(columns[0].rows)
        self.steps = len(columns)
        self.kinds = {column.kind for column in columns}
        self.opened = len([None for column in columns if column.opened is not None])
        self._columns = columns
        self._links = links

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
        return self._columns[position % self.steps][position // self.steps]

    def part(self, start: int, end: int) -> Filled:
        """Some of the chains, or all of them; whole columns are shared."""
        return Filled([column.part(start, end) for column in self._columns], self._links)

    def clear(self) -> None:
        """Lets go of everything. Parts keep what is theirs."""
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
        return self._columns[0].fds().union(*[column.fds() for column in self._columns[1:]])

    def files(self) -> list[int]:
        """The direct descriptors that are opened."""
        return [file for column in self._columns for file in column.files()]

    def weave(self, places: Sequence[int]) -> SQEs:
        """The SQEs in their order, but for their user_data.

        Args:
            places: in the ring's table, one for each of `files`.
        """
        if self.steps == 1 and not places:
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
            sqes.weave(column.sqes, self.lanes, self.steps, step, [*self._links, 0][step], opened, used)
        return sqes

    def values(self, results: list[int]) -> list[Any]:
        """What the caller gets for results that are all good."""
        values: list[Any] = results
        for step, column in enumerate(self._columns):
            if column.kind.decode is nothing:
                values[step :: self.steps] = [None] * self.lanes
        return values
