# SPDX-License-Identifier: Apache-2.0
"""Which of what is wrong is news, for each way of telling people, and that it was told.

What was told is kept in the history. Where that cannot be, people are told again: rather twice than never.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Final

from qmpbackup.durable import make_folders, replace_file
from qmpbackup.errors import Interrupted, QmpBackupError
from qmpbackup.fleet.history import History
from qmpbackup.fleet.messages import ways
from qmpbackup.fleet.messages.notices import Message, News, Notice, title
from qmpbackup.fleet.settings import Configuration, Event, NotifySettings, NotifyType, Secret

log = logging.getLogger(__name__)

_UNHEARD: Final = "unheard|"
_STARTED: Final = "run started"
_REPORTED: Final = "run reported"
_REPORTED_BY: Final = "run reported by "
_KEPT: Final = "notify.json"


class Scope(Enum):
    """What a report is of: all VMs, so that what it does not name is well; a configuration that stops a
    run; a run that broke off; one thing alone; or a test."""

    ALL = "all"
    CONFIG = "config"
    BROKEN_OFF = "broken off"
    ONE = "one"
    TEST = "test"


Reveal = Callable[[Secret], str]
"""Gives a secret; may fail with a `QmpBackupError`."""


def begun(
    notify: Sequence[NotifySettings], history: History, now: datetime, reveal: Reveal
) -> None:
    """Note that a run begins, and tell those who wait for its end."""
    history.tell(_STARTED, now)
    for each in notify:
        if each.type is NotifyType.HEALTHCHECKS:
            with suppress(QmpBackupError):  # its end is told as well, and says what is wrong
                ways.start(each, reveal)


def tell(
    notify: Sequence[NotifySettings],
    report: News,
    history: History,
    reveal: Reveal,
    run_log: str = "",
    *,
    scope: Scope = Scope.ALL,
) -> tuple[str, ...]:
    """Tell each what is news for it, in one message; gives the names of those that could not be told."""
    failed = []
    for each in notify:
        message = _message(each, report, history, run_log, scope)
        if message is None:
            continue
        try:
            ways.send(each, message, reveal)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, others are told
            log.warning("notify.%s could not be told: %s", each.name, error)
            history.tell(_UNHEARD + each.name, report.now)
            failed.append(each.name)
        else:
            history.tell(_UNHEARD + each.name, None)
            _note(each, message, report, history, scope)
    if scope in {Scope.ALL, Scope.CONFIG, Scope.BROKEN_OFF}:
        _note_reported(history, report.now)
    return tuple(failed)


def _note_reported(history: History, now: datetime) -> None:
    for key in history.all_told():
        if key.startswith(_REPORTED_BY):
            history.tell(key, None)
    history.tell(_REPORTED, now)
    if invocation := os.environ.get("INVOCATION_ID", ""):
        history.tell(_REPORTED_BY + invocation, now)


def has_reported(history: History, invocation: str = "") -> bool:
    """Whether the last run that was begun has told all that it had to say; with an `invocation` (what
    systemd calls one start of a unit): whether that was the last to tell. One that never came to begin
    is not to be taken for the one before."""
    if invocation:
        return history.told(_REPORTED_BY + invocation) is not None
    started, reported = history.told(_STARTED), history.told(_REPORTED)
    return started is not None and reported is not None and reported >= started


def _message(
    way: NotifySettings, report: News, history: History, run_log: str, scope: Scope
) -> Message | None:
    """The one message for one way; None where there is nothing to say."""
    told = history.all_told()
    notices = (*report.notices, *_unheard(way, told))
    news = tuple(
        each for each in notices if each.event in way.on and _is_news(way, each, told, report)
    )
    is_all = scope is Scope.ALL
    recovered = tuple(_recovered(way, notices, told, report)) if is_all else ()
    recovered = recovered if Event.RECOVERED in way.on else ()
    always = Event.ALWAYS in way.on or way.type is NotifyType.HEALTHCHECKS
    if way.type is NotifyType.HEALTHCHECKS:
        news = tuple(each for each in notices if each.event in way.on)  # what it was told is over
    if not (news or recovered or always):
        if is_all:
            _forget_what_went(way, notices, told, report, history)
        return None
    head = title(report.host, news, recovered)
    return Message(
        head,
        news,
        recovered,
        report.summary,
        report.host,
        report.exit_code,
        run_log if way.log else "",
    )


def _key(way: NotifySettings, key: str) -> str:
    return f"{way.name}|{key}"


def _is_news(way: NotifySettings, notice: Notice, told: dict[str, datetime], report: News) -> bool:
    before = told.get(_key(way, notice.key))
    if before is None or before > report.now:  # a clock was set back since
        return True
    return report.now - before >= timedelta(seconds=way.repeat)


def _unheard(way: NotifySettings, told: dict[str, datetime]) -> Iterator[Notice]:
    """Other ways that could not be told something."""
    for key, at in told.items():
        name = key.removeprefix(_UNHEARD)
        if key.startswith(_UNHEARD) and name != way.name:
            sentence = "A message could not be sent this way; the log says why."
            yield Notice(Event.FAILED, f"notify.{name}", sentence, at)


def _gone(
    way: NotifySettings, notices: Sequence[Notice], told: dict[str, datetime], report: News
) -> Iterator[tuple[str, str]]:
    """Keys that were told this way and are wrong no more, with their subjects."""
    wrong = {_key(way, each.key) for each in notices}
    for key in told:
        event, _, subject = key.removeprefix(_key(way, "")).partition("|")
        is_ours = key.startswith(_key(way, "")) and event in set(Event)
        if is_ours and key not in wrong and subject not in report.open:
            yield key, subject


def _recovered(
    way: NotifySettings, notices: Sequence[Notice], told: dict[str, datetime], report: News
) -> Iterator[str]:
    """Subjects that people were told of, and of which nothing is wrong any more, each once."""
    still = {each.subject for each in notices}
    subjects = (subject for _, subject in _gone(way, notices, told, report))
    yield from dict.fromkeys(each for each in subjects if each not in still)


def _forget_what_went(
    way: NotifySettings,
    notices: Sequence[Notice],
    told: dict[str, datetime],
    report: News,
    history: History,
) -> None:
    for key, _ in list(_gone(way, notices, told, report)):
        history.tell(key, None)


def _note(
    way: NotifySettings, message: Message, report: News, history: History, scope: Scope
) -> None:
    if scope is Scope.TEST:
        return
    if scope is Scope.ALL:
        told = history.all_told()
        notices = (*report.notices, *_unheard(way, told))
        _forget_what_went(way, notices, told, report, history)
    for each in message.news:
        history.tell(_key(way, each.key), report.now)


# Ways that were known before


def remember(folder: Path, configuration: Configuration) -> None:
    """Keep who is to be told, for when the configuration cannot be read. Secrets are not in it, but where
    they are."""
    import msgspec

    with suppress(OSError):
        make_folders(folder)
        path = folder / _KEPT
        data = msgspec.json.encode(configuration.notify)
        if not path.exists() or path.read_bytes() != data:
            replace_file(path, data)


def to_be_told(folder: Path, configuration: Configuration) -> tuple[NotifySettings, ...]:
    """Who is to be told: by the configuration, or by the last that could be read."""
    if configuration.notify or configuration.is_usable:
        return configuration.notify
    import msgspec

    try:
        kept = (folder / _KEPT).read_bytes()
        return msgspec.json.decode(kept, type=tuple[NotifySettings, ...])
    except (OSError, msgspec.MsgspecError):
        return ()


def tested(host: str, now: datetime) -> News:
    """A report that says nothing but that it arrives."""
    notice = Notice(Event.FAILED, "test", "This is a test. Nothing is wrong.")
    return News(host, now, (notice,), summary="qmpbackup notify --test")


def silenced(way: NotifySettings) -> NotifySettings:
    """A way that takes everything, for a test."""
    return replace(way, on=frozenset(Event), repeat=0.0)
