# SPDX-License-Identifier: Apache-2.0
"""A point in the making, and what clears up after one that was never finished.

    journal durable ─ files created as .partial ─ filled by QEMU ─ sealed (fsync, digest)
    ─ renamed, folders fsynced ─ manifest written durably: the point exists ─ journal removed

A journal without its manifest is a run that died: exactly the files it lists are removed. Knows the
layout of a target; must not know who fills the files.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import durable
from qmpbackup.durable import TEMPORARY, storage_errors
from qmpbackup.errors import DamagedError, Exhausted, QmpBackupError, StorageError
from qmpbackup.folder import Folder
from qmpbackup.images.digest import digest
from qmpbackup.model import Level, Point
from qmpbackup.targets.manifest import LARGEST, decode, encode
from qmpbackup.targets.members import SCHEMA, parse_object
from qmpbackup.targets.names import (
    JOURNAL,
    MANIFEST,
    MARK,
    MERGE,
    PARTIAL,
    POINTS,
    FileName,
    epoch_of,
    file_name,
    folder_name,
    is_folder_name,
    is_point_id,
    parse_file,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file being filled: open descriptor, where it is now, and its name once it counts."""

    fd: int
    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Journal:
    """What a run may create: files (under both their names), and folders that were not there."""

    files: tuple[FileName, ...]
    folders: tuple[str, ...]

    def encode(self) -> bytes:
        """As it is written."""
        content = {
            "schema": SCHEMA,
            "files": [str(file) for file in self.files],
            "folders": list(self.folders),
        }
        return json.dumps(content).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, name: str) -> "Journal":
        """Parse; whatever is not the name of a backup file in a disk's folder is damage.

        Raises:
            DamagedError: it is no journal of ours.
        """
        content = parse_object(data, name)
        files, folders = content.get("files"), content.get("folders")
        if isinstance(files, list) and isinstance(folders, list):
            parsed = [parse_file(each) for each in files if isinstance(each, str)]
            whole = tuple(each for each in parsed if each is not None)
            named = tuple(
                each for each in folders if isinstance(each, str) and is_folder_name(each)
            )
            if len(whole) == len(files) and len(named) == len(folders):
                return cls(whole, named)
        raise DamagedError(f"{name} is not a journal of ours.", "Look at it, then remove it.")


