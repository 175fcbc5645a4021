# SPDX-License-Identifier: Apache-2.0
"""What a merge intends, durable before anything is destroyed, and how it is brought to its end.

    building    the journal names the full; what lies beside it is only half made, and is removed
    swapping    the merged image is proved and durable as FULL.merged; from here only forward:
                FULL aside ─ links of what builds on the chain ─ manifests ─ FULL.merged → FULL
                ─ remove what is superseded ─ remove the journal

While the full is aside, every state of the chain is missing a file and so is refused; the moment the
merged image takes the name, all manifests are true again. Each step can be repeated, so whoever finds
a journal starts at the top. Must not know how the image was made.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qmpbackup.durable import TEMPORARY, storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.folder import Folder
from qmpbackup.images import relink
from qmpbackup.model import Point
from qmpbackup.plan.merge import MERGED, OLD, PARTIAL, SYMLINK
from qmpbackup.targets import manifest
from qmpbackup.targets.members import SCHEMA, ObjectReader, parse_object
from qmpbackup.targets.names import MANIFEST, MERGE, POINTS, is_folder_name, is_point_id

_LARGEST = 1024 * 1024 * 1024


class Phase(StrEnum):
    """How far a merge is."""

    BUILDING = "building"
    SWAPPING = "swapping"


@dataclass(frozen=True, slots=True)
class Intent:
    """What a merge has to do in its folder. `size` is that of the merged image, in bytes.

    `relink` and `remove` are names of files, `record` and `forget` manifests to write and ids of
    those to remove.
    """

    phase: Phase
    base: str
    size: int = 0
    relink: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    record: tuple[Point, ...] = ()
    forget: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """As it is written."""
        content = {
            "schema": SCHEMA,
            "phase": self.phase.value,
            "base": self.base,
            "size": self.size,
            "relink": list(self.relink),
            "remove": list(self.remove),
            "record": [manifest.encode(point).decode("ascii") for point in self.record],
            "forget": list(self.forget),
        }
        return json.dumps(content).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, name: str) -> "Intent":
        """Parse; what is not the plain name of a file, or a manifest, is damage.

        Raises:
            DamagedError: it is no journal of ours.
            StorageError: a newer version of qmpbackup wrote it.
        """
        reader = ObjectReader(parse_object(data, name), name)
        reader.schema()
        records = reader.texts("record", manifest.LARGEST)
        intent = cls(
            phase=reader.choice("phase", Phase),
            base=reader.text("base"),
            size=reader.integer("size"),
            relink=reader.texts("relink"),
            remove=reader.texts("remove"),
            record=tuple(
                manifest.decode(each.encode(errors="surrogatepass"), f"{name}: record")
                for each in records
            ),
            forget=reader.texts("forget"),
        )
        reader.end()
        names = (intent.base, *intent.relink, *intent.remove)
        plain = all(each and "/" not in each and each not in {".", ".."} for each in names)
        if not plain or not all(is_point_id(each) for each in intent.forget):
            raise DamagedError(f"{name} is not a journal of ours.", "Look at it, then remove it.")
        return intent


@dataclass(frozen=True, slots=True)
class MergeJournal:
    """The journal of a merge in `folder`, which has the images of a disk. It lies in `points/`, named
    after that folder and `MERGE`; in a folder without manifests that is the whole name.

    `target` is the folder of the target that it belongs to; `None`: it has no manifests.
    """

    folder: Path
    target: Path | None = None

    def write(self, intent: Intent) -> None:
        """Record what is intended, durably.

        Raises:
            StorageError: it could not be written.
        """
        with storage_errors("write the journal of the merge"), self._holder() as (folder, name):
            folder.write(name, intent.encode())

    def discard(self, base: str) -> None:
        """Remove what was built and the journal; for a merge that has destroyed nothing yet.

        Raises:
            StorageError: something could not be removed.
        """
        intent = self._read()
        if intent is not None and intent.phase is Phase.SWAPPING:
            self._end()  # first: it must not call for a file that goes
        with storage_errors(f"clear up in {self.folder}"), Folder.open(self.folder) as folder:
            for ending in (PARTIAL, MERGED):
                folder.remove(base + ending)
            folder.sync()
        self._end()

    def is_there(self) -> bool:
        """Whether a merge in this folder has been interrupted, or is under way."""
        with storage_errors(f"read {self.folder}"):
            try:
                with self._holder() as (folder, name):
                    return folder.exists(name)
            except FileNotFoundError:
                return False

    def finish(self) -> list[str]:
        """Bring an interrupted merge to an end, if there is one; else change nothing.

        Returns:
            What was done, as clauses for a log.

        Raises:
            DamagedError: the journal cannot be read, or what it needs is gone.
            StorageError: something could not be written; it can be tried again.
        """
        intent = self._read()
        if intent is None:
            return []
        where = f"{self.folder.name}/{intent.base}"
        if intent.phase is Phase.BUILDING:
            self.discard(intent.base)
            return [f"removed the unfinished merge of {where}"]
        self.perform(intent)
        return [f"finished the merge into {where}"]

    def perform(self, intent: Intent) -> None:
        """Carry out what a journal in the phase `SWAPPING` says.

        Raises:
            DamagedError: the merged image is gone, or not the one that was proved.
            StorageError: something could not be written; it can be tried again.
        """
        with storage_errors(f"merge in {self.folder}"), Folder.open(self.folder) as folder:
            if folder.exists(intent.base + MERGED):
                _require_size(folder, intent.base + MERGED, intent.size)
                self._swap(folder, intent)
            else:
                _require_size(folder, intent.base, intent.size)
            for name in intent.remove:
                folder.remove(name)
            folder.remove(intent.base + OLD)
            _correct_symlink(folder, intent)
            folder.sync()
        self._end()

    def _swap(self, folder: Folder, intent: Intent) -> None:
        if folder.exists(intent.base):
            folder.rename(intent.base, intent.base + OLD)
            folder.sync()
        for name in intent.relink:
            relink.write(folder, name, intent.base)
        if intent.record or intent.forget:
            self._correct_manifests(intent)
        folder.rename(intent.base + MERGED, intent.base)
        folder.sync()

    def _correct_manifests(self, intent: Intent) -> None:
        if self.target is None:
            raise DamagedError(f"The journal in {self.folder} names manifests where none are.")
        with Folder.open(self.target) as top, top.sub(POINTS) as points:
            for point in intent.record:
                with storage_errors(f"write the manifest of point {point.id}"):
                    points.write(point.id + MANIFEST, manifest.encode(point))
            for point_id in intent.forget:
                with storage_errors(f"remove the manifest of point {point_id}"):
                    points.remove(point_id + MANIFEST)
                    points.sync()

    @contextmanager
    def _holder(self) -> Iterator[tuple[Folder, str]]:
        """The open folder that the journal is in, and its name."""
        if self.target is None:
            with Folder.open(self.folder) as folder:
                yield folder, MERGE
            return
        with Folder.open(self.target) as top, top.sub(POINTS) as points:
            yield points, self.folder.name + MERGE

    def _read(self) -> Intent | None:
        with storage_errors("read the journal of a merge"):
            try:
                with self._holder() as (folder, name):
                    folder.remove(name + TEMPORARY)
                    return Intent.decode(folder.read(name, _LARGEST), name)
            except FileNotFoundError:
                return None

    def _end(self) -> None:
        with storage_errors("remove the journal of a merge"), self._holder() as (folder, name):
            folder.remove(name)
            folder.sync()


def interrupted(target: Path) -> tuple[str, ...]:
    """Names of the folders in which a merge was interrupted, or is under way.

    Raises:
        StorageError: the target cannot be read.
    """
    with storage_errors(f"read {target}"), Folder.open(target) as top:
        if not top.exists(POINTS):
            return ()
        with top.sub(POINTS) as points:
            names = points.names()
    found = (name.removesuffix(MERGE) for name in names if name.endswith(MERGE))
    return tuple(name for name in found if is_folder_name(name))


def roll_forward(target: Path) -> list[str]:
    """Bring all interrupted merges of a target to an end; the lock to remove must be held.

    Returns:
        What was done, as clauses for a log.

    Raises:
        DamagedError: a journal cannot be read, or what it needs is gone.
        StorageError: something could not be written; it can be tried again.
    """
    journals = [MergeJournal(target / name, target) for name in interrupted(target)]
    return [done for journal in journals for done in journal.finish()]


def _require_size(folder: Folder, name: str, size: int) -> None:
    try:
        found = folder.size(name)
    except FileNotFoundError:
        found = -1
    if found != size:
        state = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
        raise DamagedError(
            f"An interrupted merge cannot be finished: {folder.path / name} {state}.",
            f"Put it back; the full of before may still be there as {name.removesuffix(MERGED)}{OLD}.",
        )


def _correct_symlink(folder: Folder, intent: Intent) -> None:
    """The link to the newest image, where it led to one that is gone, leads to the full."""
    try:
        led_to = os.readlink(SYMLINK, dir_fd=folder.fd)
    except OSError:
        return
    if led_to.rpartition("/")[2] in intent.remove:
        put_symlink(folder, intent.base)


def put_symlink(folder: Folder, name: str) -> None:
    """Let the link to the newest image lead to a file of the folder.

    Raises:
        OSError: it could not be made.
    """
    folder.remove(SYMLINK + TEMPORARY)
    os.symlink(name, SYMLINK + TEMPORARY, dir_fd=folder.fd)
    folder.rename(SYMLINK + TEMPORARY, SYMLINK)
    folder.sync()
