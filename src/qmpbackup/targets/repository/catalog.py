# SPDX-License-Identifier: Apache-2.0
"""Which snapshots of a repository are points, and of which VM.

    snapshot ── one path, /<vm> ──► its tree ── one folder ──► manifest.json, <disk>.raw …

A snapshot is a point by what it holds: the manifest says of which VM, and when. Tags are for people and
for restic's policies, and may be replaced by anybody; the UUID among them only spares the reading of
points of other VMs. restic may have written a snapshot anew since (`tag`, `rewrite`, `repair`, `copy`):
its point is found there, with what it still holds. Must not know QEMU, nor what becomes of points.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote

from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.model import Point, Skipped, StoredDisk, VmConfig, VmIdentity
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.tree import Node
from qmpbackup.targets import manifest
from qmpbackup.targets.inventory import Damage
from qmpbackup.targets.names import folder_name
from qmpbackup.targets.repository.whose import Key, Known, key_of, known, vm_name

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
RAW: Final = ".raw"
TAG: Final = "qmpbackup"
VM_TAG: Final = "vm="
UUID_TAG: Final = "uuid="
PROGRAM: Final = "qmpbackup"

MEMORY: Final = 64 << 20
"""Bytes of manifests that are kept at once: of some 100,000 points of a usual VM."""

_ID: Final = 32
_PATH = re.compile(r"/[^/]+")
_BEGINS = re.compile(rb'\{"nodes":\[\{"name":"(?:manifest\.json|[^"\\]+\.raw)"')
_FOREIGN: Final = b"foreign"
_ALONE: Final = 1000
"""Bytes that a point takes besides its texts, about."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A snapshot that is a point, and of which VM. `point` is there only of the VM that was asked for."""

    snapshot: Snapshot
    identity: VmIdentity
    point: Point | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a repository holds: points of VMs, oldest first, and what looks like points and is none."""

    entries: tuple[Entry, ...]
    damaged: tuple[tuple[Snapshot | None, Damage], ...]

    @property
    def vms(self) -> tuple[Known, ...]:
        """The VMs of which there are points."""
        return known(each.identity for each in self.entries)

    def damage_of(self, wanted: VmIdentity) -> tuple[Damage, ...]:
        """What may be points of a VM: those under a name that it had on a host where it was, and those
        that nobody else has had."""
        owners: dict[tuple[str, str], set[Key]] = {}
        for each in self.entries:
            owners.setdefault(_place(each.snapshot), set()).add(key_of(each.identity))
        return tuple(
            damage
            for snapshot, damage in self.damaged
            if snapshot is None or key_of(wanted) in owners.get(_place(snapshot), {key_of(wanted)})
        )


def read(repository: Repository, wanted: VmIdentity | None = None) -> Catalog:
    """Look at all snapshots; the points themselves are read of the `wanted` VM only.

    Raises:
        StorageError: the repository cannot be read.
    """
    damaged: list[tuple[Snapshot | None, Damage]] = []
    # Snapshots first: an index that is read afterwards names all that they need.
    snapshots = repository.snapshots(
        lambda name, error: damaged.append((None, Damage(f"snapshots/{name}", error.message))),
        may_be_ours,
    )
    repository.index.sync(
        repository,
        lambda name, error: damaged.append((None, Damage(f"index/{name}", error.message))),
    )
    reader = _Reader(repository, wanted)
    entries: list[Entry] = []
    for snapshot in snapshots:
        try:
            entry = reader.entry(snapshot)
        except StorageError:
            raise
        except QmpBackupError as error:
            damaged.append((snapshot, Damage(f"snapshots/{snapshot.id}", error.message)))
        else:
            entries += [entry] if entry else []
    return Catalog(tuple(entries), tuple(damaged))


class _Reader:
    """Reads what has to be read, within bounds."""

    def __init__(self, repository: Repository, wanted: VmIdentity | None) -> None:
        self._repository = repository
        self._wanted = wanted
        self._key = key_of(wanted) if wanted else None
        self._room = MEMORY
        self._configs: dict[VmConfig, VmConfig] = {}

    def entry(self, snapshot: Snapshot) -> Entry | None:
        """What a snapshot is; None where it is no point, or cannot be one of the wanted VM.

        Raises:
            DamagedError: it looks like a point and is none.
            StorageError: the storage fails.
        """
        hinted = hint(snapshot)
        if hinted is not None and key_of(hinted) != self._key:
            return Entry(snapshot, hinted)
        point = find_point(self._repository, snapshot)
        if point is None:
            return None
        if key_of(point.vm.identity) != self._key:
            return Entry(snapshot, point.vm.identity)
        return Entry(snapshot, point.vm.identity, self._kept(point))

    def _kept(self, point: Point) -> Point:
        """The same point, in as little memory as can be.

        Raises:
            DamagedError: there is no room for more.
        """
        config = self._configs.get(point.vm)
        weight = weight_of(point) + (0 if config else _weight(point.vm.command_line))
        if weight > self._room:
            raise DamagedError(
                f"The manifests of this VM's points take more than {MEMORY >> 20} MiB: this one is "
                "left out."
            )
        self._room -= weight
        return replace(point, vm=self._configs.setdefault(point.vm, point.vm))


def weight_of(point: Point) -> int:
    """Bytes that a point takes in memory, about, without the VM's configuration."""
    disks = sum(
        _ALONE + _weight((disk.id, disk.file, disk.source_file, disk.reason, disk.bitmap))
        for disk in point.disks
    )
    skipped = _weight([text for each in point.skipped for text in (each.name, each.reason)])
    return _ALONE + disks + skipped + _weight(point.notes) + _ALONE * len(point.merged)


