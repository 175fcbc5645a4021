# SPDX-License-Identifier: Apache-2.0
"""A VM without QEMU, as a source of runs: disks in memory, and bitmaps that see every write of its guest.

So a whole run can be tried where no QEMU is, and stopped at any of its steps. What it copies into files
are qcow2 images as QEMU would write them, as far as their readers can tell.
"""

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from qmpbackup.errors import VmError
from qmpbackup.machine.push import NewImage
from qmpbackup.machine.starved import Starved
from qmpbackup.machine.view import Instant
from qmpbackup.model import Bitmap, Consistency, Disk, Vm, VmConfig, VmIdentity
from qmpbackup.nbd.reader import Chunk
from qmpbackup.plan.commands import BITMAP_GRANULARITY as BLOCK
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.progress import WatchDisks
from qmpbackup.service.backup.request import Plan
from qmpbackup.service.backup.rooms import Files
from qmpbackup.undo import UndoStack

IDENTITY = VmIdentity(uuid="5d4a58a5-3f2f-4b0e-9a53-5f2f1f0a7c11", name="memory", host="hv1")
STEPS = ("prepare", "take", "copy", "take down", "close")
"""The steps of a run that may be made to fail, in their order."""


@dataclass
class MemoryBitmap:
    """A bitmap: the blocks that are marked, and whether writes still mark more."""

    marked: set[int] = field(default_factory=set)
    recording: bool = True
    inconsistent: bool = False


@dataclass
class MemoryDisk:
    """A disk and its bitmaps."""

    data: bytearray
    bitmaps: dict[str, MemoryBitmap] = field(default_factory=dict)

    def write(self, offset: int, data: bytes) -> None:
        """What the guest does."""
        self.data[offset : offset + len(data)] = data
        for bitmap in self.bitmaps.values():
            if bitmap.recording:
                bitmap.marked |= set(range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)))


class VmInMemory:
    """The VM. `breaks` are errors by the step at which they are raised, once; `meanwhile` is what its
    guest does after the instant, while it is copied."""

    def __init__(self, disks: Mapping[str, bytes]) -> None:
        self.disks = {name: MemoryDisk(bytearray(data)) for name, data in disks.items()}
        self.breaks: dict[str, BaseException] = {}
        self.meanwhile: Callable[[], None] = lambda: None
        self.state = "running"

    @property
    def contents(self) -> dict[str, bytes]:
        """What its disks hold now."""
        return {name: bytes(disk.data) for name, disk in self.disks.items()}

    @property
    def bitmaps(self) -> dict[str, set[str]]:
        """The names of the bitmaps of each disk."""
        return {name: set(disk.bitmaps) for name, disk in self.disks.items()}

    def step(self, name: str) -> None:
        """A run has come this far."""
        error = self.breaks.pop(name, None)
        if error is not None:
            raise error

    # --- what a run sees of it, see `service.backup.source`

    @property
    def vm(self) -> Vm:
        """The VM as it is."""
        return Vm(
            config=VmConfig(IDENTITY, qemu_version="7.2.0", process="memory"),
            version=(7, 2, 0),
            status=self.state,
            running=self.state == "running",
            has_iothreads=False,
            disks=tuple(_as_found(name, disk) for name, disk in self.disks.items()),
        )

    def again(self) -> "VmInMemory":
        """It is always seen as it is."""
        return self

    def status(self) -> str:
        """What it does."""
        return self.state

    def files(self, disks: Sequence[Disk]) -> Files:
        """Its disks lie in no file."""
        return {disk.format_node: () for disk in disks}

    @contextmanager
    def views(self, plan: Plan, rollback: UndoStack) -> Iterator["MemoryViews"]:
        """The views of a run; where it fails, what is on the stack goes."""
        try:
            yield MemoryViews(self, plan, rollback)
        except BaseException:
            assert rollback.run() == []
            raise

    def retire(self, disk: Disk, bitmap: str) -> None:
        """Forget a bitmap."""
        if self.disks[disk.id].bitmaps.pop(bitmap, None) is None:
            raise VmError(f"There is no bitmap {bitmap}.")

    def mark(self, devices: frozenset[int]) -> None:
        """Nobody clears up after runs in memory."""

    def unmark(self, devices: frozenset[int]) -> None:
        """Likewise."""

    def feed(self, devices: frozenset[int]) -> Starved | None:
        """It never wants for room."""
        del devices
        return None


def _as_found(name: str, disk: MemoryDisk) -> Disk:
    bitmaps = tuple(
        Bitmap(
            name=bitmap,
            count=BLOCK * len(found.marked),
            granularity=BLOCK,
            recording=found.recording,
            busy=False,
            persistent=True,
            inconsistent=found.inconsistent,
        )
        for bitmap, found in disk.bitmaps.items()
    )
    return Disk(
        id=name,
        qom_path=f"/machine/{name}",
        drive=name,
        node=name,
        format_node=name,
        format="qcow2",
        size=len(disk.data),
        filename=f"/memory/{name}.qcow2",
        can_persist=True,
        bitmaps=bitmaps,
    )


@dataclass
class _Shot:
    """A disk at the instant: its bytes, and the blocks that were marked (`None`: all count)."""

    data: bytes
    marked: frozenset[int] | None


