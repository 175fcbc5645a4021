# SPDX-License-Identifier: Apache-2.0
"""Memory stays within its bound whatever somebody with the password has put into a repository, who may
be one of several hosts; and the points of the others are found all the same.

Each command runs in a process of its own, whose memory is what the kernel says of it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from lab import watched
from qmpbackup.model import StoredDisk
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.local import LocalStorage
from qmpbackup.restic.tree import Node, encode
from qmpbackup.restic.writer import Writer
from qmpbackup.targets import manifest
from qmpbackup.targets.repository.catalog import tags_of
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList
from stock.stored_repository import START, StoredRepository

MIB = 1 << 20
MOST_MIB = 200
DAMAGED = 8
CHOOSE = random.Random(20261102)  # noqa: S311 - names for tests
LARGE = 128 * MIB
"""Bytes of the largest chunk that the format's reader takes."""


@pytest.fixture
def stored(tmp_path: Path) -> StoredRepository:
    """A repository with one good point."""
    made = StoredRepository(tmp_path)
    made.add({"vda": b"good" * 1000})
    return made


class Planter:
    """Somebody with the password."""

    def __init__(self, repository: Repository, stored: StoredRepository) -> None:
        self.repository = repository
        self.writer = Writer(repository)
        self.stored = stored

    def chunk(self, data: bytes) -> bytes:
        return self.writer.add_now(BlobType.DATA, data)

    def snapshot(self, files: Sequence[tuple[str, int, bytes]], **members: object) -> None:
        """A snapshot that says that it is a point, with these files: name, size, chunks."""
        good = self.stored.points[0]
        nodes = [self._node(name, "file", size=size, content=ids) for name, size, ids in files]
        folder = self.writer.add_large(BlobType.TREE, lambda: encode(nodes))
        top = [self._node("vm", "dir", subtree=folder)]
        root = self.writer.add_large(BlobType.TREE, lambda: encode(top))
        self.writer.flush()
        new = Snapshot(START, root, ("/vm",), "hv1", tags=tags_of(self.stored.vm, good.id))
        self.repository.save_snapshot(replace(new, **members))  # type: ignore[arg-type]

    def _node(self, name: str, kind: str, **members: object) -> Node:
        node = Node(name, kind, 0o600, START, START, START)
        return replace(node, **members)  # type: ignore[arg-type]


@contextmanager
def planting(stored: StoredRepository) -> Iterator[Planter]:
    environment = {**stored.made.environment, "RESTIC_CACHE_DIR": str(stored.folder / "theirs")}
    storage = LocalStorage(stored.path)
    with Repository.open(storage, stored.made.password, environment=environment) as repository:
        repository.load_index()
        planter = Planter(repository, stored)
        try:
            yield planter
        finally:
            planter.writer.stop()


def run(stored: StoredRepository, *arguments: str | Path) -> watched.Watched:
    environment = {**stored.made.environment, "RESTIC_CACHE_DIR": str(stored.folder / "new")}
    command, *more = arguments
    return watched.run(command, "--target", str(stored.made), *more, env=environment)


def chunks_in_a_manifest(planter: Planter) -> None:
    planter.snapshot([("manifest.json", 5000, planter.chunk(bytes(LARGE)) * 24)])


def many_chunks_in_a_manifest(planter: Planter) -> None:
    planter.snapshot([("manifest.json", 16 * MIB, planter.chunk(bytes(8 * MIB)) * 100_000)])


def manifests(planter: Planter) -> None:
    """Valid ones, of another instant each."""
    good = planter.stored.points[0]
    for number in range(1, 21):
        notes = tuple(f"{number}-{each}-" + "x" * 65000 for each in range(220))
        point = replace(
            good,
            id=f"planted-{number}",
            sequence=number,
            time=good.time - timedelta(hours=number),
            notes=notes,
        )
        data = manifest.encode(point)
        planter.snapshot([("manifest.json", len(data), planter.chunk(data))])


PLANTED = [chunks_in_a_manifest, many_chunks_in_a_manifest, manifests]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("command", ["list", "verify"])
def test_planted_points(
    stored: StoredRepository, plant: Callable[[Planter], None], command: str
) -> None:
    with planting(stored) as planter:
        plant(planter)
    seen = run(stored, command)
    seen.result.check(DAMAGED)
    if command == "list":
        assert stored.points[0].id in seen.result.out
    assert seen.mib < MOST_MIB


def test_snapshots_of_very_many_paths(stored: StoredRepository) -> None:
    """As `restic backup --files-from` makes them; they are nobody's points."""
    with planting(stored) as planter:
        for _number in range(10):
            paths = tuple(f"/home/{CHOOSE.randbytes(30).hex()}" for _ in range(100_000))
            planter.snapshot([], paths=paths, tags=(), program_version="restic 0.18.0")
    seen = run(stored, "list")
    assert stored.points[0].id in seen.result.check().out
    assert seen.mib < MOST_MIB


def test_a_large_chunk_of_a_disk(stored: StoredRepository, tmp_path: Path) -> None:
    """Its list says that it is one of a mebibyte."""
    good = stored.points[0]
    with planting(stored) as planter:
        ids = planter.chunk(bytes([1]) * LARGE) * 8
        disk = replace(good.disks[0], size=8 * CHUNK, digest=ChunkList(8 * CHUNK, ids).digest)
        _plant(planter, disk, ids)
    out = tmp_path / "out"
    for command in (("verify",), ("restore", "--point", "planted", "--output", out)):
        seen = run(stored, *command)
        seen.result.check(DAMAGED)
        assert seen.mib < MOST_MIB
    run(stored, "restore", "--point", good.id, "--output", tmp_path / "good").result.check()


@pytest.mark.parametrize(
    ("size", "lengths"),
    [
        (3 * CHUNK, [CHUNK, 777, CHUNK]),
        (2 * CHUNK + 777, [CHUNK, CHUNK, CHUNK]),
    ],
)
def test_a_chunk_that_is_not_as_long_as_it_must_be(
    stored: StoredRepository, tmp_path: Path, size: int, lengths: Sequence[int]
) -> None:
    good = stored.points[0]
    with planting(stored) as planter:
        ids = b"".join(planter.chunk(CHOOSE.randbytes(length)) for length in lengths)
        disk = replace(good.disks[0], size=size, digest=ChunkList(size, ids).digest)
        _plant(planter, disk, ids)
    out = tmp_path / "out"
    for command in (("verify",), ("restore", "--point", "planted", "--output", out)):
        run(stored, *command).result.check(DAMAGED)


def test_a_short_chunk_at_the_end_is_no_whole_one_once_the_disk_has_grown(
    stored: StoredRepository,
) -> None:
    """Its list begins as that of the point before it."""
    short = stored.expected[stored.points[0].id, "vda"]
    with planting(stored) as planter:
        ids = planter.chunk(short) + planter.chunk(b"more")
        disk = stored.points[0].disks[0]
        size = CHUNK + 4
        _plant(planter, replace(disk, size=size, digest=ChunkList(size, ids).digest), ids)
    run(stored, "verify").result.check(DAMAGED)


def _plant(planter: Planter, disk: StoredDisk, ids: bytes) -> None:
    """A point after the good one, with one disk of these chunks."""
    good = planter.stored.points[0]
    point = replace(good, id="planted", sequence=9, time=good.time + timedelta(1), disks=(disk,))
    data = manifest.encode(point)
    files = [("manifest.json", len(data), planter.chunk(data)), ("vda.raw", disk.size, ids)]
    planter.snapshot(files)
