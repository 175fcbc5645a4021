# SPDX-License-Identifier: Apache-2.0
"""A run that reads views is killed between any two commands; the recovery leaves nothing of it, takes
nothing from others, and no change is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli
from lab.backups import leftovers
from lab.disks import MIB, Disk, create, first_difference, pattern
from lab.proxy import Place, Proxy
from lab.qemu import Qemu, StartQemu
from lab.qmp import QmpError
from qmpbackup.machine.pull import Method
from stock.pulling import Puller, command

SIZES = {"vda": 10 * MIB, "vdb": 9 * MIB + 512}
DELICATE = {"getfd", "nbd-server-start", "nbd-server-stop"}


class Stage:
    """A VM and the state that a change bitmap counts from."""

    def __init__(self, vm: Qemu, folder: Path) -> None:
        self.vm = vm
        self.folder = folder
        self.base: dict[str, bytes] = {}
        self.bitmaps: dict[str, str] = {}
        self._writes = 0
        self._temporary = {"TMPDIR": str(vm.folder)}

    @property
    def sockets(self) -> list[Path]:
        """Folders for sockets that runs have left."""
        return list(self.vm.folder.glob("qmpbackup-*"))

    def recover(self) -> None:
        """Clean up after a run that died."""
        cli.run("--socket", self.vm.socket, "recover", env=self._temporary).check()

    def renew(self) -> None:
        """Count from now on."""
        cli.run("--socket", self.vm.socket, "cleanup", "--remove-bitmaps").check()
        with Puller(self.vm, self.folder) as run:
            run.take()
            self.bitmaps = run.bitmaps
        self.base = {disk: self.vm.contents(disk) for disk in SIZES}

    def write(self) -> None:
        """Change something on every disk."""
        for disk in SIZES:
            self._writes += 1
            self.vm.write(disk, self._writes % 9 * MIB + 512, 1024, self._writes % 255 + 1)

    def run(self, hook: Callable[[Proxy, Place], None], way: Method | None) -> list[str]:
        """A whole run through a proxy; the names of its commands, empty if it was killed."""
        with Proxy(self.vm.folder / "proxy", self.vm.socket, hook) as proxy:
            result = command(proxy.path, self.folder, self.bitmaps, way, self._temporary)
            self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
            assert proxy.killed or result.returncode == 0, result.stderr
            return [] if proxy.killed else proxy.log

    def make_good(self, way: Method | None) -> None:
        """Recover, and find all changes."""
        self.recover()
        assert leftovers(self.vm) == []
        assert not serves_nbd(self.vm)
        self.write()
        instant = {disk: self.vm.contents(disk) for disk in SIZES}
        with Puller(self.vm, self.folder, self.bitmaps, way=way) as run:
            run.take()
            found = run.read()
            run.pull.finish()
        assert run.complaints == []
        assert leftovers(self.vm) == []
        for disk, contents in instant.items():
            assert not first_difference(found[disk].over(self.base[disk]), contents), disk


def serves_nbd(vm: Qemu) -> bool:
    """Whether QEMU's NBD server runs."""
    address = {"type": "unix", "data": {"path": str(vm.folder / "asked")}}
    try:
        vm.qmp("nbd-server-start", addr=address)
    except QmpError:
        return True
    vm.qmp("nbd-server-stop")
    return False


def kill_at_all(stage: Stage, way: Method | None, step: int) -> int:
    """Kill runs at every `step`-th place and all delicate ones; return how many were killed."""
    stage.renew()
    names = stage.run(lambda _proxy, _at: None, way)
    places = [
        Place(at, when, name) for at, name in enumerate(names) for when in ("before", "after")
    ]
    kills = 0
    for index, place in enumerate(places):
        if index % step and place.command not in DELICATE:
            continue

        def hook(proxy: Proxy, at: Place, place: Place = place) -> None:
            if not proxy.killed and (at.number, at.when) == (place.number, place.when):
                proxy.kill_client()

        if kills % 8 == 0:
            stage.renew()
        try:
            stage.write()
            kills += not stage.run(hook, way)
            stage.make_good(way)
        except BaseException as error:
            error.add_note(f"killed at {place}")
            raise
    return kills


def two_disks(vm: StartQemu, folder: Path, **options: object) -> Qemu:
    """A disk that stores bitmaps and one that cannot."""
    disks = [
        Disk("vda", create(folder / "a", SIZES["vda"], contents=pattern(SIZES["vda"], 1))),
        Disk("vdb", create(folder / "b", SIZES["vdb"], "raw"), "raw"),
    ]
    return vm(disks, **options)


def test_killed_at_a_spread_of_places(start_qemu: StartQemu, tmp_path: Path) -> None:
    stage = Stage(two_disks(start_qemu, tmp_path), tmp_path)
    assert kill_at_all(stage, None, 19) > 8
    assert stage.sockets == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, Method.STAGED])
def test_killed_everywhere(start_qemu: StartQemu, tmp_path: Path, way: Method | None) -> None:
    assert kill_at_all(Stage(two_disks(start_qemu, tmp_path), tmp_path), way, 1) > 100


def serve(vm: Qemu) -> None:
    """Have QEMU serve somebody else."""
    address = {"type": "unix", "data": {"path": str(vm.folder / "theirs")}}
    vm.qmp("nbd-server-start", addr=address)
    vm.qmp("block-export-add", type="nbd", id="theirs", node_name="node-vda")


def exports(vm: Qemu) -> list[str]:
    """What QEMU shows over NBD."""
    return [str(each["id"]) for each in vm.qmp("query-block-exports")]


def test_the_server_of_somebody_else_is_read_past(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = two_disks(start_qemu, tmp_path)
    serve(vm)
    base = {disk: vm.contents(disk) for disk in SIZES}
    with Puller(vm, tmp_path) as first:
        first.take()
        assert first.pull.way is Method.STAGED
        found = first.read()
        first.pull.finish()
    for disk, contents in base.items():
        assert not first_difference(found[disk].over(bytes(len(contents))), contents)
    vm.write("vda", 3 * MIB, 512, 1)
    with Puller(vm, tmp_path, first.bitmaps) as run:
        run.take(samples={0: [7]})
        found = run.read()
    assert (found["vda"].changed, found["vda"].wanted) == ([3], [3, 7])
    assert (exports(vm), leftovers(vm)) == (["theirs"], [])
    assert serves_nbd(vm)


@pytest.mark.parametrize("when", ["object-add", "getfd"])
def test_the_server_of_somebody_else_outlives_a_recovery(
    start_qemu: StartQemu, tmp_path: Path, when: str
) -> None:
    """Even where a run died when it was about to start its own."""

    def hook(proxy: Proxy, at: Place) -> None:
        if (at.command, at.when) == (when, "after") and not proxy.killed:
            proxy.kill_client()

    vm = two_disks(start_qemu, tmp_path)
    stage = Stage(vm, tmp_path)
    stage.renew()
    assert stage.run(hook, None) == []
    serve(vm)
    stage.recover()
    assert (exports(vm), leftovers(vm)) == (["theirs"], [])
    assert serves_nbd(vm)
    assert stage.sockets == []
