# SPDX-License-Identifier: Apache-2.0
"""File systems that cannot do what a backup needs: files written at random, files as large as a disk."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import cli
from lab.backups import leftovers, try_backup
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu

STORAGE = 7


@contextmanager
def rclone(folder: Path) -> Iterator[Path]:
    """What rclone shows of a folder `behind`, as it does unless it is told to keep copies."""
    behind, shown = folder / "behind", folder / "shown"
    shown.mkdir()
    options = ("--config", "/dev/null", "--cache-dir", folder / "cache")
    command = ["rclone", "mount", *map(str, options), str(behind), str(shown)]
    with subprocess.Popen(command) as process:
        try:
            while not shown.is_mount():
                assert process.poll() is None
                time.sleep(0.02)
            yield shown
        finally:
            subprocess.run(["umount", str(shown)], check=False)
            process.terminate()


@pytest.mark.skipif(not shutil.which("rclone"), reason="rclone is not installed")
def test_a_target_that_cannot_be_written_at_random(tmp_path: Path) -> None:
    disk = Disk("vda", create(tmp_path / "a", 10 * MIB))
    with Qemu([disk]) as vm:
        try_backup(vm, tmp_path / "behind" / "target", "full").check()
        with rclone(tmp_path) as shown:
            target = shown / "target"
            for place in (target, shown / "new"):
                said = try_backup(vm, place).check(STORAGE).err
                assert "cannot be written at random" in said
                assert "--vfs-cache-mode" in said
                doctor = cli.run("--socket", vm.socket, "doctor", "--target", place).check(1)
                assert "cannot be written at random" in doctor.out
            assert leftovers(vm) == []
            assert len(cli.run("list", "--target", target, "--json").check().objects) == 1
            assert "all whole" in cli.run("verify", "--target", target).check().out
            assert not list(target.glob(".probe*"))


def test_a_scratch_larger_than_a_file_may_be(tmp_path: Path) -> None:
    """The disk is next to empty, and so is its scratch, but ext4 has no files above 16 TiB."""
    image = tmp_path / "ext4"
    small = tmp_path / "small"
    small.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(small)], check=True)
    try:
        disk = Disk("vda", create(small / "a", 20 << 40))
        with Qemu([disk]) as vm:
            target = tmp_path / "target"
            said = try_backup(vm, target, "full").check(STORAGE).err
            assert "has no files of 20.0 TiB" in said
            assert "--scratch" in said
            doctor = cli.run("--socket", vm.socket, "doctor").check(1)
            assert "has no files of 20.0 TiB" in doctor.out
            assert sorted(path.name for path in small.iterdir()) == ["a", "lost+found"]
            assert leftovers(vm) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
