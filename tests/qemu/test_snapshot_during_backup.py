# SPDX-License-Identifier: Apache-2.0
"""An external snapshot taken while a backup runs: the VM stays whole, and can be started again."""

from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, leftovers, levels
from lab.disks import MIB, Disk, create, pattern, qemu_img
from lab.patience import wait_until
from lab.qemu import Qemu, StartQemu

SIZE = 32 * MIB


def slow_backup(vm: Qemu, target: Path) -> cli.Running:
    """A full that takes seconds."""
    arguments = ("backup", "--level", "full", "--target", target, "--speed-limit", "4M")
    return cli.start("--socket", vm.socket, *arguments)


def take_snapshot(vm: Qemu, overlay: Path) -> None:
    """Wait until our filter is in place, then take a snapshot on top of it."""
    wait_until(lambda: _active(vm).startswith("qmpbackup-"), "a filter")
    vm.qmp(
        "blockdev-snapshot-sync",
        **{"node-name": _active(vm), "snapshot-file": str(overlay), "snapshot-node-name": "over"},
    )


def _active(vm: Qemu) -> str:
    (device,) = vm.qmp("query-block")
    return str(device["inserted"]["node-name"])


@pytest.mark.parametrize("killed", [False, True], ids=["to its end", "tool killed"])
def test_a_snapshot_during_a_backup_leaves_the_vm_whole(
    killed: bool, tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 1))
    vm = start_qemu([Disk("vda", image)])
    target, overlay = tmp_path / "target", tmp_path / "over.qcow2"
    with slow_backup(vm, target) as running:
        take_snapshot(vm, overlay)
        if killed:
            running.process.kill()
        result = running.wait()
    assert killed or result.code == 6, str(result)
    vm.write("vda", 3 * MIB, MIB, 9)
    point = back_up(vm, target)
    assert levels(point) == {"vda": "full"}
    assert leftovers(vm) == []
    assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
    vm.quit()
    assert "backing file format: qcow2" in qemu_img("info", str(overlay))
