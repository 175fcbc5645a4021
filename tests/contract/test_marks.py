# SPDX-License-Identifier: Apache-2.0
"""Marks in a directory target: which files they speak of, when they count, and when they go."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qmpbackup.model import Level, StoredDisk
from qmpbackup.service.verify import Request, verify
from stock.stored import MIB, Stored, Write

DISK = "scsi0.0:%1/é"


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and an incremental of a disk with a strange name."""
    stored = Stored(tmp_path / "target", size=MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, 65536, 512)]})
    return stored


def record(stored: Stored, number: int) -> StoredDisk:
    disk = stored.points[number].disk(DISK)
    assert disk is not None
    return disk


def fault(stored: Stored, number: int = 1) -> str:
    """Why nothing can be built upon a point."""
    return stored.target.quick_check(stored.points[number], DISK, stored.points)


def marks(stored: Stored) -> list[Path]:
    return list(stored.path.rglob("*.damaged"))


def test_a_mark_counts_for_all_that_builds_on_the_file_and_for_nothing_else(stored: Stored) -> None:
    stored.target.mark_damaged(record(stored, 1), "It smells.")
    assert fault(stored, 0) == ""
    assert "It smells." in fault(stored, 1)
    (known,) = stored.target.load().marked
    assert known.path == record(stored, 1).file
    assert stored.target.load().damaged == ()
    stored.target.mark_damaged(record(stored, 0), "It rots.")
    assert "It rots." in fault(stored, 0)
    assert stored.target.marked_files() == tuple(
        sorted(record(stored, number).file for number in (0, 1))
    )


def test_the_first_finding_stays(stored: Stored) -> None:
    for reason in ("It smells.", "It stinks."):
        stored.target.mark_damaged(record(stored, 0), reason)
    assert json.loads(marks(stored)[0].read_text())["reason"] == "It smells."


def test_a_mark_of_other_contents_means_nothing_and_is_replaced(stored: Stored) -> None:
    other = replace(record(stored, 0), digest="blake3:" + "0" * 64)
    stored.target.mark_damaged(other, "It was merged since.")
    assert fault(stored) == ""
    assert stored.target.load().marked == ()
    stored.target.mark_damaged(record(stored, 0), "It smells.")
    assert "It smells." in fault(stored)


def test_verify_removes_marks_of_files_that_are_whole_or_needed_no_more(stored: Stored) -> None:
    stored.target.mark_damaged(record(stored, 0), "It smelled.")
    stored.target.mark_damaged(replace(record(stored, 0), file="gone/FULL-1"), "It is gone.")
    assert len(marks(stored)) == 2
    assert verify(Request(stored.path)).whole
    assert marks(stored) == []


def test_marks_stay_while_nobody_knows_what_is_needed(stored: Stored) -> None:
    stored.target.mark_damaged(record(stored, 1), "It smells.")
    stored.manifest(stored.points[1]).rename(stored.path / "away")
    stored.manifest(stored.points[1]).write_text("{}")
    verify(Request(stored.path))
    assert len(marks(stored)) == 1
    (stored.path / "away").rename(stored.manifest(stored.points[1]))
    assert "It smells." in fault(stored)


def test_a_mark_that_was_half_written_goes_with_the_next_run(stored: Stored) -> None:
    half = stored.path / "points" / "vda.FULL-1.damaged.tmp"
    half.write_text("{")
    with stored.target.lock(write=True):
        stored.target.recover()
    assert not half.exists()
    assert stored.target.load().marked == ()


@pytest.mark.parametrize("what", ["rubbish", "of another file", "a folder", "a link"])
def test_a_mark_that_says_nothing_clear_counts_and_hinders_nobody(
    stored: Stored, what: str
) -> None:
    stored.target.mark_damaged(record(stored, 1), "It smells.")
    (mark,) = marks(stored)
    text = mark.read_text()
    mark.unlink()
    if what == "a folder":
        mark.mkdir()
    elif what == "a link":
        mark.symlink_to("/etc/passwd")
    else:
        other = text.replace(record(stored, 1).file, "other/FULL-1")
        mark.write_text("[" * 100_000 if what == "rubbish" else other)
    assert fault(stored, 0) == ""
    assert "marked as damaged" in fault(stored, 1)
    assert [each.path for each in stored.target.load().marked] == [record(stored, 1).file]
    assert stored.target.load().points == tuple(stored.points)
    stored.target.mark_damaged(record(stored, 1), "It smells.")
    assert "marked as damaged" in fault(stored, 1)
