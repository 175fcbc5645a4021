# SPDX-License-Identifier: Apache-2.0
"""Which points a policy keeps, and why: the rules of `restic forget`.

The same policy keeps the same points in a folder as restic's own `forget` keeps snapshots of the same
times (internal/data/snapshot_policy.go of restic 0.16 and later, which also keeps the oldest point
while a rule has places left). Pure: times and tags in, reasons out. Must not know what holds points,
nor what builds on them.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from qmpbackup.errors import UsageError
from qmpbackup.model import Point

UNLIMITED = -1
"""A count without end: all hours, days, … are kept."""

_DURATION = re.compile(r"(?:\d{1,9}[ymdh])+", re.ASCII)
_PART = re.compile(r"(\d+)([ymdh])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of time in the units of the calendar, none of them negative."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    def __bool__(self) -> bool:
        return any((self.years, self.months, self.days, self.hours))

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{count}{unit}" for count, unit in parts if count)

    def before(self, moment: datetime) -> datetime | None:
        """The moment that lies so long before another; `None`: before all that there are.

        As Go's `AddDate`: a day that a month does not have is one of the next month.
        """
        months = moment.year * 12 + moment.month - 1 - self.years * 12 - self.months
        try:
            first = moment.replace(year=months // 12, month=months % 12 + 1, day=1)
            return first + timedelta(days=moment.day - 1 - self.days) - timedelta(hours=self.hours)
        except (ValueError, OverflowError):
            return None


def parse_duration(text: str) -> Duration:
    """A duration as restic writes it, such as `1y5m7d2h`; of a unit given twice the last counts.

    Raises:
        UsageError: it is none.
    """
    text = text.strip()
    if not _DURATION.fullmatch(text):
        raise UsageError(
            f"{text!r} is no duration.",
            "Write years, months, days and hours as in 1y5m7d2h.",
        )
    units = {unit: int(count) for count, unit in _PART.findall(text)}
    return Duration(units.get("y", 0), units.get("m", 0), units.get("d", 0), units.get("h", 0))


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep: a point stays if any of the rules wants it.

    Counts are how many of the newest hours, days, … with a point keep their newest one (`UNLIMITED`:
    all). `within` reaches back from the newest point. Each of `tags` is a set of tags that a point
    must have all of.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration = Duration()
    tags: tuple[tuple[str, ...], ...] = ()

    def __bool__(self) -> bool:
        return self != Policy()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a point: it is kept for these reasons, or without any removed."""

    point: Point
    reasons: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether there is a reason to keep it."""
        return bool(self.reasons)

    def also(self, reason: str) -> "Verdict":
        """The same with one more reason."""
        return replace(self, reasons=(*self.reasons, reason))


@dataclass(frozen=True, slots=True)
class Judged:
    """Points with what becomes of each, newest first."""

    verdicts: tuple[Verdict, ...]

    @property
    def kept(self) -> tuple[Verdict, ...]:
        """The points that stay, with the reasons, newest first."""
        return tuple(each for each in self.verdicts if each.kept)

    @property
    def removed(self) -> tuple[Point, ...]:
        """The points that go, newest first."""
        return tuple(each.point for each in self.verdicts if not each.kept)


NO_TAGS: Mapping[str, Collection[str]] = {}


def decide(
    points: Sequence[Point],
    policy: Policy,
    now: datetime,
    tags: Mapping[str, Collection[str]] = NO_TAGS,
) -> tuple[Verdict, ...]:
    """Apply a policy to the points of one VM; newest first.

    Args:
        points: in any order. Of those of one time the last one counts as the newest.
        policy: what to keep.
        now: no point later than this is what `within` reaches back from.
        tags: those of the points that have any, by the ids of the points.

    Raises:
        UsageError: the policy has no rule, or none of these points would be left.
    """
    if not policy:
        raise UsageError(
            "No policy was given, so nothing is removed.",
            "Say what to keep, such as --keep-daily 7 --keep-weekly 4.",
        )
    newest_first = sorted(enumerate(points), key=lambda each: (each[1].time, each[0]), reverse=True)
    found = _Rules(policy, [point for _, point in newest_first], now, tags).verdicts()
    if found and not any(each.kept for each in found):
        raise UsageError(
            "This policy would keep none of the points, so nothing is removed.",
            "Say what to keep, such as --keep-last 1.",
        )
    return found


class _Bucket:
    """One rule that keeps the newest point of each hour, day, …, as often as its count allows."""

    def __init__(self, reason: str, count: int, key: Callable[[datetime, int], object]) -> None:
        self._reason = reason
        self._left = count
        self._key = key
        self._last: object = None

    def reason(self, time: datetime, number: int, *, is_oldest: bool) -> str:
        """Why this rule keeps the next point, the `number`th; empty if it does not."""
        if self._left == 0:
            return ""
        key = self._key(time, number)
        again = key == self._last
        if again and not is_oldest:
            return ""
        self._last = key
        if self._left > 0:
            self._left -= 1
        return f"oldest {self._reason}" if again else self._reason


class _Rules:
    def __init__(
        self,
        policy: Policy,
        points: Sequence[Point],
        now: datetime,
        tags: Mapping[str, Collection[str]],
    ) -> None:
        self._policy = policy
        self._points = points
        self._tags = tags
        self._since = _since(policy.within, points, now)
        self._buckets = (
            _Bucket("last", policy.last, lambda _, number: number),
            _Bucket("hourly", policy.hourly, lambda time, _: (*_day(time), time.hour)),
            _Bucket("daily", policy.daily, lambda time, _: _day(time)),
            _Bucket("weekly", policy.weekly, lambda time, _: tuple(time.isocalendar())[:2]),
            _Bucket("monthly", policy.monthly, lambda time, _: (time.year, time.month)),
            _Bucket("yearly", policy.yearly, lambda time, _: time.year),
        )

    def verdicts(self) -> tuple[Verdict, ...]:
        """For each point, newest first: the buckets count as they go."""
        return tuple(
            Verdict(point, self._reasons(point, number))
            for number, point in enumerate(self._points)
        )

    def _reasons(self, point: Point, number: int) -> tuple[str, ...]:
        is_oldest = number == len(self._points) - 1
        counted = [
            bucket.reason(point.time, number, is_oldest=is_oldest) for bucket in self._buckets
        ]
        return tuple(filter(None, [*self._tagged(point), self._recent(point), *counted]))

    def _tagged(self, point: Point) -> list[str]:
        found = self._tags.get(point.id, ())
        return [f"has tags {','.join(each)}" for each in self._policy.tags if _has(found, each)]

    def _recent(self, point: Point) -> str:
        wanted = self._policy.within
        recent = bool(wanted) and (self._since is None or point.time > self._since)
        return f"within {wanted}" if recent else ""


def _since(within: Duration, points: Sequence[Point], now: datetime) -> datetime | None:
    """What a point must be later than to be recent; `None`: all are."""
    latest = max((point.time for point in points if point.time < now), default=None)
    # Without any point before now restic counts from year 1, and so keeps all.
    return within.before(latest) if latest else None


def _day(time: datetime) -> tuple[int, int, int]:
    return (time.year, time.month, time.day)


def _has(found: Collection[str], wanted: Sequence[str]) -> bool:
    """Whether all tags are there. An empty one stands for having none, as with restic."""
    for tag in wanted:
        if tag == "" and not found:
            return True
        if tag not in found:
            return False
    return True
