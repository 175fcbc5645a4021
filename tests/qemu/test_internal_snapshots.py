# SPDX-License-Identifier: Apache-2.0
"""QEMU loads no internal snapshot while change bitmaps are in the VM: doctor says it, and one command is
the way out, also after an attempt that has left the VM stopped."""

from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, bitmaps, levels, try_backup
from lab.disks import MIB, Disk, create
from lab.qemu import StartQemu

SIZE = 10 * MIB


@pytest.mark.parametrize("attempted", [True, False])
def test_going_back_to_an_internal_snapshot(
    tmp_path: Path, start_qemu: StartQemu, attempted: bool
) -> None:
    vm = start_qemu([Disk(each, create(tmp_path / each, SIZE)) for each in ("vda", "vdb")])
    target = tmp_path / "target"
    vm.write("vda", 0, MIB, 1)
    assert not vm.hmp("savevm before")
    before = vm.contents("vda")
    vm.write("vda", MIB, MIB, 2)
    back_up(vm, target)
    advice = cli.run("--socket", vm.socket, "doctor").check().out
    assert "internal snapshots (before)" in advice
    assert "cleanup --remove-bitmaps" in advice
    if attempted:
        assert "dirty bitmaps" in vm.hmp("loadvm before")
        assert vm.qmp("query-status")["status"] == "restore-vm"
        assert "cleanup --remove-bitmaps" in try_backup(vm, target, "inc").check(6).err
    removed = cli.run("--socket", vm.socket, "cleanup", "--remove-bitmaps").check()
    assert "Removing bitmap" in removed.out
    assert not bitmaps(vm)
    assert not vm.hmp("loadvm before")
    vm.qmp("cont")
    assert vm.qmp("query-status")["status"] == "running"
    vm.write("vda", 2 * MIB, MIB, 3)
    assert vm.contents("vda")[: 2 * MIB] == before[: 2 * MIB]
    assert "change bitmap is gone" in try_backup(vm, target, "inc").check(4).err
    point = back_up(vm, target)
    assert set(levels(point).values()) == {"full"}
    live = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    assert_restores(target, point["id"], live, tmp_path)


def test_a_vm_goes_on_as_it_was_after_a_refusal(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "vda", SIZE))])
    target = tmp_path / "target"
    assert not vm.hmp("savevm before")
    back_up(vm, target)
    vm.write("vda", 0, MIB, 2)
    assert "dirty bitmaps" in vm.hmp("loadvm before")
    vm.qmp("cont")
    point = back_up(vm, target, "inc")
    assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
