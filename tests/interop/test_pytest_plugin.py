"""The pytest plugin, in sessions of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Callable

    Session = Callable[..., pytest.RunResult]

pytest_plugins = ("pytester",)
pytestmark = pytest.mark.seconds(120)

CONFTEST: Final = """
    import os

    import pytest
    import trio

    async def mounted():
        import trio_uring
        try:
            await trio_uring.lowlevel.nop()
        except trio_uring.UnavailableError:
            return "stock"
        own = trio.lowlevel.current_statistics().io_statistics
        return "native" if isinstance(own, trio_uring.UringStatistics) else "attached"

    @pytest.fixture
    def find_out():
        return mounted
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Runs tests with some options and lines of an ini file, in a process of its own, where every warning is an
    error.
    """
    monkeypatch.delenv("TRIO_URING", raising=False)

    def run(source: str, *options: str, ini: str = "", conftest: str = CONFTEST) -> pytest.RunResult:
        pytester.makeconftest(conftest)
        pytester.makeini(f"[pytest]\naddopts = --strict-markers --strict-config -ra\nfilterwarnings = error\n{ini}\n")
        pytester.makepyfile(test_it=source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=100)

    return run


# Choosing

ASKS_BY_MARKER: Final = """
    import pytest

    pytestmark = [pytest.mark.RUNNER, pytest.mark.trio_uring("attached")]

    @pytest.fixture
    def anyio_backend():
        return "trio"

    async def test_module(find_out):
        assert await find_out() == "attached"

    @pytest.mark.trio_uring("native")
    async def test_function(find_out):
        assert await find_out() == "native"

    @pytest.mark.trio_uring("stock")
    class TestClass:
        async def test_class(self, find_out):
            assert await find_out() == "stock"

        @pytest.mark.trio_uring("native")
        async def test_method(self, find_out):
            assert await find_out() == "native"

        @pytest.mark.trio_uring(entries=8)
        async def test_names_no_mount(self, find_out):
            assert await find_out() == "stock"

    @pytest.mark.parametrize("mount", [
        pytest.param("native", marks=pytest.mark.trio_uring("native")),
        pytest.param("attached", marks=pytest.mark.trio_uring("attached")),
        pytest.param("stock", marks=pytest.mark.trio_uring("stock")),
    ])
    async def test_parameters(find_out, mount):
        assert await find_out() == mount

    async def test_fixture(find_out, trio_uring_mount):
        assert await find_out() == trio_uring_mount
"""


@pytest.mark.parametrize("runner", ["trio", "anyio"])
def test_the_closest_marker_chooses(runner: str, session: Session) -> None:
    session(ASKS_BY_MARKER.replace("RUNNER", runner), "--trio-uring=stock", ini="trio_uring = native").assert_outcomes(
        passed=11
    )


SAYS_WHICH: Final = """
    import pytest

    async def test_it(find_out):
        assert await find_out() == EXPECTED
