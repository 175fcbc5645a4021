# SPDX-License-Identifier: Apache-2.0
"""The index knows exactly what the repository's index files say, whatever happens to its cache."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.patience import PATIENCE
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.restic.index import index_file
from qmpbackup.restic.index.cache import cache_folder
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.index.table import Spot
from qmpbackup.restic.storage.interface import Kind
from stock.indexes import ID, Indexes, agree, cached

TESTS = str(Path(__file__).parents[2])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_it_follows_the_repository_through_many_changes(
    tmp_path: Path, seed: int, kept: bool
) -> None:
    indexes = Indexes(seed)
    for _ in range(6):
        with BlobIndex.open(tmp_path if kept else None, ID) as blobs:
            for _ in range(3):
                for _ in range(indexes.random.randrange(6)):
                    indexes.make(indexes.random.randrange(1, 8), indexes.random.randrange(20))
                few = min(len(indexes.documents), indexes.random.randrange(4))
                for name in indexes.random.sample(sorted(indexes.documents), few):
                    del indexes.documents[name]
                blobs.sync(indexes)
                agree(blobs, indexes)
    assert len(cached(tmp_path)) < 8


def test_only_new_index_files_are_read(tmp_path: Path) -> None:
    indexes = Indexes()
    first = {indexes.make() for _ in range(5)}
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
    assert set(indexes.read) == first
    indexes.read.clear()
    new = indexes.make()
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        blobs.sync(indexes)
        agree(blobs, indexes)
    assert indexes.read == [new]


def test_blobs_of_an_index_file_that_is_gone_are_gone_unless_another_names_them(
    tmp_path: Path,
) -> None:
    indexes = Indexes()
    one, _ = indexes.make(), indexes.make()
    copy = indexes.make()
    indexes.documents[copy] = indexes.documents[one]
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        del indexes.documents[one]
        blobs.sync(indexes)
        agree(blobs, indexes)
        del indexes.documents[copy]
        blobs.sync(indexes)
        agree(blobs, indexes)
        indexes.documents.clear()
        blobs.sync(indexes)
        assert len(blobs) == 0
    assert not cached(tmp_path)


def test_an_index_file_counts_as_long_as_it_is_there_whatever_supersedes_it(tmp_path: Path) -> None:
    indexes = Indexes()
    old = indexes.make()
    (document,) = index_file.encode([("cd" * 32, indexes.blobs(3))], [old])
    indexes.documents["ef" * 32] = document
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)


def test_blobs_of_this_run_are_known_at_once_and_its_index_files_are_not_read_again(
    tmp_path: Path,
) -> None:
    indexes = Indexes()
    indexes.make()
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        for _ in range(20):
            packs = [(indexes.id().hex(), indexes.blobs(10)) for _ in range(3)]
            for pack, content in packs:
                blobs.add(pack, content)
                for blob in content:
                    place = Spot(bytes.fromhex(pack), blob.offset, blob.length, blob.raw_length)
                    assert place in blobs.find_all(blob.type, blob.id)
            (document,) = index_file.encode(packs)
            name = indexes.id().hex()
            indexes.documents[name] = document
            blobs.indexed(name, document)
        agree(blobs, indexes)
        indexes.read.clear()
        blobs.sync(indexes)
        agree(blobs, indexes)
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)
    assert indexes.read == []
    assert len(cached(tmp_path)) < 6


def test_threads_may_ask_while_the_index_grows(tmp_path: Path) -> None:
    indexes = Indexes()
    known = indexes.make(20, 40)
    errors: list[BaseException] = []
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        wanted = [
            (b.type, b.id) for _, bs in index_file.parse(indexes.documents[known], "") for b in bs
        ]
        done = threading.Event()

        def ask() -> None:
            try:
                while not done.is_set():
                    assert all(blobs.has(*each) for each in wanted)
            except BaseException as error:  # noqa: BLE001 - told to the test
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            indexes.make(5, 40)
            blobs.sync(indexes)
        done.set()
        for thread in threads:
            thread.join()
        agree(blobs, indexes)
    assert errors == []


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
@given(st.integers(0, 1 << 30), st.integers(1, 255), st.sampled_from(["flip", "cut", "more"]))
def test_a_damaged_cache_is_made_anew(
    tmp_path_factory: pytest.TempPathFactory, position: int, mask: int, how: str
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    indexes = Indexes()
    indexes.make(2, 40)
    with BlobIndex.open(folder, ID) as blobs:
        blobs.sync(indexes)
    (path,) = cached(folder)
    data = bytearray(path.read_bytes())
    position %= len(data)
    if how == "flip":
        data[position] ^= mask
    elif how == "cut":
        del data[position:]
    else:
        data[position:position] = bytes(mask)
    path.write_bytes(data)
    for _ in range(2):
        with BlobIndex.open(folder, ID) as blobs:
            blobs.sync(indexes)
            agree(blobs, indexes)
            indexes.make()
            blobs.sync(indexes)
            agree(blobs, indexes)


def test_a_cache_that_is_damaged_while_it_is_in_use_is_made_anew(tmp_path: Path) -> None:
    indexes = Indexes()
    indexes.make(10, 40)
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        (path,) = cached(tmp_path)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes(size // 4))
        agree(blobs, indexes)
        os.truncate(cached(tmp_path)[0], 100)
        agree(blobs, indexes)
        assert blobs.packs()


def test_the_cache_of_another_repository_is_not_believed(tmp_path: Path) -> None:
    indexes, other = Indexes(1), Indexes(2)
    name = indexes.make()
    other.documents[name] = other.documents.pop(other.make())
    with BlobIndex.open(tmp_path, "cd" * 32) as blobs:
        blobs.sync(other)
    (tmp_path / ("cd" * 32)).rename(tmp_path / ID)
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)


def test_the_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        indexes = Indexes()
        indexes.make()
        with BlobIndex.open(tmp_path / "new" / "qmpbackup", ID) as blobs:
            blobs.sync(indexes)
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "qmpbackup" / ID
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("why", ["file", "writable by others", "link"])
def test_where_there_can_be_no_cache_it_works_without(tmp_path: Path, why: str) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "elsewhere").mkdir()
    if why == "file":
        cache.write_text("")
    else:
        cache.mkdir()
    if why == "link":
        (cache / ID).symlink_to(tmp_path / "elsewhere")
    if why == "writable by others":
        (cache / ID).mkdir()
        (cache / ID).chmod(0o777)
    indexes = Indexes()
    indexes.make()
    with BlobIndex.open(cache, ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)
    assert not cached(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    indexes = Indexes()
    indexes.make()
    with BlobIndex.open(tmp_path, ID) as blobs:
        (tmp_path / ID).rmdir()
        blobs.sync(indexes)
        agree(blobs, indexes)


def test_leftovers_of_a_dead_run_are_cleared_away(tmp_path: Path) -> None:
    indexes = Indexes()
    indexes.make()
    (tmp_path / ID).mkdir()
    left = tmp_path / ID / "0123.tmp"
    left.write_bytes(bytes(1000))
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
    assert not left.exists()


def test_two_may_use_one_cache_at_once(tmp_path: Path) -> None:
    indexes = Indexes()
    with BlobIndex.open(tmp_path, ID) as one, BlobIndex.open(tmp_path, ID) as two:
        for _ in range(6):
            indexes.make(4, 20)
            one.sync(indexes)
            indexes.make(2, 20)
            two.sync(indexes)
            agree(two, indexes)
            one.sync(indexes)
            agree(one, indexes)
            agree(two, indexes)


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from stock.indexes import ID, Indexes, agree
from qmpbackup.restic.index.lookup import BlobIndex
indexes = Indexes()
for _ in range(15):
    indexes.make(2, 10)
    with BlobIndex.open(Path(sys.argv[2]), ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)
"""


