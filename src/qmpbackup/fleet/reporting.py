# SPDX-License-Identifier: Apache-2.0
"""What a run owes those who look after it: a ping when it begins; metrics and messages at its end.

    began    a sign of life, pings
    ended    targets are looked at, then metrics are written, then people are told
    refused  the configuration cannot be used: people are told, by the last one that could be

None of it stops a run, or fails it: what could not be written or sent is returned, as sentences.
"""

import logging
from datetime import datetime
from pathlib import Path

from qmpbackup.errors import QmpBackupError
from qmpbackup.fleet import metrics, secrets
from qmpbackup.fleet.config import host_name
from qmpbackup.fleet.history import History
from qmpbackup.fleet.messages import telling
from qmpbackup.fleet.messages.notices import News, Notice, report
from qmpbackup.fleet.settings import Configuration, Event
from qmpbackup.fleet.standing import Severity
from qmpbackup.fleet.survey import Survey, survey

log = logging.getLogger(__name__)


def began(configuration: Configuration, history: History, now: datetime) -> None:
    """Note that a run is alive, and tell those who wait for its end."""
    history.alive(now)
    telling.begun(configuration.notify, history, now, secrets.reveal)


def ended(
    configuration: Configuration,
    history: History,
    folder: Path,
    now: datetime,
    exit_code: int,
    run_log: str = "",
) -> tuple[str, ...]:
    """Look at all targets, write metrics, tell people; `folder` is where state is kept."""
    history.alive(now)
    found = survey(configuration, history, now, secrets.environment)
    failed = list(_measured(configuration, found, history))
    more = [Notice(Event.FAILED, "metrics", each) for each in failed]
    news = report(found, host_name(), exit_code=exit_code, more=more)
    unheard = telling.tell(configuration.notify, news, history, secrets.reveal, run_log)
    telling.remember(folder, configuration)
    return (*failed, *(f"notify.{each} could not be told." for each in unheard))


def _measured(configuration: Configuration, found: Survey, history: History) -> tuple[str, ...]:
    if not configuration.textfile:
        return ()
    try:
        metrics.write(Path(configuration.textfile), found, history)
    except QmpBackupError as error:
        log.warning("%s", error)
        return (str(error),)
    return ()


def refused(
    configuration: Configuration, history: History, folder: Path, now: datetime, exit_code: int
) -> tuple[str, ...]:
    """Tell people that the configuration cannot be used."""
    telling.begun((), history, now, secrets.reveal)
    wrong = [str(each) for each in configuration.faults if not each.is_warning]
    more = f" And {len(wrong) - 1} more." if len(wrong) > 1 else ""
    notice = Notice(Event.CONFIG, "configuration", f"{wrong[0]}{more}", now, Severity.CRITICAL)
    news = News(host_name(), now, (notice,), exit_code=exit_code)
    ways = telling.to_be_told(folder, configuration)
    unheard = telling.tell(ways, news, history, secrets.reveal, scope=telling.Scope.CONFIG)
    return tuple(f"notify.{each} could not be told." for each in unheard)
