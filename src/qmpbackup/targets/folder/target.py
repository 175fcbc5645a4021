# SPDX-License-Identifier: Apache-2.0
"""A directory as a target: whose it is, its locks, its points, its files.

    <target>/vm.json                        which VM it belongs to, and the target's id
    <target>/points/<id>.json               manifests; a point exists if its manifest does
    <target>/points/<file>.damaged          files that were found damaged, see `marks`
    <target>/<folder of the disk>/FULL-…    what the manifests name

Knows manifests and folders; must not know QEMU, nor what is inside the images.
"""

import errno
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import durable
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, NoSuchTarget, UsageError
from qmpbackup.filelock import locked
from qmpbackup.folder import Folder
from qmpbackup.model import Level, Point, StoredDisk, VmIdentity
from qmpbackup.plan.names import TARGET_ID
from qmpbackup.targets import manifest
from qmpbackup.targets.folder import journal, manifests, pending
from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.folder.locks import held
from qmpbackup.targets.folder.owner import Owner, of_another
from qmpbackup.targets.folder.pending import Pending
from qmpbackup.targets.inventory import Damage, Inventory, same_vm
from qmpbackup.targets.names import (
    MANIFEST,
    POINTS,
    REMOVER_LOCK,
    VM_FILE,
    WRITER_LOCK,
)
from qmpbackup.targets.receiver import Arrival, FileReceiver
from qmpbackup.targets.removal import Clearing, Sweep
from qmpbackup.targets.report import Report
from qmpbackup.targets.stored_image import OpenDisks

__all__ = ["Damage", "DirectoryTarget", "Inventory", "Pending"]

log = logging.getLogger(__name__)

_LARGEST_VM_FILE = 64 * 1024
_CREATION_WAIT = 10.0


