# SPDX-License-Identifier: Apache-2.0
"""Which disks a run takes: `--include` and `--exclude`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qmpbackup.errors import UsageError
from qmpbackup.model import LEFT_OUT, Absence, Disk, Skipped


@dataclass(frozen=True, slots=True)
class Selection:
    """Names of disks to take (none: all) and to leave out: disk ids, nodes, drives, devices, labels."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def apply(
        self, disks: Sequence[Disk], skipped: Sequence[Skipped] = ()
    ) -> tuple[tuple[Disk, ...], tuple[Skipped, ...]]:
        """The chosen disks, and all that the point does not hold, with the reason.

        What cannot be backed up may be left out as well, which says that it is known to be missing.

        Raises:
            UsageError: a name is nobody's.
        """
        impossible = [each for each in skipped if each.absence is Absence.IMPOSSIBLE]
        known = {name for disk in disks for name in names(disk)}
        known |= {name for each in impossible for name in names(each)}
        for name in (*self.include, *self.exclude):
            if name not in known:
                raise UsageError(
                    f"The VM has no disk {name!r}.", f"Its disks are: {listed(disks)}."
                )
        chosen = tuple(disk for disk in disks if self._wants(disk))
        others = (self._considered(each) for each in skipped)
        left_out = (
            Skipped(disk.id, LEFT_OUT, Absence.CHOSEN) for disk in disks if disk not in chosen
        )
        return chosen, (*others, *left_out)

    def _considered(self, skipped: Skipped) -> Skipped:
        if skipped.absence is Absence.IMPOSSIBLE and not self._wants(skipped):
            return replace(skipped, reason=f"{LEFT_OUT}; {skipped.reason}", absence=Absence.CHOSEN)
        return skipped

    def _wants(self, each: Disk | Skipped) -> bool:
        mine = names(each)
        return (not self.include or not mine.isdisjoint(self.include)) and mine.isdisjoint(
            self.exclude
        )


def names(each: Disk | Skipped) -> frozenset[str]:
    """Everything that a disk, or what is none, can be called on the command line."""
    own = {each.id, each.label} if isinstance(each, Disk) else {each.name}
    return frozenset((own | set(each.aliases)) - {""})


def listed(disks: Iterable[Disk]) -> str:
    """Disk ids for a message."""
    return ", ".join(disk.id for disk in disks) or "none"
