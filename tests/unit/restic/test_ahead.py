# SPDX-License-Identifier: Apache-2.0
"""What is asked at once, in which order the answers hold, and who is told what goes wrong."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from lab.patience import PATIENCE
from qmpbackup.errors import Locked, WrongPassword
from qmpbackup.restic import lock_file
from qmpbackup.restic.ahead import Ahead
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.lock import Timing
from qmpbackup.restic.lock_file import Lock
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.interface import File, Kind, Temporary
from qmpbackup.restic.storage.wrappers import Retries, Retrying
from stock.remembered import Remembered

CHEAP = Scrypt(2, 1, 1)


class Asked(Remembered):
    """A storage where a test may do something before and after it answers."""

    before: Callable[[str], None] = staticmethod(lambda _: None)
    after: Callable[[Kind], None] = staticmethod(lambda _: None)
    gives_up: Callable[[], None] = staticmethod(lambda: None)

    def size(self, file: File) -> int:
        """The length of a file."""
        self.before(f"size {file}")
        return super().size(file)

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths."""
        self.before(kind)
        found = list(super().list(kind))
        self.after(kind)
        return iter(found)

    def give_up(self) -> None:
        """Told when nothing is waited for any more."""
        self.gives_up()


@pytest.fixture
def place() -> Asked:
    """A storage with an empty repository."""
    made = Asked()
    Repository.create(made, "password", cost=CHEAP, environment={}).close()
    return made


def _save(place: Remembered, kind: Kind, number: int) -> str:
    data = str(number).encode()
    name = hashlib.sha256(data).hexdigest()
    place.save(File(kind, name), [data])
    return name


def _names(ahead: Ahead, kind: Kind) -> set[str]:
    return {name for name, _ in ahead.list(kind)}


def test_all_that_opening_asks_is_under_way_at_once(place: Asked) -> None:
    together = threading.Barrier(4)
    first = iter(range(4))

    def meet(_question: str) -> None:
        if next(first, None) is not None:
            together.wait(PATIENCE)

    place.before = meet
    with Repository.open(place, "password", environment={}, to_read=True):
        assert not together.broken


def test_snapshots_and_index_files_are_listed_at_once_the_second_time(place: Asked) -> None:
    together = threading.Barrier(2)
    name = _save(place, Kind.SNAPSHOT, 1)
    ahead = Ahead(place)
    assert _names(ahead, Kind.SNAPSHOT) == {name}

    def meet(_question: str) -> None:
        together.wait(PATIENCE)

    place.before = meet
    ahead.look()
    assert _names(ahead, Kind.SNAPSHOT) == {name}
    assert _names(ahead, Kind.INDEX) == set()
    ahead.close()


@pytest.mark.parametrize("known", [0, 1])
def test_index_files_are_listed_after_all_snapshots_that_are_read(place: Asked, known: int) -> None:
    """Somebody stores an index file and then a snapshot, just between our two listings."""
    numbers = count()
    for _ in range(known):
        _save(place, Kind.SNAPSHOT, next(numbers))
    ahead = Ahead(place)
    assert len(_names(ahead, Kind.SNAPSHOT)) == known
    index_listed = threading.Event()
    stored: list[str] = []

    def between(question: str) -> None:
        if question == Kind.SNAPSHOT:
            if known:
                assert index_listed.wait(PATIENCE)
            stored.append(_save(place, Kind.INDEX, next(numbers)))
            _save(place, Kind.SNAPSHOT, next(numbers))

    place.before = between
    place.after = lambda kind: index_listed.set() if kind is Kind.INDEX else None
    ahead.look()
    assert len(_names(ahead, Kind.SNAPSHOT)) == known + 1
    assert _names(ahead, Kind.INDEX) == set(stored)
    ahead.close()


def test_each_listing_serves_once(place: Asked) -> None:
    ahead = Ahead(place)
    ahead.ask(Kind.LOCK)
    assert _names(ahead, Kind.LOCK) == set()
    name = _save(place, Kind.LOCK, 1)
    assert _names(ahead, Kind.LOCK) == {name}
    ahead.close()


def test_what_may_pass_is_waited_for_where_the_answer_is_needed(
    place: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    failures = dict.fromkeys((*Kind, "size config"), 2)

    def fail(question: str) -> None:
        if failures.get(question, 0):
            failures[question] -= 1
            raise Temporary(f"No {question}.")

    place.before = fail
    patient = Retrying(place, Retries(first=0.0, longest=0.0))
    with Repository.open(patient, "password", environment={}, to_read=True) as repository:
        assert [each.message for each in caplog.records] == [
            "No size config. Trying again.",
            "No keys. Trying again.",
        ]
        assert repository.snapshots() == []


def test_a_wrong_password_is_told_whatever_else_fails(place: Asked) -> None:
    def fail(question: str) -> None:
        if question in {Kind.LOCK, Kind.SNAPSHOT, Kind.INDEX}:
            raise Temporary("No.")

    place.before = fail
    with pytest.raises(WrongPassword):
        Repository.open(place, "another", environment={}, to_read=True)


def test_what_nobody_needs_any_more_is_not_waited_for(place: Asked) -> None:
    given_up = threading.Event()

    def hang(question: str) -> None:
        if question == Kind.LOCK and not given_up.wait(PATIENCE):
            raise AssertionError("nobody gave up")

    place.before = hang
    place.gives_up = given_up.set
    with pytest.raises(WrongPassword):
        Repository.open(place, "another", environment={}, to_read=True)


def test_a_lock_that_came_since_the_opening_counts(place: Asked) -> None:
    with Repository.open(place, "password", environment={}) as repository:
        document = lock_file.encode(Lock.ours(exclusive=True))
        name, sealed = repository.seal_unpacked(Kind.LOCK, document)
        place.save(File(Kind.LOCK, name), [sealed])
        with pytest.raises(Locked), repository.lock(timing=Timing(settle=0.0)):
            pass
        assert [each for each, _ in place.list(Kind.LOCK)] == [name]
