# SPDX-License-Identifier: Apache-2.0
"""Times at which something is due, as systemd writes them (OnCalendar), and hours of the day and week.

Where an expression names no time zone, it means the host's (`LOCAL`). An hour that clocks go through
twice counts once, the first time, as with systemd. A time that clocks leap over comes where they land,
unlike with systemd, which has it come not at all: no night shall be without a backup. Results are in UTC.

Pure but for the host's time zone. Must not know what is due then.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from oncalendar import BaseIterator, OnCalendarError

from qmpbackup.errors import UsageError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)
_HOUR: Final = 3600.0
_LONGEST: Final = 256
"""Characters of an expression."""

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY: Final = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
_SOME_DAYS: Final = re.compile(rf"{_DAY}(?:(?:\.\.|,){_DAY})*", re.IGNORECASE)
_TIMES: Final = re.compile(r"(\d\d?):(\d\d)\s*-\s*(\d\d?):(\d\d)", re.ASCII)
_A_DAY: Final = 24 * 60


class _Local(tzinfo):
    """The host's time zone, of which Python otherwise knows only what it is at one time."""

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        if dt is None:
            return None
        bare = dt.replace(tzinfo=None)
        return bare.replace(tzinfo=UTC) - (_EPOCH + timedelta(seconds=bare.timestamp()))

    def dst(self, dt: datetime | None) -> timedelta | None:
        del dt
        return None

    def tzname(self, dt: datetime | None) -> str | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, dt: datetime) -> datetime:
        at = dt.replace(tzinfo=UTC).timestamp()
        return datetime.fromtimestamp(at).replace(tzinfo=self)  # noqa: DTZ006 - that is the point


LOCAL: Final[tzinfo] = _Local()


@dataclass(frozen=True, slots=True)
class Expression:
    """An OnCalendar expression: what it says without its time zone, and that zone (None: the host's)."""

    bare: str
    zone: tzinfo | None = None

    def after(self, when: datetime, zone: tzinfo) -> datetime | None:
        """The first time later than another; None: never."""
        zone = self.zone or zone
        walls = BaseIterator(self.bare, when.astimezone(zone).replace(tzinfo=None, fold=0))
        return next((each for each in _instants(walls, zone) if each > when), None)

    def until(self, when: datetime, zone: tzinfo) -> datetime | None:
        """The last time not later than another; None: there is none since 1970."""
        found = self._some_until(when, zone)
        if found is None:
            return None
        while (following := self.after(found, zone)) is not None and following <= when:
            # Halves what is left, or comes to the end at once.
            later = self.after(following + (when - following) / 2, zone)
            found = later if later is not None and later <= when else following
        return found

    def _some_until(self, when: datetime, zone: tzinfo) -> datetime | None:
        back = timedelta(hours=1)
        while True:
            start = max(_EPOCH, when - back) if back < when - _EPOCH else _EPOCH
            found = self.after(start - _SECOND, zone)
            if found is not None and found <= when:
                return found
            if start == _EPOCH:
                return None
            back *= 8


def parse(text: str) -> Expression:
    """What an expression says, such as `02:30`, `*:00`, `Mon..Fri 20:00` or `02:30 Europe/Riga`.

    Raises:
        UsageError: it is none.
    """
    bare, zone = _parted(text.strip())
    try:
        BaseIterator(bare if len(bare) <= _LONGEST else "", datetime(2026, 1, 1))  # noqa: DTZ001
    except (OnCalendarError, ValueError):
        raise UsageError(
            f"{text!r} is no OnCalendar time.",
            "Write it as systemd does, such as 02:30, *:00 or Mon..Fri 20:00 (see systemd.time(7)).",
        ) from None
    return Expression(bare, zone)


def next_after(expressions: Sequence[str], when: datetime, zone: tzinfo = LOCAL) -> datetime | None:
    """The first time of any of the expressions that is later than `when`; None: never.

    Raises:
        UsageError: one is no expression.
    """
    return min(_some(_each(expressions, lambda each: each.after(when, zone))), default=None)


def last_before(
    expressions: Sequence[str], when: datetime, zone: tzinfo = LOCAL
) -> datetime | None:
    """The last time of any of the expressions that is not later than `when`; None: there is none.

    Raises:
        UsageError: one is no expression.
    """
    return max(_some(_each(expressions, lambda each: each.until(when, zone))), default=None)


