# SPDX-License-Identifier: Apache-2.0
"""`verify` of a repository: packs, indexes, snapshots and trees, with a cache and without.

What holds for every kind of target is in `contract/test_verify.py`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from lab import cli
from lab.damage import flip
from qmpbackup.errors import DamagedError
from qmpbackup.service.verify import Report, Request, verify
from stock.stored import MIB
from stock.stored_repository import VM, StoredRepository

DAMAGED = 8


def bytes_of(seed: int, length: int) -> bytes:
    """Bytes that are always the same, and that nothing makes smaller."""
    return Random(seed).randbytes(length)  # noqa: S311 - no secret


BASE = bytes_of(1, 3 * MIB)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRepository:
    """Three points: the second changes a chunk of one disk, the third one of the other."""
    stored = StoredRepository(tmp_path)
    for name, value in stored.made.environment.items():
        monkeypatch.setenv(name, value)
    stored.add({"hd0": BASE, "hd1": bytes(2 * MIB)})
    stored.add({"hd0": bytes_of(2, MIB) + BASE[MIB:], "hd1": bytes(2 * MIB)})
    stored.add({"hd0": bytes_of(2, MIB) + BASE[MIB:], "hd1": bytes_of(3, MIB) + bytes(MIB)})
    return stored


def problems(report: Report) -> list[str]:
    """All sentences about each point."""
    return [" ".join(each.problems) for each in report.verdicts]


def look(stored: StoredRepository, share: float = 0.0, point: str = "") -> Report:
    return verify(Request(stored.place, point, read_data=share))


def packs(stored: StoredRepository) -> list[Path]:
    """The pack with the chunks of each point, in their order."""
    return [each for each in stored.files("data") if each.stat().st_size > MIB]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_whole_repository_is_found_whole(stored: StoredRepository, share: float) -> None:
    report = look(stored, share)
    assert report.whole
    assert problems(report) == ["", "", ""]
    # All packs are needed, and none is read twice.
    stored_size = sum(each.stat().st_size for each in stored.files("data"))
    assert (report.files, report.size) == (len(stored.files("data")), stored_size)
    read = (report.files, report.size) if share else (0, 0)
    assert (report.read_files, report.read_size) == read


def test_a_share_of_the_packs_is_read_and_never_none(stored: StoredRepository) -> None:
    assert look(stored, 0.5).read_files == -(-len(stored.files("data")) // 2)
    assert look(stored, 0.0001).read_files == 1


def test_what_restic_pruned_and_rewrote_is_whole(stored: StoredRepository) -> None:
    restic = stored.made.restic
    restic("forget", stored.made.snapshot_of(stored.points[0].id)["id"])
    restic("prune", "--max-unused", "0")
    restic("tag", "--add", "kept", "latest")
    report = look(stored, 1.0)
    assert report.whole
    assert [each.point.id for each in report.verdicts] == [each.id for each in stored.points[1:]]


def test_without_a_cache(stored: StoredRepository) -> None:
    shutil.rmtree(stored.made.folder / "cache")
    assert look(stored, 1.0).whole


def test_a_changed_byte_is_found_by_reading_and_damages_who_needs_it(
    stored: StoredRepository,
) -> None:
    pack = packs(stored)[1]
    flip(pack, 1000)
    assert look(stored).whole
    report = look(stored, 1.0)
    first, *others = problems(report)
    assert first == ""
    for each in others:
        assert "Disk hd0" in each
        assert pack.name in each
    assert [each.path for each in report.damaged] == [f"data/{pack.name}"]


def test_only_points_that_need_the_damaged_chunk_are_damaged(stored: StoredRepository) -> None:
    # The second point replaced the first chunk of the first one's pack.
    ours = chunk_offset(stored, 0)
    flip(packs(stored)[0], ours + 1000)
    found = problems(look(stored, 1.0))
    assert "lacks 1 of its chunks" in found[0]
    assert found[1:] == ["", ""]


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda pack: os.truncate(pack, 1000)], ids=["missing", "cut"]
)
def test_a_missing_or_cut_pack_is_found_without_reading(
    stored: StoredRepository, spoil: Callable[[Path], None]
) -> None:
    pack = packs(stored)[2]
    spoil(pack)
    report = look(stored)
    assert problems(report)[:2] == ["", ""]
    assert "Disk hd1 lacks 1 of its chunks" in problems(report)[2]
    assert pack.name in problems(report)[2]
    assert [each.path for each in report.damaged] == [f"data/{pack.name}"]
    assert look(stored, 1.0, stored.points[1].id).whole
    assert not look(stored, point="latest").whole


def test_bytes_behind_a_pack_are_found(stored: StoredRepository) -> None:
    pack = packs(stored)[0]
    pack.chmod(0o600)
    with pack.open("ab") as file:
        file.write(b"more")
    report = look(stored)
    assert [each.path for each in report.damaged] == [f"data/{pack.name}"]
    assert problems(report) == ["", "", ""]  # all chunks can still be read


def test_a_lost_index(stored: StoredRepository) -> None:
    stored.files("index")[-1].unlink()
    report = look(stored)
    assert not report.whole
    assert len(report.verdicts) + len(report.damaged) >= 3
    assert problems(report)[:2] == ["", ""]


@pytest.mark.parametrize("cached", [True, False])
def test_a_damaged_index_is_named(stored: StoredRepository, cached: bool) -> None:
    index = stored.files("index")[0]
    flip(index, 60)
    if not cached:
        shutil.rmtree(stored.made.folder / "cache")
    report = look(stored)
    assert f"index/{index.name}" in {each.path for each in report.damaged}
    assert not report.whole


@pytest.mark.parametrize("cached", [True, False])
def test_a_damaged_snapshot_is_named(stored: StoredRepository, cached: bool) -> None:
    name = stored.made.snapshot_of(stored.points[1].id)["id"]
    flip(stored.path / "snapshots" / name, 60)
    if cached:
        assert name in problems(look(stored))[1]
        return
    shutil.rmtree(stored.made.folder / "cache")
    report = look(stored)
    assert [each.path for each in report.damaged] == [f"snapshots/{name}"]
    assert problems(report) == ["", ""]


@pytest.mark.parametrize("cached", [True, False])
def test_a_damaged_tree_is_found_without_reading_everything(
    stored: StoredRepository, cached: bool
) -> None:
    tree = pack_of(stored, stored.made.snapshot_of(stored.points[0].id)["tree"])
    flip(tree, 20)
    if not cached:
        shutil.rmtree(stored.made.folder / "cache")
    report = look(stored)
    assert not report.whole
    assert stored.points[0].id not in {
        each.point.id for each in report.verdicts if not each.problems
    }


def test_the_points_of_another_vm_are_its_own(stored: StoredRepository) -> None:
    stored.vm = replace(VM, name="other", uuid="")
    stored.points = []
    stored.add({"hd0": bytes_of(9, MIB)})
    report = verify(Request(stored.place, vm="other", read_data=1.0))
    assert [each.point.id for each in report.verdicts] == [stored.points[0].id]
    assert report.whole


def test_snapshots_that_are_all_damaged(stored: StoredRepository) -> None:
    for each in stored.files("snapshots"):
        flip(each, 60)
    shutil.rmtree(stored.made.folder / "cache")
    with pytest.raises(DamagedError):
        look(stored)


class TestCommandLine:
    """What is printed, and how it ends."""

    def test_whole(self, stored: StoredRepository) -> None:
        target = ("--target", str(stored.made))
        assert "nothing missing" in cli.run("verify", *target).check().out
        assert "all whole" in cli.run("verify", *target, "--read-data").check().out
        out = cli.run("verify", *target, "--read-data=20%", "--json").check().objects
        assert [each["type"] for each in out] == ["verdict"] * 3 + ["summary"]
        assert out[-1]["ok"]
        assert 0 < out[-1]["read_files"] < out[-1]["files"]
        assert 0 < out[-1]["read_size"] < out[-1]["size"]

    def test_damaged(self, stored: StoredRepository) -> None:
        pack = packs(stored)[2]
        pack.unlink()
        target = ("--target", str(stored.made))
        result = cli.run("verify", *target).check(DAMAGED)
        assert f"data/{pack.name}" in result.out
        assert "1 point damaged, 1 file of the repository damaged" in result.out
        out = cli.run("verify", *target, "--json").check(DAMAGED).objects
        assert [each["ok"] for each in out] == [True, True, False, False]


def pack_of(stored: StoredRepository, blob_id: str) -> Path:
    """The pack with a blob."""
    name = next(each["pack"] for each in stored.index_entries() if each["id"] == blob_id)
    return stored.path / "data" / name[:2] / name


def chunk_offset(stored: StoredRepository, number: int) -> int:
    """Where in its pack a chunk of the first disk lies."""
    import hashlib

    wanted = hashlib.sha256(BASE[number * MIB : (number + 1) * MIB]).hexdigest()
    return next(int(each["offset"]) for each in stored.index_entries() if each["id"] == wanted)
