# SPDX-License-Identifier: Apache-2.0
"""A signal that comes while a storage is asked again ends the run; it never counts as damage."""

import signal
import threading
from pathlib import Path

import pytest

from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.interface import File, Kind, Temporary
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.storage.wrappers import Retrying
from qmpbackup.targets.repository.target import RepositoryTarget
from qmpbackup.undo import UndoStack
from stock.stored_repository import VM, StoredRepository

MIB = 1024 * 1024


class Hiccup(LocalStorage):
    """A storage that fails once with a file of some kind, just when the user ends the run."""

    kind: Kind | None = None

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        self._hiccup(file)
        return super().load(file, offset, length)

    def remove(self, file: File) -> None:
        self._hiccup(file)
        super().remove(file)

    def _hiccup(self, file: File) -> None:
        if file.kind is self.kind:
            self.kind = None
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            raise Temporary("The server says 503.")


@pytest.fixture
def stored(tmp_path: Path) -> StoredRepository:
    made = StoredRepository(tmp_path)
    for byte in (1, 2):
        made.add({"hd0": bytes([byte]) * MIB})
    return made


def test_no_point_counts_as_damaged(stored: StoredRepository, tmp_path: Path) -> None:
    storage = Hiccup(stored.path)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "empty")}
    with Repository.open(
        Retrying(storage), stored.made.password, environment=environment
    ) as repository:
        target = RepositoryTarget(repository, VM)
        with interrupt.held():
            storage.kind = Kind.DATA
            with pytest.raises(Interrupted):
                target.load()
        points = target.load().points
        with interrupt.held():
            storage.kind = Kind.DATA
            with pytest.raises(Interrupted):
                target.quick_check(points[-1], "hd0", points)


def test_a_lock_is_removed(stored: StoredRepository) -> None:
    storage = Hiccup(stored.path)
    with (
        Repository.open(Retrying(storage), stored.made.password, environment={}) as repository,
        interrupt.held(),
        pytest.raises(Interrupted),
        repository.lock(),
    ):
        storage.kind = Kind.LOCK
    assert stored.files("locks") == []


def test_a_step_of_undoing_that_it_ends_does_not_use_it_up() -> None:
    done: list[str] = []
    steps = UndoStack()
    steps.push("do the last", lambda: done.append("last"))
    steps.push("do the first", interrupt.check)
    with interrupt.held():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        assert len(steps.run()) == 1
        with pytest.raises(Interrupted):
            interrupt.check()
    assert done == ["last"]
