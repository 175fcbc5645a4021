# SPDX-License-Identifier: Apache-2.0
"""Locations in restic's words."""

from collections.abc import Mapping
from pathlib import Path

from qmpbackup.errors import UsageError
from qmpbackup.restic.storage.interface import Storage
from qmpbackup.restic.storage.local import LocalStorage


def connect(location: str, environment: Mapping[str, str]) -> Storage:
    """The storage at a location; an empty one means `RESTIC_REPOSITORY`.

    Raises:
        UsageError: the location is none.
    """
    text = location or environment.get("RESTIC_REPOSITORY", "")
    if not text:
        raise UsageError(
            "There is no location behind restic:.", "Name one, or set RESTIC_REPOSITORY."
        )
    return LocalStorage(Path(text.removeprefix("local:")))
