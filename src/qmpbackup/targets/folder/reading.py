# SPDX-License-Identifier: Apache-2.0
"""The disks of a point in a folder, open to be read: chains, each in a qemu-nbd of its own.

A read proves nothing, as a digest is that of a whole file; so the files can be proved beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.images.digest import digest
from qmpbackup.images.times import Stamp, stamp
from qmpbackup.model import Point, StoredDisk
from qmpbackup.targets.folder import chains, image
from qmpbackup.targets.folder.chains import OpenFile
from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.interface import OpenDisks


@contextmanager
def opened(
    target: StoredFiles, points: Sequence[Point], point: Point, disks: Sequence[StoredDisk]
) -> Iterator[OpenDisks]:
    """Open disks of a point for the block; see `Target.images`."""
    with ExitStack() as stack:
        files = {
            disk.id: stack.enter_context(chains.opened(target, points, point, disk))
            for disk in disks
        }
        images = {
            disk.id: stack.enter_context(
                image.opened(
                    [file.layer for file in files[disk.id]], disk.size, disk.id, disk.snapshot
                )
            )
            for disk in disks
        }
        unproved = {disk.id: _UnprovedChain(target, disk, files[disk.id]) for disk in disks}
        yield OpenDisks(images, unproved)


@dataclass(frozen=True, slots=True)
class _UnprovedChain:
    """See `Unproved`: the files that a disk is read from."""

    target: StoredFiles
    disk: StoredDisk
    files: Sequence[OpenFile]

    def prove(self, each: Callable[[], None]) -> None:
        """Read all files; the one that is damaged is marked so."""
        for file in self.files:
            disk = file.link.disk
            with chains.marking(self.target, disk), storage_errors(f"read {disk.file}"):
                found = digest(file.layer.fd, each, file.layer.head)
                if found != disk.digest:
                    raise DamagedError(
                        f"{disk.file} is not what it was when it was written: its digest differs.",
                        "Put back an unharmed copy of it, or use a point that does not need it.",
                    )

    def stamps(self) -> tuple[Stamp, ...]:
        """The stamps of all files."""
        with storage_errors(f"look at the files of disk {self.disk.id}"):
            return tuple(stamp(file.layer.fd) for file in self.files)
