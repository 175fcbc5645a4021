# SPDX-License-Identifier: Apache-2.0
"""What a run asks of the way into a target: the VM fills files (`pushed`), or we hand over chunks (`pulled`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qmpbackup.model import Point
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.plan.progress import DiskProgress, Stage
from qmpbackup.service.backup.request import Plan, Request
from qmpbackup.service.backup.source import Views
from qmpbackup.targets.receiver import Sealed
from qmpbackup.undo import UndoStack

Show = Callable[[Stage, Sequence[DiskProgress]], None]
"""Tells who looks on how far the disks are."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a run and its way share. `rollback` takes what must go only if the run fails."""

    request: Request
    plan: Plan
    rollback: UndoStack


class Way(Protocol):
    """How the disks of one run get into a target."""

    def prepare(self, views: Views) -> None:
        """Everything that can be done before the instant."""

    def copy(self, views: Views, show: Show) -> None:
        """Copy all disks from the views, which stand."""

    def seal(self, plan: DiskPlan) -> Sealed:
        """All of a disk is there: make it durable, and say what became of it."""

    def commit(self, point: Point) -> None:
        """Make the point appear, durably."""
