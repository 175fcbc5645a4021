# SPDX-License-Identifier: Apache-2.0
"""Others who act on the VM while a run is under way: an administrator, a migration, other tools."""

import json
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import assert_restores, back_up, is_copying, leftovers, try_backup
from lab.disks import CLUSTER, MIB, Disk, contents, create, first_difference, pattern
from lab.proxy import Place, Proxy
from lab.qemu import Qemu, StartQemu
from lab.qmp import QmpError
from lab.repositories import environment_of
from stock.repositories import repository

VM = 6
SIZE = 16 * MIB


def one_disk(start_qemu: StartQemu, folder: Path) -> Qemu:
    """A VM with one disk."""
    image = create(folder / "vda.qcow2", SIZE, contents=pattern(SIZE, 3))
    return start_qemu([Disk("vda", image)])


def back_up_while(
    vm: Qemu, target: Path, before: str, act: Callable[[], object], level: str = "auto"
) -> cli.Result:
    """Run a backup; something happens before it first sends a certain command."""
    done: list[object] = []

    def hook(_proxy: Proxy, at: Place) -> None:
        if at.command == before and at.when == "before" and not done:
            done.append(act())

    arguments = ("backup", "--level", level, "--target", target)
    with Proxy(vm.folder / "proxy", vm.socket, hook) as proxy:
        # One socket name for all runs, because a target belongs to one VM.
        result = cli.run("--socket", proxy.path, *arguments)
    assert done, f"the run sent no {before}:\n{result}"
    return result


def migrate(vm: Qemu) -> None:
    """Migrate the VM away."""
    vm.qmp("migrate", uri="exec:cat >/dev/null")
    vm.qmp.poll(lambda: vm.qmp("query-migrate").get("status") == "completed")


def assert_cannot_be_migrated(vm: Qemu) -> None:
    """QEMU does not let go of the images, and the VM runs on."""
    vm.qmp("migrate", uri="exec:cat >/dev/null")
    vm.qmp.poll(lambda: vm.qmp("query-migrate").get("status") in {"completed", "failed"})
    assert vm.qmp("query-migrate")["status"] == "failed"
    vm.qmp.poll(lambda: vm.qmp("query-status")["running"])


