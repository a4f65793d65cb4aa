"""The pytest plugin: which mount a test has, what it is told when it leaves something behind, and what is skipped."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]

pytest_plugins = ["pytester"]

WHERE = """
    import pytest, trio, trio_uring
    from trio_uring._core import _this_thread

    async def mounted():
        await trio.lowlevel.checkpoint()
        try:
            await trio_uring.lowlevel.nop()
        except trio_uring.UnavailableError:
            return "stock"
        return "native" if _this_thread.manager.native else "attached"
"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Runs tests that are given as text, in a process of their own."""

    def run_tests(code: str, ini: str = "", *args: str) -> pytest.RunResult:
        pytester.makeini(f"[pytest]\ntrio_mode = true\nfilterwarnings = error\n{ini}")
        pytester.makepyfile(textwrap.dedent(WHERE) + textwrap.dedent(code))
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", *args)

    return run_tests


def test_each_mount_and_the_closest_marker_wins(run: Run) -> None:
    run(
        """
    async def test_ini():
        assert await mounted() == "attached"

    @pytest.mark.trio_uring("native", entries=64)
    class TestClass:
        async def test_class(self):
            assert await mounted() == "native"
            assert _this_thread.manager._config.entries == 64

        @pytest.mark.trio_uring("stock")
        async def test_function(self):
            assert await mounted() == "stock"

    async def test_fixture(trio_uring_mount):
        assert await mounted() == trio_uring_mount

    @pytest.fixture
    async def in_the_run():
        return await mounted()

    @pytest.mark.trio_uring("native")
    async def test_its_fixtures(in_the_run):
        assert in_the_run == "native"
    """,
        "trio_uring = attached",
    ).assert_outcomes(passed=7)


def test_attached_although_there_is_an_install(run: Run) -> None:
    run(
        """
    trio_uring.install()

    @pytest.mark.trio_uring("attached")
    async def test_attached():
        assert await mounted() == "attached"

    async def test_not_asked():
        assert await mounted() == "native"
    """
    ).assert_outcomes(passed=2)


def test_anyios_plugin(run: Run) -> None:
    run(
        """
    pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["trio"])]

    async def test_mount(trio_uring_mount):
        assert await mounted() == trio_uring_mount
    """,
        "",
        "-o",
        "trio_mode=false",
    ).assert_outcomes(passed=3)


LEAKS = {
    r"fd \d+ \(": "os.dup(1)",
    "1 registered buffers": "kept.append(trio_uring.lowlevel.RegisteredBuffer(bytearray(4096)))",
    "timeout_multishot in flight on fd -1": "await leave_a_timer()",
}


@pytest.mark.parametrize("mount", ["native", "attached"])
@pytest.mark.parametrize("message", LEAKS)
def test_what_is_left_behind(run: Run, mount: str, message: str) -> None:
    result = run(
        f"""
    import os, trio.testing
    kept = []

    async def leave_a_timer():
        timer = trio_uring.lowlevel.timeout_multishot(60)
        kept.append(timer)
        await timer.__aenter__()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(timer.__anext__)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    async def test_that_leaks():
        await mounted()
        {LEAKS[message]}

    @pytest.mark.trio_uring("{mount}", leaks=True)
    async def test_that_may():
        await mounted()
        {LEAKS[message]}

    async def test_that_does_not():
        await mounted()
    """,
        f"trio_uring = {mount}",
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.re_match_lines([f".*left behind by this test: .*{message}.*"])


def test_what_wider_fixtures_open_is_theirs(run: Run) -> None:
    run(
        """
    import os

    @pytest.fixture(scope="module")
    def module_fd():
        fd = os.dup(1)
        yield fd
        os.close(fd)

    def test_one(module_fd):
        trio.run(mounted)

    def test_two(module_fd):
        trio.run(mounted)
    """,
        "trio_uring = native",
    ).assert_outcomes(passed=2)


def test_what_the_kernel_lacks_is_skipped(run: Run) -> None:
    result = run(
        """
    import trio_uring.pytest_plugin
    from trio_uring import capabilities
    import dataclasses

    here = capabilities()
    fewer = tuple(name for name in here.operations if name != "SEND_ZC")
    trio_uring.pytest_plugin.capabilities = lambda: dataclasses.replace(here, operations=fewer)

    @pytest.mark.trio_uring_needs("read", "fsync", "SINGLE_ISSUER")
    async def test_has():
        pass

    @pytest.mark.trio_uring_needs("read", "send_zc")
    async def test_lacks():
        raise AssertionError

    @pytest.mark.trio_uring_needs("no_such_thing")
    async def test_mistyped():
        pass
    """,
        "",
        "-rs",
    )
    result.assert_outcomes(passed=1, skipped=1, errors=1)
    result.stdout.fnmatch_lines(["*this kernel's io_uring lacks SEND_ZC*"])


def test_a_mount_that_is_none(run: Run) -> None:
    result = run(
        """
    async def test_it():
        pass
    """,
        "trio_uring = nativ",
    )
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*a mount is one of native, attached, stock, not 'nativ'*"])


def test_inert_unless_asked(run: Run) -> None:
    run(
        """
    import os

    async def test_it():
        os.dup(1)
        assert await mounted() == "attached"

    def test_not_even_trio():
        os.dup(1)
    """
    ).assert_outcomes(passed=2)
