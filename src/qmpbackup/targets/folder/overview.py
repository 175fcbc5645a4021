# SPDX-License-Identifier: Apache-2.0
"""What a folder holds of its VM, at one look: the names of its manifests, and the newest of them.

An id begins with the time of its point, so the newest is found without reading all. Where ids say
nothing, or something is marked as damaged, all is read after all.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from qmpbackup.durable import storage_errors
from qmpbackup.errors import NoSuchTarget, QmpBackupError
from qmpbackup.folder import Folder
from qmpbackup.targets.folder import manifests, marks
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.names import MANIFEST, POINTS, is_point_id
from qmpbackup.targets.overview import HeldVm, Overview, held, is_ahead

_TIME: Final = re.compile(r"(\d{8}T\d{6}Z)-", re.ASCII)


def overview(target: DirectoryTarget, now: datetime) -> Overview:
    """What there is of the VM.

    Raises:
        NoSuchTarget: there are only months that are targets of their own.
        StorageError: the folder cannot be read.
    """
    with storage_errors(f"read {target.path}"), Folder.open(target.path) as top:
        marked = top.exists(POINTS) and marks.marked_files(top)
        dated = None if marked or not top.exists(POINTS) else _dated(top)
        quick = _quick(top, dated, now) if dated else None
    if quick is not None:
        return Overview((quick,), folder=target.path)
    found = target.load()
    if not found.points and not found.damaged and (elsewhere := target.elsewhere()):
        raise NoSuchTarget(f"{target.name} holds no point itself.", elsewhere)
    summed = held(found, now)
    damaged = (*found.damaged, *found.marked)
    return Overview((summed,) if summed else (), damaged, target.path)


def _dated(top: Folder) -> list[tuple[datetime, str]] | None:
    """The manifests with their times, newest first; None where names do not tell."""
    found = []
    with top.sub(POINTS) as folder:
        for name in folder.names():
            if name.endswith(MANIFEST):
                time = _time_of(name.removesuffix(MANIFEST))
                if time is None:
                    return None
                found.append((time, name))
    return sorted(found, reverse=True)


def _time_of(point_id: str) -> datetime | None:
    match = _TIME.match(point_id)
    if match is None or not is_point_id(point_id):
        return None
    try:
        return datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _quick(top: Folder, dated: Sequence[tuple[datetime, str]], now: datetime) -> HeldVm | None:
    """What there is, if the newest manifest is whole; None otherwise."""
    ahead = sum(is_ahead(time, now) for time, _ in dated)
    if ahead == len(dated):
        return None
    with top.sub(POINTS) as folder:
        try:
            point = manifests.read_point(folder, dated[ahead][1])
        except QmpBackupError:
            return None
    return HeldVm(point.vm.identity, len(dated), point, 0, ahead)
