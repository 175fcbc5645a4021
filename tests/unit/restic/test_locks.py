# SPDX-License-Identifier: Apache-2.0
"""Who may use a repository beside whom, how locks age, and what a lost lock forbids."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from qmpbackup import interrupt
from qmpbackup.errors import DamagedError, Interrupted, Locked, StorageError
from qmpbackup.restic import lock_file
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.lock import Timing
from qmpbackup.restic.lock_file import Lock
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import Buffer, File, Kind, Refused
from qmpbackup.restic.storage.local import LocalStorage
from stock.remembered import Remembered

QUICK = Timing(settle=0.0, retry=0.01)
SNAPSHOT = Snapshot(datetime(2026, 1, 1, tzinfo=UTC), bytes(32), ("/vm",))


class Place(Remembered):
    """A storage where a test may do something right after a file was saved."""

    saved: Callable[[File], None] | None = None

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Remember a file."""
        super().save(file, parts)
        if self.saved is not None:
            self.saved(file)


@pytest.fixture
def place() -> Place:
    """Where the repository is."""
    return Place()


@pytest.fixture
def repository(place: Place) -> Iterator[Repository]:
    """An empty repository."""
    with Repository.create(place, "password", cost=Scrypt(2, 1, 1), environment={}) as made:
        yield made


@pytest.fixture
def gone() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _locks(repository: Repository) -> list[str]:
    return [name for name, _ in repository.storage.list(Kind.LOCK)]


def _write(repository: Repository, written: Lock) -> str:
    name, sealed = repository.seal_unpacked(Kind.LOCK, lock_file.encode(written))
    repository.storage.save(File(Kind.LOCK, name), [sealed])
    return name


def _elsewhere(*, exclusive: bool, age: timedelta = timedelta()) -> Lock:
    ours = Lock.ours(exclusive=exclusive)
    return replace(ours, hostname="elsewhere", pid=1, time=ours.time - age)


def test_many_may_share_and_nobody_is_there_afterwards(repository: Repository) -> None:
    with repository.lock(timing=QUICK), repository.lock(timing=QUICK):
        assert len(_locks(repository)) == 2
    assert _locks(repository) == []


@pytest.mark.parametrize(("ours", "theirs"), [(True, False), (False, True), (True, True)])
def test_who_wants_it_alone_bears_nobody(repository: Repository, ours: bool, theirs: bool) -> None:
    other = _write(repository, _elsewhere(exclusive=theirs))
    with (
        pytest.raises(Locked, match="process 1 on elsewhere"),
        repository.lock(exclusive=ours, timing=QUICK),
    ):
        pass
    assert _locks(repository) == [other]


def test_a_lock_that_appears_while_ours_is_written_counts(
    repository: Repository, place: Place
) -> None:
    appeared: list[str] = []

    def appear(_file: File) -> None:
        place.saved = None
        appeared.append(_write(repository, _elsewhere(exclusive=True)))

    place.saved = appear
    with pytest.raises(Locked), repository.lock(timing=QUICK):
        pass
    assert _locks(repository) == appeared


def test_who_reads_begins_at_once_and_what_was_read_counts_if_nobody_came(
    repository: Repository, place: Place
) -> None:
    appeared: list[str] = []
    begun: list[str] = []

    def appear(_file: File) -> None:
        place.saved = None
        appeared.append(_write(repository, _elsewhere(exclusive=True)))

    place.saved = appear
    with pytest.raises(Locked), repository.lock(early=True, timing=QUICK):
        begun.append("read")
    assert begun == ["read"]
    assert _locks(repository) == appeared


def test_damage_that_others_made_meanwhile_is_told_as_theirs(
    repository: Repository, place: Place
) -> None:
    def appear(_file: File) -> None:
        place.saved = None
        _write(repository, _elsewhere(exclusive=True))

    place.saved = appear
    with pytest.raises(Locked), repository.lock(early=True, timing=QUICK):
        raise DamagedError("A pack is missing.")


def test_reading_alone_is_settled(repository: Repository) -> None:
    with repository.lock(early=True, timing=QUICK):
        repository.settle_lock()
    assert _locks(repository) == []


def test_it_waits_for_the_end_of_the_other(repository: Repository) -> None:
    other = File(Kind.LOCK, _write(repository, _elsewhere(exclusive=True)))
    ending = threading.Timer(0.2, repository.storage.remove, [other])
    ending.start()
    with repository.lock(wait=30.0, timing=QUICK):
        assert len(_locks(repository)) == 1
    ending.join()


def test_a_signal_ends_the_waiting(repository: Repository) -> None:
    other = _write(repository, _elsewhere(exclusive=True))
    with interrupt.held():
        ending = threading.Timer(
            0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]
        )
        ending.start()
        with pytest.raises(Interrupted), repository.lock(wait=60.0, timing=QUICK):
            pass
        ending.join()
    assert _locks(repository) == [other]


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_lock_not_refreshed_for_half_an_hour_counts_no_more(
    repository: Repository,
    exclusive: bool,
) -> None:
    _write(repository, _elsewhere(exclusive=exclusive, age=timedelta(minutes=30, seconds=1)))
    with repository.lock(exclusive=True, timing=QUICK):
        pass