def interval(expressions: Sequence[str], when: datetime, zone: tzinfo = LOCAL) -> float | None:
    """Seconds between the times of the expressions that `when` lies between; None: one is missing.

    Raises:
        UsageError: one is no expression.
    """
    first, following = last_before(expressions, when, zone), next_after(expressions, when, zone)
    return None if first is None or following is None else (following - first).total_seconds()


def grace(expressions: Sequence[str], missed: datetime, zone: tzinfo = LOCAL) -> float:
    """Seconds after a missed time from which on a point is too old, where nobody says otherwise: half
    of the interval that begins then, between an hour and twelve.

    Raises:
        UsageError: one is no expression.
    """
    between = interval(expressions, missed, zone) or 24 * _HOUR
    return min(max(between / 2, _HOUR), 12 * _HOUR)


@dataclass(frozen=True, slots=True)
class Window:
    """Hours on some days of the week, in minutes of the day. Where they end before they begin, they go
    on into the day after."""

    days: frozenset[int] = frozenset(range(7))
    start: int = 0
    end: int = _A_DAY

    def holds(self, wall: datetime) -> bool:
        """Whether a time as clocks show it lies in them."""
        day, minute = wall.weekday(), wall.hour * 60 + wall.minute
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        evening = day in self.days and minute >= self.start
        return evening or ((day - 1) % 7 in self.days and minute < self.end)


def parse_window(text: str) -> Window:
    """Hours such as `20:00-06:00`, `Mon..Fri 08:00-18:00` or `Sat,Sun`; empty: always.

    Raises:
        UsageError: it is none.
    """
    left = text.strip()
    days = _SOME_DAYS.match(left)
    chosen = _days(days[0]) if days else frozenset(range(7))
    left = left[days.end() :].strip() if days else left
    times = _TIMES.fullmatch(left)
    if chosen and not left:
        return Window(chosen)
    if chosen and times and not any(int(times[each]) > 59 for each in (2, 4)):
        start, end = (int(times[each]) * 60 + int(times[each + 1]) for each in (1, 3))
        if start < _A_DAY and end <= _A_DAY and start != end:
            return Window(chosen, start, end)
    raise UsageError(
        f"{text!r} is no window of hours.",
        "Write from and to, as in 20:00-06:00, on some days as in Mon..Fri 08:00-18:00.",
    )


def is_within(window: str, when: datetime, zone: tzinfo = LOCAL) -> bool:
    """Whether a time lies in a window, by the host's clock.

    Raises:
        UsageError: it is no window.
    """
    return _window(window).holds(when.astimezone(zone))


_window = lru_cache(maxsize=256)(parse_window)
_expression = lru_cache(maxsize=1024)(parse)


def _parted(text: str) -> tuple[str, tzinfo | None]:
    """An expression's own part, and its time zone."""
    bare, _, last = text.rpartition(" ")
    if not bare or not last[0].isalpha():
        return text, None
    try:
        return bare.strip(), ZoneInfo(last)
    except (OSError, ValueError, LookupError):  # no such zone, or a folder of them
        return text, None


def _each(
    expressions: Iterable[str], ask: Callable[[Expression], datetime | None]
) -> Iterator[datetime | None]:
    return (ask(_expression(each)) for each in expressions)


def _some(times: Iterable[datetime | None]) -> Iterator[datetime]:
    return (each for each in times if each is not None)


def _instants(walls: Iterable[datetime], zone: tzinfo) -> Iterator[datetime]:
    """When clocks show these times, which come in order."""
    return (_instant(each, zone) for each in walls)


def _instant(wall: datetime, zone: tzinfo) -> datetime:
    """When clocks of a zone first show a time; if they never do, when they leap over it."""
    late = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if late.astimezone(zone).replace(tzinfo=None, fold=0) == wall:
        return late
    early = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    before = early.astimezone(zone).utcoffset()
    while late - early > _SECOND:
        middle = early + ((late - early) / 2 // _SECOND or 1) * _SECOND
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late


def _days(text: str) -> frozenset[int]:
    """Days of the week; none where a span ends before it begins as in `Fri..Mon..Sun`."""
    found: set[int] = set()
    for part in text.lower().split(","):
        ends = [_DAYS.index(each[:3]) for each in part.split("..")]
        if len(ends) > 2:
            return frozenset()
        span = (ends[-1] - ends[0]) % 7
        found |= {(ends[0] + each) % 7 for each in range(span + 1)}
    return frozenset(found)