@pytest.mark.parametrize("before", ["blockdev-create", "object-add"])
def test_a_vm_paused_meanwhile_stays_paused(
    before: str, tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = one_disk(start_qemu, tmp_path)
    target = tmp_path / "target"
    result = back_up_while(vm, target, before, lambda: vm.qmp("stop")).check(VM)
    assert "Somebody else stopped the VM" in result.err
    assert vm.qmp("query-status")["status"] == "paused"
    assert leftovers(vm) == []
    assert manifests(target) == []


@pytest.mark.parametrize("before", ["blockdev-create", "qom-set"])
def test_a_vm_continued_meanwhile_makes_no_point(
    before: str, tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = one_disk(start_qemu, tmp_path)
    vm.qmp("stop")
    target = tmp_path / "target"
    result = back_up_while(vm, target, before, lambda: vm.qmp("cont")).check(VM)
    assert "Somebody else let the VM run" in result.err
    assert vm.qmp("query-status")["running"]
    assert leftovers(vm) == []
    assert manifests(target) == []


def test_a_vm_continued_in_our_pause_makes_no_point(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = one_disk(start_qemu, tmp_path)
    target = tmp_path / "target"
    result = back_up_while(vm, target, "qom-set", lambda: vm.qmp("cont")).check(VM)
    assert "Somebody else let the VM run" in result.err
    assert vm.qmp("query-status")["running"]
    assert manifests(target) == []


@pytest.mark.parametrize("before", ["blockdev-create", "object-add", "blockdev-backup"])
def test_a_vm_that_is_migrated_away_never_runs_here_again(
    before: str, tmp_path: Path, start_qemu: StartQemu
) -> None:
    """It would write to the disks beside the destination."""
    vm = one_disk(start_qemu, tmp_path)
    target = tmp_path / "target"
    result = back_up_while(vm, target, before, lambda: migrate(vm)).check(VM)
    assert "migrated away" in result.err
    assert vm.qmp("query-status")["status"] == "postmigrate"
    assert leftovers(vm) == []
    assert manifests(target) == []


def test_a_migration_during_the_copy_is_refused(tmp_path: Path, start_qemu: StartQemu) -> None:
    """What the destination would write is not kept from the rest of the copy. QEMU comes to no view
    that a job reads when it lets go of its images, whether the job copies or is done."""
    small = create(tmp_path / "vdb.qcow2", CLUSTER)
    disk = Disk("vda", create(tmp_path / "vda.qcow2", SIZE, contents=pattern(SIZE, 3)))
    vm, target = start_qemu([disk, Disk("vdb", small)]), tmp_path / "target"
    expected = vm.contents("vda")
    arguments = (
        "backup",
        "--level",
        "full",
        "--target",
        target,
        "--speed-limit",
        "10000",
        "--json",
    )
    with cli.start("--socket", vm.socket, *arguments) as running:
        vm.qmp.poll(running.unless_over(lambda: is_copying(vm)))
        assert_cannot_be_migrated(vm)
        for job in vm.qmp("query-block-jobs"):
            with suppress(QmpError):  # one that is done
                vm.qmp("block-job-set-speed", device=job["device"], speed=0)
        point = json.loads(running.wait().check().out)["point"]["id"]
    assert_restores(target, point, {"vda": expected, "vdb": bytes(CLUSTER)}, tmp_path)
    assert leftovers(vm) == []
    migrate(vm)


def test_a_migration_while_we_read_is_refused(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm, target = one_disk(start_qemu, tmp_path), repository(tmp_path)
    arguments = ("backup", "--level", "full", "--target", str(target), "--speed-limit", "10000")
    with cli.start("--socket", vm.socket, *arguments, env=environment_of(target)) as running:
        vm.qmp.poll(running.unless_over(lambda: bool(vm.qmp("query-block-exports"))))
        assert_cannot_be_migrated(vm)
        running.signal(signal.SIGTERM)
        running.wait().check(143)
    assert leftovers(vm) == []
    migrate(vm)


def test_a_vm_that_was_migrated_away_is_not_backed_up_here(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = one_disk(start_qemu, tmp_path)
    migrate(vm)
    refused = try_backup(vm, tmp_path / "target").check(VM)
    assert "migrated away" in refused.err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_mirror_of_another_program_stays_whole(
    mode: str, tmp_path: Path, start_qemu: StartQemu
) -> None:
    """A mirror sees the guest's writes through a filter that a moved device would go past."""
    vm = one_disk(start_qemu, tmp_path)
    copy = start_mirror(vm, tmp_path, mode)
    vm.qmp.poll(lambda: vm.qmp("query-block-jobs")[0]["ready"])
    refused = try_backup(vm, tmp_path / "target").check(VM)
    assert "job of another program" in refused.err
    assert leftovers(vm) == []
    assert_mirror_whole(vm, copy)
    point = back_up(vm, tmp_path / "target")
    assert_restores(tmp_path / "target", point["id"], {"vda": contents(copy)}, tmp_path)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_mirror_that_begins_during_a_run_stays_whole(
    mode: str, tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = one_disk(start_qemu, tmp_path)
    copies = []

    def mirror() -> None:
        copies.append(start_mirror(vm, tmp_path, mode))
        vm.qmp.poll(lambda: vm.qmp("query-block-jobs")[0]["ready"])

    back_up_while(vm, tmp_path / "target", "blockdev-backup", mirror)
    assert leftovers(vm) == []
    assert_mirror_whole(vm, copies[0])


def start_mirror(vm: Qemu, folder: Path, mode: str) -> Path:
    """Begin to mirror the disk; the image that becomes its copy."""
    copy = create(folder / "copy.qcow2", SIZE)
    file = {"driver": "file", "filename": str(copy)}
    vm.qmp("blockdev-add", **{"driver": "qcow2", "node-name": "copy", "file": file})
    job = {"job-id": "theirs", "device": "node-vda", "target": "copy", "sync": "full"}
    vm.qmp("blockdev-mirror", **job, **{"copy-mode": mode})
    return copy


def assert_mirror_whole(vm: Qemu, copy: Path) -> None:
    """The guest writes, the VM moves to the copy, and the copy has what was written."""
    vm.write("vda", 8 * MIB, MIB, 9)
    vm.qmp("block-job-complete", device="theirs")
    vm.qmp.poll(lambda: not vm.qmp("query-block-jobs"))
    vm.flush("vda")
    expected = bytearray(pattern(SIZE, 3))
    expected[8 * MIB : 9 * MIB] = bytes([9]) * MIB
    assert not first_difference(contents(copy), bytes(expected))
