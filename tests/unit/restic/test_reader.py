# SPDX-License-Identifier: Apache-2.0
"""Many blobs are read whole or not at all, and a check of packs finds whatever is wrong with them."""

import hashlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError, Interrupted, StorageError
from qmpbackup.restic.checker import Problem, check_pack, check_packs, find_structure_problems
from qmpbackup.restic.index import index_file
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.pack import BlobType, PackBuilder, PackedBlob, read_header, seal_blob
from qmpbackup.restic.reader import read_blobs
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.interface import File, Kind, Temporary
from qmpbackup.restic.threads import MEMORY, Pace, in_threads
from stock.remembered import Remembered

DATA = BlobType.DATA
CHOOSE = random.Random(7)  # noqa: S311 - no secret
MIB = 1 << 20


class Watched(Remembered):
    """Counts what is read of packs, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, int | None]] = []
        self.error: StorageError | None = None

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        if file.kind is Kind.DATA:
            self.reads.append((offset, length))
            if self.error is not None:
                raise self.error
        return super().load(file, offset, length)


class Stored:
    """A repository with packs that the test makes, and what must come out of it."""

    def __init__(self) -> None:
        self.storage = Watched()
        self.repository = Repository.create(
            self.storage, "password", cost=Scrypt(2, 1, 1), environment={}
        )
        self.contents: dict[bytes, bytes] = {}

    def pack(self, contents: Iterable[bytes], *, indexed: bool = True) -> str:
        """One pack with these blobs; returns its name."""
        builder = PackBuilder()
        for plain in contents:
            sealed, raw_length = seal_blob(self.repository.key, plain)
            builder.add(DATA, (id_ := sha256(plain)), sealed, raw_length)
            self.contents[id_] = plain
        name, parts, blobs = builder.finish(self.repository.key)
        self.storage.save(File(Kind.DATA, name), parts)
        if indexed:
            self.name([(name, blobs)])
        return name

    def name(self, packs: Iterable[tuple[str, tuple[PackedBlob, ...]]]) -> None:
        """Save an index with these packs."""
        for document in index_file.encode(packs):
            self.repository.save_unpacked(Kind.INDEX, document)
        self.repository.load_index()

    def blobs(self, name: str) -> tuple[PackedBlob, ...]:
        size = self.storage.size(File(Kind.DATA, name))
        return read_header(self.storage, self.repository.key, name, size)

    def read(self, ids: Iterable[bytes] | None = None, threads: int = 3) -> dict[bytes, bytes]:
        found = {}
        times = Counter[bytes]()

        def deliver(id_: bytes, plain: bytes) -> None:
            found[id_] = plain
            times[id_] += 1

        wanted = ((DATA, id_) for id_ in (self.contents if ids is None else ids))
        read_blobs(self.repository, wanted, deliver, threads=threads)
        assert set(times.values()) <= {1}
        return found

    def change(self, name: str, position: int) -> None:
        """Flip a bit of a pack."""
        file = File(Kind.DATA, name)
        data = bytearray(self.storage.files[file])
        data[position] ^= 1
        self.storage.files[file] = bytes(data)

    def cut(self, name: str, size: int) -> None:
        file = File(Kind.DATA, name)
        self.storage.files[file] = self.storage.files[file][:size]

    def problems(self) -> list[Problem]:
        """What a whole check finds."""
        found = list(find_structure_problems(self.repository))
        sizes: list[int] = []
        packs = list(self.storage.list(Kind.DATA))
        check_packs(self.repository, packs, found.append, sizes.append)
        assert sorted(sizes) == sorted(size for _, size in packs)
        return found


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def some(count: int, size: int = 3000) -> list[bytes]:
    """Contents that are new each time; half of them can be compressed."""
    return [
        CHOOSE.randbytes(size) if number % 2 else CHOOSE.randbytes(8) * (size // 8)
        for number in range(count)
    ]


@pytest.fixture
def stored() -> Iterator[Stored]:
    """An empty repository."""
    made = Stored()
    with made.repository:
        yield made


@pytest.mark.parametrize("threads", [1, 4])
def test_all_that_is_wanted_is_delivered_once(stored: Stored, threads: int) -> None:
    for count in (1, 5, 40):
        stored.pack(some(count))
    stored.pack([b""])
    ids = [*stored.contents, *stored.contents]
    CHOOSE.shuffle(ids)
    assert stored.read(ids, threads) == stored.contents
    assert stored.read([]) == {}


def test_neighbours_are_read_by_one_request(stored: Stored) -> None:
    stored.pack(some(100))
    stored.storage.reads.clear()
    ids = list(stored.contents)
    del ids[10:15]
    assert len(stored.read(ids)) == 95
    assert len(stored.storage.reads) == 1


def test_what_is_far_apart_is_not_read_in_between(stored: Stored) -> None:
    noise = [CHOOSE.randbytes(MIB) for _ in range(12)]
    stored.pack(noise)
    stored.storage.reads.clear()
    stored.read([sha256(noise[0]), sha256(noise[5]), sha256(noise[6])])
    assert len(stored.storage.reads) == 2
    assert sum(length or 0 for _, length in stored.storage.reads) < 3.1 * MIB
    stored.storage.reads.clear()
    stored.read()
    assert max(length or 0 for _, length in stored.storage.reads) <= 4 * MIB


def test_a_blob_that_no_index_names_is_damage(stored: Stored) -> None:
    stored.pack(some(3))
    with pytest.raises(DamagedError, match="ab" * 32):
        stored.read([*stored.contents, b"\xab" * 32])


def test_a_damaged_blob_is_read_from_its_other_pack(stored: Stored) -> None:
    contents = some(6)
    first = stored.pack(contents)
    second = stored.pack(reversed(contents))
    stored.change(first, 10)
    stored.change(second, 10)
    assert stored.read() == stored.contents
    del stored.storage.files[File(Kind.DATA, first)]
    with pytest.raises(DamagedError):
        stored.read()
    assert len(stored.read(list(stored.contents)[:5])) == 5


@pytest.mark.parametrize("whole_in", ["first", "second"])
def test_a_blob_is_read_from_its_other_pack_if_one_is_missing_or_cut(
    stored: Stored, whole_in: str
) -> None:
    contents = some(6)
    names = {"first": stored.pack(contents), "second": stored.pack(reversed(contents))}
    del names[whole_in]
    (other,) = names.values()
    stored.cut(other, 100)
    assert stored.read() == stored.contents
    del stored.storage.files[File(Kind.DATA, other)]
    assert stored.read() == stored.contents


@pytest.mark.parametrize("how", ["flipped", "missing", "cut"])
def test_a_blob_damaged_everywhere_is_damage_that_names_the_pack(stored: Stored, how: str) -> None:
    name = stored.pack(some(6))
    if how == "flipped":
        stored.change(name, 50)
    elif how == "cut":
        stored.cut(name, 50)
    else:
        del stored.storage.files[File(Kind.DATA, name)]
    with pytest.raises(DamagedError, match=name) as caught:
        stored.read()
    assert caught.value.hint


def test_whole_blobs_before_the_end_of_a_cut_pack_are_still_read(stored: Stored) -> None:
    name = stored.pack(some(6))
    last = stored.blobs(name)[-1]
    stored.cut(name, last.offset + 5)
    ids = [id_ for id_ in stored.contents if id_ != last.id]
    assert len(stored.read(ids)) == 5
    with pytest.raises(DamagedError):
        stored.read()


@pytest.mark.parametrize("kind", [Temporary, StorageError])
def test_failing_storage_is_no_damage(stored: Stored, kind: type[StorageError]) -> None:
    stored.pack(some(3))
    stored.storage.error = kind("No connection.")
    with pytest.raises(StorageError, match="No connection"):
        stored.read()


def test_the_first_error_of_a_receiver_ends_all(stored: Stored) -> None:
    for _ in range(50):
        stored.pack(some(1))
    before = threading.active_count()
    delivered: list[bytes] = []

    def deliver(id_: bytes, _plain: bytes) -> None:
        delivered.append(id_)
        raise StorageError("The output is full.")

    with pytest.raises(StorageError, match="full"):
        read_blobs(stored.repository, ((DATA, id_) for id_ in stored.contents), deliver, threads=2)
    assert len(delivered) <= 2
    assert threading.active_count() == before


def test_an_error_of_who_wants_ends_all(stored: Stored) -> None:
    stored.pack(some(3))

    def wanted() -> Iterator[tuple[BlobType, bytes]]:
        yield from ((DATA, id_) for id_ in stored.contents)
        raise StorageError("The list ends here.")

    with pytest.raises(StorageError, match="list"):
        read_blobs(stored.repository, wanted(), lambda *_: None)


def test_a_signal_ends_reading_in_order(stored: Stored) -> None:
    for _ in range(30):
        stored.pack(some(1))
    before = threading.active_count()
    delivered: list[bytes] = []

    def deliver(id_: bytes, _plain: bytes) -> None:
        if not delivered:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        delivered.append(id_)

    with interrupt.held(), pytest.raises(Interrupted):
        ids = [*stored.contents]
        read_blobs(stored.repository, ((DATA, id_) for id_ in ids * 2000), deliver, threads=1)
    assert len(delivered) > 0
    assert threading.active_count() == before


def test_what_is_under_way_together_is_bounded() -> None:
    lock = threading.Lock()
    now: list[int] = []
    most: list[int] = []

    def work(size: int) -> None:
        with lock:
            now.append(size)
            most.append(sum(now))
        with lock:
            now.remove(size)

    sizes = [CHOOSE.randrange(1, MEMORY // 2) for _ in range(300)]
    in_threads(sizes, work, lambda size: size, 8)
    assert len(most) == len(sizes)
    assert max(most) <= MEMORY
    in_threads([MEMORY * 10] * 3, work, lambda size: size, 8)
    assert max(most) == MEMORY * 10, "one that is larger than all there is goes alone"


def test_a_whole_repository_has_no_problems(stored: Stored) -> None:
    assert stored.problems() == []
    for count in (1, 30, 200):
        stored.pack(some(count))
    stored.pack([CHOOSE.randbytes(6 * MIB), CHOOSE.randbytes(100)])
    assert stored.problems() == []


def test_every_changed_byte_of_a_pack_is_found(stored: Stored) -> None:
    name = stored.pack(some(2, 40))
    file = File(Kind.DATA, name)
    whole = stored.storage.files[file]
    for position in range(len(whole)):
        stored.change(name, position)
        assert list(check_pack(stored.repository, name, len(whole))), position
        stored.storage.files[file] = whole
    for size in range(len(whole)):
        stored.cut(name, size)
        assert list(check_pack(stored.repository, name, size)), size
        assert list(find_structure_problems(stored.repository)), size
        stored.storage.files[file] = whole
    assert stored.problems() == []


def test_all_damaged_packs_are_told_with_their_blobs(stored: Stored) -> None:
    names = [stored.pack(some(5)) for _ in range(4)]
    damaged = stored.blobs(names[0])[3]
    stored.change(names[0], damaged.offset + 40)
    stored.change(names[2], -6)
    found = stored.problems()
    assert {problem.pack for problem in found} == {names[0], names[2]}
    assert any(damaged.id.hex() in problem.what for problem in found)


def test_a_missing_pack_is_found_by_the_index(stored: Stored) -> None:
    names = [stored.pack(some(2)) for _ in range(3)]
    del stored.storage.files[File(Kind.DATA, names[1])]
    assert [problem.pack for problem in stored.problems()] == [names[1]]
    assert "missing" in next(check_pack(stored.repository, names[1], 500)).what


def test_a_pack_that_no_index_names_is_no_problem_of_the_index(stored: Stored) -> None:
    stored.pack(some(2), indexed=False)
    assert list(find_structure_problems(stored.repository)) == []


def test_a_pack_with_a_blob_that_the_index_lacks_is_found(stored: Stored) -> None:
    name = stored.pack(some(3), indexed=False)
    stored.name([(name, stored.blobs(name)[:2])])
    assert {problem.pack for problem in stored.problems()} == {name}
    size = stored.storage.size(File(Kind.DATA, name))
    assert list(check_pack(stored.repository, name, size))


def test_a_pack_in_two_index_files_is_no_problem(stored: Stored) -> None:
    name = stored.pack(some(4))
    blobs = stored.blobs(name)
    other = stored.pack(some(1), indexed=False)
    stored.name([(name, blobs), (other, stored.blobs(other))])
    stored.name([(name, blobs[:2])])
    assert stored.problems() == []
    assert stored.read() == stored.contents


def test_a_pack_that_is_named_in_two_parts_is_no_problem(stored: Stored) -> None:
    name = stored.pack(some(4), indexed=False)
    blobs = stored.blobs(name)
    stored.name([(name, blobs[:1])])
    stored.name([(name, blobs[1:])])
    assert stored.problems() == []


def test_an_index_that_names_more_than_a_pack_has_is_found(stored: Stored) -> None:
    name = stored.pack(some(4), indexed=False)
    blobs = stored.blobs(name)
    more = PackedBlob(DATA, bytes(32), blobs[-1].offset + blobs[-1].length, 1000)
    stored.name([(name, (*blobs, more))])
    assert {problem.pack for problem in stored.problems()} == {name}


def test_reading_goes_on_although_the_cache_breaks_meanwhile(tmp_path: Path) -> None:
    made = Stored()
    environment = {"RESTIC_CACHE_DIR": str(tmp_path)}
    made.repository = Repository.open(made.storage, "password", environment=environment)
    with made.repository:
        made.pack(some(30))
        (cache,) = tmp_path.rglob("*.places")
        os.truncate(cache, 50)
        assert made.read() == made.contents


def test_requests_under_way_follow_how_long_the_storage_takes() -> None:
    near, far = Pace(16), Pace(16)
    for pace, waited in ((near, 0.001), (far, 1.0)):
        pace.note(waited=waited, worked=0.01)
    assert near.width < 2 * far.width
    assert far.width == 16
