# SPDX-License-Identifier: Apache-2.0
"""NBD as bytes: what is none is refused, whatever it is."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.nbd import protocol
from qmpbackup.nbd.protocol import ProtocolError, RequestKind


def name(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def test_a_request_is_read() -> None:
    data = protocol.REQUEST.pack(0x25609513, protocol.ONE_EXTENT, RequestKind.READ, 7, 512, 1024)
    found = protocol.parse_request(data)
    assert (found.kind, found.cookie, found.offset, found.length) == (
        RequestKind.READ,
        7,
        512,
        1024,
    )
    assert found.flags == protocol.ONE_EXTENT


def test_contexts_are_read() -> None:
    asked = name(b"disk") + struct.pack(">I", 2) + name(b"base:allocation") + name(b"qemu:")
    assert protocol.parse_contexts(asked) == ("disk", ["base:allocation", "qemu:"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        name(b"disk"),
        name(b"disk") + struct.pack(">I", 1),
        name(b"disk") + struct.pack(">I", 2**32 - 1) + name(b"base:"),
        name(b"disk") + struct.pack(">I", 0) + b"more",
        name(b"\xff") + struct.pack(">I", 0),
        struct.pack(">I", 2**32 - 1) + b"disk",
    ],
)
def test_contexts_that_are_none(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.parse_contexts(data)


@pytest.mark.parametrize(
    ("parse", "length"),
    [
        (protocol.parse_request, protocol.REQUEST.size),
        (protocol.parse_option, protocol.OPTION.size),
    ],
)
def test_what_has_another_number_at_its_head(parse: Callable[[bytes], object], length: int) -> None:
    with pytest.raises(ProtocolError):
        parse(bytes(length))


@given(st.binary(max_size=64))
def test_any_bytes_are_names_or_refused(data: bytes) -> None:
    try:
        text, rest = protocol.parse_name(data)
    except ProtocolError:
        return
    assert name(text.encode()) + rest == data


@pytest.mark.parametrize(
    ("queries", "listing", "wanted"),
    [
        (["base:allocation"], False, True),
        (["base:"], False, False),
        (["base:"], True, True),
        ([], True, True),
        ([], False, False),
        (["qemu:dirty-bitmap:x"], True, False),
    ],
)
def test_which_queries_mean_the_allocation(queries: list[str], listing: bool, wanted: bool) -> None:
    assert protocol.wants_allocation(queries, listing=listing) is wanted
