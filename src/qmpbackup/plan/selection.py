# SPDX-License-Identifier: Apache-2.0
"""Which disks a run takes: `--include` and `--exclude`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpbackup.errors import UsageError
from qmpbackup.model import Disk, Skipped


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of disks to take (none: all) and to leave out: disk ids, nodes, drives, devices, labels."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def apply(self, disks: Sequence[Disk]) -> tuple[tuple[Disk, ...], tuple[Skipped, ...]]:
        """The chosen disks, and the others with the reason.

        Raises:
            UsageError: a name is nobody's.
        """
        known = {name for disk in disks for name in names(disk)}
        for name in (*self.include, *self.exclude):
            if name not in known:
                raise UsageError(
                    f"The VM has no disk {name!r}.", f"Its disks are: {listed(disks)}."
                )
        chosen = tuple(disk for disk in disks if self._wants(disk))
        left_out = tuple(
            Skipped(disk.id, "left out on request") for disk in disks if disk not in chosen
        )
        return chosen, left_out

    def _wants(self, disk: Disk) -> bool:
        mine = names(disk)
        return (not self.include or not mine.isdisjoint(self.include)) and mine.isdisjoint(
            self.exclude
        )


def names(disk: Disk) -> frozenset[str]:
    """Everything that a disk can be called on the command line."""
    return frozenset({disk.id, *disk.aliases, disk.label} - {""})


def listed(disks: Iterable[Disk]) -> str:
    """Disk ids for a message."""
    return ", ".join(disk.id for disk in disks) or "none"
