# SPDX-License-Identifier: Apache-2.0
"""What holds data and is in no point is named, wherever somebody looks, until it is left out on request."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, levels, try_backup
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target, environment_of
from stock.repositories import repository

SIZE = 10 * MIB


def plain(folder: Path) -> Disk:
    return Disk("vda", create(folder / "a.qcow2", SIZE))


def nvdimm(folder: Path) -> list[str]:
    image = create(folder / "memory", 64 * MIB, "raw")
    memory = f"memory-backend-file,id=nv,share=on,mem-path={image},size=64M"
    return ["-object", memory, "-device", "nvdimm,memdev=nv,id=pmem"]


@contextmanager
def vhost_user(folder: Path) -> Iterator[list[str]]:
    """Arguments for a disk that another process serves, while that process lives."""
    image, socket = create(folder / "served.qcow2", SIZE), folder / "served"
    node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={image}"
    export = f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on"
    server = ["qemu-storage-daemon", "--blockdev", node, "--export", export]
    ready = folder / "pid"
    with subprocess.Popen([*server, "--pidfile", str(ready)]) as process:
        try:
            while not ready.exists():  # written when all exports are there
                assert process.poll() is None
            yield [
                *("-object", "memory-backend-memfd,id=m,size=64M,share=on"),
                *("-numa", "node,memdev=m"),
                *("-chardev", f"socket,id=c,path={socket}"),
                *("-device", "vhost-user-blk-pci,chardev=c,id=data"),
            ]
        finally:
            process.terminate()


def assert_named(vm: Qemu, target: Path, names: Sequence[str], excluding: str) -> None:
    """Every command names them; with `--exclude` a backup ends with 0 and records that."""
    done = try_backup(vm, target, "auto", "--json").check(3)
    outcome: dict[str, Any] = json.loads(done.out)
    assert levels(outcome["point"]) == {"vda": "full"}
    plan = try_backup(vm, target, "auto", "--dry-run").check().out
    info = cli.run("--socket", vm.socket, "info", "--show", "blockdev").check().out
    doctor = cli.run("--socket", vm.socket, "doctor").check().out
    shown = cli.run("show", "--target", target).check().out
    for name in names:
        assert f"{name} is in no backup" in " ".join(outcome["degraded"])
        assert f"{name}: in no backup" in doctor
        assert f"not backed up: {name}" in shown
        assert f'"skipped": "{name}"' in info
        assert name in plan
    point = json.loads(try_backup(vm, target, "inc", "--json", "--exclude", excluding).check().out)
    skipped = {each["name"]: each for each in point["point"]["skipped"]}
    assert {skipped[name]["absence"] for name in names} == {"chosen"}
    assert "left out on request" in cli.run("show", "--target", target).check().out
    assert_restores(target, point["point"]["id"], {"vda": vm.contents("vda")}, target.parent)


def test_a_disk_of_another_process_and_persistent_memory(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    with vhost_user(tmp_path) as served:
        vm = start_qemu(
            [plain(tmp_path)],
            args=[*served, *nvdimm(tmp_path)],
            machine="q35,nvdimm=on",
            memory="64M,slots=2,maxmem=512M",
        )
        assert_named(vm, tmp_path / "target", ["data", "pmem"], "data,pmem")


def test_folders_of_the_host_without_ids(tmp_path: Path, start_qemu: StartQemu) -> None:
    arguments = [
        *("-fsdev", f"local,id=f,path={tmp_path},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=f,mount_tag=host"),
        *("-device", "qemu-xhci", "-device", f"usb-mtp,rootdir={tmp_path}"),
        *("-device", "qemu-xhci,id=other", "-device", "usb-kbd,bus=other.0"),
    ]
    vm = start_qemu([plain(tmp_path)], args=arguments)
    names = ["virtio-9p-pci", "usb-mtp"]
    assert_named(vm, tmp_path / "target", names, "virtio-9p-pci,usb-mtp")


def test_what_was_not_included_is_known_to_be_missing(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu(
        [plain(tmp_path)],
        args=nvdimm(tmp_path),
        machine="q35,nvdimm=on",
        memory="64M,slots=2,maxmem=512M",
    )
    point = json.loads(
        try_backup(vm, tmp_path / "target", "auto", "--include", "vda", "--json").check().out
    )
    assert [each["absence"] for each in point["point"]["skipped"]] == ["chosen"]
    try_backup(vm, tmp_path / "target", "auto", "--include", "pmem").check(6)
    try_backup(vm, tmp_path / "target", "auto", "--exclude", "pmem2").check(2)


@pytest.fixture(params=["directory", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    where = tmp_path / "target"
    return where if request.param == "directory" else repository(where)


def test_a_restore_of_a_vm_from_a_point_that_lacks_a_disk(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    disks = [plain(tmp_path), Disk("vdb", create(tmp_path / "b.qcow2", SIZE))]
    vm = start_qemu(disks, name="pair")
    whole = back_up(vm, target)
    part = back_up(vm, target, "inc", "--include", "vda")

    def command(name: str, *more: cli.Argument) -> cli.Result:
        return cli.run(name, "--target", str(target), *more, env=environment_of(target))

    said = f"vdb is not in this point (left out on request); its newest state is in point {whole['id']}"
    all_of_it = command("restore", "--output", tmp_path / "one").check(3)
    assert said in all_of_it.out
    assert [each.name for each in (tmp_path / "one").iterdir()] == ["vda.qcow2"]
    assert said in command("show").check().out
    (restored,) = command("restore", "--output", tmp_path / "two", "--json").check(3).objects
    assert [each["id"] for each in restored["missing"]] == ["vdb"]
    assert restored["missing"][0]["newest"] == whole["id"]
    # Who names disks, or a point that has them all, gets what was asked for.
    command("restore", "--output", tmp_path / "three", "--disk", "vda").check()
    command("restore", "--output", tmp_path / "four", "--point", whole["id"]).check()
    found = json.loads(command("show", "--json", "--point", part["id"]).check().out)
    assert {"name": "vdb", "reason": "left out on request", "absence": "chosen"} in found["skipped"]


def test_a_restore_of_a_vm_without_a_disk_that_it_had_once(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    second = Disk("vdb", create(tmp_path / "b.qcow2", SIZE))
    target = tmp_path / "target"
    both = start_qemu([plain(tmp_path), second], name="pair")
    back_up(both, target)
    both.quit()
    back_up(start_qemu([plain(tmp_path)], name="pair"), target)
    done = cli.run("restore", "--target", target, "--output", tmp_path / "out").check()
    assert "vdb is not in this point (the VM did not have it then)" in done.out