class Pending:
    """A point in the making; ends with `commit` or `abort`. The writer's lock must be held."""

    def __init__(self, root: Path, point_id: str, journal: Journal) -> None:
        self._root = root
        self.point_id = point_id
        self._journal = journal
        self._open = ExitStack()
        self._sealed: dict[str, tuple[int, str]] = {}
        self._done = False
        self.files: dict[str, PendingFile] = {}

    @classmethod
    def begin(
        cls, root: Path, point_id: str, disks: Sequence[tuple[str, Level]], now: int
    ) -> "Pending":
        """Write the journal, then create an empty file for every disk.

        `now` is the Unix time that the files are named after, raised until it is free in all
        folders.

        Raises:
            StorageError: nothing is left behind.
        """
        if not is_point_id(point_id):
            raise ValueError(f"{point_id!r} cannot be the id of a point")
        with storage_errors(f"begin a point in {root}"), Folder.open(root) as top:
            top.require_ours()
            journal = _plan(top, disks, now)
            pending = cls(root, point_id, journal)
            try:
                pending._create(top, [disk_id for disk_id, _ in disks])
            except BaseException:
                pending.abort()
                raise
        return pending

    def _create(self, top: Folder, disk_ids: Sequence[str]) -> None:
        with top.sub(POINTS, create=True) as points:
            points.require_ours()
            if points.exists(self.point_id + MANIFEST):
                raise StorageError(f"Point {self.point_id} exists already in {self._root}.")
            points.write(self.point_id + JOURNAL, self._journal.encode())
        for disk_id, name in zip(disk_ids, self._journal.files, strict=True):
            with top.sub(name.folder, create=True) as folder:
                folder.require_ours()
                fd = folder.create_file(name.name + PARTIAL)
                self._open.callback(os.close, fd)
                path = folder.path / (name.name + PARTIAL)
                self.files[disk_id] = PendingFile(fd, path, str(name))

    def seal(self, disk_id: str) -> tuple[int, str]:
        """Make a filled file durable; return its length in bytes and its digest.

        Raises:
            StorageError: it could not be written or read.
        """
        file = self.files[disk_id]
        with storage_errors(f"store {file.path}"), durable.syncing(file.fd):
            result = os.fstat(file.fd).st_size, digest(file.fd)
        self._sealed[disk_id] = result
        return result

    def commit(self, point: Point) -> None:
        """Make the point exist, all at once and for good.

        Raises:
            StorageError: the point does not exist; call `abort`.
        """
        self._check(point)
        manifest = encode(point)
        if decode(manifest, f"{point.id}{MANIFEST}") != point:
            raise ValueError(f"the manifest of point {point.id} does not come back as written")
        doing = storage_errors(f"commit point {point.id} in {self._root}")
        with doing, Folder.open(self._root) as top:
            for name in self._journal.files:
                with top.sub(name.folder) as folder:
                    self._finish(folder, name.name)
            top.sync()
            with top.sub(POINTS) as points:
                points.write(point.id + MANIFEST, manifest)
                self._done = True
                self._open.close()
                with suppress(OSError):  # a journal beside its manifest is only removed
                    points.remove(point.id + JOURNAL)

    def _finish(self, folder: Folder, name: str) -> None:
        if folder.exists(name):
            raise StorageError(f"{folder.path / name} has appeared meanwhile.", "Run again.")
        folder.rename(name + PARTIAL, name)
        folder.sync()

    def _check(self, point: Point) -> None:
        """A manifest that does not say what was sealed would be a lie."""
        said = {disk.id: (disk.file, disk.file_size, disk.digest) for disk in point.disks}
        made = {
            disk_id: (file.name, *self._sealed.get(disk_id, (-1, "")))
            for disk_id, file in self.files.items()
        }
        if point.id != self.point_id or said != made:
            raise ValueError(f"the manifest of point {point.id} does not match its files")
        for disk_id, file in self.files.items():
            if os.fstat(file.fd).st_size != self._sealed[disk_id][0]:
                raise StorageError(f"{file.path} changed after it was sealed.", "Run again.")

    def abort(self, *, closed: bool = True) -> None:
        """Remove the files and the journal; log what cannot be removed, for the next run to do.

        Files that are `closed` elsewhere give back their room at once, whoever still holds a
        descriptor. After a commit that succeeded this does nothing.
        """
        if self._done:
            return
        self._done = True
        try:
            try:
                self._discard(self._empty if closed else None)
            except Exhausted:
                self._open.close()  # which makes room for the descriptors that it takes
                self._discard(None)
        except (QmpBackupError, Exhausted) as error:
            log.warning("Point %s stays unfinished: %s", self.point_id, error)
        finally:
            self._open.close()

    def _discard(self, empty: Callable[[], None] | None) -> None:
        with storage_errors("remove an unfinished point"), Folder.open(self._root) as top:
            _discard(top, self.point_id, self._journal, empty)

    def _empty(self) -> None:
        for file in self.files.values():
            with suppress(OSError):
                os.ftruncate(file.fd, 0)


def _plan(top: Folder, disks: Sequence[tuple[str, Level]], now: int) -> Journal:
    folders = [folder_name(disk_id) for disk_id, _ in disks]
    if len(set(folders)) != len(folders):
        raise ValueError("a disk stands twice in the plan of a point")
    existing = [name for name in folders if top.exists(name)]
    taken: set[int | None] = set()
    for name in existing:
        with top.sub(name) as folder:
            taken.update(map(epoch_of, folder.names()))
    epoch = now
    while epoch in taken:
        epoch += 1
    files = [
        FileName(folder, file_name(level, epoch))
        for folder, (_, level) in zip(folders, disks, strict=True)
    ]
    return Journal(tuple(files), tuple(name for name in folders if name not in existing))


def recover(root: Path) -> list[str]:
    """Clear up after runs that died; return a sentence for each thing done.

    The writer's lock must be held. Only what a journal lists is removed, and only where the point
    was never committed.

    Raises:
        StorageError: something could not be removed.
    """
    with storage_errors(f"clear up in {root}"), Folder.open(root) as top:
        if not top.exists(POINTS):
            return []
        with top.sub(POINTS) as points:
            names = points.names()
            for name in names:
                if name.endswith(
                    tuple(end + TEMPORARY for end in (MANIFEST, JOURNAL, MARK, MERGE))
                ):
                    points.remove(name)
        ids = [name.removesuffix(JOURNAL) for name in names if name.endswith(JOURNAL)]
        return [_recover_point(top, each) for each in ids if is_point_id(each)]


