# SPDX-License-Identifier: Apache-2.0
"""Several hosts and VMs with one repository, or one folder: nobody takes anybody's points for his own.

Hosts are told apart by what they are called, which `--host` says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up, levels, restored, try_backup
from lab.disks import MIB, Disk, create, pattern
from lab.qemu import StartQemu
from lab.repositories import Repository
from lab.small import needs_root
from stock.repositories import repository

USAGE, NO_INCREMENTAL, NONE = 2, 4, 10
UUID = "7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a"
OTHER = "00000000-0000-0000-0000-000000000002"
SIZE = 9 * MIB


@pytest.fixture
def target(tmp_path: Path) -> Repository:
    return repository(tmp_path / "target")


def disk(folder: Path, name: str, seed: int = 1) -> Disk:
    """A disk that is called vda in every VM."""
    return Disk("vda", create(folder / f"{name}.qcow2", SIZE, contents=pattern(SIZE, seed)))


def on(host: str) -> tuple[str, str]:
    return ("--host", host)


def run(target: Repository, command: str, *more: cli.Argument) -> cli.Result:
    return cli.run(command, "--target", str(target), *more, env=target.environment)


def listed(target: Repository, vm: str = "") -> list[tuple[str, str]]:
    """Hosts and ids of the points of a VM."""
    chosen = ("--vm", vm) if vm else ()
    return [(each["host"], each["id"]) for each in run(target, "list", "--json", *chosen).objects]


def test_two_hosts_with_a_vm_of_one_name(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    """Neither VM has a UUID, so only their hosts tell them apart."""
    vms = {h: start_qemu([disk(tmp_path, h, n)], name="web") for n, h in enumerate(("one", "two"))}
    first = back_up(vms["one"], target, "auto", *on("one"))
    elsewhere = {**target.environment, "RESTIC_HOST": ""}
    arguments = ("--socket", vms["two"].socket, "backup", "--level", "auto", "--target")
    # Somebody has to say whether this is the VM of the renamed host, or another.
    refused = cli.run(*arguments, str(target), env=elsewhere).check(USAGE)
    assert "one/web" in refused.err
    assert "--host one" in refused.err
    assert [each["id"] for each in target.manifests()] == [first["id"]]
    for level in ("auto", "inc", "inc"):
        for host, vm in vms.items():
            vm.write("vda", MIB, MIB, 7)
            back_up(vm, target, level if host == "two" else "inc", *on(host))
    assert {host for host, _ in listed(target, "one/web")} == {"one"}
    assert len(listed(target, "one/web")) == 4
    ours = listed(target, "two/web")
    assert {host for host, _ in ours} == {"two"}
    assert len(ours) == 3
    for command in (
        "list",
        "show",
        "verify",
        "prune --keep-last 1",
        f"restore --output {tmp_path}",
    ):
        for more in ((), ("--vm", "web")):
            said = run(target, *command.split(), *more).check(USAGE).err
            assert "one/web, two/web" in said
    run(target, "prune", "--keep-last", "1", "--vm", "one/web").check()
    assert len(listed(target, "one/web")) == 1
    assert listed(target, "two/web") == ours
    for host, vm in vms.items():
        _, newest = listed(target, f"{host}/web")[-1]
        assert restored(target, newest, tmp_path) == {"vda": vm.contents("vda")}
        back_up(vm, target, "inc", *on(host))


def test_without_a_name_the_address_counts(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([disk(tmp_path, "vda")])
    back_up(vm, target, "auto", *on("one"))
    assert "--host one" in try_backup(vm, target).check(USAGE).err
    assert levels(back_up(vm, target, "auto", *on("two"))) == {"vda": "full"}
    assert "one/" in run(target, "list").check(USAGE).err
    assert len(listed(target, f"one/{vm.socket}")) == len(listed(target, f"two/{vm.socket}")) == 1
    # The bitmap is of the newest point: that of host one is as good as gone.
    assert levels(back_up(vm, target, "inc", *on("two"))) == {"vda": "inc"}


def test_a_vm_is_known_by_its_uuid_under_another_name_and_on_another_host(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    image = disk(tmp_path, "vda")
    vm = start_qemu([image], name="old", uuid=UUID)
    back_up(vm, target, "auto", *on("one"))
    vm.write("vda", MIB, MIB, 7)
    back_up(vm, target, "inc", *on("two"))
    vm.quit()
    vm = start_qemu([image], name="new", uuid=UUID.upper())
    vm.write("vda", 2 * MIB, MIB, 8)
    newest = back_up(vm, target, "inc", *on("two"))
    assert [host for host, _ in listed(target)] == ["one", "two", "two"]
    assert [each["paths"] for each in target.snapshots()] == [["/old"], ["/old"], ["/new"]]
    for name in ("new", "old", "two/new", "one/old", UUID, UUID.upper()):
        assert len(listed(target, name)) == 3, name
    assert restored(target, newest["id"], tmp_path) == {"vda": vm.contents("vda")}
    run(target, "prune", "--keep-last", "1").check()
    assert [each["id"] for each in target.manifests()] == [newest["id"]]
    # What another VM is called now counts before what this one was called once.
    other = start_qemu([disk(tmp_path, "other", 2)], name="old", uuid=OTHER)
    back_up(other, target, "auto", *on("one"))
    assert len(listed(target, "old")) == 1
    assert listed(target, "old") != listed(target, "new")


def test_a_vm_that_is_given_a_uuid_is_another(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    image = disk(tmp_path, "vda")
    vm = start_qemu([image], name="web")
    back_up(vm, target, "auto")
    vm.quit()
    vm = start_qemu([image], name="web", uuid=UUID)
    refused = try_backup(vm, target, "inc").check(NO_INCREMENTAL)
    assert "called like it" in refused.err
    assert levels(back_up(vm, target)) == {"vda": "full"}
    assert "web" in run(target, "list", "--vm", "web").check(USAGE).err


@pytest.mark.parametrize("wanted", ["third", "one/third", "web/one", OTHER, "qmpbackup"])
def test_whom_nobody_knows(
    tmp_path: Path, start_qemu: StartQemu, target: Repository, wanted: str
) -> None:
    back_up(start_qemu([disk(tmp_path, "vda")], name="web"), target, "auto", *on("one"))
    assert "one/web" in run(target, "list", "--vm", wanted).check(NONE).err


@needs_root
def test_a_host_is_called_as_it_calls_itself(
    tmp_path: Path, start_qemu: StartQemu, target: Repository
) -> None:
    vm = start_qemu([disk(tmp_path, "vda")], name="web")
    program = Path(sys.executable).with_name("qmpbackup")
    arguments = f"{program} --socket {vm.socket} backup --level auto --target {target}"
    for host in ("hv1", "hv1", "hv2"):
        named = f"hostname {host} && exec {arguments}"
        command = ["unshare", "--uts", "sh", "-c", named]
        environment = {**os.environ, **target.environment}
        result = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert result.returncode == (0 if host == "hv1" else USAGE), result
    assert {each["hostname"] for each in target.snapshots()} == {"hv1"}
    assert [host for host, _ in listed(target)] == ["hv1", "hv1"]


class TestFolders:
    """A folder holds the points of one VM."""

    def test_of_another_host_is_refused(self, tmp_path: Path, start_qemu: StartQemu) -> None:
        target = tmp_path / "target"
        vm = start_qemu([disk(tmp_path, "vda")], name="web")
        back_up(vm, target, "auto", *on("one"))
        refused = try_backup(vm, target, "inc", *on("two")).check(USAGE)
        assert "on one" in refused.err
        assert "--host one" in refused.err
        back_up(vm, target, "inc", *on("one"))
        assert [each["host"] for each in lines(target)] == ["one", "one"]

    def test_with_a_uuid_it_goes_on(self, tmp_path: Path, start_qemu: StartQemu) -> None:
        target = tmp_path / "target"
        vm = start_qemu([disk(tmp_path, "vda")], name="web", uuid=UUID)
        back_up(vm, target, "auto", *on("one"))
        back_up(vm, target, "inc", *on("two"))
        assert [each["host"] for each in lines(target)] == ["one", "two"]

    def test_clones_with_one_uuid_are_warned_of(
        self, tmp_path: Path, start_qemu: StartQemu
    ) -> None:
        """As soon as they take turns: until then it may be one VM that was renamed."""
        target = tmp_path / "target"
        vms = [start_qemu([disk(tmp_path, each)], name=each, uuid=UUID) for each in ("a", "b")]
        for vm in vms:
            assert "take turns" not in try_backup(vm, target).check().err
        assert "take turns" in try_backup(vms[0], target).check().err
        found = cli.run("--socket", vms[1].socket, "doctor", "--target", target)
        assert "take turns" in found.out

    def test_one_that_names_no_host_is_the_next_ones(
        self, tmp_path: Path, start_qemu: StartQemu
    ) -> None:
        """As earlier versions made them; from then on the newest point tells."""
        target = tmp_path / "target"
        vm = start_qemu([disk(tmp_path, "vda")], name="web")
        back_up(vm, target, "auto", *on("one"))
        owner = json.loads((target / "vm.json").read_text())
        del owner["vm"]["host"]
        (target / "vm.json").write_text(json.dumps(owner))
        back_up(vm, target, "inc", *on("one"))
        try_backup(vm, target, "inc", *on("two")).check(USAGE)


def lines(target: Path) -> list[dict[str, str]]:
    return cli.run("list", "--target", target, "--json").check().objects
