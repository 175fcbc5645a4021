# SPDX-License-Identifier: Apache-2.0
"""Views are read over NBD while a Linux guest writes without pause, and QEMU copies the same views by
itself, mostly meanwhile: both find the same bytes."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.backups import leftovers
from lab.disks import MIB, Disk, contents, create, first_difference
from lab.guest import Guest
from qmpbackup.machine import push
from qmpbackup.machine.pull import Method
from qmpbackup.plan.names import RunNames
from qmpbackup.undo import UndoStack
from stock.pulling import CHUNK, Puller, Read

pytestmark = pytest.mark.guest

SIZES = {"vda": 24 * MIB, "vdb": 24 * MIB}

# Random bytes from memory, from another place each time, so that no two rounds write the same.
FLOOD = """
head -c 9437184 /dev/urandom >/run/bytes
for disk in vda vdb; do (
    round=0
    while [ ! -e /run/over ]; do
        dd if=/run/bytes of=/dev/$disk bs=4k count=2048 skip=$((round % 256)) \
            seek=$((round * 37 % 4096)) oflag=direct conv=notrunc 2>/dev/null || {
            echo $disk >>/run/failed; exit; }
        round=$((round + 1))
        touch /run/going-$disk
    done
) & done
"""


@pytest.fixture(params=["", "thread"], ids=["main loop", "iothread"])
def guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guest]:
    """A guest that floods its disks, in QEMU's main loop or in an iothread."""
    thread = str(request.param)
    disks = [
        Disk("vda", create(tmp_path / "a", SIZES["vda"]), iothread=thread),
        Disk("vdb", create(tmp_path / "b", SIZES["vdb"], "raw"), "raw", iothread=thread),
    ]
    with Guest(disks, iothreads=[thread] if thread else []) as started:
        started.run(f"cat >/run/flood <<'END'\n{FLOOD}END")
        started.run("setsid sh /run/flood >/run/flood.log 2>&1 &")
        started.run("until [ -e /run/going-vda -a -e /run/going-vdb ]; do usleep 20000; done")
        yield started


def read_and_copied(run: Puller, folder: Path) -> tuple[dict[str, Read], dict[str, bytes]]:
    """What we read of the views, and what QEMU copied of them meanwhile."""
    names, undo = RunNames("0" * 6), UndoStack()
    images = []
    for seat in run.seats:
        path = folder / f"copy-{seat.disk.id}"
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        images.append(push.NewImage(seat, fd, path))
    push.create_images(run.monitor, images, names, push.CopyOptions(), undo)
    run.take()
    found: dict[str, Read] = {}
    reading = threading.Thread(target=lambda: found.update(run.read()))
    reading.start()
    if run.pull.way is Method.V1:
        reading.join()  # QEMU 10.0 hangs as a whole, now and then, if a job starts beside it
    push.copy_all(run.monitor, images, run.view, names, push.CopyOptions(), undo)
    reading.join()
    run.pull.finish()
    assert undo.run() == []
    for image in images:
        os.close(image.fd)
    return found, {image.disk_id: contents(image.path, "qcow2") for image in images}


def test_what_is_read_is_what_qemu_copies(guest: Guest, tmp_path: Path) -> None:
    endure(guest, tmp_path, 6)


@pytest.mark.slow
def test_what_is_read_is_what_qemu_copies_many_times(guest: Guest, tmp_path: Path) -> None:
    endure(guest, tmp_path, 60)


def endure(guest: Guest, folder: Path, runs: int) -> None:
    """A full, incrementals while the guest writes, and one of the guest that writes no more."""
    state = {disk: bytes(size) for disk, size in SIZES.items()}
    bitmaps: dict[str, str] = {}
    for number in range(runs + 1):
        if number == runs:
            guest.run("touch /run/over; until ! pidof dd >/dev/null; do usleep 20000; done; sync")
        with Puller(guest, folder, bitmaps) as run:
            found, copied = read_and_copied(run, folder)
        assert run.complaints == []
        for disk, read in found.items():
            state[disk] = read.over(state[disk])
            for index in read.wanted:
                piece = copied[disk][index * CHUNK :][:CHUNK]
                assert not first_difference(read.chunks[index], piece), (number, disk, index)
        for disk, name in bitmaps.items():
            node = next(seat.disk.format_node for seat in run.seats if seat.disk.id == disk)
            guest.qmp.command("block-dirty-bitmap-remove", {"node": node, "name": name})
        bitmaps = run.bitmaps
    assert guest.run("cat /run/failed 2>/dev/null || true") == ""
    for disk, before in state.items():
        assert not first_difference(before, guest.contents(disk)), disk
    assert leftovers(guest) == []
