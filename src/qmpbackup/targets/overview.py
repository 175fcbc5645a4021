# SPDX-License-Identifier: Apache-2.0
"""What a target holds of each VM, in short: how many points, and which is the newest good one. Pure.

A point from the future is none that a VM is protected by: it is counted, and the newest is looked for
among the others, as a clock that was wrong for one night would hide for months that nothing is made.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from qmpbackup.model import Point, VmIdentity
from qmpbackup.targets.inventory import Damage, Inventory, known_damage

SKEW: Final = timedelta(minutes=15)
"""By how much the clocks of hosts may differ."""


@dataclass(frozen=True, slots=True)
class HeldVm:
    """What there is of one VM. `newest` is its newest point that is not known to be damaged, nor from
    the future; `damaged` points are counted in `points`, too, as are those that are `ahead`."""

    identity: VmIdentity
    points: int = 0
    newest: Point | None = None
    damaged: int = 0
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Overview:
    """What there is of all VMs; what is damaged, of whichever VM; and the folder that it lies in, if
    that is a file system of this machine."""

    vms: tuple[HeldVm, ...] = ()
    damaged: tuple[Damage, ...] = ()
    folder: Path | None = None


def is_ahead(time: datetime, now: datetime) -> bool:
    """Whether this is the future."""
    return time > now + SKEW


def held(found: Inventory, now: datetime) -> HeldVm | None:
    """What an inventory of one VM's points comes to; None where it has none."""
    if not found.points:
        return None
    good = [each for each in found.points if not known_damage(found, each)]
    return HeldVm(
        found.points[-1].vm.identity,
        len(found.points) + len(found.damaged),
        newest(good, now),
        len(found.points) - len(good) + len(found.damaged),
        sum(is_ahead(each.time, now) for each in found.points),
    )


def newest(points: Iterable[Point], now: datetime) -> Point | None:
    """The newest of these that is not from the future."""
    past = (each for each in points if not is_ahead(each.time, now))
    return max(past, key=lambda each: (each.time, each.sequence), default=None)
