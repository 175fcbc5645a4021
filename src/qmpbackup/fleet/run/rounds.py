# SPDX-License-Identifier: Apache-2.0
"""From what is due to what was done: begins, waits, notes, and takes in what becomes due meanwhile.

due ─► waiting ─► running ─► ended ─► history
         ▲           │
         └── again ──┘   and what follows from it: forget, sweep, verify, drill
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import Exhausted, Interrupted, QmpBackupError
from qmpbackup.fleet import secrets
from qmpbackup.fleet.config import host_name
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import DEGRADED, SUCCEEDED, WAS_OFF, Attempt, Holding, Work
from qmpbackup.fleet.run import choosing, commands, due
from qmpbackup.fleet.run.choosing import Reach
from qmpbackup.fleet.run.due import Duty, Past
from qmpbackup.fleet.run.workers import Order, Workers
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings, WhenGone, WhenOff
from qmpbackup.plan import calendar
from qmpbackup.process import Result
from qmpbackup.service import room
from qmpbackup.targets import opening

log = logging.getLogger(__name__)

_STORAGE: Final = 7
_TICK: Final = 0.2
_ALIVE_EVERY: Final = timedelta(minutes=5)
_LOOK_AGAIN: Final = timedelta(minutes=1)
_WHOLE: Final = "whole"
OFFLINE: Final = "offline"
"""The consistency of a point that was made of a VM that was off."""
_SKIPPED_TARGET: Final = frozenset({7, 10})


@dataclass(frozen=True, slots=True)
class Begun:
    """Work that runs: the attempt so far, and its key in the history (None: not noted there yet)."""

    duty: Duty
    attempt: Attempt
    key: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Work that has ended, for good unless it is tried `again`. It is `fine` if nobody needs to look:
    it went well, or its VM may be off and is."""

    duty: Duty
    attempt: Attempt
    again: datetime | None = None
    fine: bool = True

    @property
    def is_degraded(self) -> bool:
        """Whether it went well but for something."""
        return self.attempt.exit_code == DEGRADED


Report = Callable[[Begun | Done], None]


