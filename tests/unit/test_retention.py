# SPDX-License-Identifier: Apache-2.0
"""Policies: which points stay, for which reasons."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import UsageError
from qmpbackup.model import Consistency, Level, Point, VmConfig, VmIdentity
from qmpbackup.plan.retention import UNLIMITED, Duration, Policy, decide, parse_duration

START = datetime(2026, 3, 31, 23, 30, tzinfo=UTC)
NOW = datetime(2026, 4, 1, tzinfo=UTC)


def points(*ages: timedelta) -> list[Point]:
    """Points so long before `START`, called p0, p1, …"""
    vm = VmConfig(VmIdentity(name="vm"), "7.2.22")
    return [
        Point(f"p{number}", 1, START - age, Level.FULL, None, Consistency.CRASH, vm, ())
        for number, age in enumerate(ages)
    ]


def hours(*ages: int) -> list[Point]:
    return points(*(timedelta(hours=age) for age in ages))


def kept(found: list[Point], policy: Policy, **more: dict[str, set[str]]) -> dict[str, list[str]]:
    verdicts = decide(found, policy, NOW, **more)
    return {each.point.id: list(each.reasons) for each in verdicts if each.kept}


def test_the_newest_of_each_day_in_utc() -> None:
    found = hours(0, 1, 23, 24, 25, 50)
    assert kept(found, Policy(daily=2)) == {"p0": ["daily"], "p3": ["daily"]}


def test_the_oldest_stays_while_a_rule_has_places_left() -> None:
    found = hours(0, 1, 2)
    assert kept(found, Policy(daily=2)) == {"p0": ["daily"], "p2": ["oldest daily"]}
    assert kept(found, Policy(daily=1)) == {"p0": ["daily"]}


def test_all_reasons_are_said() -> None:
    found = hours(0, 1)
    assert kept(found, Policy(last=1, hourly=1, yearly=1, within=Duration(hours=1))) == {
        "p0": ["within 1h", "last", "hourly", "yearly"]
    }


def test_unlimited_keeps_one_of_each() -> None:
    found = hours(0, 1, 2, 26, 27, 28, 60, 80)
    assert list(kept(found, Policy(last=UNLIMITED))) == [point.id for point in found]
    assert list(kept(found, Policy(daily=UNLIMITED))) == ["p0", "p3", "p6", "p7"]


def test_weeks_begin_on_monday_and_belong_to_the_year_of_their_thursday() -> None:
    found = points(
        START - datetime(2027, 1, 3, tzinfo=UTC), START - datetime(2026, 12, 28, tzinfo=UTC)
    )
    found.append(points(START - datetime(2026, 12, 27, tzinfo=UTC))[0])
    ids = [each.point.time.day for each in decide(found, Policy(weekly=2), NOW) if each.kept]
    assert ids == [3, 27]


def test_within_reaches_back_from_the_newest_point_that_is_not_in_the_future() -> None:
    found = hours(-48, 0, 23, 24, 25)
    assert list(kept(found, Policy(within=Duration(days=1)))) == ["p0", "p1", "p2"]


def test_a_month_before_the_31st_is_a_day_that_there_is() -> None:
    """31 March less a month is 31 February, which is 3 March: as in Go, and so in restic."""
    assert Duration(months=1).before(START) == START.replace(day=3)
    assert Duration(years=2, hours=1).before(START) == START.replace(year=2024, hour=22)
    assert Duration(years=5000).before(START) is None


def test_tags() -> None:
    found = hours(0, 1, 2, 3)
    tags = {"p1": {"a"}, "p2": {"a", "b"}}
    assert list(kept(found, Policy(tags=(("a",),)), tags=tags)) == ["p1", "p2"]
    assert kept(found, Policy(tags=(("a", "b"),)), tags=tags) == {"p2": ["has tags a,b"]}
    assert list(kept(found, Policy(tags=(("b",), ("",))), tags=tags)) == ["p0", "p2", "p3"]


def test_of_one_time_the_last_counts_as_the_newest() -> None:
    assert list(kept(hours(0, 0, 0), Policy(last=1))) == ["p2"]


def test_what_would_keep_nothing_is_refused() -> None:
    for policy in (Policy(), Policy(tags=(("a",),))):
        with pytest.raises(UsageError):
            decide(hours(0, 1), policy, NOW)
    assert decide([], Policy(last=1), NOW) == ()


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("30d12h", Duration(days=30, hours=12)),
        ("1y5m7d2h", Duration(1, 5, 7, 2)),
        (" 2h ", Duration(hours=2)),
        ("1d2d", Duration(days=2)),
    ],
)
def test_durations(text: str, duration: Duration) -> None:
    assert parse_duration(text) == duration
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize("text", ["", "3", "d", "3w", "-1d", "1d-2h", "1.5h", "1 d", "9999999999d"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


@given(
    st.lists(st.integers(0, 20000), min_size=1, max_size=30),
    st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any),
)
def test_a_policy_keeps_as_many_as_it_says_and_pruning_again_removes_nothing(
    ages: list[int], counts: list[int]
) -> None:
    last, hourly, daily, weekly, monthly, yearly = counts
    policy = Policy(last, hourly, daily, weekly, monthly, yearly)
    verdicts = decide(hours(*ages), policy, NOW)
    left = [each.point for each in verdicts if each.kept]
    assert 0 < len(left) <= sum(counts)
    assert verdicts[0].kept
    again = decide(left, policy, NOW)
    assert all(each.kept for each in again)
