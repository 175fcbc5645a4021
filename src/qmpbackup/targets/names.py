# SPDX-License-Identifier: Apache-2.0
"""Names inside a directory target: folders of disks, backup files, manifests. Pure text, no I/O."""

import re
from dataclasses import dataclass

from qmpbackup.model import Level

VM_FILE = "vm.json"
POINTS = "points"
WRITER_LOCK = ".lock"
REMOVER_LOCK = ".lock-remove"
MANIFEST = ".json"
JOURNAL = ".pending"
PARTIAL = ".partial"
MARK = ".damaged"
MERGE = ".merge"

LONGEST_FOLDER = 128
"""Bytes of the longest folder name; leaves room below every file system's limit."""

_RESERVED = frozenset({POINTS, VM_FILE})
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_POINT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", re.ASCII)
_FOLDER = re.compile(r"(?!\.)[A-Za-z0-9._%-]{1,128}", re.ASCII)
_FILE = re.compile(r"(FULL|INC|DIFF|COPY)-([0-9]{1,12})", re.ASCII)
_PREFIX = {Level.FULL: "FULL", Level.INC: "INC", Level.DIFF: "DIFF", Level.COPY: "COPY"}


@dataclass(frozen=True, slots=True)
class FileName:
    """A backup file, as manifests name it: `<folder>/<NAME>`."""

    folder: str
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


def folder_name(disk_id: str) -> str:
    """The folder of a disk: its id, with everything but `[A-Za-z0-9._-]` percent-encoded.

    Different ids have different folders. A leading dot and the names that the target uses itself
    are encoded too. What would be longer than `LONGEST_FOLDER` ends in a hash of the id instead;
    `%-` marks it, which no encoding contains.
    """
    data = disk_id.encode("utf-8", "surrogatepass")
    name = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in data) or "%"
    if name.startswith(".") or name in _RESERVED:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) <= LONGEST_FOLDER:
        return name
    import hashlib

    mark = "%-" + hashlib.blake2b(data, digest_size=16).hexdigest()
    return name[: LONGEST_FOLDER - len(mark)] + mark


def file_name(level: Level, epoch: int) -> str:
    """The name of a backup file of this level, such as `INC-1480542701`."""
    return f"{_PREFIX[level]}-{epoch}"


def is_file_name(name: str) -> bool:
    """Whether a backup file of ours, or of the original tool, could be called so."""
    return _FILE.fullmatch(name) is not None


def epoch_of(name: str) -> int | None:
    """The number in the name of a backup file, finished or not; `None` for any other name."""
    match = _FILE.fullmatch(name.removesuffix(PARTIAL))
    return int(match[2]) if match else None


def parse_file(text: str) -> FileName | None:
    """The parts of `<folder>/<NAME>`, or `None` for anything that is not exactly such a name."""
    folder, slash, name = text.partition("/")
    if slash and _FOLDER.fullmatch(folder) and folder not in _RESERVED and is_file_name(name):
        return FileName(folder, name)
    return None


def is_folder_name(name: str) -> bool:
    """Whether the folder of a disk could be called so."""
    return _FOLDER.fullmatch(name) is not None and name not in _RESERVED


def is_point_id(text: str) -> bool:
    """Whether a point could have this id; such ids are safe as names of files."""
    return _POINT_ID.fullmatch(text) is not None
