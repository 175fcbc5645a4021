# SPDX-License-Identifier: Apache-2.0
"""Writes that no bitmap sees and no view keeps out: such disks are whole each time, or named and left
out while the others are saved; never an incremental that lacks them."""

import fcntl
import json
import os
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, bitmaps, leftovers, levels, try_backup
from lab.disks import MIB, Disk, create, pattern
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target
from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.machine import inventory
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.sharing import Locks
from qmpbackup.machine.underlays import Files
from qmpbackup.model import Absence
from stock.repositories import repository

SIZE = 10 * MIB


SHARED = ("share-rw=on",)


def raw(folder: Path, *device: str, locking: str = "auto", name: str = "shared") -> Disk:
    """A raw disk, of an image that several VMs may have."""
    image = folder / f"{name}.raw"
    if not image.exists():
        create(image, SIZE, "raw", contents=pattern(SIZE, 1))
    file = {"driver": "file", "filename": str(image), "locking": locking}
    options = {"file": file, "driver": "raw"}
    return Disk(name, image, "raw", bus="virtio-scsi", device=device, options=options)


def plain(folder: Path) -> Disk:
    return Disk("vda", create(folder / "a.qcow2", SIZE, contents=pattern(SIZE, 2)))


@pytest.fixture(params=["directory", "repository"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    where = tmp_path / "target"
    return where if request.param == "directory" else repository(where)


def test_a_disk_that_another_vm_may_write_is_whole_each_time(
    tmp_path: Path, start_qemu: StartQemu, target: Target
) -> None:
    ours = [plain(tmp_path), raw(tmp_path, *SHARED, locking="off")]
    vm = start_qemu(ours, name="one")
    other = start_qemu([raw(tmp_path, *SHARED, locking="off")], name="two")
    back_up(vm, target)
    for round_ in range(2):
        other.write("shared", (2 + round_) * MIB, MIB, 7 + round_)
        other.flush("shared")
        vm.write("vda", 0, MIB, 3 + round_)
        vm.write("shared", 8 * MIB, 4096, 3 + round_)
        refused = try_backup(vm, target, "inc").check(4)
        assert "Disk shared" in refused.err
        assert "share-rw=on" in refused.err
        point = back_up(vm, target)
        assert levels(point) == {"vda": "inc", "shared": "full"}
        live = {disk: vm.contents(disk) for disk in ("vda", "shared")}
        assert_restores(target, point["id"], live, tmp_path)
    assert not [name for node, name in bitmaps(vm) if node == "node-shared"]
    assert_clean(vm, target)
    advice = cli.run("--socket", vm.socket, "doctor").check()
    assert "shared: raw" in advice.out
    assert "a full each time: others may write to it (share-rw=on)" in advice.out


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_an_image_that_qemu_does_not_lock_is_whole_each_time(
    tmp_path: Path, start_qemu: StartQemu, image_format: str
) -> None:
    image = create(tmp_path / "a", SIZE, image_format)
    file = {"driver": "file", "filename": str(image), "locking": "off"}
    vm = start_qemu([Disk("vda", image, image_format, options={"file": file})])
    back_up(vm, tmp_path / "target")
    assert "locking=off" in try_backup(vm, tmp_path / "target", "inc").check(4).err
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "full"}


def test_an_image_that_was_plugged_in_without_locks(tmp_path: Path, start_qemu: StartQemu) -> None:
    """What QEMU was started with does not tell; what its process has locked does."""
    vm = start_qemu([plain(tmp_path)], args=["-device", "virtio-scsi-pci,id=s"])
    image = create(tmp_path / "b.qcow2", SIZE)
    file = {"driver": "file", "filename": str(image), "locking": "off"}
    vm.qmp("blockdev-add", driver="qcow2", node_name="hot", file=file)
    vm.qmp("device_add", driver="scsi-hd", id="vdb", drive="hot", bus="s.0")
    back_up(vm, tmp_path / "target")
    assert "Disk vdb" in try_backup(vm, tmp_path / "target", "inc").check(4).err
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "inc", "vdb": "full"}


