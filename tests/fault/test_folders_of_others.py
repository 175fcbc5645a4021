# SPDX-License-Identifier: Apache-2.0
"""Folders that somebody else owns, or that others may write to: nothing is written into them, and the
sentence says which, and what to do."""

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import cli
from stock.scene import Scene, scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
STORAGE, DAMAGED = 7, 8
NOBODY = 65534


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A target with a full and an incremental."""
    with scene(tmp_path) as stage:
        stage.renew("inc")
        stage.write()
        cli.run(*stage.arguments("inc", stage.vm.socket)).check()
        yield stage


def give_away(folder: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_to_a_group(folder: Path) -> None:
    os.chown(folder, 0, NOBODY)
    folder.chmod(0o770)


def open_to_one_more(folder: Path) -> None:
    """As `setfacl -m u:nobody:rwx` leaves it: the bits of the group are those of its mask."""
    acl = struct.pack("<I", 2)
    entries = [(1, 7, -1), (2, 7, NOBODY), (4, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
    for tag, permissions, who in entries:
        acl += struct.pack("<HHi", tag, permissions, who)
    os.setxattr(folder, "system.posix_acl_access", acl)


SPOILERS = [give_away, open_to_all, open_to_a_group, open_to_one_more]


def everything(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Owner, mode and contents of all that is in a folder, and of the folder."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        state = path.lstat()
        plain = stat.S_ISREG(state.st_mode)
        found[path] = (state.st_uid, state.st_mode, path.read_bytes() if plain else b"")
    return found


@pytest.mark.parametrize("level", ["inc", "auto"])
@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("place", [".", "points", "vda"])
def test_no_backup_goes_into_a_folder_of_others(
    stage: Scene, spoil: Callable[[Path], None], place: str, level: str
) -> None:
    folder = stage.target / place
    spoil(folder)
    before = everything(stage.target)
    refused = cli.run(*stage.arguments(level, stage.vm.socket)).check(STORAGE)
    assert str(folder) in refused.err
    assert ("chown" if spoil is give_away else "chmod") in refused.err
    assert everything(stage.target) == before
    os.chown(folder, os.geteuid(), os.getegid())
    folder.chmod(0o700)
    stage.make_good("inc")


@pytest.mark.parametrize("spoil", SPOILERS)
def test_no_target_is_made_in_a_folder_of_others(
    stage: Scene, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    theirs = stage.target = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("untouched")
    spoil(theirs)
    before = everything(theirs)
    refused = cli.run(*stage.arguments("auto", stage.vm.socket)).check(STORAGE)
    assert str(theirs) in refused.err
    assert everything(theirs) == before


@pytest.mark.parametrize("spoil", SPOILERS)
def test_nothing_is_merged_in_a_folder_of_others(
    stage: Scene, spoil: Callable[[Path], None]
) -> None:
    folder = stage.target / "vda"
    spoil(folder)
    before = everything(stage.target)
    refused = cli.run("rebase", "--dir", folder, program="qmprebase").check(STORAGE)
    assert str(folder) in refused.err
    assert everything(stage.target) == before


@pytest.mark.parametrize("spoil", SPOILERS)
def test_points_in_a_folder_of_others_can_still_be_read(
    stage: Scene, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(stage.target)
    spoil(stage.target / "points")
    before = everything(stage.target)
    cli.run("list", "--target", stage.target).check()
    cli.run("verify", "--target", stage.target).check()
    cli.run("restore", "--target", stage.target, "--output", tmp_path / "out").check()
    assert everything(stage.target) == before
    (full,) = (stage.target / "vda").glob("FULL-*")
    with full.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"damage")
    before = everything(stage.target)
    told = cli.run("verify", "--target", stage.target).check(DAMAGED)
    assert full.name in told.out
    assert "could not be marked" in told.err
    assert everything(stage.target) == before
