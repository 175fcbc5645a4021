# SPDX-License-Identifier: Apache-2.0
"""What an administrator does with disks between two runs: an incremental where that is right, a full
where it is not, and never a wrong restore."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lab.aftermath import assert_clean, manifests
from lab.backups import assert_restores, back_up, levels, try_backup
from lab.disks import CLUSTER, MIB, Disk, create, pattern, qemu_img
from lab.qemu import Qemu, StartQemu

SIZE = 10 * MIB


class Yard:
    """A VM whose disks come and go, and its target."""

    def __init__(self, start_qemu: StartQemu, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "target"
        self._start = start_qemu
        self.vm = self.start("vda", "vdb")
        self.back_up("full")

    def start(self, *disks: str) -> Qemu:
        """Start the VM with these disks."""
        self.vm = self._start([self.disk(each) for each in disks], name="yard")
        return self.vm

    def disk(self, name: str) -> Disk:
        image = self.image(name)
        if not image.exists():
            create(image, SIZE, contents=pattern(SIZE, sum(name.encode())))
        return Disk(name, image)

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.qcow2"

    def write(self, block: int, byte: int) -> None:
        """Write a block of each disk."""
        for disk in self.vm.disks:
            self.vm.write(disk.id, block * CLUSTER, CLUSTER, byte)

    def back_up(self, level: str = "auto") -> dict[str, str]:
        """A point that restores to the disks as they are; the levels of its disks."""
        point: dict[str, Any] = back_up(self.vm, self.target, level)
        assert_restores(self.target, point["id"], self.vm.live(), self.folder)
        return levels(point)

    def refuse(self, *words: str) -> None:
        """An incremental is refused with a sentence that holds these words."""
        before = len(manifests(self.target))
        refused = try_backup(self.vm, self.target, "inc").check(4)
        for word in words:
            assert word in refused.err
        assert len(manifests(self.target)) == before


@pytest.fixture
def yard(start_qemu: StartQemu, tmp_path: Path) -> Yard:
    return Yard(start_qemu, tmp_path)


def test_an_image_that_was_replaced_by_an_older_copy(yard: Yard) -> None:
    yard.write(1, 1)
    yard.vm.quit()
    shutil.copy(yard.image("vda"), yard.folder / "old")
    yard.vm.start()
    yard.write(2, 2)
    assert set(yard.back_up("inc").values()) == {"inc"}
    yard.vm.quit()
    shutil.copy(yard.folder / "old", yard.image("vda"))
    yard.vm.start()
    yard.write(3, 3)
    yard.refuse("Disk vda", "older copy")
    assert yard.back_up() == {"vda": "full", "vdb": "inc"}
    yard.write(4, 4)
    assert set(yard.back_up("inc").values()) == {"inc"}
    assert_clean(yard.vm, yard.target)


def test_an_image_that_was_reverted_to_an_internal_snapshot(yard: Yard) -> None:
    yard.vm.quit()
    image = str(yard.image("vda"))
    qemu_img("snapshot", "-c", "before", image)
    yard.vm.start()
    yard.write(2, 2)
    yard.back_up("inc")
    yard.vm.quit()
    records = [d for p in manifests(yard.target) for d in p["disks"] if d["id"] == "vda"]
    for bitmap in {d["bitmap"] for d in records} | {d["end_mark"] for d in records}:
        qemu_img("bitmap", "--remove", image, bitmap)
    qemu_img("snapshot", "-a", "before", image)
    yard.vm.start()
    yard.write(3, 3)
    yard.refuse("Disk vda")
    assert yard.back_up() == {"vda": "full", "vdb": "inc"}
    yard.write(4, 4)
    assert set(yard.back_up("inc").values()) == {"inc"}


@pytest.mark.parametrize("meanwhile", [False, True])
def test_an_external_snapshot_that_was_committed(yard: Yard, meanwhile: bool) -> None:
    overlay = yard.folder / "overlay.qcow2"
    arguments = {"node-name": "node-vda", "snapshot-file": str(overlay)}
    yard.vm.qmp.command("blockdev-snapshot-sync", arguments | {"snapshot-node-name": "over"})
    yard.write(2, 2)
    yard.refuse("Disk vda", "snapshot")
    if meanwhile:
        assert yard.back_up() == {"vda": "full", "vdb": "inc"}
        yard.write(3, 3)
    yard.vm.qmp("block-commit", device="over", job_id="commit")
    yard.vm.qmp.wait_event("BLOCK_JOB_READY")
    yard.vm.qmp("block-job-complete", device="commit")
    yard.vm.qmp.wait_event("BLOCK_JOB_COMPLETED")
    assert yard.vm.image("vda")[0] == yard.image("vda")
    yard.write(4, 4)
    found = yard.back_up()
    assert found == {"vda": "full" if meanwhile else "inc", "vdb": "inc"}
    yard.write(5, 5)
    assert set(yard.back_up("inc").values()) == {"inc"}


@pytest.mark.parametrize("copied", ["recording", "all"])
def test_a_snapshot_that_copies_the_names_of_bitmaps(yard: Yard, copied: str) -> None:
    """As libvirt takes it: bitmaps of the base are made anew on the overlay, under the same names.
    The change bitmap there is all that the bitmap rule asks for, and lacks what was written before."""
    base = yard.vm.qmp("query-block")[0]["inserted"]
    assert base["node-name"] == "node-vda"
    yard.write(2, 2)
    overlay = create(yard.folder / "overlay.qcow2", SIZE, backing=(yard.image("vda"), "qcow2"))
    file = {"driver": "file", "filename": str(overlay)}
    yard.vm.qmp("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
    anew = [
        {
            "node": "over",
            "name": each["name"],
            "persistent": True,
            "disabled": not each["recording"],
        }
        for each in base["dirty-bitmaps"]
        if each["recording"] or copied == "all"
    ]
    assert len(anew) == (1 if copied == "recording" else 2)
    actions = [{"type": "blockdev-snapshot", "data": {"node": "node-vda", "overlay": "over"}}]
    actions += [{"type": "block-dirty-bitmap-add", "data": each} for each in anew]
    yard.vm.qmp("transaction", actions=actions)
    yard.write(3, 3)
    yard.refuse("Disk vda")
    assert yard.back_up() == {"vda": "full", "vdb": "inc"}
    yard.write(4, 4)
    assert set(yard.back_up("inc").values()) == {"inc"}


def test_a_disk_that_was_added_and_one_that_was_removed(yard: Yard) -> None:
    yard.vm.quit()
    yard.start("vda", "vdb", "vdc")
    yard.write(1, 1)
    yard.refuse("Disk vdc", "no earlier point")
    assert yard.back_up() == {"vda": "inc", "vdb": "inc", "vdc": "full"}
    yard.vm.quit()
    yard.start("vdb", "vdc")
    yard.write(2, 2)
    assert yard.back_up("inc") == {"vdb": "inc", "vdc": "inc"}
    yard.vm.quit()
    yard.start("vda", "vdb")
    yard.write(3, 3)
    assert yard.back_up("inc") == {"vda": "inc", "vdb": "inc"}


def test_a_disk_under_another_name_begins_anew(yard: Yard) -> None:
    yard.vm.quit()
    yard.vm = yard._start([Disk("root", yard.image("vda")), yard.disk("vdb")], name="yard")
    yard.write(1, 1)
    yard.refuse("Disk root")
    assert yard.back_up() == {"root": "full", "vdb": "inc"}
    yard.write(2, 2)
    assert yard.back_up("inc") == {"root": "inc", "vdb": "inc"}


def test_two_disks_that_changed_places(yard: Yard) -> None:
    yard.write(1, 1)
    yard.vm.quit()
    swapped = [Disk("vda", yard.image("vdb")), Disk("vdb", yard.image("vda"))]
    yard.vm = yard._start(swapped, name="yard")
    yard.write(2, 2)
    yard.refuse("Disk vda", "change bitmap is gone")
    assert set(yard.back_up().values()) == {"full"}
    yard.write(3, 3)
    assert set(yard.back_up("inc").values()) == {"inc"}
    assert_clean(yard.vm, yard.target)