def test_a_folder_of_the_host_that_is_shown_as_a_disk_is_whole_each_time(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    """QEMU reads the files when the guest does, so what the host writes to them is on the disk, too."""
    folder = tmp_path / "shown"
    folder.mkdir()
    file = folder / "a.txt"
    file.write_bytes(b"A" * MIB)
    node = {"driver": "vvfat", "dir": str(folder), "rw": True, "floppy": True}
    options = json.dumps({"driver": "raw", "node-name": "fat", "file": node})
    device = "virtio-blk-pci,drive=fat,id=shown"
    vm = start_qemu([plain(tmp_path)], args=["-blockdev", options, "-device", device])
    back_up(vm, tmp_path / "target")
    with Monitor.connect(str(vm.socket)) as it:
        found = inventory.take(it).vm.disks
    assert {disk.id: "vvfat" in disk.other_writers for disk in found} == {
        "vda": False,
        "shown": True,
    }


def test_what_shares_only_what_its_bitmap_sees_goes_on_incrementally(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    """Writers above the node of the bitmap are seen. With qcow2 nobody may write below, but to an
    external data file."""
    seen = Disk("vda", create(tmp_path / "a", SIZE), device=SHARED)
    unseen = Disk("vdb", create(tmp_path / "b", SIZE, data_file=True), device=SHARED)
    vm = start_qemu([seen, unseen])
    back_up(vm, tmp_path / "target")
    vm.write("vda", 0, MIB, 1)
    point = back_up(vm, tmp_path / "target")
    assert levels(point) == {"vda": "inc", "vdb": "full"}
    live = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    assert_restores(tmp_path / "target", point["id"], live, tmp_path)


def assert_left_out(vm: Qemu, target: Path, gone: Sequence[str], *words: str) -> None:
    """`vda` is saved, the others are named in the backup and its record, and nothing is left."""
    done = try_backup(vm, target, "auto", "--json").check(3)
    outcome: dict[str, Any] = json.loads(done.out)
    assert set(levels(outcome["point"])) == {"vda"}
    degraded = " ".join(outcome["degraded"])
    skipped = {each["name"]: each for each in outcome["point"]["skipped"]}
    for name in gone:
        assert f"{name} is in no backup" in degraded
        assert skipped[name]["absence"] == "impossible"
    for word in words:
        assert word in degraded
    assert not leftovers(vm)
    advice = cli.run("--socket", vm.socket, "doctor").check().out
    shown = cli.run("show", "--target", target).check().out
    for name in gone:
        assert f"advice   {name}: in no backup" in advice
        assert f"not backed up: {name}" in shown
    excluded = ("--exclude", ",".join(gone), "--json")
    point = json.loads(try_backup(vm, target, "inc", *excluded).check().out)["point"]
    assert set(levels(point)) == {"vda"}
    assert {each["absence"] for each in point["skipped"] if each["name"] in gone} == {"chosen"}


def test_a_disk_that_another_vm_writes_with_locks(tmp_path: Path, start_qemu: StartQemu) -> None:
    """There QEMU refuses any view, as the filter wants to be the only writer."""
    vm = start_qemu([plain(tmp_path), raw(tmp_path, *SHARED)], name="one")
    other = start_qemu([raw(tmp_path, *SHARED)], name="two")
    assert_left_out(vm, tmp_path / "target", ["shared"], "another process")
    other.quit()
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "inc", "shared": "full"}


def test_an_export_that_writes_below_the_bitmaps(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([plain(tmp_path), raw(tmp_path, *SHARED)])
    address = {"type": "unix", "data": {"path": str(vm.folder / "nbd")}}
    vm.qmp("nbd-server-start", addr=address)
    file = next(
        node["node-name"]
        for node in vm.qmp("query-named-block-nodes", flat=True)
        if node["drv"] == "file" and node["file"].endswith("shared.raw")
    )
    vm.qmp("block-export-add", type="nbd", id="mine", node_name=file, writable=True)
    assert_left_out(vm, tmp_path / "target", ["shared"], "an export")
    vm.qmp("block-export-del", id="mine")
    vm.qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "inc", "shared": "full"}


def test_two_devices_on_one_node(tmp_path: Path, start_qemu: StartQemu) -> None:
    second = ["-device", "scsi-hd,bus=scsi-path1.0,drive=node-path1,id=path2,share-rw=on"]
    image = create(tmp_path / "b.qcow2", SIZE)
    paths = Disk("path1", image, bus="virtio-scsi", device=SHARED)
    vm = start_qemu([plain(tmp_path), paths], args=second)
    assert_left_out(vm, tmp_path / "target", ["path1", "path2"], "2 devices", "node-path1")
    vm.qmp("device_del", id="path2")
    vm.qmp.poll(lambda: len(vm.qmp("query-block")) == 2)
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "inc", "path1": "full"}


