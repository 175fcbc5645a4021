# SPDX-License-Identifier: Apache-2.0
"""Commands that meet at one target: backups, merges, and those that read. What would see or make a
point that is half one thing and half another waits, or leaves with 11; all the others just go on.

The one that is there first is held up in the middle of its work, by a `qemu-img` that waits for us.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import restored
from lab.disks import first_difference
from stock.scene import SIZES, Scene, scene

LOCKED = 11
READERS = ("list", "show", "verify", "restore")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A target with a full and two incrementals."""
    with scene(tmp_path) as stage:
        stage.renew("inc")
        for _ in range(2):
            stage.write()
            cli.run(*stage.arguments("inc", stage.vm.socket)).check()
        yield stage


@dataclass(frozen=True)
class Command:
    """A command line on the target of a scene."""

    arguments: tuple[cli.Argument, ...]
    program: str = "qmpbackup"

    @classmethod
    def of(cls, stage: Scene, name: str, folder: Path) -> "Command":
        """By its name."""
        if name == "backup":
            return cls(stage.arguments("inc", stage.vm.socket))
        if name in {"rebase", "commit", "snapshotrebase"}:
            program = "qmprebase" if name == "rebase" else "qmprestore"
            return cls((name, "--dir", stage.target / "vda"), program)
        output = ("--output", folder / "out", "--format", "raw") if name == "restore" else ()
        return cls((name, "--target", stage.target, *output))

    def run(self, *more: cli.Argument) -> cli.Result:
        return cli.run(*self.arguments, *more, program=self.program)

    def start(self, *more: cli.Argument, path: str = "") -> cli.Running:
        env = {"PATH": path} if path else None
        return cli.start(*self.arguments, *more, program=self.program, env=env)


class Held:
    """A command that stands still in the middle of its work, until `release`."""

    def __init__(self, running: cli.Running, gate: Path) -> None:
        self._running = running
        self._gate = gate
        self._end = -1

    def waits(self) -> bool:
        """Whether it has come to the gate: somebody opens that to read."""
        with suppress(OSError):
            self._end = os.open(self._gate, os.O_WRONLY | os.O_NONBLOCK)
        return self._end >= 0

    def open(self) -> None:
        """Let it go on."""
        self._gate.unlink(missing_ok=True)
        if self._end >= 0:
            os.close(self._end)
            self._end = -1

    def release(self) -> cli.Result:
        """Let it go on; how it ended."""
        self.open()
        return self._running.wait()


@contextmanager
def held(stage: Scene, command: Command, folder: Path) -> Iterator[Held]:
    slow = folder / "slow"
    slow.mkdir()
    program = slow / "qemu-img"
    gate = slow / "gate"
    os.mkfifo(gate)
    # It may write to nothing but what it was given, so it waits by reading.
    program.write_text(
        f'#!/bin/sh\n[ ! -p {gate} ] || read -r _ <{gate}\nexec {shutil.which("qemu-img")} "$@"\n'
    )
    program.chmod(0o755)
    with command.start(path=f"{slow}:{os.environ['PATH']}") as running:
        first = Held(running, gate)
        try:
            stage.vm.qmp.poll(first.waits)
            yield first
        finally:
            first.open()


@pytest.mark.parametrize("merge", ["rebase", "snapshotrebase"])
@pytest.mark.parametrize("late", ["backup", "rebase", *READERS])
def test_whoever_comes_while_points_are_merged(
    stage: Scene, tmp_path: Path, merge: str, late: str
) -> None:
    stage.write()
    live = {disk: stage.vm.contents(disk) for disk in SIZES}
    before = len(manifests(stage.target))
    second = Command.of(stage, late, tmp_path)
    with held(stage, Command.of(stage, merge, tmp_path), tmp_path) as first:
        assert "--lock-wait" in second.run().check(LOCKED).err
        assert len(manifests(stage.target)) == before
        assert not (tmp_path / "out").exists()
        with second.start("--lock-wait", "600") as patient:
            first.release().check()
            patient.wait().check()
    if late == "restore":
        newest = manifests(stage.target)[-1]["id"]
        found = {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert found == restored(stage.target, newest, tmp_path)
    if late == "backup":
        found = restored(stage.target, manifests(stage.target)[-1]["id"], tmp_path)
        assert [first_difference(found[disk], live[disk]) for disk in SIZES] == ["", ""]
    stage.make_good("inc")
    cli.run("verify", "--target", stage.target).check()


@pytest.mark.parametrize("reader", ["verify", "restore"])
def test_a_merge_waits_for_those_who_read(stage: Scene, tmp_path: Path, reader: str) -> None:
    files = {path: path.read_bytes() for path in stage.target.rglob("*") if path.is_file()}
    expected = restored(stage.target, manifests(stage.target)[-1]["id"], tmp_path)
    merge = Command.of(stage, "rebase", tmp_path)
    with held(stage, Command.of(stage, reader, tmp_path), tmp_path) as first:
        merge.run().check(LOCKED)
        left = {path: path.read_bytes() for path in stage.target.rglob("*") if path.is_file()}
        assert left == files
        with merge.start("--lock-wait", "600") as patient:
            first.release().check()
            patient.wait().check()
    if reader == "restore":
        found = {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert found == expected
    stage.make_good("inc")


@pytest.mark.parametrize("reader", ["verify", "restore"])
def test_a_backup_need_not_wait_for_those_who_read(
    stage: Scene, tmp_path: Path, reader: str
) -> None:
    expected = restored(stage.target, manifests(stage.target)[-1]["id"], tmp_path)
    stage.write()
    with held(stage, Command.of(stage, reader, tmp_path), tmp_path) as first:
        stage.make_good("inc")
        first.release().check()
    if reader == "restore":
        found = {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert found == expected


def test_those_who_read_need_not_wait_for_a_backup(stage: Scene, tmp_path: Path) -> None:
    whole = [point["id"] for point in manifests(stage.target)]
    expected = restored(stage.target, whole[-1], tmp_path)
    with stage.long_run() as backup:
        listed = cli.run("list", "--target", stage.target, "--json").check().objects
        assert [point["id"] for point in listed] == whole
        assert "all whole" in cli.run("verify", "--target", stage.target).check().out
        Command.of(stage, "restore", tmp_path).run().check()
        Command.of(stage, "rebase", tmp_path).run().check(LOCKED)
        assert backup.process.poll() is None
    found = {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == expected
    stage.make_good("inc")
