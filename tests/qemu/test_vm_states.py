# SPDX-License-Identifier: Apache-2.0
"""VMs in every state that QEMU knows: backed up, or refused with a sentence that leads to the cause."""

import subprocess
from pathlib import Path

import pytest

from lab import cli
from lab.backups import leftovers, try_backup
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu, StartQemu

VM = 6


BACKED_UP = {
    *("running", "paused", "prelaunch", "shutdown", "suspended", "guest-panicked"),
    *("io-error", "internal-error", "watchdog", "debug"),
}
REFUSED = {"inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo"}


def one_disk(start_qemu: StartQemu, folder: Path, *args: str, paused: bool = False) -> Qemu:
    disk = Disk("vda", create(folder / "a", 16 * MIB))
    return start_qemu([disk], args=args, paused=paused)


def refusal(vm: Qemu, target: Path) -> str:
    """Why the VM is not backed up, which doctor says as well."""
    said = try_backup(vm, target).check(VM).err
    assert not target.exists()
    assert leftovers(vm) == []
    doctor = cli.run("--socket", vm.socket, "doctor").check(1)
    (problem,) = (line for line in doctor.out.splitlines() if line.startswith("problem  VM"))
    assert problem.partition(": ")[2] in said
    return said


def test_every_state_has_its_decision(start_qemu: StartQemu) -> None:
    from qmpbackup.plan.vm_states import OBSTACLES

    schema = start_qemu([]).qmp("query-qmp-schema")
    (states,) = (each["values"] for each in schema if "inmigrate" in each.get("values", ()))
    assert set(states) <= BACKED_UP | REFUSED
    assert set(OBSTACLES) == REFUSED


def test_a_vm_that_waits_for_a_migration(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = one_disk(start_qemu, tmp_path, "-incoming", "defer")
    assert "waits for a migration" in refusal(vm, tmp_path / "target")


def test_a_vm_whose_state_was_saved_to_a_file(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = one_disk(start_qemu, tmp_path)
    vm.qmp("stop")
    vm.qmp("migrate", uri=f"exec:cat > {tmp_path}/state")
    vm.qmp.poll(lambda: vm.qmp("query-status")["status"] == "postmigrate")
    said = refusal(vm, tmp_path / "target")
    assert "saved to a file" in said
    vm.qmp("cont")
    try_backup(vm, tmp_path / "target").check()


def test_a_snapshot_that_could_not_be_loaded(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = one_disk(start_qemu, tmp_path)
    vm.hmp("savevm before")
    try_backup(vm, tmp_path / "first").check()
    assert "active dirty bitmaps" in vm.hmp("loadvm before")
    assert "loading one has failed" in refusal(vm, tmp_path / "second")
    cli.run("--socket", vm.socket, "cleanup", "--remove-bitmaps").check()
    assert not vm.hmp("loadvm before").strip()
    vm.qmp("cont")
    try_backup(vm, tmp_path / "first").check()


@pytest.mark.parametrize("state", ["prelaunch", "paused", "guest-panicked"])
def test_a_vm_that_stands_still(state: str, tmp_path: Path, start_qemu: StartQemu) -> None:
    """It is backed up and goes on standing still."""
    panic = ("-device", "pvpanic", "-action", "panic=pause")
    vm = one_disk(start_qemu, tmp_path, *panic, paused=state == "prelaunch")
    if state == "paused":
        vm.qmp("stop")
    if state == "guest-panicked":
        vm.hmp("o /b 0x505 1")
        vm.qmp.poll(lambda: not vm.qmp("query-status")["running"])
    assert vm.qmp("query-status")["status"] == state
    try_backup(vm, tmp_path / "target").check()
    assert vm.qmp("query-status")["status"] == state


def test_a_vm_that_is_not_set_up_yet(tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    arguments = ("-preconfig", "-machine", "none", "-display", "none", "-nodefaults")
    monitor = ("-qmp", f"unix:{socket},server=on,wait=off")
    with subprocess.Popen(["qemu-system-x86_64", *arguments, *monitor]) as qemu:
        try:
            assert "-preconfig" in named(qemu, socket)
        finally:
            qemu.kill()


def test_a_storage_daemon(tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    monitor = ("--chardev", f"socket,id=c,path={socket},server=on,wait=off", "--monitor", "c")
    with subprocess.Popen(["qemu-storage-daemon", *monitor]) as daemon:
        try:
            assert "qemu-storage-daemon" in named(daemon, socket)
        finally:
            daemon.kill()


def named(process: "subprocess.Popen[bytes]", socket: Path) -> str:
    """What a backup says of what listens there, once it does."""
    while not socket.exists():
        assert process.poll() is None
    while True:
        target = socket.with_name("target")
        result = cli.run("--socket", socket, "backup", "--level", "auto", "--target", target)
        if "Nobody listens" not in result.err:
            return result.check(VM).err