def remove(root: Path, point_id: str, files: Sequence[str]) -> None:
    """Make a point cease to exist, and remove `files` (as manifests name them); all locks held.

    The journal is that of a point in the making: beside its manifest it means nothing, without it
    whoever clears up removes the files.

    Raises:
        StorageError: the point may or may not exist; if not, the next run removes its files.
    """
    parsed = [parse_file(name) for name in files]
    journal = Journal(tuple(name for name in parsed if name is not None), ())
    if len(journal.files) != len(files) or not is_point_id(point_id):
        raise ValueError(f"point {point_id} has files that no point can have")
    with storage_errors(f"remove point {point_id} from {root}"), Folder.open(root) as top:
        with top.sub(POINTS) as points:
            points.write(point_id + JOURNAL, journal.encode())
        _discard(top, point_id, journal)


def left(root: Path) -> list[str]:
    """What `recover` would do, as clauses; nothing is changed.

    Raises:
        StorageError: the folder cannot be read.
    """
    with storage_errors(f"read {root}"), Folder.open(root) as top:
        if not top.exists(POINTS):
            return []
        with top.sub(POINTS) as points:
            names = points.names()
            ids = [name.removesuffix(JOURNAL) for name in names if name.endswith(JOURNAL)]
            return [_left_of_point(top, points, each) for each in ids if is_point_id(each)]


def _left_of_point(top: Folder, points: Folder, point_id: str) -> str:
    if points.exists(point_id + MANIFEST):
        return f"would remove the journal of point {point_id}, which was committed"
    name = point_id + JOURNAL
    try:
        journal = Journal.decode(points.read(name, LARGEST), f"{POINTS}/{name}")
    except DamagedError:
        return f"would leave {POINTS}/{name} alone, which is no journal of ours"
    files = [f"{file}{end}" for file in journal.files for end in (PARTIAL, "")]
    there = [each for each in files if _is_there(top, each)]
    return f"would remove the unfinished point {point_id} ({', '.join(there) or 'no files'})"


def _is_there(top: Folder, name: str) -> bool:
    folder, _, file = name.partition("/")
    if not top.exists(folder):
        return False
    with top.sub(folder) as inside:
        return inside.exists(file)


def unfinished_files(root: Path) -> tuple[str, ...]:
    """Names of all files that journals list, under both names that they can have.

    Raises:
        StorageError: the journals cannot be read.
    """
    found: list[str] = []
    with storage_errors(f"read {root}"), Folder.open(root) as top:
        if not top.exists(POINTS):
            return ()
        with top.sub(POINTS) as points:
            for name in points.names():
                if name.endswith(JOURNAL):
                    with suppress(DamagedError, FileNotFoundError):
                        journal = Journal.decode(points.read(name, LARGEST), name)
                        found += [f"{file}{end}" for file in journal.files for end in ("", PARTIAL)]
    return tuple(found)


def _recover_point(top: Folder, point_id: str) -> str:
    with top.sub(POINTS) as points:
        committed = points.exists(point_id + MANIFEST)
        if committed:
            points.remove(point_id + JOURNAL)
            return f"point {point_id} was committed; removed its journal"
        name = f"{POINTS}/{point_id}{JOURNAL}"
        try:
            journal = Journal.decode(points.read(point_id + JOURNAL, LARGEST), name)
        except DamagedError as error:
            log.warning("%s", error)
            return f"left {name} alone"
    removed = _discard(top, point_id, journal)
    return f"removed the unfinished point {point_id} ({removed} files)"


def _discard(
    top: Folder, point_id: str, journal: Journal, empty: Callable[[], None] | None = None
) -> int:
    """Remove a point that does not exist: manifest first, journal last, so that any prefix of this
    can be repeated. `empty` is what else makes room, once no manifest names the files."""
    if not top.exists(POINTS):
        return 0  # nothing was begun, or it is another folder that is there now
    with top.sub(POINTS) as points:
        if points.remove(point_id + MANIFEST):
            points.sync()
        if empty is not None:
            empty()
        removed = sum(_discard_file(top, name) for name in journal.files)
        for name in journal.folders:
            top.remove_folder(name)
        points.remove(point_id + JOURNAL)
        points.sync()
    return removed


def _discard_file(top: Folder, name: FileName) -> int:
    if not top.exists(name.folder):
        return 0
    with top.sub(name.folder) as folder:
        removed = [folder.remove(each) for each in (name.name + PARTIAL, name.name)]
        if any(removed):
            folder.sync()  # before the journal goes that would remove it again
    return sum(removed)
