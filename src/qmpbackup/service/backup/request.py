# SPDX-License-Identifier: Apache-2.0
"""What a user asks of a backup, what is planned, and what came out, as values."""

from dataclasses import dataclass, field
from pathlib import Path

from qmpbackup.model import AUDIT, Absence, Level, Point, Quiesce, Skipped, Vm
from qmpbackup.plan.commands import Command
from qmpbackup.plan.instant import Seat, transaction
from qmpbackup.plan.levels import DiskPlan, NewPoint, effective_level
from qmpbackup.plan.names import RunNames
from qmpbackup.plan.room import Need
from qmpbackup.plan.selection import Selection
from qmpbackup.plan.speed import Speed, unlimited
from qmpbackup.service.offline import Offline
from qmpbackup.targets.interface import Address


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a run.

    `speed` is bytes a second for each disk (0: no limit), `limit` for all that is copied to the target,
    asked for again and again. `audit` is the share of unchanged chunks
    that an incremental into a repository reads again. With `check`, what goes into a repository is
    opened again before it is stored; with `verify_chain`, the files in a folder that an incremental is
    to build on are read whole before. `offline` is the VM where it is off; then `address` means nothing.
    `host` is what the VM's host is called, unless as it calls itself. `reserve` is the bytes that stay
    free on each file system the run writes to (`None`: see `plan.room`; 0: none, and nothing is looked
    at).
    """

    address: str
    target: Address
    level: Level
    agent_address: str = ""
    selection: Selection = field(default_factory=Selection)
    quiesce: Quiesce = Quiesce.NO
    pause: bool = False
    compress: bool = False
    speed: int = 0
    limit: Speed = unlimited
    monthly: bool = False
    uuid: str = ""
    scratch: Path | None = None
    lock_wait: float = 0.0
    audit: float = AUDIT
    check: bool = False
    verify_chain: bool = False
    offline: Offline | None = None
    reserve: int | None = None
    host: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, as a value: `Run` carries out this very plan, and `--dry-run` prints it.

    `target` is what messages call the target. `names` are those of what is made in QEMU.
    """

    vm: Vm
    target: str
    point: NewPoint
    names: RunNames
    disks: tuple[DiskPlan, ...]
    skipped: tuple[Skipped, ...]
    needs: tuple[tuple[Path, Need], ...] = ()

    @property
    def target_id(self) -> str:
        """The target's id, part of the names of its change bitmaps."""
        return self.point.target_id

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The parts that the disks have in the view."""
        return tuple(plan.seat for plan in self.disks)

    @property
    def transaction(self) -> tuple[Command, ...]:
        """What happens to bitmaps at the instant."""
        return transaction(self.seats, self.names)

    @property
    def level(self) -> Level:
        """The level of the point as a whole."""
        return effective_level(self.disks)

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Sentences about what holds data, cannot be backed up, and was not left out on request."""
        return tuple(
            f"{each.name} is in no backup: {each.reason}. Leave it out with --exclude to say that it "
            "is known."
            for each in self.skipped
            if each.absence is Absence.IMPOSSIBLE
        )

    @property
    def parent(self) -> str | None:
        """The newest of the points that the disks build on."""
        bases = [plan.base for plan in self.disks if plan.base is not None]
        return max(bases, key=lambda point: point.sequence).id if bases else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A committed point, and what about the run was not as it should be.

    `alarm` says of which disks an audit found unrecorded changes; they were read whole instead.
    """

    point: Point
    degraded: tuple[str, ...] = ()
    alarm: str = ""
