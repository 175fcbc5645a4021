# SPDX-License-Identifier: Apache-2.0
"""The points of one VM in an open repository: found, and read.

Knows manifests and the repository format; must not know what becomes of what is read.
"""

from collections.abc import Iterable, Mapping
from typing import Self

from qmpbackup.errors import DamagedError, QmpBackupError, UsageError
from qmpbackup.model import Point, StoredDisk, VmIdentity
from qmpbackup.plan.chain import ordered
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.restic.tree import Node
from qmpbackup.targets.inventory import Inventory, describe
from qmpbackup.targets.repository import catalog
from qmpbackup.targets.repository.chunk_list import ChunkList, numbers
from qmpbackup.targets.repository.whose import Known, choose, namesakes, vm_name

HINT = 'Run "restic check --read-data" and see restic\'s manual on repairing repositories.'
"""What to do about chunks that are damaged or missing."""


class VmPoints:
    """The points of one VM in an open repository."""

    def __init__(self, repository: Repository, identity: VmIdentity) -> None:
        self.repository = repository
        self.identity = identity
        self._snapshots: dict[str, list[Snapshot]] = {}
        self._contents: dict[str, tuple[str, ChunkList]] = {}
        self._namesakes: tuple[Known, ...] = ()

    @classmethod
    def only(cls, repository: Repository, vm: str = "") -> Self:
        """The target of the named VM, or of the only one there is.

        Raises:
            NoSuchTarget: there is no point of it, or of any VM.
            UsageError: there are several, and none was named, or the name may mean several.
            DamagedError: a snapshot is damaged, and nothing else is there.
        """
        found = catalog.read(repository)
        if found.damaged and not found.vms:
            raise DamagedError(f"{found.damaged[0][1].path}: {found.damaged[0][1].reason}")
        return cls(repository, choose(found.vms, vm, repository.storage.name).identity)

    @property
    def vm(self) -> str:
        """What the VM is called in paths and tags."""
        return vm_name(self.identity)

    @property
    def id(self) -> str:
        """The target's id, part of the names of its change bitmaps."""
        return self.repository.config.id[:16]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.repository.storage.name

    def namesakes(self) -> str:
        """Others that have points here and are called like this VM, which has none, as a sentence."""
        if self._snapshots or not self._namesakes:
            return ""
        return (
            f"{self.name} holds no point of this VM ({describe(self.identity)}), but of others called "
            f"like it: {', '.join(map(str, self._namesakes))}."
        )

    def require_known(self) -> None:
        """Refuse a VM without a UUID that may be the one of its name whose points are here, on a host
        that was renamed, or another on another host: only its owner knows.

        Raises:
            UsageError: it is such a VM.
        """
        hosts = [each.identity.host for each in self._namesakes if not each.identity.uuid]
        if (others := self.namesakes()) and hosts and not self.identity.uuid:
            raise UsageError(
                others,
                "Without a UUID (-uuid) a VM is known by its host and name. If this is the same VM, "
                f"whose host was renamed: --host {hosts[0]}. If it is another: --host "
                f"{self.identity.host}, this once.",
            )

    def load(self) -> Inventory:
        """Read all manifests; what cannot be read is listed as damage and left out.

        Raises:
            StorageError: the repository cannot be read.
        """
        self.repository.look()
        found = catalog.read(self.repository, self.identity)
        points: dict[str, Point] = {}
        self._snapshots = {}
        for entry in found.entries:
            if entry.point is not None:
                self._take(points, entry.snapshot, entry.point)
        self._namesakes = namesakes(found.vms, self.identity)
        return Inventory(ordered(points.values()), found.damage_of(self.identity))

    def _take(self, points: dict[str, Point], snapshot: Snapshot, point: Point) -> None:
        """Enter a point. restic may have made several snapshots of one: the fullest counts."""
        others = self._snapshots.setdefault(point.id, [])
        fuller = point.id not in points or len(point.disks) > len(points[point.id].disks)
        others.insert(0 if fuller else len(others), snapshot)
        if fuller:
            points[point.id] = point

    def _nodes(self, snapshot: Snapshot) -> Mapping[str, Node]:
        folder = catalog.folder_id(self.repository, snapshot)
        return {node.name: node for node in self.repository.load_tree(folder)}

    def description(self, point: Point) -> list[tuple[BlobType, bytes]]:
        """Types and ids of the blobs that describe a point: its trees, which are read for it, and the
        chunks of its manifest.

        Raises:
            DamagedError: a tree is damaged, or they hold no manifest.
        """
        snapshot = self.snapshot_of(point)
        folder = catalog.read_folder_id(self.repository, snapshot)
        chunks = catalog.manifest_chunks(self.repository, self._nodes(snapshot), snapshot)
        trees = [(BlobType.TREE, snapshot.tree), (BlobType.TREE, folder)]
        return [*trees, *((BlobType.DATA, each) for each in chunks)]

    def snapshot_of(self, point: Point) -> Snapshot:
        """The snapshot that holds a point which `load` has found."""
        return self._snapshots[point.id][0]

    def snapshot_called(self, point_id: str) -> Snapshot | None:
        """The snapshot that holds the point with this id, if `load` has found one."""
        return next(iter(self._snapshots.get(point_id, ())), None)

    def snapshots_of(self, point: Point) -> tuple[Snapshot, ...]:
        """All snapshots that hold this point, or what restic has left of it."""
        return tuple(self._snapshots[point.id])

    def contents(self, point: Point, disk: StoredDisk) -> ChunkList:
        """The list of chunks of a disk of a point.

        Raises:
            DamagedError: it is missing, or not what the manifest says.
        """
        kept = self._contents.get(disk.id)
        if kept is None or kept[0] != point.id:
            snapshot = self.snapshot_of(point)
            node = self._nodes(snapshot).get(disk.name)
            what = f"Disk {disk.id} of point {point.id}"
            if node is None:
                raise DamagedError(f"{what} is missing in snapshot {snapshot.id[:8]}.")
            found = ChunkList(node.size, node.content)
            if node.size != disk.size or not found.is_whole or found.digest != disk.digest:
                raise DamagedError(f"{what} is not what its manifest says.")
            # One list of each disk is kept and no more: a terabyte's takes 32 MiB.
            self._contents[disk.id] = kept = (point.id, found)
        return kept[1]

    def forget_contents(self, disk_id: str) -> None:
        """Drop the list that `contents` keeps of a disk for being asked again."""
        self._contents.pop(disk_id, None)

    def missing_chunks(self, contents: ChunkList) -> int:
        """How many different chunks of a disk no index names."""
        return len(set(self.repository.index.missing(BlobType.DATA, contents.distinct())))

    def require_packs(self, contents: ChunkList) -> None:
        """See that the index names all chunks of a disk, and that the packs that it names are there.

        Raises:
            DamagedError: something is missing.
            StorageError: the repository cannot be read.
        """
        packs: dict[bytes, int] = {}
        for index in numbers(contents.with_data()):
            place = self.repository.index.find(BlobType.DATA, contents.id_of(index))
            if place is None:
                name = contents.id_of(index).hex()
                raise DamagedError(f"Its chunk {name} is missing in the repository.", HINT)
            if place.packed(BlobType.DATA, b"").plain_length != contents.length_of(index):
                name = contents.id_of(index).hex()
                raise DamagedError(f"Its chunk {name} is not as long as it must be.", HINT)
            packs[place.pack] = max(packs.get(place.pack, 0), place.offset + place.length)
        for name, size in self.repository.storage.list(Kind.DATA):
            if size >= packs.get(bytes.fromhex(name), 0):
                packs.pop(bytes.fromhex(name), None)
        if packs:
            name = next(iter(packs)).hex()
            raise DamagedError(f"The pack {name} is missing or too short.", HINT)

    def quick_check(self, point: Point, disk_id: str, points: Iterable[Point]) -> str:
        """Why nothing can be built upon a disk of a point; empty if nothing speaks against it."""
        del points  # each stands for itself
        disk = point.disk(disk_id)
        if disk is None:
            return "it does not hold the disk"
        try:
            missing = self.missing_chunks(self.contents(point, disk))
        except QmpBackupError as error:
            return error.message
        return f"{missing} of its chunks are missing in the repository" if missing else ""
