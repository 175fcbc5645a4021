# SPDX-License-Identifier: Apache-2.0
"""Points go from a folder: those on which nothing is built, and others merged into what builds on them.

    for each step: remove a point, or verify, build the merged file beside, prove, journal, swap (`merging`)

A point ceases to exist with its manifest; only then its files go. Each step is complete in itself and
leaves a target that is right, so a run that dies is gone on with by the next. Knows files and
manifests; must not know what a policy is.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, UsageError
from qmpbackup.folder import Folder
from qmpbackup.model import Point
from qmpbackup.plan import pruning
from qmpbackup.plan.chain import chain
from qmpbackup.plan.pruning import Merge, Pruning, Removal, Step
from qmpbackup.plan.retention import Verdict
from qmpbackup.targets.folder import chain_files, merging, pending
from qmpbackup.targets.folder.disk_folder import DiskFolder
from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.names import POINTS, folder_name
from qmpbackup.targets.removal import Removed, Sweep

log = logging.getLogger(__name__)

Load = Callable[[], Inventory]
"""Reads the manifests."""


class FolderClearing:
    """See `Clearing`: a folder that is held by the lock to remove, or for a dry run by that to read."""

    def __init__(self, files: StoredFiles, load: Load, sweep: Sweep) -> None:
        self._files = files
        self._load = load
        self._sweep = sweep
        self.points = _points(load)
        self._damaged = _damaged(files, self.points)
        partial = {point.id for point in self.points if point.merged} - self._damaged.keys()
        poor = dict.fromkeys(partial, "lacks disks, so not counted")
        self.poor = poor | dict.fromkeys(self._damaged, "damaged, so not counted")
        self.tags: Mapping[str, Sequence[str]] = {}

    def perform(self, verdicts: Sequence[Verdict]) -> Removed:
        """Step by step; each leaves a target that is right."""
        decided = self._plan(verdicts)
        if self._sweep.dry_run:
            freed = _likely_freed(self.points, decided)
            return Removed(decided.verdicts, freed, _merges(decided))
        points = self.points
        for step in decided.steps:
            interrupt.check()
            points = self._step(points, step)
        freed = _stored(self.points) - _stored(points)
        return Removed(decided.verdicts, freed, _merges(decided))

    def _plan(self, verdicts: Sequence[Verdict]) -> Pruning:
        kept = {each.point.id for each in verdicts if each.kept}
        held = _held_by_strays(self._files, self.points)
        held |= _held_by_damage(self.points, kept, self._damaged)
        return pruning.plan(self.points, verdicts, held, merging=self._sweep.merging)

    def _step(self, points: Sequence[Point], step: Step) -> tuple[Point, ...]:
        """Carry out a step; the points that there are then."""
        if isinstance(step, Removal):
            pending.remove(self._files.path, step.point, _files_of(points, step.point))
            log.info("Removed point %s", step.point)
            return tuple(point for point in points if point.id != step.point)
        newest = next(point for point in points if point.id == step.points[-1])
        links = chain(points, newest, step.disk)[-len(step.points) :]
        if tuple(link.point.id for link in links) != step.points:
            raise ValueError(f"the chain of {step.disk} is not the one that was planned")
        place = DiskFolder(self._files.path / folder_name(step.disk), self._files)
        merging.merge_part(place, points, links)
        return _points(self._load)


def require_possible(sweep: Sweep) -> None:
    """Refuse what folders have not.

    Raises:
        UsageError: it was asked for.
    """
    if sweep.by_tags:
        raise UsageError(
            "Points in a folder have no tags.", "Use the other --keep options; tags are restic's."
        )


def require_ours(files: StoredFiles) -> None:
    """Refuse a target that others could rearrange while files are removed."""
    with storage_errors(f"open {files.path}"), Folder.open(files.path) as top:
        top.require_ours()
        if top.exists(POINTS):
            with top.sub(POINTS) as points:
                points.require_ours()


def _points(load: Load) -> tuple[Point, ...]:
    """All points, if every manifest can be read; else nobody knows what builds on what."""
    found = load()
    if found.damaged:
        raise DamagedError(
            f"{found.damaged[0].path} cannot be read, so nobody knows what builds on what: "
            f"{found.damaged[0].reason}",
            "Put an unharmed copy of it back. Nothing was removed.",
        )
    return found.points


def _damaged(files: StoredFiles, points: Iterable[Point]) -> dict[str, str]:
    """Points whose files, or those below, cannot be whole, as far as lengths and marks tell; and the
    reason."""
    faults: dict[tuple[str, str], str] = {}
    found: dict[str, str] = {}
    for point in points:
        for disk in point.disks:
            alone = replace(point, disks=(replace(disk, parent=None),))
            below = faults.get((disk.parent or "", disk.id), "")
            faults[point.id, disk.id] = below or files.quick_check(alone, disk.id, ())
            if faults[point.id, disk.id]:
                found.setdefault(point.id, faults[point.id, disk.id])
    for point_id, reason in found.items():
        log.warning("Point %s is damaged: %s.", point_id, reason)
    return found


def _held_by_damage(
    points: Sequence[Point], kept: set[str], damaged: Mapping[str, str]
) -> dict[str, str]:
    """What damaged points that stay build on: nothing can be merged with them."""
    return {
        link.point.id: f"{point.id} is damaged and builds on it"
        for point in points
        if point.id in kept and point.id in damaged
        for disk in point.disks
        for link in chain(points, point, disk.id)[:-1]
        if link.point.id not in kept
    }


def _held_by_strays(files: StoredFiles, points: Sequence[Point]) -> dict[str, str]:
    """Points whose file, or the file on it, is what a file of somebody else's builds on."""
    held: dict[str, str] = {}
    for disk_id in {disk.id: None for point in points for disk in point.disks}:
        place = DiskFolder(files.path / folder_name(disk_id), files)
        names = {
            disk.name: (point.id, disk.parent)
            for point in points
            if (disk := point.disk(disk_id)) is not None
        }
        for stray in chain_files.strays(place, names, tuple(names)):
            for point_id in filter(None, names[stray.parent]):
                held[point_id] = f"{place.name}/{stray.child} builds on {stray.parent}"
    return held


