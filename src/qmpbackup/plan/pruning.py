# SPDX-License-Identifier: Apache-2.0
"""How the points of a folder go that a policy does not keep, while others may build on them.

A point on which nothing is built is removed with its files. Where exactly one file that stays builds
on the file of a point that goes, the two become one file: the state of the later one. Where several
do, the point stays. Pure: manifests in, steps out; `prune --dry-run` prints them. Must not know how
files are merged.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmpbackup.errors import DamagedError
from qmpbackup.model import Point
from qmpbackup.plan.chain import ordered
from qmpbackup.plan.levels import last_point
from qmpbackup.plan.retention import Judged, Verdict

MOST_LAYERS = 48
"""Files that are merged at once where the lowest of them builds on another."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A point on which nothing is built ceases to exist, and the files that only it names."""

    point: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Files of a disk, by the ids of their points, lowest first, become one: the state of the last.

    The other points then do not hold this disk any more, and cease to exist with their last one.
    """

    disk: str
    points: tuple[str, ...]


Step = Removal | Merge


@dataclass(frozen=True, slots=True)
class Pruning(Judged):
    """What becomes of each point, newest first, and the steps that do it, in order."""

    steps: tuple[Step, ...]


def keep_newest(points: Iterable[Point], verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """The same verdicts, with a reason for the newest point, and for the newest of each disk: the
    next incremental builds on it."""
    points = ordered(points)
    reasons = {points[-1].id: "newest point"} if points else {}
    for disk_id in {disk.id: None for point in points for disk in point.disks}:
        newest = last_point(points, disk_id)
        if newest is not None:
            reasons.setdefault(newest.id, f"newest point of {disk_id}")
    return tuple(
        verdict.also(reasons[verdict.point.id]) if verdict.point.id in reasons else verdict
        for verdict in verdicts
    )


def plan(
    points: Sequence[Point],
    verdicts: Sequence[Verdict],
    held: Mapping[str, str],
    *,
    merging: bool = True,
) -> Pruning:
    """Decide which points go after all, and how.

    Args:
        points: all points of the target.
        verdicts: what the policy says of each.
        held: points that have to stay whatever the policy says, and why.
        merging: whether files may be merged; else all stay that others build on.

    Raises:
        DamagedError: a point builds on one that is not there.
    """
    forest = _Forest(points)
    reasons = {each.point.id: list(each.reasons) for each in verdicts}
    for point_id, reason in held.items():
        reasons[point_id] = reasons[point_id] or [reason]
    while True:
        needed = dict(_needed(forest, {each for each, why in reasons.items() if why}, merging))
        if not needed:
            break
        for point_id, reason in needed.items():
            reasons[point_id].append(reason)
    final = tuple(Verdict(each.point, tuple(reasons[each.point.id])) for each in verdicts)
    steps = _Steps(forest, {each.point.id for each in final if not each.kept}).all()
    return Pruning(final, steps)


class _Forest:
    """What builds on what, for each disk, and which points share a file."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = ordered(points)
        self.parents: dict[tuple[str, str], str | None] = {}
        self.children: dict[tuple[str, str], list[str]] = {}
        self.owners: defaultdict[str, list[str]] = defaultdict(list)
        for point in self.points:
            for disk in point.disks:
                self.parents[point.id, disk.id] = disk.parent
                self.children[point.id, disk.id] = []
                self.owners[disk.file].append(point.id)
                if disk.parent is not None:
                    self._bear(point, disk.id, disk.parent)

    def _bear(self, point: Point, disk_id: str, parent: str) -> None:
        if (parent, disk_id) not in self.children:
            raise DamagedError(
                f"Disk {disk_id} of point {point.id} builds on point {parent}, whose manifest is "
                "missing.",
                "Put that manifest back.",
            )
        self.children[parent, disk_id].append(point.id)

    def heirs(self, kept: Container[str]) -> dict[tuple[str, str], tuple[str, ...]]:
        """For each point and disk the points that stay and build on it, one for each of its children
        on which any does."""
        found: dict[tuple[str, str], tuple[str, ...]] = {}
        for point in reversed(self.points):
            for disk in point.disks:
                children = self.children[point.id, disk.id]
                first = (
                    child if child in kept else next(iter(found[child, disk.id]), "")
                    for child in children
                )
                found[point.id, disk.id] = tuple(filter(None, first))
        return found


