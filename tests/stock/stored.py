# SPDX-License-Identifier: Apache-2.0
"""Targets made without a VM: real qcow2 files by qemu-img, manifests by the product's own API.

What a point must give back is kept beside it, written by other means than the images.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.targets.folder.target import DirectoryTarget

MIB = 1024 * 1024
VM = VmIdentity(uuid="7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a", name="vm", address="/run/vm.qmp")
_BASES = {Level.INC: {Level.FULL, Level.INC, Level.DIFF}, Level.DIFF: {Level.FULL}}
START = datetime(2026, 11, 2, 3, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Write:
    """Bytes `value` over `length` bytes at `offset`."""

    value: int
    offset: int
    length: int


@dataclass
class Stored:
    """A target with points, and for each point and disk the bytes that it must give back."""

    path: Path
    size: int = 4 * MIB
    compress: bool = False
    points: list[Point] = field(default_factory=list)
    expected: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.target = DirectoryTarget.open_or_create(self.path, VM)

    def add(self, level: Level, writes: Mapping[str, Sequence[Write]]) -> Point:
        """Commit a point of all disks in `writes`, each with these writes since the last point."""
        number = max((point.sequence for point in self.points), default=0) + 1
        time = START + timedelta(hours=number)
        point_id = f"{time:%Y%m%dT%H%M%SZ}-{number:06x}"
        with self.target.lock(write=True):
            pending = self.target.begin(point_id, [(disk, level) for disk in writes], time)
            disks = []
            for disk_id, changes in writes.items():
                base = self._base(disk_id, level)
                self._fill(pending.files[disk_id].path, point_id, disk_id, changes, base)
                size, digest = pending.seal(disk_id)
                name = pending.files[disk_id].name
                parent = base[0].id if base else None
                disks.append(
                    StoredDisk(disk_id, level, name, parent, self.size, size, digest, "qcow2")
                )
            point = Point(
                id=point_id,
                sequence=number,
                time=time,
                level=level,
                parent=self.points[-1].id if level is Level.INC else None,
                consistency=Consistency.CRASH,
                vm=VmConfig(VM, "7.2.22", "q35", ("qemu-system-x86_64", "-name", "vm")),
                disks=tuple(disks),
            )
            pending.commit(point)
        self.points.append(point)
        return point

    def file(self, point: Point, disk_id: str) -> Path:
        """The file of a disk of a point."""
        disk = point.disk(disk_id)
        assert disk is not None
        return self.path / disk.file

    def manifest(self, point: Point) -> Path:
        """The manifest of a point."""
        return self.path / "points" / f"{point.id}.json"

    def _base(self, disk_id: str, level: Level) -> tuple[Point, StoredDisk] | None:
        """What the next file of a disk builds on: the last point, or the last full."""
        if level not in {Level.INC, Level.DIFF}:
            return None
        return next(
            (point, disk)
            for point in reversed(self.points)
            if (disk := point.disk(disk_id)) and disk.level in _BASES[level]
        )

    def _fill(
        self,
        path: Path,
        point_id: str,
        disk_id: str,
        writes: Sequence[Write],
        base: tuple[Point, StoredDisk] | None,
    ) -> None:
        contents = bytearray(self.size)
        link: list[str] = []
        if base is not None:
            contents = bytearray(self.expected[base[0].id, disk_id].ljust(self.size, b"\0"))
            link = ["-u", "-b", base[1].file.rpartition("/")[2], "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *link, str(path), str(self.size))
        commands: list[str] = []
        for write in writes:
            contents[write.offset : write.offset + write.length] = (
                bytes([write.value]) * write.length
            )
            how = "write -c" if self.compress else "write"
            commands += ["-c", f"{how} -P {write.value} {write.offset} {write.length}"]
        run("qemu-io", "-f", "qcow2", *commands, str(path))
        self.expected[point_id, disk_id] = bytes(contents)


def run(*arguments: str) -> str:
    """Run a program that must succeed; return what it prints."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def contents(image: Path, format_: str) -> bytes:
    """All bytes of an image, by means of qemu-img alone."""
    copy = image.with_name(image.name + ".contents")
    run("qemu-img", "convert", "-f", format_, "-O", "raw", str(image), str(copy))
    try:
        return copy.read_bytes()
    finally:
        copy.unlink()


def tree(path: Path) -> dict[str, bytes | str]:
    """Everything in a folder, but for the files that locks are on."""
    return {
        str(each.relative_to(path)): str(each.readlink())
        if each.is_symlink()
        else each.read_bytes()
        for each in path.rglob("*")
        if (each.is_symlink() or each.is_file()) and not each.name.startswith(".lock")
    }
