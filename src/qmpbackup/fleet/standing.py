# SPDX-License-Identifier: Apache-2.0
"""How a VM is protected, judged by the age of the newest good point that a target holds. Pure.

    deadline = the first time of the schedule after that point, and the grace

Attempts never make a VM well: what failed may be said beside, and what succeeded says nothing, unless
its point is there. A VM whose backup goes on is not late for a while, unless the one before failed; one
that is off, not for long.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from qmpbackup.fleet.records import DEGRADED, PASSED_OVER, SUCCEEDED, Attempt, Holding
from qmpbackup.fleet.settings import VmSettings, WhenOff
from qmpbackup.plan import calendar
from qmpbackup.plan.ages import age
from qmpbackup.targets.overview import is_ahead

LONGEST_RUN: Final = timedelta(days=2)
"""For how long a backup may go on before it excuses nothing any more."""

_EVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
_DAMAGED_DATA: Final = 8


class State(StrEnum):
    """How a VM is protected in a target."""

    OK = "ok"
    DUE = "due"
    RUNNING = "running"
    DEGRADED = "degraded"
    FAILED = "failed"
    LATE = "late"
    DAMAGED = "damaged"
    OFF = "off"
    INVALID = "invalid"
    UNCOVERED = "uncovered"
    UNKNOWN = "unknown"


class Severity(StrEnum):
    """How much it matters, in Nagios' words."""

    OK = "OK"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"
    UNKNOWN = "UNKNOWN"

    @property
    def exit_code(self) -> int:
        """As Nagios wants it."""
        return (Severity.OK, Severity.WARNING, Severity.CRITICAL, Severity.UNKNOWN).index(self)


