# SPDX-License-Identifier: Apache-2.0
"""The main job on real input, with no VM at hand: `make demo`.

A small Linux under QEMU writes all the time. It is backed up by the command lines that a user would
type; every point is restored and checked against what the guest knew at that instant, compared
byte for byte where the guest stood still, and the restored disk is booted. That VM is backed up into a
repository and lost with its disks. A file of it is fetched out of the repository; then it runs again from
there, and is moved to local storage meanwhile.
Leaves nothing behind.
"""

import hashlib
import re
import shlex
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from lab import cli, disks
from lab.booted import kill, listener
from lab.demonstrating import DemoFailed, demonstrated
from lab.disks import MIB, Disk
from lab.guest import Guest, Shell
from lab.patience import PATIENCE
from qmpbackup.service.boot_folder import BootFolder

SIZES = {"vda": 256 * MIB, "vdb": 128 * MIB}
RECORDS = 25
"""How many records are written before and between backups, at least."""


@dataclass(frozen=True)
class Taken:
    """A point as the demo saw it made: how many records the guest had for certain before, and at
    most had after."""

    id: str
    before: int
    after: int


@dataclass(frozen=True)
class Lost:
    """What the VM held that was lost: how many records, and the digest of the file they are in."""

    records: int
    digest: str


class Demo:
    """What all steps share: the folder, and how things are shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[Taken] = []

    def say(self, text: str, seconds: float | None = None) -> None:
        """One thing done, with the time it took in front."""
        taken = f"{seconds:5.1f} s  " if seconds is not None else " " * 9
        print(textwrap.fill(text, 100, initial_indent=taken, subsequent_indent=" " * 9))

    def command(self, line: str, show: str = "$ ") -> tuple[str, float]:
        """Run a command line of the product as typed; its output, and the seconds it took."""
        if show:
            print(f"{show}{line}", flush=True)
        begun = time.monotonic()
        program, *arguments = shlex.split(line)
        environment = {"RESTIC_PASSWORD": "demo", "XDG_STATE_HOME": str(self.folder / "state")}
        result = cli.run(*arguments, program=program, cwd=self.folder, env=environment).check()
        return result.out, time.monotonic() - begun

    def prepare_disks(self) -> list[Disk]:
        """Two empty disks; the guest puts its system on the first."""
        return [
            Disk(name, disks.create(self.folder / f"{name}.qcow2", size))
            for name, size in SIZES.items()
        ]

    def link_sockets(self, guest: Guest) -> None:
        """Give the VM's sockets the short names that the command lines show."""
        (self.folder / "vm.qmp").symlink_to(guest.socket)
        (self.folder / "vm.agent").symlink_to(guest.agent_socket)

    def back_up(self, guest: Guest, level: str, quiesce: bool = True) -> None:
        """Take one point."""
        before = acknowledged(guest)
        agent, freeze = (" --agent-socket vm.agent", " --quiesce") if quiesce else ("", "")
        output, seconds = self.command(
            f"qmpbackup --socket vm.qmp{agent} backup --level {level}{freeze} --target backup"
        )
        found = re.search(r"^Point (\S+): (.*)\.$", output, re.MULTILINE)
        if not found:
            raise DemoFailed(f"no point in what was said: {output}")
        # One record more may be on some disks and not be acknowledged yet.
        self.points.append(Taken(found[1], before, acknowledged(guest) + 1))
        self.say(f"{found[2]}; {before} records before", seconds)

    def list_and_verify(self) -> None:
        """Show what the target holds, and prove it."""
        output, _ = self.command("qmpbackup list --target backup")
        print(textwrap.indent(output, "  "), end="")
        output, seconds = self.command("qmpbackup verify --target backup")
        self.say(output.splitlines()[-1], seconds)

    def restore_all(self) -> None:
        """Restore every point, each into a folder of its own."""
        total = 0.0
        for number, point in enumerate(self.points, start=1):
            line = (
                f"qmpbackup restore --target backup --point {point.id} --output restored/{number}"
            )
            _, seconds = self.command(line, show="$ " if number == 1 else "")
            total += seconds
        self.say(f"for this and the other {len(self.points) - 1} points", total)

    def restored(self, number: int, disk: str) -> Path:
        """The image of a disk of the point with this number, counted from 1."""
        return self.folder / "restored" / str(number) / f"{disk}.qcow2"

    def check_restored(self) -> None:
        """Look into all restored disks with a second VM, which may not write to them."""
        numbers = range(1, len(self.points) + 1)
        images = [
            Disk(f"{disk}-{number}", self.restored(number, disk), read_only=True)
            for number in numbers
            for disk in SIZES
        ]
        letters = iter("abcdefghijklmnop")
        with Guest(images, agent=False) as guest:
            for number in numbers:
                first = self._check_disk(guest, f"/dev/vd{next(letters)}", "root")
                second = self._check_disk(guest, f"/dev/vd{next(letters)}", ".")
                self._check_instant(number, first, second)

    def _check_disk(self, guest: Guest, device: str, folder: str) -> int:
        """Prove a file system clean without its journal's help; the number of its records."""
        header = guest.run(f"dumpe2fs -h {device} 2>&1")
        require("needs_recovery" not in header, f"{device} needs its journal replayed")
        guest.run(f"e2fsck -fn {device}")
        guest.run(f"mount -t ext4 -o ro {device} /mnt")
        records = int(guest.run(f"check-records /mnt/{folder}/records"))
        guest.run("umount /mnt")
        return records

    def _check_instant(self, number: int, first: int, second: int) -> None:
        point = self.points[number - 1]
        require(point.before <= second, f"{point}: records are missing, there are {second}")
        require(first <= point.after, f"{point}: records of later, there are {first}")
        require(second <= first <= second + 1, f"{point}: not one instant: {first} and {second}")
        self.say(
            f"Point {number}: file systems clean, nothing to replay; {first} and {second} "
            f"records ({point.before} to {point.after} possible)"
        )

    def compare_last(self, guest: Guest) -> None:
        """Compare the last point, taken while nothing wrote, with the disks of the VM."""
        begun = time.monotonic()
        for disk in SIZES:
            restored = disks.contents(self.restored(len(self.points), disk))
            difference = disks.first_difference(restored, guest.contents(disk))
            require(not difference, f"{disk}: {difference}")
        size = sum(SIZES.values()) // MIB
        self.say(
            f"All {size} MiB of the last point equal the VM's disks, byte for byte",
            time.monotonic() - begun,
        )

    def boot_restored(self) -> Lost:
        """Start a VM from the last point's disks, which goes on writing where it was, is backed up into a
        repository, and lost; what it had written."""
        begun = time.monotonic()
        images = [Disk(disk, self.restored(len(self.points), disk)) for disk in SIZES]
        with Guest(images, boot="disk", agent=False) as guest:
            guest.run("mount /dev/vdb /mnt")
            with guest.background("write-records /root /mnt"):
                guest.run(wait_for_records(self.points[-1].after + 5))
            records = int(guest.run("check-records /root/records"))
            self.say(
                f"A VM booted from the last point's disks and went on writing: {records} records",
                time.monotonic() - begun,
            )
            records = int(guest.run("sync; check-records /root/records"))
            digest = guest.run("sha256sum /root/records").split()[0]
            (self.folder / "vm.qmp").unlink()
            (self.folder / "vm.qmp").symlink_to(guest.socket)
            self.command("qmpbackup init --target restic:repository")
            _, seconds = self.command("qmpbackup --socket vm.qmp backup --target restic:repository")
            self.say("into a repository", seconds)
        for each in images:
            each.image.unlink()
        self.say("The VM and its disks are lost")
        return Lost(records, digest)

    # The worst day: what is done with a point when the VM is gone. Each step is one method.

    def worst_day(self, lost: Lost) -> None:
        """Fetch a file of the lost VM, run the VM out of the repository, and move it to local storage
        meanwhile."""
        self._fetch_file(lost)
        _, seconds = self.command("qmpbackup boot --target restic:repository --to vm")
        self.say("the VM runs from the repository", seconds)
        try:
            self._settle(lost.records)
        finally:
            there = BootFolder(self.folder / "vm")
            for name in ("settle", "point"):
                pid = listener(there.monitor(name))
                if pid:
                    kill(pid)
            shutil.rmtree(there.sockets, ignore_errors=True)

    def _fetch_file(self, lost: Lost) -> None:
        _, seconds = self.command(
            "qmpbackup files cp --target restic:repository vda:/root/records ."
        )
        fetched = hashlib.sha256((self.folder / "records").read_bytes()).hexdigest()
        require(fetched == lost.digest, "the file fetched is not that of the VM")
        self.say(f"this one file is here, with all its {lost.records} records", seconds)

    def _settle(self, records: int) -> None:
        begun = time.monotonic()
        shell = Shell(BootFolder(self.folder / "vm").sockets / "guest-shell", PATIENCE)
        found = int(shell.run("mount /dev/vdb /mnt; check-records /root/records"))
        require(found == records, f"{found} records, and there were {records}")
        shell.run("write-records /root /mnt >/dev/null 2>&1 & echo $! >/run/writer")
        shell.run(wait_for_records(records + RECORDS))
        self.say("its guest answers, has all records, and writes on", time.monotonic() - begun)
        _, seconds = self.command("qmpbackup settle --to vm")
        (self.folder / "repository").rename(self.folder / "gone")
        shell.run(
            "kill $(cat /run/writer); while [ -e /proc/$(cat /run/writer)/exe ]; do usleep 10000; done; "
            "sync; echo 3 >/proc/sys/vm/drop_caches"
        )
        found = int(shell.run("check-records /root/records"))
        require(found > records, f"{found} records, and there were {records}")
        shell.close()
        self.say(f"on local disks; the repository is gone, and {found} records are there", seconds)