def test_a_device_that_the_monitor_cannot_reach(tmp_path: Path, start_qemu: StartQemu) -> None:
    image = create(tmp_path / "b.qcow2", SIZE)
    node = {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": str(image)}}
    device = {"driver": "virtio-blk-pci", "id": "odd/id", "drive": "b"}
    arguments = ["-blockdev", json.dumps(node), "-device", json.dumps(device)]
    vm = start_qemu([plain(tmp_path)], args=arguments)
    assert_left_out(vm, tmp_path / "target", ["odd/id"], "cannot reach")


def test_a_guest_that_may_send_commands_to_the_host(tmp_path: Path, start_qemu: StartQemu) -> None:
    """`scsi=on`, which virtio had before its version 1; later versions of QEMU have it no more."""
    vm = start_qemu([plain(tmp_path)])
    known = vm.qmp("device-list-properties", typename="virtio-blk-pci")
    if "scsi" not in {each["name"] for each in known}:
        pytest.skip("this QEMU has no scsi=on")
    vm.quit()
    image = create(tmp_path / "b.raw", SIZE, "raw")
    passing = Disk("vdb", image, "raw", device=("scsi=on", "disable-modern=on"))
    vm = start_qemu([Disk("vda", tmp_path / "a.qcow2"), passing])
    back_up(vm, tmp_path / "target")
    assert "scsi=on" in try_backup(vm, tmp_path / "target", "inc").check(4).err
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "inc", "vdb": "full"}


@pytest.mark.parametrize("kind", ["scsi-block", "scsi-generic"])
def test_a_device_that_passes_all_commands_on(
    tmp_path: Path, start_qemu: StartQemu, kind: str
) -> None:
    """They need hardware of the host; so the answers of a plain disk, with their type."""
    vm = start_qemu([plain(tmp_path)])
    answers = {
        each.name: vm.qmp.command(each.name, dict(each.arguments)) for each in inventory.QUESTIONS
    }
    answers |= {"qom-get": kind, "qom-list": []}
    fake = FakeMonitor(lambda name: {"return": answers[name]})
    with ScriptedServer(tmp_path / "qmp", fake.serve), Monitor.connect(str(tmp_path / "qmp")) as it:
        found = inventory.take(it).vm
    assert not found.disks
    (skipped,) = found.skipped
    assert (skipped.name, skipped.absence) == ("vda", Absence.IMPOSSIBLE)
    assert kind in skipped.reason


def test_a_vm_of_which_nothing_can_be_backed_up(tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([raw(tmp_path, *SHARED)], name="one")
    start_qemu([raw(tmp_path, *SHARED)], name="two")
    refused = try_backup(vm, tmp_path / "target").check(6)
    assert "shared: another process" in refused.err
    assert not (tmp_path / "target").exists()


def test_locks_that_come_and_go_are_no_writers(tmp_path: Path) -> None:
    """The kernel tells all locks of a machine in pieces, and what moves meanwhile is told twice."""
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / f"{number}").open("w+")) for number in range(100)]
        for file in files:
            lock(file, fcntl.F_RDLCK, 101)
        over = threading.Event()
        others = [stack.enter_context((tmp_path / f"x{number}").open("w+")) for number in range(40)]
        thread = threading.Thread(target=come_and_go, args=(others, over))
        thread.start()
        try:
            names = [file.name for file in files]
            assert not any(Locks(Files(os.getpid()), ()).others_write(names) for _ in range(50))
        finally:
            over.set()
            thread.join()


def come_and_go(files: Sequence[IO[str]], over: threading.Event) -> None:
    """Take a lock on each file and leave it, again and again."""
    while not over.is_set():
        for kind in (fcntl.F_RDLCK, fcntl.F_UNLCK):
            for file in files:
                lock(file, kind, 5)


def lock(file: IO[str], kind: int, byte: int) -> None:
    """A lock as QEMU's."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, 0, byte, 1, 0))
