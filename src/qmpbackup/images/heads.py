# SPDX-License-Identifier: Apache-2.0
"""Heads of qcow2 files that we write ourselves, so that no program parses one that others may change.

The head of a file says which other files belong to it: what it builds on, and where its data lies if
not in it. QEMU's options can replace the first but not forbid the second, and it reads the file's head
after we have. So it gets one of ours: made from the bytes that were checked, with a link that we
choose, in memory, and laid over the file by a qcow2 overlay of one cluster.

    head: ours ─┐
                ├─ overlay in memory ─ what QEMU opens as the image
    file, rest ─┘

Knows bytes and descriptors; must not know chains. Format: docs/interop/qcow2.txt of QEMU.
"""

import os
import struct
from collections.abc import Iterator
from typing import Final

from qmpbackup.errors import DamagedError
from qmpbackup.images.qcow2 import HEAD, parse_header
from qmpbackup.images.qcow2_layout import CLUSTER, header

_FIXED: Final = 72
"""Bytes of a header of version 2."""
_V3, _V3_WITH_COMPRESSION = 104, 112
_CLUSTER_BITS_AT, _LINK_AT, _FEATURES_AT, _LENGTH_AT = 20, 8, 72, 100
_LINK: Final = struct.Struct(">QI")
_FEATURES: Final = struct.Struct(">QQQ")
_BITMAPS_FEATURE: Final = 1
"""Of the features that whoever does not know them clears: the extension on bitmaps holds."""
_BITMAPS: Final = 0x23852875
_EXTENSION: Final = struct.Struct(">II")
_COPIED: Final = 1 << 63
_SPAN: Final = CLUSTER * CLUSTER // 8
_PAGE: Final = 4096

_COUNTS_AT, _L2_AT, _DATA_AT, _L1_AT = (number * CLUSTER for number in (1, 2, 3, 4))
"""Where an overlay has its parts, behind its header."""


def private(head: bytes, name: str, link: str) -> bytes:
    """The head of an image as it may be shown to QEMU: all that says how its own contents are to be
    read, and `link` for what it builds on (empty: it stands alone).

    Raises:
        DamagedError: the image needs more than itself and what it builds on, or is no qcow2 image.
    """
    found = parse_header(head, name)
    if found.external_data or found.encrypted:
        raise DamagedError(f"{name} does not hold its data itself, in the clear.")
    bits = struct.unpack_from(">I", head, _CLUSTER_BITS_AT)[0]
    new = _fixed(head, found.version) + _extensions(head, found.version)
    room = min(1 << bits, HEAD)
    text = link.encode()
    if len(new) + len(text) > room:
        raise DamagedError(f"{name} has clusters too small for its head.")
    _LINK.pack_into(new, _LINK_AT, len(new) if text else 0, len(text))
    return bytes(new + text).ljust(room, b"\0") + head[room:]


def _fixed(head: bytes, version: int) -> bytearray:
    if version == 2:
        return bytearray(head[:_FIXED])
    said = struct.unpack_from(">I", head, _LENGTH_AT)[0]
    length = _V3_WITH_COMPRESSION if said >= _V3_WITH_COMPRESSION else _V3
    new = bytearray(head[:length])
    struct.pack_into(">I", new, _LENGTH_AT, length)
    incompatible, compatible, automatic = _FEATURES.unpack_from(new, _FEATURES_AT)
    _FEATURES.pack_into(new, _FEATURES_AT, incompatible, compatible, automatic & _BITMAPS_FEATURE)
    return new


def _extensions(head: bytes, version: int) -> bytearray:
    """Those that are to be kept, and their end: where bitmaps are stored, which is in the file."""
    kept = bytearray()
    for kind, data in extensions(head, version):
        if kind == _BITMAPS:
            kept += _EXTENSION.pack(kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
    return kept + bytes(_EXTENSION.size)


def extensions(head: bytes, version: int) -> Iterator[tuple[int, bytes]]:
    """Kind and contents of each extension in a head."""
    at = struct.unpack_from(">I", head, _LENGTH_AT)[0] if version == 3 else _FIXED
    while at + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size
        if kind == 0 or at + length > len(head):
            return
        yield kind, head[at : at + length]
        at += -(-length // 8) * 8


def overlay(head: bytes, size: int) -> int:
    """A file in memory: the image of a disk of `size` bytes that begins with `head` and shows what it
    builds on from there. The caller closes the descriptor, and says what it builds on.

    Raises:
        OSError: there is no memory for it.
    """
    fd = os.memfd_create("qmpbackup-head", os.MFD_CLOEXEC)
    try:
        tables = -(-size // _SPAN)
        os.ftruncate(fd, _L1_AT + -(-tables * 8 // CLUSTER) * CLUSTER)
        os.pwrite(fd, header(size, l1_at=_L1_AT, l1_size=tables, counts_at=_COUNTS_AT), 0)
        os.pwrite(fd, struct.pack(">Q", _COPIED | _L2_AT), _L1_AT)
        os.pwrite(fd, struct.pack(">Q", _COPIED | _DATA_AT), _L2_AT)
        for at in range(0, len(head), _PAGE):
            page = head[at : at + _PAGE]
            if page.strip(b"\0"):  # memory for what is not zeros only: there may be hundreds
                os.pwrite(fd, page, _DATA_AT + at)
    except BaseException:
        os.close(fd)
        raise
    return fd
