# SPDX-License-Identifier: Apache-2.0
"""What people do to a VM by libvirt while a run is under way: it works, or libvirt says no, and the
run ends as it should."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, is_copying, leftovers, levels, try_backup
from lab.disks import CLUSTER, MIB
from lab.libvirt import Libvirt, Managed
from lab.qmp import QmpError

from .conftest import SDA, VDA, VDB, managed, started

StartManaged = Callable[..., Managed]
NO_INCREMENTAL, VM_ERROR = 4, 6
CHANGED = range(0, 2 * MIB, 2 * CLUSTER)
"""What a run has to copy, in pieces: QEMU limits the speed between them, not within."""


@contextmanager
def copying(vm: Managed, target: Path) -> Iterator[cli.Running]:
    """A run that has begun to copy, and goes on until it is hurried."""
    for offset in CHANGED:
        vm.write(vm.disks[0].id, offset, CLUSTER, 3)
    arguments = ("backup", "--level", "inc", "--speed-limit", "10000", "--target", target)
    with cli.start("--socket", vm.socket, *arguments, "--json") as running:
        vm.qmp.poll(running.unless_over(lambda: is_copying(vm)))
        yield running


def finish(vm: Managed, running: cli.Running) -> cli.Result:
    """Let the run copy at full speed; how it ended."""
    for job in vm.qmp("query-block-jobs"):
        # One that has nothing to copy may be over meanwhile.
        with suppress(QmpError):
            vm.qmp("block-job-set-speed", device=job["device"], speed=0)
    return running.wait()


def assert_goes_on(vm: Managed, target: Path, folder: Path, disks: tuple[str, ...]) -> None:
    """The next run is an incremental of these disks, right, and leaves nothing."""
    vm.write(disks[0], 8 * MIB, MIB, 7)
    point = back_up(vm, target, "inc")
    assert levels(point) == dict.fromkeys(disks, "inc")
    expected = {disk: vm.contents(disk) for disk in disks}
    assert_restores(target, point["id"], expected, folder)
    assert_clean(vm, target)


def test_what_libvirt_is_refused(start_managed: StartManaged, tmp_path: Path) -> None:
    vm, target = start_managed("refused"), tmp_path / "target"
    vm.virsh("snapshot-create-as", "before", "--disk-only", "--no-metadata")
    back_up(vm, target)
    with copying(vm, target) as running:
        for command in (
            ("blockresize", "vda", "32M"),
            ("blockcommit", "vda", "--active", "--pivot", "--wait"),
            ("blockcopy", "vda", vm.host.images / "refused-copy", "--transient-job"),
            ("managedsave",),
            ("save", vm.host.images / "refused-saved"),
        ):
            assert vm.try_virsh(*map(str, command)).code, f"{command} was not refused"
            assert vm.virsh("domstate") == "running", command
        # That of libvirt 11 with QEMU 10 works, that of libvirt 9 with QEMU 7 does not.
        vm.try_virsh("snapshot-create-as", "internal")
        assert vm.virsh("domstate") == "running"
        finish(vm, running).check()
    assert_goes_on(vm, target, tmp_path, (VDA, VDB))


def test_what_does_not_matter(start_managed: StartManaged, tmp_path: Path) -> None:
    vm, target = start_managed("harmless"), tmp_path / "target"
    back_up(vm, target)
    with copying(vm, target) as running:
        vm.virsh("domblklist", "--details")
        vm.virsh("domblkinfo", "vda")
        vm.virsh("domblkstat", "vda")
        vm.virsh("suspend")
        vm.virsh("resume")
        vm.virsh("reset")
        finish(vm, running).check()
    assert_goes_on(vm, target, tmp_path, (VDA, VDB))


def test_a_disk_is_detached(start_managed: StartManaged, tmp_path: Path) -> None:
    vm, target = start_managed("detached", bus="scsi"), tmp_path / "target"
    back_up(vm, target)
    with copying(vm, target) as running:
        vm.virsh("detach-disk", "sdb", "--live")
        assert "sdb" not in vm.virsh("domblklist")
        finish(vm, running).check()
    assert_goes_on(vm, target, tmp_path, (SDA,))


def test_an_external_snapshot(start_managed: StartManaged, tmp_path: Path) -> None:
    """The point of the run is right; the bitmaps that libvirt copied to the overlay are not used."""
    vm, target = start_managed("during"), tmp_path / "target"
    back_up(vm, target)
    expected = vm.live()
    with copying(vm, target) as running:
        for offset in CHANGED:
            after = expected[VDA][offset + CLUSTER :]
            expected[VDA] = expected[VDA][:offset] + bytes([3]) * CLUSTER + after
        vm.write(VDB, 5 * MIB, MIB, 5)
        vm.virsh("snapshot-create-as", "one", "--disk-only", "--no-metadata")
        vm.write(VDB, 7 * MIB, MIB, 6)
        result = finish(vm, running).check()
    point = json.loads(result.out)["point"]["id"]
    assert_restores(target, point, expected, tmp_path)
    assert "snapshot" in try_backup(vm, target, "inc").check(NO_INCREMENTAL).err
    point = back_up(vm, target)
    assert levels(point) == {VDA: "full", VDB: "full"}
    assert_restores(target, point["id"], vm.live(), tmp_path)
    assert leftovers(vm) == []


@pytest.mark.parametrize("options", [(), ("--graceful",)], ids=["destroy", "graceful"])
def test_the_vm_is_ended(
    start_managed: StartManaged, tmp_path: Path, options: tuple[str, ...]
) -> None:
    vm, target = start_managed("ended"), tmp_path / "target"
    back_up(vm, target)
    with copying(vm, target) as running:
        vm.leave()
        vm.virsh("destroy", *options)
        running.wait().check(VM_ERROR)
    vm.start()
    assert_goes_on(vm, target, tmp_path, (VDA, VDB))


def test_libvirtd_is_killed(host: Libvirt, start_managed: StartManaged, tmp_path: Path) -> None:
    vm, target = start_managed("orphaned"), tmp_path / "target"
    back_up(vm, target)
    with copying(vm, target) as running:
        host.kill()
        finish(vm, running).check()
    vm.write(VDA, 6 * MIB, MIB, 4)
    back_up(vm, target, "inc")
    host.start()
    assert vm.virsh("domstate") == "running"
    assert_goes_on(vm, target, tmp_path, (VDA, VDB))


@pytest.mark.slow
def test_a_migration_is_refused(tmp_path: Path) -> None:
    """The destination gets no lock on images that views sit on; the VM runs on where it was."""
    if os.geteuid() != 0:
        pytest.skip("only root gives a daemon another host's name")
    target = tmp_path / "target"
    with started("here") as here, started("there") as there, managed(here, "stays") as vm:
        back_up(vm, target)
        with copying(vm, target) as running:
            assert vm.try_migrate(there).code
            assert vm.virsh("domstate") == "running"
            finish(vm, running).check()
        assert_goes_on(vm, target, tmp_path, (VDA, VDB))
        arrived = vm.migrate(there)
        assert_goes_on(arrived, target, tmp_path, (VDA, VDB))
        arrived.leave()
