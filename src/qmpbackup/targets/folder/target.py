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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from qmpbackup import durable
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, NoSuchTarget, QmpBackupError, UsageError
from qmpbackup.filelock import locked
from qmpbackup.folder import Folder
from qmpbackup.model import Level, Point, StoredDisk, VmIdentity
from qmpbackup.plan.chain import chain, ordered
from qmpbackup.plan.names import TARGET_ID
from qmpbackup.targets import manifest
from qmpbackup.targets.folder import journal, marks, pending
from qmpbackup.targets.folder.pending import Pending
from qmpbackup.targets.inventory import Damage, Inventory, describe, same_vm
from qmpbackup.targets.names import (
    MANIFEST,
    POINTS,
    REMOVER_LOCK,
    VM_FILE,
    WRITER_LOCK,
    is_folder_name,
    is_point_id,
    parse_file,
)

__all__ = ["Damage", "DirectoryTarget", "Inventory", "Pending"]

log = logging.getLogger(__name__)

_LARGEST_VM_FILE = 64 * 1024
_CREATION_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The contents of `vm.json`: the id of the target, and the VM it belongs to."""

    id: str
    vm: VmIdentity

    def encode(self) -> bytes:
        """As it is written."""
        import json

        content = {
            "schema": manifest.SCHEMA,
            "id": self.id,
            "vm": manifest.identity_to_json(self.vm),
        }
        return (json.dumps(content, indent=1) + "\n").encode("ascii")

    @classmethod
    def decode(cls, data: bytes, name: str) -> "Owner":
        """Parse.

        Raises:
            DamagedError: it is not what the schema says.
            StorageError: a newer version of qmpbackup wrote it.
        """
        reader = manifest.Reader(manifest.parse_object(data, name), name)
        reader.schema()
        owner = cls(reader.matching("id", TARGET_ID), reader.member("vm", manifest.read_identity))
        reader.end()
        return owner


class DirectoryTarget:
    """A target in a directory. Holds nothing open between calls."""

    def __init__(self, path: Path, owner: Owner | None, damage: str = "") -> None:
        self.path = path
        self.owner = owner
        self._damage = damage

    @property
    def id(self) -> str:
        """The target's id, part of the names of its change bitmaps; empty if `vm.json` is lost."""
        return self.owner.id if self.owner else ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

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
            raise self._of_another(self.owner.vm, identity)
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
            raise self._of_another(newest, identity)

    def _of_another(self, owner: VmIdentity, identity: VmIdentity) -> UsageError:
        hint = "Use one folder for each VM."
        if same_vm(replace(owner, host=""), identity):
            hint = (
                "Use one folder for each VM. If it is the same one, whose host was renamed or which was "
                f"moved: --host {owner.host}; a VM with a UUID (-uuid) is known by that on every host."
            )
        return UsageError(
            f"The target {self.path} belongs to another VM ({describe(owner)}; this one is "
            f"{describe(identity)}).",
            hint,
        )

    @contextmanager
    def lock(
        self, *, write: bool = False, remove: bool = False, wait: float = 0.0
    ) -> Iterator[None]:
        """Hold the target for the block: to read points, to `write` new ones, or to `remove` some.

        Readers and one writer go together; whoever removes or changes points is alone.

        Raises:
            Locked: somebody else held it for all of `wait` seconds.
        """
        wanted = []
        if write or remove:
            wanted.append((WRITER_LOCK, False))
        if remove or not write:
            wanted.append((REMOVER_LOCK, not remove))
        with ExitStack() as stack:
            for name, shared in wanted:
                fd = self._open_lock(name, required=not shared)
                if fd is not None:
                    stack.callback(_close_lock, fd)
                    what = f"the target {self.path}"
                    stack.enter_context(locked(fd, what, shared=shared, wait=wait))
            yield

    def _open_lock(self, name: str, *, required: bool) -> int | None:
        with storage_errors(f"lock {self.path}"), Folder.open(self.path) as top:
            try:
                return top.open_lock(name)
            except OSError:
                if required:
                    raise
            # Media that we may only read: a lock that is there still counts.
            try:
                return top.open_file(name)
            except OSError:
                return None

    def load(self) -> Inventory:
        """Read all manifests; what cannot be read is listed as damage and left out.

        Raises:
            StorageError: the folder itself cannot be read.
        """
        points: list[Point] = []
        damaged = [Damage(VM_FILE, self._damage)] if self._damage else []
        with storage_errors(f"read {self.path}"), Folder.open(self.path) as top:
            if not top.exists(POINTS):
                return Inventory((), tuple(damaged))
            with top.sub(POINTS) as folder:
                for name in folder.names():
                    if name.endswith(MANIFEST):
                        try:
                            points.append(_read_point(folder, name))
                        except QmpBackupError as error:
                            damaged.append(Damage(f"{POINTS}/{name}", error.message))
            marked = _marked(top, points)
        return Inventory(ordered(points), tuple(damaged), marked)

    def quick_check(self, point: Point, disk_id: str, points: Iterable[Point]) -> str:
        """Why the files of a disk of a point cannot be whole; empty if nothing speaks against it.

        Looks at manifests, names, lengths and marks only, never into a file.
        """
        try:
            with Folder.open(self.path) as top:
                for link in chain(points, point, disk_id):
                    reason = _file_fault(top, link.disk)
                    if reason:
                        return reason
        except QmpBackupError as error:
            return error.message
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return ""

    def mark_damaged(self, disk: StoredDisk, reason: str) -> None:
        """Leave a mark that the file of a disk is damaged, so that no later run builds on it.

        The one who found it has worse to tell, so what goes wrong here is only logged.
        """
        try:
            with storage_errors("write into it"), Folder.open(self.path) as top:
                marks.put(top, disk, reason)
        except QmpBackupError as error:
            log.warning(
                "The target could not be marked: %s The next backup may build on %s.",
                error.message,
                disk.file,
            )

    def remove_mark(self, file: str) -> None:
        """Remove the mark of a file, if it has one; what goes wrong is only logged."""
        try:
            with storage_errors(f"remove the mark of {file}"), Folder.open(self.path) as top:
                if marks.remove(top, file):
                    log.info("%s does not count as damaged any more.", file)
        except QmpBackupError as error:
            log.warning("%s", error)

    def marked_files(self) -> tuple[str, ...]:
        """Names of all files that have a mark, also one that means nothing any more."""
        with storage_errors(f"read {self.path}"), Folder.open(self.path) as top:
            return marks.marked_files(top) if top.exists(POINTS) else ()

    def open_file(self, name: str) -> int:
        """Open a backup file, `<folder>/<NAME>`, for reading; the caller closes it.

        Raises:
            DamagedError: it is missing, or no plain file in a folder of its own.
            StorageError: it cannot be opened.
        """
        file = parse_file(name)
        if file is None:
            raise DamagedError(f"{name!r} is not the name of a backup file.")
        with storage_errors(f"open {self.path / name}"):
            try:
                with Folder.open(self.path) as top, top.sub(file.folder) as folder:
                    return folder.open_file(file.name)
            except FileNotFoundError:
                raise DamagedError(
                    f"{self.path / name} is missing.", "Put it back, or restore another point."
                ) from None

    def stored_names(self) -> tuple[str, ...]:
        """Everything in the folders that disks could have, as `<folder>/<name>`, sorted."""
        found: list[str] = []
        with storage_errors(f"read {self.path}"), Folder.open(self.path) as top:
            for name in top.names():
                if is_folder_name(name) and top.is_folder(name):
                    with top.sub(name) as folder:
                        found += [f"{name}/{each}" for each in folder.names()]
        return tuple(found)

    def unfinished_files(self) -> tuple[str, ...]:
        """Files of points in the making, or of runs that died: the next backup clears up."""
        return pending.unfinished_files(self.path)

    def elsewhere(self) -> str:
        """Where points are that this target does not hold itself, as a sentence; empty: nowhere."""
        months = self.months()
        return f"Each of its months is a target: {self.path / months[-1]}." if months else ""

    def months(self) -> tuple[str, ...]:
        """Folders like `2026-11` that `--monthly` made and that are targets of their own."""
        with storage_errors(f"read {self.path}"):
            found = sorted(self.path.glob(f"[0-9][0-9][0-9][0-9]-[0-9][0-9]/{VM_FILE}"))
        return tuple(each.parent.name for each in found)

    def left(self) -> list[str]:
        """What `recover` would do, as clauses; nothing is changed.

        Raises:
            StorageError: the target cannot be read.
        """
        return pending.left(self.path)

    def recover(self) -> list[str]:
        """Clear up after runs that died; the lock to write must be held.

        Returns:
            What was done, as clauses for a log.

        Raises:
            StorageError: something could not be removed.
        """
        return pending.recover(self.path)

    def interrupted(self) -> tuple[str, ...]:
        """Names of the disks' folders in which a merge was interrupted, or is under way.

        Raises:
            StorageError: the target cannot be read.
        """
        return journal.interrupted(self.path)

    def merge_hint(self, folder: str) -> str:
        """What to do about a merge in a disk's folder that was interrupted."""
        return (
            "The next backup finishes it, and so does "
            f"`qmprestore commit --dir {self.path / folder}`."
        )

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


