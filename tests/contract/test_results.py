"""What operations return, against plain system calls as the oracle."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.helpers import parked
from trio_uring import lowlevel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers import Bench

AT_SYMLINK_NOFOLLOW = 0x100
FIELDS = [name for name in dir(os.stat_result) if name.startswith("st_")]
CREDENTIALS = struct.Struct("3i")


def _fields(result: os.stat_result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in FIELDS}


async def test_statx_is_stat(bench: Bench) -> None:
    path = bench.path(b"content")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    link = bench.directory / "link"
    link.symlink_to(path)
    paths: list[Path | str] = [path, link, bench.fifo(), bench.directory, "/dev/null", "/proc/self/status", "."]
    for which in paths:
        ours, stdlib = await lowlevel.statx(which), os.stat(which)
        assert tuple(ours) == tuple(stdlib)
        assert _fields(ours) == _fields(stdlib)
        assert _fields(await lowlevel.statx(which, flags=AT_SYMLINK_NOFOLLOW)) == _fields(os.lstat(which))
    assert stat.S_ISLNK((await lowlevel.statx(link, flags=AT_SYMLINK_NOFOLLOW)).st_mode)


async def test_statx_of_an_fd_and_below_a_directory(bench: Bench) -> None:
    path = bench.path(b"content")
    directory = bench.keep(os.open(bench.directory, os.O_RDONLY))
    for fd in (bench.file(b"x"), directory, bench.pipe()[0], bench.sockets()[0].fileno()):
        assert _fields(await lowlevel.statx(fd)) == _fields(os.stat(fd))
    assert _fields(await lowlevel.statx(path.name, dir_fd=directory)) == _fields(os.stat(path))


async def test_openat(bench: Bench) -> None:
    directory = bench.keep(os.open(bench.directory, os.O_RDONLY))
    umask = os.umask(0o027)
    try:
        fd = bench.keep(await lowlevel.openat("new", os.O_CREAT | os.O_RDWR, dir_fd=directory))
        other = bench.keep(await lowlevel.openat("other", os.O_CREAT | os.O_WRONLY, 0o604, dir_fd=directory))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat(bench.directory / "new").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(bench.directory / "other").st_mode) == 0o600
    assert not os.get_inheritable(fd)
    assert os.get_blocking(fd)
    assert os.write(other, b"x") == 1


async def test_file_positions(bench: Bench) -> None:
    fd = bench.file(b"0123456789")
    buffer = bytearray(4)
    assert await lowlevel.read(fd, buffer) == 4
    assert await lowlevel.read(fd, buffer, 8) == 2
    assert buffer == b"8923"
    assert os.lseek(fd, 0, os.SEEK_CUR) == 4
    assert await lowlevel.write(fd, b"ab") == 2
    assert await lowlevel.write(fd, b"yz", 8) == 2
    one, two = bytearray(1), bytearray(2)
    assert await lowlevel.readv(fd, [one, two]) == 3
    assert one + two == b"67y"
    assert await lowlevel.readv(fd, [one, two], 4) == 3
    assert one + two == b"ab6"
    assert await lowlevel.writev(fd, [b"A", b"", b"BC"], 0) == 3
    assert await lowlevel.writev(fd, []) == 0
    assert os.pread(fd, 100, 0) == b"ABC3ab67yz"
    assert os.lseek(fd, 0, os.SEEK_CUR) == 9
    await lowlevel.fsync(fd)
    await lowlevel.fdatasync(fd)


async def test_a_big_file(bench: Bench) -> None:
    data = os.urandom(3 << 20)
    fd = bench.file()
    done = 0
    while done < len(data):
        done += await lowlevel.write(fd, memoryview(data)[done:], done)
    buffer = bytearray(len(data) + 1)
    got = 0
    while n := await lowlevel.read(fd, memoryview(buffer)[got:], got):
        got += n
    assert buffer[:got] == data


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ],
)
async def test_socket(family: int, kind: int) -> None:
    fd = await lowlevel.socket(family, kind)
    assert not os.get_inheritable(fd)
    with socket.socket(fileno=fd) as sock:
        assert (sock.family, sock.type) == (family, kind)


def _unix_address(bench: Bench, form: str) -> Any:
    return {"path": str(bench.directory / "listener"), "abstract": b"\0trio_uring-test-%d" % os.getpid()}[form]


@pytest.mark.parametrize("form", ["INET", "INET6", "path", "abstract"])
async def test_accept_and_connect(bench: Bench, form: str) -> None:
    if form in ("INET", "INET6"):
        family = socket.AddressFamily[f"AF_{form}"]
        listener = bench.listener(family)
    else:
        family = socket.AF_UNIX
        listener = bench.new_socket(family)
        listener.bind(_unix_address(bench, form))
        listener.listen()
    oracle_client, client = bench.new_socket(family), bench.new_socket(family)
    oracle_client.connect(listener.getsockname())
    oracle, oracle_address = listener.accept()
    oracle.close()

    async with trio.open_nursery() as nursery:
        attempt = await parked(nursery, lowlevel.accept, listener)
        await lowlevel.connect(client, listener.getsockname())
        fd, address = await attempt.result()
    assert not os.get_inheritable(fd)
    with socket.socket(fileno=fd) as accepted:
        assert address == accepted.getpeername() == client.getsockname()
        assert type(address) is type(oracle_address)
        assert client.getpeername() == listener.getsockname()
        await lowlevel.send(client, b"hello")
        assert accepted.recv(9) == b"hello"


async def test_accept_with_flags(bench: Bench) -> None:
    listener = bench.listener()
    for flags in (0, socket.SOCK_NONBLOCK):
        bench.new_socket().connect(listener.getsockname())
        fd = bench.keep((await lowlevel.accept(listener, flags))[0])
        assert not os.get_inheritable(fd)
        assert os.get_blocking(fd) is not bool(flags & socket.SOCK_NONBLOCK)


async def test_shutdown(bench: Bench) -> None:
    a, b = bench.sockets()
    await lowlevel.shutdown(a, socket.SHUT_WR)
    assert b.recv(1) == b""
    b.send(b"x")
    assert a.recv(1) == b"x"


async def test_close(bench: Bench) -> None:
    a, b = bench.sockets()
    await lowlevel.close(a.detach())
    assert b.recv(1) == b""


async def test_message_flags(bench: Bench) -> None:
    a, b = bench.sockets(socket.AF_INET)
    b.send(b"hello")
    buffer = bytearray(5)
    assert await lowlevel.recv(a, buffer, socket.MSG_PEEK) == 5
    assert await lowlevel.recv(a, buffer, socket.MSG_WAITALL) == 5
    await lowlevel.send(b, b"!", socket.MSG_OOB)
    assert await lowlevel.poll(a, select.POLLPRI) == select.POLLPRI
    assert a.recv(1, socket.MSG_OOB) == b"!"


async def test_datagrams(bench: Bench) -> None:
    """sendmsg to an address, recvmsg with the sender's, as the stdlib shows it; truncation."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        a, b = bench.new_socket(family, socket.SOCK_DGRAM), bench.new_socket(family, socket.SOCK_DGRAM)
        for sock in (a, b):
            sock.bind((host, 0))
        pieces: list[list[bytes | bytearray | memoryview]] = [[b"hello"], [b"he", bytearray(b"l"), memoryview(b"lo")]]
        for buffers in pieces:
            for address in (b.getsockname(), b.getsockname()[:2]):
                assert await lowlevel.sendmsg(a, buffers, address=address) == 5
                a.sendto(b"hello", address)
                assert await lowlevel.recvmsg(b, 9) == b.recvmsg(9)
        for _ in range(2):
            await lowlevel.sendmsg(a, [b"hello"], address=b.getsockname())
        truncated = await lowlevel.recvmsg(b, 3)
        assert truncated == b.recvmsg(3)
        assert truncated[2] & socket.MSG_TRUNC


