# SPDX-License-Identifier: Apache-2.0
"""What `--dir` means: the folder of a disk in a target, or a folder of images without manifests.

Knows where locks and points are; must not know chains or images.
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.filelock import locked
from qmpbackup.folder import Folder
from qmpbackup.model import Point
from qmpbackup.targets.folder.disk_folder import DiskFolder
from qmpbackup.targets.folder.target import DirectoryTarget, Inventory
from qmpbackup.targets.names import POINTS, is_folder_name

_NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class NamedFolder(DiskFolder):
    """A folder that a user names; `target` is what it belongs to, if anything."""

    target: DirectoryTarget | None = None

    @classmethod
    def find(cls, path: Path) -> "NamedFolder":
        """Find out what a folder is.

        Raises:
            NoSuchTarget: there is no such folder.
            UsageError: it is a whole target, which has a folder for each disk.
        """
        with storage_errors(f"open {path}"):
            try:
                folder = path.resolve(strict=True)
            except FileNotFoundError:
                raise NoSuchTarget(f"There is no folder {path}.", "Check --dir.") from None
        if not folder.is_dir():
            raise NoSuchTarget(f"{path} is not a folder.", "Check --dir.")
        whole = DirectoryTarget.peek(folder)
        if whole is not None:
            raise UsageError(
                f"{path} is a whole target, not the folder of one disk.", _disk_folders(whole)
            )
        target = DirectoryTarget.peek(folder.parent) if is_folder_name(folder.name) else None
        return cls(folder, target)

    def load(self) -> Inventory:
        """All points of the target; none outside of a target."""
        return self.target.load() if self.target else Inventory()

    def points(self, inventory: Inventory) -> tuple[Point, ...]:
        """All points of the target if any of them has files here; else none.

        Raises:
            DamagedError: nobody can say, because a manifest cannot be read.
        """
        damaged = [each for each in inventory.damaged if each.path.startswith(f"{POINTS}/")]
        if damaged:
            raise DamagedError(
                f"{damaged[0].path} cannot be read, so nobody knows what builds on the images here: "
                f"{damaged[0].reason}",
                "Put an unharmed copy of it back. A copy of this folder elsewhere can be worked on.",
            )
        here = any(
            disk.file.startswith(f"{self.name}/")
            for point in inventory.points
            for disk in point.disks
        )
        return inventory.points if here else ()

    @contextmanager
    def exclusive(self, wait: float) -> Iterator[None]:
        """Be alone with the folder, and with its whole target, for the block.

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
            StorageError: others could rearrange the folder meanwhile.
        """
        with ExitStack() as stack:
            with storage_errors(f"lock {self.folder}"):
                folder = stack.enter_context(Folder.open(self.folder))
                folder.require_ours()
                if self.target is None:
                    _lock_folder(stack, folder, wait)
            if self.target is not None:
                stack.enter_context(self.target.lock(remove=True, wait=wait))
            yield

    @contextmanager
    def reading(self, wait: float) -> Iterator[None]:
        """Keep everybody from changing the points for the block."""
        if self.target is None:
            yield
            return
        with self.target.lock(wait=wait):
            yield


def _lock_folder(stack: ExitStack, folder: Folder, wait: float) -> None:
    """Lock the folder itself, so that no file is left in it. Some file systems cannot do that."""
    try:
        stack.enter_context(locked(folder.fd, str(folder.path), wait=wait))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _disk_folders(target: DirectoryTarget) -> str:
    points = target.load().points
    names = {disk.folder for point in points for disk in point.disks}
    if not names:
        return "It holds no point."
    return f"Name one of: {', '.join(str(target.path / name) for name in sorted(names))}."
