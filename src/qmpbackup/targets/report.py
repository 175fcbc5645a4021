# SPDX-License-Identifier: Apache-2.0
"""What looking through a target has found, as values."""

from dataclasses import dataclass

from qmpbackup.model import Point
from qmpbackup.targets.inventory import Damage


@dataclass(frozen=True, slots=True)
class Proved:
    """What was found about one point; no problems means that it can be restored, as far as was read."""

    point: Point
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a target.

    `damaged` is what no point stands for: manifests that cannot be read, and in a repository also
    snapshots, indexes and packs. `extra` are files called like backups that no manifest names,
    `foreign` are other files; both relative to the target.

    `files` and `size` are what the points need: backup files, or packs; `read_files` and `read_size`
    what of it was read.
    """

    verdicts: tuple[Proved, ...]
    damaged: tuple[Damage, ...] = ()
    extra: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    files: int = 0
    size: int = 0
    read_files: int = 0
    read_size: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.extra or any(each.problems for each in self.verdicts))
