# SPDX-License-Identifier: Apache-2.0
"""While a VM with iothreads is stopped for the instant, somebody listens on each of its disks: without,
QEMU 8.2 and later can lose the interrupt of a request (see `machine.bystander`)."""

import json
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up
from lab.disks import MIB, Disk, create, pattern
from lab.proxy import Place, Proxy
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target, environment_of
from qmpbackup.machine.bystander import FIRST_SAFE
from stock.repositories import repository

SIZE = 4 * MIB
DISKS = ("vda", "vdb")


@pytest.fixture(params=["directory", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A new target."""
    place = tmp_path / "target"
    return repository(place) if request.param == "repository" else place


def start(start_qemu: StartQemu, folder: Path, iothread: str) -> Qemu:
    """A VM with two disks, in an iothread if it has a name."""
    images = [create(folder / name, SIZE, contents=pattern(SIZE, 8)) for name in DISKS]
    disks = [Disk(name, each, iothread=iothread) for name, each in zip(DISKS, images, strict=True)]
    threads = [iothread] if iothread else []
    return start_qemu(disks, iothreads=threads, firmware="seabios" if iothread else "halt")


def exported(vm: Qemu) -> set[str]:
    """The nodes that QEMU shows over NBD."""
    return {each["node-name"] for each in vm.qmp("query-block-exports")}


def is_safe(vm: Qemu) -> bool:
    """Whether this QEMU survives a client of NBD with iothreads."""
    version = vm.qmp("query-version")["qemu"]
    return (version["major"], version["minor"], version["micro"]) >= FIRST_SAFE


@pytest.mark.parametrize("iothread", ["", "io"], ids=["main loop", "iothread"])
def test_all_disks_are_shown_while_the_vm_is_stopped(
    tmp_path: Path, start_qemu: StartQemu, target: Target, iothread: str
) -> None:
    vm = start(start_qemu, tmp_path, iothread)
    seen: dict[str, set[str]] = {}

    def hook(_proxy: Proxy, at: Place) -> None:
        if (at.command, at.when) in {("stop", "before"), ("cont", "after")}:
            seen[at.command] = exported(vm)

    path = vm.folder / "proxy"
    with Proxy(path, vm.socket, hook):
        # One disk is not in the point, and stands still with the others.
        only = ("--level", "full", "--include", "vda", "--target", str(target))
        done = cli.run("--socket", path, "backup", *only, "--json", env=environment_of(target))
    point = json.loads(done.check().out)["point"]["id"]
    wanted = {disk.node for disk in vm.disks} if iothread and is_safe(vm) else set()
    assert seen == {"stop": wanted, "cont": wanted}
    assert_restores(target, point, {"vda": vm.contents("vda")}, tmp_path)
    assert_clean(vm, target)


def test_a_run_that_is_killed_meanwhile_leaves_nothing_to_the_next(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start(start_qemu, tmp_path, "io")
    back_up(vm, target)

    def hook(proxy: Proxy, at: Place) -> None:
        if (at.command, at.when) == ("stop", "before") and not proxy.killed:
            proxy.kill_client()

    path = vm.folder / "proxy"
    with Proxy(path, vm.socket, hook):
        arguments = ("backup", "--level", "inc", "--target", str(target))
        cli.run("--socket", path, *arguments, env=environment_of(target))
    vm.write("vda", MIB, MIB, 7)
    point = back_up(vm, target, "inc")
    assert_restores(target, point["id"], {disk: vm.contents(disk) for disk in DISKS}, tmp_path)
    assert_clean(vm, target)


def test_where_qemu_serves_somebody_else_the_run_goes_on(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    vm = start(start_qemu, tmp_path, "io")
    address = {"type": "unix", "data": {"path": str(vm.folder / "theirs")}}
    vm.qmp("nbd-server-start", addr=address)
    point = back_up(vm, target)
    assert_restores(target, point["id"], {disk: vm.contents(disk) for disk in DISKS}, tmp_path)
    vm.qmp("nbd-server-stop")  # still theirs
