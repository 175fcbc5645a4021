# SPDX-License-Identifier: Apache-2.0
"""Repositories with points, made without a VM: chunks by the product's own writer.

What a point must give back is kept beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qmpbackup.model import Consistency, Level, Location, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.writer import Writer
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList
from qmpbackup.targets.repository.committing import disk_file
from qmpbackup.targets.repository.target import RepositoryTarget
from stock import repositories

VM = VmIdentity(
    uuid="7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a", name="vm", address="/run/vm.qmp", host="hv1"
)
START = datetime(2026, 11, 2, 3, 0, tzinfo=UTC)


@dataclass
class StoredRepository:
    """A repository in a folder, and for each point and disk the bytes that it must give back."""

    folder: Path
    vm: VmIdentity = VM
    points: list[Point] = field(default_factory=list)
    expected: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made = repositories.repository(self.folder)

    @property
    def path(self) -> Path:
        """The folder of the repository itself."""
        return Path(self.made.location)

    @property
    def place(self) -> Location:
        """What a request takes."""
        return Location(self.made.location)

    def files(self, kind: str) -> list[Path]:
        """All files of a kind, the oldest first."""
        found = [each for each in (self.path / kind).rglob("*") if each.is_file()]
        return sorted(found, key=lambda each: each.stat().st_mtime_ns)

    def add(self, disks: Mapping[str, bytes]) -> Point:
        """Commit a point with these disks."""
        storage = LocalStorage(self.path)
        environment = self.made.environment
        with Repository.open(storage, self.made.password, environment=environment) as repository:
            target = RepositoryTarget(repository, self.vm)
            with target.lock(write=True):
                target.load()
                writer = Writer(repository)
                try:
                    point = self._commit(target, writer, disks)
                finally:
                    writer.stop()
        self.points.append(point)
        return point

    def _commit(
        self, target: RepositoryTarget, writer: Writer, disks: Mapping[str, bytes]
    ) -> Point:
        number = len(self.points) + 1
        time = START + timedelta(hours=number)
        point_id = f"{time:%Y%m%dT%H%M%SZ}-{number:06x}"
        contents = {disk_id: _stored(writer, data) for disk_id, data in disks.items()}
        stored = tuple(
            StoredDisk(
                disk_id,
                Level.FULL,
                disk_file(target.vm, disk_id),
                None,
                len(data),
                0,
                contents[disk_id].digest,
                "qcow2",
            )
            for disk_id, data in disks.items()
        )
        config = VmConfig(self.vm, "7.2.22", "q35", ("qemu-system-x86_64", "-name", "vm"))
        point = Point(
            id=point_id,
            sequence=number,
            time=time,
            level=Level.FULL,
            parent=self.points[-1].id if self.points else None,
            consistency=Consistency.CRASH,
            vm=config,
            disks=stored,
        )
        self.expected |= {(point_id, disk_id): data for disk_id, data in disks.items()}
        return target.commit(writer, point, contents)

    def index_entries(self) -> list[dict[str, str]]:
        """What the indexes say, as restic reads them: each blob with its pack."""
        restic = self.made.restic
        found = []
        for name in restic("list", "index").text.split():
            for pack in restic("cat", "index", name).json["packs"]:
                found += [{**blob, "pack": pack["id"]} for blob in pack["blobs"]]
        return found


def _stored(writer: Writer, data: bytes) -> ChunkList:
    count = -(-len(data) // CHUNK)
    ids = [b""] * count

    def enter(index: int, chunk_id: bytes) -> None:
        ids[index] = chunk_id

    for index in range(count):
        chunk = data[index * CHUNK : (index + 1) * CHUNK]
        writer.add(chunk, lambda chunk_id, _stored, index=index: enter(index, chunk_id))  # type: ignore[misc]
    writer.drain()
    return ChunkList(len(data), b"".join(ids))
