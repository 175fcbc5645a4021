# SPDX-License-Identifier: Apache-2.0
"""Make a restic repository."""

import os
from dataclasses import dataclass

from qmpbackup.errors import UsageError
from qmpbackup.model import Location, Place


@dataclass(frozen=True, slots=True)
class Made:
    """A new repository: its id, and where it lies (with secrets masked)."""

    id: str
    location: str


def init(place: Place) -> Made:
    """Make a repository, with location and password as restic takes them.

    Raises:
        UsageError: the place is a folder, there is a repository already, or there is no password.
        StorageError: it could not be written.
    """
    if not isinstance(place, Location):
        raise UsageError(
            f"{place} is a folder, which needs no init: the first backup makes it.",
            f"For a repository in that folder: --target restic:{place}",
        )
    from qmpbackup.restic import password
    from qmpbackup.restic.repository import Repository
    from qmpbackup.restic.storage.location import connect

    with connect(place.text, os.environ) as storage:
        repository = Repository.create(storage, password.read(os.environ, confirm=True))
        return Made(repository.config.id, storage.name)