_WELL: Final = frozenset({State.OK, State.DUE, State.RUNNING, State.OFF})
_CRITICAL: Final = frozenset({State.LATE, State.DAMAGED})
WORST_FIRST: Final = (
    State.DAMAGED,
    State.LATE,
    State.FAILED,
    State.UNKNOWN,
    State.INVALID,
    State.DEGRADED,
    State.UNCOVERED,
    State.RUNNING,
    State.DUE,
    State.OFF,
    State.OK,
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a VM and a target: what it holds, the last backup and since when they have been
    failing, the last verification and drill, when the VM was first seen, whether it is off now, and the
    backup of its images since it went off, if there was one."""

    vm: VmSettings
    target: str
    holding: Holding | None = None
    last: Attempt | None = None
    failures: int = 0
    failing_since: datetime | None = None
    verified: Attempt | None = None
    drilled: Attempt | None = None
    first_seen: datetime | None = None
    is_off: bool = False
    as_it_lies: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How a VM is protected in a target, why (empty where there is nothing to say), and since when.
    `deadline` is when its newest point is too old, `next_time` when a backup is due next."""

    vm: str
    target: str
    state: State
    why: str = ""
    since: datetime | None = None
    deadline: datetime | None = None
    next_time: datetime | None = None
    facts: Facts | None = None

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        if self.state in _WELL:
            return Severity.OK
        if self.state is State.UNKNOWN:
            return Severity.UNKNOWN
        failed = self.facts.failures if self.facts and self.state is State.FAILED else 0
        is_critical = self.state in _CRITICAL or failed >= 2
        return Severity.CRITICAL if is_critical else Severity.WARNING

    @property
    def is_well(self) -> bool:
        """Whether nobody needs to look."""
        return self.state in _WELL


def worst(severities: frozenset[Severity]) -> Severity:
    """The one that counts: what is known to be bad goes before what nobody knows."""
    order = (Severity.CRITICAL, Severity.UNKNOWN, Severity.WARNING)
    return next((each for each in order if each in severities), Severity.OK)


def judged(facts: Facts, now: datetime) -> Standing:
    """How a VM is protected in a target."""
    schedule = tuple(filter(None, facts.vm.schedule))
    deadline = _deadline(facts, schedule, now)
    state, why, since = _state(facts, schedule, deadline, now)
    following = calendar.next_after(schedule, now)
    return Standing(facts.vm.name, facts.target, state, why, since, deadline, following, facts)


def _deadline(facts: Facts, schedule: tuple[str, ...], now: datetime) -> datetime | None:
    """When its newest point is too old, or will be; None where no time is to be kept."""
    holding = facts.holding
    counted = holding.newest if holding and holding.newest else _first_seen(facts, now)
    if facts.is_off and facts.vm.when_off is not WhenOff.FAIL:
        return _off_deadline(facts, counted)
    if not schedule:
        return None
    due = None if counted is None else calendar.next_after(schedule, counted)
    if due is not None:
        return _later(due, grace(facts.vm, schedule, due))
    # Times that never come protect nobody; after the last of some that came, a point stays good.
    return None if holding and holding.newest else datetime(1970, 1, 1, tzinfo=UTC)


def _first_seen(facts: Facts, now: datetime) -> datetime | None:
    """Since when it waits for its first point, if that is to be believed."""
    is_believed = facts.first_seen is not None and not is_ahead(facts.first_seen, now)
    return facts.first_seen if is_believed else None


def _off_deadline(facts: Facts, counted: datetime | None) -> datetime | None:
    """An image that nobody writes to is not out of date, once it was backed up, and while that point is
    there."""
    since = facts.as_it_lies.started if facts.as_it_lies else _EVER
    newest = facts.holding.newest if facts.holding else None
    if facts.vm.when_off is WhenOff.OFFLINE and newest is not None and newest >= since:
        return None
    return None if counted is None else _later(counted, facts.vm.off_age)


def grace(vm: VmSettings, schedule: tuple[str, ...], due: datetime) -> float:
    """Seconds after a missed time from which on a point is too old."""
    return calendar.grace(schedule, due) if vm.grace is None else vm.grace


def _later(time: datetime, seconds: float) -> datetime:
    left = (_EVER - time).total_seconds()
    return time + timedelta(seconds=min(seconds, max(left, 0.0)))


Finding = tuple[State, str, datetime | None]


def _state(
    facts: Facts, schedule: tuple[str, ...], deadline: datetime | None, now: datetime
) -> Finding:
    is_late = deadline is not None and now > deadline
    # Else a VM whose backups all hang until they are ended would be excused for ever.
    is_excused = _is_running(facts, now) and not facts.failures
    return (
        _damaged(facts)
        or (_late(facts, deadline, now) if is_late and not is_excused else None)
        or _running(facts, now)
        or _unknown(facts)
        or _off(facts)
        or _failed(facts)
        or _degraded(facts)
        or _due(facts, schedule, now)
        or (State.OK, "", None)
    )


def _damaged(facts: Facts) -> Finding | None:
    holding, verified = facts.holding, facts.verified
    if holding and holding.damaged:
        several = "points are" if holding.damaged > 1 else "point is"
        return State.DAMAGED, f"{holding.damaged} {several} damaged: see `verify`.", holding.looked
    if verified and verified.exit_code == _DAMAGED_DATA:
        return State.DAMAGED, verified.reason or "Damaged data was found.", verified.started
    return None


def _late(facts: Facts, deadline: datetime | None, now: datetime) -> Finding:
    holding = facts.holding
    reason = _reason(facts)
    if holding is None or holding.newest is None:
        said = "There is no point." if holding and not holding.problem else "No point is known."
        if facts.vm.schedule and calendar.next_after(facts.vm.schedule, now) is None:
            said += " None of the times of its `schedule` will ever come."
        elif facts.first_seen is None and facts.last is None:
            said += " No run has seen this VM yet: is the timer enabled?"
    elif facts.is_off and facts.vm.when_off is not WhenOff.FAIL:
        said = f"It is off, and its newest point is {age(now - holding.newest)} old."
    else:
        said = f"Its newest point is {age(now - holding.newest)} old."
    return State.LATE, reason or said, deadline


def _reason(facts: Facts) -> str:
    """Why the last backup failed, or nobody could look, if either."""
    if facts.failures and facts.last is not None and facts.last.reason:
        return facts.last.reason
    return facts.holding.problem if facts.holding else ""


def _unknown(facts: Facts) -> Finding | None:
    holding = facts.holding
    if holding is None:
        return State.UNKNOWN, "Nobody has looked into the target yet.", None
    if holding.problem:
        if facts.failures >= 2:
            return _failed(facts)
        return State.UNKNOWN, holding.problem, holding.looked
    return None


def _is_running(facts: Facts, now: datetime) -> bool:
    last = facts.last
    goes_on = last is not None and last.ended is None and last.exit_code is None
    return goes_on and last is not None and abs(now - last.started) < LONGEST_RUN


def _running(facts: Facts, now: datetime) -> Finding | None:
    if not _is_running(facts, now) or facts.last is None:
        return None
    return State.RUNNING, "", facts.last.started


def _off(facts: Facts) -> Finding | None:
    if not facts.is_off:
        return None
    if facts.vm.when_off is WhenOff.FAIL:
        return State.FAILED, "It is off.", facts.last.started if facts.last else None
    return State.OFF, "", None


def _failed(facts: Facts) -> Finding | None:
    if not facts.failures or facts.last is None:
        return None
    return (
        State.FAILED,
        facts.last.reason or f"Exit code {facts.last.exit_code}.",
        facts.failing_since,
    )


def _degraded(facts: Facts) -> Finding | None:
    holding, last = facts.holding, facts.last
    if holding and holding.ahead:
        several = "points are" if holding.ahead > 1 else "point is"
        why = f"{holding.ahead} {several} from the future: was a clock wrong?"
        return State.DEGRADED, why, holding.looked
    if last and last.exit_code == DEGRADED:
        return State.DEGRADED, last.reason or "The last point is degraded.", last.started
    for proof in (facts.verified, facts.drilled):
        code = proof.exit_code if proof else None
        if proof and code is not None and code not in SUCCEEDED | PASSED_OVER:
            return State.DEGRADED, f"The last {proof.work} failed: {proof.reason}", proof.started
    return None


def _due(facts: Facts, schedule: tuple[str, ...], now: datetime) -> Finding | None:
    holding = facts.holding
    newest = holding.newest if holding else None
    if not schedule:
        return None if newest else (State.DUE, "There is no point yet.", None)
    counted = newest or facts.first_seen or now
    due = calendar.next_after(schedule, counted)
    if newest is None:
        return State.DUE, "There is no point yet.", due
    return (State.DUE, "", due) if due is not None and due <= now else None
