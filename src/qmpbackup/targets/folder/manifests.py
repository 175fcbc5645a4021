# SPDX-License-Identifier: Apache-2.0
"""The manifests in a folder, read: a point exists if its manifest does."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, QmpBackupError
from qmpbackup.folder import Folder
from qmpbackup.model import Point
from qmpbackup.plan.chain import ordered
from qmpbackup.targets import manifest
from qmpbackup.targets.folder import marks
from qmpbackup.targets.inventory import Damage, Inventory
from qmpbackup.targets.names import MANIFEST, POINTS, is_point_id


def load(path: Path, known: Sequence[Damage]) -> Inventory:
    """Read all manifests; what cannot be read is listed as damage, behind what is `known`, and left out.

    Raises:
        StorageError: the folder itself cannot be read.
    """
    damaged = list(known)
    points: list[Point] = []
    with storage_errors(f"read {path}"), Folder.open(path) as top:
        if not top.exists(POINTS):
            return Inventory((), tuple(damaged))
        with top.sub(POINTS) as folder:
            for name in folder.names():
                if name.endswith(MANIFEST):
                    try:
                        points.append(read_point(folder, name))
                    except QmpBackupError as error:
                        damaged.append(Damage(f"{POINTS}/{name}", error.message))
        marked = _marked(top, points)
    return Inventory(ordered(points), tuple(damaged), marked)


def read_point(folder: Folder, name: str) -> Point:
    """The point of a manifest.

    Raises:
        DamagedError: it is none.
        StorageError: it cannot be read.
    """
    point_id = name.removesuffix(MANIFEST)
    if not is_point_id(point_id):
        raise DamagedError(f"{name} is not called like a manifest.")
    with storage_errors(f"read {name}"):
        point = manifest.decode(folder.read(name, manifest.LARGEST), name)
    if point.id != point_id:
        raise DamagedError(f"{name} is the manifest of another point, {point.id}.")
    return point


def _marked(top: Folder, points: Iterable[Point]) -> tuple[Damage, ...]:
    """The files of these points that have a mark, each once."""
    files = set(marks.marked_files(top))
    disks = {disk.file: disk for point in points for disk in point.disks if disk.file in files}
    found = ((file, marks.find(top, disk)) for file, disk in sorted(disks.items()))
    return tuple(Damage(file, mark.text) for file, mark in found if mark)