def _files_of(points: Iterable[Point], point_id: str) -> tuple[str, ...]:
    """The files that no other point names."""
    others = {disk.file for point in points if point.id != point_id for disk in point.disks}
    return tuple(
        disk.file
        for point in points
        if point.id == point_id
        for disk in point.disks
        if disk.file not in others
    )


def _stored(points: Iterable[Point]) -> int:
    return sum({disk.file: disk.file_size for point in points for disk in point.disks}.values())


def _merges(decided: Pruning) -> int:
    return sum(isinstance(step, Merge) for step in decided.steps)


def _likely_freed(points: Sequence[Point], decided: Pruning) -> int:
    """What can become free, roughly: a merged file is about as large as the largest of its parts."""
    sizes = {(p.id, disk.id): (disk.file, disk.file_size) for p in points for disk in p.disks}
    removed = {step.point for step in decided.steps if isinstance(step, Removal)}
    kept_files = {disk.file for p in points if p.id not in removed for disk in p.disks}
    merged = {
        (p, step.disk) for step in decided.steps if isinstance(step, Merge) for p in step.points
    }
    gone = {
        file: size
        for (point_id, disk_id), (file, size) in sizes.items()
        if point_id in removed and file not in kept_files and (point_id, disk_id) not in merged
    }
    return sum(gone.values()) + sum(_overlap(decided.steps, sizes))


def _overlap(
    steps: Iterable[Step], sizes: Mapping[tuple[str, str], tuple[str, int]]
) -> Iterator[int]:
    for step in steps:
        if isinstance(step, Merge):
            parts = [sizes[point_id, step.disk][1] for point_id in step.points]
            yield sum(parts) - max(parts)
