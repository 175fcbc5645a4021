# SPDX-License-Identifier: Apache-2.0
"""Which of what is due is next: limits for the host and for each target, order, patience. Pure.

Backups go first, the most overdue before others; then what becomes of points. Where several run at
once, one slot takes nothing that took long last time, so that short ones are never behind long ones. A
sweep shares its target with nobody.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from qmpbackup.errors import NoSuchTarget
from qmpbackup.fleet.records import Work
from qmpbackup.fleet.run.due import TARGET_FAILED, Duty
from qmpbackup.fleet.settings import RunSettings
from qmpbackup.plan import calendar

MAY_PASS: Final = frozenset({5, 6, 7, 11})
"""Exit codes after which it is tried again in the same run."""
GIVEN_UP_AFTER: Final = 2
"""So many VMs in a row that cannot reach a target, and it costs no other one its time."""
_TARGET_WORKS: Final = frozenset({0, 3, 4, 8, 9})
"""Exit codes of what has been read or written there; others, as of a VM that is off, say nothing of it."""
_ORDER: Final = tuple(Work)


def choose(
    waiting: Sequence[Duty],
    running: Collection[Duty],
    run: RunSettings,
    now: datetime,
    clock: float = 0.0,
    *,
    asked: bool = False,
) -> Duty | None:
    """What is to be begun now, if anything; `clock` is one that nobody sets (seconds). What was `asked`
    for heeds no window."""
    if len(running) >= run.parallel or not (asked or calendar.is_within(run.window, now)):
        return None
    ready = (each for each in waiting if _may_begin(each, running, run, now, clock, asked=asked))
    return min(ready, key=_place, default=None)


def _place(duty: Duty) -> tuple[int, int, float]:
    return _ORDER.index(duty.work), duty.tries, -duty.urgency


def _may_begin(
    duty: Duty,
    running: Collection[Duty],
    run: RunSettings,
    now: datetime,
    clock: float,
    *,
    asked: bool,
) -> bool:
    beside = [each for each in running if each.target.name == duty.target.name]
    if duty.not_before is not None and clock < duty.not_before:
        return False
    if duty.vm_name and any(each.vm_name == duty.vm_name for each in running):
        return False
    if any(each.work is Work.SWEEP for each in beside) or (duty.work is Work.SWEEP and beside):
        return False
    if len(beside) >= duty.target.parallel:
        return False
    if duty.work is Work.SWEEP and not (asked or calendar.is_within(duty.target.sweep.window, now)):
        return False
    long_ones = sum(each.is_long for each in running)
    return not (duty.is_long and run.parallel > 1 and long_ones >= run.parallel - 1)


def again(duty: Duty, code: int, clock: float) -> Duty | None:
    """The same once more, later, if what it failed for may pass."""
    if duty.work is not Work.BACKUP or code not in MAY_PASS:
        return None
    if duty.tries >= duty.vm.retry.times:
        return None
    return replace(duty, tries=duty.tries + 1, not_before=clock + duty.vm.retry.wait)


@dataclass(slots=True)
class Reach:
    """Targets that VMs in a row could not reach, and why."""

    _failures: dict[str, list[str]]
    given_up: dict[str, str]

    def __init__(self) -> None:
        self._failures, self.given_up = {}, {}

    def note(self, duty: Duty, code: int, reason: str) -> None:
        """Note how something ended."""
        name = duty.target.name
        if code in _TARGET_WORKS:
            self._failures.pop(name, None)
        is_its_own = code == NoSuchTarget.exit_code and "{vm}" in duty.target.location
        if code not in TARGET_FAILED or is_its_own:  # others have folders of their own
            return
        vms = self._failures.setdefault(name, [])
        if duty.vm_name not in vms:
            vms.append(duty.vm_name)
        if len(vms) >= GIVEN_UP_AFTER:
            self.given_up[name] = reason
