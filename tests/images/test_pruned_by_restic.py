# SPDX-License-Identifier: Apache-2.0
"""Pruning a restic repository: restic forgets and sweeps, and just what the policy does not keep.

What holds for every kind of target is in `contract/test_prune.py`.
"""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, pattern
from lab.patience import wait_until
from lab.restic import Backing
from qmpbackup.model import VmIdentity
from stock.repositories import held_alone
from stock.stored_repository import StoredRepository

DISK = "hd0"


@pytest.fixture
def stored(tmp_path: Path) -> StoredRepository:
    """Four points of a VM, an hour apart, that share all but one of their chunks."""
    stored = StoredRepository(tmp_path)
    for number in range(4):
        stored.add({DISK: pattern(2 * MIB, 1) + pattern(MIB, 10 + number)})
    return stored


def prune(stored: StoredRepository, *more: cli.Argument, **variables: str) -> cli.Result:
    environment = {**stored.made.environment, **variables}
    return cli.run("prune", "--target", str(stored.made), *more, env=environment)


def sweep(stored: StoredRepository, *more: cli.Argument) -> cli.Result:
    arguments = ("sweep", "--target", str(stored.made), *more)
    return cli.run(*arguments, env=stored.made.environment)


def assert_left(stored: StoredRepository, numbers: Sequence[int]) -> None:
    """restic has just these snapshots of the VM, whole, and nothing that nobody needs."""
    expected = {stored.points[number].id for number in numbers}
    ours = [each for each in stored.made.snapshots() if "vm=vm" in each["tags"]]
    assert {
        tag[6:] for each in ours for tag in each["tags"] if tag.startswith("point=")
    } == expected
    for number in numbers:
        point = stored.points[number].id
        assert stored.made.restored(point) == {DISK: stored.expected[point, DISK]}
    stored.made.assert_whole(read_data=True)


def test_the_policy_decides_and_restic_sweeps(stored: StoredRepository) -> None:
    before = sum(each.stat().st_size for each in stored.files("data"))
    result = prune(stored, "--keep-last", 2, "--json").check()
    summary = result.objects[-1]
    assert summary["freed"] == before - sum(each.stat().st_size for each in stored.files("data"))
    assert summary["freed"] > 100000
    assert_left(stored, [2, 3])


def test_forgetting_and_sweeping_are_two_things(stored: StoredRepository) -> None:
    packs = stored.files("data")
    summary = prune(stored, "--keep-last", 2, "--no-sweep", "--json").check().objects[-1]
    assert (summary["removed"], summary["freed"]) == (2, 0)
    assert stored.files("data") == packs
    verify = ("verify", "--target", str(stored.made), "--read-data")
    cli.run(*verify, env=stored.made.environment).check()
    with held_alone(stored.made):
        assert "locked" in sweep(stored).check(11).err
    before = sum(each.stat().st_size for each in packs)
    (done,) = sweep(stored, "--json").check().objects
    assert done["freed"] == before - sum(each.stat().st_size for each in stored.files("data"))
    assert done["freed"] > 100000
    assert_left(stored, [2, 3])
    assert sweep(stored, "--json").check().objects[0]["freed"] == 0


def test_tags_that_restic_sets(stored: StoredRepository) -> None:
    restic = stored.made.restic
    restic("tag", "--add", "mine", stored.made.snapshot_of(stored.points[1].id)["id"])
    prune(stored, "--keep-tag", "mine").check()
    assert_left(stored, [1, 3])


