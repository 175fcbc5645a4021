# SPDX-License-Identifier: Apache-2.0
"""Which files make up a disk of a point, in what order points stand, and which one a user means.

Pure: works on manifests alone, never on names of files or their times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.model import Point, StoredDisk

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Link:
    """One file of a chain: the point that added it, and its record of the disk."""

    point: Point
    disk: StoredDisk


def ordered(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points in the order of their commits, oldest first."""
    return tuple(sorted(points, key=lambda point: (point.sequence, point.id)))


def chain(points: Iterable[Point], point: Point, disk_id: str) -> tuple[Link, ...]:
    """The files that a disk of a point is made of, the one that stands alone first.

    Raises:
        DamagedError: the chain is not whole, or not one that backups make.
    """
    by_id = {each.id: each for each in points}
    by_id.setdefault(point.id, point)
    links = [_link(point, disk_id)]
    while (parent := links[-1].disk.parent) is not None:
        below = by_id.get(parent)
        if below is None:
            raise DamagedError(
                f"Disk {disk_id} of point {links[-1].point.id} builds on point {parent}, whose "
                "manifest is missing or damaged.",
                "Restore an older point, or put that manifest back.",
            )
        links.append(_link(below, disk_id))
        _check_step(links[-1], links[-2], disk_id)
    return tuple(reversed(links))


def _link(point: Point, disk_id: str) -> Link:
    disk = point.disk(disk_id)
    if disk is None:
        raise DamagedError(f"Point {point.id} does not hold disk {disk_id}.")
    return Link(point, disk)


def _check_step(below: Link, above: Link, disk_id: str) -> None:
    # Sequences that only fall cannot run in a circle either.
    if below.point.sequence >= above.point.sequence:
        raise DamagedError(
            f"Disk {disk_id} of point {above.point.id} builds on point {below.point.id}, which is "
            "not older."
        )
    if below.disk.file == above.disk.file:
        raise DamagedError(f"Disk {disk_id} of point {above.point.id} builds on its own file.")


def children(points: Iterable[Point], point_id: str, disk_id: str) -> tuple[Point, ...]:
    """The points whose file of a disk builds directly on that of a point, oldest first."""
    return tuple(
        point
        for point in ordered(points)
        if (disk := point.disk(disk_id)) is not None and disk.parent == point_id
    )


def find(points: Sequence[Point], wanted: str) -> Point:
    """The point a user means: `latest`, an id, its unique beginning, or a time.

    A time means the newest point at or before it. Without a zone it is UTC, as all times that we
    print; a date alone, or a time without seconds, means its very end.

    Raises:
        NoSuchTarget: no point is meant.
        UsageError: several points are meant, or none could be.
    """
    if not points:
        raise NoSuchTarget("There is no restore point in this target.", "Make one: backup.")
    if wanted == LATEST:
        return ordered(points)[-1]
    matches = [point for point in points if point.id.startswith(wanted)] if wanted else []
    exact = [point for point in matches if point.id == wanted]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    moment = _moment(wanted)
    if moment is not None:
        return _at(points, moment, wanted)
    if matches:
        names = ", ".join(point.id for point in ordered(matches)[:5])
        raise UsageError(f"{wanted!r} is how several points begin: {names}.", "Give more of it.")
    raise NoSuchTarget(
        f"There is no point {wanted!r}.",
        "`qmpbackup list` shows all; a point is named by `latest`, its id, or a time such as "
        "2026-11-02T03:04.",
    )


def _at(points: Sequence[Point], moment: datetime, wanted: str) -> Point:
    before = [point for point in points if point.time <= moment]
    if not before:
        oldest = ordered(points)[0]
        raise NoSuchTarget(
            f"There is no point at or before {wanted}.",
            f"The oldest is {oldest.id}.",
        )
    return max(before, key=lambda point: (point.time, point.sequence))


def _moment(text: str) -> datetime | None:
    """The last instant that a time in ISO 8601 stands for; `None` where the text is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return (moment + _precision(text) - timedelta(microseconds=1)).astimezone(UTC)
    except OverflowError:  # beyond the years that there are
        return datetime.max.replace(tzinfo=UTC) if moment.year > 1 else moment


def _precision(text: str) -> timedelta:
    """How much time a text in ISO 8601 leaves open."""
    clock = text.replace(" ", "T").partition("T")[2]
    clock = clock.partition("+")[0].partition("-")[0].rstrip("Z")
    digits = clock.replace(":", "")
    if "." in digits or "," in digits:
        return timedelta(microseconds=1)
    steps = {0: timedelta(days=1), 2: timedelta(hours=1), 4: timedelta(minutes=1)}
    return steps.get(len(digits), timedelta(seconds=1))
