# SPDX-License-Identifier: Apache-2.0
"""What is due, and which of it is next: decided from values alone."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.fleet.records import Attempt, Holding, Work
from qmpbackup.fleet.run.choosing import Reach, again, choose
from qmpbackup.fleet.run.due import (
    AGAIN_AFTER,
    Duty,
    Past,
    backup_due,
    is_time,
    is_to_be_proved,
    wants_full,
)
from qmpbackup.fleet.settings import DAY, HOUR, RunSettings, SweepPolicy, TargetSettings, VmSettings

NOW = datetime(2026, 11, 3, 12, 0, tzinfo=UTC)
NIGHT = datetime(2026, 11, 3, 2, 30, tzinfo=UTC)
TARGET = TargetSettings("main", "/backup/{vm}")
VM = VmSettings("db1", "/run/db1.qmp", targets=("main",), schedule=("02:30 UTC",))
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2033, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def attempt(started: datetime, code: int | None = 0) -> Attempt:
    ended = started + timedelta(minutes=1) if code is not None else None
    return Attempt(Work.BACKUP, "db1", "main", "run", started, ended, code)


def is_due(last: Attempt | None, failures: int = 0, now: datetime = NOW, **of: object) -> bool:
    holding = Holding("db1", "main", NOW, **of) if of else None  # type: ignore[arg-type]
    return backup_due(VM, TARGET, Past(last, failures, holding=holding), now) is not None


def test_a_time_that_has_passed_since_the_last_start_makes_it_due() -> None:
    assert is_due(attempt(NIGHT - timedelta(days=1)))
    assert not is_due(attempt(NIGHT + timedelta(minutes=5)))
    assert not is_due(attempt(NIGHT + timedelta(minutes=5), code=4))
    assert is_due(attempt(NIGHT - timedelta(days=30)))


def test_a_vm_without_any_point_or_attempt_is_due_at_once() -> None:
    assert is_due(None)


def test_without_a_history_the_newest_point_counts() -> None:
    assert not is_due(None, newest=NIGHT + timedelta(minutes=1))
    assert is_due(None, newest=NIGHT - timedelta(minutes=1))


def test_a_point_that_came_after_all_that_was_noted_counts() -> None:
    """As where the history can be read and not be written."""
    for code in (0, 7, -9):
        old = attempt(NIGHT - timedelta(days=9), code)
        assert not is_due(old, 1, newest=NIGHT + timedelta(minutes=1))
        assert is_due(old, 1, newest=NIGHT - timedelta(days=1))


def test_what_is_dated_into_the_future_counts_for_nothing() -> None:
    """As after a clock that was a month ahead and was set right."""
    ahead = NOW + timedelta(days=31)
    assert is_due(attempt(ahead))
    assert is_due(attempt(ahead), newest=ahead)
    assert not is_due(attempt(ahead), newest=NIGHT + timedelta(minutes=1))


def test_vms_that_are_not_enabled_or_have_no_schedule_are_backed_up_by_hand_only() -> None:
    for vm in (replace(VM, enabled=False), replace(VM, schedule=())):
        assert backup_due(vm, TARGET, Past(), NOW) is None
        assert backup_due(vm, TARGET, Past(), NOW, asked=True) is not None


@pytest.mark.parametrize("code", [7, 10, 12, -9, 143])
def test_what_the_target_or_a_kill_ended_is_due_again_soon(code: int) -> None:
    last = attempt(NOW - timedelta(minutes=15), code)
    assert is_due(last, 1)
    assert not is_due(attempt(NOW - timedelta(minutes=5), code), 1)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 13])
def test_all_else_waits_for_its_next_time(code: int) -> None:
    assert not is_due(attempt(NOW - timedelta(hours=8), code), 1)


def test_the_pause_doubles_with_each_failure_up_to_a_bound() -> None:
    last = attempt(NOW - timedelta(hours=1), 7)
    assert is_due(last, 1)
    assert is_due(last, 3)
    assert not is_due(last, 4)
    assert is_due(attempt(NOW - timedelta(hours=6, minutes=1), 7), 1000)


@given(st.lists(MOMENTS, min_size=1, max_size=5))
def test_whatever_the_clock_does_nothing_is_begun_twice_for_one_time(
    moments: list[datetime],
) -> None:
    """Once it was begun at some moment, it is not due at that moment any more."""
    last = None
    for now in moments:
        if backup_due(VM, TARGET, Past(last), now) is not None:
            last = attempt(now)
        assert backup_due(VM, TARGET, Past(last), now) is None


def test_the_most_overdue_in_its_own_measure_goes_first() -> None:
    hourly = replace(VM, name="db2", schedule=("*:00 UTC",))
    late = backup_due(hourly, TARGET, Past(attempt(NOW - timedelta(hours=6))), NOW)
    later = backup_due(VM, TARGET, Past(attempt(NOW - timedelta(days=2))), NOW)
    assert late
    assert later
    assert choose([later, late], (), RunSettings(), NOW) is late


def duty(vm: str, work: Work = Work.BACKUP, target: TargetSettings = TARGET, **of: object) -> Duty:
    return Duty(work, target, replace(VM, name=vm), **of)  # type: ignore[arg-type]


def test_limits_of_host_and_target_are_kept() -> None:
    many, narrow = RunSettings(parallel=4), replace(TARGET, parallel=1)
    assert choose([duty("a")], [duty("b")], RunSettings(parallel=1), NOW) is None
    assert choose([duty("a", target=narrow)], [duty("b", target=narrow)], many, NOW) is None
    assert choose([duty("a")], [duty("b")], many, NOW) is not None
    other = TargetSettings("other", "/x")
    assert choose([duty("a", target=other)], [duty("a")], many, NOW) is None, "one run a VM"


def test_one_slot_is_left_for_what_is_short() -> None:
    two = RunSettings(parallel=2)
    long = duty("a", is_long=True, urgency=9.0)
    assert choose([long], [duty("b", is_long=True)], two, NOW) is None
    assert choose([long, duty("c")], [duty("b", is_long=True)], two, NOW) == duty("c")
    assert choose([long], [], RunSettings(parallel=1), NOW) is long


def test_a_sweep_shares_its_target_with_nobody_and_keeps_its_window() -> None:
    two = RunSettings(parallel=2)
    sweep = duty("a", Work.SWEEP)
    assert choose([sweep], [duty("b")], two, NOW) is None
    assert choose([duty("b")], [sweep], two, NOW) is None
    assert choose([sweep], [], two, NOW) is sweep
    night = replace(TARGET, sweep=SweepPolicy(window="00:00-00:01"))
    local_noon = datetime(2026, 11, 3, 12, 0).astimezone()
    assert choose([duty("a", Work.SWEEP, night)], [], two, local_noon) is None


def test_outside_of_the_window_nothing_is_begun_unless_somebody_asks() -> None:
    run = RunSettings(window="00:00-00:01")
    local_noon = datetime(2026, 11, 3, 12, 0).astimezone()
    assert choose([duty("a")], [], run, local_noon) is None
    assert choose([duty("a")], [], run, local_noon, asked=True) is not None


@pytest.mark.parametrize(("code", "is_tried"), [(5, True), (6, True), (7, True), (11, True), (4, False), (8, False), (13, False)])  # fmt: skip
def test_only_what_may_pass_is_tried_again_after_all_others(code: int, is_tried: bool) -> None:
    second = again(duty("a", urgency=9.0), code, 1000.0)
    assert (second is not None) == is_tried
    if second is not None:
        run, later = RunSettings(), 1600.0
        assert choose([second], [], run, NOW, 1599.0) is None
        assert choose([second], [], run, NOW, later) is second
        assert choose([second, duty("b")], [], run, NOW, later) == duty("b")
        third = again(second, code, later)
        assert third is not None
        assert again(third, code, later) is None


def test_a_clock_that_is_set_holds_up_no_second_try() -> None:
    second = again(duty("a"), 7, 1000.0)
    assert second
    assert choose([second], [], RunSettings(), NOW - timedelta(days=30), 1600.0) is second


def test_a_target_that_two_vms_in_a_row_cannot_use_is_given_up() -> None:
    reach = Reach()
    reach.note(duty("a"), 7, "It is gone.")
    reach.note(duty("a"), 7, "It is gone.")
    assert not reach.given_up, "one VM's own fault, maybe"
    reach.note(duty("b"), 0, "")
    reach.note(duty("c"), 7, "It is gone.")
    assert not reach.given_up
    reach.note(duty("d"), 12, "It is gone.")
    assert reach.given_up == {"main": "It is gone."}


@pytest.mark.parametrize("code", [6, 11, 13, 143, -9])
def test_what_never_came_to_the_target_is_no_sign_that_it_works(code: int) -> None:
    """As where every other VM is off."""
    reach = Reach()
    reach.note(duty("a"), 7, "It is gone.")
    reach.note(duty("b"), code, "")
    reach.note(duty("c"), 7, "It is gone.")
    assert reach.given_up == {"main": "It is gone."}


def test_points_are_proved_every_so_often_where_there_are_any() -> None:
    holding = Holding("db1", "main", NOW, newest=NIGHT, points=3)
    assert is_to_be_proved(DAY, None, holding, NOW)
    assert not is_to_be_proved(0.0, None, holding, NOW)
    assert not is_to_be_proved(DAY, None, None, NOW)
    assert not is_to_be_proved(DAY, None, replace(holding, problem="It is gone."), NOW)
    assert not is_to_be_proved(DAY, attempt(NOW - timedelta(hours=23)), holding, NOW)
    assert is_to_be_proved(DAY, attempt(NOW - timedelta(hours=25)), holding, NOW)


def test_what_did_not_come_to_its_end_is_begun_again_sooner() -> None:
    assert is_time(DAY, attempt(NOW - AGAIN_AFTER, -9), NOW)
    assert is_time(DAY, attempt(NOW - timedelta(hours=6), 7), NOW)
    assert not is_time(DAY, attempt(NOW - timedelta(hours=6), 8), NOW)
    assert is_time(DAY, attempt(NOW + timedelta(days=9)), NOW)


def test_a_full_is_wanted_when_the_last_is_too_old() -> None:
    vm = replace(VM, full_every=90 * DAY)
    assert not wants_full(VM, None, NOW)
    assert wants_full(vm, None, NOW)
    assert not wants_full(vm, attempt(NOW - timedelta(days=89)), NOW)
    assert wants_full(vm, attempt(NOW - timedelta(days=90)), NOW)
    assert HOUR * 24 == DAY
