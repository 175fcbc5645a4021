# SPDX-License-Identifier: Apache-2.0
"""What an image lies on belongs to what an incremental builds on: no bitmap marks what changes there."""

import os
import shutil
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, levels, try_backup
from lab.disks import MIB, Disk, create, pattern, qemu_img, write_contents
from lab.qemu import StartQemu
from lab.repositories import Target
from stock.repositories import repository

SIZE = 10 * MIB


class Stack:
    """A VM with an overlay on a template on another one, all in one folder, and its target."""

    def __init__(self, start_qemu: StartQemu, folder: Path, target: Target) -> None:
        self.folder = folder
        self.target = target
        self.lowest = create(folder / "lowest.qcow2", SIZE, contents=pattern(SIZE, 1))
        self.template = create(folder / "template.qcow2", SIZE, backing=(self.lowest, "qcow2"))
        self.image = create(folder / "top.qcow2", SIZE, backing=(self.template, "qcow2"))
        self.vm = start_qemu([Disk("vda", self.image)], name="stack")
        self.vm.write("vda", 0, MIB, 5)
        assert self.back_up() == "full"

    def back_up(self, level: str = "auto") -> str:
        """A point that restores to the disk as it is; its level."""
        point = back_up(self.vm, self.target, level)
        assert_restores(self.target, point["id"], {"vda": self.vm.contents("vda")}, self.folder)
        return levels(point)["vda"]

    def go_on(self, byte: int) -> None:
        """Start the VM if it is off, and have the guest write."""
        if not self.vm.running:
            self.vm.start()
        self.vm.write("vda", 2 * MIB, MIB, byte)

    def assert_whole_again(self, *words: str) -> None:
        """`inc` refuses with these words, `auto` makes a full, and from then on all is well."""
        self.go_on(6)
        refused = try_backup(self.vm, self.target, "inc").check(4)
        for word in ("Disk vda", *words):
            assert word in refused.err
        assert self.back_up() == "full"
        self.go_on(7)
        assert self.back_up("inc") == "inc"


@pytest.fixture(params=["directory", "repository"])
def stack(request: pytest.FixtureRequest, start_qemu: StartQemu, tmp_path: Path) -> Stack:
    where = tmp_path / "target"
    target = where if request.param == "directory" else repository(where)
    return Stack(start_qemu, tmp_path, target)


@pytest.fixture
def plain_stack(start_qemu: StartQemu, tmp_path: Path) -> Stack:
    return Stack(start_qemu, tmp_path, tmp_path / "target")


def test_a_template_that_was_exchanged(stack: Stack) -> None:
    stack.vm.quit()
    new = create(stack.folder / "new.qcow2", SIZE, contents=pattern(SIZE, 2))
    qemu_img("rebase", "-u", "-b", str(new), "-F", "qcow2", str(stack.image))
    stack.assert_whole_again("another", "new.qcow2")


def test_a_template_that_was_exchanged_for_one_with_as_many_below(plain_stack: Stack) -> None:
    stack = plain_stack
    stack.vm.quit()
    new = create(stack.folder / "new.qcow2", SIZE, backing=(stack.lowest, "qcow2"))
    qemu_img("rebase", "-u", "-b", str(new), "-F", "qcow2", str(stack.image))
    stack.assert_whole_again("new.qcow2 now")


@pytest.mark.parametrize("how", ["in place", "replaced", "replaced, as old as before"])
def test_a_template_that_was_changed_under_its_name(plain_stack: Stack, how: str) -> None:
    stack = plain_stack
    stack.vm.quit()
    before = stack.lowest.stat()
    if how == "in place":
        write_contents(stack.lowest, pattern(SIZE, 3))
    else:
        new = create(stack.folder / "new", SIZE, contents=pattern(SIZE, 3))
        new.rename(stack.lowest)
    if how == "replaced, as old as before":
        os.utime(stack.lowest, ns=(before.st_atime_ns, before.st_mtime_ns))
    stack.assert_whole_again("lowest.qcow2", "changed or replaced")


def test_an_image_that_was_put_on_a_template(start_qemu: StartQemu, tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(2 * MIB, 1) + bytes(SIZE - 2 * MIB))
    vm = start_qemu([Disk("vda", image)])
    back_up(vm, tmp_path / "target")
    vm.quit()
    base = create(tmp_path / "base.qcow2", SIZE, contents=pattern(SIZE, 2))
    qemu_img("rebase", "-u", "-b", str(base), "-F", "qcow2", str(image))
    vm.start()
    assert "base.qcow2" in try_backup(vm, tmp_path / "target", "inc").check(4).err
    point = back_up(vm, tmp_path / "target")
    assert levels(point) == {"vda": "full"}
    assert_restores(tmp_path / "target", point["id"], {"vda": vm.contents("vda")}, tmp_path)


