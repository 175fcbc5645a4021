# SPDX-License-Identifier: Apache-2.0
"""What is known to be damaged: a small file for each backup file that was found so.

    points/<folder>.<NAME>.damaged      which file, the digest that it should have, when, and why

Whoever reads a whole file and finds other bytes leaves one, so that no later run builds on that file;
whoever finds it whole removes it. A mark whose digest is none that a manifest wants any more (the
file was merged into) means nothing. Knows files; must not know how damage is found.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from qmpbackup.errors import QmpBackupError, lack_of
from qmpbackup.folder import Folder
from qmpbackup.model import StoredDisk
from qmpbackup.targets.members import SCHEMA, ObjectReader, parse_object
from qmpbackup.targets.names import MARK, POINTS, parse_file

_LARGEST = 1024 * 1024
_LONGEST_REASON = 4096


@dataclass(frozen=True, slots=True)
class Mark:
    """One backup file that was found damaged. `digest` is the one that it should have."""

    file: str
    digest: str
    time: str
    reason: str

    @property
    def text(self) -> str:
        """Why, and since when that is known."""
        return f"{self.reason} (found {self.time})" if self.time else self.reason

    def encode(self) -> bytes:
        """As it is written."""
        content = {
            "schema": SCHEMA,
            "file": self.file,
            "digest": self.digest,
            "time": self.time,
            "reason": self.reason[:_LONGEST_REASON],
        }
        return (json.dumps(content, indent=1) + "\n").encode("ascii")

    @classmethod
    def decode(cls, data: bytes, name: str) -> "Mark":
        """Parse.

        Raises:
            DamagedError: it is not what the schema says.
            StorageError: a newer version of qmpbackup wrote it.
        """
        reader = ObjectReader(parse_object(data, name), name)
        reader.schema()
        texts = [reader.text(key) for key in ("file", "digest", "time", "reason")]
        reader.end()
        return cls(*texts)


def mark_name(file: str) -> str:
    """The name of the mark of a backup file, `<folder>/<NAME>`."""
    return file.replace("/", ".") + MARK


def put(top: Folder, disk: StoredDisk, reason: str) -> None:
    """Mark the file of a disk as damaged, durably.

    Raises:
        OSError: it could not be written.
        DamagedError: `points` is no folder.
        StorageError: it is somebody else's folder.
    """
    mark = Mark(disk.file, disk.digest, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", reason)
    with top.sub(POINTS) as points:
        if _read(points, disk) is None:
            points.require_ours()
            points.write(mark_name(disk.file), mark.encode())


def remove(top: Folder, name: str) -> bool:
    """Remove the mark of a backup file; `False` where there was none.

    Raises:
        OSError: it could not be removed.
        DamagedError: `points` is no folder.
        StorageError: it is somebody else's folder.
    """
    with top.sub(POINTS) as points:
        # Looked for first: removing fails on read-only media even where nothing is.
        if not points.exists(mark_name(name)):
            return False
        points.require_ours()
        if not points.remove(mark_name(name)):
            return False
        points.sync()
        return True


def marked_files(top: Folder) -> tuple[str, ...]:
    """Names of the files that have a mark, whatever it says."""
    with top.sub(POINTS) as points:
        names = points.names()
    found = (name.removesuffix(MARK).rpartition(".") for name in names if name.endswith(MARK))
    files = (f"{folder}/{name}" for folder, _, name in found)
    return tuple(file for file in files if parse_file(file))


def find(top: Folder, disk: StoredDisk) -> Mark | None:
    """The mark of a disk's file, if it means the bytes that the manifest wants.

    One that cannot be read counts: who marked the file had a reason.
    """
    with suppress(FileNotFoundError), top.sub(POINTS) as points:
        return _read(points, disk)
    return None


def _read(points: Folder, disk: StoredDisk) -> Mark | None:
    name = mark_name(disk.file)
    if not points.exists(name):
        return None
    try:
        mark: Mark | None = Mark.decode(points.read(name, _LARGEST), f"{POINTS}/{name}")
    except FileNotFoundError:
        return None  # just removed
    except (OSError, QmpBackupError) as error:
        if lack_of(error):
            raise
        mark = None
    if mark is None or mark.file != disk.file:
        return Mark(disk.file, disk.digest, "", "It is marked as damaged.")
    return mark if mark.digest == disk.digest else None
