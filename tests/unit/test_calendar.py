# SPDX-License-Identifier: Apache-2.0
"""Times at which something is due: as systemd has them, forwards and backwards, through leaps of clocks."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpbackup.errors import UsageError
from qmpbackup.plan.calendar import (
    LOCAL,
    grace,
    interval,
    is_within,
    last_before,
    next_after,
    parse,
    parse_window,
)

BERLIN = ZoneInfo("Europe/Berlin")
GOOD = (
    "02:30", "*:00", "*:0/15", "hourly", "daily", "weekly", "monthly", "quarterly", "Mon..Fri 20:00",
    "Sat,Sun 03:15:30", "Mon *-*-1..7 04:00", "*-*~1 22:00", "*-02-29 01:00", "2027..2029-06-01",
    "*-*-1,15 12:30", "Wed, 17:48", "*-*-* 00/6:20", "*:*:0/20", "Sun 2026-11-01..20 05:05",
)  # fmt: skip
BAD = (
    "25:00", "", " ", "02:60", "soon", "Mon..", "*-13-01", "02:30 Europe", "02:30 Nowhere/City",
    "02:30 ..", "1:2:3:4", "a" * 5000, "Mon" + "," * 5000, "02:30\n03:30", "٣:00",
)  # fmt: skip
TIMES = st.datetimes(datetime(2026, 1, 1), datetime(2031, 12, 31)).map(  # noqa: DTZ001
    lambda each: each.replace(microsecond=0, tzinfo=UTC)
)


def at(text: str, zone: ZoneInfo | None = None) -> datetime:
    """A time as text says it, in UTC or a zone."""
    return datetime.fromisoformat(text).replace(tzinfo=zone or UTC)


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's clock shows Berlin's time."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_time_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="is no OnCalendar time"):
        parse(text)


@given(st.text(alphabet="0123456789:*-~/.,MonTueFri UTC/\x00", max_size=30))
def test_any_text_is_a_time_or_none(text: str) -> None:
    try:
        parse(text)
    except UsageError:
        return
    next_after([text], at("2026-11-25 12:00"))


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"])
@pytest.mark.parametrize("when", ["2026-11-25 12:00:00", "2027-02-28 23:59:59", "2028-02-29 01:00"])
def test_the_next_time_is_systemds(when: str, zone: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there to compare with.")
    said = subprocess.run(
        ["systemd-analyze", "calendar", f"--base-time={when}", *GOOD],
        env={**os.environ, "TZ": zone, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n\n")
    for expression, part in zip(GOOD, said, strict=True):
        found = re.search(r"(?:Next elapse|\(in UTC\)): \w+ (.*) UTC$", part, re.MULTILINE)
        assert found or "Next elapse: never" in part
        ours = next_after([expression], at(when, ZoneInfo(zone)), ZoneInfo(zone))
        assert ours == (at(found[1]) if found else None), expression


@settings(max_examples=40)
@given(st.lists(st.sampled_from(GOOD), min_size=1, max_size=3), TIMES)
def test_the_last_time_is_the_one_that_the_next_comes_after(
    expressions: list[str], when: datetime
) -> None:
    for zone in (ZoneInfo("UTC"), BERLIN):
        following = next_after(expressions, when, zone)
        last = last_before(expressions, when, zone)
        assert following is None or following > when
        if last is not None:
            assert last <= when
            assert next_after(expressions, last, zone) == following
            assert last_before(expressions, last, zone) == last


@settings(max_examples=40)
@given(st.integers(-3 * 3600, 3 * 3600), st.sampled_from(["*:0/20", "02:30", "*:*:0/50"]))
@pytest.mark.parametrize("leap", ["2026-03-29 01:00", "2026-10-25 01:00"])
def test_no_time_is_lost_or_comes_twice_where_clocks_leap(
    leap: str, seconds: int, expression: str
) -> None:
    when = at(leap) + timedelta(seconds=seconds)
    following, last = (
        next_after([expression], when, BERLIN),
        last_before([expression], when, BERLIN),
    )
    assert following is not None
    assert last is not None
    assert last <= when < following
    assert next_after([expression], last, BERLIN) == following
    assert last_before([expression], following - timedelta(seconds=1), BERLIN) == last


def test_a_time_that_clocks_leap_over_comes_where_they_land() -> None:
    before = at("2026-03-28 12:00", BERLIN)
    assert next_after(["02:30"], before, BERLIN) == at("2026-03-29 01:00")
    assert next_after(["02:30"], at("2026-03-29 01:00"), BERLIN) == at("2026-03-30 00:30")
    assert last_before(["02:30"], at("2026-03-29 12:00"), BERLIN) == at("2026-03-29 01:00")


def test_an_hour_that_comes_twice_counts_once() -> None:
    assert next_after(["02:30"], at("2026-10-24 12:00"), BERLIN) == at("2026-10-25 00:30")
    assert next_after(["02:30"], at("2026-10-25 00:30"), BERLIN) == at("2026-10-26 01:30")
    assert last_before(["*:00"], at("2026-10-25 01:45"), BERLIN) == at("2026-10-25 00:00")


def test_a_whole_day_that_was_leapt_over() -> None:
    apia = ZoneInfo("Pacific/Apia")
    assert next_after(["12:00"], at("2011-12-29 12:30", apia), apia) == at("2011-12-30 10:00")


@pytest.mark.usefixtures("in_berlin")
def test_times_are_those_of_the_host_unless_they_say_otherwise() -> None:
    when = at("2026-07-01 00:00")
    assert next_after(["02:30"], when) == at("2026-07-01 00:30")
    assert next_after(["02:30 UTC"], when) == at("2026-07-01 02:30")
    assert next_after(["02:30 America/New_York"], when) == at("2026-07-01 06:30")
    assert next_after(["02:30"], at("2026-03-28 12:00")) == at("2026-03-29 01:00")
    assert last_before(["*:00"], at("2026-10-25 01:45")) == at("2026-10-25 00:00")


@pytest.mark.usefixtures("in_berlin")
@given(TIMES)
def test_the_hosts_zone_is_python_s_own(when: datetime) -> None:
    assert when.astimezone(LOCAL).replace(tzinfo=None) == when.astimezone(BERLIN).replace(
        tzinfo=None
    )
    assert when.astimezone(LOCAL).astimezone(UTC) == when


def test_the_earliest_and_the_latest_of_several() -> None:
    several, when = ["02:30", "14:00", "Sun 12:00"], at("2026-11-25 12:00")
    utc = ZoneInfo("UTC")
    assert next_after(several, when, utc) == at("2026-11-25 14:00")
    assert last_before(several, when, utc) == at("2026-11-25 02:30")
    assert next_after([], when, utc) is last_before([], when, utc) is None


def test_a_time_of_the_schedule_itself_has_come() -> None:
    utc = ZoneInfo("UTC")
    assert last_before(["02:30"], at("2026-11-25 02:30"), utc) == at("2026-11-25 02:30")
    assert next_after(["02:30"], at("2026-11-25 02:30"), utc) == at("2026-11-26 02:30")


def test_what_never_comes_is_told() -> None:
    when = at("2026-11-25 12:00")
    assert next_after(["2020-01-01"], when) is None
    assert next_after(["02-30"], when) is None
    assert last_before(["2030-01-01"], when) is None
    assert interval(["2020-01-01"], when) is None


def test_a_distant_past_is_found_at_once() -> None:
    utc = ZoneInfo("UTC")
    assert last_before(["2001-01-01"], at("2026-11-25 12:00"), utc) == at("2001-01-01 00:00")
    assert last_before(["Mon *:*:*"], at("2026-11-25 12:00"), utc) == at("2026-11-23 23:59:59")


def test_grace_is_half_the_interval_between_an_hour_and_twelve() -> None:
    utc, when = ZoneInfo("UTC"), at("2026-11-25 12:00")  # a Wednesday
    assert grace(["02:30"], when, utc) == 12 * 3600
    assert grace(["*:0/15"], when, utc) == 3600
    assert grace(["00/6:00"], when, utc) == 3 * 3600
    assert interval(["Mon..Fri 02:30"], at("2026-11-28 12:00"), utc) == 3 * 86400


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("20:00-06:00", ["25 20:00", "25 23:59", "26 00:00", "26 05:59"], ["25 19:59", "26 06:00"]),
        ("08:00-18:00", ["25 08:00", "25 17:59"], ["25 18:00", "25 07:59"]),
        ("Mon..Fri 08:00-18:00", ["25 12:00", "27 08:00"], ["28 12:00", "29 12:00", "25 18:00"]),
        ("Fri 20:00-06:00", ["27 21:00", "28 05:00"], ["27 05:00", "28 21:00"]),
        ("Sat..Mon 22:00-24:00", ["28 22:00", "29 23:59", "30 23:00"], ["27 23:00", "30 00:00"]),
        ("Saturday,Sun", ["28 00:00", "29 23:59"], ["27 23:59", "30 00:00"]),
        ("", ["25 00:00", "29 12:00"], []),
    ],
)
def test_hours_of_the_day_and_week(window: str, inside: list[str], outside: list[str]) -> None:
    for times, expected in ((inside, True), (outside, False)):
        for each in times:
            assert is_within(window, at(f"2026-11-{each}", BERLIN), BERLIN) is expected, each


@pytest.mark.parametrize(
    "text",
    ["20:00", "20:00-20:00", "25:00-06:00", "20:60-06:00", "Mon..Tue..Wed 08:00-09:00", "night",
     "Mon 08:00", "24:00-06:00", "20:00-24:01", "Monday-Friday"],
)  # fmt: skip
def test_what_is_no_window_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="is no window of hours"):
        parse_window(text)