class DirectoryTarget(StoredFiles):
    """See `Target`: a target in a directory. Holds nothing open between calls."""

    def __init__(self, path: Path, owner: Owner | None, damage: str = "") -> None:
        super().__init__(path)
        self.owner = owner
        self._damage = damage

    @property
    def id(self) -> str:
        """The target's id, part of the names of its change bitmaps; empty if `vm.json` is lost."""
        return self.owner.id if self.owner else ""

    chunk = 0
    stores_plain = True

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path

    @classmethod
    def open(cls, path: Path) -> "DirectoryTarget":
        """Open a target to read from it. One whose `vm.json` is damaged opens too.

        Raises:
            NoSuchTarget: there is no target of ours.
        """
        target = cls.peek(path)
        if target is None:
            raise NoSuchTarget(
                f"There is no target of qmpbackup in {path}.",
                "Check the path; `qmpbackup backup` creates a target.",
            )
        return target

    @classmethod
    def peek(cls, path: Path) -> "DirectoryTarget | None":
        """Open a target if there is one; never change anything."""
        with storage_errors(f"open {path}"):
            try:
                with Folder.open(path.resolve(strict=True)) as top:
                    return cls._look(top)
            except (FileNotFoundError, NotADirectoryError):
                return None

    @classmethod
    def _look(cls, top: Folder) -> "DirectoryTarget | None":
        try:
            data = top.read(VM_FILE, _LARGEST_VM_FILE)
            return cls(top.path, Owner.decode(data, VM_FILE))
        except FileNotFoundError:
            damage = f"{VM_FILE} is missing."
        except DamagedError as error:
            damage = error.message
        if top.exists(POINTS):
            return cls(top.path, None, damage)
        from qmpbackup.restic.storage.local import is_repository

        if is_repository(top.path):
            raise UsageError(
                f"{top.path} is a restic repository.", f"Write --target restic:{top.path}."
            )
        return None

    @classmethod
    def open_or_create(
        cls, path: Path, identity: VmIdentity, uuid: str = "", id_hint: str = ""
    ) -> "DirectoryTarget":
        """Open the VM's target for writing, and make it one where there is none.

        `uuid` is the id that the user asks for, `id_hint` the one a new target gets otherwise.

        Raises:
            UsageError: the target belongs to another VM, or has another id than `uuid`.
            DamagedError: it is a target whose `vm.json` cannot be read.
            StorageError: it cannot be written, or others could rearrange it.
        """
        if uuid and not TARGET_ID.fullmatch(uuid):
            raise UsageError(
                f"{uuid!r} cannot be the id of a target.",
                "Use 1 to 64 letters, digits, dots, dashes and underscores.",
            )
        with storage_errors(f"create the target {path}"):
            resolved = _make_folder(path)
            with Folder.open(resolved) as top:
                top.require_ours()
                top.require_random_access()
                target = cls._look(top) or cls._claim(
                    top, Owner(uuid or id_hint or secrets.token_hex(4), identity)
                )
        target.require(identity, uuid)
        return target

    @classmethod
    def _claim(cls, top: Folder, owner: Owner) -> "DirectoryTarget":
        """Write `vm.json`, unless another run was quicker."""
        fd = top.open_lock(WRITER_LOCK)
        try:
            with locked(fd, f"the target {top.path}", wait=_CREATION_WAIT):
                target = cls._look(top)
                if target is None:
                    # Its locks are its owner's from the start, whoever reads it first.
                    os.close(top.open_lock(REMOVER_LOCK))
                    top.write(VM_FILE, owner.encode())
                    target = cls(top.path, owner)
                return target
        finally:
            os.close(fd)

    def require(self, identity: VmIdentity, uuid: str = "") -> None:
        """Refuse to write points of a VM that the target does not belong to.

        Raises:
            UsageError: it is another VM's, or `uuid` is not empty and not its id.
            DamagedError: nobody can say, because `vm.json` cannot be read.
        """
        if self.owner is None:
            raise DamagedError(
                f"The target {self.path} cannot be written to: {self._damage}",
                "Put that file back, or use another folder.",
            )
        if not same_vm(self.owner.vm, identity):
            raise of_another(self.name, self.owner.vm, identity)
        if uuid and uuid != self.id:
            raise UsageError(
                f"The target {self.path} has the id {self.id}, not {uuid}.",
                "Leave --uuid out, or use another folder.",
            )

    def require_points(self, identity: VmIdentity, stored: Inventory) -> None:
        """Refuse likewise by the newest point, which names its host where the target itself was made by
        a version that did not.

        Raises:
            UsageError: it is another VM's.
        """
        if self.owner is not None and self.owner.vm.host:
            return  # it says so itself
        newest = stored.points[-1].vm.identity if stored.points else identity
        if not same_vm(newest, identity):
            raise of_another(self.name, newest, identity)

    def lock(
        self, *, write: bool = False, remove: bool = False, wait: float = 0.0
    ) -> AbstractContextManager[None]:
        """Hold the target for the block: to read points, to `write` new ones, or to `remove` some.

        Readers and one writer go together; whoever removes or changes points is alone.

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
        """
        return held(self.path, write=write, remove=remove, wait=wait)

    def load(self) -> Inventory:
        """Read all manifests; what cannot be read is listed as damage and left out.

        Raises:
            StorageError: the folder itself cannot be read.
        """
        damaged = [Damage(VM_FILE, self._damage)] if self._damage else []
        return manifests.load(self.path, damaged)

    def elsewhere(self) -> str:
        """Where points are that this target does not hold itself, as a sentence; empty: nowhere."""
        months = self.months()
        return f"Each of its months is a target: {self.path / months[-1]}." if months else ""

    def months(self) -> tuple[str, ...]:
        """Folders like `2026-11` that `--monthly` made and that are targets of their own."""
        with storage_errors(f"read {self.path}"):
            found = sorted(self.path.glob(f"[0-9][0-9][0-9][0-9]-[0-9][0-9]/{VM_FILE}"))
        return tuple(each.parent.name for each in found)

    def unfinished(self) -> Sequence[str]:
        """Who holds the lock and finds a journal of a merge knows that nobody works on it any more."""
        return [
            f"A merge in {folder} was interrupted. {self.merge_hint(folder)}"
            for folder in self.interrupted()
        ]

    def left(self) -> list[str]:
        """What `writing` would clear up, as clauses; nothing is changed.

        Raises:
            StorageError: the target cannot be read.
        """
        merges = [f"would finish the merge in {folder}" for folder in self.interrupted()]
        return merges + pending.left(self.path)

    @contextmanager
    def writing(self, wait: float = 0.0) -> Iterator[list[str]]:
        """Hold it for writing; see `Target.writing`."""
        self.settle(wait)
        with self.lock(write=True, wait=wait):
            yield self.recover()

    def obstacle(
        self, points: Sequence[Point], point: Point, disk_id: str, *, thorough: bool
    ) -> str:
        """Why the files of a disk of a point cannot be built upon; those that are `thorough` read all of
        them, others the newest if it is small."""
        reason = self.quick_check(point, disk_id, points)
        if reason:
            return reason
        from qmpbackup.targets.folder import chains

        return chains.fault(self, points, point, disk_id, None if thorough else chains.SMALL)

    def receive(
        self, point_id: str, disks: Sequence[Arrival], *, check: bool = False
    ) -> FileReceiver:
        """Create a file for each disk."""
        from qmpbackup.targets.folder.receiving import FolderReceiver

        del check
        wanted = [(disk.disk_id, disk.level) for disk in disks]
        return FolderReceiver(self.begin(point_id, wanted, datetime.now(UTC)))

    @contextmanager
    def removing(self, sweep: Sweep) -> Iterator[Clearing]:
        """Hold it alone, cleared up; for a dry run just so that nothing goes meanwhile."""
        from qmpbackup.targets.folder.removing import FolderClearing, require_ours, require_possible

        require_possible(sweep)
        with self.lock(remove=not sweep.dry_run, wait=sweep.wait):
            if sweep.dry_run:
                self._require_settled()
            else:
                require_ours(self)
                for done in (*self.recover(), *journal.roll_forward(self.path)):
                    log.warning("Cleaned up after a run that died: %s.", done)
            yield FolderClearing(self, self.load, sweep)

    def _require_settled(self) -> None:
        if self.interrupted():
            raise DamagedError(
                f"A merge in {self.path} was interrupted, so this cannot be foretold.",
                "The next backup finishes it, and so does prune without --dry-run.",
            )

    def images(
        self,
        points: Sequence[Point],
        point: Point,
        disks: Sequence[StoredDisk],
        *,
        to_read: bool = True,
    ) -> AbstractContextManager[OpenDisks]:
        """Disks of a point, open for the block."""
        from qmpbackup.targets.folder import reading

        return reading.opened(self, points, point, disks, to_read=to_read)

    def prove(self, found: Inventory, point: Point | None, share: float) -> Report:
        """Read every file that the points need, whatever the share."""
        from qmpbackup.targets.folder import proof

        del share
        if point is not None:
            return proof.prove(self, found.points, point)
        return proof.prove_all(self, self.load)

    def recover(self) -> list[str]:
        """Clear up after runs that died; the lock to write must be held.

        Returns:
            What was done, as clauses for a log.

        Raises:
            StorageError: something could not be removed.
        """
        return pending.recover(self.path)

    def settle(self, wait: float = 0.0) -> None:
        """Bring interrupted merges to an end, if there are any; no lock may be held.

        Raises:
            Locked: somebody else held the target for all of `wait` seconds.
            DamagedError: a merge cannot be finished.
            StorageError: it could not be finished yet; it can be tried again.
        """
        if not self.interrupted():
            return
        with self.lock(remove=True, wait=wait):
            for done in journal.roll_forward(self.path):
                log.warning("Cleaned up after a run that died: %s.", done)

    def begin(self, point_id: str, disks: Sequence[tuple[str, Level]], now: datetime) -> Pending:
        """Begin a point: create a file for each of `disks`; the lock to write must be held.

        Raises:
            StorageError: nothing is left behind.
        """
        return Pending.begin(self.path, point_id, disks, int(now.timestamp()))

    def replace_manifest(self, point: Point) -> None:
        """Write the manifest of a point that exists anew; the lock to remove must be held.

        Raises:
            StorageError: it could not be written.
        """
        data = manifest.encode(point)
        with (
            storage_errors(f"write the manifest of point {point.id}"),
            Folder.open(self.path) as top,
            top.sub(POINTS) as points,
        ):
            points.write(point.id + MANIFEST, data)

    def remove_point(self, point_id: str, files: Sequence[str]) -> None:
        """Make a point cease to exist, durably, then remove these files, which no other may need;
        the lock to remove must be held.

        Raises:
            StorageError: it was not removed, or some file is left for the next run to remove.
        """
        pending.remove(self.path, point_id, files)


def _make_folder(path: Path) -> Path:
    """Make the target's folder, durably, where it is missing; return where it really is."""
    if path.parent.exists() and not path.parent.is_dir():
        # mkdir(2) says no more than that something is there already.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not path.exists():
        durable.make_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            durable.sync_folder(parent)
        finally:
            os.close(parent)
    return path.resolve(strict=True)