def test_a_data_file_that_was_exchanged(start_qemu: StartQemu, tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, data_file=True)
    data = Path(f"{image}.data")
    vm = start_qemu([Disk("vda", image)])
    vm.write("vda", 0, MIB, 1)
    back_up(vm, tmp_path / "target")
    vm.restart()
    vm.write("vda", MIB, MIB, 2)
    assert levels(back_up(vm, tmp_path / "target", "inc")) == {"vda": "inc"}
    vm.quit()
    shutil.copy(data, tmp_path / "copy")
    (tmp_path / "copy").rename(data)
    vm.start()
    assert "changed or replaced" in try_backup(vm, tmp_path / "target", "inc").check(4).err
    assert levels(back_up(vm, tmp_path / "target")) == {"vda": "full"}


def test_what_leaves_the_template_as_it_is_costs_no_full(stack: Stack) -> None:
    """A restart, a template that is only read, an image that moves with its bitmaps."""
    for byte in (6, 7):
        stack.vm.quit()
        qemu_img("check", str(stack.template))
        stack.go_on(byte)
        assert stack.back_up("inc") == "inc"
    stack.vm.quit()
    moved = stack.image.rename(stack.folder / "moved.qcow2")
    stack.image.symlink_to(moved)
    stack.go_on(8)
    assert stack.back_up("inc") == "inc"


def test_a_template_that_moves_costs_no_full(plain_stack: Stack) -> None:
    stack = plain_stack
    stack.vm.quit()
    moved = stack.template.rename(stack.folder / "moved.qcow2")
    qemu_img("rebase", "-u", "-b", str(moved), "-F", "qcow2", str(stack.image))
    stack.go_on(6)
    assert stack.back_up("inc") == "inc"


def test_a_vm_that_is_off_is_looked_at_as_well(plain_stack: Stack) -> None:
    stack = plain_stack
    offline = ("backup", "--offline", "--target", str(stack.target), "--level", "inc")
    stack.vm.quit()
    cli.run(*offline).check()
    stack.go_on(6)
    assert stack.back_up("inc") == "inc"
    stack.vm.quit()
    qemu_img("rebase", "-u", "-b", "", str(stack.image))
    assert "another" in cli.run(*offline).check(4).err


def test_a_snapshot_that_was_committed_costs_no_full(plain_stack: Stack) -> None:
    stack, vm = plain_stack, plain_stack.vm
    overlay = {"node-name": "node-vda", "snapshot-file": str(stack.folder / "over.qcow2")}
    vm.qmp.command("blockdev-snapshot-sync", overlay | {"snapshot-node-name": "over"})
    stack.go_on(6)
    vm.qmp("block-commit", device="over", job_id="commit", base_node="node-vda")
    vm.qmp.wait_event("BLOCK_JOB_READY")
    vm.qmp("block-job-complete", device="commit")
    vm.qmp.wait_event("BLOCK_JOB_COMPLETED")
    stack.go_on(7)
    assert stack.back_up("inc") == "inc"


@pytest.mark.parametrize("job", ["stream all", "stream in part", "commit in the middle"])
def test_a_chain_that_a_job_has_shortened_goes_on(plain_stack: Stack, job: str) -> None:
    stack, vm = plain_stack, plain_stack.vm
    lowest = vm.qmp("query-block")[0]["inserted"]["image"]["backing-image"]["backing-image"]
    assert lowest["filename"] == str(stack.lowest)
    if job == "stream all":
        vm.qmp("block-stream", device="node-vda", job_id="job")
    elif job == "stream in part":
        vm.qmp("block-stream", device="node-vda", job_id="job", base=str(stack.lowest))
    else:
        middle = {"top": str(stack.template), "base": str(stack.lowest)}
        vm.qmp("block-commit", device="node-vda", job_id="job", **middle)
    vm.qmp.wait_event("BLOCK_JOB_COMPLETED")
    stack.go_on(6)
    assert stack.back_up("inc") == "inc"
    vm.restart()
    stack.go_on(7)
    assert stack.back_up("inc") == "inc"


def test_a_chain_that_was_shortened_by_hand(plain_stack: Stack) -> None:
    stack = plain_stack
    stack.vm.quit()
    qemu_img("rebase", "-u", "-b", str(stack.lowest), "-F", "qcow2", str(stack.image))
    stack.assert_whole_again("another")


def test_a_template_that_was_exchanged_while_the_vm_runs(plain_stack: Stack) -> None:
    stack, vm = plain_stack, plain_stack.vm
    new = create(stack.folder / "new.qcow2", SIZE, contents=pattern(SIZE, 2))
    file = {"driver": "file", "filename": str(new)}
    vm.qmp("blockdev-add", driver="qcow2", node_name="new", file=file, read_only=True)
    (own,) = (
        node["node-name"]
        for node in vm.qmp("query-named-block-nodes", flat=True)
        if node["drv"] == "file" and node["file"] == str(stack.image)
    )
    options = {"driver": "qcow2", "node-name": "node-vda", "file": own, "backing": "new"}
    vm.qmp("blockdev-reopen", options=[{**options, "discard": "unmap"}])
    stack.go_on(6)
    assert "new.qcow2" in try_backup(vm, stack.target, "inc").check(4).err
