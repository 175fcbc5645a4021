# SPDX-License-Identifier: Apache-2.0
"""What a restore is asked for, and what came out."""

from dataclasses import dataclass
from pathlib import Path

from qmpbackup.model import Point
from qmpbackup.plan.chain import LATEST
from qmpbackup.plan.missing import NotInPoint
from qmpbackup.targets.interface import Address

FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for. Either `folder` or `file` is set; no `disks` means all.

    No `format` means raw for a block device, else qcow2. `vm` names one of several in a repository.
    `reserve` is the bytes that stay free where files are written (`None`: see `plan.room`).
    """

    target: Address
    point: str = LATEST
    disks: tuple[str, ...] = ()
    folder: Path | None = None
    file: Path | None = None
    format: str = ""
    force: bool = False
    lock_wait: float = 0.0
    vm: str = ""
    reserve: int | None = None

    @property
    def file_format(self) -> str:
        """The format of files that are written."""
        return self.format or "qcow2"


@dataclass(frozen=True, slots=True)
class Restored:
    """A disk that is back: where, and how many bytes the disk has."""

    disk_id: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The point that was restored, its disks, and what it lacks of its VM where all were wanted."""

    point: Point
    disks: tuple[Restored, ...]
    missing: tuple[NotInPoint, ...] = ()

    @property
    def degraded(self) -> bool:
        """Whether the VM that comes back is less than it was."""
        return any(each.degrading for each in self.missing)