def _weight(texts: Iterable[str]) -> int:
    return sum(100 + len(text) for text in texts)


def may_be_ours(snapshot: Snapshot) -> bool:
    """Whether a look at what a snapshot holds is worth it."""
    if _claims(snapshot):
        return True
    return not snapshot.program_version and _folder_of(snapshot) != ""


def _claims(snapshot: Snapshot) -> bool:
    """Whether it says itself that it is ours: old versions of restic drop the program when they write
    a snapshot anew, and anybody may replace the tags."""
    return TAG in snapshot.tags or snapshot.program_version.startswith(PROGRAM)


def _folder_of(snapshot: Snapshot) -> str:
    """The one folder that a snapshot says it is of, or nothing."""
    paths = snapshot.paths
    return paths[0][1:] if len(paths) == 1 and _PATH.fullmatch(paths[0]) else ""


def _place(snapshot: Snapshot) -> tuple[str, str]:
    return snapshot.hostname, _folder_of(snapshot)


def hint(snapshot: Snapshot, *, by_name: bool = False) -> VmIdentity | None:
    """The VM by the tags of a snapshot; None where they do not tell. One that has no UUID is told
    `by_name` only for who does not mind that anybody may have changed the name of its host."""
    tags = [tag.removeprefix(UUID_TAG) for tag in snapshot.tags if tag.startswith(UUID_TAG)]
    folder = _folder_of(snapshot)
    if TAG not in snapshot.tags or not folder:
        return None
    name = unquote(folder, errors="surrogateescape")
    if by_name and not tags and VM_TAG + folder in snapshot.tags:
        return VmIdentity("", folder, "", snapshot.hostname)
    if len(tags) != 1 or not tags[0]:
        return None
    return VmIdentity(tags[0], "" if name == tags[0] else name, "", snapshot.hostname)


def tags_of(identity: VmIdentity, point_id: str) -> tuple[str, ...]:
    """The tags of a point's snapshot."""
    uuid = (UUID_TAG + identity.uuid,) if identity.uuid else ()
    return (TAG, VM_TAG + vm_name(identity), *uuid, f"point={point_id}")


def cache_name(snapshot: Snapshot) -> str:
    """What a point's manifest is called in the cache."""
    return f"point-{snapshot.tree.hex()}"


def find_point(repository: Repository, snapshot: Snapshot) -> Point | None:
    """The point that a snapshot holds, if it is one; kept in the cache, as its tree can be large.

    Raises:
        DamagedError: it looks like one and is none.
        StorageError: the storage fails.
    """
    name = cache_name(snapshot)
    what = f"The manifest in snapshot {snapshot.id[:8]}"
    cached = repository.cached(name)
    if cached == _FOREIGN and not _claims(snapshot):
        return None
    if cached and cached != _FOREIGN:
        try:
            return _of(manifest.decode(cached, what, _misplaced), snapshot)
        except QmpBackupError:
            log.debug("The cached manifest of snapshot %s is damaged.", snapshot.id)
    nodes = _point_nodes(repository, snapshot)
    if nodes is None:
        repository.cache(name, _FOREIGN)
        return None
    ids = manifest_chunks(repository, nodes, snapshot)
    data = b"".join(repository.load_blob(BlobType.DATA, each) for each in ids)
    whole = manifest.decode(data, what, _misplaced)
    point = _without_missing(whole, nodes)
    if point is whole:
        repository.cache(name, data)
    return _of(point, snapshot)


