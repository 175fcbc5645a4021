# SPDX-License-Identifier: Apache-2.0
"""A merge that dies between any two of its steps on the file system: until it is finished nothing gives
wrong bytes; then all is right."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab import cli
from lab.file_steps import killed
from qmpbackup.errors import DamagedError, NoSuchTarget, QmpBackupError
from qmpbackup.model import Level
from qmpbackup.plan.merge import Operation
from qmpbackup.service.original.choosing import Request
from qmpbackup.service.original.export import export
from qmpbackup.service.original.merge import dry_run, merge
from qmpbackup.service.original.named_folder import NamedFolder
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from qmpbackup.targets.folder import journal
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.names import MERGE
from stock.stored import MIB, Stored, Write, contents

DISK = "hd0"


COMMAND = {Operation.COMMIT: "commit", Operation.SNAPSHOTS: "snapshotrebase"}
BEGUN = r"rename FULL-\d+ FULL-\d+\.old"
"""The journal says what to do with the merged image; nothing of it is done."""
SET_ASIDE = r"remove .*\.json\.tmp"
"""The full has another name, and the merged image not yet its own."""


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and three incrementals; the last builds on what is merged."""
    stored = Stored(tmp_path / "made", size=2 * MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, 65536, 65536)]})
    stored.add(Level.INC, {DISK: [Write(3, 0, 4096)]})
    stored.add(Level.INC, {DISK: [Write(4, MIB, 4096)]})
    return stored


def until(stored: Stored) -> str:
    return stored.file(stored.points[2], DISK).name


def dies(folder: Path, until_: str, operation: Operation, step: int | str) -> bool:
    """Merge, and die before a step; false if the merge came to its end before."""
    command = (COMMAND[operation], "--dir", folder, "--until", until_)
    return killed(step, *command, program="qmprestore")


def every_death(stored: Stored, operation: Operation, stride: int) -> Iterator[Path]:
    """Copies of what was made, each with a merge of the disk that died `stride` steps later."""
    step = 2
    while True:
        copy = stored.path.with_name(f"killed-{step}")
        shutil.copytree(stored.path, copy, symlinks=True)
        if not dies(copy / DISK, until(stored), operation, step):
            assert step > 12, "most steps were never reached"
            return
        yield copy
        shutil.rmtree(copy)
        step += stride


def assert_right_or_refused(path: Path, stored: Stored) -> int:
    """Each point gives back its bytes, or an error; how many are right."""
    right = 0
    for point in stored.points:
        out = path.with_name("out")
        try:
            restore(RestoreRequest(path, point.id, file=out, format="raw"))
        except (DamagedError, NoSuchTarget):
            continue
        assert out.read_bytes() == stored.expected[point.id, DISK], point.id
        out.unlink()
        right += 1
    return right


def assert_whole(path: Path, stored: Stored, expected: Sequence[int]) -> None:
    """Just these points are left, all right, and nothing else lies there."""
    target = DirectoryTarget.open(path)
    points = target.load().points
    assert [point.id for point in points] == [stored.points[each].id for each in expected]
    assert assert_right_or_refused(path, stored) == len(expected)
    report = verify(VerifyRequest(path))
    assert report.whole, report
    assert not report.foreign, report
    names = {each.name for each in (path / "points").iterdir()}
    assert names == {f"{point.id}.json" for point in points}


def test_a_file_that_a_merge_has_set_aside_is_not_called_lost(
    stored: Stored, tmp_path: Path
) -> None:
    assert dies(stored.path / DISK, until(stored), Operation.COMMIT, SET_ASIDE)
    point = ("--target", stored.path)
    listed = cli.run("list", *point).check()
    assert "merge in hd0 was interrupted" in listed.err
    assert "qmprestore commit --dir" in listed.err
    out = ("--output", tmp_path / "out")
    assert "merge in hd0 was interrupted" in cli.run("restore", *point, *out).check(8).err
    assert "merge in hd0 was interrupted" in cli.run("verify", *point).check(8).out
    assert not list(stored.path.rglob("*.damaged"))
    assert cli.run("commit", "--dir", stored.path / DISK, program="qmprestore").code == 0
    cli.run("verify", *point).check()


def roll_forward(path: Path) -> list[str]:
    target = DirectoryTarget.open(path)
    with target.lock(remove=True):
        assert not target.recover()
        return journal.roll_forward(path)


STRIDES = pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])


