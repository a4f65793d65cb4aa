"""The examples, the Python blocks of README and documentation, the benchmarks: each runs and says what it should."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
_MARKDOWN_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_RST_BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.MULTILINE)

pytestmark = pytest.mark.seconds(120)


def python(*args: str, ring: str = "require", status: int = 0) -> str:
    """Runs a Python of its own, where every warning is an error; returns what it wrote."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *args],
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRIO_URING": ring},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def blocks() -> dict[str, str]:
    """Every Python block, by file and line."""
    found = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs/sphinx").glob("*.rst"))):
        text = path.read_text()
        for match in (_MARKDOWN_BLOCK if path.suffix == ".md" else _RST_BLOCK).finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            found[f"{path.name}:{line}"] = textwrap.dedent(match[1])
    return found


_BLOCKS = blocks()
INTEROP_BLOCKS = {
    place: code
    for place, code in _BLOCKS.items()
    if re.search(r"^(import|from) (hypercorn|httpx|PySide6|trio_asyncio)\b", code, re.MULTILINE)
}
"""Those that need more packages. They are run with the tests that do."""
BLOCKS = {place: code for place, code in _BLOCKS.items() if place not in INTEROP_BLOCKS}


def test_main_job() -> None:
    output = python("examples/main_job.py", "--limit", "100")
    assert re.search(r"in flight 0, open files (\d+) before and \1 after", output)
    assert re.search(r"^threads that ran +\d+ +\d+ +\d+ ", output, re.MULTILINE)
    assert "the stuck transfer was cut off" in output


def test_main_job_says_why_there_is_no_ring() -> None:
    assert "TRIO_URING switches io_uring off" in python("examples/main_job.py", ring="off", status=1)


def test_anyio() -> None:
    assert python("examples/anyio_on_the_ring.py") == "HELLO, RING\nengine: io_uring\n"


def test_pytest_trio() -> None:
    assert "3 passed" in python("-m", "pytest", "-p", "no:cacheprovider", "examples/test_with_pytest_trio.py")


def cat(*args: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Exit status, output, complaints."""
    command = [sys.executable, "examples/cat.py", *args]
    done = subprocess.run(command, check=False, cwd=ROOT, input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode()


def test_cat(tmp_path: Path) -> None:
    text, blob = tmp_path / "text", tmp_path / "blob"
    text.write_bytes(b"one\ntwo")
    blob.write_bytes(os.urandom(1_000_000))
    assert cat(text, "-", blob, stdin=b"three") == (0, b"one\ntwothree" + blob.read_bytes(), "")
    assert cat("-n", text) == (0, b"     1\tone\n     2\ttwo", "")
    complaints = f"cat: {tmp_path}: Is a directory\ncat: no-such-file: No such file or directory\n"
    assert cat(tmp_path, "no-such-file", text) == (1, text.read_bytes(), complaints)


def test_cat_when_nobody_reads_any_more() -> None:
    with subprocess.Popen(
        [sys.executable, "examples/cat.py", "/dev/zero"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(100_000) == bytes(100_000)
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_cp(tmp_path: Path) -> None:
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "target"
    first.write_bytes(bytes(5_000_000))
    second.write_bytes(b"x")
    second.chmod(0o755)
    target.mkdir()
    output = python("examples/cp.py", *map(str, (first, second, target)))
    assert re.search(r"first: 100%.*4\.77M/4\.77M", output)
    assert re.search(r"second: 100%", output)
    assert (target / "first").read_bytes() == first.read_bytes()
    assert (target / "second").stat().st_mode == second.stat().st_mode
    output = python("examples/cp.py", "-q", str(tmp_path / "missing"), str(first), str(target), status=1)
    assert output == f"cp: [Errno 2] No such file or directory: '{tmp_path / 'missing'}'\n"
    assert "TRIO_URING switches io_uring off" in python("examples/cp.py", str(first), str(target), ring="off", status=1)


def test_checksum_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in (
        "empty",
        "a/small",
        "a/b/large",
        "with space",
        "new\nline",
        "back\\slash",
        "\xfc",
        os.fsdecode(b"\xff"),
    ):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom({"empty": 0, "large": 3_000_000}.get(path.name, 100)))
    (tree / "link").symlink_to("a/small")
    os.mkfifo(tree / "fifo")
    sums = tmp_path / "sums"
    with sums.open("wb") as file:
        subprocess.run([sys.executable, "examples/checksum_tree.py", tree], check=True, cwd=ROOT, stdout=file)
    assert len(sums.read_bytes().splitlines()) == 8
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", sums], check=True)


def test_checksum_tree_says_what_it_cannot_read(tmp_path: Path) -> None:
    assert "No such file or directory" in python("examples/checksum_tree.py", str(tmp_path / "missing"), status=1)


@contextlib.contextmanager
def serving(*args: str | Path) -> Iterator[tuple[str, int]]:
    """A program that serves until Ctrl-C; its address."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", *args],
        cwd=ROOT,
        env={**os.environ, "TRIO_URING": "require"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("listening on port "), process.stderr.read()
            yield "127.0.0.1", int(line.split()[-1])
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output, errors) == (0, "done\n", "")
        finally:
            process.kill()


