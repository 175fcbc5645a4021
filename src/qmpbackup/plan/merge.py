# SPDX-License-Identifier: Apache-2.0
"""Merging a chain into its full: what becomes of files, snapshots and points.

Pure: values in, values out; `--dry-run` prints them. Must not know how an image is made.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from qmpbackup.errors import UsageError
from qmpbackup.model import Level, Merged, Point, StoredDisk
from qmpbackup.plan.chain import Link
from qmpbackup.plan.lineage import Bond

PARTIAL = ".partial"
"""What the name of the full is followed by while the merged image is being built beside it."""

MERGED = ".merged"
"""The same once it is proved and durable, until it takes the full's place."""

OLD = ".old"
"""The same for the full that it replaces."""

SYMLINK = "image"
"""The link to the newest image that `qmprestore rebase` leaves, as the original tool does."""

FIRST_TAG = "FULL-BACKUP"
"""The snapshot that keeps the full's own state, as the original tool calls it."""


class Operation(StrEnum):
    """The two ways to merge in place, named after the commands."""

    COMMIT = "commit"
    SNAPSHOTS = "snapshotrebase"


@dataclass(frozen=True, slots=True)
class Tag:
    """An internal snapshot that keeps the state of a file of the chain.

    `exists` means that an earlier merge has made it already.
    """

    file: str
    name: str
    exists: bool = False


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A chain, oldest first, and what merging it means.

    `carried` are internal snapshots that the full holds already and keeps. `relinked` are images
    that build on the newest of the chain, and then on the full. `lost` are points or images whose
    states end. `below` is for a part of a chain that builds on another file: the size of the disk in
    that one, in bytes; the first of the part then takes the place of the full.
    """

    operation: Operation
    chain: tuple[str, ...]
    tags: tuple[Tag, ...] = ()
    carried: tuple[str, ...] = ()
    relinked: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    below: int | None = None

    @property
    def base(self) -> str:
        """The full that everything is merged into."""
        return self.chain[0]

    @property
    def newest(self) -> str:
        """The image whose state the full then holds."""
        return self.chain[-1]

    @property
    def superseded(self) -> tuple[str, ...]:
        """The images that are not needed any more."""
        return self.chain[1:]

    @property
    def flattens(self) -> bool:
        """Whether the merged image can be written anew, as there are no snapshots to keep."""
        return self.operation is Operation.COMMIT and not self.carried and self.below is None

    def lines(self) -> tuple[str, ...]:
        """The plan for people, one step a line."""
        if not self.superseded:
            return (f"nothing to do: {self.base} stands alone",)
        built = self.base + PARTIAL
        made = [f"build {built} from {' + '.join(self.chain)}"]
        if not self.flattens:
            made = [f"copy {self.base} to {built}", f"apply to it {', '.join(self.superseded)}"]
        tags = [
            f"keep the state of {tag.file} as snapshot {tag.name}"
            for tag in self.tags
            if not tag.exists
        ]
        return (
            *made,
            *tags,
            f"prove that {built} is whole and holds the state of {self.newest}",
            *(f"let {name} build on {self.base}" for name in self.relinked),
            *(f"end {name}, whose state is merged into a later one" for name in self.lost),
            f"put {built} in the place of {self.base}",
            f"remove {', '.join(self.superseded)}",
        )


def check_siblings(
    chain: Sequence[str], children: Iterable[Bond], strays: Iterable[Bond] = ()
) -> tuple[str, ...]:
    """Names of the images that build on the newest of the chain, which a merge leaves right.

    `strays` are files that are no backups; nobody may be using them, or somebody.

    Raises:
        UsageError: others build on what the merge changes or removes.
    """
    children = tuple(children)
    broken = [bond for bond in children if bond.parent != chain[-1]]
    broken += strays if len(chain) > 1 else ()
    if broken:
        first = broken[0]
        more = f", and so do {len(broken) - 1} others" if len(broken) > 1 else ""
        raise UsageError(
            f"This would destroy {first.child}, which builds on {first.parent}{more}.",
            "`qmprestore merge --targetfile FILE` writes a new file and leaves the backup alone.",
        )
    return tuple(dict.fromkeys(bond.child for bond in children))


def tags_for(
    states: Sequence[tuple[str, datetime | None]], existing: Sequence[str]
) -> tuple[Tag, ...]:
    """A snapshot for the state of each file of a chain, with names that are used once.

    The first is called `FIRST_TAG`, the others after their time. Where the first file holds the
    snapshots of an earlier merge, its state has a snapshot already if one is called after its time,
    or if its time is not known.
    """
    taken = set(existing)
    tags: list[Tag] = []
    for number, (file, time) in enumerate(states):
        name = f"{time:%Y-%m-%d-%H:%M:%S}" if time else file
        if number == 0 and FIRST_TAG not in taken:
            name = FIRST_TAG
        elif number == 0 and time is None:
            continue
        elif number == 0 and name in taken:
            tags.append(Tag(file, _last_used(name, taken), exists=True))
            continue
        name = _unused(name, taken)
        taken.add(name)
        tags.append(Tag(file, name))
    return tuple(tags)


def _unused(name: str, taken: set[str]) -> str:
    return next(each for each in _numbered(name) if each not in taken)


def _last_used(name: str, taken: set[str]) -> str:
    """Of the states of one second the newest, which is the one that the first file holds."""
    used = list(itertools.takewhile(taken.__contains__, _numbered(name)))
    return used[-1]


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds: its length in bytes, and its digest as in manifests."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Points whose manifests change, and the ids of those that hold no disk any more."""

    record: tuple[Point, ...] = ()
    forget: tuple[str, ...] = ()


