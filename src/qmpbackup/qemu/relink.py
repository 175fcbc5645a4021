# SPDX-License-Identifier: Apache-2.0
"""Change the backing link in the head of a qcow2 file, so that every byte is known beforehand.

`qemu-img rebase -u` writes the whole head anew in its own way; here nothing changes but the name and
its length, so the digest of the file can be computed, and recorded, before the file is touched.
Format: docs/interop/qcow2.txt of QEMU.
"""

import struct

from qmpbackup.errors import StorageError

HEAD = 65536
"""Bytes of a file that hold its head, at most."""

_LINK = struct.Struct(">QI")  # backing_file_offset, backing_file_size
_LINK_AT = 8
_CLUSTER_BITS_AT = 20
_LONGEST = 1023


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


def _no_room(name: str, parent: str) -> StorageError:
    return StorageError(
        f"The head of {name} has no room for a link to {parent}.",
        "`qmprestore merge --targetfile FILE` writes a new file and leaves the backup alone.",
    )
