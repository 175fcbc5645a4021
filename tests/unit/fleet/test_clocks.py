# SPDX-License-Identifier: Apache-2.0
"""Clocks that leap: night after night runs decide what is due, make points and judge, while the clock does
what it likes. No time of the schedule is done twice, none is left out, and a clock that was wrong leaves
nobody well for ever.

The runs are those of the product but for their commands, which take no time here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from qmpbackup.fleet.history import History
from qmpbackup.fleet.looking import Sightings, in_order
from qmpbackup.fleet.records import Attempt, Holding, Work
from qmpbackup.fleet.run.agenda import Agenda
from qmpbackup.fleet.settings import Configuration, TargetSettings, VerifyPolicy, VmSettings
from qmpbackup.fleet.standing import Severity, Standing, State
from qmpbackup.fleet.survey import judge
from qmpbackup.targets.overview import is_ahead

BERLIN = ZoneInfo("Europe/Berlin")
DAY = timedelta(days=1)
OFTEN, SELDOM = timedelta(hours=1), timedelta(hours=6)
KEPT = 40 * DAY
"""For how long the history is kept."""


@dataclass
class Host:
    """A host with one VM, whose clock shows `now`."""

    history: History
    vm: VmSettings
    now: datetime
    points: list[datetime] = field(default_factory=list)
    """When each was made, by the clock, in the order in which they were made."""

    @property
    def configuration(self) -> Configuration:
        target = TargetSettings("main", "/backup", verify=VerifyPolicy(every=0.0))
        return Configuration(vms=(self.vm,), targets=(target,))

    @property
    def holding(self) -> Holding:
        """What is seen in the target."""
        past = [each for each in self.points if not is_ahead(each, self.now)]
        newest = max(past, default=None)
        ahead = len(self.points) - len(past)
        newest_id = f"{self.points.index(newest)}" if newest else ""
        seen = Holding("db1", "main", self.now, newest, newest_id, "", len(self.points))
        last = self.history.last("db1", "main", Work.BACKUP, succeeded=True)
        return in_order(replace(seen, ahead=ahead), self.history, last)

    def run(self) -> int:
        """One run of the timer; gives how many backups it made."""
        self.history.resume(self.now)
        self.history.know("", ["db1"], self.now)
        due = Agenda(self.configuration, self.history, {("db1", "main"): self.holding})
        duties = due.plan(self.now)
        for duty in duties:
            attempt = Attempt(duty.work, "db1", "main", "r", self.now, self.now, 0)
            self.history.begin(replace(attempt, point=f"{len(self.points)}"))
            self.points.append(self.now)
        self.history.forget_before(self.now - KEPT)
        self.history.alive(self.now)
        return len(duties)

    def live(self, span: timedelta, every: timedelta = SELDOM) -> int:
        """Runs of the timer, while time goes by; gives how many backups they made."""
        end, made = self.now + span, 0
        while self.now < end:
            made += self.run()
            self.now += every
        return made

    def stands(self) -> Standing:
        seen = Sightings((self.holding,))
        return judge(self.configuration, self.history, seen, self.now).standings[0]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    socket = tmp_path / "db1.qmp"
    socket.touch()
    vm = VmSettings(
        "db1", str(socket), targets=("main",), schedule=("02:30 Europe/Berlin",), enabled=True
    )
    with History.opened(tmp_path / "state") as history:
        yield Host(history, vm, datetime(2026, 10, 20, 12, 0, tzinfo=UTC))


@pytest.mark.parametrize("day", [datetime(2026, 10, 25), datetime(2027, 3, 28)])  # noqa: DTZ001
@pytest.mark.parametrize("schedule", ["02:30", "*-*-* 01:59"])
def test_each_day_has_one_backup_where_clocks_are_put_on_and_back(
    host: Host, day: datetime, schedule: str
) -> None:
    host.vm = VmSettings(
        "db1", host.vm.socket, targets=("main",), schedule=(f"{schedule} Europe/Berlin",)
    )
    host.now = (day - 2 * DAY).replace(hour=12, tzinfo=BERLIN).astimezone(UTC)
    host.live(4 * DAY, OFTEN)
    days = Counter(each.astimezone(BERLIN).date() for each in host.points[1:])
    assert set(days.values()) == {1}
    assert len(days) == 4
    assert host.stands().state is State.OK


def test_a_clock_that_was_a_month_ahead_is_warned_of_and_nights_go_on(host: Host) -> None:
    host.live(2 * DAY)
    host.now += 30 * DAY
    assert host.live(2 * DAY) == 3, "what was missed is made up once"
    host.now -= 30 * DAY
    assert host.stands().state is State.LATE, "what was made meanwhile protects nobody"
    assert host.run() == 1
    assert host.stands().state is State.DEGRADED
    assert "3 points are from the future" in host.stands().why
    for _ in range(5):
        assert host.live(DAY) == 1
        assert host.stands().state is State.DEGRADED


def test_a_clock_that_goes_back_leaves_no_night_out_while_old_points_come_true(host: Host) -> None:
    host.live(12 * DAY)
    host.now -= 8 * DAY
    assert host.run() == 1, "which night that was, nobody knows any more"
    assert [host.live(DAY) for _ in range(6)] == [1] * 6
    assert host.stands().state is State.DEGRADED
    assert [host.live(DAY) for _ in range(5)] == [1] * 5
    assert host.stands().state is State.OK


def test_a_point_of_the_next_year_helps_nobody_when_its_time_has_come(host: Host) -> None:
    host.live(2 * DAY)
    host.now += 365 * DAY
    host.run()
    host.now -= 365 * DAY
    host.live(DAY)
    host.now += 365 * DAY - timedelta(hours=1)
    assert host.stands().state is State.LATE
    assert host.run() == 1
    assert host.stands().state is State.OK


def test_points_of_the_next_year_leave_nobody_well_when_no_run_comes_any_more(host: Host) -> None:
    host.live(5 * DAY)
    host.now += 365 * DAY
    host.run()
    host.now -= 365 * DAY
    host.live(DAY)
    host.now += 2 * DAY
    assert host.stands().state is State.LATE
    assert host.stands().severity is Severity.CRITICAL


def test_a_vm_that_was_first_seen_in_the_next_year_is_late_without_a_point(host: Host) -> None:
    host.now += 365 * DAY
    host.history.know("", ["db1"], host.now)
    host.now -= 365 * DAY
    found = [host.stands().state]
    host.history.know("", ["db1"], host.now)
    found.append(host.stands().state)
    host.now += 3 * DAY
    found.append(host.stands().state)
    assert found == [State.LATE, State.DUE, State.LATE]


def test_a_vm_that_is_off_stays_known_over_a_leap_of_years(host: Host) -> None:
    host.history.know("all", ["off"], host.now)
    host.live(5 * DAY)
    host.now += 3 * 365 * DAY
    host.live(DAY)
    assert host.history.known_vms()["all"] == ("off",)
    host.now -= 3 * 365 * DAY
    host.live(DAY)
    assert host.history.known_vms()["all"] == ("off",)
    host.live(KEPT + 8 * DAY, DAY)
    assert "all" not in host.history.known_vms(), "who is never seen again is forgotten"


def test_a_vm_that_a_wrong_clock_saw_off_is_not_off(host: Host) -> None:
    ahead = host.now + 30 * DAY
    host.history.begin(Attempt(Work.BACKUP, "db1", "main", "r", ahead, ahead, 13))
    host.points.append(host.now - 9 * DAY)
    assert host.stands().state is State.LATE
