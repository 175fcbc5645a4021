# SPDX-License-Identifier: Apache-2.0
"""An archive of the form that Linux takes for its first file system: cpio, "newc"."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"070701"


class Initramfs:
    """An archive that is being written. All in it is root's; folders above a file come by themselves."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written: set[str] = set()

    def folder(self, name: str) -> None:
        """A folder, unless it is there."""
        if name and name not in self._written:
            self.folder(name.rpartition("/")[0])
            self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A file, unless it is there."""
        if name not in self._written:
            self.folder(name.rpartition("/")[0])
            self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link, unless it is there."""
        if name not in self._written:
            self.folder(name.rpartition("/")[0])
            self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def copy(self, name: str, path: Path) -> None:
        """A program or a library of this host's; of a link, what it leads to."""
        self.file(name, path.read_bytes(), 0o755)

    def end(self) -> None:
        """The end of the archive."""
        self._entry("TRAILER!!!", 0, b"")

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._written.add(name)
        known = os.fsencode(name) + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, its own device, length of the name, checksum
        numbers = (len(self._written), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(known), 0)
        head = _MAGIC + b"".join(b"%08x" % number for number in numbers) + known
        for part in (head, data):
            self._file.write(part)
            self._file.write(b"\0" * (-len(part) % 4))
