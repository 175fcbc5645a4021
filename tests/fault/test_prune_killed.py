# SPDX-License-Identifier: Apache-2.0
"""A pruning that is killed before any of its steps on the file system: what the policy keeps is right
or refused until the next run, be it a backup or a pruning, has brought it to its end."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab.file_steps import killed
from qmpbackup.errors import DamagedError
from qmpbackup.model import Level
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from qmpbackup.targets.folder.target import DirectoryTarget
from stock.stored import MIB, Stored, Write

KEPT = (1, 4, 5)
POLICY = ("--keep-daily", "3")


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A chain of two disks, of which the policy drops the beginning, a part in the middle, and a
    copy."""
    stored = Stored(tmp_path / "made", size=MIB)
    for number, level in enumerate([Level.FULL, *[Level.INC] * 2, Level.COPY, *[Level.INC] * 2]):
        writes = [Write(number + 1, number * 65536, 65536 + 512), Write(0, 65536, number * 512)]
        stored.add(level, {"hd0": writes} | ({} if level is Level.COPY else {"b": writes}))
    for number, day in enumerate([1, 1, 2, 2, 2, 3]):
        time = datetime(2026, 11, day, number, tzinfo=UTC)
        stored.points[number] = replace(stored.points[number], time=time)
        stored.target.replace_manifest(stored.points[number])
    return stored


def test_killed_before_every_twelfth_file_step(stored: Stored) -> None:
    assert kill_until_one_survives(stored, 5, step=12) > 3


@pytest.mark.slow
def test_killed_before_every_file_step(stored: Stored) -> None:
    assert kill_until_one_survives(stored, 1, step=1) > 30


def kill_until_one_survives(stored: Stored, first: int, step: int) -> int:
    """Kill prunings of copies of what was made; return how many were killed."""
    kills = 0
    while True:
        copy = stored.path.with_name(f"killed-{kills}")
        shutil.copytree(stored.path, copy)
        if not dies(copy, first + kills * step):
            assert_whole(copy, stored, KEPT)
            return kills
        try:
            assert_right_or_refused(copy, stored)
            as_a_backup_would(copy)
            assert not dies(copy, sys.maxsize)
            assert_whole(copy, stored, KEPT)
        except BaseException as error:
            error.add_note(f"killed before file step {first + kills * step}")
            raise
        shutil.rmtree(copy)
        kills += 1


def dies(path: Path, fatal: int) -> bool:
    """Prune and be killed before the step `fatal`; false if the run came to its end before."""
    return killed(fatal, "prune", "--target", path, *POLICY)


def as_a_backup_would(path: Path) -> None:
    """Clear up in the target before anything else is done with it."""
    target = DirectoryTarget.open(path)
    target.settle()
    with target.lock(write=True):
        target.recover()
    assert not target.interrupted()
    report = verify(VerifyRequest(path))
    assert report.whole, report
    assert not report.foreign, report


def restores(path: Path, stored: Stored, number: int) -> bool:
    """Whether a point gives back its bytes; if not, there must be an error for it."""
    out = path.with_name("out")
    point = stored.points[number]
    try:
        restore(RestoreRequest(path, point.id, folder=out, format="raw"))
        for disk in point.disks:
            assert (out / f"{disk.id}.raw").read_bytes() == stored.expected[point.id, disk.id]
    except DamagedError:
        return False
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return True


def assert_right_or_refused(path: Path, stored: Stored) -> None:
    right = [restores(path, stored, number) for number in KEPT]
    assert all(right) or DirectoryTarget.open(path).interrupted()


def assert_right(path: Path, stored: Stored) -> None:
    assert all(restores(path, stored, number) for number in KEPT)


def assert_whole(path: Path, stored: Stored, expected: Sequence[int]) -> None:
    """Just these points are left, all right, and nothing else lies there."""
    left = DirectoryTarget.open(path).load().points
    assert [point.id for point in left] == [stored.points[number].id for number in expected]
    assert [len(point.disks) for point in left] == [2] * len(expected)
    assert_right(path, stored)
    report = verify(VerifyRequest(path))
    assert report.whole, report
    assert not report.foreign, report
    names = {each.name for each in (path / "points").iterdir()}
    assert names == {f"{point.id}.json" for point in left}
