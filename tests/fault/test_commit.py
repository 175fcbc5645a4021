# SPDX-License-Identifier: Apache-2.0
"""Killed before any of the calls that change a target: the point is there as a whole or not at all,
nothing else is lost, and the next run finds a clean target."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab.small import needs_root, small_folder
from qmpbackup.errors import StorageError
from qmpbackup.model import Level
from qmpbackup.targets.folder.target import DirectoryTarget, Pending
from stock.stored import MIB, VM, Stored, Write

SELF = Path(__file__)
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Python's audit events of the calls that change a file system (fsync and write have none: what
differs between two events without a crash of the machine is seen by nobody)."""


def one_run(path: Path, fatal: int, fate: str) -> None:
    """A run that ends in `fate`, and is killed before its change number `fatal`."""
    stored = Stored.__new__(Stored)
    stored.path, stored.size = path, MIB
    stored.target = DirectoryTarget.open_or_create(path, VM)
    inventory = stored.target.load()
    stored.points, stored.expected = list(inventory.points), {}
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
        creates = isinstance(flags, int) and flags & os.O_CREAT
        if event in CHANGES and (event != "open" or creates):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with stored.target.lock(write=True):
        stored.target.recover()
        begin_and(fate, stored)


def begin_and(fate: str, stored: Stored) -> None:
    pending = begin(stored)
    if fate == "abort":
        pending.abort()
    else:
        commit(stored, pending)


def begin(stored: Stored) -> Pending:
    now = datetime.now(UTC)
    disks = [("hd0", Level.FULL), ("new", Level.FULL)]
    pending = stored.target.begin(f"{now:%Y%m%dT%H%M%SZ}-{os.getpid():06x}", disks, now)
    for file in pending.files.values():
        os.write(file.fd, b"contents")
    return pending


def commit(stored: Stored, pending: Pending) -> None:
    pattern = stored.points[0]
    records = []
    for disk_id, file in pending.files.items():
        size, digest = pending.seal(disk_id)
        record = replace(pattern.disks[0], id=disk_id, file=file.name)
        records.append(replace(record, file_size=size, digest=digest))
    number = stored.points[-1].sequence + 1
    pending.commit(replace(pattern, id=pending.point_id, sequence=number, disks=tuple(records)))


@pytest.mark.parametrize("fate", ["commit", "abort"])
def test_a_run_killed_anywhere_leaves_a_whole_point_or_none(tmp_path: Path, fate: str) -> None:
    stored = Stored(tmp_path / "target", size=MIB)
    first = stored.add(Level.FULL, {"hd0": [Write(7, 0, 4096)]})
    theirs = stored.path / "hd0" / "FULL-1480542683"
    theirs.write_text("of the original tool")
    known = 1
    kills = 0
    while run_killed(stored.path, kills + 1, fate):
        kills += 1
        with stored.target.lock(write=True):
            stored.target.recover()
        inventory = stored.target.load()
        assert inventory.damaged == ()
        assert inventory.points[0] == first
        assert len(inventory.points) in {known, known + (fate == "commit")}
        known = len(inventory.points)
        assert_clean(stored, {disk.file for point in inventory.points for disk in point.disks})
        assert theirs.read_text() == "of the original tool"
    assert kills >= 6
    assert len(stored.target.load().points) == known + (fate == "commit")


@needs_root
def test_a_full_target_keeps_its_points_and_nothing_else(tmp_path: Path) -> None:
    with small_folder(tmp_path / "small", MIB) as small:
        fill_up(Stored(small / "target", size=MIB))


def fill_up(stored: Stored) -> None:
    first = stored.add(Level.FULL, {"hd0": [Write(7, 0, 4096)]})
    ballast = stored.path.parent / "ballast"
    for late in (False, True):
        pending = begin(stored) if late else None
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        with pytest.raises(StorageError, match="No space left") as caught:
            commit(stored, pending) if pending else begin(stored)
        assert caught.value.exit_code == 7
        if pending:
            pending.abort()
        assert stored.target.load().points == (first,)
        assert_clean(stored, {first.disks[0].file})
        ballast.unlink()


def assert_clean(stored: Stored, named: set[str]) -> None:
    """Every file is one that a manifest names or that was there before; every named file is whole."""
    found = set(stored.target.stored_names()) - {"hd0/FULL-1480542683"}
    assert found == named
    assert not list(stored.path.glob("points/*.pending"))
    assert not list(stored.path.rglob("*.tmp"))
    for point in stored.target.load().points:
        for disk in point.disks:
            assert stored.target.quick_check(point, disk.id, [point]) == ""


def run_killed(path: Path, fatal: int, fate: str) -> bool:
    """Run in a process of its own; whether it was killed (else it must have succeeded)."""
    import qmpbackup

    places = [str(Path(qmpbackup.__file__).parents[1]), str(SELF.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    code = (
        f"import sys; sys.path.insert(0, {str(SELF.parent)!r})\n"
        "from pathlib import Path\nfrom test_commit import one_run\n"
        f"one_run(Path({str(path)!r}), {fatal}, {fate!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode in {0, -signal.SIGKILL}, result.stderr
    return result.returncode != 0
