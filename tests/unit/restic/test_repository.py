# SPDX-License-Identifier: Apache-2.0
"""A repository is made once, opened by its password alone, and never says what was not stored."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError, WrongPassword
from qmpbackup.restic import keyfile
from qmpbackup.restic.config import Config
from qmpbackup.restic.config import encode as encode_config
from qmpbackup.restic.crypto import Key, seal
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import CONFIG, File, Kind, Missing
from qmpbackup.restic.writer import Writer
from stock.remembered import Remembered

CHEAP = Scrypt(2, 1, 1)
TIME = datetime(2026, 1, 1, tzinfo=UTC)
SNAPSHOT = Snapshot(TIME, bytes(32), ("/vm",))

on_one_repository = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def place() -> Remembered:
    """Where the repository is."""
    return Remembered()


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with a folder for caches."""
    return {"RESTIC_CACHE_DIR": str(tmp_path / "caches")}


@pytest.fixture
def repository(place: Remembered, caches: dict[str, str]) -> Iterator[Repository]:
    """An empty repository."""
    with Repository.create(place, "password", cost=CHEAP, environment=caches) as made:
        yield made


def _put(place: Remembered, kind: Kind, data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    place.save(File(kind, name), [data])
    return name


def test_it_is_opened_by_its_password(repository: Repository, place: Remembered) -> None:
    opened = Repository.open(place, "password", environment={})
    assert (opened.key, opened.config) == (repository.key, repository.config)
    with pytest.raises(WrongPassword):
        Repository.open(place, "Password", environment={})


def test_any_of_several_passwords_opens_it(repository: Repository, place: Remembered) -> None:
    names = [
        _put(place, Kind.KEY, keyfile.create(repository.key, password, CHEAP))
        for password in ("one", "two")
    ]
    for environment in ({}, {"RESTIC_KEY_HINT": names[1][:8]}, {"RESTIC_KEY_HINT": "no key"}):
        for password in ("one", "two", "password"):
            opened = Repository.open(place, password, environment=environment)
            assert opened.key == repository.key


def test_a_damaged_key_beside_a_good_one_is_passed_over(
    repository: Repository, place: Remembered
) -> None:
    place.save(File(Kind.KEY, "00" * 32), [b"nonsense"])
    assert Repository.open(place, "password", environment={}).key == repository.key
    with pytest.raises(DamagedError):
        Repository.open(place, "another", environment={})


@pytest.mark.usefixtures("repository")
def test_without_keys_it_is_damaged(place: Remembered) -> None:
    for name, _ in place.list(Kind.KEY):
        place.remove(File(Kind.KEY, name))
    with pytest.raises(DamagedError, match="no key"):
        Repository.open(place, "password", environment={})


def test_where_there_is_none_nothing_is_opened(place: Remembered) -> None:
    with pytest.raises(NoSuchTarget):
        Repository.open(place, "password", environment={})


@pytest.mark.usefixtures("repository")
def test_a_second_one_is_not_made_over_the_first(place: Remembered) -> None:
    with pytest.raises(UsageError, match="already"):
        Repository.create(place, "password", cost=CHEAP, environment={})
    place.remove(CONFIG)
    with pytest.raises(UsageError, match="keys"):
        Repository.create(place, "password", cost=CHEAP, environment={})


def test_of_two_who_make_one_at_once_one_does(place: Remembered) -> None:
    class Slow(Remembered):
        """A storage whose files another program shares."""

        def create(self) -> None:
            Repository.create(place, "theirs", cost=CHEAP, environment={})

    slow = Slow()
    slow.files = place.files
    with pytest.raises(UsageError, match="already"):
        Repository.create(slow, "ours", cost=CHEAP, environment={})
    assert len(list(place.list(Kind.KEY))) == 1
    Repository.open(place, "theirs", environment={})


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_stored_is_read(version: int, place: Remembered, repository: Repository) -> None:
    config = replace(repository.config, version=version)
    place.remove(CONFIG)
    place.save(CONFIG, [seal(repository.key, encode_config(config))])
    reopened = Repository.open(place, "password", environment={})
    data = b'{"a":"' + b"b" * 100_000 + b'"}'
    name = reopened.save_unpacked(Kind.INDEX, data)
    assert reopened.load_unpacked(Kind.INDEX, name) == data
    assert (place.size(File(Kind.INDEX, name)) < 1000) == (version == 2)


def test_snapshots_are_found_in_the_order_of_their_times(repository: Repository) -> None:
    times = [TIME + timedelta(hours=hours) for hours in (3, 1, 2)]
    names = [repository.save_snapshot(replace(SNAPSHOT, time=time)) for time in times]
    found = repository.snapshots()
    assert [each.id for each in found] == [names[1], names[2], names[0]]
    repository.remove_snapshot(names[2])
    assert [each.id for each in repository.snapshots()] == [names[1], names[0]]
    with pytest.raises(Missing):
        repository.remove_snapshot(names[2])


def test_a_damaged_snapshot_is_told_and_hides_no_other(
    repository: Repository, place: Remembered
) -> None:
    good = repository.save_snapshot(SNAPSHOT)
    bad = _put(place, Kind.SNAPSHOT, seal(repository.key, b"{}"))
    with pytest.raises(DamagedError):
        repository.snapshots()
    told: list[str] = []
    assert [each.id for each in repository.snapshots(lambda name, _: told.append(name))] == [good]
    assert told == [bad]


def test_snapshots_are_fetched_once(
    repository: Repository, place: Remembered, caches: dict[str, str]
) -> None:
    name = repository.save_snapshot(SNAPSHOT)
    first = Repository.open(place, "password", environment=caches)
    assert [each.id for each in first.snapshots()] == [name]
    place.files[File(Kind.SNAPSHOT, name)] = b"nonsense"
    again = Repository.open(place, "password", environment=caches)
    assert [each.id for each in again.snapshots()] == [name]
    with pytest.raises(DamagedError):
        Repository.open(place, "password", environment={}).snapshots()


def test_the_cache_is_secret_and_spoilt_entries_are_none(
    repository: Repository, tmp_path: Path
) -> None:
    repository.cache("one", b"a secret")
    repository.cache("two", b"another")
    files = {path.name: path for path in (tmp_path / "caches").rglob("files/*")}
    assert b"secret" not in files["one"].read_bytes()
    assert files["one"].stat().st_mode & 0o077 == 0
    assert repository.cached("one") == b"a secret"
    files["one"].write_bytes(files["two"].read_bytes())
    assert repository.cached("one") is None
    assert repository.cached("three") is None


def test_a_cache_that_others_can_write_to_is_not_used(
    repository: Repository, tmp_path: Path
) -> None:
    folder = tmp_path / "caches" / "qmpbackup" / repository.config.id / "files"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    repository.cache("one", b"a secret")
    assert list(folder.iterdir()) == []


def test_blobs_and_trees_are_read_from_any_pack_that_has_them(
    repository: Repository, place: Remembered
) -> None:
    writer = Writer(repository, workers=1)
    blob = writer.add_now(BlobType.DATA, b"hello")
    listing = writer.add_now(BlobType.TREE, b'{"nodes":[]}\n')
    writer.flush()
    writer.stop()
    opened = Repository.open(place, "password", environment={})
    opened.load_index()
    assert opened.load_blob(BlobType.DATA, blob) == b"hello"
    assert opened.load_tree(listing) == []
    with pytest.raises(DamagedError, match="missing"):
        opened.load_blob(BlobType.DATA, bytes(32))
    for name, _ in list(place.list(Kind.DATA)):
        place.remove(File(Kind.DATA, name))
    with pytest.raises(DamagedError, match="pack"):
        opened.load_blob(BlobType.DATA, blob)


def test_a_file_under_a_wrong_name_is_damaged(repository: Repository, place: Remembered) -> None:
    name = repository.save_snapshot(SNAPSHOT)
    place.save(File(Kind.SNAPSHOT, "ab" * 32), [place.load(File(Kind.SNAPSHOT, name))])
    with pytest.raises(DamagedError, match="hash"):
        repository.load_unpacked(Kind.SNAPSHOT, "ab" * 32)


@pytest.mark.parametrize("knows_size", [True, False])
def test_what_grows_beyond_measure_is_damaged(
    repository: Repository,
    place: Remembered,
    knows_size: bool,
) -> None:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=knows_size)
    bomb = b"\x02" + compressor.compress(bytes(100 << 20))
    name = _put(place, Kind.LOCK, seal(repository.key, bomb))
    with pytest.raises(DamagedError, match="too large"):
        repository.load_unpacked(Kind.LOCK, name)


