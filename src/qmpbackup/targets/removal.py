# SPDX-License-Identifier: Apache-2.0
"""Points that go, as who decides which ones sees it: what there is, and how it is carried out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmpbackup.model import Point
from qmpbackup.plan.retention import Judged, Verdict


@dataclass(frozen=True, slots=True)
class Sweep:
    """How points are to be removed; not every kind of target can do all of it.

    Without `merging`, points on which others build stay. Without `sweeping`, what they leave in storage
    that they share with others stays until somebody sweeps that. `by_tags`: tags of points are to count.
    `wait` is in seconds, for others who hold the target.
    """

    merging: bool = True
    sweeping: bool = True
    by_tags: bool = False
    dry_run: bool = False
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Removed(Judged):
    """What has become of each point; a target may keep some that were to go, and says why.

    `freed` is by how many bytes less is stored now; after a dry run an estimate, or `None` where only
    the removal itself can tell. `merged` is how often files were, or would be, merged.
    """

    freed: int | None
    merged: int = 0


class Clearing(Protocol):
    """A target that is held so that points can go."""

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, oldest first."""

    @property
    def poor(self) -> Mapping[str, str]:
        """Ids of points that must not take the place of others, and why."""

    @property
    def tags(self) -> Mapping[str, Sequence[str]]:
        """Tags of points, by id."""

    def perform(self, verdicts: Sequence[Verdict]) -> Removed:
        """Remove what is not kept, or say what that would come to.

        Raises:
            DamagedError: what is stored is not whole enough to be sure; each step that was done is
                complete.
            StorageError: the same, where the storage failed; the next run goes on.
        """
