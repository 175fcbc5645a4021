# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup run`: the configuration is read, what is due is done, and who should know is told.

Only one run of a configuration goes by its schedules at a time; what somebody asks for by name is done
beside it, as each VM and each target has a lock of its own.
"""

import hashlib
import logging
import os
import secrets as randomness
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import Locked, QmpBackupError, UsageError
from qmpbackup.filelock import named_lock
from qmpbackup.fleet import metrics, secrets
from qmpbackup.fleet.config import host_name, load
from qmpbackup.fleet.history import History
from qmpbackup.fleet.looking import Sightings, look
from qmpbackup.fleet.messages import notices, telling
from qmpbackup.fleet.messages.notices import News, Notice
from qmpbackup.fleet.messages.telling import Scope
from qmpbackup.fleet.records import DEGRADED
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.run.failing import code_of, said_of
from qmpbackup.fleet.run.rounds import Done, Report, Round
from qmpbackup.fleet.settings import Configuration, Event, Fault
from qmpbackup.fleet.standing import Severity
from qmpbackup.fleet.survey import Survey, judge
from qmpbackup.fleet.vm_sockets import trace
from qmpbackup.plan.guessing import or_did_you_mean
from qmpbackup.state import state_folder

log = logging.getLogger(__name__)

SOME_FAILED, USAGE = 14, UsageError.exit_code
_UNREAD: Final = Configuration(faults=(Fault("", "", "It could not be read."),))
"""What is known of a configuration while nothing is."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: by the schedules, or now, for named VMs or all of them."""

    path: Path
    vms: tuple[str, ...] = ()
    all_vms: bool = False
    dry_run: bool = False

    @property
    def is_by_schedule(self) -> bool:
        """Whether only what is due is run."""
        return not (self.vms or self.all_vms)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, or, for a dry run, is due; what is wrong with the configuration; by which ways nobody
    could be told; and why it could not be noted or measured."""

    done: tuple[Done, ...] = ()
    due: tuple[Duty, ...] = ()
    faults: tuple[Fault, ...] = ()
    is_usable: bool = True
    took: timedelta = field(default_factory=timedelta)
    untold: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()

    @property
    def final(self) -> tuple[Done, ...]:
        """Each piece of work once, as it ended at last: one that was to be tried again, and was not, as
        where a window has closed, too."""
        return tuple({each.duty.occasion: each for each in self.done}.values())

    @property
    def exit_code(self) -> int:
        """0: all that was due was done; 3: some of it degraded, or it could not be noted or measured; 14: some
        of it failed, is switched off by a fault, or could be told nobody; 2: the configuration cannot be
        used."""
        if not self.is_usable:
            return USAGE
        is_wrong = self.untold or any(not each.is_warning for each in self.faults)
        if is_wrong or not all(each.fine for each in self.final):
            return SOME_FAILED
        is_degraded = self.troubles or any(each.is_degraded for each in self.final)
        return DEGRADED if is_degraded else 0


def run(request: Request, report: Report) -> Outcome:
    """Do what is due, or what was asked for; then look at what targets hold, and tell.

    Raises:
        Locked: another run goes by the schedules of this configuration.
        UsageError: there is no such VM.
        Interrupted: what ran was ended in order.
    """
    with interrupt.held(), History.opened(state_folder(), read_only=request.dry_run) as history:
        with _heard(request, history):
            configuration = load(request.path, history.known_vms())
        if not configuration.is_usable:
            return _unusable(request, configuration, history)
        _require_known(configuration, request.vms)
        with ExitStack() as stack:
            with _heard(request, history, configuration):
                stack.enter_context(_alone(request))
            if request.dry_run:
                return _planned(request, configuration, history)
            started = datetime.now(UTC)
            name = f"{started:%Y%m%dT%H%M%S}-{randomness.token_hex(3)}"
            stack.enter_context(history.running(name))
            return _run(_Night(request, configuration, history, name, started), report)


@contextmanager
def _heard(
    request: Request, history: History, configuration: Configuration | None = None
) -> Iterator[None]:
    """Tell people of whatever ends the block before its end. Who names VMs looks at it."""
    try:
        yield
    except Locked:
        raise
    except Exception as error:
        if not (request.vms or request.dry_run):
            try:
                _tell_of(error, configuration or _UNREAD, history)
            except Exception as another:  # noqa: BLE001 - the first is what counts
                log.warning("Nobody could be told: %s", said_of(another))
        raise


def _tell_of(error: Exception, configuration: Configuration, history: History) -> None:
    """Tell that a run broke off, with what was seen last. Nothing is said to be well: nobody has looked."""
    now = datetime.now(UTC)
    sentence = f"The run broke off: {said_of(error)}"
    log.warning("%s", sentence)
    broke_off = Notice(Event.FAILED, "run", sentence, now, Severity.CRITICAL)
    survey = judge(configuration, history, Sightings(tuple(history.holdings())), now)
    news = notices.report(survey, host_name(), exit_code=code_of(error), more=(broke_off,))
    ways = telling.to_be_told(state_folder(), configuration)
    telling.tell(ways, news, history, secrets.reveal, scope=Scope.BROKEN_OFF)


def _unusable(request: Request, configuration: Configuration, history: History) -> Outcome:
    """Tell those who were to be told when it could be used."""
    outcome = Outcome(faults=configuration.faults, is_usable=False)
    if request.dry_run:
        return outcome
    found = Survey(datetime.now(UTC), faults=configuration.faults, trouble=history.trouble)
    news = notices.report(found, host_name(), exit_code=USAGE)
    ways = telling.to_be_told(state_folder(), configuration)
    telling.begun((), history, news.now, secrets.reveal)
    untold = telling.tell(ways, news, history, secrets.reveal, scope=Scope.CONFIG)
    return replace(outcome, untold=untold)


def _planned(request: Request, configuration: Configuration, history: History) -> Outcome:
    looked = look(configuration, history, datetime.now(UTC), secrets.environment)
    night = _Night(request, configuration, history, "", datetime.now(UTC))
    due = night.round(looked, lambda _: None).plan()
    return Outcome(due=tuple(due), faults=configuration.faults)


@dataclass(frozen=True, slots=True)
class _Night:
    """A run that goes on."""

    request: Request
    configuration: Configuration
    history: History
    name: str
    started: datetime

    def round(self, looked: Sightings, report: Report) -> Round:
        """What is to be done, by what targets hold."""
        return Round(
            self.configuration,
            self.history,
            self.name,
            report,
            {(each.vm, each.target): each for each in (*self.history.holdings(), *looked.holdings)},
            asked=frozenset(self.request.vms),
            all_vms=self.request.all_vms,
            alive=lambda now: self.show(looked, now),
        )

    def show(self, looked: Sightings, now: datetime) -> None:
        """Show that it goes on."""
        self.history.alive(now)
        for notice in self.measure(judge(self.configuration, self.history, looked, now)):
            log.warning("%s", notice.sentence)

    def measure(self, survey: Survey) -> list[Notice]:
        """Write the metrics; gives what went wrong with that."""
        if not self.configuration.textfile:
            return []
        try:
            metrics.write(Path(self.configuration.textfile), survey, self.history)
        except QmpBackupError as error:
            return [Notice(Event.FAILED, "metrics", str(error))]
        return []


def _run(night: _Night, report: Report) -> Outcome:
    configuration, history = night.configuration, night.history
    with _heard(night.request, history, configuration):
        outcome, news = _performed(night, report)
    if night.request.vms:
        return outcome
    untold = telling.tell(configuration.notify, news, history, secrets.reveal)
    return replace(outcome, untold=untold)


def _performed(night: _Night, report: Report) -> tuple[Outcome, News]:
    """Do what is due, and look at what has come of it."""
    configuration, history = night.configuration, night.history
    if not night.request.vms:  # who names a VM looks at it
        telling.remember(state_folder(), configuration)
        telling.begun(configuration.notify, history, night.started, secrets.reveal)
    history.resume(night.started)
    _remember(configuration, history, night.started)
    looked = look(configuration, history, night.started, secrets.environment)
    done = tuple(night.round(looked, report).perform())
    now = datetime.now(UTC)
    history.forget_before(now - timedelta(seconds=configuration.run.history))
    outcome = Outcome(done, faults=configuration.faults, took=now - night.started)
    found = look(configuration, history, now, secrets.environment)
    history.alive(now)
    survey = judge(configuration, history, found, now)
    more = night.measure(survey)
    for each in more:
        log.warning("%s", each.sentence)
    troubles = (survey.trouble, *(each.sentence for each in more))
    outcome = replace(outcome, troubles=tuple(filter(None, troubles)))
    news = notices.report(survey, host_name(), exit_code=outcome.exit_code, more=more)
    return outcome, news


def _remember(configuration: Configuration, history: History, now: datetime) -> None:
    """Keep the names of VMs that are there, for when they are off, and when they were started."""
    traces = {each.name: trace(each.socket) for each in configuration.vms}
    for group in {each.group for each in configuration.vms}:
        vms = [each.name for each in configuration.vms if each.group == group]
        history.know(group, [each for each in vms if traces[each].may_run], now)
    history.ran({name: each.made for name, each in traces.items() if each.made is not None})


def _require_known(configuration: Configuration, names: Sequence[str]) -> None:
    known = [each.name for each in configuration.vms]
    for name in names:
        if name not in known:
            fault = next(
                (str(each) for each in configuration.faults if each.subject == f"vm.{name}"), ""
            )
            said = fault or f"The configuration has no VM {name!r}{or_did_you_mean(name, known)}"
            raise UsageError(said, "`qmpbackup config show` names all of them.")


def _alone(request: Request) -> AbstractContextManager[None]:
    if not request.is_by_schedule or request.dry_run:
        return nullcontext()
    key = hashlib.sha256(os.fsencode(request.path.resolve())).hexdigest()[:16]
    return named_lock(f"fleet {key}", f"the configuration {request.path}", 0.0)