def rewrite(
    points: Sequence[Point],
    links: Sequence[Link],
    plan: MergePlan,
    base: Contents,
    relinked: Mapping[str, Contents],
) -> Rewritten:
    """The manifests as they are true after the merge of `links`.

    Args:
        points: all points of the target.
        links: the chain that is merged, the full first; or neighbours out of one, whose first keeps
            its level and what it builds on.
        plan: what is done with it.
        base: what the full's file then holds.
        relinked: the same of files (as manifests name them) that then build on the full.
    """
    rewriter = _Rewriter(points, links, plan, base, relinked)
    changed = [new for old in points if (new := rewriter.point(old)) != old]
    return Rewritten(
        tuple(point for point in changed if point.disks),
        tuple(point.id for point in changed if not point.disks),
    )


class _Rewriter:
    def __init__(
        self,
        points: Sequence[Point],
        links: Sequence[Link],
        plan: MergePlan,
        base: Contents,
        relinked: Mapping[str, Contents],
    ) -> None:
        self._sequences = {point.id: point.sequence for point in points}
        self._id = links[0].disk.id
        self._file = links[0].disk.file
        self._bottom = links[0].disk
        self._last = links[-1].point.id
        self._before = {link.point.id for link in links[:-1]}
        self._keeps = plan.operation is Operation.SNAPSHOTS
        names = {link.disk.name: link.point.id for link in links}
        self._tags = {names[tag.file]: tag.name for tag in plan.tags}
        self._base = base
        self._relinked = relinked

    def point(self, old: Point) -> Point:
        disks = tuple(new for disk in old.disks if (new := self._disk(old, disk)) is not None)
        merged = tuple(self._redirected(each) for each in old.merged)
        if len(disks) < len(old.disks):
            merged = (*merged, Merged(self._id, self._last))
        if disks == old.disks:
            return replace(old, merged=merged)
        return replace(
            old, disks=disks, merged=merged, level=_level(disks, old), parent=self._parent(disks)
        )

    def _disk(self, point: Point, disk: StoredDisk) -> StoredDisk | None:
        if disk.id != self._id:
            return disk
        if disk.file in self._relinked:
            return _holding(disk, self._relinked[disk.file])
        if point.id == self._last:
            return self._in_the_first(disk, "")
        if point.id in self._before:
            return self._in_the_first(disk, self._tags[point.id]) if self._keeps else None
        return _holding(disk, self._base) if disk.file == self._file else disk

    def _in_the_first(self, disk: StoredDisk, snapshot: str) -> StoredDisk:
        into = "its full" if self._bottom.parent is None else "what it was built on"
        reason = disk.reason if disk.file == self._file else f"merged into {into}"
        alone = replace(
            disk,
            level=self._bottom.level,
            file=self._file,
            parent=self._bottom.parent,
            reason=reason,
            snapshot=snapshot,
        )
        return _holding(alone, self._base)

    def _redirected(self, merged: Merged) -> Merged:
        """What went into a state that now ends went into the one that takes its place."""
        gone = not self._keeps and merged.id == self._id and merged.into in self._before
        return replace(merged, into=self._last) if gone else merged

    def _parent(self, disks: Sequence[StoredDisk]) -> str | None:
        parents = [disk.parent for disk in disks if disk.parent is not None]
        return max(parents, key=lambda each: self._sequences.get(each, 0)) if parents else None


def _holding(disk: StoredDisk, contents: Contents) -> StoredDisk:
    return replace(disk, file_size=contents.size, digest=contents.digest)


def _level(disks: Sequence[StoredDisk], old: Point) -> Level:
    """The level of a point as a whole, from those of its disks."""
    levels = {disk.level for disk in disks}
    order = (Level.COPY, Level.INC, Level.DIFF, Level.FULL)
    return next((level for level in order if level in levels), old.level)