def test_a_lock_of_this_host_whose_process_is_gone_is_removed(
    repository: Repository, gone: int
) -> None:
    _write(repository, replace(Lock.ours(exclusive=True), pid=gone))
    with repository.lock(exclusive=True, timing=QUICK):
        assert len(_locks(repository)) == 1
    assert _locks(repository) == []


def test_the_same_process_id_elsewhere_may_be_alive(repository: Repository, gone: int) -> None:
    _write(repository, replace(_elsewhere(exclusive=True), pid=gone))
    with pytest.raises(Locked), repository.lock(timing=QUICK):
        pass


def test_a_damaged_lock_may_be_anybodys(repository: Repository) -> None:
    repository.storage.save(File(Kind.LOCK, "ab" * 32), [b"nonsense"])
    with pytest.raises(DamagedError, match="abab"), repository.lock(timing=QUICK):
        pass


def test_an_empty_lock_is_an_upload_that_broke_off(repository: Repository) -> None:
    repository.storage.save(File(Kind.LOCK, "ab" * 32), [])
    with repository.lock(timing=QUICK):
        pass


def test_it_is_refreshed_and_never_absent(repository: Repository) -> None:
    seen: set[str] = set()
    with repository.lock(timing=replace(QUICK, refresh=0.01)):
        end = time.monotonic() + PATIENCE
        while len(seen) < 5 and time.monotonic() < end:
            now = _locks(repository)
            # While a listing is under way, the new file may be missed and the old one gone.
            assert now or _locks(repository)
            seen.update(now)
    assert len(seen) >= 5
    assert _locks(repository) == []


def test_who_slept_too_long_keeps_a_lock_that_is_still_there(repository: Repository) -> None:
    with repository.lock(timing=replace(QUICK, lost=-1.0)):
        before = _locks(repository)
        repository.save_snapshot(SNAPSHOT)
        after = _locks(repository)
        assert len(after) == 1
        assert before != after


def test_who_slept_too_long_and_lost_the_lock_writes_no_more(repository: Repository) -> None:
    with repository.lock(timing=replace(QUICK, lost=-1.0)):
        for name in _locks(repository):
            repository.storage.remove(File(Kind.LOCK, name))
        with pytest.raises(StorageError, match="lost"):
            repository.save_snapshot(SNAPSHOT)
    assert repository.snapshots() == []


def test_where_nothing_can_be_written_readers_need_no_lock(
    repository: Repository, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    repository.save_snapshot(SNAPSHOT)
    place.is_read_only = True
    with repository.lock(timing=QUICK):
        assert len(repository.snapshots()) == 1
        place.is_read_only = False
        with pytest.raises(Refused):
            repository.save_snapshot(SNAPSHOT)
    assert "without a lock" in caplog.text


def test_where_nothing_can_be_written_nobody_has_it_alone(
    repository: Repository, place: Place
) -> None:
    place.is_read_only = True
    with pytest.raises(Refused), repository.lock(exclusive=True, timing=QUICK):
        pass


def test_readers_without_a_lock_honour_those_of_others(
    repository: Repository, place: Place
) -> None:
    _write(repository, _elsewhere(exclusive=True))
    place.is_read_only = True
    with pytest.raises(Locked), repository.lock(timing=QUICK):
        pass


class AppendOnly(Remembered):
    """What an append-only REST server allows: to remove locks, and nothing else."""

    def remove(self, file: File) -> None:
        """Forget a lock."""
        if file.kind is not Kind.LOCK:
            raise Refused("Nobody may remove anything here.")
        super().remove(file)


def test_an_append_only_storage_is_locked_like_any_other() -> None:
    repository = Repository.create(AppendOnly(), "password", cost=Scrypt(2, 1, 1), environment={})
    with repository.lock(timing=QUICK):
        assert len(_locks(repository)) == 1
        name = repository.save_snapshot(SNAPSHOT)
        with pytest.raises(Refused):
            repository.remove_snapshot(name)
    assert _locks(repository) == []


HOLDER = """
import sys, time
from pathlib import Path
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.local import LocalStorage
with Repository.open(LocalStorage(Path(sys.argv[1])), "password", environment={}).lock():
    print("held", flush=True)
    sys.stdin.read()
print("ended", flush=True)
"""


def test_the_question_whether_we_are_alive_does_not_end_us(
    tmp_path: Path,
) -> None:
    folder = LocalStorage(tmp_path / "repository")
    repository = Repository.create(folder, "password", cost=Scrypt(2, 1, 1), environment={})
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGHUP)
        with pytest.raises(Locked), repository.lock(exclusive=True, timing=QUICK):
            pass
        out, _ = holder.communicate(timeout=PATIENCE)
    assert out == "ended\n"
    assert holder.returncode == 0