def test_what_is_too_large_already_is_not_even_read(repository: Repository) -> None:
    with pytest.raises(DamagedError, match="too large"):
        repository.load_unpacked(Kind.LOCK, "ab" * 32, 1 << 40)


@on_one_repository
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x02", b"{", b"\x02\x28\xb5\x2f\xfd"]))
def test_whatever_a_file_opens_to_is_read_or_damaged(
    repository: Repository, place: Remembered, content: bytes, start: bytes
) -> None:
    name = _put(place, Kind.SNAPSHOT, seal(repository.key, start + content))
    with pytest.raises(DamagedError):
        repository.snapshot(name)


@on_one_repository
@given(st.binary(max_size=300))
def test_whatever_lies_there_as_config_or_key_is_damaged(
    repository: Repository, place: Remembered, content: bytes
) -> None:
    del repository
    key, config = Remembered(), Remembered()
    key.files = place.files | {File(Kind.KEY, hashlib.sha256(content).hexdigest()): content}
    config.files = place.files | {CONFIG: content}
    with pytest.raises(DamagedError):
        Repository.open(config, "password", environment={})
    with pytest.raises(DamagedError):
        Repository.open(key, "another", environment={})


def test_a_config_of_another_key_is_damaged(repository: Repository, place: Remembered) -> None:
    del repository
    place.remove(CONFIG)
    place.save(CONFIG, [seal(Key.random(), encode_config(Config(2, "ab" * 32, 1)))])
    with pytest.raises(DamagedError, match="config"):
        Repository.open(place, "password", environment={})
