# SPDX-License-Identifier: Apache-2.0
"""Prune a folder: points on which nothing is built go, others are merged into what builds on them.

    lock ─ finish what an earlier run left ─ decide ─ for each step: remove a point, or
    verify, build the merged file beside, prove, journal, swap (`service.rebase`)

A point ceases to exist with its manifest; only then its files go. Each step is complete in itself and
leaves a target that is right, so a run that dies is gone on with by the next. Knows files and
manifests; must not know what a policy is.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.folder import Folder
from qmpbackup.model import Point
from qmpbackup.plan import pruning
from qmpbackup.plan.chain import chain
from qmpbackup.plan.pruning import Merge, Pruning, Removal, Step
from qmpbackup.plan.retention import Policy, Verdict, decide
from qmpbackup.service.prune import Outcome, Request
from qmpbackup.service.rebase import merge, source
from qmpbackup.service.rebase.place import Place
from qmpbackup.targets.folder import journal
from qmpbackup.targets.folder.target import DirectoryTarget, Inventory
from qmpbackup.targets.names import POINTS, folder_name

log = logging.getLogger(__name__)


def prune(request: Request, path: Path, now: datetime) -> Outcome:
    """Prune a folder; see `service.prune.prune`."""
    _refuse_what_folders_have_not(request)
    target = DirectoryTarget.open(path)
    if request.dry_run:
        return _dry_run(target, request, now)
    with interrupt.held(), target.lock(remove=True, wait=request.lock_wait):
        _require_ours(target)
        for done in (*target.recover(), *journal.roll_forward(target.path)):
            log.warning("Cleaned up after a run that died: %s.", done)
        before = points = _points(target)
        decided = _decide(target, points, request, now)
        for step in decided.steps:
            interrupt.check()
            points = _perform(target, points, step)
        freed = _stored(before) - _stored(points)
    return Outcome(decided.verdicts, freed, _merges(decided))


def _dry_run(target: DirectoryTarget, request: Request, now: datetime) -> Outcome:
    with interrupt.held(), target.lock(wait=request.lock_wait):
        if target.interrupted():
            raise DamagedError(
                f"A merge in {target.path} was interrupted, so this cannot be foretold.",
                "The next backup finishes it, and so does prune without --dry-run.",
            )
        points = _points(target)
        decided = _decide(target, points, request, now)
    return Outcome(decided.verdicts, _likely_freed(points, decided), _merges(decided))


def _refuse_what_folders_have_not(request: Request) -> None:
    if request.vm:
        raise UsageError("A folder holds the points of one VM.", "Leave --vm out.")
    if request.policy.tags:
        raise UsageError(
            "Points in a folder have no tags.", "Use the other --keep options; tags are restic's."
        )


def _require_ours(target: DirectoryTarget) -> None:
    """Refuse a target that others could rearrange while files are removed."""
    with storage_errors(f"open {target.path}"), Folder.open(target.path) as top:
        top.require_ours()
        if top.exists(POINTS):
            with top.sub(POINTS) as points:
                points.require_ours()


def _points(target: DirectoryTarget) -> tuple[Point, ...]:
    """All points, if every manifest can be read; else nobody knows what builds on what."""
    found: Inventory = target.load()
    if found.damaged:
        raise DamagedError(
            f"{found.damaged[0].path} cannot be read, so nobody knows what builds on what: "
            f"{found.damaged[0].reason}",
            "Put an unharmed copy of it back. Nothing was removed.",
        )
    elsewhere = "" if found.points else target.elsewhere()
    if elsewhere:
        raise NoSuchTarget(f"{target.path} holds no point itself.", elsewhere)
    return found.points


def _decide(
    target: DirectoryTarget, points: Sequence[Point], request: Request, now: datetime
) -> Pruning:
    damaged = _damaged(target, points)
    partial = {point.id for point in points if point.merged} - damaged.keys()
    poor = dict.fromkeys(partial, "lacks disks, so not counted")
    poor |= dict.fromkeys(damaged, "damaged, so not counted")
    verdicts = _among_whole(points, request.policy, now, poor)
    verdicts = pruning.keep_newest(points, verdicts)
    held = _held_by_strays(target, points)
    held |= _held_by_damage(points, {each.point.id for each in verdicts if each.kept}, damaged)
    return pruning.plan(points, verdicts, held, merging=request.merging)


def _among_whole(
    points: Sequence[Point], policy: Policy, now: datetime, poor: Mapping[str, str]
) -> tuple[Verdict, ...]:
    """What the policy says. The points in `poor` never take the place of others, and go once they
    would go even if they did; why is added to their reasons."""
    verdicts = decide(points, policy, now)
    if not poor:
        return verdicts
    rich = [point for point in points if point.id not in poor]
    among = {each.point.id: each for each in decide(rich, policy, now)} if rich else {}
    return tuple(
        among.get(each.point.id) or (each.also(poor[each.point.id]) if each.kept else each)
        for each in verdicts
    )


def _damaged(target: DirectoryTarget, points: Iterable[Point]) -> dict[str, str]:
    """Points whose files, or those below, cannot be whole, as far as lengths and marks tell; and the
    reason."""
    faults: dict[tuple[str, str], str] = {}
    found: dict[str, str] = {}
    for point in points:
        for disk in point.disks:
            alone = replace(point, disks=(replace(disk, parent=None),))
            below = faults.get((disk.parent or "", disk.id), "")
            faults[point.id, disk.id] = below or target.quick_check(alone, disk.id, ())
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


def _held_by_strays(target: DirectoryTarget, points: Sequence[Point]) -> dict[str, str]:
    """Points whose file, or the file on it, is what a file of somebody else's builds on."""
    held: dict[str, str] = {}
    for disk_id in {disk.id: None for point in points for disk in point.disks}:
        place = Place(target.path / folder_name(disk_id), target)
        files = {
            disk.file.rpartition("/")[2]: (point.id, disk.parent)
            for point in points
            if (disk := point.disk(disk_id)) is not None
        }
        for stray in source.strays(place, files, tuple(files)):
            for point_id in filter(None, files[stray.parent]):
                held[point_id] = f"{place.name}/{stray.child} builds on {stray.parent}"
    return held


def _perform(target: DirectoryTarget, points: Sequence[Point], step: Step) -> tuple[Point, ...]:
    """Carry out a step; the points that there are then."""
    if isinstance(step, Removal):
        target.remove_point(step.point, _files_of(points, step.point))
        log.info("Removed point %s", step.point)
        return tuple(point for point in points if point.id != step.point)
    newest = next(point for point in points if point.id == step.points[-1])
    links = chain(points, newest, step.disk)[-len(step.points) :]
    if tuple(link.point.id for link in links) != step.points:
        raise ValueError(f"the chain of {step.disk} is not the one that was planned")
    place = Place(target.path / folder_name(step.disk), target)
    merge.merge_part(place, points, links)
    return _points(target)


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