"""


@pytest.mark.parametrize("mount", ["native", "attached", "stock"])
def test_ini_chooses_for_the_session(mount: str, session: Session) -> None:
    source = SAYS_WHICH.replace("EXPECTED", repr(mount))
    session(source, ini=f"trio_mode = true\ntrio_uring = {mount}").assert_outcomes(passed=1)


@pytest.mark.parametrize("mount", ["native", "attached", "stock"])
def test_the_command_line_overrides_ini(mount: str, session: Session) -> None:
    ini = f"trio_mode = true\ntrio_uring = {'stock' if mount == 'native' else 'native'}"
    source = SAYS_WHICH.replace("EXPECTED", repr(mount))
    session(source, f"--trio-uring={mount}", ini=ini).assert_outcomes(passed=1)


def test_fixtures_are_on_the_mount_of_their_test(session: Session) -> None:
    source = """
        import pytest

        @pytest.fixture
        async def before_and_after(find_out, trio_uring_mount):
            assert await find_out() == trio_uring_mount
            yield
            assert await find_out() == trio_uring_mount

        async def test_it(before_and_after):
            pass
    """
    session(source, ini="trio_mode = true").assert_outcomes(passed=3)


@pytest.mark.parametrize("mount", ["native", "attached"])
def test_a_marker_configures_the_ring(mount: str, session: Session) -> None:
    source = """
        import pytest
        from trio_uring._core import _this_thread

        pytestmark = [pytest.mark.trio, pytest.mark.trio_uring(max_in_flight=9, entries=16)]

        @pytest.mark.trio_uring(max_in_flight=7)
        async def test_it(find_out):
            assert await find_out() == MOUNT
            manager = _this_thread.manager
            assert manager.max_in_flight == 7
            assert manager.ring.entries[0] == 16
    """
    session(source.replace("MOUNT", repr(mount)), f"--trio-uring={mount}").assert_outcomes(passed=1)


def test_other_threads_have_the_mount_too(session: Session) -> None:
    source = """
        import threading
        import trio

        def test_it(find_out, trio_uring_mount):
            found = []

            async def main():
                found.append(await find_out())

            thread = threading.Thread(target=trio.run, args=[main])
            thread.start()
            thread.join()
            assert found == [trio_uring_mount]
    """
    session(source).assert_outcomes(passed=3)


def test_what_was_installed_is_back_afterwards(session: Session) -> None:
    source = """
        import os
        import pytest
        import trio
        import trio_uring

        trio_uring.install(trio_uring.RingConfig(entries=16), files=True)
        theirs = trio.open_file
        pytestmark = pytest.mark.trio

        async def test_before(find_out):
            assert await find_out() == "native"

        async def test_mounts(find_out, trio_uring_mount):
            assert await find_out() == trio_uring_mount
            assert trio.open_file is not theirs

        async def test_after(find_out):
            assert await find_out() == "native"
            async with await trio.open_file(__file__) as file:
                assert isinstance(file, trio_uring.AsyncFile)
            assert "TRIO_URING" not in os.environ
    """
    session(source).assert_outcomes(passed=5)


def test_nothing_stays_mounted_whatever_ends_the_test(session: Session) -> None:
    source = """
        import os
        import pytest
        from trio_uring import _mount, _trio_internals

        @pytest.fixture(scope="session", autouse=True)
        def at_the_end():  # in the tear-down of the last test, or of the session
            yield
            print("at the end:", _mount.installed(), os.environ.get("TRIO_URING"))

        @pytest.fixture
        def bad():
            raise OSError("bad")

        @pytest.fixture
        def bad_at_last():
            yield
            raise OSError("bad")

        @pytest.mark.trio_uring("native")
        class TestNative:
            def test_fails(self):
                assert _mount.installed() is not None
                raise OSError("bad")

            def test_set_up_fails(self, bad):
                pass

            def test_tear_down_fails(self, bad_at_last):
                pass

            @pytest.mark.trio_uring("stock")
            def test_skipped(self):
                assert os.environ["TRIO_URING"] == "off"
                pytest.skip("enough")

        def test_nothing():
            assert _mount.installed() is None
            assert _trio_internals.io_manager_class() is not _mount.TheIOManager
            assert "TRIO_URING" not in os.environ

        @pytest.mark.trio_uring("INTERRUPTED")
        def test_ctrl_c():
            raise KeyboardInterrupt
    """
    for mount in ("native", "stock"):
        result = session(source.replace("INTERRUPTED", mount), "-s")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        result.assert_outcomes(failed=1, errors=2, passed=2, skipped=1)
        result.stdout.fnmatch_lines("*at the end: None None")


# Mistakes


def test_mistakes_are_told(session: Session) -> None:
    source = """
        import pytest

        @pytest.mark.trio_uring("nativ")
        def test_mount(): pass

        @pytest.mark.trio_uring("native", entrys=3)
        def test_field(): pass

        @pytest.mark.trio_uring(entries=3)
        def test_no_mount(): pass

        @pytest.mark.trio_uring_needs("reed")
        def test_needs(): pass
    """
    result = session(source)
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "*a mount is one of native, attached, stock, not 'nativ'*",
            "*unexpected keyword argument 'entrys'*",
            "*the trio_uring marker names no mount, and neither does an option*",
            "*'reed' is no operation of trio_uring.lowlevel, no feature (*EXT_ARG*DEFER_TASKRUN*",
        ]
    )


def test_a_mistake_in_the_ini_file_is_told(session: Session) -> None:
    result = session("def test_it(): pass", ini="trio_uring = ring")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*a mount is one of native, attached, stock, not 'ring'*")


# Left behind

LEAVES_BEHIND: Final = """
    import os
    import socket

    import pytest
    import trio

    from trio_uring import lowlevel

    pytestmark = pytest.mark.RUNNER
    kept = []

    @pytest.fixture
    def anyio_backend():
        return "trio"

    async def test_fd():
        kept.append(os.open(__file__, os.O_RDONLY))

    async def test_socket():
        kept.append(socket.create_server(("127.0.0.1", 0)))

    @pytest.fixture
    def opens():
        kept.append(os.open(__file__, os.O_RDONLY))

    async def test_fixture(opens):
        pass

    async def test_multishot():
        with socket.create_server(("127.0.0.1", 0)) as server:
            connections = lowlevel.accept_multishot(server)
            kept.append(connections)
            await connections.__aenter__()
            with trio.move_on_after(0.01):
                await connections.__anext__()

    async def test_multishot_at_rest():
        with socket.create_server(("127.0.0.1", 0)) as server:
            connections = lowlevel.accept_multishot(server)
            kept.append(connections)
            await connections.__aenter__()

    async def test_timer():
        timer = lowlevel.timeout_multishot(60)
        kept.append(timer)
        await timer.__aenter__()
        with trio.move_on_after(0.01):
            await timer.__anext__()

    @pytest.fixture
    def connection():
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
            there, _ = server.accept()
            with there:
                here.setblocking(False)
                yield here

    async def test_zero_copy(connection):
        # Over loopback the buffer is in use until the peer has taken the data.
        await lowlevel.send_zc(connection, bytearray(100_000), released=trio.Event())

    async def test_registered_buffer():
        kept.append(lowlevel.RegisteredBuffer(bytearray(4096)))
        await lowlevel.nop()
