# SPDX-License-Identifier: Apache-2.0
"""What a point lacks of its VM, and which point holds the newest state of that.

Whoever restores "the VM" wants all of it. A point that was made with `--include`, or when a disk could
not be saved, holds less, and so does one whose disk was merged into a later point.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qmpbackup.model import Absence, Point, Skipped


@dataclass(frozen=True, slots=True)
class NotInPoint:
    """Something that a point does not hold. `newest` is the point to restore it from, if any has it.

    It is `degrading` where the VM had it at the instant, unless it is known that no point can hold it.
    """

    id: str
    reason: str
    newest: Point | None
    degrading: bool

    def __str__(self) -> str:
        where = (
            f"its newest state is in point {self.newest.id} of {self.newest.time:%Y-%m-%d %H:%M:%S} UTC"
            if self.newest
            else "no point holds it"
        )
        return f"{self.id} is not in this point ({self.reason}); {where}."


def missing(points: Sequence[Point], point: Point) -> tuple[NotInPoint, ...]:
    """What a point of these lacks: what its VM had at the instant, then what it had before."""
    return tuple(_missing(points, point))


def _missing(points: Sequence[Point], point: Point) -> Iterator[NotInPoint]:
    known = {disk.id for disk in point.disks}
    for skipped in point.skipped:
        if skipped.absence is not Absence.EMPTY and skipped.name not in known:
            known.add(skipped.name)
            yield _of_then(points, point, skipped)
    for merged in point.merged:
        if merged.id not in known:
            known.add(merged.id)
            newest = newest_with(points, point, merged.id)
            yield NotInPoint(merged.id, f"it was merged into point {merged.into}", newest, True)
    for earlier in points:
        for disk in earlier.disks if earlier.sequence < point.sequence else ():
            if disk.id not in known:
                known.add(disk.id)
                newest = newest_with(points, point, disk.id)
                yield NotInPoint(disk.id, "the VM did not have it then", newest, False)


def _of_then(points: Sequence[Point], point: Point, skipped: Skipped) -> NotInPoint:
    newest = newest_with(points, point, skipped.name)
    unknown = skipped.absence is Absence.IMPOSSIBLE
    return NotInPoint(skipped.name, skipped.reason, newest, unknown or newest is not None)


def newest_with(points: Sequence[Point], point: Point, disk_id: str) -> Point | None:
    """The newest point with a disk that is no later than this one, else the next one after it."""
    holding = [each for each in points if each.disk(disk_id) is not None]
    before = [each for each in holding if each.sequence <= point.sequence]
    if before:
        return max(before, key=lambda each: each.sequence)
    return min(holding, key=lambda each: each.sequence, default=None)
