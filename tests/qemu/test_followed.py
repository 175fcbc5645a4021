# SPDX-License-Identifier: Apache-2.0
"""A program follows a backup and steers it: `--progress-fd` and `--limit-fd`, with a running VM."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.backups import assert_restores
from lab.disks import MIB, Disk, create, pattern
from lab.patience import wait_until
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target, environment_of
from stock.repositories import repository

SIZE = 8 * MIB


@dataclass
class Followed:
    """A backup that runs, with our ends of its descriptors."""

    running: cli.Running
    progress: int
    limit: int
    _said: bytes = b""

    def say(self, line: str) -> None:
        """Give another limit."""
        os.write(self.limit, line.encode() + b"\n")

    def objects(self) -> list[dict[str, Any]]:
        """All that it has told so far."""
        try:
            while more := os.read(self.progress, 65536):
                self._said += more
        except BlockingIOError:
            pass
        return [json.loads(line) for line in self._said.split(b"\n")[:-1]]

    def reaches(self, stage: str) -> bool:
        """Whether it has come to a stage."""
        return any(each["stage"] == stage for each in self.objects())


@contextmanager
def followed(vm: Qemu, target: Target, limit: str) -> Iterator[Followed]:
    """A backup that begins with a limit."""
    progress, theirs = os.pipe()
    their_limit, ours = os.pipe()
    os.set_blocking(progress, False)
    os.write(ours, limit.encode() + b"\n")
    arguments = ("--socket", vm.socket, "backup", "--target", str(target), "--json")
    fds = ("--progress-fd", theirs, "--limit-fd", their_limit)
    try:
        with cli.start(
            *arguments, *fds, env=environment_of(target), pass_fds=(theirs, their_limit)
        ) as running:
            os.close(theirs)
            os.close(their_limit)
            yield Followed(running, progress, ours)
    finally:
        os.close(progress)
        os.close(ours)


@pytest.fixture(params=["folder", "repository", "staged"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Qemu, Target]]:
    """A VM with two disks, and a target of a kind; `staged`: the VM copies its disks for us first."""
    thread = "thread0" if request.param == "staged" else ""
    disks = [
        Disk(name, create(tmp_path / name, SIZE, contents=pattern(SIZE, seed)), iothread=thread)
        for seed, name in enumerate(("vda", "vdb"))
    ]
    target = tmp_path / "target" if request.param == "folder" else repository(tmp_path / "target")
    with Qemu(disks, name="web", iothreads=[thread] if thread else []) as vm:
        yield vm, target


def test_a_limit_is_taken_back_while_it_runs(scene: tuple[Qemu, Target], tmp_path: Path) -> None:
    """Until then it would have taken for ever."""
    vm, target = scene
    with followed(vm, target, "1") as backup:
        wait_until(backup.running.unless_over(lambda: backup.reaches("copy")))
        backup.say("nonsense")
        assert backup.running.process.poll() is None
        backup.say("none")
        result = backup.running.wait().check()
        told = backup.objects()
    assert "'nonsense' is no limit" in result.err
    point = result.objects[0]["point"]
    assert_restores(
        target, point["id"], {each.id: vm.contents(each.id) for each in vm.disks}, tmp_path
    )
    assert {each["vm"] for each in told} == {"web"}
    stages = list(dict.fromkeys(each["stage"] for each in told))
    assert stages[0] == "prepare"
    assert stages[-2:] == ["copy", "store"]
    for disk in told[-1]["disks"]:
        assert disk["id"] in {"vda", "vdb"}
        assert disk["done"] == disk["total"] == SIZE


def test_disks_that_are_copied_have_the_limit_among_them(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    disks = [
        Disk(name, create(tmp_path / name, SIZE, contents=pattern(SIZE, 1)))
        for name in ("vda", "vdb")
    ]
    vm = start_qemu(disks)

    def speeds() -> list[int]:
        jobs = vm.qmp("query-block-jobs")
        return [each["speed"] for each in jobs if each["status"] == "running"]

    with followed(vm, tmp_path / "target", "9") as backup:
        wait_until(backup.running.unless_over(lambda: speeds() == [4, 4]))
        backup.say("1")
        wait_until(backup.running.unless_over(lambda: speeds() == [1, 1]))
        backup.say("0")
        backup.running.wait().check()


def test_one_who_has_gone_costs_nothing(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "vda", SIZE, contents=pattern(SIZE, 1)))])
    read, write = os.pipe()
    os.close(read)
    arguments = ("--socket", vm.socket, "backup", "--target", tmp_path / "target")
    fds = ("--progress-fd", write, "--limit-fd", 0)  # an input without anything in it
    with cli.start(*arguments, *fds, pass_fds=(write,)) as running:
        os.close(write)
        running.wait().check()


def test_what_nobody_has_opened_is_no_descriptor(tmp_path: Path) -> None:
    arguments = ("--socket", tmp_path / "none", "backup", "--target", tmp_path / "target")
    for option in ("--progress-fd", "--limit-fd"):
        result = cli.run(*arguments, option, 77).check(2)
        assert "77" in result.err
        assert not (tmp_path / "target").exists()
