# SPDX-License-Identifier: Apache-2.0
"""Prune a restic repository: decided here, forgotten and swept by restic's own program."""

from datetime import datetime

from qmpbackup.errors import UsageError
from qmpbackup.model import Location
from qmpbackup.service.prune import Outcome, Request


def prune(request: Request, location: Location, now: datetime) -> Outcome:
    """Prune the points of one VM in a repository; see `service.prune.prune`."""
    del request, now
    raise UsageError(f"{location} cannot be pruned yet.", "Use `restic forget --prune`.")
