# SPDX-License-Identifier: Apache-2.0
"""What was done for VMs, and what targets hold of them: values that run, history and judgement share.

Times are aware and in UTC, sizes bytes, durations seconds.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from qmpbackup.errors import NobodyThere

DEGRADED: Final = 3
SUCCEEDED: Final = frozenset({0, DEGRADED})
"""Exit codes of a command that did what it was to do."""
WAS_OFF: Final = NobodyThere.exit_code
ENDED: Final = frozenset({129, 130, 143})
"""Exit codes of a command that somebody ended in order."""
OFFLINE: Final = "offline"
"""The consistency of a backup that was made of the images of a VM that was off."""
PASSED_OVER: Final = ENDED | {WAS_OFF}
"""Exit codes that say nothing: the VM was off, or somebody ended the command in order."""


class Work(StrEnum):
    """What is done for a VM, or (`SWEEP`) for a target."""

    BACKUP = "backup"
    FORGET = "forget"
    SWEEP = "sweep"
    VERIFY = "verify"
    DRILL = "drill"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One piece of work that was begun. Without `ended` it goes on, or died with its run (whose id is
    `run`, and which holds the lock as long as it lives). `exit_code` is the command's; negative where a
    signal ended it. `reason` is its own sentence, where not all was well. `scheduled` is the time of the
    schedule that it was for, None for work that somebody asked for.
    """

    work: Work
    vm: str
    target: str
    run: str
    started: datetime
    ended: datetime | None = None
    exit_code: int | None = None
    reason: str = ""
    scheduled: datetime | None = None
    point: str = ""
    level: str = ""
    consistency: str = ""
    added: int = 0
    read: int = 0
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Holding:
    """What a target held of a VM when it was looked at. `newest` is the newest point that is not known
    to be damaged, nor from the future, as `ahead` points are. `problem`: why nobody could look (then the
    rest is from the last look, if any). `place` marks where that was (`mark_of`)."""

    vm: str
    target: str
    looked: datetime
    newest: datetime | None = None
    newest_id: str = ""
    consistency: str = ""
    points: int = 0
    damaged: int = 0
    host: str = ""
    uuid: str = ""
    problem: str = ""
    ahead: int = 0
    place: str = ""


def mark_of(place: str) -> str:
    """What tells a place from others, and does not tell what may be secret in it."""
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]
