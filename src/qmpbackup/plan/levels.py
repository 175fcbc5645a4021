# SPDX-License-Identifier: Apache-2.0
"""Which level each disk gets, and why: the bitmap rule of the project.

State lives in the manifests. The bitmap for the next incremental of a disk is the one that the last
point with this disk names; for a differential the one that its last full names. Any other bitmap of
ours for this target is rubbish from a run that died.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qmpbackup.errors import IncrementalNotPossible
from qmpbackup.model import Bitmap, Disk, Level, Point, StoredDisk, Underlay
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import BitmapName, parse_bitmap

SMALL = 8 * 1024 * 1024
"""Disks up to this many bytes (floppies, firmware variables) are copied whole each time: that takes
no longer than an incremental, and nothing can be wrong with a bitmap that is not there."""


@dataclass(frozen=True, slots=True)
class NewPoint:
    """The point that is to be made: its target, its id, and the bytes of a chunk there, where disks are
    read in chunks (0: QEMU copies them)."""

    target_id: str
    id: str
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a run does with one disk: the part that this has in the view, and why it has this level.

    `base` is the point that an incremental or differential builds on.
    """

    seat: Seat
    level: Level
    reason: str
    base: Point | None = None

    @property
    def disk(self) -> Disk:
        """The disk."""
        return self.seat.disk

    @property
    def base_bitmap(self) -> str:
        """The change bitmap that counts from the base; empty where everything is copied."""
        return self.seat.base_bitmap

    @property
    def keeps_bitmap(self) -> bool:
        """Whether a new change bitmap is started."""
        return bool(self.seat.new_bitmap)

    @property
    def end_mark(self) -> str:
        """The end mark beside the new change bitmap: a new one, or that of the base, which goes on."""
        base = self.stored_base
        return self.seat.new_end_mark or (base.end_mark if base else "")

    @property
    def parent(self) -> str | None:
        """The id of the point that it builds on."""
        return self.base.id if self.base else None

    @property
    def stored_base(self) -> StoredDisk | None:
        """The record of this disk in the point it builds on."""
        return self.base.disk(self.disk.id) if self.base else None

    @property
    def bytes_to_copy(self) -> int:
        """An upper bound of what will be copied."""
        marks = next((b.count for b in self.disk.bitmaps if b.name == self.base_bitmap), None)
        return self.disk.size if marks is None else marks


Check = Callable[[Point, str], str]
"""Says why the files of a disk of a point cannot be built upon; empty if they can."""


def plan_disks(
    disks: Iterable[Disk],
    level: Level,
    points: Sequence[Point],
    check: Check,
    new: NewPoint,
    process: str = "",
) -> tuple[DiskPlan, ...]:
    """Decide the level of every disk of a new point, and the bitmaps that it uses and starts; `process`
    is that of the VM (see `VmConfig`).

    Raises:
        IncrementalNotPossible: `inc` or `diff` was asked for, and a disk cannot have it.
    """
    return tuple(
        _plan_disk(number, disk, _decide(disk, level, points, check, process), new)
        for number, disk in enumerate(disks)
    )


@dataclass(frozen=True, slots=True)
class _Decision:
    level: Level
    reason: str
    base: Point | None = None
    keeps_bitmap: bool = True


def _plan_disk(number: int, disk: Disk, made: _Decision, new: NewPoint) -> DiskPlan:
    base = made.base.disk(disk.id) if made.base else None
    seat = Seat(
        disk,
        number,
        new_bitmap=change_bitmap_name(new.target_id, new.id, disk.id) if made.keeps_bitmap else "",
        base_bitmap=base.bitmap if base else "",
        new_end_mark=(
            end_mark_name(new.target_id, new.id, disk.id)
            # The end mark of the base goes on where it fits the disk as it is now.
            if made.keeps_bitmap and (base is None or base.size != disk.size)
            else ""
        ),
        chunk=new.chunk,
    )
    return DiskPlan(seat, made.level, made.reason, made.base)


