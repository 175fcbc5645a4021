# SPDX-License-Identifier: Apache-2.0
"""Packs and index files, ours and the real restic's: each reads the other's, to the last blob."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.restic import PASSWORD, Restic
from qmpbackup.restic.checker import Problem, check_packs, find_structure_problems
from qmpbackup.restic.index import index_file
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.reader import read_blobs
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.writer import Writer

CHOOSE = random.Random(11)  # noqa: S311 - no secret
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the repository lies."""
    return tmp_path / "repository"


@pytest.fixture
def restic(tmp_path: Path, folder: Path) -> Restic:
    """restic on that repository, which nobody has made yet."""
    return Restic(folder, tmp_path / "cache")


def known(repository: Repository) -> set[tuple[str, PackedBlob]]:
    """All that its index files say."""
    names = [name for name, _ in repository.storage.list(Kind.INDEX)]
    documents = ((repository.load_unpacked(Kind.INDEX, name), name) for name in names)
    packs = (each for document in documents for each in index_file.parse(*document))
    return {(pack, blob) for pack, blobs in packs for blob in blobs}


def listed(restic: Restic) -> list[tuple[BlobType, bytes]]:
    """The blobs that restic lists."""
    lines = (line.split() for line in restic("list", "blobs").text.splitlines())
    return sorted({(BlobType[kind.upper()], bytes.fromhex(id_)) for kind, id_ in lines})


def read(repository: Repository, wanted: list[tuple[BlobType, bytes]]) -> dict[bytes, int]:
    """Read blobs; returns the length of each."""
    found: dict[bytes, int] = {}
    read_blobs(repository, wanted, lambda id_, plain: found.update({id_: len(plain)}))
    return found


def problems(repository: Repository) -> list[Problem]:
    """What a check of everything finds."""
    found = list(find_structure_problems(repository))
    check_packs(repository, repository.storage.list(Kind.DATA), found.append, lambda _: None)
    return found


def make_files(folder: Path) -> None:
    """Files of which restic makes blobs of all kinds: large, small, empty, twice, compressible."""
    folder.mkdir(exist_ok=True)
    (folder / "noise").write_bytes(CHOOSE.randbytes(5 * MIB))
    (folder / "zeros").write_bytes(bytes(9 * MIB))
    (folder / "empty").write_bytes(b"")
    for number in range(60):
        (folder / f"small-{number % 50}").write_bytes(CHOOSE.randbytes(CHOOSE.randrange(3000)))
    (folder / "text").write_bytes(b"".join(b"line %d\n" % n for n in range(200_000)))


@pytest.mark.parametrize(
    ("version", "compression"), [("1", "auto"), ("2", "auto"), ("2", "off"), ("2", "max")]
)
def test_we_know_and_read_every_blob_that_restic_stored(
    folder: Path, restic: Restic, tmp_path: Path, version: str, compression: str
) -> None:
    restic("init", "--repository-version", version)
    source = tmp_path / "source"
    with Repository.open(LocalStorage(folder), PASSWORD, environment={}) as repository:
        for step in ("first", "pruned"):
            make_files(source)
            restic("backup", "--compression", compression, str(source))
            if step == "pruned":
                restic("forget", "--keep-last", "1", "--prune", "--max-unused", "0")
            repository.load_index()
            wanted = listed(restic)
            found = read(repository, wanted)
            assert set(found) == {id_ for _, id_ in wanted}
            assert len(repository.index) == len(known(repository))
            assert {(blob.type, blob.id) for _, blob in known(repository)} == set(wanted)
            assert problems(repository) == []
            assert max(found.values()) > MIB


def fill(repository: Repository) -> None:
    """Store blobs of all kinds."""
    writer = Writer(repository, workers=2)
    try:
        for size in (1, 1000, MIB, 3 * MIB):
            writer.add_now(BlobType.DATA, CHOOSE.randbytes(size))
            writer.add_now(BlobType.DATA, CHOOSE.randbytes(10) * (size // 10 + 1))
        writer.add_now(BlobType.TREE, b'{"nodes":[]}\n')
        writer.flush()
    finally:
        writer.stop()


@pytest.fixture
def ours(folder: Path) -> Iterator[Repository]:
    """A repository of ours with blobs of all kinds in several packs, and no snapshot."""
    storage = LocalStorage(folder)
    with Repository.create(storage, PASSWORD, cost=Scrypt(2, 1, 1), environment={}) as made:
        for _ in range(2):
            fill(made)
        yield made


def test_restic_reads_all_packs_and_indexes_that_we_write(ours: Repository, restic: Restic) -> None:
    assert listed(restic) == sorted({(blob.type, blob.id) for _, blob in known(ours)})
    assert len(listed(restic)) == 17
    assert "no errors were found" in restic("check", "--read-data").text
    for _, blob in known(ours):
        if blob.type is BlobType.DATA:
            content = restic("cat", "blob", blob.id.hex()).out
            assert content == ours.load_blob(blob.type, blob.id)


def test_restic_finds_in_the_headers_of_our_packs_what_our_index_says(
    ours: Repository, restic: Restic
) -> None:
    before = known(ours)
    restic("rebuild-index", "--read-all-packs")
    assert known(ours) == before
    ours.load_index()
    assert problems(ours) == []


@pytest.mark.parametrize("where", ["start", "end"])
def test_restic_and_we_find_the_same_packs_damaged(
    ours: Repository, restic: Restic, folder: Path, where: str
) -> None:
    names = sorted(name for name, _ in ours.storage.list(Kind.DATA))
    path = folder / "data" / names[0][:2] / names[0]
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[20 if where == "start" else -20] ^= 4
    path.write_bytes(data)
    checked = restic("check", "--read-data", check=False)
    assert checked.code != 0
    assert {problem.pack for problem in problems(ours)} == {names[0]}
    assert names[0] in checked.err or names[0][:8] in checked.err + checked.text
