# SPDX-License-Identifier: Apache-2.0
"""How far a backup is, as a value. Must not know who looks at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What a backup is at. It may begin anew: an audit that finds something has disks read once more."""

    PREPARE = "prepare"
    """All that comes before the instant, and the instant."""
    STAGE = "stage"
    """Copied into a local image first, where it cannot be read otherwise."""
    COPY = "copy"
    STORE = "store"
    """All is copied; it is made durable, and the point appears."""


@dataclass(frozen=True, slots=True)
class DiskProgress:
    """How far a disk is, in bytes. The total is what it may be at most until the copy has begun."""

    disk: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the backup of a VM is."""

    vm: str
    stage: Stage
    disks: tuple[DiskProgress, ...] = ()

    @property
    def done(self) -> int:
        """Bytes of all disks."""
        return sum(each.done for each in self.disks)

    @property
    def total(self) -> int:
        """Bytes of all disks."""
        return sum(each.total for each in self.disks)


Watch = Callable[[Progress], None]
WatchDisks = Callable[[Sequence[DiskProgress]], None]
