# SPDX-License-Identifier: Apache-2.0
"""A VM goes on with incrementals when its points were merged or pruned meanwhile."""

import signal
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up
from lab.disks import MIB, Disk, create
from lab.file_steps import held
from lab.qemu import StartQemu
from qmpbackup.plan.chain import chain
from qmpbackup.targets.folder.disk_folder import DiskFolder
from qmpbackup.targets.folder.merging import merge_part
from qmpbackup.targets.folder.target import DirectoryTarget


def test_a_vm_goes_on_with_incrementals_after_a_merge(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "vda.qcow2", 16 * MIB)
    vm = start_qemu([Disk("vda", image)])
    target = tmp_path / "target"
    for value in (1, 2, 3):
        vm.write("vda", value * MIB, MIB, value)
        back_up(vm, target)
    cli.run("rebase", "--dir", target / "vda", program="qmprebase").check()
    vm.write("vda", 5 * MIB, MIB, 5)
    expected = {"vda": vm.contents("vda")}
    point = back_up(vm, target, "inc")
    assert_restores(target, point["id"], expected, tmp_path)
    cli.run("snapshotrebase", "--dir", target / "vda", program="qmprestore").check()
    vm.write("vda", 6 * MIB, MIB, 6)
    assert_restores(target, point["id"], expected, tmp_path)
    newest = back_up(vm, target, "inc")
    assert_restores(target, newest["id"], {"vda": vm.contents("vda")}, tmp_path)
    assert_restores(target, point["id"], expected, tmp_path)


def test_a_backup_finishes_a_merge_that_was_interrupted(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "vda.qcow2", 16 * MIB)
    vm = start_qemu([Disk("vda", image)])
    target = tmp_path / "target"
    for value in (1, 2):
        vm.write("vda", value * MIB, MIB, value)
        point = back_up(vm, target)

    in_the_way = target / "points" / f"{point['id']}.json.tmp"
    set_aside = r"rename FULL-\d+ FULL-\d+\.old"
    with held(set_aside, "commit", "--dir", target / "vda", program="qmprestore") as running:
        in_the_way.mkdir()
        running.signal(signal.SIGCONT)
        assert "begun" in running.wait().check(7).err
    in_the_way.rmdir()
    vm.write("vda", 3 * MIB, MIB, 3)
    point = back_up(vm, target, "inc")
    assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
    cli.run("verify", "--target", target).check()


@pytest.mark.parametrize("compress", [False, True])
def test_incrementals_go_on_after_pruning_a_folder(
    tmp_path: Path, start_qemu: StartQemu, compress: bool
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "vda.qcow2", 16 * MIB))])
    target = tmp_path / "target"
    more = ("--compress",) if compress else ()
    expected = {}
    for value in range(1, 6):
        vm.write("vda", value * MIB, MIB, value)
        vm.write("vda", 12 * MIB, 512, value)
        expected[back_up(vm, target, "auto", *more)["id"]] = vm.contents("vda")
    ids = list(expected)
    merge_one(target, ids[2])
    cli.run("prune", "--target", target, "--keep-last", 3).check()
    vm.write("vda", 5 * MIB, MIB, 7)
    newest = back_up(vm, target, "inc", *more)
    expected[newest["id"]] = vm.contents("vda")
    points = cli.run("list", "--target", target, "--json").check().objects
    assert [point["id"] for point in points] == [ids[1], ids[3], ids[4], newest["id"]]
    for point in points:
        assert_restores(target, point["id"], {"vda": expected[point["id"]]}, tmp_path)
    cli.run("verify", "--target", target).check()
    size = sum(each.stat().st_size for each in (target / "vda").iterdir())
    assert size < 3 * MIB if compress else size > 3 * MIB


def merge_one(target: Path, point_id: str) -> None:
    """Prune just this point out of the middle of a chain."""
    opened = DirectoryTarget.open(target)
    points = opened.load().points
    number = [point.id for point in points].index(point_id)
    links = chain(points, points[number + 1], "vda")[number : number + 2]
    with opened.lock(remove=True):
        merge_part(DiskFolder(target / "vda", opened), points, links)
