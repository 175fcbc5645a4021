# SPDX-License-Identifier: Apache-2.0
"""Repositories with points of very many VMs, of several hosts: as the product commits them, but not durable.

Each point has its trees, its manifest and its snapshot. Its disks are empty, as nobody who looks at a
repository from above reads them.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.restic import repository, snapshot
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.writer import Writer
from qmpbackup.targets.repository.chunk_list import ChunkList
from qmpbackup.targets.repository.committing import commit, disk_file
from qmpbackup.targets.repository.points import VmPoints
from stock import repositories

_EMPTY = ChunkList(0, b"")


class _Hasty(repository.Repository):
    """Writes snapshots as files, and waits for no disk; keeps nothing in the cache."""

    def save_snapshot(self, new: Snapshot) -> str:
        name, sealed = self.seal_unpacked(Kind.SNAPSHOT, snapshot.encode(new))
        (Path(self.storage.name) / "snapshots" / name).write_bytes(sealed)
        return name

    def cache(self, name: str, data: bytes) -> None:
        del name, data


class _Hoarding(Writer):
    """Fills its packs, however many points it takes."""

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class DataCentre:
    """A repository in a folder that holds `points` of each of `vms` VMs, one a day, the newest at `now`.

    Every fourth VM has no UUID. The newest point of VM number N is N minutes old.
    """

    folder: Path
    vms: int
    points: int
    now: datetime

    @property
    def location(self) -> str:
        return str(self.folder / "repository")

    def identity(self, number: int) -> VmIdentity:
        """Who a VM is."""
        uuid = "" if number % 4 == 3 else str(UUID(int=number + 1))
        return VmIdentity(uuid, f"vm{number}", f"/run/qemu/vm{number}.qmp", f"kvm{number % 7}")

    def make(self) -> dict[str, str]:
        """Make it; gives the environment with which it opens."""
        made = repositories.repository(self.folder)
        storage = LocalStorage(Path(made.location))
        with _Hasty.open(storage, made.password, environment=made.environment) as opened:
            writer = _Hoarding(opened)
            try:
                for number in range(self.vms):
                    self._fill(opened, writer, number)
                Writer.flush(writer)
            finally:
                writer.stop()
        return made.environment

    def _fill(self, opened: repository.Repository, writer: Writer, number: int) -> None:
        points = VmPoints(opened, self.identity(number))
        for day in reversed(range(self.points)):
            time = self.now - timedelta(days=day, minutes=number)
            commit(points, writer, self._point(points, time, self.points - day), {"vda": _EMPTY})

    def _point(self, points: VmPoints, time: datetime, sequence: int) -> Point:
        disk = StoredDisk(
            "vda", Level.FULL, disk_file(points.vm, "vda"), None, 0, 0, _EMPTY.digest, "qcow2"
        )
        words = ("qemu-system-x86_64", "-name", points.identity.name, "-m", "4096", "-smp", "4")
        return Point(
            f"{time:%Y%m%dT%H%M%SZ}-{sequence:06x}",
            sequence,
            time,
            Level.FULL,
            None,
            Consistency.AGENT,
            VmConfig(points.identity, "7.2.22", "q35", words),
            (disk,),
        )