def test_processes_may_use_one_cache_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, TESTS, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, error.decode()


def test_an_index_file_that_goes_while_it_is_to_be_read_is_left_out(tmp_path: Path) -> None:
    class Pruned(Indexes):
        def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
            self.documents.pop(going, None)
            return super().load_unpacked(kind, name, size)

    indexes = Pruned()
    going, *_ = [indexes.make() for _ in range(4)]
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        agree(blobs, indexes)


def test_a_listing_that_names_what_is_never_there_is_an_error_of_the_storage(
    tmp_path: Path,
) -> None:
    class Lying(Indexes):
        def files(self, kind: Kind) -> Iterator[tuple[str, int]]:
            yield from super().files(kind)
            yield "ef" * 32, 100

    indexes = Lying()
    indexes.make()
    with BlobIndex.open(tmp_path, ID) as blobs, pytest.raises(StorageError):
        blobs.sync(indexes)


def test_a_damaged_index_file_is_an_error_or_told_and_left_out(tmp_path: Path) -> None:
    indexes = Indexes()
    good, bad = indexes.make(), indexes.make()
    indexes.documents[bad] = indexes.documents[bad][:-10]
    told: list[tuple[str, DamagedError]] = []
    with BlobIndex.open(tmp_path, ID) as blobs:
        with pytest.raises(DamagedError, match=bad):
            blobs.sync(indexes)
        blobs.sync(indexes, lambda name, error: told.append((name, error)))
        assert [name for name, _ in told] == [bad]
        indexes.documents = {good: indexes.documents[good]}
        agree(blobs, indexes)


def test_index_files_without_packs_are_no_harm(tmp_path: Path) -> None:
    indexes = Indexes()
    indexes.documents["cd" * 32] = b'{"packs":null}'
    with BlobIndex.open(tmp_path, ID) as blobs:
        blobs.sync(indexes)
        assert len(blobs) == 0
        indexes.make()
        blobs.sync(indexes)
        agree(blobs, indexes)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"RESTIC_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/qmpbackup"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/qmpbackup"),
        ({"XDG_CACHE_HOME": "b", "HOME": "/c"}, "/c/.cache/qmpbackup"),
        ({"HOME": ""}, None),
        ({}, None),
    ],
)
def test_where_the_cache_lies(environment: dict[str, str], folder: str | None) -> None:
    assert cache_folder(environment) == (Path(folder) if folder else None)
