"""Addresses as the kernel has them, and as Python shows them."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

from trio_uring._sockaddr import decode_address, encode_address


@pytest.mark.parametrize(
    "address",
    [
        ("127.0.0.1", 258),
        ("fe80::1", 258, 0x12345, 77),
        "/path",
        b"\0abstract\0name",
    ],
)
def test_there_and_back(address: Any) -> None:
    assert decode_address(encode_address(address)) == address


def test_ipv6_in_bytes() -> None:
    """Port and flow are in the network's order, the rest in the machine's. What is not given is 0."""
    raw = encode_address(("fe80::1", 258, 0x12345, 77))
    assert int.from_bytes(raw[:2], sys.byteorder) == socket.AF_INET6
    assert raw[2:8] == b"\1\2" + b"\0\1\x23\x45"
    assert raw[8:24] == socket.inet_pton(socket.AF_INET6, "fe80::1")
    assert int.from_bytes(raw[24:], sys.byteorder) == 77
    assert encode_address(("fe80::1", 258)) == raw[:4] + bytes(4) + raw[8:24] + bytes(4)


def test_an_interface_by_name_or_number() -> None:
    index, name = socket.if_nameindex()[0]
    expected = encode_address(("fe80::1", 9, 0, index))
    assert encode_address((f"fe80::1%{name}", 9)) == encode_address((f"fe80::1%{index}", 9)) == expected