def _decide(
    disk: Disk, level: Level, points: Sequence[Point], check: Check, process: str
) -> _Decision:
    if level is Level.COPY:
        return _Decision(Level.COPY, "asked for", keeps_bitmap=False)
    if disk.size <= SMALL:
        reason = "small disk, copied whole each time"
        return _Decision(Level.FULL, reason, keeps_bitmap=False)
    # Where others may write, no bitmap of today helps tomorrow.
    useful = not disk.other_writers
    if level is Level.FULL:
        return _Decision(Level.FULL, "asked for", keeps_bitmap=useful)
    wanted = Level.DIFF if level is Level.DIFF else Level.INC
    base = last_full(points, disk.id) if wanted is Level.DIFF else last_point(points, disk.id)
    obstacle = _obstacle(disk, base, check, process)
    if obstacle and level is not Level.AUTO:
        raise IncrementalNotPossible(
            f"Disk {disk.id} cannot have {_article(wanted)} backup: {obstacle}.",
            "Use --level auto, which makes a full of just such disks, or --level full.",
        )
    if obstacle or base is None:
        return _Decision(Level.FULL, obstacle, keeps_bitmap=useful)
    return _Decision(wanted, f"changes since {base.id}", base)


def last_point(points: Sequence[Point], disk_id: str) -> Point | None:
    """The newest point of the disk's chain; copies are outside every chain."""
    return _newest(points, disk_id, {Level.FULL, Level.INC, Level.DIFF})


def last_full(points: Sequence[Point], disk_id: str) -> Point | None:
    """The point that holds the newest full of the disk."""
    return _newest(points, disk_id, {Level.FULL})


def _newest(points: Sequence[Point], disk_id: str, levels: set[Level]) -> Point | None:
    for point in reversed(points):
        stored = point.disk(disk_id)
        if stored is not None and stored.level in levels and not stored.snapshot:
            return point
    return None


def _obstacle(disk: Disk, base: Point | None, check: Check, process: str) -> str:
    """Why an incremental on this base would not be right; empty if it is."""
    if disk.other_writers:
        return f"{disk.other_writers}, and no change bitmap sees that"
    stored = base.disk(disk.id) if base else None
    if base is None or stored is None:
        return "the target holds no earlier point of it"
    damage = check(base, disk.id)
    if damage:
        return f"the earlier point {base.id} is damaged ({damage})"
    if stored.size > disk.size:
        return f"it shrank from {stored.size} to {disk.size} bytes"
    return obstacle_in_vm(disk, stored, base.vm.process == process != "")


def obstacle_in_vm(disk: Disk, stored: StoredDisk, same_process: bool) -> str:
    """What in the VM speaks against building on an earlier record of the disk; empty if nothing.

    `same_process` says whether the QEMU that runs now is the one of that time.
    """
    return (
        bitmap_obstacle(disk, stored.bitmap)
        or witness_obstacle(disk, stored.end_mark)
        or underlay_obstacle(disk, stored, same_process)
    )


def underlay_obstacle(disk: Disk, stored: StoredDisk, same_process: bool) -> str:
    """Why what lies below the disk's image is not what the earlier point was made from; empty if it is.

    A bitmap knows nothing of that. Within one process of QEMU, though, images only ever leave a chain
    when a job has moved what they hold into those that stay (`block-stream`, `block-commit`). Manifests
    of versions that did not look are taken at their word.
    """
    then, now = stored.underlays, disk.underlays
    if then is None or (same_process and _are_left(now, then)):
        return ""
    if len(then) != len(now):
        return f"its chain of images is another: {_chain(then)} before, {_chain(now)} now"
    for old, new in zip(then, now, strict=True):
        if not old.is_same(new):
            if old.file != new.file:
                return f"its image lies on another one: {old.file} before, {new.file} now"
            return f"{new.file}, which its image lies on, was changed or replaced"
    return ""


def _are_left(now: Sequence[Underlay], then: Sequence[Underlay]) -> bool:
    """Whether these are some of the nodes of then, in their order."""
    nodes = iter([each.node for each in then])
    return len(now) < len(then) and all(each.node in nodes for each in now)


