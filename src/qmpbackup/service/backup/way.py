# SPDX-License-Identifier: Apache-2.0
"""What a run asks of the way into a target: QEMU fills files (`pushed`), or we hand over chunks (`pulled`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qmpbackup.machine import jobs, scratch
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.model import Point
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.service.backup.request import Plan, Request
from qmpbackup.targets.receiver import Sealed
from qmpbackup.undo import UndoStack

Watch = jobs.Watch


@dataclass(frozen=True, slots=True)
class Frame:
    """What a run and its way share.

    `teardown` takes what must go in any case, as soon as everything is copied; `rollback` what must
    go only if the run fails.
    """

    request: Request
    monitor: Monitor
    plan: Plan
    watch: Watch | None
    teardown: UndoStack
    rollback: UndoStack

    def scratch(self, seat: Seat, what: str = "scratch") -> Scratch:
        """Make a scratch file for a disk; `what` tells several of one disk apart."""
        return scratch.create(
            seat,
            scratch.folder_for(seat.disk, self.request.scratch, self.monitor.peer_pid),
            self.plan.names.of(what, seat.number),
            named=not self.monitor.passes_descriptors,
            undo=self.teardown,
        )


class Way(Protocol):
    """How the disks of one run get into a target."""

    @property
    def view(self) -> View:
        """The view that is copied."""

    def prepare(self, scratches: Sequence[Scratch]) -> None:
        """Everything that can be done before the instant."""

    def copy(self) -> None:
        """Copy all disks from the view, which stands."""

    def close(self) -> None:
        """The view is gone: let go of whatever else in QEMU belongs to the copy."""

    def seal(self, plan: DiskPlan) -> Sealed:
        """All of a disk is there: make it durable, and say what became of it."""

    def commit(self, point: Point) -> None:
        """Make the point appear, durably."""
