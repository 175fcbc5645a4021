# SPDX-License-Identifier: Apache-2.0
"""Change the backing link in the head of a qcow2 file, so that every byte is known beforehand.

`qemu-img rebase -u` opens what the head says and writes it anew in its own way. Here nothing is opened,
and where there is a link already nothing changes but the name and its length, so the digest of the file
can be computed, and recorded, before the file is touched.
Format: docs/interop/qcow2.txt of QEMU.
"""

import os
import struct

from qmpbackup.errors import StorageError
from qmpbackup.folder import Folder
from qmpbackup.images.heads import extensions
from qmpbackup.images.qcow2 import HEAD, parse_header

__all__ = ["HEAD", "linked", "relinked", "write"]

_LINK = struct.Struct(">QI")  # backing_file_offset, backing_file_size
_LINK_AT = 8
_CLUSTER_BITS_AT = 20
_LENGTH_AT = 100
_LONGEST = 1023
_BACKING_FORMAT = 0xE2792ACA
_EXTENSION = struct.Struct(">II")


def relinked(head: bytes, name: str, parent: str) -> bytes:
    """The head of an image that has a backing link, with the link to `parent` instead.

    Repeating it, or doing it over half of itself, gives the same bytes. `name` is what messages call
    the image.

    Raises:
        StorageError: there is no room for the name where the link is.
    """
    new = parent.encode("utf-8", "surrogateescape")
    offset, length = _LINK.unpack_from(head, _LINK_AT)
    cluster = 1 << min(struct.unpack_from(">I", head, _CLUSTER_BITS_AT)[0], 16)
    end = min(cluster, len(head))
    if not 0 < offset <= end - len(new) or len(new) > _LONGEST or length > _LONGEST:
        raise _no_room(name, parent)
    # QEMU keeps the name last in the head, with nothing but zeros behind it.
    behind = head[offset + length : end]
    if behind.strip(b"\0") and head[offset : offset + len(new)] != new:
        raise _no_room(name, parent)
    field = max(length, len(new))
    changed = bytearray(head)
    changed[offset : offset + field] = new.ljust(field, b"\0")
    _LINK.pack_into(changed, _LINK_AT, offset, len(new))
    return bytes(changed)


def linked(head: bytes, name: str, parent: str) -> bytes:
    """The head of any image, with a link to the qcow2 image `parent`, whatever it builds on now.

    Raises:
        DamagedError: it is no head of a qcow2 image.
        StorageError: there is no room for the link.
    """
    version = parse_header(head, name).version
    length = struct.unpack_from(">I", head, _LENGTH_AT)[0] if version == 3 else 72
    new, used = bytearray(head[:length]), length
    for kind, data in extensions(head, version):
        used += _EXTENSION.size + -(-len(data) // 8) * 8
        if kind != _BACKING_FORMAT:
            new += _extension(kind, data)
    new += _extension(_BACKING_FORMAT, b"qcow2") + bytes(_EXTENSION.size)
    text = parent.encode("utf-8", "surrogateescape")
    room = 1 << min(struct.unpack_from(">I", head, _CLUSTER_BITS_AT)[0], 16)
    if len(text) > _LONGEST or len(new) + len(text) > min(room, len(head)):
        raise _no_room(name, parent)
    old, old_length = _LINK.unpack_from(head, _LINK_AT)
    used = min(max(used + _EXTENSION.size, old + old_length if old else 0), len(head))
    _LINK.pack_into(new, _LINK_AT, len(new), len(text))
    new += text
    return bytes(new.ljust(used, b"\0")) + head[max(used, len(new)) :]


def write(folder: Folder, name: str, parent: str, *, anew: bool = False) -> None:
    """Let an image of the folder build on another one, durably: as `relinked`, or (`anew`) as `linked`.

    Raises:
        DamagedError: it is no qcow2 image.
        StorageError: its head has no room for the link.
        OSError: it could not be written.
    """
    fd = folder.open_file(name, write=True)
    try:
        head = os.pread(fd, HEAD, 0)
        new = linked(head, name, parent) if anew else relinked(head, name, parent)
        changed = [
            at for at, (one, other) in enumerate(zip(head, new, strict=True)) if one != other
        ]
        if changed:
            os.pwrite(fd, new[: changed[-1] + 1], 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def _no_room(name: str, parent: str) -> StorageError:
    return StorageError(
        f"The head of {name} has no room for a link to {parent}.",
        "`qmprestore merge --targetfile FILE` writes a new file and leaves the backup alone.",
    )
