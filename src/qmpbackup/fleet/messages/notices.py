# SPDX-License-Identifier: Apache-2.0
"""What there is to tell: what is wrong, of whom, since when. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from qmpbackup.fleet.settings import Event
from qmpbackup.fleet.standing import Severity, Standing, State
from qmpbackup.fleet.survey import Survey
from qmpbackup.plan.sizes import count_of

_EVENTS: Final = {
    State.DAMAGED: Event.DAMAGED,
    State.LATE: Event.LATE,
    State.FAILED: Event.FAILED,
    State.UNKNOWN: Event.FAILED,
    State.DEGRADED: Event.DEGRADED,
    State.UNCOVERED: Event.UNCOVERED,
    State.INVALID: Event.CONFIG,
}
_NEITHER: Final = frozenset({State.RUNNING})
"""States of which nobody can say yet whether they are well."""
_MOST: Final = 100
"""Lines of one message."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that is wrong with a `subject`, such as `db1 → main`."""

    event: Event
    subject: str
    sentence: str
    since: datetime | None = None
    severity: Severity = Severity.WARNING

    @property
    def key(self) -> str:
        """By what it is known again."""
        return f"{self.event}|{self.subject}"

    def __str__(self) -> str:
        since = f" Since {self.since.astimezone(UTC):%Y-%m-%d %H:%M} UTC." if self.since else ""
        return f"{self.event.upper()}  {self.subject}: {self.sentence}{since}"


@dataclass(frozen=True, slots=True)
class News:
    """What there is to tell after a run: what is wrong; what is neither well nor wrong, as nobody can say
    yet; and, in a few words, all."""

    host: str
    now: datetime
    notices: tuple[Notice, ...] = ()
    open: frozenset[str] = frozenset()
    summary: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its title, what is wrong and new, what is well again, and all in a few words."""

    title: str
    news: tuple[Notice, ...]
    recovered: tuple[str, ...]
    summary: str
    host: str
    exit_code: int = 0
    log: str = ""

    @property
    def text(self) -> str:
        """All of it, for people."""
        lines = [str(each) for each in self.news[:_MOST]]
        lines += [f"… and {len(self.news) - _MOST} more"] if len(self.news) > _MOST else []
        lines += [f"RECOVERED  {each}" for each in self.recovered[:_MOST]]
        lines += ["", self.summary] if self.summary else []
        lines += ["", self.log] if self.log else []
        return "\n".join(lines).strip() + "\n"


def subject_of(standing: Standing) -> str:
    """What messages call a VM in a target."""
    return f"{standing.vm} → {standing.target}" if standing.target else standing.vm


def report(survey: Survey, host: str, *, exit_code: int = 0, more: Iterable[Notice] = ()) -> News:
    """What a survey comes to; `more` is what else went wrong."""
    notices = (*_of_vms(survey), *_of_targets(survey), *more)
    unknown = frozenset(subject_of(each) for each in survey.standings if each.state in _NEITHER)
    return News(host, survey.now, notices, unknown, summary(survey), exit_code)


def _of_vms(survey: Survey) -> Iterator[Notice]:
    told = set()
    for each in survey.standings:
        event = _EVENTS.get(each.state)
        if event is not None:
            told.add(each.why)
            yield Notice(event, subject_of(each), each.why, each.since, each.severity)
    for fault in survey.wrong:
        if not fault.subject:
            yield Notice(Event.CONFIG, "configuration", str(fault), None, Severity.CRITICAL)
    if survey.trouble:
        yield Notice(Event.FAILED, "history", survey.trouble)


def _of_targets(survey: Survey) -> Iterator[Notice]:
    for sight in survey.sights:
        subject = f"target {sight.name}"
        if sight.damaged:
            more = f" and {len(sight.damaged) - 1} more" if len(sight.damaged) > 1 else ""
            sentence = f"{sight.damaged[0]}{more}"
            yield Notice(Event.DAMAGED, subject, sentence, None, Severity.CRITICAL)


def summary(survey: Survey) -> str:
    """All VMs in a few words: `42 VMs: 37 ok, 1 late`."""
    counted = Counter(each.state for each in survey.standings)
    vms = count_of(len({each.vm for each in survey.standings}), "VM")
    return f"{vms}: " + ", ".join(f"{count} {state}" for state, count in counted.most_common())


def title(host: str, news: Sequence[Notice], recovered: Sequence[str]) -> str:
    """What a message is about: `qmpbackup on kvm3: 1 late, 1 failed`."""
    counted = Counter(str(each.event) for each in news)
    said = [f"{count} {event}" for event, count in counted.items()]
    said += [f"{len(recovered)} well again"] if recovered else []
    return f"qmpbackup on {host}: {', '.join(said) or 'all is well'}"
