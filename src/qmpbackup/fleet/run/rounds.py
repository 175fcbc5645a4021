# SPDX-License-Identifier: Apache-2.0
"""From what is due to what was done: begins, waits, notes, and takes in what becomes due meanwhile.

due ─► waiting ─► running ─► ended ─► history
         ▲           │
         └── again ──┘   and what follows from it: forget, sweep, verify, drill
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import Exhausted, Interrupted, QmpBackupError
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import DEGRADED, OFFLINE, SUCCEEDED, WAS_OFF, Attempt, Holding, Work
from qmpbackup.fleet.run import bandwidth, choosing, commands
from qmpbackup.fleet.run.agenda import Agenda, is_repository
from qmpbackup.fleet.run.choosing import Reach
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.run.orders import WHOLE, Orders
from qmpbackup.fleet.run.workers import Order, Workers
from qmpbackup.fleet.settings import Configuration, WhenGone, WhenOff
from qmpbackup.plan.progress import Progress
from qmpbackup.process import Result
from qmpbackup.service import room

log = logging.getLogger(__name__)

_STORAGE: Final = 7
_TICK: Final = 0.2
_ALIVE_EVERY: Final = timedelta(minutes=5)
_LOOK_AGAIN: Final = timedelta(minutes=1)
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


@dataclass(frozen=True, slots=True)
class Underway:
    """What runs, with how far it is, as far as it has told; and how much waits. Told all the time."""

    running: tuple[tuple[Begun, Progress | None], ...] = ()
    waiting: int = 0


Report = Callable[[Begun | Done | Underway], None]


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
    agenda: Agenda = field(init=False)
    orders: Orders = field(init=False)
    _looked: datetime | None = None
    _alive: datetime | None = None

    def __post_init__(self) -> None:
        self.agenda = Agenda(
            self.configuration, self.history, self.holdings, self.asked, self.all_vms
        )
        self.orders = Orders(self.agenda)

    def plan(self) -> list[Duty]:
        """What is due now, in the order of its urgency."""
        return self.agenda.plan(self.now())

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
                self._share_out()
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

    # Going on

    def _show_alive(self) -> None:
        now = self.now()
        if self._alive is None or abs(now - self._alive) >= _ALIVE_EVERY:
            self._alive = now
            self.alive(now)

    def _take_in(self) -> None:
        """Backups that have become due while others ran."""
        now = self.now()
        if self.agenda.is_asked or self._looked is None or abs(now - self._looked) < _LOOK_AGAIN:
            return
        self._looked = now
        if not self.waiting and not self.workers.running:
            return
        known = {each.key for each in self.waiting}
        known |= {each.duty.key for each in self.workers.running}
        known |= {each.duty.key for each in self.done if each.attempt.exit_code != 0}
        self.waiting += (each for each in self.agenda.backups(now) if each.key not in known)

    def _share_out(self) -> None:
        """Give each of what runs now its share of the bandwidth, and say how far it is."""
        duties, now = [each.duty for each in self.workers.running], self.now()
        self.workers.limit(lambda begun: bandwidth.share(begun.duty, duties, now))
        self.report(Underway(tuple(self.workers.look()), len(self.waiting)))

    def _first_share(self, duty: Duty) -> int | None:
        """What a backup is given from its first byte on; None for other work, which is given nothing."""
        if duty.work is not Work.BACKUP:
            return None
        beside = [*(each.duty for each in self.workers.running), duty]
        return bandwidth.share(duty, beside, self.now())

    # Beginning

    def _begin_some(self) -> None:
        while True:
            running = [each.duty for each in self.workers.running]
            chosen = choosing.choose(
                self.waiting,
                running,
                self.configuration.run,
                self.now(),
                asked=self.agenda.is_asked,
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
        if (
            choosing.choose(could, (), self.configuration.run, now, asked=self.agenda.is_asked)
            is None
        ):
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
            level=WHOLE if self.orders.reads_all(duty, self.now()) else "",
            consistency=OFFLINE if is_offline else "",
        )
        may_be_gone = duty.target.when_gone is WhenGone.SKIP and duty.work is Work.BACKUP
        key = None if may_be_gone else self.history.begin(attempt)
        begun = Begun(duty, attempt, key)
        self.report(begun)
        obstacle = self._obstacle(duty)
        try:
            if not obstacle:
                command = self.orders.command(duty, attempt)
                self.workers.start(Order(begun, *command, self._first_share(duty)))
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
        place = self.agenda.place(duty.vm, duty.target.name)
        if duty.work is not Work.BACKUP or is_repository(place) or not duty.target.min_free:
            return ""
        with suppress(OSError):
            found = room.space(Path(place))
            if found is not None and found.free < duty.target.min_free * found.total:
                return (
                    f"Only {found.free / found.total:.1%} of the file system of {place} are free, and "
                    f"`min_free` is {duty.target.min_free:.1%}."
                )
        return ""

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
        return has_points and self.history.as_it_lies(duty.vm_name, duty.target.name) is None

    def _follow(self, begun: Begun, result: Result) -> None:
        """What a new point brings with it."""
        duty = begun.duty
        if duty.work is not Work.BACKUP:
            return
        self.orders.learn(duty, result.output)
        if duty.target.keep:
            self.waiting.append(Duty(Work.FORGET, duty.target, duty.vm))