def _close_lock(fd: int) -> None:
    """Nothing was written there, whatever a file system says that takes only whole files."""
    with suppress(OSError):
        os.close(fd)


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


def _read_point(folder: Folder, name: str) -> Point:
    point_id = name.removesuffix(MANIFEST)
    if not is_point_id(point_id):
        raise DamagedError(f"{name} is not called like a manifest.")
    with storage_errors(f"read {name}"):
        point = manifest.decode(folder.read(name, manifest.LARGEST), name)
    if point.id != point_id:
        raise DamagedError(f"{name} is the manifest of another point, {point.id}.")
    return point


def _marked(top: Folder, points: Iterable[Point]) -> tuple[Damage, ...]:
    """The files of these points that have a mark, each once."""
    files = set(marks.marked_files(top))
    disks = {disk.file: disk for point in points for disk in point.disks if disk.file in files}
    found = ((file, marks.find(top, disk)) for file, disk in sorted(disks.items()))
    return tuple(Damage(file, mark.text) for file, mark in found if mark)


def _file_fault(top: Folder, disk: StoredDisk) -> str:
    """Why a file cannot be the one that its manifest means; empty if it can."""
    name = disk.file
    file = parse_file(name)
    if file is None:
        return f"{name} is not the name of a backup file"
    try:
        with top.sub(file.folder) as folder:
            found = folder.size(file.name)
    except FileNotFoundError:
        return f"{name} is missing"
    if found != disk.file_size:
        return f"{name} has {found} bytes instead of {disk.file_size}"
    mark = marks.find(top, disk)
    return f"{name}: {mark.text}" if mark else ""
