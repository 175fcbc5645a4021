# SPDX-License-Identifier: Apache-2.0
"""What a target is, whichever kind: what use cases stand on, so that none of them asks for the kind.

    Entrance     a target that is named, and how it is opened; `opening` finds it for a place
    Opening      one that is to take a point: found, and made only once it is known that it is needed
    Target       points of one VM: held, listed, read, proved

What a target gives to be read, `stored_image` says; what it takes a point with, `receiver`.

Each kind is a package beside this; `tests/contract/test_target.py` puts all of them to the same tests.
Knows points; must not know where they lie, nor the VM that they are of.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from qmpbackup.model import Location, Point, StoredDisk, VmIdentity
from qmpbackup.plan.finding import Finding
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.overview import Overview
from qmpbackup.targets.receiver import Arrival, Receiver
from qmpbackup.targets.removal import Clearing, Sweep
from qmpbackup.targets.report import Report
from qmpbackup.targets.stored_image import OpenDisks


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

    def receive(self, point_id: str, disks: Sequence[Arrival], *, check: bool = False) -> Receiver:
        """Begin a point; the lock to write must be held. With `check`, what is stored is opened again
        before.

        Raises:
            UsageError: a point cannot hold so much.
            StorageError: nothing is left behind.
        """

    def removing(self, sweep: Sweep) -> AbstractContextManager[Clearing]:
        """Hold it so that points can go, after what earlier commands have left half done was finished;
        for a dry run only so that none goes meanwhile.

        Raises:
            UsageError: the sweep is none for this kind.
            Locked: somebody else held it for as long as was waited.
            DamagedError: nobody can say what may go.
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
    made, or only looked at. In the former case, `earlier` is what the id of a target that was at this
    place before begins with, if a slash is put behind it (empty: that cannot be told)."""

    ground: Ground
    stored: Inventory
    target: Target | None = None
    earlier: str = ""


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

    @property
    def holds_several(self) -> bool:
        """Whether there may be points of several VMs."""

    @property
    def spelled(self) -> str:
        """It as users write it, whatever folder they are in."""

    def asked(self) -> "Entrance":
        """The same, which asks nobody any more: whoever has to type a secret, does it now."""

    def environment(self) -> Mapping[str, str]:
        """What other processes of ours need to open it that they could not ask for themselves; of one
        that has `asked`."""

    def handed_on(self) -> tuple[str, Mapping[str, str]]:
        """How a command of ours is told of it: what its line says, and what its environment does, as a
        location may hold a password, and command lines are for everybody to read."""

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

    def overview(self, now: datetime) -> Overview:
        """What it holds of all VMs, at one cheap look that locks nothing.

        Raises:
            NoSuchTarget: there is none.
            WrongPassword: it does not open.
            StorageError: it cannot be read.
        """

    def advice(
        self, vm: VmIdentity, wait: float, *, strict: bool
    ) -> Generator[Finding, None, Found | None]:
        """Look whether backups of a VM can go on there, and change nothing; returns what there is, if it
        could be looked at. With `strict`, a VM that may be another of the same name is a problem."""

    def opening(self, wish: Wish) -> AbstractContextManager[Opening]:
        """Begin to open it for writing, which goes on while the VM is looked at.

        Raises:
            UsageError: the wish is none for this kind, or there is no password.
        """

    def sweep(self, wait: float) -> int | None:
        """Remove what no point needs any more, whichever VM's it was; gives the bytes that were freed, or
        None where points share nothing and so leave nothing.

        Raises:
            NoSuchTarget, WrongPassword: as `opened`.
            Locked: somebody else held it for all of `wait` seconds.
            StorageError: it cannot be changed.
        """

    def make(self) -> Made:
        """Make it, where that has to be done before the first backup.

        Raises:
            UsageError: it need not be, is there already, or there is no password.
            StorageError: it could not be written.
        """


Address = Path | Location | Entrance
"""Where a target is: a folder, a restic repository, or whatever else lets itself be opened."""
