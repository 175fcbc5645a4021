# SPDX-License-Identifier: Apache-2.0
"""Backups of VMs that libvirt manages, over a second monitor that it leaves alone."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, leftovers, levels, try_backup
from lab.disks import MIB, first_difference
from lab.libvirt import Managed
from lab.patience import wait_until
from lab.repositories import Repository, Target
from stock.repositories import repository

from .conftest import SDB, VDA, VDB, managed, started

ROOT = "ua-root"
StartManaged = Callable[..., Managed]
USAGE, DEGRADED, NO_INCREMENTAL, QUIESCE, VM_ERROR = 2, 3, 4, 5, 6


@pytest.fixture(params=["folder", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """Either kind of target."""
    return tmp_path / "target" if request.param == "folder" else repository(tmp_path)


def assert_incremental(vm: Managed, target: Target, folder: Path) -> None:
    """The next run is an incremental, and right."""
    point = back_up(vm, target, "inc")
    assert set(levels(point).values()) == {"inc"}
    assert_restores(target, point["id"], vm.live(), folder)


def test_fulls_incrementals_and_restarts(
    start_managed: StartManaged, target: Target, tmp_path: Path
) -> None:
    vm = start_managed("plain")
    assert_restores(target, back_up(vm, target, "full")["id"], vm.live(), tmp_path)
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


def test_qemu_is_killed(start_managed: StartManaged, tmp_path: Path) -> None:
    vm, target = start_managed("killed"), tmp_path / "target"
    back_up(vm, target)
    vm.leave()
    os.kill(vm.pid, signal.SIGKILL)
    wait_until(lambda: vm.virsh("domstate") == "shut off")
    vm.start()
    assert "QEMU was killed" in try_backup(vm, target, "inc").check(NO_INCREMENTAL).err
    point = back_up(vm, target)
    assert levels(point) == {VDA: "full", VDB: "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)


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
    assert "snapshot" in try_backup(vm, target, "inc").check(NO_INCREMENTAL).err
    point = back_up(vm, target)
    assert levels(point) == {VDA: "full", VDB: "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    vm.write(VDB, 5 * MIB, MIB, 3)
    assert_incremental(vm, target, tmp_path)
    assert leftovers(vm) == []  # bitmaps stay in the image below, which nobody writes to
    for disk in ("vda", "vdb"):
        vm.virsh("blockcommit", disk, "--active", "--pivot", "--wait")
    vm.write(VDA, 7 * MIB, MIB, 4)
    point = back_up(vm, target)
    assert levels(point) == {VDA: "full", VDB: "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert_clean(vm, target)


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
    assert vm.virsh("domstate", "--reason") == "running (unpaused)"
    vm.virsh("snapshot-create-as", "one", "--disk-only", "--no-metadata")
    vm.virsh("blockcommit", "vda", "--active", "--pivot", "--wait")
    vm.virsh("blockresize", "vda", "17M")
    vm.leave()
    vm.virsh("managedsave")


def test_disks_are_known_by_the_names_that_libvirt_gives_them(
    start_managed: StartManaged, tmp_path: Path
) -> None:
    vm, target = start_managed("named", bus="scsi", ids=(ROOT, SDB)), tmp_path / "target"
    assert "libvirt's sdb, qcow2" in cli.run("--socket", vm.socket, "doctor").check().out
    info = cli.run("--socket", vm.socket, "info", "--show", "blockdev").check().out
    assert '"label": "sda"' in info
    back_up(vm, target, "auto", "--include", "sdb")
    point = back_up(vm, target)
    assert {each["id"]: each["label"] for each in point["disks"]} == {ROOT: "sda", SDB: "sdb"}
    assert f"{ROOT} (sda),{SDB} (sdb)" in cli.run("list", "--target", target).check().out
    assert f"disk {SDB} (sdb)" in cli.run("show", "--target", target).check().out
    output = tmp_path / "restored"
    restore = ("restore", "--target", target, "--disk", "sdb", "--format", "raw")
    cli.run(*restore, "--output-file", output).check()
    assert not first_difference(output.read_bytes(), vm.contents(SDB))
    assert (
        f"{ROOT} (sda), {SDB} (sdb)"
        in cli.run("restore", "--target", target, "--disk", "sdc", "--output-file", output)
        .check(USAGE)
        .err
    )


def test_libvirts_own_monitor(start_managed: StartManaged) -> None:
    vm = start_managed("own")
    (monitor,) = vm.host.folder.glob("config/libvirt/qemu/lib/*-own/monitor.sock")
    refused = cli.run("--socket", monitor, "doctor").check(VM_ERROR)
    assert "libvirt keeps it" in refused.err
    assert "<qemu:commandline>" in refused.err


def test_libvirt_holds_the_guest_agent(start_managed: StartManaged, tmp_path: Path) -> None:
    vm = start_managed("agent")
    (agent,) = vm.host.folder.rglob("*-agent/org.qemu.guest_agent.0")
    run = ("--socket", vm.socket, "--agent-socket", agent, "backup", "--level", "auto")
    refused = cli.run(*run, "--target", tmp_path / "target", "--quiesce").check(QUIESCE)
    assert "libvirt" in refused.err
    cli.run(*run, "--target", tmp_path / "target", "--quiesce=try").check(DEGRADED)
