# SPDX-License-Identifier: Apache-2.0
"""A restic repository as a target: one snapshot is one point of one VM.

    snapshot   tags qmpbackup, vm=<vm>, uuid=<uuid>, point=<id>
      /<vm>/<disk>.raw       the whole disk: a list of chunks of fixed size, most of them the parent's
      /<vm>/manifest.json    the point, as in a directory

Every point is complete in itself: any may be forgotten. A repository may hold many VMs, of many hosts;
this is the view of one of them. Which snapshots are its points, `catalog` finds out. Knows manifests and the repository format; must not know QEMU.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from qmpbackup.model import Point, StoredDisk
from qmpbackup.restic.storage.location import is_remote
from qmpbackup.restic.writer import Writer
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.receiver import Arrival, ChunkReceiver
from qmpbackup.targets.removal import Clearing, Sweep
from qmpbackup.targets.report import Report
from qmpbackup.targets.repository.access import Access
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList
from qmpbackup.targets.repository.points import VmPoints
from qmpbackup.targets.stored_image import OpenDisks


class RepositoryTarget(VmPoints):
    """See `Target`: the points of one VM in an open repository."""

    chunk = CHUNK
    stores_plain = False
    access: Access | None = None
    """Known where restic's own program may have to open it, too."""

    @property
    def folder(self) -> Path | None:
        """The folder of a repository on this machine."""
        path = Path(self.name)
        return None if is_remote(self.name) or not path.is_dir() else path

    def elsewhere(self) -> str:
        """Where points are that this target does not hold itself: nowhere."""
        return ""

    @contextmanager
    def lock(
        self, *, write: bool = False, remove: bool = False, wait: float = 0.0
    ) -> Iterator[None]:
        """Hold the repository for the block, as restic does: removers alone, all others together. Who
        only reads begins at once (`Repository.settle_lock`).

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
        """
        early = not write and not remove
        with self.repository.lock(exclusive=remove, early=early, wait=wait):
            yield

    @staticmethod
    def unfinished() -> Sequence[str]:
        """Nothing: what no snapshot names is no point, and `prune` removes it."""
        return ()

    @staticmethod
    def left() -> list[str]:
        """Nothing, likewise."""
        return []

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[list[str]]:
        """Hold the repository as restic's own backups do."""
        with self.lock(write=True, wait=wait):
            yield []

    def obstacle(
        self, points: Sequence[Point], point: Point, disk_id: str, *, thorough: bool
    ) -> str:
        """Why nothing can be built upon a disk of a point: chunks that no index names."""
        del thorough
        return self.quick_check(point, disk_id, points)

    def receive(
        self, point_id: str, disks: Sequence[Arrival], *, check: bool = False
    ) -> ChunkReceiver:
        """Begin to write chunks."""
        from qmpbackup.targets.repository import receiving

        del point_id
        receiving.require_possible(disks)
        return receiving.RepositoryReceiver(self, check=check)

    @contextmanager
    def removing(self, sweep: Sweep) -> Iterator[Clearing]:
        """Look at what there is; our own lock is released before restic takes its own."""
        from qmpbackup.targets.repository import removing

        removing.require_possible(sweep)
        until = time.monotonic() + sweep.wait
        self.repository.storage.require_ours()
        with self.lock(wait=sweep.wait):
            found = self.load()
        yield removing.RepositoryClearing(self, found, self.access, sweep, until)

    def images(
        self,
        points: Sequence[Point],
        point: Point,
        disks: Sequence[StoredDisk],
        *,
        to_read: bool = True,
    ) -> AbstractContextManager[OpenDisks]:
        """Disks of a point, open for the block."""
        from qmpbackup.targets.repository import reading

        del points  # each stands for itself
        if to_read:
            self.repository.settle_lock()
        return reading.opened(self, point, disks)

    def prove(self, found: Inventory, point: Point | None, share: float) -> Report:
        """See whether every chunk of the points is there, and read a share of the packs."""
        from qmpbackup.targets.repository import proof

        self.repository.settle_lock()
        return proof.prove(self, found, point, share)

    def commit(self, writer: Writer, point: Point, disks: Mapping[str, ChunkList]) -> Point:
        """Make a point appear: trees, packs, indexes, and last of all its snapshot.

        Raises:
            QmpBackupError: there is no such point, and nothing refers to what was written.
        """
        from qmpbackup.targets.repository import committing

        return committing.commit(self, writer, point, disks)
