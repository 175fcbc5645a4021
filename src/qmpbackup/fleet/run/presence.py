# SPDX-License-Identifier: Apache-2.0
"""Whether a target is there at all, asked right before it is used.

A folder that is not mounted looks like one that is new, and a backup would go to where it is not looked
for. A target that is not always there must be told from one that fails. A thread asks, and nobody waits
for it longer than a bound: storage that hangs holds up no other target.
"""

import logging
import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from qmpbackup.errors import NoSuchTarget, StorageError, Unreachable
from qmpbackup.fleet.looking import answers
from qmpbackup.fleet.records import Work
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.settings import WhenGone
from qmpbackup.plan.room import Space
from qmpbackup.plan.sizes import count_of
from qmpbackup.service import room
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Entrance

log = logging.getLogger(__name__)

PATIENCE: Final = 60.0
"""Seconds after which a target that says nothing is taken for one that is not there: more than a
storage's own patience with a server, and than a disk takes to spin up."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What came of a look: that nobody answers, or that there is no target, as sentences; and the file
    system, if it is one of this machine."""

    silent: str = ""
    missing: str = ""
    space: Space | None = None
    is_repository: bool = False


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Why work is not even tried, with its exit code. `is_gone`: the target is not there, and need not
    be; `is_silent`: nor would it be for any other VM."""

    sentence: str
    code: int = StorageError.exit_code
    is_gone: bool = False
    is_silent: bool = False


def look(place: str, variables: Mapping[str, str], patience: float = PATIENCE) -> Presence:
    """Look at a place.

    Raises:
        Interrupted: a signal is waiting.
        UsageError: it is none.
    """
    entrance = opening.entrance(opening.place(place), {**os.environ, **variables})
    done: queue.SimpleQueue[tuple[str, Presence]] = queue.SimpleQueue()
    folder = None if entrance.holds_several else Path(place)
    threading.Thread(
        target=lambda: done.put((place, _look(entrance, folder))), name="looking", daemon=True
    ).start()
    late = Presence(f"It has not answered within {patience:.0f} s. See that it can be reached.")
    return answers(done, 1, patience).get(place, late)


def _look(entrance: Entrance, folder: Path | None) -> Presence:
    silent = missing = ""
    try:
        entrance.overview(datetime.now(UTC))
    except Unreachable as error:
        silent = str(error)
    except NoSuchTarget as error:
        missing = str(error)
    except Exception as error:  # what else is wrong with it, the work itself says best
        log.debug("Looking failed:", exc_info=error)
    space = None
    if folder is not None:
        with suppress(OSError):
            space = room.space(folder)
    return Presence(silent, missing, space, entrance.holds_several)


def obstacle(duty: Duty, place: str, found: Presence, held: int) -> Hindrance | None:
    """What speaks against work at a place that was looked at, where `held` points were known. Pure."""
    is_gone = duty.target.when_gone is WhenGone.SKIP
    if found.silent:
        return Hindrance(found.silent, is_gone=is_gone, is_silent=True)
    if found.missing and found.is_repository:
        return Hindrance(found.missing, NoSuchTarget.exit_code, is_gone)
    if found.missing and held:
        sentence = _lost(duty, place, held)
        return Hindrance(sentence, NoSuchTarget.exit_code, is_gone)
    if duty.work is Work.BACKUP and found.space is not None:
        return _too_full(duty.target.min_free, place, found.space)
    return None


def _lost(duty: Duty, place: str, held: int) -> str:
    return (
        f"{place} held {count_of(held, 'point')} when it was looked at last, and there is no "
        "target now: perhaps it is not mounted. Nothing was written. Mount it, and run again; or, if it "
        f"was emptied on purpose, begin it anew: qmpbackup --socket {duty.vm.socket} backup --target {place}"
    )


def _too_full(least: float, place: str, space: Space) -> Hindrance | None:
    if space.free >= least * space.total:
        return None
    return Hindrance(
        f"Only {space.free / space.total:.1%} of the file system of {place} are free, and `min_free` is "
        f"{least:.1%}."
    )
