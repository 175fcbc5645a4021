# SPDX-License-Identifier: Apache-2.0
"""`verify` of a folder: each file and each manifest, what QEMU finds in them, and what is not ours.

What holds for every kind of target is in `contract/test_verify.py`.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qmpbackup.images.digest import digest
from qmpbackup.model import Level, StoredDisk
from qmpbackup.service.verify import Report, Request, verify
from stock.stored import MIB, Stored, Write, run


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and two incrementals of two disks."""
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {"hd0": [Write(1, 0, MIB)], "hd1": []})
    stored.add(Level.INC, {"hd0": [Write(2, 65536, 512)], "hd1": []})
    stored.add(Level.INC, {"hd0": [Write(3, 0, 512)], "hd1": []})
    return stored


def problems(report: Report) -> list[str]:
    """The points that are damaged, by number of their commit, and all sentences about them."""
    return [" ".join(each.problems) for each in report.verdicts]


def test_a_whole_target_is_found_whole_and_each_file_is_read_once(stored: Stored) -> None:
    report = verify(Request(stored.path))
    assert report.whole
    assert problems(report) == ["", "", ""]
    assert report.files == 6
    assert report.size == sum(point.size for point in stored.points)


def test_a_missing_and_a_cut_file_are_named(stored: Stored) -> None:
    stored.file(stored.points[2], "hd0").unlink()
    cut = stored.file(stored.points[0], "hd1")
    os.truncate(cut, 1000)
    found = problems(verify(Request(stored.path)))
    assert all(f"{cut} has 1000 bytes instead of" in each for each in found)
    assert "is missing" in found[2]
    assert "is missing" not in found[1]


def test_a_damaged_manifest_is_named_and_so_is_what_builds_on_it(stored: Stored) -> None:
    stored.manifest(stored.points[0]).write_text("{}")
    report = verify(Request(stored.path))
    assert [each.path for each in report.damaged] == [f"points/{stored.points[0].id}.json"]
    assert all(stored.points[0].id in each for each in problems(report))


def test_metadata_that_qemu_finds_corrupt_is_damage_even_if_the_digest_fits(
    stored: Stored,
) -> None:
    point = stored.points[2]
    path = stored.file(point, "hd0")
    with path.open("r+b") as file:  # refcounts of zero for clusters in use
        file.seek(2 * 65536)
        file.write(bytes(65536))
    refit(stored, "hd0")
    found = problems(verify(Request(stored.path)))
    assert "qemu-img check" in found[2]
    assert found[:2] == ["", ""]


def test_a_link_to_another_file_is_damage_even_if_the_digest_fits(stored: Stored) -> None:
    path = stored.file(stored.points[2], "hd0")
    full = stored.file(stored.points[0], "hd0").name
    run("qemu-img", "rebase", "-u", "-b", full, "-F", "qcow2", str(path))
    refit(stored, "hd0")
    assert f"builds on {full!r}" in problems(verify(Request(stored.path)))[2]


def test_another_size_than_recorded_is_damage_even_if_the_digest_fits(stored: Stored) -> None:
    run("qemu-img", "resize", "-q", str(stored.file(stored.points[2], "hd1")), "2M")
    refit(stored, "hd1")
    assert "instead of" in problems(verify(Request(stored.path)))[2]


def test_a_missing_internal_snapshot_is_damage(stored: Stored) -> None:
    refit(stored, "hd0", snapshot="gone")
    assert "no snapshot 'gone'" in problems(verify(Request(stored.path)))[2]


def test_files_of_no_point_and_files_of_others_are_told_apart(stored: Stored) -> None:
    (stored.path / "hd0" / "FULL-1480542683").touch()
    (stored.path / "hd1" / "INC-1.partial").touch()
    (stored.path / "hd1" / "notes.txt").touch()
    (stored.path / "README").touch()
    report = verify(Request(stored.path))
    assert report.extra == ("hd0/FULL-1480542683", "hd1/INC-1.partial")
    assert report.foreign == ("hd1/notes.txt",)
    assert not report.whole


def test_files_of_others_alone_are_no_damage(stored: Stored) -> None:
    (stored.path / "hd1" / "image").symlink_to("FULL-1")
    assert verify(Request(stored.path)).whole


def test_of_one_point_just_the_files_of_its_chain_are_read(stored: Stored) -> None:
    stored.file(stored.points[2], "hd0").unlink()
    assert verify(Request(stored.path, stored.points[1].id)).files == 4
    assert not verify(Request(stored.path, "latest")).whole


def refit(stored: Stored, disk_id: str, snapshot: str = "") -> None:
    """Make the manifest of the last point say what its file of a disk is now."""
    point = stored.points[2]
    fd = os.open(stored.file(point, disk_id), os.O_RDONLY)
    try:
        values = {"file_size": os.fstat(fd).st_size, "digest": digest(fd), "snapshot": snapshot}
    finally:
        os.close(fd)

    def fitted(disk: StoredDisk) -> StoredDisk:
        return replace(disk, **values) if disk.id == disk_id else disk  # type: ignore[arg-type]

    stored.target.replace_manifest(replace(point, disks=tuple(map(fitted, point.disks))))
