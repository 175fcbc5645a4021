# SPDX-License-Identifier: Apache-2.0
"""What the state machine has found, each as a small test of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from lab import cli
from qmpbackup.model import Level
from stored import MIB, Stored, Write


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "target", size=MIB)


def add(stored: Stored, level: Level) -> None:
    """A point with a write of its own."""
    number = len(stored.points) + 1
    stored.add(level, {"hd0": [Write(number, number * 65536, 65536)]})


def keep_states(stored: Stored) -> None:
    cli.run("snapshotrebase", "--dir", stored.path / "hd0", program="qmprestore").check()


def assert_all_restore(stored: Stored, folder: Path) -> None:
    for point in stored.points:
        output = folder / point.id
        arguments = ("--point", point.id, "--output", output, "--format", "raw")
        cli.run("restore", "--target", stored.path, *arguments).check()
        assert (output / "hd0.raw").read_bytes() == stored.expected[point.id, "hd0"]


def test_states_of_one_second_are_kept_again_by_a_later_merge(
    stored: Stored, tmp_path: Path
) -> None:
    for level in (Level.FULL, Level.INC, Level.INC):
        add(stored, level)
    with stored.target.lock(remove=True):
        for point in stored.points:
            stored.target.replace_manifest(replace(point, time=stored.points[0].time))
    keep_states(stored)
    stored.points = list(stored.target.load().points)
    add(stored, Level.INC)
    keep_states(stored)
    assert_all_restore(stored, tmp_path)