def _of(point: Point, snapshot: Snapshot) -> Point:
    """The point with the host on which it was made: by its snapshot, where its manifest is of before
    manifests named it."""
    identity = point.vm.identity
    if identity.host:
        return point
    return replace(point, vm=replace(point.vm, identity=replace(identity, host=snapshot.hostname)))


def _without_missing(point: Point, nodes: Mapping[str, Node]) -> Point:
    """A point as it is after `restic rewrite --exclude`: without the disks that are not there."""
    missing = [disk for disk in point.disks if _base(disk) not in nodes]
    if not missing:
        return point
    gone = tuple(Skipped(disk.id, "removed from the snapshot by restic") for disk in missing)
    disks = tuple(disk for disk in point.disks if disk not in missing)
    return replace(point, disks=disks, skipped=(*point.skipped, *gone))


def _point_nodes(repository: Repository, snapshot: Snapshot) -> Mapping[str, Node] | None:
    """What lies in the folder of a point; None where this is a snapshot of something else.

    Raises:
        DamagedError: it says that it is a point, and holds no such folder.
        StorageError: the storage fails.
    """
    claims = _claims(snapshot)
    try:
        if not claims and not _looks_like_one(repository, snapshot):
            return None
        return {node.name: node for node in repository.load_tree(folder_id(repository, snapshot))}
    except DamagedError:
        if claims:
            raise
        return None


def _looks_like_one(repository: Repository, snapshot: Snapshot) -> bool:
    """Whether its folder begins like that of a point: others' folders may be of any size."""
    return repository.tree_begins(folder_id(repository, snapshot), _BEGINS)


def folder_id(repository: Repository, snapshot: Snapshot) -> bytes:
    """The id of the tree with the files of a point; kept in the cache.

    Raises:
        DamagedError: there is no such folder.
        StorageError: the storage fails.
    """
    name = f"folder-{snapshot.tree.hex()}"
    found = repository.cached(name)
    if found is None or len(found) != _ID:
        found = read_folder_id(repository, snapshot)
        repository.cache(name, found)
    return found


def read_folder_id(repository: Repository, snapshot: Snapshot) -> bytes:
    """The same, read in any case.

    Raises:
        DamagedError: there is no such folder.
        StorageError: the storage fails.
    """
    folders = [node.subtree for node in repository.load_tree(snapshot.tree) if node.subtree]
    if len(folders) != 1:
        raise DamagedError(
            f"Snapshot {snapshot.id[:8]} is no point any more: it holds no folder of a VM."
        )
    return folders[0]


def manifest_chunks(
    repository: Repository, nodes: Mapping[str, Node], snapshot: Snapshot
) -> list[bytes]:
    """The ids of the chunks of a point's manifest, which together are as long as its file.

    Raises:
        DamagedError: there is none, or it is too large.
    """
    node = nodes.get(MANIFEST)
    if node is None:
        raise DamagedError(
            f"Snapshot {snapshot.id[:8]} is no point any more: it holds no manifest. Did "
            "`restic rewrite` exclude it?"
        )
    ids = [node.content[at : at + _ID] for at in range(0, len(node.content), _ID)]
    # What the index says of a blob's length holds for its reading, so more is never in memory.
    few = node.size <= manifest.LARGEST and len(ids) <= node.size
    if not few or sum(_length(repository, each) for each in ids) != node.size:
        raise DamagedError(f"The manifest in snapshot {snapshot.id[:8]} is not as long as it says.")
    return ids


def _length(repository: Repository, id_: bytes) -> int:
    places = repository.index.find_all(BlobType.DATA, id_)
    if not places:
        raise DamagedError(f"The data blob {id_.hex()} is missing.", "`restic check` tells more.")
    return max(place.packed(BlobType.DATA, id_).plain_length for place in places)


def _base(disk: StoredDisk) -> str:
    return disk.name


def _misplaced(disk: StoredDisk) -> str:
    name = folder_name(disk.id) + RAW
    return "" if _base(disk) == name else f"is not called {name}"
