# SPDX-License-Identifier: Apache-2.0
"""Storage that hangs or answers with I/O errors: the guest goes on, the run fails in order."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import assert_restores, back_up, leftovers, levels, try_backup
from lab.disks import MIB, Disk, create, first_difference, pattern
from lab.guest import Guest
from lab.patience import PATIENCE, wait_until
from lab.qemu import Qemu, StartQemu
from lab.repositories import environment_of
from stock.repositories import repository

SIZE = 32 * MIB


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems")


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """An ext4 file system in an image, mounted."""
    folder.mkdir()
    _run("mkfs.ext4", "-q", "-F", str(image))
    done = subprocess.run(
        ["mount", "-o", "loop", str(image), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no loop device can be had here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        _run("umount", "--lazy", str(folder))


@contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """Every write to this file system waits."""
    _run("fsfreeze", "--freeze", str(folder))
    try:
        yield
    finally:
        _run("fsfreeze", "--unfreeze", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def _wait_for_filter(vm: Qemu) -> None:
    wait_until(
        lambda: vm.qmp("query-block")[0]["inserted"]["node-name"].startswith("qmpbackup-"),
        "a filter",
    )


def _wait_for(log: Path, words: str) -> None:
    wait_until(lambda: log.exists() and words in log.read_text(), f"{words!r} in the log")


def test_a_target_that_hangs_holds_up_nobody_but_the_backup(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 1)))])
    disk = create(tmp_path / "target.img", 256 * MIB, "raw")
    with mounted(disk, tmp_path / "mnt") as mount:
        target = mount / "target"
        slow = ("--level", "full", "--target", target, "--speed-limit", "8M")
        with cli.start("--socket", vm.socket, "backup", *slow) as running:
            _wait_for_filter(vm)
            with hanging(mount):
                for block in range(16):
                    vm.write("vda", block * MIB, 65536, block + 1)
                assert running.process.poll() is None
            running.wait().check()
        point = back_up(vm, target, "inc")
        assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
    assert leftovers(vm) == []


def test_a_target_with_io_errors_costs_the_run_and_nothing_else(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 2)))])
    good = tmp_path / "good"
    back_up(vm, good)
    thin = tmp_path / "thin"
    thin.mkdir()
    # A loop device on a full tmpfs answers writes with EIO.
    _run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(thin))
    try:
        image = thin / "image"
        with image.open("wb") as file:
            file.truncate(256 * MIB)
        with mounted(image, tmp_path / "mnt") as mount:
            arguments = ("backup", "--level", "full", "--target", mount / "target")
            result = cli.run("--socket", vm.socket, *arguments).check(7)
            assert "Traceback" not in result.err
            vm.write("vda", 0, MIB, 5)
    finally:
        _run("umount", str(thin))
    assert leftovers(vm) == []
    point = back_up(vm, good, "inc")
    assert levels(point) == {"vda": "inc"}
    assert_restores(good, point["id"], {"vda": vm.contents("vda")}, tmp_path)


def test_full_storage_of_the_vms_own_images_is_pointed_out(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small))
    try:
        vm = start_qemu([Disk("vda", create(small / "a.qcow2", SIZE))])
        target = tmp_path / "target"
        scratch = ("--scratch", tmp_path)
        arguments = ("backup", "--level", "full", "--target", target, *scratch)
        result = cli.run("--socket", vm.socket, *arguments).check()
        assert "no room" in result.err
        assert "vda" in result.err
        vm.quit()
    finally:
        _run("umount", str(small))


@pytest.mark.parametrize("room", [0, 128, 256])
def test_bitmaps_that_find_no_room_when_the_vm_ends(
    tmp_path: Path, start_qemu: StartQemu, room: int
) -> None:
    """`room` is what is left then, in KiB: for nothing, for a part, or for all of what is stored."""
    small, target, scratch = tmp_path / "small", tmp_path / "target", ("--scratch", tmp_path)
    small.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(small))
    try:
        image = create(small / "a.qcow2", SIZE, contents=pattern(SIZE, 4))
        vm = start_qemu([Disk("vda", image)])
        back_up(vm, target, "full", *scratch)
        vm.write("vda", 0, MIB, 5)
        back_up(vm, target, "inc", *scratch)
        vm.write("vda", MIB, MIB, 6)
        vm.flush()
        contents = vm.contents("vda")
        state = os.statvfs(small)
        filler = small / "filler"
        filler.write_bytes(bytes(state.f_bavail * state.f_frsize - room * 1024))
        vm.quit()
        # 3 is clusters that are wasted, which is no damage.
        checked = subprocess.run(["qemu-img", "check", "-q", str(image)], check=False)
        assert checked.returncode in {0, 3}
        filler.unlink()
        vm.start()
        assert not first_difference(vm.contents("vda"), contents)
        vm.write("vda", 2 * MIB, MIB, 7)
        result = try_backup(vm, target, "inc", *scratch)
        assert result.code in {0, 4}, result
        if result.code == 4:
            assert "vda" in result.err
            assert "no room to store it" in result.err
            assert levels(back_up(vm, target, "auto", *scratch)) == {"vda": "full"}
        point = manifests(target)[-1]["id"]
        assert_restores(target, point, {"vda": vm.contents("vda")}, tmp_path)
        vm.write("vda", 3 * MIB, MIB, 8)
        point = back_up(vm, target, "inc", *scratch)
        assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
        vm.quit()
    finally:
        _run("umount", str(small))


@pytest.mark.guest
@pytest.mark.parametrize("into", ["directory", "repository"])
def test_a_scratch_that_hangs_holds_up_one_guest_write_for_a_bounded_time(
    tmp_path: Path, into: str
) -> None:
    """Written by a guest: a write by the monitor would itself keep QEMU from answering."""
    target = repository(tmp_path) if into == "repository" else tmp_path / "target"
    # The small one is copied while a write to the large one waits, which is not when its wait is over.
    sizes = {"vda": 8 * MIB, "vdb": 96 * MIB}
    disks = [
        Disk(name, create(tmp_path / name, size, contents=pattern(size, len(name))))
        for name, size in sizes.items()
    ]
    image = create(tmp_path / "scratch.img", 256 * MIB, "raw")
    with Guest(disks) as guest, mounted(image, tmp_path / "mnt") as mount:
        back_up(guest, target)
        log = tmp_path / "log"
        slow = ("--level", "full", "--speed-limit", "1M", "--scratch", mount)
        arguments = ("--socket", guest.socket, "--logfile", log, "backup", "--target", str(target))
        with cli.start(*arguments, *slow, env=environment_of(target)) as running:
            _wait_for(log, "The VM stood still")
            with hanging(mount):
                guest.run(f"{_overwrite('vdb', 40)} & echo")
                # A job or a view that ended before would make QEMU wait for the scratch, and with it
                # the guest.
                _wait_for(log, "hangs; the views stay")
                guest.run(_overwrite("vdb", 41))
                guest.run(_overwrite("vda", 1))
                assert guest.qmp("query-status")["running"]
                assert running.process.poll() is None
            result = running.wait().check(6)
        assert "scratch" in result.err
        assert leftovers(guest) == []
        point = back_up(guest, target, "inc")
        expected = {disk.id: guest.contents(disk.id) for disk in disks}
        assert_restores(target, point["id"], expected, tmp_path)


@pytest.mark.guest
@pytest.mark.parametrize("into", ["directory", "repository"])
def test_a_signal_while_a_scratch_hangs(tmp_path: Path, into: str) -> None:
    target = repository(tmp_path) if into == "repository" else tmp_path / "target"
    disk = Disk("vda", create(tmp_path / "vda", SIZE, contents=pattern(SIZE, 5)))
    image = create(tmp_path / "scratch.img", 256 * MIB, "raw")
    with Guest([disk]) as guest, mounted(image, tmp_path / "mnt") as mount:
        back_up(guest, target)
        log = tmp_path / "log"
        slow = ("--level", "full", "--speed-limit", "256K", "--scratch", mount)
        arguments = ("--socket", guest.socket, "--logfile", log, "backup", "--target", str(target))
        with cli.start(*arguments, *slow, env=environment_of(target)) as running:
            _wait_for(log, "The VM stood still")
            with hanging(mount):
                guest.run(f"{_overwrite('vda', 20)} & echo")
                running.signal(signal.SIGTERM)
                _wait_for(log, "hangs; the views stay")
                guest.run("true")
                assert guest.qmp("query-status")["running"]
                assert running.process.poll() is None
            running.wait().check(143)
        assert leftovers(guest) == []
        point = back_up(guest, target, "inc")
        assert_restores(target, point["id"], {"vda": guest.contents("vda")}, tmp_path)


def _overwrite(disk: str, block: int) -> str:
    """A command for a guest that returns when its device has written."""
    return (
        f"dd if=/dev/urandom of=/dev/{disk} bs=1M count=1 seek={block} oflag=direct conv=notrunc"
        " 2>/dev/null"
    )