def require(holds: bool, otherwise: str) -> None:
    """Raises `DemoFailed` unless it holds."""
    if not holds:
        raise DemoFailed(otherwise)


def acknowledged(guest: Guest) -> int:
    """The number of the last record that the guest has on all its disks for certain."""
    return int(guest.run("cat /run/acknowledged"))


def wait_for_records(number: int) -> str:
    """A command of the guest that waits until this record is written."""
    return f"until [ $(cat /run/acknowledged || echo 0) -ge {number} ]; do usleep 20000; done 2>/dev/null"


def demonstrate(demo: Demo) -> None:
    """The whole story, top to bottom."""
    begun = time.monotonic()
    with Guest(demo.prepare_disks(), boot="install") as guest:
        demo.link_sockets(guest)
        guest.run("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt")
        with guest.background("write-records /root /mnt"):
            guest.run(wait_for_records(RECORDS))
            demo.say(
                f"A Linux VM on {describe(guest)} writes numbered records, each on its first disk "
                "and then on its second, and other files",
                time.monotonic() - begun,
            )
            for level in ("full", "inc", "inc"):
                demo.back_up(guest, level)
                guest.run(wait_for_records(acknowledged(guest) + RECORDS))
        guest.run("mount -o remount,ro / && mount -o remount,ro /mnt")
        demo.say("Now the VM stands still, for a point that can be compared byte for byte")
        demo.back_up(guest, "inc", quiesce=False)
        demo.list_and_verify()
        demo.restore_all()
        demo.compare_last(guest)
    demo.check_restored()
    demo.worst_day(demo.boot_restored())


def describe(guest: Guest) -> str:
    """QEMU and its accelerator, in words."""
    version = guest.qmp("query-version")["qemu"]
    kvm = guest.qmp("query-kvm")["enabled"]
    return "QEMU {major}.{minor}.{micro}".format(**version) + (
        " with KVM" if kvm else " without KVM"
    )


if __name__ == "__main__":
    sys.exit(demonstrated(lambda folder: demonstrate(Demo(folder))))
