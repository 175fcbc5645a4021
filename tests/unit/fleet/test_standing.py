# SPDX-License-Identifier: Apache-2.0
"""How a VM is protected is told by the age of its newest good point, and by nothing that runs say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as some

from qmpbackup.fleet.records import OFFLINE, Attempt, Holding, Work
from qmpbackup.fleet.settings import DAY, HOUR, VmSettings, WhenOff
from qmpbackup.fleet.standing import LONGEST_RUN, Facts, Severity, State, judged, worst

UTC_NIGHTLY = ("02:30 UTC",)
VM = VmSettings("db1", "/run/qemu/db1.qmp", schedule=UTC_NIGHTLY)
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
LAST_NIGHT = datetime(2026, 11, 25, 2, 31, tzinfo=UTC)
BEFORE = LAST_NIGHT - timedelta(days=1)
HOLDING = Holding("db1", "main", NOW, LAST_NIGHT, "p1", "agent", 23)
DONE = Attempt(Work.BACKUP, "db1", "main", "r", LAST_NIGHT, LAST_NIGHT + timedelta(seconds=9), 0)
WELL = Facts(VM, "main", HOLDING, DONE, first_seen=BEFORE)


def failed(code: int, reason: str = "Cannot write data/3f: the server says 503.") -> Attempt:
    return replace(DONE, exit_code=code, reason=reason)


def with_newest(newest: datetime | None, **changes: Any) -> Facts:
    points = 23 if newest else 0
    return replace(WELL, holding=replace(HOLDING, newest=newest, points=points), **changes)


def lying(newest: datetime | None) -> Facts:
    """A VM whose images were backed up 100 days ago, when it went off."""
    began = NOW - timedelta(days=100)
    facts = with_newest(newest, is_off=True, vm=replace(VM, when_off=WhenOff.OFFLINE))
    return replace(
        facts,
        as_it_lies=replace(DONE, started=began, consistency=OFFLINE),
        first_seen=NOW - timedelta(days=200),
    )


@pytest.mark.parametrize(
    ("facts", "state", "said"),
    [
        (WELL, State.OK, ""),
        (replace(WELL, last=None), State.OK, ""),  # a deleted history makes nobody unwell
        (with_newest(BEFORE), State.DUE, ""),
        (with_newest(BEFORE - timedelta(days=1)), State.LATE, "2 d 9 h old"),
        (with_newest(None, first_seen=NOW), State.DUE, "no point yet"),
        (with_newest(None, first_seen=BEFORE - timedelta(days=2)), State.LATE, "no point"),
        (with_newest(None, first_seen=None, last=None), State.LATE, "is the timer enabled"),
        (with_newest(None, vm=replace(VM, schedule=("2020-01-01",))), State.LATE, "will ever come"),
        (with_newest(BEFORE, vm=replace(VM, schedule=("2020-01-01",))), State.OK, ""),
        (replace(WELL, last=failed(7), failures=1), State.FAILED, "503"),
        (replace(WELL, last=failed(7, ""), failures=1), State.FAILED, "Exit code 7"),
        (
            with_newest(BEFORE - timedelta(days=1), last=failed(7), failures=4),
            State.LATE,
            "503",
        ),
        (replace(WELL, last=failed(3, "It stood still for 3 s.")), State.DEGRADED, "3 s"),
        (replace(WELL, last=replace(DONE, ended=None, exit_code=None)), State.RUNNING, ""),
        (
            with_newest(
                BEFORE - timedelta(days=1),
                last=replace(DONE, ended=None, exit_code=None, started=NOW - timedelta(hours=1)),
            ),
            State.RUNNING,
            "",
        ),
        (
            with_newest(
                BEFORE - timedelta(days=4),
                last=replace(DONE, ended=None, exit_code=None, started=NOW - LONGEST_RUN),
            ),
            State.LATE,
            "old",
        ),
        (
            with_newest(
                BEFORE - timedelta(days=4),
                last=replace(DONE, ended=None, exit_code=None, started=NOW - timedelta(hours=1)),
                failures=1,
            ),
            State.LATE,
            "old",
        ),
        (replace(WELL, holding=None), State.UNKNOWN, "looked"),
        (
            replace(WELL, holding=replace(HOLDING, problem="No route to host.")),
            State.UNKNOWN,
            "No route",
        ),
        (
            replace(WELL, holding=replace(HOLDING, damaged=1)),
            State.DAMAGED,
            "1 point is damaged",
        ),
        (
            replace(WELL, verified=replace(failed(8, "vda: 3f"), work=Work.VERIFY)),
            State.DAMAGED,
            "vda: 3f",
        ),
        (
            replace(WELL, drilled=replace(failed(1, "No login."), work=Work.DRILL)),
            State.DEGRADED,
            "The last drill failed: No login.",
        ),
        (replace(WELL, holding=replace(HOLDING, ahead=2)), State.DEGRADED, "from the future"),
        (replace(WELL, is_off=True), State.OFF, ""),
        (with_newest(NOW - timedelta(days=11), is_off=True), State.OFF, ""),
        (with_newest(NOW - timedelta(days=31), is_off=True), State.LATE, "It is off"),
        (
            replace(WELL, is_off=True, vm=replace(VM, when_off=WhenOff.FAIL)),
            State.FAILED,
            "It is off",
        ),
        (
            with_newest(
                NOW - timedelta(days=99), is_off=True, vm=replace(VM, when_off=WhenOff.OFFLINE)
            ),
            State.LATE,  # as it ran after its last backup
            "It is off",
        ),
        (lying(NOW - timedelta(days=99)), State.OFF, ""),
        (replace(lying(NOW - timedelta(days=99)), last=failed(13)), State.OFF, ""),
        (lying(NOW - timedelta(days=101)), State.LATE, "It is off"),  # that point was removed
        (lying(None), State.LATE, "There is no point"),
        (with_newest(NOW - timedelta(days=999), vm=replace(VM, schedule=("",))), State.OK, ""),
        (with_newest(None, vm=replace(VM, schedule=())), State.DUE, "no point yet"),
    ],
)
def test_a_vm_stands_as_its_newest_point_says(facts: Facts, state: State, said: str) -> None:
    found = judged(facts, NOW)
    assert found.state is state
    assert said in found.why
    assert bool(found.why) == bool(said)


def test_a_point_is_too_old_after_the_next_time_and_the_grace() -> None:
    assert judged(WELL, NOW).deadline == datetime(2026, 11, 26, 14, 30, tzinfo=UTC)
    hourly = replace(WELL, vm=replace(VM, schedule=("*:00 UTC",)))
    assert judged(hourly, NOW).deadline == datetime(2026, 11, 25, 4, 0, tzinfo=UTC)
    strict = replace(WELL, vm=replace(VM, grace=0.0))
    assert judged(strict, NOW).deadline == datetime(2026, 11, 26, 2, 30, tzinfo=UTC)
    assert judged(WELL, NOW).next_time == datetime(2026, 11, 26, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("state", "failures", "severity"),
    [
        (State.OK, 0, Severity.OK),
        (State.DUE, 0, Severity.OK),
        (State.RUNNING, 0, Severity.OK),
        (State.OFF, 0, Severity.OK),
        (State.DEGRADED, 0, Severity.WARNING),
        (State.FAILED, 1, Severity.WARNING),
        (State.UNCOVERED, 0, Severity.WARNING),
        (State.INVALID, 0, Severity.WARNING),
        (State.FAILED, 2, Severity.CRITICAL),
        (State.LATE, 0, Severity.CRITICAL),
        (State.DAMAGED, 0, Severity.CRITICAL),
        (State.UNKNOWN, 0, Severity.UNKNOWN),
    ],
)
def test_states_matter_as_nagios_has_it(state: State, failures: int, severity: Severity) -> None:
    standing = replace(judged(WELL, NOW), state=state, facts=replace(WELL, failures=failures))
    assert standing.severity is severity


def test_what_is_known_to_be_bad_goes_before_what_nobody_knows() -> None:
    assert worst(frozenset(Severity)) is Severity.CRITICAL
    assert worst(frozenset(Severity) - {Severity.CRITICAL}) is Severity.UNKNOWN
    assert worst(frozenset({Severity.OK, Severity.WARNING})) is Severity.WARNING
    assert worst(frozenset()) is Severity.OK
    assert [each.exit_code for each in Severity] == [0, 1, 2, 3]


TIMES = some.integers(0, 10 * 365 * 86400).map(
    lambda seconds: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
)
CODES = some.sampled_from([None, 0, 1, 3, 5, 6, 7, 8, 11, 13, 143, -9])


@some.composite
def anything(draw: some.DrawFn) -> Facts:
    started = draw(TIMES)
    code = draw(CODES)
    last = draw(
        some.none()
        | some.just(replace(DONE, started=started, exit_code=code, ended=started if code else None))
    )
    newest = draw(some.none() | TIMES)
    holding = replace(
        HOLDING,
        newest=newest,
        problem=draw(some.sampled_from(["", "", "It does not open."])),
        damaged=draw(some.sampled_from([0, 0, 0, 1])),
        ahead=draw(some.sampled_from([0, 0, 1])),
    )
    vm = replace(
        VM,
        schedule=draw(some.sampled_from([UTC_NIGHTLY, ("*:00 UTC",), ("Sat 03:00 UTC",), ()])),
        grace=draw(some.sampled_from([None, 0.0, HOUR])),
        when_off=draw(some.sampled_from(list(WhenOff))),
        off_age=30 * DAY,
    )
    return Facts(
        vm,
        "main",
        draw(some.none() | some.just(holding)),
        last,
        draw(some.integers(0, 5)) if last else 0,
        first_seen=draw(some.none() | TIMES),
        is_off=draw(some.booleans()),
        as_it_lies=draw(some.none() | some.just(last)),
    )


@given(anything(), TIMES)
def test_nobody_is_well_whose_point_is_too_old(facts: Facts, now: datetime) -> None:
    """The one promise: behind the deadline there is an alarm, unless a backup goes on."""
    found = judged(facts, now)
    if found.deadline is not None and now > found.deadline:
        goes_on = facts.last is not None and facts.last.exit_code is None
        excused = {State.RUNNING} if goes_on else set()
        assert found.state in {State.LATE, State.DAMAGED} | excused
    if found.state is State.OK:
        assert facts.holding is not None
        assert facts.holding.newest is not None
        assert not facts.holding.problem


@given(anything(), TIMES)
def test_a_success_that_left_no_point_makes_nobody_well(facts: Facts, now: datetime) -> None:
    """However history says it went, a VM that was late stays late until its point is there."""
    before = judged(replace(facts, is_off=False), now)
    success = replace(DONE, started=now, ended=now, exit_code=0)
    after = judged(replace(facts, is_off=False, last=success, failures=0), now)
    if before.state is State.LATE:
        assert after.state is State.LATE


@given(anything(), TIMES, some.timedeltas(timedelta(0), timedelta(days=400)))
def test_lateness_comes_with_time_and_does_not_go_with_it(
    facts: Facts, now: datetime, later: timedelta
) -> None:
    assume(facts.first_seen is None or facts.first_seen <= now)  # or a clock was wrong
    if judged(facts, now).state in {State.LATE, State.DAMAGED}:
        assert judged(facts, now + later).state in {State.LATE, State.DAMAGED}


@given(anything(), TIMES)
def test_a_newer_point_makes_nobody_late(facts: Facts, now: datetime) -> None:
    if facts.holding is None or facts.holding.problem or not facts.vm.schedule:
        return
    fresh = replace(facts, holding=replace(facts.holding, newest=now, damaged=0))
    assert judged(fresh, now).state is not State.LATE
