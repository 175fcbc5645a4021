# SPDX-License-Identifier: Apache-2.0
"""A VM that stands still: QEMU 7.x keeps descriptors that were taken back until it runs."""

import subprocess
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, leftovers, try_backup
from lab.disks import MIB, Disk, create, pattern
from lab.qemu import Qemu
from lab.repositories import environment_of
from lab.small import free, needs_root, small_disk
from stock.repositories import repository
from stock.scene import WHERE, Where


def ours_open_in(vm: Qemu, folder: Path) -> list[str]:
    """Files in a folder that QEMU has open, also without a name."""
    fds = Path(f"/proc/{vm.pid}/fd")
    names = [str(path.readlink()) for path in fds.iterdir()]
    return [name for name in names if name.startswith(str(folder))]


@needs_root
@pytest.mark.parametrize("where", WHERE)
def test_nothing_of_a_run_stays_open(tmp_path: Path, where: Where) -> None:
    image = create(tmp_path / "a", 64 * MIB, contents=pattern(64 * MIB, 1))
    with (
        small_disk(tmp_path / "target", 300 * MIB) as folder,
        Qemu([Disk("vda", image)], paused=True) as vm,
    ):
        place = folder / "points"
        target = repository(place) if where == "repository" else place
        for _ in range(3):
            back_up(vm, target, "full", "--scratch", folder)
        assert ours_open_in(vm, folder) == []
        used = free(folder)
        prune = ("prune", "--target", str(target), "--keep-last", "1")
        cli.run(*prune, env=environment_of(target)).check()
        if where == "directory":
            assert free(folder) > used + 60 * MIB
        found = cli.run("--socket", vm.socket, "doctor").check()
        assert "died" not in found.out
        vm.qmp("cont")
        found = cli.run("--socket", vm.socket, "doctor").check()
        assert "died" not in found.out
        point = back_up(vm, target, "inc")
        assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)
        assert leftovers(vm) == []
        # Not lazily: nobody holds anything there.
        subprocess.run(["umount", str(folder)], check=True)
        subprocess.run(["mount", "--bind", str(tmp_path), str(folder)], check=True)


@needs_root
def test_a_qemu_of_another_user_keeps_them_and_that_is_said(open_folder: Path) -> None:
    image = create(open_folder / "a", 64 * MIB, contents=pattern(64 * MIB, 1))
    image.chmod(0o666)
    target = open_folder / "target"
    with Qemu([Disk("vda", image)], paused=True, user="nobody") as vm:
        keeps = vm.qmp.version < (9, 1, 0)
        result = try_backup(vm, target, "full", "--scratch", open_folder).check()
        assert ("keeps the files of this run open" in result.err) is keeps
        vm.qmp("cont")
        found = cli.run("--socket", vm.socket, "doctor").check()
        assert "died" not in found.out
        result = try_backup(vm, target, "inc").check()
        assert "died" not in result.err
        assert leftovers(vm) == []
