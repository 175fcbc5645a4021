# SPDX-License-Identifier: Apache-2.0
"""A Linux runs from a point in a repository, writes, and is moved to local storage meanwhile."""

import json
import os
from pathlib import Path

import pytest

from lab import cli
from lab.backups import back_up, restored
from lab.booted import Booted, booted
from lab.disks import MIB, Disk, create, first_difference
from lab.guest import Guest, Shell
from lab.patience import PATIENCE, wait_until
from lab.repositories import Repository, environment_of
from stock.repositories import repository

pytestmark = pytest.mark.guest

WRITER = """
number=0
while [ ! -e /run/over ]; do
    number=$((number + 1))
    head -c 300000 /dev/urandom >/m/file-$number
    (cd /m && sha256sum file-$number) >>/run/sums
    sync
done
cp /run/sums /m/sums
sync
touch /run/written
"""


@pytest.fixture
def made(tmp_path: Path) -> Repository:
    """A repository with a point of a guest that is no more, which had checksums of its files."""
    target = repository(tmp_path)
    disk = Disk("vda", create(tmp_path / "disk", 128 * MIB))
    with Guest([disk], args=("-name", "worst")) as guest:
        guest.run("mkfs.ext4 -q -F /dev/vda && mkdir -p /m && mount /dev/vda /m")
        guest.run("head -c 9000000 /dev/urandom >/m/old && cd /m && sha256sum old >before && sync")
        back_up(guest, target)
    disk.image.unlink()
    return target


def test_a_linux_runs_from_a_point_and_is_settled(made: Repository, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **environment_of(made),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    with booted("--target", str(made), "--to", tmp_path / "vm", env=environment) as vm:
        shell = Shell(vm.sockets / "guest-shell", PATIENCE)
        shell.run("mkdir -p /m && mount /dev/vda /m && cd /m && sha256sum -c before")
        shell.run(f"cat >/run/writer <<'END'\n{WRITER}END")
        shell.run("setsid sh /run/writer >/run/writer.log 2>&1 &")
        shell.run("until [ -s /run/sums ]; do usleep 20000; done")
        settled = cli.run("settle", "--to", vm.folder, "--json", env=environment).check()
        assert json.loads(settled.out)["stood_still"] > 0
        wait_until(lambda: vm.server is None, "the end of the server")
        elsewhere = Path(made.location).rename(tmp_path / "elsewhere")
        shell.run("touch /run/over; until [ -e /run/written ]; do usleep 20000; done")
        shell.run("echo 3 >/proc/sys/vm/drop_caches; cd /m && sha256sum -c before sums")
        shell.run("umount /m")
        elsewhere.rename(made.location)
        assert_next_is_incremental(vm, made, tmp_path)
        shell.close()
        started_again(vm, environment)


def assert_next_is_incremental(vm: Booted, target: Repository, folder: Path) -> None:
    """An incremental to the point that it came from has no less than a full that is made afterwards."""
    vm.disconnect()
    incremental = back_up(vm, target, "inc")
    assert incremental["disks"][0]["level"] == "inc"
    full = back_up(vm, folder / "another", "full")
    found = target.restored(incremental["id"])
    expected = restored(folder / "another", full["id"], folder)
    assert found.keys() == expected.keys()
    for disk, contents in expected.items():
        assert not first_difference(found[disk], contents), disk


def started_again(vm: Booted, environment: dict[str, str]) -> None:
    """What was settled is all of it: also for a QEMU that is killed and started anew."""
    vm.kill()
    cli.run("boot", "--to", vm.folder, env=environment).check()
    shell = Shell(vm.sockets / "guest-shell", PATIENCE)
    shell.run("mkdir -p /m && mount /dev/vda /m && cd /m && sha256sum -c before sums")
    shell.close()