@STRIDES
@pytest.mark.parametrize("operation", Operation)
def test_death_after_any_step(stored: Stored, operation: Operation, stride: int) -> None:
    merged = [0, 1, 2, 3] if operation is Operation.SNAPSHOTS else [2, 3]
    before = after = 0
    for path in every_death(stored, operation, stride):
        right = assert_right_or_refused(path, stored)
        target = DirectoryTarget.open(path)
        unfinished = bool(target.interrupted())
        done = roll_forward(path)
        assert bool(done) == unfinished
        assert not target.interrupted()
        assert roll_forward(path) == [], "once more changes nothing"
        if (path / DISK / until(stored)).exists():
            assert right == 4, "nothing was destroyed yet, so nothing may be refused"
            assert_whole(path, stored, [0, 1, 2, 3])
            before += 1
        else:
            assert_whole(path, stored, merged)
            after += 1
    assert before * stride >= 9
    assert after * stride >= 12


@STRIDES
@pytest.mark.parametrize("operation", Operation)
def test_death_while_an_interrupted_merge_is_finished(
    stored: Stored, operation: Operation, stride: int
) -> None:
    merged = [0, 1, 2, 3] if operation is Operation.SNAPSHOTS else [2, 3]
    begun = stored.path.with_name("begun")
    shutil.copytree(stored.path, begun)
    assert dies(begun / DISK, until(stored), operation, BEGUN)
    step = 2
    while True:
        copy = stored.path.with_name(f"finishing-{step}")
        shutil.copytree(begun, copy)
        if not dies_while_finishing(copy, stored, step):
            break
        assert_right_or_refused(copy, stored)
        dies_while_finishing(copy, stored, step)
        roll_forward(copy)
        assert_whole(copy, stored, merged)
        shutil.rmtree(copy)
        step += stride
    assert step > 12


def dies_while_finishing(path: Path, stored: Stored, step: int) -> bool:
    """Finish an interrupted merge, with nothing to merge after it, and die before a step; whether it did."""
    return dies(path / DISK, stored.file(stored.points[0], DISK).name, Operation.COMMIT, step)


@STRIDES
@pytest.mark.parametrize("operation", Operation)
def test_death_in_a_folder_without_manifests(
    stored: Stored, operation: Operation, stride: int
) -> None:
    newest = stored.file(stored.points[3], DISK).name
    full = stored.file(stored.points[0], DISK).name
    for path in every_death(without_manifests(stored), operation, stride):
        folder = path / DISK
        NamedFolder.find(folder).journal.finish()
        names = {each.name for each in folder.iterdir()}
        assert contents(folder / newest, "qcow2") == stored.expected[stored.points[3].id, DISK]
        if until(stored) in names:
            assert len(names) == 4
            state = stored.expected[stored.points[0].id, DISK]
        else:
            assert names == {full, newest}
            state = stored.expected[stored.points[2].id, DISK]
        assert contents(folder / full, "qcow2") == state


def without_manifests(stored: Stored) -> Stored:
    shutil.rmtree(stored.path / "points")
    (stored.path / "vm.json").unlink()
    return stored


def test_the_same_command_finishes_what_was_begun(stored: Stored) -> None:
    assert dies(stored.path / DISK, until(stored), Operation.COMMIT, SET_ASIDE)
    outcome = merge(Request(stored.path / DISK), Operation.COMMIT)
    assert outcome.finished
    assert_whole(stored.path, stored, [3])


def test_who_only_reads_says_that_a_merge_was_interrupted(stored: Stored, tmp_path: Path) -> None:
    assert dies(stored.path / DISK, until(stored), Operation.COMMIT, SET_ASIDE)
    before = sorted(stored.path.rglob("*"))
    with pytest.raises(DamagedError, match="interrupted"):
        dry_run(Request(stored.path / DISK), Operation.COMMIT)
    with pytest.raises(DamagedError, match="interrupted"):
        export(Request(stored.path / DISK), tmp_path / "new")
    assert sorted(stored.path.rglob("*")) == before


def test_a_merged_image_that_was_lost_is_said_and_nothing_more_is_destroyed(
    stored: Stored,
) -> None:
    assert dies(stored.path / DISK, until(stored), Operation.COMMIT, SET_ASIDE)
    (merged,) = (stored.path / DISK).glob("*.merged")
    merged.unlink()
    before = sorted(stored.path.rglob("*"))
    with pytest.raises(QmpBackupError, match="cannot be finished"):
        merge(Request(stored.path / DISK), Operation.COMMIT)
    assert sorted(stored.path.rglob("*")) == before


def test_a_journal_of_strangers_is_refused(stored: Stored) -> None:
    victim = stored.path.parent / "victim"
    victim.write_text("mine")
    intent = journal.Intent(journal.Phase.SWAPPING, "x", 4, remove=("../../victim",))
    (stored.path / "points" / f"{DISK}{MERGE}").write_bytes(intent.encode())
    with pytest.raises(DamagedError):
        roll_forward(stored.path)
    assert victim.read_text() == "mine"
