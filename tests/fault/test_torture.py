# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that writes without pause to three disks, through a full and many incrementals.

Each disk has a writer of its own that goes round and round with direct writes of 4 KiB, and one
writer goes from disk to disk with a number, each write done before the next begins. busybox's `dd`
needs no file system, no cache and no program built for it. Measured under emulation on two cores,
restores of the points included: 1,700 to 2,400 writes a second; the guest's only CPU is the limit.
"""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab.backups import assert_restores, back_up, leftovers, levels, restored
from lab.disks import MIB, Disk, create
from lab.guest import Guest
from lab.repositories import Target
from stock.repositories import repository

pytestmark = pytest.mark.guest

SIZE = 24 * MIB
DISKS = ("vda", "vdb", "vdc")
AREA = 2048
"""Blocks of 4 KiB that a disk's writer goes round in, from 1 MiB on."""

# Random bytes from memory, from another place each time, so that no two rounds write the same.
FLOOD = """
head -c 9437184 /dev/urandom >/run/bytes
for disk in vda vdb vdc; do (
    round=0
    while [ ! -e /run/over ]; do
        dd if=/run/bytes of=/dev/$disk bs=4k count=2048 skip=$((round % 256)) seek=256 \
            oflag=direct conv=notrunc 2>/dev/null || { echo $disk >>/run/failed; exit; }
        round=$((round + 1))
        echo $round >/run/rounds-$disk
    done
) & done
"""

# Sector 0 of each disk in turn; what is acknowledged is on all three. With `fsync` and not `direct`:
# beside other writers of the disk a direct write of busybox's may stay in the guest's cache (seen on
# the live disks, with no backup anywhere).
COUNTER = """
number=0
while [ ! -e /run/over ]; do
    number=$((number + 1))
    printf '%08d' $number >/run/number.new
    mv /run/number.new /run/number
    for disk in vda vdb vdc; do
        dd if=/run/number of=/dev/$disk bs=512 count=1 conv=sync,notrunc,fsync \
            2>/dev/null || echo counter >>/run/failed
    done
    echo $number >/run/counted.new
    mv /run/counted.new /run/counted
done
"""


class Torture:
    """The guest's writers, and what is asked of the points made meanwhile."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self._guest = guest
        self._folder = folder
        self._number = itertools.count()
        self.target: Target = folder / "target"

    def start(self) -> None:
        """Begin to write; return when all writers are at work."""
        for name, script in (("flood", FLOOD), ("counter", COUNTER)):
            self._guest.run(f"cat >/run/{name} <<'END'\n{script}END")
            self._guest.run(f"setsid sh /run/{name} >/run/{name}.log 2>&1 &")
        self._wait_for("[ -e /run/rounds-vda -a -e /run/rounds-vdb -a -e /run/rounds-vdc ]")
        self._wait_for("[ -e /run/counted ]")

    def stop(self) -> None:
        """End the writers; none may have seen an error."""
        self._guest.run("touch /run/over")
        self._wait_for("! pidof dd && ! pgrep -f /run/flood && ! pgrep -f /run/counter")
        self._guest.sync()
        assert self._guest.run("cat /run/failed 2>/dev/null || true") == ""
        log = self._guest.run("dmesg")
        assert not re.search(r"I/O error|blk_update_request|Buffer I/O|hung", log), log

    def _wait_for(self, condition: str) -> None:
        self._guest.run(f"until {condition}; do usleep 20000; done >/dev/null")

    def back_up(self, level: str, *more: str) -> dict[str, int]:
        """Make a point; its numbers are of one instant and as new as the start of the run."""
        acknowledged = int(self._guest.run("cat /run/counted"))
        point = back_up(self._guest, self.target, level, *more)
        issued = int(self._guest.run("cat /run/number"))
        assert set(levels(point).values()) == {"inc" if level == "auto" else level}
        numbers = self._numbers(point["id"])
        first, last = numbers[0], numbers[-1]
        assert first - last in {0, 1} and sorted(numbers, reverse=True) == numbers, numbers
        assert acknowledged <= last <= first <= issued, (acknowledged, numbers, issued)
        return dict(zip(DISKS, numbers, strict=True))

    def _numbers(self, point: str) -> list[int]:
        found = restored(self.target, point, self._folder / f"out{next(self._number)}")
        assert set(found) == set(DISKS)
        return [int(found[disk][:8]) for disk in DISKS]

    def written(self) -> int:
        """How many writes the guest has done."""
        rounds = [int(self._guest.run(f"cat /run/rounds-{disk}")) for disk in DISKS]
        return AREA * sum(rounds) + len(DISKS) * int(self._guest.run("cat /run/counted"))

    def assert_last_point_is_live(self) -> None:
        """A last incremental, of a guest that has ended its writing, is the disks as they are."""
        point = back_up(self._guest, self.target, "inc")
        live = {disk: self._guest.contents(disk) for disk in DISKS}
        assert_restores(self.target, point["id"], live, self._folder / "last")
        assert leftovers(self._guest) == []


@pytest.fixture(params=["", "thread"], ids=["main loop", "iothread"])
def torture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Torture]:
    """A guest that writes to its disks, in QEMU's main loop or in an iothread."""
    thread = str(request.param)
    disks = [Disk(name, create(tmp_path / name, SIZE), iothread=thread) for name in DISKS]
    with Guest(disks, iothreads=[thread] if thread else []) as guest:
        scene = Torture(guest, tmp_path)
        scene.start()
        yield scene


def endure(torture: Torture, runs: Sequence[tuple[str, ...]]) -> None:
    """Make points while the guest writes, each later than the one before."""
    begun, at = time.monotonic(), torture.written()
    last = 0
    for level, *more in runs:
        numbers = torture.back_up(level, *more)
        assert numbers["vda"] > last
        last = numbers["vda"]
    rate = (torture.written() - at) / (time.monotonic() - begun)
    print(f"{rate:.0f} writes a second")
    torture.stop()
    torture.assert_last_point_is_live()


def test_points_of_a_guest_that_writes_without_pause(torture: Torture) -> None:
    endure(torture, [("full",), ("inc",), ("inc", "--compress"), ("diff",), ("inc",), ("inc",)])


def test_points_in_a_repository_of_a_guest_that_writes_without_pause(
    torture: Torture, tmp_path: Path
) -> None:
    torture.target = made = repository(tmp_path / "repository")
    endure(torture, [("full",), ("inc", "--audit", "100%"), ("copy",), ("auto", "--audit", "5%")])
    made.assert_whole(read_data=True)


@pytest.mark.slow
def test_many_points_of_a_guest_that_writes_without_pause(torture: Torture) -> None:
    more = [("inc",), ("inc", "--compress"), ("diff",), ("inc",), ("copy",)] * 8
    endure(torture, [("full",), *more, ("full",), ("inc",), ("inc",)])


@pytest.mark.slow
def test_many_points_in_a_repository_of_a_guest_that_writes_without_pause(
    torture: Torture, tmp_path: Path
) -> None:
    torture.target = made = repository(tmp_path / "repository")
    more = [("inc",), ("inc", "--audit", "10%"), ("copy",), ("auto",)] * 6
    endure(torture, [("full",), *more, ("full",), ("inc",)])
    made.assert_whole(read_data=True)
