# SPDX-License-Identifier: Apache-2.0
"""Remove the points that a policy does not keep: `qmpbackup prune`.

    hold the target ─ finish what an earlier run left ─ decide (pure) ─ remove, step by step

How points go is the target's: from a folder with their files merged forward where others build on them,
from a repository by restic itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from qmpbackup import interrupt
from qmpbackup.errors import NoSuchTarget
from qmpbackup.model import Point
from qmpbackup.plan.pruning import keep_newest
from qmpbackup.plan.retention import Policy, Verdict, decide
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Target
from qmpbackup.targets.removal import Clearing, Removed, Sweep


@dataclass(frozen=True, slots=True)
class Request:
    """What to prune and what to keep.

    `vm` chooses one of the VMs of a repository. Without `merging`, points of a folder that others
    build on stay. Without `sweeping`, a repository keeps what they leave until `sweep`. `lock_wait` is in
    seconds.
    """

    target: Address
    policy: Policy
    vm: str = ""
    merging: bool = True
    sweeping: bool = True
    dry_run: bool = False
    lock_wait: float = 0.0


def prune(request: Request, now: datetime | None = None) -> Removed:
    """Remove what the policy does not keep.

    Raises:
        UsageError: the policy has no rule, or would keep nothing; nothing was touched.
        NoSuchTarget: there is no such target.
        Locked: somebody else holds it.
        DamagedError: what is stored is not whole enough to be sure; each step that was done is
            complete.
        StorageError: the same, where the storage failed; the next run goes on.
    """
    tags = bool(request.policy.tags)
    sweep = Sweep(request.merging, request.sweeping, tags, request.dry_run, request.lock_wait)
    with (
        interrupt.held(),
        opening.entrance(request.target).opened(request.vm) as target,
        target.removing(sweep) as removal,
    ):
        _require_own_points(target, removal.points)
        verdicts = _among_whole(removal, request.policy, now or datetime.now(UTC))
        return removal.perform(keep_newest(removal.points, verdicts))


def _require_own_points(target: Target, points: Sequence[Point]) -> None:
    elsewhere = "" if points else target.elsewhere()
    if elsewhere:
        raise NoSuchTarget(f"{target.name} holds no point itself.", elsewhere)


def _among_whole(removal: Clearing, policy: Policy, now: datetime) -> tuple[Verdict, ...]:
    """What the policy says. Poor points never take the place of others, and go once they would go even
    if they did; why is added to their reasons."""
    points, poor, tags = removal.points, removal.poor, removal.tags
    verdicts = decide(points, policy, now, tags)
    if not poor:
        return verdicts
    rich = [point for point in points if point.id not in poor]
    among = {each.point.id: each for each in decide(rich, policy, now, tags)} if rich else {}
    return tuple(
        among.get(each.point.id) or (each.also(poor[each.point.id]) if each.kept else each)
        for each in verdicts
    )
