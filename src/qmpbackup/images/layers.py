# SPDX-License-Identifier: Apache-2.0
"""The files of a chain as QEMU's tools may open them: by descriptor, by heads that were checked.

Each file is opened by us and its head read once. What is checked, what a digest covers and what a
program parses are those same bytes (`images.heads`), however often somebody exchanges those in the file,
and the links in them lead to descriptors of the layers below. So a chain may be as deep as one likes,
and nothing inside an image decides which files are read. Must not know targets or points.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images import heads
from qmpbackup.images.qcow2 import HEAD, Header, parse_header
from qmpbackup.images.times import Stamp, stamp

_HINT = "The file was changed after the backup; put back an unharmed copy."
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Layer:
    """An open file of a chain, its name in its folder, as the file above it must call it, and its head.

    `seen` tells whether somebody has written to the file since.
    """

    fd: int
    name: str
    head: bytes
    seen: Stamp

    @classmethod
    def of(cls, fd: int, name: str) -> "Layer":
        """Read the head of an open file.

        Raises:
            OSError: it cannot be read.
        """
        return cls(fd, name, os.pread(fd, HEAD, 0), stamp(fd))

    @property
    def header(self) -> Header:
        """What the head says.

        Raises:
            DamagedError: it is not that of a qcow2 image.
        """
        return parse_header(self.head, self.name)


def require_unchanged(layers: Sequence[Layer]) -> None:
    """Whether what was read of files is what their heads and their digests stand for.

    A write that a file's times do not show is not noticed; see the threat model.

    Raises:
        StorageError: somebody has written to one since it was opened.
    """
    for layer in layers:
        if stamp(layer.fd) != layer.seen:
            raise StorageError(
                f"{layer.name} was changed while it was read.",
                "Somebody else writes there. Run again, and verify the target.",
            )


Node = dict[str, object]
"""A node of QEMU's block graph, as JSON."""


@dataclass(frozen=True, slots=True)
class Openable:
    """What QEMU's tools open, as a node of QEMU's, and the descriptors that they need for it."""

    node: Node
    fds: tuple[int, ...]

    @property
    def name(self) -> str:
        """The node in the place of a file name."""
        return "json:" + json.dumps(self.node, separators=(",", ":"))


def check_link(layer: Layer, parent: str) -> Header:
    """Make sure that a file names exactly `parent` (empty: none); what its head says.

    Raises:
        DamagedError: it names another, or the image needs something outside the chain.
    """
    header = layer.header
    _check_header(header, layer.name, parent)
    return header


def _check_header(header: Header, name: str, parent: str) -> None:
    if header.backing != parent:
        found = f"builds on {header.backing!r}" if header.backing else "stands alone"
        wanted = f"build on {parent!r}" if parent else "stand alone"
        raise DamagedError(f"{name} {found}, but should {wanted}.", _HINT)
    if header.backing and header.backing_format != "qcow2":
        raise DamagedError(
            f"{name} takes {parent!r} for {header.backing_format or 'any'!r}.", _HINT
        )
    if header.external_data or header.encrypted:
        what = "keeps its data in another file" if header.external_data else "is encrypted"
        raise DamagedError(f"{name} {what}, which backups never do.", _HINT)
    if header.corrupt:
        raise DamagedError(f"{name} is marked as corrupt by QEMU.", _HINT)


@contextmanager
def opened(layers: Sequence[Layer], below: Openable | None = None) -> Iterator[Openable]:
    """The last of `layers`, on top of all the others, for the block; for reading only.

    `below` is what the first one builds on, if anything.

    Raises:
        DamagedError: one is no image that could be part of a chain.
        StorageError: there are too few descriptors, or too little memory.
    """
    found = below
    with ExitStack() as stack:
        for layer in layers:
            size = -(-os.fstat(layer.fd).st_size // _SECTOR) * _SECTOR
            head = heads.private(layer.head, layer.name, found.name if found else "")
            with storage_errors(f"open {layer.name}"):
                over = heads.overlay(head, size)
            stack.callback(os.close, over)
            file: Node = {"driver": "qcow2", "file": _file(over), "backing": _file(layer.fd)}
            fds = (layer.fd, over, *(found.fds if found else ()))
            found = Openable({"driver": "qcow2", "file": file}, fds)
        if found is None:
            raise ValueError("a chain without files")
        yield found


def image(fd: int, below: Openable | None = None) -> Openable:
    """A qcow2 image of ours, to be written to, and what it is to show below instead of what its head
    says. Nobody else may write to it: its own head is parsed."""
    node: Node = {"driver": "qcow2", "file": _file(fd)}
    if below is None:
        return Openable(node, (fd,))
    return Openable({**node, "backing": below.node}, (fd, *below.fds))


def raw(fd: int) -> Openable:
    """An open file whose bytes are those of a disk."""
    return Openable({"driver": "raw", "file": _file(fd)}, (fd,))


def path(fd: int) -> str:
    """The path by which a program opens a descriptor that it was given."""
    return f"/dev/fd/{fd}"


def _file(fd: int) -> Node:
    return {"driver": "file", "filename": path(fd)}


@contextmanager
def stand_in(size: int) -> Iterator[int]:
    """The descriptor of a raw image of zeros: in the place of a backing file of this size it shows
    what the images above hold themselves, and lets them be written without touching that file."""
    with storage_errors("make an image in memory"):
        fd = os.memfd_create("qmpbackup-ground", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)
