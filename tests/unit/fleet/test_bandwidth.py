# SPDX-License-Identifier: Apache-2.0
"""What a target may take is divided among the backups that run into it now."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from qmpbackup.cli.descriptors import limits, telling
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Work
from qmpbackup.fleet.run.bandwidth import share
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.run.following import Followed
from qmpbackup.fleet.run.rounds import Begun, Done, Round, Underway
from qmpbackup.fleet.run.workers import Order, Workers
from qmpbackup.fleet.settings import (
    Bandwidth,
    Configuration,
    RunSettings,
    TargetSettings,
    VmSettings,
)
from qmpbackup.plan.calendar import LOCAL
from qmpbackup.plan.progress import DiskProgress, Progress, Stage
from qmpbackup.process import Result

NOON = datetime(2026, 11, 26, 12, 0, tzinfo=LOCAL)


def duty(vm: str, target: TargetSettings, work: Work = Work.BACKUP) -> Duty:
    """Some work."""
    return Duty(work, target, VmSettings(vm, f"/run/{vm}"))


@pytest.fixture
def offsite() -> TargetSettings:
    """A target that may take little in office hours, more in the evening, and all at night."""
    hours = (Bandwidth(100, "08:00-18:00"), Bandwidth(900, "18:00-22:00"))
    return TargetSettings("offsite", "/backup", bandwidth=hours)


def test_those_that_run_into_a_target_share_what_it_may_take(offsite: TargetSettings) -> None:
    other = TargetSettings("other", "/other")
    one, two = duty("one", offsite), duty("two", offsite)
    assert share(one, [one], NOON) == 100
    assert share(one, [one, two], NOON) == 50
    beside = [one, two, duty("three", other), duty("four", offsite, Work.VERIFY)]
    assert share(one, beside, NOON) == 50, "another target, and what is no backup, takes nothing"
    assert share(beside[2], beside, NOON) == 0


def test_a_share_is_never_no_limit(offsite: TargetSettings) -> None:
    many = [duty(f"vm{number}", offsite) for number in range(300)]
    assert share(many[0], many, NOON) == 1


def test_the_hour_says_which_limit_holds(offsite: TargetSettings) -> None:
    one = duty("one", offsite)
    local = datetime.now().astimezone().tzinfo
    found = [
        share(one, [one], NOON.replace(hour=hour, tzinfo=local)) for hour in (7, 8, 17, 18, 22)
    ]
    assert found == [0, 100, 100, 900, 0]


@contextmanager
def followed(limit: int) -> Iterator[tuple[Followed, int, int]]:
    """Our ends, and those of the backup."""
    ours = Followed(limit)
    write, read = (os.dup(each) for each in ours.descriptors)
    ours.started()
    try:
        yield ours, write, read
    finally:
        ours.close()
        os.close(write)
        os.close(read)


def test_what_a_backup_tells_is_known_and_it_knows_its_limit() -> None:
    with followed(50) as (ours, write, read):
        limit = limits(read)
        assert ours.look() is None
        assert limit() == 50, "before it begins"
        now = Progress("web", Stage.COPY, (DiskProgress("vda", 3, 9), DiskProgress("vdb", 0, 1)))
        with telling(write) as tell:
            tell(now)
            assert ours.look() == now
            assert ours.look() == now
            tell(Progress("web", Stage.STORE, ()))
            assert ours.look() == Progress("web", Stage.STORE, ())
        ours.limit(0)
        assert limit() == 0


def test_a_backup_that_tells_nonsense_or_never_listens_harms_nobody() -> None:
    with followed(1) as (ours, write, read):
        for line in (
            b"{}\n",
            b"[]\n\n",
            b'{"vm": 1, "stage": "x", "disks": []}\n',
            b"\xff\n",
            b"7",
        ):
            os.write(write, line)
            assert ours.look() is None
        for limit in range(100_000):
            ours.limit(limit)
        found = limits(read)()
        ours.limit(7)
        assert found < 100_000
        assert limits(read)() == 7


class Scripted(Workers[Begun]):
    """Commands that begin, and end when they are to, without a process."""

    def __init__(self, moments: Sequence[Callable[[], Begun | None]]) -> None:
        super().__init__()
        self._moments = list(moments)
        self.at_work: list[Begun] = []
        self.given: list[int | None] = []
        self.limits: list[list[int]] = []

    @property
    def running(self) -> list[Begun]:
        return self.at_work

    def look(self) -> list[tuple[Begun, Progress | None]]:
        return [(each, None) for each in self.at_work]

    def start(self, order: Order[Begun]) -> None:
        self.at_work.append(order.of)
        self.given.append(order.limit)

    def limit(self, limit_of: Callable[[Begun], int]) -> None:
        self.limits.append([limit_of(each) for each in self.at_work])

    def ended(self, seconds: float) -> tuple[Begun, Result] | None:
        del seconds
        of = self._moments.pop(0)()
        if of is None:
            return None
        self.at_work.remove(of)
        return of, Result("qmpbackup", 4, b"", "")


def test_a_run_gives_shares_anew_as_others_begin_and_end_and_as_the_hour_changes(
    offsite: TargetSettings, tmp_path: Path
) -> None:
    target = replace(offsite, location=f"{tmp_path}/{{vm}}", min_free=0.0, parallel=2)
    vms = tuple(VmSettings(name, f"/run/{name}", targets=("offsite",)) for name in ("one", "two"))
    configuration = Configuration(run=RunSettings(parallel=2), vms=vms, targets=(target,))
    now = NOON

    def wait() -> None:
        nonlocal now
        now = NOON.replace(hour=18)

    workers = Scripted([wait, lambda: None, lambda: workers.at_work[0], lambda: workers.at_work[0]])
    seen: list[int] = []

    def report(event: Begun | Done | Underway) -> None:
        if isinstance(event, Underway):
            seen.append(len(event.running))

    with History.opened(tmp_path) as history:
        round_ = Round(
            configuration, history, "run", report, all_vms=True, now=lambda: now, workers=workers
        )
        round_.perform()
    assert workers.given == [100, 50], "from its first byte on"
    assert workers.limits == [[50, 50], [450, 450], [450, 450], [900]]
    assert seen == [2, 2, 2, 1]
