# SPDX-License-Identifier: Apache-2.0
"""The terms of the project as values: VM, disk, bitmap, restore point.

Frozen dataclasses without behaviour beyond what follows from their own fields. Sizes are bytes,
times are aware datetimes in UTC.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum


class Level(StrEnum):
    """What a run is asked for, and what a disk then gets (a disk never gets `AUTO`)."""

    FULL = "full"
    INC = "inc"
    DIFF = "diff"
    COPY = "copy"
    AUTO = "auto"


class Consistency(StrEnum):
    """What a guest finds in a restored point.

    `AGENT`: file systems were frozen by the guest agent at the instant. `PAUSED`: the VM stood
    still, by `--pause` or because it was not running. `CRASH`: as after a power cut.
    """

    AGENT = "agent"
    PAUSED = "paused"
    CRASH = "crash"


class Quiesce(StrEnum):
    """How hard a run tries to freeze the guest's file systems."""

    NO = "no"
    TRY = "try"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap as QEMU reports it (`BlockDirtyInfo`). `count` is bytes marked dirty."""

    name: str
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False


@dataclass(frozen=True, slots=True)
class Underlay:
    """An image below a disk's own that its contents come from, too, and by what it is known again.

    `role` is its part for what is above it: `backing`, `data-file`, or another name of QEMU's. `stamp`
    changes when the file is written to, replaced or exchanged (of a file that the disk itself writes:
    when it is replaced); empty where nothing but the name can be known. `node` is QEMU's name of its
    node, which says something within one process alone.
    """

    role: str
    file: str
    format: str
    size: int
    stamp: str = ""
    node: str = field(default="", compare=False)

    def is_same(self, other: "Underlay") -> bool:
        """Whether this is that image, unchanged. A backing image that is known by its stamp may have
        been moved, or be reached by another name. Of the file below a raw image, whose bitmaps end with
        the process, the name is enough where one look could not see more (over TCP, in a container)."""
        if self.role == "file" and not (self.stamp and other.stamp):
            return replace(self, stamp="") == replace(other, stamp="")
        moved = replace(self, file=other.file) if self.role == "backing" and self.stamp else self
        return moved == other


@dataclass(frozen=True, slots=True)
class Disk:
    """A writable block device of the VM that carries guest data.

    `node` is the active node, the one its device sits on; `format_node` the first node below all
    filters, where bitmaps live (the same node where there is no filter). `below_ours` is the active
    node unless a run that died left its filter on the disk; then it is the node below that filter.
    `label` is what users of the VM's manager call it (`vda` of libvirt's), where that is known.
    `other_writers` says how others may write to it where no bitmap of `format_node` sees it (empty:
    nobody may). `underlays` are the images below its own, as they lie, from the top down.
    """

    id: str
    qom_path: str
    drive: str
    node: str
    format_node: str
    format: str
    size: int
    filename: str
    can_persist: bool
    below_ours: str = ""
    bitmaps: tuple[Bitmap, ...] = ()
    aliases: tuple[str, ...] = ()
    actual_size: int = 0
    encrypted: bool = False
    label: str = ""
    other_writers: str = ""
    underlays: tuple[Underlay, ...] = ()
    snapshots: tuple[str, ...] = ()


class Absence(StrEnum):
    """Why a point does not hold something of the VM.

    `EMPTY`: there is nothing in it that a point should hold, such as an empty drive or a read-only
    image. `CHOSEN`: a user left it out. `IMPOSSIBLE`: it holds data that cannot be backed up.
    """

    EMPTY = ""
    CHOSEN = "chosen"
    IMPOSSIBLE = "impossible"


LEFT_OUT = "left out on request"
"""The reason for what a user left out; manifests of versions that knew no `Absence` have it alone."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A device that a point does not hold, and the reason in a few words.

    `aliases` are further names under which a user may leave it out.
    """

    name: str
    reason: str
    absence: Absence = Absence.EMPTY
    aliases: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """Which VM this is. `uuid` and `name` are empty where QEMU was given none, `host` where a version
    made the point that did not record on which host."""

    uuid: str = ""
    name: str = ""
    address: str = ""
    host: str = ""


AUDIT = 0.001
"""The share of unchanged chunks that an audit reads again, unless a user wants another."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a restic repository lies, in restic's words (empty: as the environment says)."""

    text: str

    def __str__(self) -> str:
        return f"restic:{self.text}"


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A file of the host that a VM was started with and no point holds, such as its firmware. `digest` is
    empty where it is too large to be read each time."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class VmConfig:
    """What a restore on a bare machine wants to know besides the disks.

    `process` tells one process of QEMU from every other that ever was (empty: it cannot be seen). `files`
    are those that it needs besides, as far as they could be read.
    """

    identity: VmIdentity
    qemu_version: str
    machine: str = ""
    command_line: tuple[str, ...] = ()
    process: str = ""
    files: tuple[NeededFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Vm:
    """The VM as a run finds it. `status` is QEMU's `RunState`."""

    config: VmConfig
    version: tuple[int, int, int]
    status: str
    running: bool
    has_iothreads: bool
    disks: tuple[Disk, ...]
    skipped: tuple[Skipped, ...] = ()
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """One disk of one restore point.

    `file` is relative to the target, always with `/`. `parent` is the id of the point whose file of
    this disk is this file's backing file (`None`: the file stands alone). `bitmap` is the name of
    the change bitmap that counts from this point (empty: none), `end_mark` that of the bitmap which
    proves that one (see `plan.levels`). `underlays` are the images that it was made from besides its own
    (`None`: written by a version that did not look). `snapshot` names an internal
    snapshot of `file` that holds this state, after `qmprestore snapshotrebase` (empty: the file's
    current state). `digest` is `blake3:<hex>` of the whole file, `file_size` its length. `label` is as
    in `Disk`.
    """

    id: str
    level: Level
    file: str
    parent: str | None
    size: int
    file_size: int
    digest: str
    source_format: str = ""
    source_file: str = ""
    bitmap: str = ""
    end_mark: str = ""
    reason: str = ""
    snapshot: str = ""
    label: str = ""
    underlays: tuple[Underlay, ...] | None = None

    @property
    def shown(self) -> str:
        """Its names for people."""
        return f"{self.id} ({self.label})" if self.label else self.id

    @property
    def name(self) -> str:
        """The name of its file, without the folder."""
        return self.file.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folder that its file is in, below the target."""
        return self.file.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Merged:
    """A disk that this point no longer holds because its file was merged into a later point."""

    id: str
    into: str


@dataclass(frozen=True, slots=True)
class Point:
    """A restore point: the state of disks of one VM at one instant; what a manifest records.

    `sequence` counts a target's points in the order of their commits and is what orders them;
    `time` is for people. `level` is what was made: `inc` as soon as one disk is an incremental.
    `pause` is how long the VM stood still, in seconds.
    """

    id: str
    sequence: int
    time: datetime
    level: Level
    parent: str | None
    consistency: Consistency
    vm: VmConfig
    disks: tuple[StoredDisk, ...]
    skipped: tuple[Skipped, ...] = ()
    merged: tuple[Merged, ...] = ()
    pause: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def disk(self, disk_id: str) -> StoredDisk | None:
        """The record of one disk, or `None` where the point does not hold it."""
        return next((disk for disk in self.disks if disk.id == disk_id), None)

    def disk_called(self, name: str) -> StoredDisk | None:
        """The same by its id, or else by its label."""
        return self.disk(name) or next((disk for disk in self.disks if disk.label == name), None)

    @property
    def size(self) -> int:
        """Bytes of all files that this point added to its target."""
        return sum(disk.file_size for disk in self.disks)
