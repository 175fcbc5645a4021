# SPDX-License-Identifier: Apache-2.0
"""From what is due to what was done: begins, waits, notes, and takes in what becomes due meanwhile.

due ─► waiting ─► running ─► ended ─► history
         ▲           │
         └── again ──┘   and what follows from it: forget, sweep, verify, drill

Whatever becomes of one piece of work, a fault of ours included, is its own failure: the others have
their turn.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from signal import SIGTERM
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
from qmpbackup.fleet import at_rest
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import (
    DEGRADED,
    ENDED,
    OFFLINE,
    SUCCEEDED,
    WAS_OFF,
    Attempt,
    Holding,
    Work,
)
from qmpbackup.fleet.run import bandwidth, choosing, commands
from qmpbackup.fleet.run.agenda import Agenda
from qmpbackup.fleet.run.choosing import Reach
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.run.failing import code_of, said_of
from qmpbackup.fleet.run.obstacles import Obstacles
from qmpbackup.fleet.run.orders import WHOLE, Orders
from qmpbackup.fleet.run.presence import Hindrance
from qmpbackup.fleet.run.workers import Order, Workers
from qmpbackup.fleet.settings import Configuration, WhenOff
from qmpbackup.plan.progress import Progress
from qmpbackup.process import Result

log = logging.getLogger(__name__)

_TICK: Final = 0.2
_ALIVE_EVERY: Final = 300.0
_LOOK_AGAIN: Final = 60.0


@dataclass(frozen=True, slots=True)
class Begun:
    """Work that runs: the attempt so far, and its key in the history (None: it is not noted there)."""

    duty: Duty
    attempt: Attempt
    key: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Work that has ended, for good unless it is tried `again`. It is `fine` if nobody needs to look:
    it went well, or its VM or target need not be there and is not."""

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
    where `all_vms`). `alive` is called every now and then while it goes on. `clock` is one that nobody
    sets."""

    configuration: Configuration
    history: History
    run: str
    report: Report
    holdings: Mapping[tuple[str, str], Holding] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    all_vms: bool = False
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    clock: Callable[[], float] = time.monotonic
    alive: Callable[[datetime], None] = lambda _: None
    done: list[Done] = field(default_factory=list)
    waiting: list[Duty] = field(default_factory=list)
    reach: Reach = field(default_factory=Reach)
    workers: Workers[Begun] = field(default_factory=Workers)
    agenda: Agenda = field(init=False)
    orders: Orders = field(init=False)
    obstacles: Obstacles = field(init=False)
    _looked: float | None = None
    _alive: float | None = None

    def __post_init__(self) -> None:
        self.agenda = Agenda(
            self.configuration, self.history, self.holdings, self.asked, self.all_vms
        )
        self.orders = Orders(self.agenda)
        self.obstacles = Obstacles(self.agenda, self.reach, self.clock)

    def plan(self) -> list[Duty]:
        """What is due now, in the order of its urgency."""
        return self.agenda.plan(self.now(), self._cannot_tell)

    def perform(self) -> list[Done]:
        """Do all that is due, and what becomes due meanwhile.

        Raises:
            Interrupted: all that ran was ended in order.
        """
        self.waiting = self.plan()
        self._looked = self.clock()
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
            self._end_all(error.exit_status)
            raise
        return self.done

    def _end_all(self, code: int) -> None:
        """End what runs in order, as a signal came; what was quicker has ended as it ended."""
        for begun, result in self.workers.end():
            by_us = result.code in ENDED or result.code == -int(SIGTERM)
            attempt = self._note(begun, replace(result, code=code) if by_us else result)
            self._finish(Done(begun.duty, attempt, fine=attempt.exit_code in SUCCEEDED))

    # Going on

    def _show_alive(self) -> None:
        clock = self.clock()
        if self._alive is not None and clock - self._alive < _ALIVE_EVERY:
            return
        self._alive = clock
        try:
            self.alive(self.now())
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - what is shown must not end what is done
            log.warning("It cannot be shown that this run goes on: %s", said_of(error))

    def _take_in(self) -> None:
        """Backups that have become due while others ran: each once for its time, however it ended."""
        clock = self.clock()
        if self.agenda.is_asked or self._looked is None or clock - self._looked < _LOOK_AGAIN:
            return
        self._looked = clock
        if not self.waiting and not self.workers.running:
            return
        known = {each.key for each in self.waiting}
        known |= {each.duty.key for each in self.workers.running}
        done = {each.duty.occasion for each in self.done}
        self.waiting += (
            each
            for each in self.agenda.backups(self.now(), self._cannot_tell)
            if each.key not in known and each.occasion not in done
        )

    def _cannot_tell(self, duty: Duty, error: Exception) -> None:
        """Whether something is due cannot be told: that is a failure of its own."""
        log.debug("It cannot be told whether %s is due:", duty.key, exc_info=error)
        if duty.key not in {each.duty.key for each in self.done}:
            self._end(self._noted(duty), _failed(error))

    def _share_out(self) -> None:
        """Give each of what runs now its share of the bandwidth, and say how far it is."""
        duties, now = [each.duty for each in self.workers.running], self.now()
        self.workers.limit(lambda begun: bandwidth.share(begun.duty, duties, now))
        self._tell(Underway(tuple(self.workers.look()), len(self.waiting)))

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
            chosen = self._choose(self.waiting, running)
            if chosen is None:
                self._drop_closed(running)
                return
            self.waiting.remove(chosen)
            self._begin(chosen)

    def _choose(self, waiting: Sequence[Duty], running: Sequence[Duty]) -> Duty | None:
        run, asked = self.configuration.run, self.agenda.is_asked
        return choosing.choose(waiting, running, run, self.now(), self.clock(), asked=asked)

    def _drop_closed(self, running: Sequence[Duty]) -> None:
        """Let what is not begun outside of the window be due another time."""
        if running or not self.waiting:
            return
        later = [each for each in self.waiting if each.not_before is not None]
        could = [replace(each, not_before=None) for each in later]
        self.waiting = later if self._choose(could, ()) is not None else []

    def _begin(self, duty: Duty, *, is_offline: bool = False) -> None:
        begun = Begun(duty, self._attempt(duty, is_offline=is_offline))
        self._tell(begun)
        try:
            obstacle = self.obstacles.before(duty, self._made(duty))
            if obstacle is not None and obstacle.is_gone:
                self._pass_over(begun, obstacle)
                return
            begun = self._noted(duty, is_offline=is_offline)
            if obstacle is None:
                command = self.orders.command(duty, begun.attempt)
                self.workers.start(Order(begun, *command, self._first_share(duty)))
                return
            result = Result("qmpbackup", obstacle.code, b"", f"error: {obstacle.sentence}")
        except Interrupted:
            raise
        except Exception as error:
            log.debug("It could not be begun:", exc_info=error)
            result = _failed(error)
        self._end(begun if begun.key is not None else self._noted(duty), result)

    def _made(self, duty: Duty) -> int:
        """How many points this run has made of a VM in a target."""
        what = duty.vm.name, duty.target.name
        attempts = [
            each.attempt for each in self.done if (each.duty.vm_name, each.duty.target.name) == what
        ]
        return sum(bool(each.point) and each.exit_code in SUCCEEDED for each in attempts)

    def _attempt(self, duty: Duty, *, is_offline: bool = False) -> Attempt:
        return Attempt(
            duty.work,
            duty.vm_name,
            duty.target.name,
            self.run,
            self.now(),
            scheduled=duty.scheduled,
            consistency=OFFLINE if is_offline else "",
        )

    def _noted(self, duty: Duty, *, is_offline: bool = False) -> Begun:
        """Work that begins, as it is in the history."""
        attempt = self._attempt(duty, is_offline=is_offline)
        if self.orders.reads_all(duty, attempt.started):
            attempt = replace(attempt, level=WHOLE)
        return Begun(duty, attempt, self.history.begin(attempt))

    def _pass_over(self, begun: Begun, obstacle: Hindrance) -> None:
        """The target need not be there, and is not: nothing has failed."""
        attempt = replace(
            begun.attempt, ended=self.now(), exit_code=obstacle.code, reason=obstacle.sentence
        )
        self._finish(Done(begun.duty, attempt))

    # Ending

    def _end(self, begun: Begun, result: Result) -> None:
        try:
            self._ended(begun, result)
        except Interrupted:
            raise
        except Exception as error:
            log.debug("It could not be ended:", exc_info=error)
            attempt = self._plainly(begun, result.code or 1, said_of(error))
            self._finish(Done(begun.duty, attempt, fine=False))

    def _ended(self, begun: Begun, result: Result) -> None:
        duty = begun.duty
        attempt = self._note(begun, result)
        code = attempt.exit_code or 0
        if begun.attempt.consistency == OFFLINE:
            at_rest.backed_up(self.history, duty.vm_name, commands.images(result.output))
        if code == WAS_OFF and self._goes_offline(begun):
            self._begin(replace(duty, not_before=None), is_offline=True)
            return
        self._mind_target(duty, attempt)
        later = self._again(duty, code)
        fine = code in SUCCEEDED or (code == WAS_OFF and duty.vm.when_off is not WhenOff.FAIL)
        self._finish(Done(duty, attempt, later, fine))
        if code in SUCCEEDED:
            self._follow(begun, result)

    def _finish(self, done: Done) -> None:
        self.done.append(done)
        self._tell(done)

    def _tell(self, event: Begun | Done | Underway) -> None:
        try:
            self.report(event)
        except Exception as error:  # as above: what is shown must not end what is done
            log.debug("It cannot be shown:", exc_info=error)

    def _note(self, begun: Begun, result: Result) -> Attempt:
        """Note how it ended."""
        try:
            longest = begun.duty.vm.limits.pause
            attempt = commands.ended(
                begun.attempt, result.code, result.output, result.messages, longest
            )
        except Exception as error:  # an answer that nobody can read is no success
            log.debug("Its answer cannot be read:", exc_info=error)
            return self._plainly(begun, result.code or 1, f"Its answer cannot be read: {error!r}.")
        return self._kept(begun, replace(attempt, ended=self.now()))

    def _plainly(self, begun: Begun, code: int, reason: str) -> Attempt:
        """Note an end of which there is nothing but this to say."""
        attempt = replace(begun.attempt, ended=self.now(), exit_code=code, reason=reason)
        return self._kept(begun, attempt)

    def _kept(self, begun: Begun, attempt: Attempt) -> Attempt:
        if begun.key is not None:
            self.history.end(begun.key, attempt)
        return attempt

    def _mind_target(self, duty: Duty, attempt: Attempt) -> None:
        """Give up a target that several cannot use; then nothing waits for it any more."""
        name = duty.target.name
        if name in self.reach.given_up or not duty.vm_name:
            return
        self.reach.note(duty, attempt.exit_code or 0, attempt.reason)
        if name in self.reach.given_up:
            self.waiting = [
                replace(each, not_before=None) if each.target.name == name else each
                for each in self.waiting
            ]

    def _again(self, duty: Duty, code: int) -> datetime | None:
        """Have it tried again, and say when, if it may help; who has named a VM wants to know now."""
        if self.asked or duty.target.name in self.reach.given_up:
            return None
        later = choosing.again(duty, code, self.clock())
        if later is None:
            return None
        self.waiting.append(later)
        return self.now() + timedelta(seconds=duty.vm.retry.wait)

    def _goes_offline(self, begun: Begun) -> bool:
        """Whether the images of a VM that is off are to be backed up: once, until it has run again."""
        duty = begun.duty
        if duty.vm.when_off is not WhenOff.OFFLINE or begun.attempt.consistency == OFFLINE:
            return False
        last = self.history.last(duty.vm_name, duty.target.name, Work.BACKUP, succeeded=True)
        holding = self.holdings.get((duty.vm_name, duty.target.name))
        has_points = last is not None or (holding is not None and holding.points > 0)
        at_rest.look(self.history, duty.vm_name, self.now())
        return has_points and self.history.as_it_lies(duty.vm_name, duty.target.name) is None

    def _follow(self, begun: Begun, result: Result) -> None:
        """What a new point brings with it."""
        duty = begun.duty
        if duty.work is not Work.BACKUP:
            return
        self.orders.learn(duty, result.output)
        if duty.target.keep:
            self.waiting.append(Duty(Work.FORGET, duty.target, duty.vm))


def _failed(error: Exception) -> Result:
    return Result("qmpbackup", code_of(error), b"", f"error: {said_of(error)}")
