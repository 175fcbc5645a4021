# SPDX-License-Identifier: Apache-2.0
"""Targets of a run over all VMs that are not there, or are there and full."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu
from lab.small import needs_root, small_folder

pytestmark = needs_root

SOME_FAILED = 14
OK = 0


@dataclass
class Host:
    """A host with one VM, which has no change bitmaps, and a target that can be taken away."""

    folder: Path
    vm: Qemu
    target: Path
    more: str = ""

    def run(self, *words: str) -> cli.Result:
        (self.folder / "config.toml").write_text(
            f"""
[defaults]
limits = {{ pause = "1h" }}
retry = {{ times = 0 }}
[vm.db1]
socket = "{self.vm.socket}"
[target.main]
location = "{self.target}/{{vm}}"
verify = {{ every = "" }}
min_free = "0%"
{self.more}
"""
        )
        return cli.run(
            *words,
            env={
                "XDG_STATE_HOME": str(self.folder / "state"),
                "QMPBACKUP_CONFIG": str(self.folder / "config.toml"),
            },
        )

    @property
    def points(self) -> int:
        return len(self.run("list", "--target", f"{self.target}/db1", "--json").objects)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        vm = stack.enter_context(Qemu([Disk("vda", create(tmp_path / "vda", 4 * MIB))], name="db1"))
        (tmp_path / "mount").mkdir()
        (tmp_path / "disk").mkdir()
        yield Host(tmp_path, vm, tmp_path / "mount")


@contextmanager
def mounted(host: Host) -> Iterator[None]:
    subprocess.run(["mount", "--bind", host.folder / "disk", host.target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", host.target], check=True)


def test_an_unmounted_folder_is_not_begun_anew(host: Host) -> None:
    with mounted(host):
        host.run("run").check()
    failed = host.run("run", "--all").check(SOME_FAILED)
    assert "perhaps it is not mounted" in failed.err
    assert list(host.target.iterdir()) == []
    assert host.run("status", "--check").code != OK
    with mounted(host):
        host.run("run", "--all").check()
        assert host.points == 2
    host.run("status", "--check")
    host.target = host.folder / "elsewhere"
    host.run("run", "--all").check()
    assert host.points == 1, "a target that was moved begins anew"


def test_a_disk_that_is_taken_away_is_passed_over_and_a_full_one_is_not(host: Host) -> None:
    host.more = 'when_gone = "skip"'
    with mounted(host):
        host.run("run").check()
    skipped = host.run("run", "--all").check()
    assert "1 skipped" in skipped.out
    assert list(host.target.iterdir()) == []
    host.run("status", "--check").check()
    with mounted(host):
        host.run("run").check()
        assert host.points == 1
    host.vm.write("vda", 0, 4 * MIB, 0x21)
    with small_folder(host.folder / "small", 2 * MIB) as host.target:
        host.run("run", "--all").check(SOME_FAILED)
        assert host.run("status", "--check").code != OK