async def test_unix_datagrams(bench: Bench) -> None:
    """The sender is named by a path, abstract, or unnamed."""
    receiver = bench.new_socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(bench.directory / "receiver"))
    for name in (str(bench.directory / "sender"), b"\0trio_uring-sender-%d" % os.getpid(), None):
        sender = bench.new_socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if name is not None:
            sender.bind(name)
        for _ in range(2):
            await lowlevel.sendmsg(sender, [b"hello"], address=receiver.getsockname())
        assert await lowlevel.recvmsg(receiver, 9) == receiver.recvmsg(9)


async def test_passing_fds(bench: Bench) -> None:
    a, b = bench.sockets()
    fds = bench.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("2i", *fds))]
    room = socket.CMSG_SPACE(2 * 4)

    assert await lowlevel.sendmsg(a, [b"x"], rights) == 1
    data, received, flags, address = await lowlevel.recvmsg(b, 9, room)
    a.sendmsg([b"x"], rights)
    oracle = b.recvmsg(9, room)
    assert (data, flags, address) == (oracle[0], *oracle[2:])
    for ancillary in (received, oracle[1]):
        ((level, kind, payload),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for original, copy in zip(fds, struct.unpack("2i", payload), strict=True):
            bench.keep(copy)
            assert os.path.sameopenfile(original, copy)


async def test_truncated_ancillary_data(bench: Bench) -> None:
    a, b = bench.sockets()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("2i", *bench.pipe()))]
    for room in (0, socket.CMSG_LEN(4)):
        results = []
        for _ in range(2):
            a.sendmsg([b"x"], rights)
        for data, ancillary, flags, address in (await lowlevel.recvmsg(b, 9, room), b.recvmsg(9, room)):
            for _, _, payload in ancillary:
                bench.keep(struct.unpack("i", payload)[0])
            results.append((data, [len(payload) for _, _, payload in ancillary], flags, address))
        assert results[0] == results[1]
        assert results[0][2] & socket.MSG_CTRUNC