class MemoryViews:
    """The views of one run."""

    def __init__(self, vm: VmInMemory, plan: Plan, rollback: UndoStack) -> None:
        self._vm = vm
        self._seats = plan.seats
        self._rollback = rollback
        self._images: Sequence[NewImage] = ()
        self._samples: Mapping[int, Sequence[int]] = {}
        self._shots: dict[str, _Shot] = {}
        self.complaints: list[str] = []
        self.holds_files = False

    def fill(self, files: Sequence[NewImage], *, compress: bool) -> None:
        """Remember the files."""
        del compress
        self._vm.step("prepare")
        self._images = files

    def show(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Remember the samples."""
        self._vm.step("prepare")
        self._samples = samples

    def take(self) -> tuple[Instant, Consistency]:
        """Take the instant, and let the guest go on."""
        taken = time.time()
        for seat in self._seats:
            self._take(seat)
        self._vm.step("take")
        self._vm.meanwhile()
        return Instant(taken, 0.0), Consistency.CRASH

    def _take(self, seat: Seat) -> None:
        disk = self._vm.disks[seat.disk.id]
        marked = disk.bitmaps[seat.base_bitmap].marked if seat.base_bitmap else None
        self._shots[seat.disk.id] = _Shot(
            bytes(disk.data), None if marked is None else frozenset(marked)
        )
        last = (len(disk.data) - 1) // BLOCK
        for name, bitmap in (
            (seat.new_bitmap, MemoryBitmap()),
            (seat.new_end_mark, MemoryBitmap({last}, recording=False)),
        ):
            if name:
                disk.bitmaps[name] = bitmap
                self._rollback.push(f"remove bitmap {name}", partial(disk.bitmaps.pop, name))

    def copy(self, watch: WatchDisks | None) -> None:
        """Write the images."""
        del watch
        for image in self._images:
            shot = self._shots[image.disk_id]
            _write_image(image.fd, shot, image.backing)
            self._vm.step("copy")

    @contextmanager
    def reading(self, watch: WatchDisks | None) -> Iterator[None]:
        """What was taken never changes."""
        del watch
        yield

    @contextmanager
    def open(self, seat: Seat) -> Iterator["MemoryReading"]:
        """A disk for reading."""
        samples = self._samples.get(seat.number, ()) if seat.base_bitmap else ()
        yield MemoryReading(self._shots[seat.disk.id], seat.chunk, samples, self._vm)

    def take_down(self) -> list[str]:
        """Nothing is left of what was taken."""
        self._vm.step("take down")
        self._shots.clear()
        return []

    def close(self) -> None:
        """The files are whoever made them's."""
        self._vm.step("close")


class MemoryReading:
    """One disk at the instant, open for reading in chunks."""

    def __init__(self, shot: _Shot, chunk: int, samples: Sequence[int], vm: VmInMemory) -> None:
        self._data = shot.data
        self._chunk = chunk
        self._vm = vm
        count = -(-len(self._data) // chunk)
        self.changed = bytearray(count)
        for block in range(-(-len(self._data) // BLOCK)) if shot.marked is None else shot.marked:
            self.changed[block * BLOCK // chunk] = 1
        self._wanted = bytearray(self.changed)
        for index in samples:
            self._wanted[index] = 1

    @property
    def bytes_to_read(self) -> int:
        """How much is wanted."""
        return self._wanted.count(1) * self._chunk

    def chunks(self) -> Iterator[Chunk]:
        """Every wanted chunk once."""
        for index in (index for index, wanted in enumerate(self._wanted) if wanted):
            offset = index * self._chunk
            data = memoryview(self._data)[offset : offset + self._chunk]
            yield Chunk(index, 1, offset, len(data), data if any(data) else None)
            self._vm.step("copy")


def _write_image(fd: int, shot: _Shot, backing: str) -> None:
    """A qcow2 image (QEMU docs/interop/qcow2): header, table and block of reference counts, tables of
    both levels, data. What was not marked is not in it."""
    size = len(shot.data)
    blocks = [
        block
        for block in range(-(-size // BLOCK))
        if (
            any(shot.data[block * BLOCK :][:BLOCK]) if shot.marked is None else block in shot.marked
        )
    ]
    per_table = BLOCK // 8
    tables = sorted({block // per_table for block in blocks})
    first_data = 4 + len(tables)
    where = {block: BLOCK * (first_data + at) for at, block in enumerate(blocks)}
    copied = 1 << 63
    extension = struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2") if backing else b""
    head_end = 104 + len(extension) + 8
    entries = -(-size // (BLOCK * per_table))
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, head_end if backing else 0, len(backing), 16, size, 0, entries),
        *(3 * BLOCK, BLOCK, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    os.pwrite(fd, header + extension + bytes(8) + backing.encode(), 0)
    os.pwrite(fd, struct.pack(">Q", 2 * BLOCK), BLOCK)
    os.pwrite(fd, b"\0\1" * (first_data + len(blocks)), 2 * BLOCK)
    for at, table in enumerate(tables):
        os.pwrite(fd, struct.pack(">Q", copied | BLOCK * (4 + at)), 3 * BLOCK + 8 * table)
    for block, offset in where.items():
        table, entry = divmod(block, per_table)
        at = BLOCK * (4 + tables.index(table)) + 8 * entry
        os.pwrite(fd, struct.pack(">Q", copied | offset), at)
        os.pwrite(fd, shot.data[block * BLOCK :][:BLOCK].ljust(BLOCK, b"\0"), offset)
    os.ftruncate(fd, BLOCK * (first_data + len(blocks)))
