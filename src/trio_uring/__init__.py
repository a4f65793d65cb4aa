"""Linux io_uring under trio: file and socket operations by completion, with trio's semantics."""

from __future__ import annotations

from . import _pipes as _pipes  # which puts trio's streams over fds on the ring
from . import _streams as _streams  # which puts trio's sockets and streams on the ring
from . import lowlevel, socket
from ._binary_files import AsyncFile
from ._core import UringStatistics
from ._errors import FallbackWarning, RingError, UnavailableError, UnsupportedOperation
from ._files import aligned_buffer, open_file
from ._mount import run, statistics
from ._net import AcceptAhead, open_tcp_listeners, open_tcp_stream, open_unix_socket, serve_tcp
from ._path import Path
from ._ring import Capabilities, RingConfig, capabilities, is_available, why_not
from ._routes import install, uninstall
from ._whole_files import FileContents, copy_file, read_file, read_files, send_file, write_file

__all__ = [
    "AcceptAhead",
    "AsyncFile",
    "Capabilities",
    "FallbackWarning",
    "FileContents",
    "Path",
    "RingConfig",
    "RingError",
    "UnavailableError",
    "UnsupportedOperation",
    "UringStatistics",
    "aligned_buffer",
    "capabilities",
    "copy_file",
    "install",
    "is_available",
    "lowlevel",
    "open_file",
    "open_tcp_listeners",
    "open_tcp_stream",
    "open_unix_socket",
    "read_file",
    "read_files",
    "run",
    "send_file",
    "serve_tcp",
    "socket",
    "statistics",
    "uninstall",
    "why_not",
    "write_file",
]
