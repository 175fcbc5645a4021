# SPDX-License-Identifier: Apache-2.0
"""A point in the making in a folder, as who fills its files sees it."""

from qmpbackup.model import Point
from qmpbackup.targets.folder.pending import Pending, PendingFile
from qmpbackup.targets.receiver import FileReceiver, Sealed


class FolderReceiver(FileReceiver):
    """See `FileReceiver`: a `Pending` point."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def file(self, disk_id: str) -> PendingFile:
        """The file of a disk."""
        return self._pending.files[disk_id]

    def seal(self, disk_id: str) -> Sealed:
        """Make a filled file durable."""
        size, digest = self._pending.seal(disk_id)
        return Sealed(self._pending.files[disk_id].name, size, digest)

    def commit(self, point: Point) -> None:
        """Name the files, and write the manifest."""
        self._pending.commit(point)

    def abort(self, *, closed: bool = True) -> None:
        """Remove the files."""
        self._pending.abort(closed=closed)