def _needed(forest: _Forest, kept: Container[str], merging: bool) -> Iterator[tuple[str, str]]:
    """Points that go so far and cannot, with the reasons."""
    heirs = forest.heirs(kept)
    for point in forest.points:
        if point.id not in kept:
            for disk in point.disks:
                building = heirs[point.id, disk.id]
                owners = forest.owners[disk.file]
                sharing = [each for each in owners if each in kept or heirs[each, disk.id]]
                if len(building) > (1 if merging else 0):
                    yield point.id, _list(building) + " on it"
                    break
                if len(owners) > 1 and sharing:
                    yield point.id, f"in one file with {sharing[0]}"
                    break


def _list(building: Sequence[str]) -> str:
    if len(building) > 2:
        return f"{building[0]} and {len(building) - 1} others build"
    return " and ".join(building) + (" build" if len(building) > 1 else " builds")


class _Steps:
    """Finds the steps by going through them: what a step leaves is what the next one sees.

    It comes to an end, as the newest point that goes is always removed or merged first.
    """

    def __init__(self, forest: _Forest, going: set[str]) -> None:
        self._parents = dict(forest.parents)
        self._children = {key: list(value) for key, value in forest.children.items()}
        self._disks = {point.id: [disk.id for disk in point.disks] for point in forest.points}
        self._going = [point.id for point in reversed(forest.points) if point.id in going]
        self._staying = [point.id for point in reversed(forest.points) if point.id not in going]

    def all(self) -> tuple[Step, ...]:
        found: list[Step] = []
        while self._going:
            steps = [*self._removals(), *self._merges()]
            if not steps:
                raise ValueError("points that go build on each other in a circle")
            found += steps
        return tuple(found)

    def _removals(self) -> Iterator[Step]:
        for point_id in tuple(self._going):
            disks = self._disks[point_id]
            if not any(self._children[point_id, disk] for disk in disks):
                for disk in disks:
                    self._unlink(point_id, disk)
                self._going.remove(point_id)
                yield Removal(point_id)

    def _unlink(self, point_id: str, disk: str) -> None:
        parent = self._parents[point_id, disk]
        if parent is not None:
            self._children[parent, disk].remove(point_id)

    def _merges(self) -> Iterator[Step]:
        for point_id in self._staying:
            for disk in self._disks[point_id]:
                part = self._part(point_id, disk)
                if len(part) > 1:
                    yield from self._split(part, disk)
                    self._contract(part, disk)

    def _part(self, point_id: str, disk: str) -> list[str]:
        """A point, and those directly below it that go and have nothing else on top."""
        part = [point_id]
        while (parent := self._parents[part[0], disk]) is not None:
            if parent not in self._going or len(self._children[parent, disk]) > 1:
                break
            part.insert(0, parent)
        return part

    def _split(self, part: Sequence[str], disk: str) -> Iterator[Merge]:
        """Not too many files at once, unless the lowest stands alone."""
        most = MOST_LAYERS if self._parents[part[0], disk] is not None else len(part)
        for first in range(0, len(part) - 1, most - 1):
            yield Merge(disk, tuple(part[first : first + most]))

    def _contract(self, part: Sequence[str], disk: str) -> None:
        below = self._parents[part[0], disk]
        if below is not None:
            children = self._children[below, disk]
            children[children.index(part[0])] = part[-1]
        self._parents[part[-1], disk] = below
        for each in part[:-1]:
            self._disks[each].remove(disk)
            if not self._disks[each]:
                self._going.remove(each)
