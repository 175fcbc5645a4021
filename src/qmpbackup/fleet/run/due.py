# SPDX-License-Identifier: Apache-2.0
"""What is due. Pure: the clock, what targets hold and what was tried come as values.

A backup is due when a time of its schedule has passed since the last was begun; times that were missed
are made up once. The newest point counts as well as what was noted, as the history may be deleted, or not be
written to; what is dated into the future, as after a clock that leapt, counts for nothing.

What failed for its target, or died with its run, is due again after a while that doubles with each
failure; all else that failed waits for its next time.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from qmpbackup.fleet.records import ENDED, Attempt, Holding, Work
from qmpbackup.fleet.settings import TargetSettings, VmSettings
from qmpbackup.plan import calendar

AGAIN_AFTER: Final = timedelta(minutes=14)
"""A little less than between two runs of the timer."""
_LONGEST_PAUSE: Final = timedelta(hours=6)
TARGET_FAILED: Final = frozenset({7, 10, 12})
"""Exit codes that may be the target's fault, and so every VM's."""
_LONG: Final = 600.0
_EVER: Final = 1e9


@dataclass(frozen=True, slots=True)
class Duty:
    """A piece of work that is due. A sweep has a `vm` as well, one of those that are there. `scheduled` is
    the time that it is for; `urgency` in intervals by which it is late. It is not begun before `not_before` (by
    a clock that nobody sets), as it was tried `tries` times in this run. `is_long`: it took long last time."""

    work: Work
    target: TargetSettings
    vm: VmSettings
    scheduled: datetime | None = None
    urgency: float = 0.0
    tries: int = 0
    not_before: float | None = None
    is_long: bool = False

    @property
    def vm_name(self) -> str:
        """The VM's name; empty for a sweep, which is of all VMs of its target."""
        return "" if self.work is Work.SWEEP else self.vm.name

    @property
    def key(self) -> tuple[Work, str, str]:
        """What it is, whenever it is due."""
        return self.work, self.vm_name, self.target.name

    @property
    def occasion(self) -> tuple[tuple[Work, str, str], datetime | None]:
        """What it is, and the time that it is for."""
        return self.key, self.scheduled


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of a VM and a target, or of a target alone: the last attempt, how many have failed
    since one that did not, how long the last good one took (seconds), what is held, and whether the newest
    point of that was noted as it was made."""

    last: Attempt | None = None
    failures: int = 0
    took: float = 0.0
    holding: Holding | None = None
    is_noted: bool = False


def backup_due(
    vm: VmSettings, target: TargetSettings, past: Past, now: datetime, *, asked: bool = False
) -> Duty | None:
    """The backup of a VM, if it is due, or somebody has `asked` for it."""
    is_long = past.took > _LONG
    if asked:
        return Duty(Work.BACKUP, target, vm, urgency=_EVER, is_long=is_long)
    missed = calendar.last_before(vm.schedule, now) if vm.schedule else None
    if not vm.enabled or missed is None:
        return None
    begun = _begun(past, now)
    if begun is None:
        return Duty(Work.BACKUP, target, vm, missed, _EVER, is_long=is_long)
    if missed > begun:
        return Duty(Work.BACKUP, target, vm, missed, _urgency(vm, begun, now), is_long=is_long)
    is_last = past.last is not None and past.last.started == begun
    if is_last and past.last and is_due_again(past.last, past.failures, now):
        return Duty(Work.BACKUP, target, vm, past.last.scheduled, 0.0, is_long=is_long)
    return None


def _begun(past: Past, now: datetime) -> datetime | None:
    """When the last was begun, as far as that is to be believed.

    A point that nothing was noted of was made while nothing could be, or by hand. Of those that were
    noted, the last attempt alone counts: after a clock was set back, points of before have times that are
    yet to come and come true, one a night, as if they were made then. So the first run after that is due.
    """
    last, holding = past.last, past.holding
    if last is not None and last.started > now and holding and holding.ahead:
        return None
    is_newer = holding is not None and not (past.is_noted and last and last.started <= now)
    times = (last.started if last else None, holding.newest if holding and is_newer else None)
    return max((each for each in times if each is not None and each <= now), default=None)


def _urgency(vm: VmSettings, begun: datetime, now: datetime) -> float:
    due = calendar.next_after(vm.schedule, begun)
    interval = calendar.interval(vm.schedule, now)
    if due is None or not interval:
        return 1.0
    return max((now - due).total_seconds(), 0.0) / interval


def is_due_again(last: Attempt, failures: int, now: datetime) -> bool:
    """Whether what failed is to be tried again before its next time."""
    code = last.exit_code
    died = code is not None and (code < 0 or code in ENDED)
    if code not in TARGET_FAILED and not died:
        return False
    pause = min(AGAIN_AFTER * (1 << min(max(failures - 1, 0), 10)), _LONGEST_PAUSE)
    passed: timedelta = now - last.started
    return passed >= pause


def is_to_be_proved(
    every: float, last: Attempt | None, holding: Holding | None, now: datetime
) -> bool:
    """Whether something that is done every so many seconds (0: never) to points is due."""
    if not every or holding is None or not holding.points or holding.problem:
        return False
    return is_time(every, last, now)


def is_time(every: float, last: Attempt | None, now: datetime) -> bool:
    """Whether so many seconds have passed since it was begun last; sooner, where it did not come to its
    end."""
    if not every:
        return False
    if last is None or last.started > now:
        return True
    passed: timedelta = now - last.started
    if last.exit_code is not None and (last.exit_code < 0 or last.exit_code in ENDED):
        return passed >= AGAIN_AFTER
    if last.exit_code in TARGET_FAILED | {11}:
        return passed >= _LONGEST_PAUSE
    return passed.total_seconds() >= every


def wants_full(vm: VmSettings, last_full: Attempt | None, now: datetime) -> bool:
    """Whether a folder is to get a full, as its last is older than `full_every`."""
    if not vm.full_every:
        return False
    if last_full is None or last_full.started > now:
        return True
    return now - last_full.started >= timedelta(seconds=vm.full_every)
