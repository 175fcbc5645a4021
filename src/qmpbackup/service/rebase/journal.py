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

from qmpbackup.durable import TEMPORARY, storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.folder import Folder
from qmpbackup.images import relink
from qmpbackup.model import Point
from qmpbackup.plan.merge import MERGED, OLD, PARTIAL, SYMLINK
from qmpbackup.service.rebase.build import Observer
from qmpbackup.service.rebase.place import Place
from qmpbackup.service.rebase.settle import SUFFIX, interrupted
from qmpbackup.targets import manifest
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.names import POINTS, is_point_id

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
            "schema": manifest.SCHEMA,
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
        reader = manifest.Reader(manifest.parse_object(data, name), name)
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


def write(place: Place, intent: Intent) -> None:
    """Record what is intended, durably.

    Raises:
        StorageError: it could not be written.
    """
    with storage_errors("write the journal of the merge"), _holder(place) as (folder, name):
        folder.write(name, intent.encode())


def discard(place: Place, base: str) -> None:
    """Remove what was built and the journal; for a merge that has destroyed nothing yet.

    Raises:
        StorageError: something could not be removed.
    """
    intent = _read(place)
    if intent is not None and intent.phase is Phase.SWAPPING:
        _end(place)  # first: it must not call for a file that goes
    with storage_errors(f"clear up in {place.folder}"), Folder.open(place.folder) as folder:
        for ending in (PARTIAL, MERGED):
            folder.remove(base + ending)
        folder.sync()
    _end(place)


def is_unfinished(place: Place) -> bool:
    """Whether a merge in this folder has been interrupted."""
    with storage_errors(f"read {place.folder}"):
        try:
            with _holder(place) as (folder, name):
                return folder.exists(name)
        except FileNotFoundError:
            return False


def roll_forward(target: DirectoryTarget, each: Observer = lambda _: None) -> list[str]:
    """Bring all interrupted merges of a target to an end; the lock to remove must be held.

    `each` is told every step.

    Returns:
        What was done, as clauses for a log.

    Raises:
        DamagedError: a journal cannot be read, or what it needs is gone.
        StorageError: something could not be written; it can be tried again.
    """
    places = [Place(target.path / name, target) for name in interrupted(target)]
    return [done for place in places for done in finish(place, each)]


def finish(place: Place, each: Observer = lambda _: None) -> list[str]:
    """Bring an interrupted merge in one folder to an end, if there is one; else change nothing.

    Raises:
        DamagedError: the journal cannot be read, or what it needs is gone.
        StorageError: something could not be written; it can be tried again.
    """
    intent = _read(place)
    if intent is None:
        return []
    where = f"{place.name}/{intent.base}"
    if intent.phase is Phase.BUILDING:
        discard(place, intent.base)
        return [f"removed the unfinished merge of {where}"]
    perform(place, intent, each)
    return [f"finished the merge into {where}"]


def perform(place: Place, intent: Intent, each: Observer) -> None:
    """Carry out what a journal in the phase `SWAPPING` says.

    Raises:
        DamagedError: the merged image is gone, or not the one that was proved.
        StorageError: something could not be written; it can be tried again.
    """
    with storage_errors(f"merge in {place.folder}"), Folder.open(place.folder) as folder:
        if folder.exists(intent.base + MERGED):
            _require_size(folder, intent.base + MERGED, intent.size)
            _swap(place, folder, intent, each)
        else:
            _require_size(folder, intent.base, intent.size)
        for name in intent.remove:
            folder.remove(name)
            each(f"removed {name}")
        folder.remove(intent.base + OLD)
        _correct_symlink(folder, intent)
        folder.sync()
        each("cleared up")
    _end(place)
    each("done")


def _swap(place: Place, folder: Folder, intent: Intent, each: Observer) -> None:
    if folder.exists(intent.base):
        folder.rename(intent.base, intent.base + OLD)
        folder.sync()
        each("set the full aside")
    for name in intent.relink:
        _relink(folder, name, intent.base)
        each(f"relinked {name}")
    for point in intent.record:
        _target(place).replace_manifest(point)
        each(f"recorded {point.id}")
    for point_id in intent.forget:
        _target(place).remove_manifest(point_id)
        each(f"forgot {point_id}")
    folder.rename(intent.base + MERGED, intent.base)
    folder.sync()
    each("put the merged image in place")


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


def _relink(folder: Folder, name: str, parent: str) -> None:
    with _open_head(folder, name) as (fd, head):
        _write_head(fd, head, relink.relinked(head, name, parent))


def put_link(folder: Folder, name: str, parent: str) -> None:
    """Let an image of the folder build on another one, whatever it builds on now, durably.

    Raises:
        DamagedError: it is no qcow2 image.
        StorageError: its head has no room for the link.
        OSError: it could not be written.
    """
    with _open_head(folder, name) as (fd, head):
        _write_head(fd, head, relink.linked(head, name, parent))


@contextmanager
def _open_head(folder: Folder, name: str) -> Iterator[tuple[int, bytes]]:
    fd = folder.open_file(name, write=True)
    try:
        yield fd, os.pread(fd, relink.HEAD, 0)
    finally:
        os.close(fd)


def _write_head(fd: int, head: bytes, new: bytes) -> None:
    changed = [at for at, (one, other) in enumerate(zip(head, new, strict=True)) if one != other]
    if changed:
        os.pwrite(fd, new[: changed[-1] + 1], 0)
    os.fsync(fd)


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


@contextmanager
def _holder(place: Place) -> Iterator[tuple[Folder, str]]:
    """The open folder that a journal is in, and its name."""
    if place.target is None:
        with Folder.open(place.folder) as folder:
            yield folder, SUFFIX
        return
    with Folder.open(place.target.path) as top, top.sub(POINTS) as points:
        yield points, place.name + SUFFIX


def _read(place: Place) -> Intent | None:
    with storage_errors("read the journal of a merge"):
        try:
            with _holder(place) as (folder, name):
                folder.remove(name + TEMPORARY)
                return Intent.decode(folder.read(name, _LARGEST), name)
        except FileNotFoundError:
            return None


def _end(place: Place) -> None:
    with storage_errors("remove the journal of a merge"), _holder(place) as (folder, name):
        folder.remove(name)
        folder.sync()


def _target(place: Place) -> DirectoryTarget:
    if place.target is None:
        raise DamagedError(f"The journal in {place.folder} names manifests where none are.")
    return place.target
