# SPDX-License-Identifier: Apache-2.0
"""The disks of a point in a folder, open to be read or poured: chains, each an image that can be proved.

A read proves nothing, as a digest is that of a whole file; so the files can be proved beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.images.times import Stamp, stamp
from qmpbackup.model import Point, StoredDisk
from qmpbackup.targets.folder import chains, image
from qmpbackup.targets.folder.chains import OpenFile
from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.folder.image import FolderImage
from qmpbackup.targets.stored_image import OpenDisks, Unproved


@contextmanager
def opened(
    target: StoredFiles,
    points: Sequence[Point],
    point: Point,
    disks: Sequence[StoredDisk],
    *,
    to_read: bool,
) -> Iterator[OpenDisks]:
    """Open disks of a point for the block; see `Target.images`."""
    with ExitStack() as stack:
        images: dict[str, FolderImage] = {}
        unproved: dict[str, Unproved] = {}
        for disk in disks:
            files = stack.enter_context(chains.opened(target, points, point, disk))
            unproved[disk.id] = proof = _UnprovedChain(target, disk, files)
            chain = image.Chain(disk, tuple(file.layer for file in files), proof)
            images[disk.id] = stack.enter_context(image.opened(chain, to_read=to_read))
        servers = {disk_id: each.socket for disk_id, each in images.items() if each.socket}
        yield OpenDisks(images, unproved, servers)


@dataclass(frozen=True, slots=True)
class _UnprovedChain:
    """See `Unproved`: the files that a disk is read from."""

    target: StoredFiles
    disk: StoredDisk
    files: Sequence[OpenFile]

    def prove(self, each: Callable[[], None]) -> None:
        """Read all files; the one that is damaged is marked so."""
        for file in self.files:
            with chains.marking(self.target, file.link.disk):
                chains.check_digest(self.target, file.link.disk, file.layer, each)

    def stamps(self) -> tuple[Stamp, ...]:
        """The stamps of all files."""
        with storage_errors(f"look at the files of disk {self.disk.id}"):
            return tuple(stamp(file.layer.fd) for file in self.files)
