# SPDX-License-Identifier: Apache-2.0
"""Who else writes to a disk, where neither its bitmaps nor a view of it can see that.

A bitmap sees what passes its node, the format node. QEMU's permissions say what may happen below: a node
whose user does not share `write` is written to by that user alone. `share-rw=on` of a device on a raw
image makes all nodes below share it; with qcow2 above, whose metadata no two may write, only the external
data file and the backing images. Between processes the same is said by locks on the image (byte 201: no
other may write; block/file-posix.c), which `locking=off` leaves out, and which QEMU shows nowhere: so we
look at the locks that its process holds.

    writes from elsewhere are possible      every backup is a full: what they change is marked nowhere
    somebody else does write right now      no view is possible: the copy-before-write filter wants to be
                                            the only one, and QEMU refuses to put it in place
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qmpbackup.machine.graph import WRITE, Graph
from qmpbackup.machine.underlays import BACKING, Files

_NONE_ELSE_WRITES = 201
_WRITES = 101
"""Bytes of an image that QEMU locks (RAW_LOCK_SHARED_BASE and RAW_LOCK_PERM_BASE, BLK_PERM_WRITE)."""

_READINGS = 9

_LOCK = re.compile(
    r"\d+: (?:OFDLCK|POSIX) +ADVISORY +\w+ +-?\d+ ([0-9a-f]+):([0-9a-f]+):(\d+) (\d+) (\d+|EOF)"
)
_UNLOCKED = re.compile(r"""\blocking["']?\s*[=:]\s*["']?off\b""")

FileKey = tuple[int, int]
"""Device and inode of a file."""


def writers(graph: Graph, active_node: str, device: str) -> list[str]:
    """Who in this QEMU writes to the disk's nodes besides its device; names, empty where there are none.

    `device` is the name that the device's own place in the graph has.
    """
    found = [
        edge.parent
        for node in graph.under(active_node, but=[BACKING, "target"])
        for edge in graph.users(node)
        if edge.kind == "root" and WRITE in edge.does and edge.parent != device
    ]
    return list(dict.fromkeys(found))


def is_shared(graph: Graph, format_node: str) -> bool:
    """Whether QEMU lets others write to what the format node reads."""
    below = [edge for node in graph.under(format_node) for edge in graph.children(node)]
    # A node without any below it is a file, and its users say whether others may write to it.
    return any(WRITE in edge.shares for edge in below or graph.users(format_node))


@dataclass(frozen=True)
class Locks:
    """The locks on the open files of a QEMU process."""

    files: Files
    command_line: tuple[str, ...]

    def missing(self, filenames: Iterable[str]) -> bool:
        """Whether QEMU keeps nobody from writing to one of these files.

        Where its locks cannot be seen, only what it was started with can tell.
        """
        for filename in filenames:
            status = self.files.status(filename)
            key = (status.st_dev, status.st_ino) if status else None
            if key in self._open:
                if not self._open[key][_NONE_ELSE_WRITES]:
                    return True
            elif any(map(_UNLOCKED.search, self.command_line)):
                return True
        return False

    def others_write(self, filenames: Iterable[str]) -> bool:
        """Whether another process has announced by its locks that it writes to one of these files.

        Asked only of files that QEMU itself writes to and lets others write to: nobody can announce
        that for any other.
        """
        for filename in filenames:
            status = self.files.status(filename)
            key = (status.st_dev, status.st_ino) if status else None
            ours = self._open.get(key, Counter())
            if key and ours[_WRITES] and not ours[_NONE_ELSE_WRITES]:
                readings = (_announcements()[key] for _ in range(_READINGS))
                if all(found > ours[_WRITES] for found in readings):
                    return True
        return False

    @cached_property
    def _open(self) -> dict[FileKey | None, Counter[int]]:
        """For each file that the process has open, how often each of the two bytes is locked there."""
        found: dict[FileKey | None, Counter[int]] = {}
        for number, status in self._descriptors():
            try:
                text = Path(f"/proc/{self.files.pid}/fdinfo/{number}").read_text("ascii")
            except (OSError, UnicodeError):
                continue
            locked = found.setdefault((status.st_dev, status.st_ino), Counter())
            for _, byte in _locked_bytes(text):
                locked[byte] += 1
        return found

    def _descriptors(self) -> Iterator[tuple[str, os.stat_result]]:
        folder = Path(f"/proc/{self.files.pid}/fd")
        try:
            entries = list(folder.iterdir()) if self.files.pid is not None else []
        except OSError:
            return
        for entry in entries:
            try:
                yield entry.name, entry.stat()
            except OSError:
                continue  # closed meanwhile


def _announcements() -> Counter[FileKey]:
    """How many locks there are on the machine that announce writes, for each file.

    The kernel tells it a page at a time: where locks come and go meanwhile, some are told twice and
    others not at all. So it is read several times, and who is missing once is not there: where that is
    wrong, QEMU refuses the view and says so.
    """
    try:
        text = Path("/proc/locks").read_text("ascii")
    except (OSError, UnicodeError):
        return Counter()
    return Counter(key for key, byte in _locked_bytes(text) if byte == _WRITES)


def _locked_bytes(text: str) -> Iterator[tuple[FileKey, int]]:
    """Which of the two bytes are locked, and in which file."""
    for major, minor, inode, first, last in _LOCK.findall(text):
        key = (os.makedev(int(major, 16), int(minor, 16)), int(inode))
        for byte in (_WRITES, _NONE_ELSE_WRITES):
            if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                yield key, byte
