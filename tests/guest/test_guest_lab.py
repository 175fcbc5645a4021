# SPDX-License-Identifier: Apache-2.0
"""The test guest itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.disks import MIB, Disk, contents, create
from lab.guest import Guest, GuestError

pytestmark = pytest.mark.guest

SIZE = 64 * MIB


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for the tests of this file, with three disks and a file system on the first."""
    folder = tmp_path_factory.mktemp("guest")
    disks = [Disk(name, create(folder / name, SIZE)) for name in ("vda", "vdb", "vdc")]
    with Guest(disks) as guest:
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        yield guest


def test_the_shell_says_what_failed(guest: Guest) -> None:
    assert guest.run("echo one; echo two >&2") == "one\ntwo\n"
    with pytest.raises(GuestError, match="not found"):
        guest.run("no-such-program")


def test_the_agent_runs_programs(guest: Guest) -> None:
    started = guest.agent("guest-exec", path="/bin/sh", arg=["-c", "exit 7"], capture_output=True)
    ended = guest.agent("guest-exec-status", pid=started["pid"])
    while not ended["exited"]:
        ended = guest.agent("guest-exec-status", pid=started["pid"])
    assert ended["exitcode"] == 7


def test_the_agent_freezes_what_is_mounted(guest: Guest) -> None:
    assert guest.agent("guest-fsfreeze-freeze") == 1
    assert guest.agent("guest-fsfreeze-status") == "frozen"
    assert guest.agent("guest-fsfreeze-thaw") == 1


def test_records_are_on_the_disk_when_acknowledged(guest: Guest) -> None:
    with guest.background("write-records /mnt"):
        guest.run("while [ $(cat /run/acknowledged || echo 0) -lt 20 ]; do usleep 10000; done")
        assert int(guest.run("cat /run/acknowledged")) >= 20
    assert int(guest.run("check-records /mnt/records")) >= 20
    guest.run("cp /mnt/records /tmp/damaged && sed -i 5d /tmp/damaged")
    with pytest.raises(GuestError):
        guest.run("check-records /tmp/damaged")


def test_the_counter_goes_round_the_disks(guest: Guest) -> None:
    with guest.background("write-counter /dev/vdb /dev/vdc"):
        guest.run("while [ $(cat /run/counted || echo 0) -lt 5 ]; do usleep 10000; done")
    guest.sync()
    first, second = (int(guest.contents(disk)[:8]) for disk in ("vdb", "vdc"))
    assert first >= 5
    assert first - 1 <= second <= first


def test_a_disk_with_the_system_on_it_boots(tmp_path: Path) -> None:
    image = create(tmp_path / "root.qcow2", SIZE)
    with Guest([Disk("vda", image)], boot="install") as guest:
        guest.run("echo remembered >/root/note && sync")
        guest.quit()
    assert b"remembered" in contents(image)
    with Guest([Disk("vda", image)], boot="disk") as guest:
        assert guest.run("cat /root/note") == "remembered\n"
        assert "/dev/vda / ext4" in guest.run("cat /proc/mounts")
        assert guest.agent("guest-fsfreeze-freeze") == 1
        guest.agent("guest-fsfreeze-thaw")
