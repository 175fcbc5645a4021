# SPDX-License-Identifier: Apache-2.0
"""Blobs in a file without a name: got as they were put, or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpbackup.restic.chunk_cache import ChunkCache
from qmpbackup.restic.overflow import Overflow

BLOBS = {bytes([number]) * 32: bytes([number]) * 5000 for number in range(4)}


@pytest.fixture
def overflow(tmp_path: Path) -> Iterator[Overflow]:
    """One that holds all blobs."""
    found = Overflow(tmp_path / "cache")
    for id_, data in BLOBS.items():
        found.put(id_, data)
    yield found
    found.close()


def nameless(folder: Path) -> Path:
    """The file without a name that lies in a folder, as this process has it open."""
    (found,) = [
        each
        for each in Path("/proc/self/fd").iterdir()
        if os.path.lexists(each) and str(each.readlink()).startswith(f"{folder}/")
    ]
    return found


def test_what_is_put_is_got(overflow: Overflow) -> None:
    assert {id_: overflow.get(id_) for id_ in BLOBS} == BLOBS
    assert overflow.get(b"x" * 32) is None


def test_nothing_lies_on_the_disk_in_the_clear_or_by_a_name(
    overflow: Overflow, tmp_path: Path
) -> None:
    del overflow
    assert not list((tmp_path / "cache").iterdir())
    found = nameless(tmp_path / "cache").read_bytes()
    assert not any(data[:16] in found for data in BLOBS.values())


def test_what_was_changed_is_not_got(overflow: Overflow, tmp_path: Path) -> None:
    with nameless(tmp_path / "cache").open("r+b") as file:
        file.seek(5016 + 100)  # in the second
        file.write(b"?")
    assert overflow.get(bytes([1]) * 32) is None
    assert overflow.get(bytes([2]) * 32) == BLOBS[bytes([2]) * 32]


def test_what_was_cut_off_or_put_in_the_place_of_another_is_not_got(
    overflow: Overflow, tmp_path: Path
) -> None:
    with nameless(tmp_path / "cache").open("r+b") as file:
        first = file.read(5016)
        file.seek(5016)
        file.write(first)
        file.truncate(3 * 5016 + 10)
    assert overflow.get(bytes([1]) * 32) is None
    assert overflow.get(bytes([3]) * 32) is None
    assert overflow.get(bytes([0]) * 32) == BLOBS[bytes([0]) * 32]


def test_it_takes_no_more_than_it_may(tmp_path: Path) -> None:
    found = Overflow(tmp_path, most=2 * 5016 + 100)
    for id_, data in BLOBS.items():
        found.put(id_, data)
    assert [found.get(id_) is not None for id_ in BLOBS] == [True, True, False, False]
    assert nameless(tmp_path).stat().st_size == 2 * 5016
    found.close()


@pytest.mark.parametrize("place", [None, "file"])
def test_where_it_cannot_be_it_takes_nothing(tmp_path: Path, place: str | None) -> None:
    (tmp_path / "file").touch()
    found = Overflow(tmp_path / place if place else None)
    found.put(b"x" * 32, b"data")
    assert found.get(b"x" * 32) is None
    found.close()


def test_a_cache_reads_once_what_memory_has_no_room_for(tmp_path: Path) -> None:
    loaded = []

    def load(id_: bytes) -> bytes:
        loaded.append(id_)
        return BLOBS[id_]

    with ChunkCache(load, capacity=1, threads=1, folder=tmp_path) as cache:
        for _ in range(3):
            for id_, data in BLOBS.items():
                assert cache.get(id_) == data
    assert loaded == list(BLOBS)