@dataclass(slots=True)
class Round:
    """One run over what is due. `asked` are names of VMs that somebody wants backed up now (all of them
    where `all_vms`). `alive` is called every now and then while it goes on."""

    configuration: Configuration
    history: History
    run: str
    report: Report
    holdings: Mapping[tuple[str, str], Holding] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    all_vms: bool = False
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    alive: Callable[[datetime], None] = lambda _: None
    done: list[Done] = field(default_factory=list)
    waiting: list[Duty] = field(default_factory=list)
    reach: Reach = field(default_factory=Reach)
    workers: Workers[Begun] = field(default_factory=Workers)
    _whose: dict[tuple[str, str], str] = field(default_factory=dict)
    _looked: datetime | None = None
    _alive: datetime | None = None

    def plan(self) -> list[Duty]:
        """What is due now, in the order of its urgency."""
        found = list(self._backups())
        if not (self.asked or self.all_vms):
            found += self._proofs()
        return sorted(found, key=lambda each: (list(Work).index(each.work), -each.urgency))

    def perform(self) -> list[Done]:
        """Do all that is due, and what becomes due meanwhile.

        Raises:
            Interrupted: all that ran was ended in order.
        """
        self.waiting = self.plan()
        self._looked = self.now()
        try:
            while self.waiting or self.workers.running:
                interrupt.check()
                self._show_alive()
                self._begin_some()
                ended = self.workers.ended(_TICK)
                if ended is not None:
                    self._end(*ended)
                self._take_in()
        except Interrupted as error:
            for begun, result in self.workers.end():
                code = result.code if result.code < 0 else error.exit_status
                self._note(begun, replace(result, code=code))
            raise
        return self.done

    # What is due

    @property
    def _is_asked(self) -> bool:
        return bool(self.asked) or self.all_vms

    def _backups(self) -> Iterator[Duty]:
        for vm in self.configuration.vms:
            if self.asked and vm.name not in self.asked:
                continue
            for name in vm.targets:
                target = self.configuration.target(name)
                found = due.backup_due(
                    vm, target, self._past(vm, target), self.now(), asked=self._is_asked
                )
                if found is not None:
                    yield found

    def _past(self, vm: VmSettings, target: TargetSettings) -> Past:
        last = self.history.last(vm.name, target.name, Work.BACKUP)
        good = self.history.last(vm.name, target.name, Work.BACKUP, succeeded=True)
        took = (good.ended - good.started).total_seconds() if good and good.ended else 0.0
        failures = self.history.failures_in_a_row(vm.name, target.name)
        return Past(last, failures, took, self.holdings.get((vm.name, target.name)))

    def _proofs(self) -> Iterator[Duty]:
        """Sweeps, verifications and drills whose time has come."""
        now = self.now()
        swept: set[str] = set()
        for vm in self.configuration.vms:
            for name in vm.targets if vm.enabled else ():
                target, place = self.configuration.target(name), self._place(vm, name)
                holding = self.holdings.get((vm.name, name))
                if _is_repository(place) and target.keep and place not in swept:
                    swept.add(place)
                    last = self.history.last("", name, Work.SWEEP)
                    if due.is_time(target.sweep.every, last, now):
                        yield Duty(Work.SWEEP, target, vm)
                for work, every in (
                    (Work.VERIFY, target.verify.every),
                    (Work.DRILL, vm.drill.every),
                ):
                    if due.is_to_be_proved(
                        every, self.history.last(vm.name, name, work), holding, now
                    ):
                        yield Duty(work, target, vm, is_long=True)

    def _show_alive(self) -> None:
        now = self.now()
        if self._alive is None or abs(now - self._alive) >= _ALIVE_EVERY:
            self._alive = now
            self.alive(now)

    def _take_in(self) -> None:
        """Backups that have become due while others ran."""
        now = self.now()
        if self._is_asked or self._looked is None or abs(now - self._looked) < _LOOK_AGAIN:
            return
        self._looked = now
        if not self.waiting and not self.workers.running:
            return
        known = {each.key for each in self.waiting}
        known |= {each.duty.key for each in self.workers.running}
        known |= {each.duty.key for each in self.done if each.attempt.exit_code != 0}
        self.waiting += (each for each in self._backups() if each.key not in known)

    # Beginning

    def _begin_some(self) -> None:
        while True:
            running = [each.duty for each in self.workers.running]
            chosen = choosing.choose(
                self.waiting, running, self.configuration.run, self.now(), asked=self._is_asked
            )
            if chosen is None:
                self._drop_closed(running)
                return
            self.waiting.remove(chosen)
            self._begin(chosen)

    def _drop_closed(self, running: list[Duty]) -> None:
        """Let what is not begun outside of the window be due another time."""
        if running or not self.waiting:
            return
        later = [each for each in self.waiting if each.not_before is not None]
        now = self.now()
        could = [replace(each, not_before=None) for each in later]
        if choosing.choose(could, (), self.configuration.run, now, asked=self._is_asked) is None:
            self.waiting.clear()
        else:
            self.waiting = later

    def _begin(self, duty: Duty, *, is_offline: bool = False) -> None:
        attempt = Attempt(
            duty.work,
            duty.vm_name,
            duty.target.name,
            self.run,
            self.now(),
            scheduled=duty.scheduled,
            level=_WHOLE if self._reads_all(duty) else "",
            consistency=OFFLINE if is_offline else "",
        )
        may_be_gone = duty.target.when_gone is WhenGone.SKIP and duty.work is Work.BACKUP
        key = None if may_be_gone else self.history.begin(attempt)
        begun = Begun(duty, attempt, key)
        self.report(begun)
        obstacle = self._obstacle(duty)
        try:
            order = self._order(begun) if not obstacle else None
            if order is not None:
                self.workers.start(order)
                return
            code = _STORAGE
        except QmpBackupError as error:
            obstacle, code = str(error), error.exit_code
        except Exhausted as error:
            obstacle, code = str(error), error.exit_code
        self._end(begun, Result("qmpbackup", code, b"", f"error: {obstacle}"))

    def _obstacle(self, duty: Duty) -> str:
        """Why it is not even tried; empty if nothing speaks against it."""
        if duty.target.name in self.reach.given_up:
            said = self.reach.given_up[duty.target.name]
            return f"The target was given up for this run, as two VMs could not use it. {said}"
        place = self._place(duty.vm, duty.target.name)
        if duty.work is not Work.BACKUP or _is_repository(place) or not duty.target.min_free:
            return ""
        with suppress(OSError):
            found = room.space(Path(place))
            if found is not None and found.free < duty.target.min_free * found.total:
                return (
                    f"Only {found.free / found.total:.1%} of the file system of {place} are free, and "
                    f"`min_free` is {duty.target.min_free:.1%}."
                )
        return ""

    def _order(self, begun: Begun) -> Order[Begun]:
        duty = begun.duty
        place = self._place(duty.vm, duty.target.name)
        told, said = opening.entrance(opening.place(place)).handed_on()
        environment = {**secrets.environment(duty.target), **said}
        return Order(begun, self._words(begun, told), environment)

    def _words(self, begun: Begun, place: str) -> list[str]:
        duty, vm = begun.duty, begun.duty.vm
        whose = self._whose_points(duty) if _is_repository(place) else ""
        match duty.work:
            case Work.SWEEP:
                return commands.sweep(place)
            case Work.FORGET:
                return commands.forget(
                    place, whose, duty.target.keep, sweeps_later=_is_repository(place)
                )
            case Work.VERIFY:
                share = 1.0 if begun.attempt.level == _WHOLE else duty.target.verify.read_data
                return commands.verify(place, whose, share)
            case Work.DRILL:
                return commands.drill(vm, place, whose)
            case Work.BACKUP if begun.attempt.consistency == OFFLINE:
                return commands.offline(place, whose)
            case Work.BACKUP:
                is_time = due.wants_full(vm, self._last_full(duty), self.now())
                full = is_time and not _is_repository(place)
                return commands.backup(
                    vm, place, self._speed(duty), full=full, chunked=_is_repository(place)
                )

    def _reads_all(self, duty: Duty) -> bool:
        """Whether a verification reads all of the data, as it does every now and then."""
        if duty.work is not Work.VERIFY:
            return False
        earlier = self.history.attempts(vm=duty.vm_name, target=duty.target.name, work=Work.VERIFY)
        wholes = (each for each in earlier if each.level == _WHOLE and each.exit_code in SUCCEEDED)
        return due.is_time(duty.target.verify.whole, next(wholes, None), self.now())

    def _last_full(self, duty: Duty) -> Attempt | None:
        attempts = self.history.attempts(
            vm=duty.vm_name, target=duty.target.name, work=Work.BACKUP, limit=1000
        )
        return next((each for each in attempts if each.level == "full" and each.point), None)

    def _speed(self, duty: Duty) -> int:
        """Bytes a second for each disk, of what the target may take now from this host."""
        own = duty.vm.limits.speed
        now = self.now()
        for each in duty.target.bandwidth:
            if calendar.is_within(each.during, now):
                at_once = min(duty.target.parallel, self.configuration.run.parallel)
                share = each.limit // at_once
                return min(own, share) if own and share else own or share
        return own

    def _place(self, vm: VmSettings, target: str) -> str:
        return self.configuration.target(target).place(vm, host_name())

    def _whose_points(self, duty: Duty) -> str:
        known = self._whose.get((duty.vm_name, duty.target.name))
        if known is not None or duty.work is Work.SWEEP:
            return known or ""
        holding = self.holdings.get((duty.vm_name, duty.target.name))
        if holding is None:
            return duty.vm_name
        return commands.whose(holding.uuid, holding.host, duty.vm_name)

    # Ending

    def _end(self, begun: Begun, result: Result) -> None:
        attempt = self._note(begun, result)
        code = attempt.exit_code or 0
        duty = begun.duty
        if code == WAS_OFF and self._goes_offline(begun):
            self._begin(replace(duty, not_before=None), is_offline=True)
            return
        is_gone = duty.target.when_gone is WhenGone.SKIP and code in _SKIPPED_TARGET
        if duty.target.name not in self.reach.given_up and duty.vm_name:
            self.reach.note(duty, code, attempt.reason)
        later = None
        if not is_gone and duty.target.name not in self.reach.given_up:
            later = choosing.again(duty, code, self.now())
        if later is not None:
            self.waiting.append(later)
        fine = (
            code in SUCCEEDED
            or is_gone
            or (code == WAS_OFF and duty.vm.when_off is not WhenOff.FAIL)
        )
        done = Done(duty, attempt, later.not_before if later else None, fine)
        self.done.append(done)
        self.report(done)
        if code in SUCCEEDED:
            self._follow(begun, result)

    def _note(self, begun: Begun, result: Result) -> Attempt:
        """Note how it ended."""
        longest = begun.duty.vm.limits.pause
        attempt = commands.ended(
            begun.attempt, result.code, result.output, result.messages, longest
        )
        attempt = replace(attempt, ended=self.now())
        if begun.key is not None:
            self.history.end(begun.key, attempt)
        elif attempt.exit_code not in _SKIPPED_TARGET:
            self.history.end(self.history.begin(begun.attempt), attempt)
        return attempt

    def _goes_offline(self, begun: Begun) -> bool:
        """Whether the images of a VM that is off are to be backed up: once, until it has run again."""
        duty = begun.duty
        if duty.vm.when_off is not WhenOff.OFFLINE or begun.attempt.consistency == OFFLINE:
            return False
        last = self.history.last(duty.vm_name, duty.target.name, Work.BACKUP, succeeded=True)
        holding = self.holdings.get((duty.vm_name, duty.target.name))
        has_points = last is not None or (holding is not None and holding.points > 0)
        return has_points and (last is None or last.consistency != OFFLINE)

    def _follow(self, begun: Begun, result: Result) -> None:
        """What a new point brings with it."""
        duty = begun.duty
        if duty.work is not Work.BACKUP:
            return
        uuid, host, name = commands.identity(result.output)
        self._whose[duty.vm_name, duty.target.name] = commands.whose(uuid, host, name)
        if duty.target.keep:
            self.waiting.append(Duty(Work.FORGET, duty.target, duty.vm))


def _is_repository(place: str) -> bool:
    return opening.entrance(opening.place(place)).holds_several
