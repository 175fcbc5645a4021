# SPDX-License-Identifier: Apache-2.0
"""The files of a target in a folder: opened, looked at, marked as damaged.

Knows names and descriptors; must not know points beyond the files that they name, nor what is inside
the images.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, QmpBackupError
from qmpbackup.folder import Folder
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import chain
from qmpbackup.targets.folder import journal, marks, pending
from qmpbackup.targets.names import POINTS, is_folder_name, parse_file

log = logging.getLogger(__name__)


class StoredFiles:
    """The files of a target. Holds nothing open between calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def quick_check(self, point: Point, disk_id: str, points: Iterable[Point]) -> str:
        """Why the files of a disk of a point cannot be whole; empty if nothing speaks against it.

        Looks at manifests, names, lengths and marks only, never into a file.
        """
        try:
            with Folder.open(self.path) as top:
                for link in chain(points, point, disk_id):
                    reason = _file_fault(top, link.disk)
                    if reason:
                        return reason
        except QmpBackupError as error:
            return error.message
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return ""

    def mark_damaged(self, disk: StoredDisk, reason: str) -> None:
        """Leave a mark that the file of a disk is damaged, so that no later run builds on it.

        The one who found it has worse to tell, so what goes wrong here is only logged.
        """
        try:
            with storage_errors("write into it"), Folder.open(self.path) as top:
                marks.put(top, disk, reason)
        except QmpBackupError as error:
            log.warning(
                "The target could not be marked: %s The next backup may build on %s.",
                error.message,
                disk.file,
            )

    def remove_mark(self, file: str) -> None:
        """Remove the mark of a file, if it has one; what goes wrong is only logged."""
        try:
            with storage_errors(f"remove the mark of {file}"), Folder.open(self.path) as top:
                if marks.remove(top, file):
                    log.info("%s does not count as damaged any more.", file)
        except QmpBackupError as error:
            log.warning("%s", error)

    def marked_files(self) -> tuple[str, ...]:
        """Names of all files that have a mark, also one that means nothing any more."""
        with storage_errors(f"read {self.path}"), Folder.open(self.path) as top:
            return marks.marked_files(top) if top.exists(POINTS) else ()

    def open_file(self, name: str) -> int:
        """Open a backup file, `<folder>/<NAME>`, for reading; the caller closes it.

        Raises:
            DamagedError: it is missing, or no plain file in a folder of its own.
            StorageError: it cannot be opened.
        """
        file = parse_file(name)
        if file is None:
            raise DamagedError(f"{name!r} is not the name of a backup file.")
        with storage_errors(f"open {self.path / name}"):
            try:
                with Folder.open(self.path) as top, top.sub(file.folder) as folder:
                    return folder.open_file(file.name)
            except FileNotFoundError:
                raise DamagedError(
                    f"{self.path / name} is missing.", "Put it back, or restore another point."
                ) from None

    def stored_names(self) -> tuple[str, ...]:
        """Everything in the folders that disks could have, as `<folder>/<name>`, sorted."""
        found: list[str] = []
        with storage_errors(f"read {self.path}"), Folder.open(self.path) as top:
            for name in top.names():
                if is_folder_name(name) and top.is_folder(name):
                    with top.sub(name) as folder:
                        found += [f"{name}/{each}" for each in folder.names()]
        return tuple(found)

    def unfinished_files(self) -> tuple[str, ...]:
        """Files of points in the making, or of runs that died: the next backup clears up."""
        return pending.unfinished_files(self.path)

    def interrupted(self) -> tuple[str, ...]:
        """Names of the disks' folders in which a merge was interrupted, or is under way.

        Raises:
            StorageError: the target cannot be read.
        """
        return journal.interrupted(self.path)

    def merge_hint(self, folder: str) -> str:
        """What to do about a merge in a disk's folder that was interrupted."""
        return (
            "The next backup finishes it, and so does "
            f"`qmprestore commit --dir {self.path / folder}`."
        )


def _file_fault(top: Folder, disk: StoredDisk) -> str:
    """Why a file cannot be the one that its manifest means; empty if it can."""
    name = disk.file
    file = parse_file(name)
    if file is None:
        return f"{name} is not the name of a backup file"
    try:
        with top.sub(file.folder) as folder:
            found = folder.size(file.name)
    except FileNotFoundError:
        return f"{name} is missing"
    if found != disk.file_size:
        return f"{name} has {found} bytes instead of {disk.file_size}"
    mark = marks.find(top, disk)
    return f"{name}: {mark.text}" if mark else ""
