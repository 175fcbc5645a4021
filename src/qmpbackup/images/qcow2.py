# SPDX-License-Identifier: Apache-2.0
"""What the header of a qcow2 file says, read without opening the image.

So that nothing a strange header names (a backing file, an external data file) is ever touched.
Format: docs/interop/qcow2.txt of QEMU.
"""

import os
import struct
from dataclasses import dataclass

from qmpbackup.errors import DamagedError

HEAD = 65536
"""Bytes of a file that hold its head, at most: the header, its extensions and the link, which QEMU
writes one behind the other."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to and with the offset of the snapshots
_MAGIC = b"QFI\xfb"
_FEATURES_AT = 72
_LENGTH_AT = 100
_LEAST_LENGTH = 104
_CLUSTER_BITS = range(9, 22)
_EXTERNAL_DATA_FILE = 1 << 2
_CORRUPT = 1 << 1
_LONGEST_BACKING = 1023
_BACKING_FORMAT = 0xE2792ACA


@dataclass(frozen=True, slots=True)
class Header:
    """`size` is that of the disk, in bytes. `backing` is empty for an image that stands alone."""

    version: int
    size: int
    backing: str
    backing_format: str
    snapshots: int
    encrypted: bool
    external_data: bool
    corrupt: bool


def read_header(fd: int, name: str) -> Header:
    """Read the header of an open file; `name` is what messages call it.

    Raises:
        DamagedError: it is no qcow2 image.
        OSError: it cannot be read.
    """
    return parse_header(os.pread(fd, HEAD, 0), name)


def parse_header(head: bytes, name: str) -> Header:
    """What the first `HEAD` bytes of a file say; `name` is what messages call it.

    Raises:
        DamagedError: it is no qcow2 image.
    """
    if len(head) < _HEADER.size or head[:4] != _MAGIC:
        raise DamagedError(f"{name} is not a qcow2 image.", _HINT)
    fields = _HEADER.unpack_from(head)
    version, backing_at, backing_length = fields[1], fields[2], fields[3]
    if version not in {2, 3} or (version == 3 and len(head) < _LEAST_LENGTH):
        raise DamagedError(f"{name} is a qcow2 image of an unknown version.", _HINT)
    length = struct.unpack_from(">I", head, _LENGTH_AT)[0] if version == 3 else _LEAST_LENGTH
    if (
        not _LEAST_LENGTH <= length <= max(len(head), _LEAST_LENGTH)
        or fields[4] not in _CLUSTER_BITS
    ):
        raise DamagedError(f"{name} has a header that makes no sense.", _HINT)
    features = struct.unpack_from(">Q", head, _FEATURES_AT)[0] if version == 3 else 0
    return Header(
        version=version,
        size=fields[5],
        backing=_backing(head, name, backing_at, backing_length),
        backing_format=_backing_format(head, version),
        snapshots=fields[11],
        encrypted=fields[6] != 0,
        external_data=bool(features & _EXTERNAL_DATA_FILE),
        corrupt=bool(features & _CORRUPT),
    )


_HINT = "Put back an unharmed copy, or restore another point."


def _backing(head: bytes, name: str, offset: int, length: int) -> str:
    if offset == 0:
        return ""
    if not 0 < length <= _LONGEST_BACKING or offset + length > len(head):
        raise DamagedError(f"{name} has a header that makes no sense.", _HINT)
    return head[offset : offset + length].decode("utf-8", "surrogateescape")


def _backing_format(head: bytes, version: int) -> str:
    """The format of the backing file, from the extensions that follow the header."""
    at = struct.unpack_from(">I", head, 100)[0] if version == 3 else 72
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode("utf-8", "surrogateescape")
        at += 8 + (length + 7) // 8 * 8
    return ""
