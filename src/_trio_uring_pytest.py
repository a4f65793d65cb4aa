"""pytest's way to `trio_uring.pytest_plugin`: options, markers, a fixture, and nothing else until a test asks for more.

pytest imports what an entry point names in every session of every project that has this package installed. To import a
module of a package is to import the package, and trio with it; so this one is outside.
"""

from __future__ import annotations

from typing import Final

import pytest

MOUNTS: Final = ("native", "attached", "stock")


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `trio_uring.pytest_plugin`."""
    group = parser.getgroup("trio_uring")
    group.addoption(
        "--trio-uring",
        choices=MOUNTS,
        help="how trio runs get to io_uring in tests without a trio_uring marker; overrides the ini option",
    )
    parser.addini("trio_uring", 'how trio runs get to io_uring: "native", "attached" or "stock"', default="")
    parser.addini("trio_uring_leaks", "tests on a ring may leave something behind", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """See `trio_uring.pytest_plugin`."""
    config.addinivalue_line(
        "markers",
        'trio_uring(mount, *, leaks=False, **config): how the trio runs of the test get to io_uring ("native", '
        '"attached" or "stock"), whether it may leave something behind, and fields of RingConfig',
    )
    config.addinivalue_line(
        "markers",
        "trio_uring_needs(*names): skips the test where io_uring lacks an operation of trio_uring.lowlevel, a feature "
        "or a set-up flag of that name",
    )
    mount = config.getini("trio_uring")
    if mount and mount not in MOUNTS:
        raise pytest.UsageError(f"trio_uring: a mount is one of {', '.join(MOUNTS)}, not {mount!r}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Brings in what does the work, if there is any."""
    config = session.config
    asked = config.getoption("trio_uring") or config.getini("trio_uring")
    if asked or any(_asks(item) for item in session.items):
        from trio_uring.pytest_plugin import Plugin

        config.pluginmanager.register(Plugin(config), "trio_uring at work")


def _asks(item: pytest.Item) -> bool:
    return (
        "trio_uring_mount" in getattr(item, "fixturenames", ())
        or item.get_closest_marker("trio_uring") is not None
        or item.get_closest_marker("trio_uring_needs") is not None
    )


@pytest.fixture(params=MOUNTS)
def trio_uring_mount(request: pytest.FixtureRequest) -> str:
    """Runs the test on each mount, skipping those that need a ring where there can be none; the mount's name."""
    mount: str = request.param
    return mount
