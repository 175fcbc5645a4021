# SPDX-License-Identifier: Apache-2.0
"""Whatever the head of a file says: what QEMU is shown names no other file, and nothing crashes."""

import struct

from hypothesis import example, given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images import heads, relink
from qmpbackup.images.qcow2 import HEAD, parse_header
from qmpbackup.images.qcow2_layout import CLUSTER, header

LINK = 'json:{"driver":"null-co"}'
BITMAPS, DATA_FILE = 0x23852875, 0x44415441
PLAIN = header(CLUSTER, l1_at=2 * CLUSTER, l1_size=1, counts_at=CLUSTER).ljust(HEAD, b"\0")

numbers = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2, 8, 72, 104, 112, 2**31]))
changes = st.lists(st.tuples(st.integers(4, 300), numbers), max_size=12)


def changed(edits: list[tuple[int, int]], length: int = HEAD) -> bytes:
    head = bytearray(PLAIN)
    for at, value in edits:
        struct.pack_into(">I", head, at, value)
    return bytes(head[:length])


@given(changes, st.integers(0, HEAD))
@example([(12, 2**32 - 1)], HEAD)  # a link without a place and of 4 GiB
@example([(100, 2**32 - 1)], HEAD)  # a header of 4 GiB
@example([(20, 63)], HEAD)
def test_no_head_makes_another_file_known(edits: list[tuple[int, int]], length: int) -> None:
    for cut in (HEAD, length):
        head = changed(edits, cut)
        try:
            shown = heads.private(head, "FULL-1", LINK)
        except DamagedError:
            continue
        found = parse_header(shown, "FULL-1")
        assert found.backing == LINK
        assert not found.external_data
        assert not found.encrypted
        assert found.backing_format == ""
        assert {kind for kind, _ in heads.extensions(shown, found.version)} <= {BITMAPS}
        assert (found.size, found.snapshots) == (
            parse_header(head, "").size,
            parse_header(head, "").snapshots,
        )
        assert heads.private(shown, "FULL-1", LINK) == shown


@given(changes, st.integers(0, HEAD), st.text("abc/é", min_size=1, max_size=40))
@example([(12, 2**32 - 1)], HEAD, "FULL-1")
@example([(100, 2**32 - 1)], HEAD, "FULL-1")
def test_any_head_is_linked_or_refused(
    edits: list[tuple[int, int]], length: int, parent: str
) -> None:
    for cut in (HEAD, length):
        head = changed(edits, cut)
        try:
            new = relink.linked(head, "INC-2", parent)
        except (DamagedError, StorageError):
            continue
        found = parse_header(new, "INC-2")
        assert (found.backing, found.backing_format, len(new)) == (parent, "qcow2", len(head))
        assert relink.linked(new, "INC-2", parent) == new


def test_an_external_data_file_is_refused_and_its_name_dropped() -> None:
    extension = struct.pack(">II", DATA_FILE, 8) + b"/etc/xyz"
    head = PLAIN[:104] + extension + PLAIN[104 : HEAD - len(extension)]
    assert b"/etc/xyz" not in heads.private(head, "FULL-1", "")[:CLUSTER]
    forged = head[:72] + struct.pack(">Q", 4) + head[80:]
    try:
        heads.private(forged, "FULL-1", "")
    except DamagedError as error:
        assert "FULL-1" in error.message
    else:
        raise AssertionError("an image with its data elsewhere was opened")


def test_a_head_in_memory_takes_little() -> None:
    """There may be hundreds, of files of many TiB."""
    import os

    fd = heads.overlay(PLAIN, 2**44)
    try:
        assert os.fstat(fd).st_blocks * 512 < 64 * 1024
    finally:
        os.close(fd)