"""


@pytest.mark.parametrize("mount", ["native", "attached"])
@pytest.mark.parametrize("runner", ["trio", "anyio"])
def test_what_is_left_behind_is_told(runner: str, mount: str, session: Session) -> None:
    source = LEAVES_BEHIND.replace("RUNNER", runner)
    result = session(source, f"--trio-uring={mount}")
    result.assert_outcomes(passed=8, errors=8)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_fd *",
            "left behind by this test: fd * (*/test_it.py)",
            "*ERROR at teardown of test_socket *",
            "left behind by this test: fd * (socket:* laddr=('127.0.0.1', *",
            "*ERROR at teardown of test_fixture *",
            "left behind by this test: fd * (*/test_it.py)",
            "*ERROR at teardown of test_multishot *",
            "left behind by this test: accept_multishot in flight on fd * of task * (IN_FLIGHT)",
            "*ERROR at teardown of test_multishot_at_rest *",
            "left behind by this test: accept_multishot in flight on fd * of task * (*)",
            "*ERROR at teardown of test_timer *",
            "left behind by this test: timeout_multishot in flight on fd -1 of task * (IN_FLIGHT)",
            "*ERROR at teardown of test_zero_copy *",
            "left behind by this test: send_zc in flight on fd * (DETACHED) with its buffer of 100000 bytes",
            "*ERROR at teardown of test_registered_buffer *",
            "left behind by this test: 1 registered buffers",
        ]
    )


@pytest.mark.parametrize(
    ("options", "ini"),
    [
        (["--trio-uring=native"], "trio_uring_leaks = true"),
        (["--trio-uring=stock", "-k", "fd or socket or fixture"], ""),
        (["-k", "fd or socket or fixture"], ""),
    ],
)
def test_the_look_for_it_can_be_switched_off(options: list[str], ini: str, session: Session) -> None:
    result = session(LEAVES_BEHIND.replace("RUNNER", "trio"), *options, ini=ini)
    result.assert_outcomes(passed=8 if ini else 3, deselected=0 if ini else 5)


def test_a_marker_switches_it_off_or_on(session: Session) -> None:
    source = """
        import os
        import pytest

        kept = []

        def leave():
            kept.append(os.open(__file__, os.O_RDONLY))

        @pytest.mark.trio_uring(leaks=True)
        def test_may():
            leave()

        @pytest.mark.trio_uring("native", leaks=True)
        class TestClass:
            def test_may(self):
                leave()

            @pytest.mark.trio_uring(leaks=False)
            def test_may_not(self):
                leave()
    """
    session(source, "--trio-uring=native").assert_outcomes(passed=3, errors=1)


def test_another_file_by_a_number_that_was_there(session: Session) -> None:
    source = """
        import os
        import pytest

        @pytest.fixture(scope="module")
        def wide():
            return os.open(__file__, os.O_RDONLY)

        def test_keeps(wide):
            pass

        def test_replaces(wide):
            with open("/dev/null") as file:
                os.dup2(file.fileno(), wide)
    """
    result = session(source, "--trio-uring=native")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_replaces *", "left behind by this test: fd * (/dev/null)"])


CLEAN: Final = """
    import os
    import socket

    import anyio
    import pytest
    import trio

    import trio_uring
    from trio_uring import lowlevel

    pytestmark = pytest.mark.RUNNER
    kept = []

    @pytest.fixture(scope="module")
    def anyio_backend():
        return "trio"

    @pytest.fixture(scope="session", autouse=True)
    def session_file():
        kept.append(os.open(__file__, os.O_RDONLY))
        yield
        os.close(kept.pop())

    @pytest.fixture(scope="module")
    def module_server():
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server

    @pytest.fixture
    def file(tmp_path):
        with open(tmp_path / "file", "w+b") as file:
            yield file

    async def test_multishot(module_server, file):
        async with lowlevel.accept_multishot(module_server) as connections:
            with trio.move_on_after(0.01):
                await connections.__anext__()

    async def test_all_kinds(module_server, file):
        await lowlevel.write(file.fileno(), b"hello", 0)
        assert await trio_uring.read_file(file.name) == b"hello"
        async with await trio_uring.open_tcp_stream(*module_server.getsockname()) as stream:
            peer, _ = await lowlevel.accept(module_server)
            with trio.move_on_after(0.01):
                await stream.receive_some()
            await stream.send_all(b"hello")
            await lowlevel.close(peer)
        with lowlevel.RegisteredBuffer(bytearray(4096)) as buffer:
            await lowlevel.read_fixed(file.fileno(), buffer, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lowlevel.poll, module_server, 1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    async def test_garbage():
        class Owner:
            def __init__(self):
                self.me = self
                self.fd = os.open(__file__, os.O_RDONLY)

            def __del__(self):
                os.close(self.fd)

        Owner()

    def test_requests_a_wide_fixture_late(request):
        assert request.getfixturevalue("late_fixture")

    @pytest.fixture(scope="module")
    def late_fixture():
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server

    @pytest.mark.xfail
    async def test_fails():
        sock = socket.create_server(("127.0.0.1", 0))
        try:
            assert not sock
        except AssertionError:
            sock.detach()  # what a traceback holds
            raise

    async def test_skips():
        kept.append(os.open(__file__, os.O_RDONLY))
        pytest.skip("half way through")

    def test_thread():
        trio.run(trio.to_thread.run_sync, trio.run, trio.sleep, 0)
"""


@pytest.mark.parametrize("mount", ["native", "attached"])
@pytest.mark.parametrize("runner", ["trio", "anyio"])
def test_no_false_alarms(runner: str, mount: str, session: Session) -> None:
    source = CLEAN.replace("RUNNER", runner).replace(
        "    import trio\n\n", "    import trio\n    import trio.testing\n\n"
    )
    if runner == "trio":  # which marks async tests only
        source = source.replace("    pytestmark = pytest.mark.trio\n", "").replace(
            "    async def test", "    @pytest.mark.trio\n    async def test"
        )
    session(source, f"--trio-uring={mount}").assert_outcomes(passed=5, xfailed=1, skipped=1)


@pytest.mark.parametrize("mount", ["native", "attached"])
def test_no_false_alarms_in_a_run_over_many_tests(mount: str, session: Session) -> None:
    """anyio keeps one for as long as there is an async fixture."""
    source = """
        import pytest
        import trio

        import trio_uring.anyio
        from anyio.abc import SocketAttribute
        from trio_uring import lowlevel

        pytestmark = pytest.mark.anyio

        @pytest.fixture(scope="module")
        def anyio_backend():
            return "trio"

        @pytest.fixture(scope="module")
        async def listener():
            async with await trio_uring.anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
                yield listener

        @pytest.fixture(scope="module")
        async def quiet():
            yield

        async def test_nothing_of_ours(quiet):
            await trio.sleep(0)

        async def test_mounts(quiet):
            await lowlevel.nop()
            await trio.sleep(0.01)

        async def test_uses_it(quiet, listener):
            port = listener.extra(SocketAttribute.local_port)
            async with await trio_uring.anyio.connect_tcp("127.0.0.1", port):
                pass
    """
    session(source, f"--trio-uring={mount}").assert_outcomes(passed=3)


@pytest.mark.parametrize("mount", ["native", "attached"])
@pytest.mark.parametrize("tests", [1, 2])
def test_a_run_of_a_wider_fixture_is_not_looked_at(tests: int, mount: str, session: Session) -> None:
    source = """
        import pytest

        from trio_uring import lowlevel

        kept = []

        @pytest.fixture(scope="module")
        def anyio_backend():
            return "trio"

        @pytest.fixture(scope="module")
        async def keeps():
            kept.append(lowlevel.RegisteredBuffer(bytearray(10)))
            yield

        @pytest.mark.anyio
        @pytest.mark.parametrize("number", range(TESTS))
        async def test_it(keeps, number):
            await lowlevel.nop()
    """
    session(source.replace("TESTS", str(tests)), f"--trio-uring={mount}").assert_outcomes(passed=tests)


# Capabilities


def test_needs(session: Session) -> None:
    if not trio_uring.is_available():
        pytest.skip("there can be no ring")
    source = """
        import pytest

        needs = pytest.mark.trio_uring_needs

        @needs("read", "accept_multishot", "EXT_ARG", "CQSIZE")
        def test_there(): pass

        @needs()
        def test_a_ring(): pass

        @pytest.mark.trio_uring("stock")
        @needs("read")
        def test_stock(): pass

        @pytest.mark.trio_uring("native")
        @needs("read")
        def test_native(): pass

        @needs("read")
        def test_mounts(trio_uring_mount): pass
    """
    result = session(source)
    result.assert_outcomes(passed=5, skipped=2)
    result.stdout.fnmatch_lines("SKIPPED *needs a ring, and on stock trio there is none")


def test_what_the_kernel_lacks_is_skipped(session: Session) -> None:
    result = session(
        """
    import pytest
    import trio_uring.pytest_plugin
    from trio_uring import capabilities
    import dataclasses

    here = capabilities()
    fewer = tuple(name for name in here.operations if name != "SEND_ZC")
    trio_uring.pytest_plugin.capabilities = lambda: dataclasses.replace(here, operations=fewer)

    @pytest.mark.trio_uring_needs("read", "fsync", "SINGLE_ISSUER")
    def test_has():
        pass

    @pytest.mark.trio_uring_needs("read", "send_zc")
    def test_lacks():
        raise AssertionError

    @pytest.mark.trio_uring_needs("no_such_thing")
    def test_mistyped():
        pass
    """
    )
    result.assert_outcomes(passed=1, skipped=1, errors=1)
    result.stdout.fnmatch_lines(["*this kernel's io_uring lacks SEND_ZC*"])


def test_without_a_ring(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker and the fixture skip; a mount that is asked for otherwise is what a run does then."""
    source = """
        import pytest

        @pytest.mark.trio_uring_needs("read")
        def test_needs(): pass

        @pytest.mark.trio
        async def test_mounts(find_out, trio_uring_mount):
            assert await find_out() == "stock"

        @pytest.mark.trio
        @pytest.mark.trio_uring("native")
        async def test_native(find_out):
            assert await find_out() == "stock"  # TRIO_URING has the last word
    """
    monkeypatch.setenv("TRIO_URING", "off")
    result = session(source)
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines("SKIPPED *the environment variable TRIO_URING switches*")


# Inert


def test_inert_unless_asked(session: Session) -> None:
    """Without trio's plugins: a project may have nothing to do with trio."""
    source = """
        import sys

        def test_it(request):
            assert not {"trio", "trio_uring", "trio_uring.pytest_plugin"} & sys.modules.keys()
            assert "_trio_uring_pytest" in sys.modules
            assert not request.config.pluginmanager.has_plugin("trio_uring at work")
    """
    result = session(source, "-p", "no:trio", "-p", "no:anyio", "-p", "no:hypothesispytest", conftest="")
    result.assert_outcomes(passed=1)


def test_inert_beside_tests_that_ask(session: Session) -> None:
    source = """
        import os
        import pytest
        import trio_uring

        @pytest.mark.trio_uring("native")
        @pytest.mark.trio
        async def test_asks(find_out):
            assert await find_out() == "native"

        @pytest.mark.trio
        async def test_does_not(find_out):
            os.dup(1)
            assert await find_out() == "attached"
    """
    session(source).assert_outcomes(passed=2)


def test_can_be_left_out(session: Session) -> None:
    result = session("def test_it(): pass", "-p", "no:trio_uring", "--markers")
    assert "trio_uring" not in result.stdout.str()
    result = session("def test_it(): pass", "--markers")
    result.stdout.fnmatch_lines(["*trio_uring(mount, *", "*trio_uring_needs(*"])
