# SPDX-License-Identifier: Apache-2.0
"""Restic repositories for tests, made cheaply."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.repositories import Repository
from qmpbackup.restic import repository as restic
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.storage.location import connect

CHEAP = Scrypt(2, 1, 1)
"""What a password may cost in tests, where nobody guesses."""


def repository(folder: Path) -> Repository:
    """A new repository in a folder, with the caches beside it."""
    return made(Repository(str(folder / "repository"), folder))


def made(wanted: Repository) -> Repository:
    """Make a repository where it is to be."""
    with connect(wanted.location, wanted.environment) as storage:
        restic.Repository.create(
            storage, wanted.password, cost=CHEAP, environment=wanted.environment
        ).close()
    return wanted


@contextmanager
def held_alone(which: Repository) -> Iterator[None]:
    """This process holds a repository as `restic prune` does."""
    with (
        connect(which.location, which.environment) as storage,
        restic.Repository.open(storage, which.password, environment=which.environment) as opened,
        opened.lock(exclusive=True),
    ):
        yield
