# SPDX-License-Identifier: Apache-2.0
"""Backups of VMs that libvirt manages, over a second monitor that it leaves alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, leftovers, levels, try_backup
from lab.disks import MIB
from lab.libvirt import Managed
from lab.repositories import Repository, Target, repository

from .conftest import VDA, VDB, live, managed, started

StartManaged = Callable[..., Managed]
NO_INCREMENTAL = 4


@pytest.fixture(params=["folder", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """Either kind of target."""
    return tmp_path / "target" if request.param == "folder" else repository(tmp_path)


def assert_incremental(vm: Managed, target: Target, folder: Path) -> None:
    """The next run is an incremental, and right."""
    point = back_up(vm, target, "inc")
    assert set(levels(point).values()) == {"inc"}
    assert_restores(target, point["id"], live(vm), folder)


def test_fulls_incrementals_and_restarts(
    start_managed: StartManaged, target: Target, tmp_path: Path
) -> None:
    vm = start_managed("plain")
    assert_restores(target, back_up(vm, target, "full")["id"], live(vm), tmp_path)
    vm.write(VDA, 2 * MIB, MIB, 1)
    vm.write(VDB, 0, 4096, 2)
    assert_incremental(vm, target, tmp_path)
    vm.write(VDA, 5 * MIB, MIB, 3)
    vm.end()
    vm.start()
    vm.write(VDB, 7 * MIB, MIB, 4)
    assert_incremental(vm, target, tmp_path)
    vm.write(VDA, 9 * MIB, MIB, 5)
    vm.leave()
    vm.virsh("managedsave")
    assert vm.virsh("domstate") == "shut off"
    vm.start()
    assert vm.virsh("domstate") == "running"
    vm.write(VDB, 11 * MIB, MIB, 6)
    assert_incremental(vm, target, tmp_path)
    assert_clean(vm, target)


def test_a_snapshot_makes_a_full(
    start_managed: StartManaged, target: Target, tmp_path: Path
) -> None:
    """libvirt makes our change bitmaps anew on the overlay, empty: they must not be believed."""
    vm = start_managed("snapped")
    first = back_up(vm, target)
    vm.write(VDA, 2 * MIB, MIB, 1)
    vm.virsh("snapshot-create-as", "one", "--disk-only", "--no-metadata")
    copied = {each["name"]: each for each in vm.active_bitmaps(VDA)}[first["disks"][0]["bitmap"]]
    assert copied["recording"]
    assert copied["count"] == 0, "the trap is gone: see what libvirt does now"
    vm.write(VDB, 3 * MIB, MIB, 2)
    try_backup(vm, target, "inc").check(NO_INCREMENTAL)
    point = back_up(vm, target)
    assert levels(point) == {VDA: "full", VDB: "full"}
    assert_restores(target, point["id"], live(vm), tmp_path)
    vm.write(VDB, 5 * MIB, MIB, 3)
    assert_incremental(vm, target, tmp_path)
    assert leftovers(vm) == []  # bitmaps stay in the image below, which nobody writes to


def test_a_snapshot_and_its_commit_between_two_points(
    start_managed: StartManaged, tmp_path: Path
) -> None:
    vm, target = start_managed("committed"), tmp_path / "target"
    back_up(vm, target)
    vm.write(VDA, 2 * MIB, MIB, 1)
    vm.virsh("snapshot-create-as", "one", "--disk-only", "--no-metadata")
    vm.write(VDA, 6 * MIB, MIB, 2)
    vm.write(VDB, 3 * MIB, MIB, 3)
    for disk in ("vda", "vdb"):
        vm.virsh("blockcommit", disk, "--active", "--pivot", "--wait")
    vm.write(VDB, 9 * MIB, MIB, 4)
    assert_incremental(vm, target, tmp_path)
    assert_clean(vm, target)


def test_a_migration_takes_the_bitmaps_along(tmp_path: Path) -> None:
    """Two daemons, each on a host of its own name, over shared storage."""
    if os.geteuid() != 0:
        pytest.skip("only root gives a daemon another host's name")
    target: Repository = repository(tmp_path)
    with started("here") as here, started("there") as there, managed(here, "moved") as vm:
        back_up(vm, target)
        vm.write(VDA, 4 * MIB, MIB, 1)
        arrived = vm.migrate(there)
        arrived.write(VDB, 8 * MIB, MIB, 2)
        assert arrived.virsh("domstate") == "running"
        assert_incremental(arrived, target, tmp_path)
        assert_clean(arrived, target)
        arrived.leave()


def test_libvirt_finds_the_vm_as_it_was(start_managed: StartManaged, tmp_path: Path) -> None:
    vm = start_managed("asked")
    questions = (("domblklist", "--details"), ("domblkinfo", "vda"), ("domblkstat", "vda"))
    before = [vm.virsh(*question) for question in questions]
    back_up(vm, tmp_path / "target")
    assert [vm.virsh(*question) for question in questions] == before
    assert vm.virsh("domstate") == "running"
    vm.virsh("snapshot-create-as", "one", "--disk-only", "--no-metadata")
    vm.virsh("blockcommit", "vda", "--active", "--pivot", "--wait")
    vm.virsh("blockresize", "vda", "17M")
    vm.leave()
    vm.virsh("managedsave")
