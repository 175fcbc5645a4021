# SPDX-License-Identifier: Apache-2.0
"""Look at the points of a target; what `list` and `show` print, and how a point is found."""

import logging
from collections.abc import Sequence

from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import LATEST, find
from qmpbackup.plan.missing import NotInPoint, missing
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Target
from qmpbackup.targets.inventory import Inventory

log = logging.getLogger(__name__)


def inventory(place: Address, lock_wait: float = 0.0, vm: str = "") -> Inventory:
    """All points of a target, oldest first, and what is damaged.

    Raises:
        NoSuchTarget: there is no target, or only months that are targets of their own.
        Locked: points are being removed or changed.
        StorageError: it cannot be read.
    """
    with opening.entrance(place).opened(vm) as target:
        with target.lock(wait=lock_wait):
            found = target.load()
            for sentence in target.unfinished():
                log.warning("%s", sentence)
        _require_own_points(target, found)
        return found


def point(
    place: Address, wanted: str = LATEST, lock_wait: float = 0.0, vm: str = ""
) -> tuple[Point, tuple[NotInPoint, ...]]:
    """One point of a target, and what it lacks of its VM.

    Raises:
        NoSuchTarget: there is no such target or point.
        UsageError: several points could be meant.
    """
    with opening.entrance(place).opened(vm) as target, target.lock(wait=lock_wait):
        found = target.load()
        chosen = find_point(target, found, wanted)
        return chosen, missing(found.points, chosen)


def find_point(target: Target, found: Inventory, wanted: str) -> Point:
    """The point that a user means.

    Raises:
        NoSuchTarget: none.
        UsageError: several could be meant.
        DamagedError: `latest` or a time may mean a point whose manifest is damaged.
    """
    _require_own_points(target, found)
    if not found.damaged:
        return find(found.points, wanted)
    # Only an id says which point it means, whatever the damaged manifests held.
    for each in found.points:
        if wanted and each.id.startswith(wanted):
            return find(found.points, wanted)
    raise DamagedError(
        f"{found.damaged[0].path} is damaged, so nobody can say which point {wanted!r} is.",
        "Name a point by its id; `qmpbackup list` shows those that are whole.",
    )


def _require_own_points(target: Target, found: Inventory) -> None:
    if found.points or found.damaged:
        return
    elsewhere = target.elsewhere()
    if elsewhere:
        raise NoSuchTarget(f"{target.name} holds no point itself.", elsewhere)


def chosen_disks(point: Point, names: Sequence[str]) -> tuple[StoredDisk, ...]:
    """The disks of a point that a user names; all if none is named.

    Raises:
        UsageError: the point does not hold one of them.
        DamagedError: it holds no disk any more.
    """
    wanted = {name: point.disk_called(name) for name in names}
    unknown = [name for name, disk in wanted.items() if disk is None]
    if unknown:
        gone = {each.id: each.into for each in point.merged}
        into = gone.get(unknown[0])
        raise UsageError(
            f"Point {point.id} does not hold disk {unknown[0]}."
            + (f" It was merged into point {into}." if into else ""),
            f"It holds: {', '.join(disk.shown for disk in point.disks)}." if point.disks else "",
        )
    chosen = tuple(disk for disk in point.disks if not wanted or disk in wanted.values())
    if not chosen:
        raise DamagedError(f"Point {point.id} holds no disk any more.", "Restore a later point.")
    return chosen
