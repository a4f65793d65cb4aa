"""A cancel races with what lets a stream over an fd go on: no byte is lost, none comes twice."""

from __future__ import annotations

import os
import threading

import pytest
import trio
from trio.lowlevel import FdStream

from tests.helpers import Attempt
from trio_uring import statistics

ROUNDS = 5000


@pytest.mark.seconds(60)
async def test_a_cancelled_receive_loses_no_byte() -> None:
    """A thread writes numbers; receives are cancelled at any moment."""
    read_end, write_end = os.pipe()
    numbers = b"".join(b"%d\n" % i for i in range(ROUNDS))

    def write() -> None:
        for i in range(0, len(numbers), 7):
            os.write(write_end, numbers[i : i + 7])
            os.sched_yield()
        os.close(write_end)

    received, cancelled = bytearray(), 0
    thread = threading.Thread(target=write)
    thread.start()
    async with FdStream(read_end) as receiver, trio.open_nursery() as nursery:
        for i in range(100 * ROUNDS):
            attempt = Attempt(nursery, receiver.receive_some, 5)
            for _ in range(i % 4):
                await trio.lowlevel.checkpoint()
            if await attempt.cancel():
                cancelled += 1
            elif attempt.value:
                received += attempt.value
            else:
                break
    thread.join()
    assert received == numbers
    assert cancelled > ROUNDS // 50, "no race"


@pytest.mark.seconds(60)
async def test_a_cancelled_send_has_sent_a_beginning() -> None:
    """Each send is larger than the pipe; the reader, a thread, sees beginnings of them and nothing else."""
    read_end, write_end = os.pipe()
    total, size = 0, 100_000
    received: list[bytes] = []

    def read() -> None:
        while data := os.read(read_end, 3000):
            received.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    ends = {True: 0, False: 0}
    async with FdStream(write_end) as sender, trio.open_nursery() as nursery:
        for i in range(ROUNDS // 5):
            attempt = Attempt(nursery, sender.send_all, i.to_bytes(2, "big") * (size // 2))
            for _ in range(i % 60):
                await trio.lowlevel.checkpoint()
            ends[await attempt.cancel()] += 1
        now = statistics()
        assert now.cancels_asked == now.cancels_won + now.cancels_lost
    thread.join()
    os.close(read_end)
    assert min(ends.values()) > 0, f"no race: {ends}"
    data = b"".join(received)
    position = whole = 0
    while position < len(data):
        i = int.from_bytes(data[position : position + 2], "big")
        end = position
        while end < len(data) and end - position < size and data[end : end + 2] == data[position : position + 2]:
            end += 2
        assert end - position <= size, i
        whole += end - position == size
        position = end
        total += 1
    assert whole == ends[False]
    assert total <= ROUNDS // 5
