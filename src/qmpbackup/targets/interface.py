# SPDX-License-Identifier: Apache-2.0
"""What a target is, whichever kind: what use cases stand on, so that none of them asks for the kind.

    Entrance     a target that is named, and how it is opened; `opening` finds it for a place
    Opening      one that is to take a point: found, and made only once it is known that it is needed
    Target       points of one VM: held, listed, read, proved
    OpenDisks    disks of a point, each a `StoredImage`, which is read, or poured into a `Sink`
    Receiver     a point in the making: files that QEMU fills, or chunks that are handed over

Each kind is a package beside this; `tests/contract/test_target.py` puts all of them to the same tests.
Knows points; must not know where they lie, nor the VM that they are of.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from qmpbackup.images.times import Stamp
from qmpbackup.model import Level, Location, Point, StoredDisk, VmIdentity
from qmpbackup.plan.finding import Finding
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.report import Report

Buffer = bytes | bytearray | memoryview


class Extent(NamedTuple):
    """A run of bytes of a disk; `zero` if it is known to be zeros."""

    offset: int
    length: int
    zero: bool


class Sink(Protocol):
    """What a stored image is poured into: a new, empty file, which counts only when all is through, or
    a block device, whose contents are lost by the first write."""

    @property
    def fd(self) -> int:
        """It, open for reading and writing."""

    @property
    def path(self) -> Path:
        """What messages call it."""

    @property
    def format(self) -> str:
        """`raw` or `qcow2`: what a file becomes, as which it is as large as the disk. A device is raw."""

    @property
    def is_device(self) -> bool:
        """Whether it is a device, whose bytes are all to be written, zeros too."""

    def writing(self) -> AbstractContextManager[None]:
        """To be held while it is written to, and by no means before; durable afterwards.

        Raises:
            StorageError: in the place of an OSError of the block.
        """


class StoredImage(Protocol):
    """One disk of one point, as something that can be read at any offset, from any thread."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What is known to be zeros and what is not, of the bytes from `start` up to `end`, in order
        and without gaps.

        Raises:
            DamagedError, StorageError: as `read`.
        """

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes of the instant, within the disk.

        Raises:
            DamagedError: they cannot be had, because what holds them is damaged or missing.
            StorageError: the storage fails; it may be asked again.
        """

    def peek(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same where it can be had without waiting for anything, else nothing."""

    def needs(self, format_: str) -> int:
        """Bytes that a file of this format takes into which it is poured, at most; 0 where that cannot
        be told."""

    def pour(self, sink: Sink) -> None:
        """Write all of it, in the fastest way there is.

        All is proved when this returns. Of a device everything that can be is proved before the first
        write; nothing is left of a file that was not poured full.

        Raises:
            DamagedError: it cannot be had, because what holds it is damaged or missing.
            StorageError: a storage fails, the target's or the sink's.
            Interrupted: a signal is waiting.
        """


class Unproved(Protocol):
    """What an image is read from where a read does not prove it: files that can be proved as a whole."""

    def prove(self, each: Callable[[], None]) -> None:
        """Read all of it; `each` is called after every MiB, and ends it by raising.

        Raises:
            DamagedError: it is not what its manifests say; the target knows it from now on.
            StorageError: it cannot be read.
        """

    def stamps(self) -> tuple[Stamp, ...]:
        """What changes when somebody writes to it.

        Raises:
            StorageError: it cannot be looked at.
        """


def _nothing() -> None:
    """There is nothing to let go of."""


@dataclass(frozen=True, slots=True)
class OpenDisks:
    """Images of disks by disk id; `unproved` has what is behind those whose reads prove nothing.
    `let_go` has reads under way end soon."""

    images: Mapping[str, StoredImage]
    unproved: Mapping[str, Unproved] = field(default_factory=dict)
    let_go: Callable[[], None] = _nothing


class Ground(Protocol):
    """A target that is there, or is not made yet, as far as a plan needs to know it."""

    @property
    def id(self) -> str:
        """Part of the names of its change bitmaps."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def chunk(self) -> int:
        """Bytes of a chunk, where it takes disks in chunks (0: it has files that QEMU fills)."""

    @property
    def folder(self) -> Path | None:
        """Where it lies, if that is a file system of this machine."""

    @property
    def stores_plain(self) -> bool:
        """Whether it takes as much room as what is copied."""

    def load(self) -> Inventory:
        """All points, and what could not be read.

        Raises:
            StorageError: the target itself cannot be read.
        """

    def obstacle(
        self, points: Sequence[Point], point: Point, disk_id: str, *, thorough: bool
    ) -> str:
        """Why nothing can be built upon a disk of a point, as far as a look is cheap, or, where it is to
        be `thorough`, at any price; empty if nothing speaks against it. `points` are all of the target.
        """


class Target(Ground, Protocol):
    """The points of one VM, somewhere."""

    def elsewhere(self) -> str:
        """Where points are that this target does not hold itself, as a sentence; empty: nowhere."""

    def unfinished(self) -> Sequence[str]:
        """What commands that died have left half done, as sentences; the lock must be held."""

    def lock(self, *, wait: float = 0.0) -> AbstractContextManager[None]:
        """Hold it for reading: nothing goes that is there.

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
        """

    def images(
        self,
        points: Sequence[Point],
        point: Point,
        disks: Sequence[StoredDisk],
        *,
        to_read: bool = True,
    ) -> AbstractContextManager[OpenDisks]:
        """Disks of a point, open for the block. `points` are all of the target; the lock must be held.
        Not `to_read` are those that are only poured.

        Raises:
            DamagedError: what can be looked at cheaply is not what the manifest says.
            StorageError: the target cannot be read.
        """

    def prove(self, found: Inventory, point: Point | None, share: float) -> Report:
        """See whether what is stored is what was written: for one point, or for all of them and
        whatever else lies there; the lock must be held.

        Args:
            found: what `load` said.
            point: the only one that is meant, if any.
            share: how much of the data is read where that is up to whoever asks (0 to 1).

        Raises:
            QmpBackupError: it cannot be looked at as a whole.
        """

    def receive(
        self, point_id: str, disks: Sequence["Arrival"], *, check: bool = False
    ) -> "Receiver":
        """Begin a point; the lock to write must be held. With `check`, what is stored is opened again
        before.

        Raises:
            UsageError: a point cannot hold so much.
            StorageError: nothing is left behind.
        """

    def left(self) -> list[str]:
        """What `writing` would clear up, as clauses; the lock must be held.

        Raises:
            StorageError: it cannot be read.
        """

    def writing(self, wait: float = 0.0) -> AbstractContextManager[list[str]]:
        """Hold it for writing, rid of what commands that died have left; gives what was done for that,
        as clauses.

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
            QmpBackupError: what was left cannot be cleared up.
        """


class Arrival(NamedTuple):
    """A disk that a point is to hold."""

    disk_id: str
    level: Level
    size: int


class Sealed(NamedTuple):
    """What became of a disk: its file in the target, how many bytes were added, and the digest that
    proves it."""

    file: str
    size: int
    digest: str


class NewFile(Protocol):
    """An open file that is to be filled, and where it is."""

    @property
    def fd(self) -> int: ...

    @property
    def path(self) -> Path: ...


class FileReceiver(ABC):
    """A point in the making, of files that somebody else fills; ends with `commit` or `abort`."""

    @abstractmethod
    def file(self, disk_id: str) -> NewFile:
        """The file of a disk."""

    @abstractmethod
    def seal(self, disk_id: str) -> Sealed:
        """Make a filled file durable, and say what it is.

        Raises:
            StorageError: it could not be written or read.
        """

    @abstractmethod
    def commit(self, point: Point) -> None:
        """Make the point exist, all at once and for good.

        Raises:
            StorageError: it does not exist; call `abort`.
        """

    @abstractmethod
    def abort(self, *, closed: bool = True) -> None:
        """Remove everything; `closed`: nobody else has the files open."""


class ArrivingDisk(Protocol):
    """The chunks of one disk on their way; those that are `known` are as in what it builds on until
    others are put in their place."""

    @property
    def count(self) -> int:
        """How many chunks it has; the last may be short."""

    @property
    def known(self) -> int:
        """How many of them, from the first on, are known."""

    @property
    def stored(self) -> int:
        """Bytes that were added for it."""

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is there."""

    def put(self, index: int, data: Buffer, done: Callable[[bool], None]) -> None:
        """Take a chunk. `done` is called, by any thread, when `data` is not needed any more, and told
        whether the chunk was known as another."""

    def zeros(self, first: int, count: int) -> Sequence[int]:
        """Enter chunks of zeros; returns those that were known as something else."""


class ChunkReceiver(ABC):
    """A point in the making, of chunks that are handed over; ends with `commit` or `abort`."""

    @abstractmethod
    def begin(self, disk_id: str, size: int, base: Point | None) -> ArrivingDisk:
        """Begin a disk, which builds on that of `base`, if given.

        Raises:
            DamagedError: that cannot be read.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait until all that was put is stored.

        Raises:
            StorageError: something could not be.
        """

    @abstractmethod
    def seal(self, disk_id: str) -> Sealed:
        """Say what a disk is that is complete; nothing can be put any more."""

    @abstractmethod
    def commit(self, point: Point) -> None:
        """Make the point exist, all at once and for good.

        Raises:
            QmpBackupError: it does not exist; call `abort`.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the writing; nothing refers to what was stored."""


Receiver = FileReceiver | ChunkReceiver


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks of a target that is to take a point; not every kind can do all of it.

    `monthly` is a target for each month, `uuid` the id that the user wants; `verify_chain` and
    `differential` only make sense where points build on files of others. With `look_only` nothing is
    made or changed. With `strict`, a VM that may be another of the same name is refused.
    """

    lock_wait: float = 0.0
    look_only: bool = False
    monthly: bool = False
    uuid: str = ""
    verify_chain: bool = False
    differential: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What there is at a place: `target` is held for writing; there is none where it is still to be
    made, or only looked at."""

    ground: Ground
    stored: Inventory
    target: Target | None = None


class Opening(Protocol):
    """A target that is about to be opened to take a point of a VM."""

    def found(self, vm: VmIdentity) -> AbstractContextManager[Found]:
        """What is there, held for writing after what a run that died has left was cleared up. Nothing is
        made: what turns out to be impossible leaves no empty target.

        Raises:
            Locked: somebody else held it for as long as was waited.
            UsageError: it is another VM's.
            QmpBackupError: it cannot be opened, or is not ours to write into.
        """

    def made(self, vm: VmIdentity, new_id: str) -> AbstractContextManager[Target]:
        """The target that was not there, made and held for writing.

        Raises:
            StorageError: it cannot be made, or somebody else has made it meanwhile.
        """


@dataclass(frozen=True, slots=True)
class Made:
    """A new target: its id, and where it lies (with secrets masked)."""

    id: str
    location: str


class Entrance(Protocol):
    """A target that is named. Nothing is looked at before one of these is called."""

    @property
    def chunk(self) -> int:
        """As of the target itself."""

    def opened(self, vm: str = "") -> AbstractContextManager[Target]:
        """Open it to read from: the points of the VM that a user calls so, or of the only one.

        Raises:
            NoSuchTarget: there is none.
            UsageError: it holds several VMs and none was named, or can hold one alone and one was.
            WrongPassword: it does not open.
        """

    def of(self, vm: VmIdentity) -> AbstractContextManager[Target]:
        """Open it to read, or clear up, the points of this VM.

        Raises:
            NoSuchTarget, WrongPassword: as `opened`.
        """

    def newest(self, vm: str) -> Point | None:
        """The newest point of the VM that a user calls so, or of the only one; None without any.

        Raises:
            UsageError, WrongPassword: as `opened`, or the newest point is of another VM.
        """

    def advice(
        self, vm: VmIdentity, wait: float, *, strict: bool
    ) -> Generator[Finding, None, tuple[Ground, Inventory] | None]:
        """Look whether backups of a VM can go on there, and change nothing; returns what is there, or
        will be, and what it holds. With `strict`, a VM that may be another of the same name is a problem."""

    def opening(self, wish: Wish) -> AbstractContextManager[Opening]:
        """Begin to open it for writing, which goes on while the VM is looked at.

        Raises:
            UsageError: the wish is none for this kind, or there is no password.
        """

    def make(self) -> Made:
        """Make it, where that has to be done before the first backup.

        Raises:
            UsageError: it need not be, is there already, or there is no password.
            StorageError: it could not be written.
        """


Address = Path | Location | Entrance
"""Where a target is: a folder, a restic repository, or whatever else lets itself be opened."""
