"""Files and methods of paths for users of anyio. Importing this imports anyio.

They may go by what anyio's class says (arguments by keyword, ``limiter``, an ``aclose`` that is never cancelled), so
they get a subclass of that, around an `AsyncFile`.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import anyio
import trio
from anyio.streams.file import FileReadStream
from trio.lowlevel import enable_ki_protection

from ._binary_files import AsyncFile, protected
from ._files import open_file
from ._path import Path

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


def on_trio() -> bool:
    """Does anyio run the caller on trio? What trio-asyncio runs is in a task of trio's, but on asyncio."""
    return anyio.get_cancelled_exc_class() is trio.Cancelled


@protected
class RingFile(anyio.AsyncFile[Any], anyio.TypedAttributeProvider):
    """anyio's file, around an `AsyncFile` instead of a file object."""

    def __aiter__(self) -> Any:
        file: Any = self.wrapped
        return aiter(file)

    async def aclose(self) -> None:
        file: Any = self.wrapped
        with trio.CancelScope(shield=True):
            await file.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Those of anyio's streams over files."""
        return FileReadStream(self.wrapped).extra_attributes


def _forwarding(name: str, method: Any) -> Any:
    signature = inspect.signature(method)

    @functools.wraps(method)
    @enable_ki_protection
    async def forward(self: RingFile, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = signature.bind(self, *args, **kwargs).args[1:]
        return await getattr(self.wrapped, name)(*args)

    return forward


for _name, _method in vars(anyio.AsyncFile).items():
    if inspect.iscoroutinefunction(_method) and _name not in vars(RingFile):
        setattr(RingFile, _name, _forwarding(_name, _method))


def _file_for_anyio(file: Any, limiter: Any) -> RingFile:
    return RingFile(file) if limiter is None else RingFile(file, limiter=limiter)


@enable_ki_protection
async def open_for_anyio(*args: Any, limiter: object = None, **kwargs: Any) -> RingFile:
    """`open_file` with the signature of anyio's. There is no thread to be limited."""
    return _file_for_anyio(await open_file(*args, **kwargs), limiter)


def for_anyio(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A method of `Path` for an `anyio.Path`."""

    @enable_ki_protection
    async def on_anyio_path(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = await method(Path(self), *args, **kwargs)
        limiter = getattr(self, "limiter", None)  # which a path has since anyio 4.14
        if isinstance(result, AsyncFile):
            return _file_for_anyio(result, limiter)
        if isinstance(result, Path):
            return type(self)(result) if limiter is None else type(self)(result, limiter=limiter)
        return result

    return on_anyio_path