def _chain(underlays: Sequence[Underlay]) -> str:
    return " on ".join(each.file for each in underlays) or "none below it"


def change_bitmap_name(target_id: str, point_id: str, disk_id: str) -> str:
    """The name of the change bitmap that a point starts on a disk.

    It is another one on each disk: of disks that change places, or images that do, none must pass
    for the other.
    """
    return str(BitmapName(target_id, f"{point_id}-{_tag(disk_id)}"))


def end_mark_name(target_id: str, point_id: str, disk_id: str) -> str:
    """The name of the end mark that a point makes."""
    return f"{change_bitmap_name(target_id, point_id, disk_id)}-end"


def _tag(disk_id: str) -> str:
    return f"{zlib.crc32(disk_id.encode('utf-8', 'surrogatepass')):08x}"


def is_end_mark(name: str) -> bool:
    """Whether a bitmap of ours is an end mark."""
    parsed = parse_bitmap(name)
    return parsed is not None and parsed.point.endswith("-end")


def witness_obstacle(disk: Disk, name: str) -> str:
    """Why it is not proved that the disk's change bitmap is the very one that we started, and that it
    has been recording ever since; `name` is that of the end mark. Empty if it is proved."""
    if not name:
        return (
            "the earlier point was made by a version that left no end mark beside its change bitmap"
        )
    mark = next((bitmap for bitmap in disk.bitmaps if bitmap.name == name), None)
    if mark is None or mark.inconsistent:
        return (
            "whether its change bitmap is the one of the earlier point cannot be told, as the end mark "
            "is gone (a snapshot that copies the names of bitmaps was put on top, or it was removed)"
        )
    if mark.recording:
        return "its end mark was made anew by another program, so its change bitmap may be, too"
    return "it was shrunk and grown again since" if mark.count == 0 else ""


def bitmap_obstacle(disk: Disk, name: str) -> str:
    """Why the bitmap of this name cannot be trusted; empty if it can."""
    bitmap = next((each for each in disk.bitmaps if each.name == name), None)
    if bitmap is None and not disk.can_persist:
        return (
            f"its change bitmap is gone; a {disk.format} image of this kind cannot store bitmaps, "
            "so they end with the QEMU process"
        )
    if bitmap is None:
        return (
            "its change bitmap is gone (removed, or QEMU was killed, or there was no room to store it "
            "when QEMU ended, or the image was replaced by an older copy, or a snapshot was put on top)"
        )
    return _fault(bitmap)


def _fault(bitmap: Bitmap) -> str:
    if bitmap.inconsistent:
        return "its change bitmap is inconsistent because QEMU was killed"
    if bitmap.busy:
        return "its change bitmap is in use by another job"
    if not bitmap.recording:
        return "its change bitmap was disabled, so writes may be missing"
    return ""


def rubbish(disk: Disk, points: Sequence[Point], target_id: str) -> tuple[str, ...]:
    """Names of our bitmaps on the disk, for this target, that no committed point can use.

    Bitmaps that are busy belong to somebody's job, and stay.
    """
    keep: set[str] = set()
    for point in (last_point(points, disk.id), last_full(points, disk.id)):
        stored = point.disk(disk.id) if point else None
        if stored is not None:
            keep |= {stored.bitmap, stored.end_mark}
    return tuple(
        bitmap.name
        for bitmap in disk.bitmaps
        if (name := parse_bitmap(bitmap.name)) is not None
        and name.target == target_id
        and not bitmap.busy
        and (bitmap.name not in keep or bitmap.inconsistent)
    )


def effective_level(plans: Sequence[DiskPlan]) -> Level:
    """The level of a point as a whole: that of its disks which have a chain, `inc` before `full`."""
    levels = {plan.level for plan in plans}
    order = (Level.COPY, Level.INC, Level.DIFF)
    return next((level for level in order if level in levels), Level.FULL)


def _article(level: Level) -> str:
    return "an incremental" if level is Level.INC else "a differential"
