# SPDX-License-Identifier: Apache-2.0
"""The images below a disk's own that its contents come from, and by what they are known again.

A bitmap says what was written to a node, and nothing of what lies below it. Where the backing image is
exchanged (`qemu-img rebase -u`), replaced under its name, or changed in place, blocks change that no
bitmap has marked. So what a point was made from is recorded, and compared before anything builds on it.

    backing      read-only: size, and of a file its inode, length and time of the last change, else its
                 name
    data-file,   written by the disk itself: name and inode. Of the image that holds a disk's own
    file         bitmaps nothing is recorded; it may move, and its bitmaps move with it

The number of the device that a file lies on is no part of that: it is another after each mount of a
network file system. A volume of the device mapper has an identity of its own; of other block devices,
and of what lies on servers, only name and size can be told. Read where QEMU itself finds the files.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.machine.command_line import masked
from qmpbackup.machine.graph import FILTERS, OF_JOBS, Graph
from qmpbackup.machine.reply import Reply
from qmpbackup.model import Underlay

BACKING = "backing"
FILE = "file"


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a QEMU process, as it sees them (`None`: it runs where we cannot look)."""

    pid: int | None

    def status(self, filename: str) -> os.stat_result | None:
        """What the kernel says of a file by the name that QEMU has for it."""
        if self.pid is None or not filename:
            return None
        start = "root" if filename.startswith("/") else "cwd"
        with suppress(OSError):
            return (Path(f"/proc/{self.pid}/{start}") / filename.lstrip("/")).stat()
        # Only root may look through the eyes of a process that changed its user.
        with suppress(OSError):
            return Path(filename).stat() if filename.startswith("/") else None
        return None


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for what lies below the nodes of one VM."""

    nodes: Mapping[str, Reply]
    graph: Graph
    files: Files

    def of(self, format_node: str, *, keeps_bitmaps: bool) -> Iterator[Underlay]:
        """What lies below a format node; `keeps_bitmaps` says whether its own image stores them."""
        own = [FILE] if keeps_bitmaps else []
        left = [
            (edge.child, edge.kind, edge.kind == BACKING)
            for edge in reversed(self.graph.children(format_node))
            if edge.kind not in own
        ]
        seen = {format_node}
        while left:
            node, role, read_only = left.pop()
            if node in seen:
                continue
            seen.add(node)
            edges = self.graph.children(node)
            if (read_only and not self._is_filter(node)) or not edges:
                yield self._underlay(node, role, read_only=read_only)
            for edge in reversed(edges):
                if edge.kind != FILE:
                    left.append((edge.child, edge.kind, read_only or edge.kind == BACKING))
                elif not read_only or self.graph.children(edge.child):
                    left.append((edge.child, role, read_only))
                # else it is the file of this very image

    def _is_filter(self, node: str) -> bool:
        """Whether a node only passes on what is below it, as those do that a job puts in place."""
        reply = self.nodes.get(node)
        return reply is not None and reply.text("drv") in FILTERS | OF_JOBS

    def _file(self, node: str) -> str:
        """The node of the file that an image lies in."""
        seen = {node}
        while (child := self.graph.child(node)) and child not in seen:
            seen.add(child)
            node = child
        return node

    def _filename(self, node: str) -> str:
        reply = self.nodes.get(node)
        return reply.nested("image").text("filename") if reply is not None else ""

    def _underlay(self, node: str, role: str, *, read_only: bool) -> Underlay:
        reply = self.nodes.get(node)
        if reply is None:
            return Underlay(role, "", "", 0)
        image = reply.nested("image")
        (file,) = masked([image.text("filename")])
        status = self.files.status(self._filename(self._file(node)))
        known = _state if read_only else _identity
        return Underlay(
            role=role,
            file=file,
            format=reply.text("drv"),
            # The size of what the disk writes itself is the disk's.
            size=image.integer("virtual-size") if read_only else 0,
            stamp=known(status) if status else "",
            node=node,
        )


def _state(status: os.stat_result) -> str:
    """What changes when a file is written to, replaced or exchanged."""
    if stat.S_ISBLK(status.st_mode):
        return _identity(status)
    return f"{_identity(status)} {status.st_size} {status.st_mtime_ns}"


def _identity(status: os.stat_result) -> str:
    """What changes when a file is replaced or exchanged."""
    if not stat.S_ISBLK(status.st_mode):
        return str(status.st_ino)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    try:
        return Path(f"/sys/dev/block/{number}/dm/uuid").read_text("ascii").strip()
    except (OSError, UnicodeError):
        return ""