@contextlib.contextmanager
def proxied() -> Iterator[tuple[tuple[str, int], socket.socket]]:
    """The address of a proxy, and the listener it leads to."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        serving("examples/tcp_proxy.py", f"127.0.0.1:{server.getsockname()[1]}") as address,
    ):
        yield address, server


def test_tcp_proxy() -> None:
    data = os.urandom(5_000_000)
    with proxied() as (address, server):
        with socket.create_connection(address) as client, server.accept()[0] as behind, ThreadPoolExecutor(1) as other:
            sending = other.submit(client.sendall, data)
            assert received(behind, len(data)) == data
            sending.result()
            client.shutdown(socket.SHUT_WR)
            assert behind.recv(1) == b""
            behind.sendall(b"an answer to the end")
            behind.shutdown(socket.SHUT_WR)
            assert received(client, 20) == b"an answer to the end"
            assert client.recv(1) == b""
        reset = socket.create_connection(address)
        with reset, server.accept()[0] as behind:
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.close()
            assert behind.recv(1) == b""


def test_tcp_proxy_ends_with_connections_open() -> None:
    with contextlib.ExitStack() as stack:
        with proxied() as (address, server):
            client = stack.enter_context(socket.create_connection(address))
            behind = stack.enter_context(server.accept()[0])
            client.sendall(b"x")
            assert behind.recv(1) == b"x"
        assert client.recv(1) == behind.recv(1) == b""


def test_tcp_proxy_pushes_back() -> None:
    """Nobody reads: it takes what fits into socket buffers, and no more."""
    with proxied() as (address, server), socket.create_connection(address) as client, server.accept()[0]:
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(1 << 28))


def received(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    chunks = bytearray()
    while len(chunks) < size:
        chunk = sock.recv(min(65536, size - len(chunks)))
        assert chunk, "the end, too early"
        chunks += chunk
    return bytes(chunks)


def test_static_server(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    large = os.urandom(3_000_000)
    (root / "large.bin").write_bytes(large)
    (root / "index.html").write_bytes(b"<p>index")
    (root / "empty").write_bytes(b"")
    (root / "sp ace.txt").write_bytes(b"text")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "fifo")
    with serving("examples/static_server.py", root) as (host, port):
        http = HTTPConnection(host, port, timeout=60)

        def ask(method: str, target: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
            http.request(method, target, headers=headers)
            response = http.getresponse()
            return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}

        assert ask("GET", "/large.bin")[:2] == (200, large)
        first = http.sock
        assert ask("GET", "/")[:2] == (200, b"<p>index")
        assert ask("GET", "/empty")[:2] == (200, b"")
        status, body, headers = ask("GET", "/sp%20ace.txt?query")
        assert (status, body, headers["content-type"]) == (200, b"text", "text/plain")
        status, body, headers = ask("HEAD", "/large.bin")
        assert (status, body, headers["content-length"]) == (200, b"", str(len(large)))
        for wanted, expected in {"10-19": large[10:20], "2999990-": large[-10:], "-5": large[-5:]}.items():
            status, body, headers = ask("GET", "/large.bin", Range=f"bytes={wanted}")
            assert (status, body, headers["content-length"]) == (206, expected, str(len(expected)))
        assert ask("GET", "/large.bin", Range="bytes=10-19")[2]["content-range"] == "bytes 10-19/3000000"
        assert ask("GET", "/large.bin", Range="bytes=9999999-")[0] == 416
        for target in (
            "/missing",
            "/../secret",
            "/%2e%2e/secret",
            "/sub/../../secret",
            "/link",
            "/sub",
            "/fifo",
            "/%00",
        ):
            assert ask("GET", target)[:2] == (404, b"Not found\n"), target
        assert ask("POST", "/", **{"Content-Length": "0"})[0] == 405
        assert http.sock is first, "not kept alive"
        http.close()
        with socket.create_connection((host, port)) as rude:
            rude.sendall(b"nonsense\r\n\r\n")
            with rude.makefile("rb") as answer:
                assert answer.readline().startswith(b"HTTP/1.1 400 ")


def test_pass_fd(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        file.write_bytes(os.urandom(100_000))
    expected = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}\n" for file in files)
    assert python("examples/pass_fd.py", *map(str, files)) == expected


def run_block(code: str, directory: Path, *options: str) -> None:
    """As a program, or as tests, with options for Python."""
    script = directory / "test_block.py"
    script.write_text(code)
    pytest_options = ["-m", "pytest", "-p", "no:cacheprovider"] if "import pytest" in code else []
    python(*options, *pytest_options, str(script))


@pytest.mark.parametrize("place", BLOCKS)
def test_block(place: str, tmp_path: Path) -> None:
    run_block(BLOCKS[place], tmp_path)


def test_blocks_are_found_in_both_formats() -> None:
    assert {"README.md", "index.rst"} <= {place.partition(":")[0] for place in BLOCKS}


BENCHMARKS = (
    "reads",
    "files",
    "whole_files",
    "batch",
    "multishot",
    "pyaio",
    "idle_tick",
    "echo",
    "sockets",
    "http",
    "idle_connections",
    "cancel",
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs(name: str) -> None:
    assert name in python("-m", "benchmarks", name, "--rounds", "2")


def test_system_calls_are_counted_one_by_one() -> None:
    counted = """
        import os
        from benchmarks.syscalls import count

        def work(mark):
            os.getppid()
            mark()
            for _ in range(100):
                os.getppid()
            mark()
            os.getppid()

        print(count(work))
    """
    calls = python("-c", textwrap.dedent(counted)).strip()
    if calls == "None":
        pytest.skip("ptrace is forbidden here")
    assert calls == "100"
