# SPDX-License-Identifier: Apache-2.0
"""A target that remembers points instead of storing them: the third kind, which knows no file at all.

It takes chunks, and is complete enough for whole backups, restores and all commands that read a target.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import blake2b
from typing import Final, Self

from lab.disks import MIB
from qmpbackup.errors import DamagedError, Locked, NoSuchTarget, UsageError
from qmpbackup.model import Point, StoredDisk, VmIdentity
from qmpbackup.plan.finding import Finding, Health
from qmpbackup.plan.retention import Verdict
from qmpbackup.targets import pouring
from qmpbackup.targets.interface import Found, Made, Target, Wish
from qmpbackup.targets.inventory import Inventory, same_vm
from qmpbackup.targets.overview import Overview, held
from qmpbackup.targets.receiver import Arrival, Buffer, ChunkReceiver, Sealed
from qmpbackup.targets.removal import Removed, Sweep
from qmpbackup.targets.report import Proved, Report
from qmpbackup.targets.stored_image import Extent, OpenDisks, Sink

CHUNK: Final = MIB
DAMAGE: Final = "A bit fell over"

Key = tuple[str, str]
"""A disk of a point: the ids of both."""


@dataclass
class RememberedImage:
    """The simplest `StoredImage`: bytes."""

    data: bytes
    is_damaged: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        for at in range(start, end, 65536):
            length = min(65536, end - at)
            yield Extent(at, length, not any(self.data[at : at + length]))

    def read(self, offset: int, length: int) -> bytes:
        if self.is_damaged:
            raise DamagedError(f"{DAMAGE}.")
        return self.data[offset : offset + length]

    def peek(self, offset: int, length: int) -> bytes:
        return self.read(offset, length)

    def needs(self, format_: str) -> int:
        del format_
        return self.size

    def pour(self, sink: Sink) -> None:
        pouring.pour(self, sink)


class MemoryTarget:
    """See `Target`. `images` has the bytes of each disk of each point."""

    chunk = CHUNK
    folder = None
    stores_plain = False
    name = "memory"
    id = "memory"

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.disks: dict[Key, RememberedImage] = {}
        self._holders = 0

    def load(self) -> Inventory:
        return Inventory(tuple(self.points))

    def obstacle(
        self, points: Sequence[Point], point: Point, disk_id: str, *, thorough: bool
    ) -> str:
        del points, thorough
        image = self.disks.get((point.id, disk_id))
        return "" if image and not image.is_damaged else "it is not remembered"

    @staticmethod
    def elsewhere() -> str:
        return ""

    @staticmethod
    def unfinished() -> Sequence[str]:
        return ()

    @contextmanager
    def lock(self, *, wait: float = 0.0) -> Iterator[None]:
        del wait
        if self._holders < 0:
            raise Locked("Points are being removed from memory.")
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[list[str]]:
        with self.lock(wait=wait):
            yield []

    @staticmethod
    def left() -> list[str]:
        return []

    @contextmanager
    def images(
        self,
        points: Sequence[Point],
        point: Point,
        disks: Sequence[StoredDisk],
        *,
        to_read: bool = True,
    ) -> Iterator[OpenDisks]:
        del points, to_read
        yield OpenDisks({disk.id: self.disks[point.id, disk.id] for disk in disks})

    def prove(self, found: Inventory, point: Point | None, share: float) -> Report:
        del share
        points = (point,) if point else found.points
        verdicts = tuple(Proved(each, self._problems(each)) for each in points)
        size = sum(len(image.data) for image in self.disks.values())
        return Report(verdicts, files=len(points), size=size, read_files=len(points))

    def _problems(self, point: Point) -> tuple[str, ...]:
        bad = (disk.id for disk in point.disks if self.disks[point.id, disk.id].is_damaged)
        return tuple(f"{DAMAGE} in disk {each}." for each in bad)

    def receive(
        self, point_id: str, disks: Sequence[Arrival], *, check: bool = False
    ) -> ChunkReceiver:
        del point_id, disks, check
        return MemoryReceiver(self)

    @contextmanager
    def removing(self, sweep: Sweep) -> Iterator["MemoryClearing"]:
        if self._holders:
            raise Locked("Somebody holds what is in memory.")
        self._holders = -1
        try:
            yield MemoryClearing(self, dry_run=sweep.dry_run)
        finally:
            self._holders = 0


class MemoryReceiver(ChunkReceiver):
    """See `ChunkReceiver`."""

    def __init__(self, target: MemoryTarget) -> None:
        self._target = target
        self._disks: dict[str, ArrivingBytes] = {}

    def begin(self, disk_id: str, size: int, base: Point | None) -> "ArrivingBytes":
        known = self._target.disks[base.id, disk_id].data if base else b""
        self._disks[disk_id] = ArrivingBytes(size, known)
        return self._disks[disk_id]

    def drain(self) -> None:
        pass

    def seal(self, disk_id: str) -> Sealed:
        disk = self._disks[disk_id]
        return Sealed(f"memory/{disk_id}", disk.stored, digest(disk.data))

    def commit(self, point: Point) -> None:
        for disk in point.disks:
            data = bytes(self._disks[disk.id].data)
            assert disk.digest == digest(data), "a manifest must say what was sealed"
            self._target.disks[point.id, disk.id] = RememberedImage(data)
        self._target.points.append(point)

    def abort(self) -> None:
        self._disks.clear()


class ArrivingBytes:
    """See `ArrivingDisk`."""

    def __init__(self, size: int, known: bytes) -> None:
        self.count = -(-size // CHUNK)
        self.known = self.count if len(known) == size else min(size, len(known)) // CHUNK
        self.stored = 0
        self.data = bytearray(known[: self.known * CHUNK].ljust(size, b"\0"))
        self._missing = set(range(self.known, self.count))
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def put(self, index: int, data: Buffer, done: Callable[[bool], None]) -> None:
        with self._lock:
            self.stored += len(data)
            differs = self._enter(index, bytes(data))
        done(differs)

    def zeros(self, first: int, count: int) -> Sequence[int]:
        with self._lock:
            size = len(self.data)
            indexes = range(first, first + count)
            return [
                each
                for each in indexes
                if self._enter(each, bytes(min(CHUNK, size - each * CHUNK)))
            ]

    def _enter(self, index: int, data: bytes) -> bool:
        place = slice(index * CHUNK, index * CHUNK + len(data))
        differs = index < self.known and self.data[place] != data
        self.data[place] = data
        self._missing.discard(index)
        return differs


@dataclass
class MemoryClearing:
    """See `Clearing`."""

    target: MemoryTarget
    dry_run: bool
    poor: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self.target.points)

    def perform(self, verdicts: Sequence[Verdict]) -> Removed:
        gone = {each.point.id for each in verdicts if not each.kept}
        keys = [key for key in self.target.disks if key[0] in gone]
        freed = sum(len(self.target.disks[key].data) for key in keys)
        if not self.dry_run:
            self.target.points[:] = [each for each in self.points if each.id not in gone]
            for key in keys:
                del self.target.disks[key]
        return Removed(tuple(verdicts), freed)


@dataclass
class Memory:
    """See `Entrance`, and `Opening`: a place in memory, where a backup makes a target."""

    target: MemoryTarget | None = None
    chunk = CHUNK
    holds_several = False
    spelled = "memory"

    def asked(self) -> Self:
        return self

    @staticmethod
    def environment() -> Mapping[str, str]:
        return {}

    def handed_on(self) -> tuple[str, Mapping[str, str]]:
        return self.spelled, {}

    @contextmanager
    def opened(self, vm: str = "") -> Iterator[Target]:
        if self.target is None:
            raise NoSuchTarget("Nothing is remembered.")
        if vm and vm not in {point.vm.identity.name for point in self.target.points}:
            raise NoSuchTarget(f"No VM {vm} is remembered.")
        yield self.target

    def of(self, vm: VmIdentity) -> AbstractContextManager[Target]:
        del vm
        return self.opened()

    def newest(self, vm: str) -> Point | None:
        del vm
        return self.target.points[-1] if self.target and self.target.points else None

    def overview(self, now: datetime) -> Overview:
        if self.target is None:
            raise NoSuchTarget("Nothing is remembered.")
        summed = held(self.target.load(), now)
        return Overview((summed,) if summed else ())

    def advice(
        self, vm: VmIdentity, wait: float, *, strict: bool
    ) -> Generator[Finding, None, Found | None]:
        del vm, wait, strict
        target = self.target or MemoryTarget()
        yield Finding("target", Health.FINE, f"{len(target.points)} points are remembered")
        return Found(target, target.load())

    @contextmanager
    def opening(self, wish: Wish) -> Iterator["MemoryOpening"]:
        yield MemoryOpening(self, wish)

    def sweep(self, wait: float) -> None:
        del wait

    def make(self) -> Made:
        raise UsageError("Memory is there.")


@dataclass(frozen=True)
class MemoryOpening:
    """See `Opening`."""

    memory: Memory
    wish: Wish

    @contextmanager
    def found(self, vm: VmIdentity) -> Iterator[Found]:
        target = self.memory.target
        if target is None:
            yield Found(MemoryTarget(), Inventory())
            return
        stored = target.load()
        if stored.points and not same_vm(stored.points[-1].vm.identity, vm):
            raise UsageError("The target belongs to another VM.")
        with target.writing(self.wish.lock_wait):
            yield Found(target, stored, None if self.wish.look_only else target)

    @contextmanager
    def made(self, vm: VmIdentity, new_id: str) -> Iterator[Target]:
        del vm
        self.memory.target = target = MemoryTarget()
        assert target.id == new_id
        with target.writing(self.wish.lock_wait):
            yield target


def digest(data: Buffer) -> str:
    """What a manifest says of bytes."""
    return f"blake3:{blake2b(data, digest_size=32).hexdigest()}"


def damage(target: MemoryTarget, point: Point, disk_id: str) -> str:
    """Spoil a disk of a point; how that is called."""
    key = point.id, disk_id
    target.disks[key] = replace(target.disks[key], is_damaged=True)
    return DAMAGE