async def test_several_control_messages(bench: Bench) -> None:
    a, b = bench.sockets()
    b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    credentials = CREDENTIALS.pack(os.getpid(), os.getuid(), os.getgid())
    items = [
        (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials),
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", bench.file())),
    ]
    room = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(4)
    await lowlevel.sendmsg(a, [b"x"], items)
    a.sendmsg([b"x"], items)
    results = []
    for _, ancillary, _, _ in (await lowlevel.recvmsg(b, 9, room), b.recvmsg(9, room)):
        received = {kind: data for _, kind, data in ancillary}
        bench.keep(struct.unpack("i", received[socket.SCM_RIGHTS])[0])
        results.append((received[socket.SCM_CREDENTIALS], [kind for _, kind, _ in ancillary]))
    assert results[0] == results[1]
    assert results[0][0] == credentials


async def test_poll(bench: Bench) -> None:
    read_end, write_end = bench.pipe()
    os.write(write_end, b"x")
    assert await lowlevel.poll(read_end, select.POLLIN) == select.POLLIN
    assert await lowlevel.poll(write_end, select.POLLIN | select.POLLOUT) == select.POLLOUT
    os.close(write_end)
    bench.closed(write_end)
    assert await lowlevel.poll(read_end, select.POLLIN) == select.POLLIN | select.POLLHUP


async def test_timeout() -> None:
    start = trio.current_time()
    await lowlevel.timeout(0.01)
    assert trio.current_time() - start >= 0.01
    for nonsense in (-1, float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            await lowlevel.timeout(nonsense)


async def test_objects_with_a_fileno(bench: Bench) -> None:
    path = bench.path(b"hello")
    buffer = bytearray(9)
    with path.open("r+b", buffering=0) as file:
        assert await lowlevel.read(file, buffer, 0) == 5
        assert await lowlevel.readv(file, [buffer], 0) == 5
        assert await lowlevel.write(file, b"H", 0) == 1
        assert await lowlevel.writev(file, [b"H"], 0) == 1
        await lowlevel.fsync(file)
        await lowlevel.fdatasync(file)
        assert await lowlevel.async_cancel(file) == 0
    with pytest.raises(ValueError, match="closed file"):
        await lowlevel.read(file, buffer)
