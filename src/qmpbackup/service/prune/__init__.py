# SPDX-License-Identifier: Apache-2.0
"""Remove the points that a policy does not keep: `qmpbackup prune`.

directory    in a folder: points go, and the files of those that others build on are merged forward
repository   in a restic repository: decided here, forgotten and swept by restic itself

Which points go is decided in one place for both, `plan.retention`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from qmpbackup.model import Location, Place, Point
from qmpbackup.plan.retention import Policy, Verdict


@dataclass(frozen=True, slots=True)
class Request:
    """What to prune and what to keep.

    `vm` chooses one of the VMs of a repository. Without `merging`, points of a folder that others
    build on stay. `lock_wait` is in seconds.
    """

    target: Place
    policy: Policy
    vm: str = ""
    merging: bool = True
    dry_run: bool = False
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of each point, newest first.

    `freed` is by how many bytes less is stored now; after a dry run an estimate, or `None` where only
    restic can tell. `merged` is how often files were, or would be, merged.
    """

    verdicts: tuple[Verdict, ...]
    freed: int | None
    merged: int = 0

    @property
    def kept(self) -> tuple[Verdict, ...]:
        """The points that stay, with the reasons, newest first."""
        return tuple(each for each in self.verdicts if each.kept)

    @property
    def removed(self) -> tuple[Point, ...]:
        """The points that go, newest first."""
        return tuple(each.point for each in self.verdicts if not each.kept)


def prune(request: Request, now: datetime | None = None) -> Outcome:
    """Remove what the policy does not keep.

    Raises:
        UsageError: the policy has no rule, or would keep nothing; nothing was touched.
        NoSuchTarget: there is no such target.
        Locked: somebody else holds it.
        DamagedError: what is stored is not whole enough to be sure; each step that was done is
            complete.
        StorageError: the same, where the storage failed; the next run goes on.
    """
    now = now or datetime.now(UTC)
    if isinstance(request.target, Location):
        from qmpbackup.service.prune import repository

        return repository.prune(request, request.target, now)
    from qmpbackup.service.prune import directory

    return directory.prune(request, request.target, now)
