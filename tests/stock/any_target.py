# SPDX-License-Identifier: Apache-2.0
"""Points in a target of any kind, made without a VM, by nothing but what `targets.interface` says.

What a point must give back is kept beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from lab.damage import flip
from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.restic.pack import BlobType
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Found, Target, Wish
from qmpbackup.targets.receiver import Arrival, ChunkReceiver, FileReceiver, Receiver, Sealed
from qmpbackup.targets.removal import Sweep
from qmpbackup.targets.repository.chunk_list import numbers
from qmpbackup.targets.repository.entrance import RepositoryEntrance
from stock import in_memory
from stock.in_memory import Memory
from stock.repositories import held_alone
from stock.stored import MIB, Write, run, tree
from stock.stored_repository import StoredRepository

VM = VmIdentity("7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a", "vm", "/vm", "hv1")
OTHER = replace(VM, uuid="00000000-6f0c-4d3c-9a27-0d5c1f1c2b3a", name="other")
START: Final = datetime(2026, 11, 2, 3, 0, tzinfo=UTC)
WILD: Final = "a/../b: c"
"""A disk whose name is no name of a file."""

SIZES: Final = {"hd0": 4 * MIB, WILD: 2 * MIB + 512}

Writes = Mapping[str, Sequence[Write]]

FIRST: Final = {
    "hd0": [Write(1, 0, 100_000), Write(2, 3 * MIB, 65536)],
    WILD: [Write(3, 2 * MIB, 512)],
}
SECOND: Final = {"hd0": [Write(4, 65536, 2 * MIB), Write(0, MIB, 512)], WILD: []}
THIRD: Final = {
    "hd0": [Write(0, 3 * MIB, MIB), Write(6, 100 * 512, 512)],
    WILD: [Write(5, 0, MIB)],
}
"""What the guest writes before each of three points: data over data, zeros over data, the last sector."""


@dataclass
class Place:
    """Where a target is, or will be, of disks of these `sizes`. `expected` has the bytes of each point.

    `spoil` damages a disk of a point, so that earlier points can do without, and says how that must be
    called. `alone` holds the target as who removes points does. `everything` is all that is stored, to
    be compared with what it is later.
    """

    address: Address
    spoil: Callable[[Point, str], str]
    alone: Callable[[], AbstractContextManager[object]]
    everything: Callable[[], object]
    sizes: Mapping[str, int] = field(default_factory=lambda: SIZES)
    expected: dict[tuple[str, str], bytes] = field(default_factory=dict)

    @contextmanager
    def held(self, vm: VmIdentity = VM) -> Iterator[tuple[Target, Found]]:
        """The target as a backup holds it, made where it was not there."""
        with ExitStack() as stack:
            door = stack.enter_context(opening.entrance(self.address).opening(Wish(strict=True)))
            found = stack.enter_context(door.found(vm))
            made = found.target or stack.enter_context(door.made(vm, found.ground.id))
            yield made, found

    @contextmanager
    def read(self) -> Iterator[Target]:
        """The target as those who read have it."""
        with opening.entrance(self.address).opened() as target, target.lock():
            yield target

    @staticmethod
    def contents(target: Target, point: Point) -> dict[str, bytes]:
        """What the disks of a point read as."""
        with target.images(target.load().points, point, point.disks) as opened:
            return {name: bytes(image.read(0, image.size)) for name, image in opened.images.items()}

    def add(self, writes: Writes, base: Point | None = None) -> Point:
        """Commit a point with these writes since `base`, or since all was zeros."""
        with self.held() as (target, found):
            point, receiver = self.begun(target, found.stored.points, writes, base)
            receiver.commit(point)
        return point

    def begun(
        self, target: Target, points: Sequence[Point], writes: Writes, base: Point | None = None
    ) -> tuple[Point, Receiver]:
        """A point of which all is stored, and nothing is committed."""
        number = max((each.sequence for each in points), default=0) + 1
        time = START + timedelta(hours=number)
        level, parent = (Level.INC, base.id) if base else (Level.FULL, None)
        point_id = f"{time:%Y%m%dT%H%M%SZ}-{number:06x}"
        receiver = target.receive(
            point_id, [Arrival(disk, level, self.sizes[disk]) for disk in writes]
        )
        disks = []
        for name, changes in writes.items():
            size = self.sizes[name]
            before = self.expected[base.id, name] if base else bytes(size)
            self.expected[point_id, name] = data = applied(before, changes)
            sealed = _filled(receiver, name, changes, data, base)
            disks.append(
                StoredDisk(name, level, sealed.file, parent, size, sealed.size, sealed.digest)
            )
        config = VmConfig(VM, "7.2.22", "q35", ("qemu-system-x86_64", "-name", "vm"))
        crash = Consistency.CRASH
        return Point(point_id, number, time, level, parent, crash, config, tuple(disks)), receiver


def applied(data: bytes, writes: Sequence[Write]) -> bytes:
    """Bytes after some writes."""
    changed = bytearray(data)
    for each in writes:
        changed[each.offset : each.offset + each.length] = bytes([each.value]) * each.length
    return bytes(changed)


def _filled(
    receiver: Receiver, disk_id: str, writes: Sequence[Write], data: bytes, base: Point | None
) -> Sealed:
    """Hand a disk over, in the way that the target wants."""
    match receiver:
        case FileReceiver():
            _fill(receiver.file(disk_id).path, disk_id, writes, len(data), base)
        case ChunkReceiver():
            _hand_over(receiver, disk_id, writes, data, base)
    return receiver.seal(disk_id)


def _fill(path: Path, disk_id: str, writes: Sequence[Write], size: int, base: Point | None) -> None:
    """What QEMU does: an image with the writes, whose backing file is that of the point before."""
    link: list[str] = []
    if base is not None and (disk := base.disk(disk_id)) is not None:
        link = ["-u", "-b", disk.file.rpartition("/")[2], "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *link, str(path), str(size))
    commands = (f"write -P {each.value} {each.offset} {each.length}" for each in writes)
    run("qemu-io", "-f", "qcow2", *(part for each in commands for part in ("-c", each)), str(path))


def _hand_over(
    receiver: ChunkReceiver,
    disk_id: str,
    writes: Sequence[Write],
    data: bytes,
    base: Point | None,
) -> None:
    """What a run does: of an incremental the chunks that were written to, zeros as such."""
    disk = receiver.begin(disk_id, len(data), base)
    touched = {
        index
        for each in writes
        for index in range(each.offset // MIB, (each.offset + each.length - 1) // MIB + 1)
    }
    for index in sorted(touched) if base else range(disk.count):
        chunk = data[index * MIB : (index + 1) * MIB]
        if any(chunk):
            disk.put(index, chunk, lambda _differs: None)
        else:
            disk.zeros(index, 1)
    receiver.drain()
    assert disk.is_complete


def folder(path: Path, patch: pytest.MonkeyPatch) -> Place:
    """A folder in which nothing is yet."""
    del patch
    target = path / "target"

    def spoil(point: Point, disk_id: str) -> str:
        disk = point.disk(disk_id)
        assert disk is not None
        flip(target / disk.file, -100)
        return str(target / disk.file)

    return Place(target, spoil, lambda: _alone(target), lambda: tree(target))


@contextmanager
def _alone(address: Address) -> Iterator[None]:
    with opening.entrance(address).opened() as target, target.removing(Sweep()):
        yield


def repository(path: Path, patch: pytest.MonkeyPatch) -> Place:
    """A repository in which nothing is yet."""
    made = StoredRepository(path)
    for name, value in made.made.environment.items():
        patch.setenv(name, value)

    def spoil(point: Point, disk_id: str) -> str:
        with RepositoryEntrance(made.place).opened() as target:
            target.load()
            disk = point.disk(disk_id)
            assert disk is not None
            chunks = target.contents(point, disk)
            chunk = chunks.id_of(next(numbers(chunks.with_data())))
            found = target.repository.index.find(BlobType.DATA, chunk)
        assert found is not None
        pack = found.pack.hex()
        flip(made.path / "data" / pack[:2] / pack, found.offset + 20)
        return pack

    def everything() -> object:
        return {name: data for name, data in tree(made.path).items() if "locks/" not in name}

    return Place(made.place, spoil, lambda: held_alone(made.made), everything)


def memory(path: Path, patch: pytest.MonkeyPatch) -> Place:
    """A place in memory."""
    del path, patch
    made = Memory()

    def spoil(point: Point, disk_id: str) -> str:
        assert made.target is not None
        return in_memory.damage(made.target, point, disk_id)

    def everything() -> object:
        held = made.target
        return held and (list(held.points), dict(held.disks))

    return Place(made, spoil, lambda: _alone(made), everything)


KINDS: Final = (folder, repository, memory)
