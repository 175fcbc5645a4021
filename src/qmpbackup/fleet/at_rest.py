# SPDX-License-Identifier: Apache-2.0
"""Images of a VM that is off: whether somebody has written to them since they were backed up as they lie.

A VM may run wholly between two runs, or at an address where we see nobody. Its images tell: what they
looked like after a backup of ours is kept, as that may write to them as well (change bitmaps). A block
device need not tell, so that of a VM on such only its starts do.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Attempt

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def backed_up(history: History, vm: str, files: tuple[str, ...]) -> None:
    """Note what the images of a VM look like after a backup; without `files`, those that are known."""
    paths = files or tuple(history.images(vm))
    history.note_images(vm, {path: when for path in paths if (when := _written(path)) is not None})


def look(history: History, vm: str, now: datetime) -> None:
    """Note that a VM has run since, if its images say so, before a backup makes them look as new."""
    if _have_changed(history, vm):
        history.ran({vm: now})


def point(history: History, vm: str, target: str) -> Attempt | None:
    """The backup of the images of a VM that is off, if they are what they were; where that cannot be told,
    they are not."""
    found = history.as_it_lies(vm, target)
    return None if found is None or _have_changed(history, vm) else found


def _have_changed(history: History, vm: str) -> bool:
    known = history.images(vm)
    return not known or any(_written(path) != when for path, when in known.items())


def _written(path: str) -> datetime | None:
    """When an image was written to last; None where nobody can tell."""
    try:
        return _EPOCH + timedelta(microseconds=Path(path).stat().st_mtime_ns // 1000)
    except (OSError, ValueError, OverflowError):
        return None
