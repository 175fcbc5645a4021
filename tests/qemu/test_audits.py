# SPDX-License-Identifier: Apache-2.0
"""Audits find what was written to an image past QEMU, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, levels, try_backup
from lab.disks import MIB, Disk, filled
from lab.load import Writer, instants
from lab.qemu import StartQemu
from lab.repositories import Repository
from stock.repositories import repository

SIZE = 16 * MIB
NO_INCREMENTAL, UNRECORDED = 4, 9


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Repository]:
    """A repository, which is without fault at the end of every test."""
    made = repository(tmp_path / "target")
    yield made
    made.assert_whole(read_data=True)


def test_an_audit_finds_what_was_written_past_qemu(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    raw, other = filled(tmp_path, "vda", 1, "raw"), filled(tmp_path, "vdb", 2)
    vm = start_qemu([raw, other])
    back_up(vm, target)
    write_past_qemu(raw, 5 * MIB + 512)
    vm.write("vdb", 5 * MIB, MIB, 3)
    refused = try_backup(vm, target, "inc", "--audit", "100%").check(UNRECORDED)
    assert "recorded: vda." in refused.err
    assert len(target.snapshots()) == 1
    again = try_backup(vm, target, "inc", "--audit", "100%").check(NO_INCREMENTAL)
    assert "vda" in again.err
    point = back_up(vm, target)
    assert levels(point) == {"vda": "full", "vdb": "inc"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert_clean(vm, target)


def test_an_audit_that_finds_something_makes_auto_read_the_disk_whole(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    raw, other = filled(tmp_path, "vda", 1, "raw"), filled(tmp_path, "vdb", 2)
    vm = start_qemu([raw, other])
    back_up(vm, target)
    write_past_qemu(raw, 5 * MIB + 512)
    result = try_backup(vm, target, "auto", "--audit", "100%", "--json").check(UNRECORDED)
    outcome = json.loads(result.out)
    assert "vda" in outcome["alarm"]
    point = outcome["point"]
    assert levels(point) == {"vda": "full", "vdb": "inc"}
    (why,) = (each["reason"] for each in point["disks"] if each["id"] == "vda")
    assert "audit" in why
    assert "superfluous" not in result.err
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert_clean(vm, target)
    vm.write("vda", MIB, MIB, 4)
    point = back_up(vm, target, "inc", "--audit", "100%")
    assert_restores(target, point["id"], vm.live(), tmp_path)


def test_an_audit_of_a_disk_that_the_guest_writes_to_is_no_alarm(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([filled(tmp_path, "vda", 1, "raw"), filled(tmp_path, "vdb", 2)])
    before = vm.live()
    back_up(vm, target)
    with Writer(vm, {"vda": SIZE, "vdb": SIZE}) as load:
        load.wait_for(20)
        points = [back_up(vm, target, "inc", "--audit", "100%") for _ in range(3)]
        load.wait_for(20)
    assert all(instants(before, load.log, target.restored(p["id"])) for p in points)


def write_past_qemu(disk: Disk, offset: int) -> None:
    """Write to a raw image as `dd` would."""
    with disk.image.open("r+b") as image:
        image.seek(offset)
        image.write(b"past QEMU")