def test_other_vms_and_other_programs_keep_theirs(stored: StoredRepository, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    stored.made.restic("backup", "--tag", "other", tmp_path / "file")
    mine, stored.vm = stored.vm, VmIdentity(name="another")
    other = stored.add({DISK: pattern(MIB, 99)})
    stored.vm = mine
    prune(stored, "--keep-last", 1).check(2)
    prune(stored, "--keep-last", 1, "--vm", "none").check(10)
    prune(stored, "--keep-last", 1, "--vm", "vm").check()
    assert len(stored.made.snapshots()) == 3
    assert stored.made.restored(other.id) == {DISK: stored.expected[other.id, DISK]}
    assert_left(stored, [3])


def test_the_password_is_in_no_command_line(stored: StoredRepository, tmp_path: Path) -> None:
    """Nor is the location, in which restic allows a password, too."""
    folder, log = spy(tmp_path)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    prune(stored, "--keep-last", 1, PATH=path, SPY=str(log)).check()
    said = log.read_text()
    assert "forget" in said
    assert stored.made.password not in said
    assert stored.made.location not in said
    assert_left(stored, [3])


def spy(tmp_path: Path) -> tuple[Path, Path]:
    """A `restic` that writes down its command line, then is the real one."""
    folder, real = tmp_path / "bin", shutil.which("restic")
    folder.mkdir()
    (folder / "restic").write_text(f'#!/bin/sh\necho "$@" >>"$SPY"\nexec {real} "$@"\n')
    (folder / "restic").chmod(0o755)
    return folder, tmp_path / "log"


def test_a_password_file_and_a_location_from_the_environment(
    stored: StoredRepository, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(stored.made.password + "\n")
    environment = {
        **stored.made.environment,
        "RESTIC_PASSWORD": "",
        "RESTIC_PASSWORD_FILE": str(tmp_path / "password"),
        "RESTIC_REPOSITORY": stored.made.location,
    }
    cli.run("prune", "--target", "restic:", "--keep-last", 1, env=environment).check()
    assert_left(stored, [3])


def test_without_restic_it_is_said_what_to_install(stored: StoredRepository) -> None:
    result = prune(stored, "--keep-last", 1, PATH="/nowhere").check(1)
    assert "apt install restic" in result.err
    assert_left(stored, range(4))


def test_wrong_password_and_no_repository(stored: StoredRepository, tmp_path: Path) -> None:
    environment = stored.made.environment
    wrong = prune(stored, "--keep-last", 1, RESTIC_PASSWORD="wrong")  # noqa: S106
    wrong.check(12)
    target = f"restic:{tmp_path / 'none'}"
    cli.run("prune", "--target", target, "--keep-last", 1, env=environment).check(10)
    assert_left(stored, range(4))


@pytest.mark.parametrize("option", [["--keep-last", 1, "--no-merge"], ["--keep-tag", "none"]])
def test_what_is_refused(stored: StoredRepository, option: list[cli.Argument]) -> None:
    prune(stored, *option).check(2)
    assert len(stored.files("snapshots")) == 4


def test_a_repository_in_use_is_left_or_waited_for(stored: StoredRepository) -> None:
    with held_alone(stored.made):
        prune(stored, "--keep-last", 1).check(11)
    with Backing(stored.made.restic) as backup:  # whom our own lock leaves alone
        wait_until(lambda: bool(stored.files("locks")))
        result = prune(stored, "--keep-last", 2).check(11)
        assert "lock" in result.err
        assert len(stored.files("snapshots")) == 4
        arguments = ("prune", "--target", str(stored.made), "--keep-last", 2, "--lock-wait", 60)
        with cli.start(*arguments, env=stored.made.environment) as running:
            backup.__exit__()
            running.wait().check()
    assert_left(stored, [2, 3])


def test_a_signal_lets_restic_end_in_order(stored: StoredRepository, tmp_path: Path) -> None:
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    script = f"trap 'echo ended >>{log}; exit 130' INT\necho begun >>{log}\n"
    (folder / "restic").write_text(f"#!/bin/sh\n{script}while :; do sleep 0.1; done\n")
    (folder / "restic").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    arguments = ("prune", "--target", str(stored.made), "--keep-last", 1)
    with cli.start(*arguments, env={**stored.made.environment, "PATH": path}) as running:
        wait_until(lambda: log.exists() and "begun" in log.read_text())
        running.process.send_signal(signal.SIGTERM)
        running.wait().check(143)
    assert log.read_text().split() == ["begun", "ended"]
