# SPDX-License-Identifier: Apache-2.0
"""How fast each backup may go, so that all that run into a target keep to what it may take now. Pure."""

from collections.abc import Collection
from datetime import datetime

from qmpbackup.fleet.records import Work
from qmpbackup.fleet.run.due import Duty
from qmpbackup.plan import calendar
from qmpbackup.plan.speed import shared


def share(duty: Duty, running: Collection[Duty], now: datetime) -> int:
    """Bytes a second of one of the backups that run (0: no limit)."""
    fits = (each for each in duty.target.bandwidth if calendar.is_within(each.during, now))
    found = next(fits, None)
    beside = sum(
        each.work is Work.BACKUP and each.target.name == duty.target.name for each in running
    )
    return shared(found.limit, beside) if found else 0
