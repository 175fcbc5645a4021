# SPDX-License-Identifier: Apache-2.0
"""What a run asks of the way into a target, whichever it is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qmpbackup.machine import jobs, scratch
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.model import Point, Vm
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.service.backup.request import Plan, Request
from qmpbackup.targets.inventory import Inventory
from qmpbackup.undo import UndoStack

Watch = jobs.Watch


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a disk: its file in the target, how many bytes were added, and the digest that
    proves it."""

    file: str
    size: int
    digest: str


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

    def stored(self, plan: DiskPlan) -> Stored:
        """What became of a disk."""

    def commit(self, point: Point) -> None:
        """Make the point appear, durably."""


class Destination(Protocol):
    """A target as it was found: held for the run where it is there, else still to be made."""

    @property
    def id(self) -> str:
        """The target's id, part of the names of its change bitmaps."""

    @property
    def place(self) -> str:
        """What messages call it."""

    @property
    def stored(self) -> Inventory:
        """What it holds."""

    @property
    def chunk(self) -> int:
        """Bytes of a chunk, where disks are read in chunks (0: QEMU copies them)."""

    @property
    def folder(self) -> Path | None:
        """Where it lies, if that is a file system of this machine."""

    @property
    def stores_plain(self) -> bool:
        """Whether it takes as much room as what is copied."""

    def stages(self, vm: Vm) -> bool:
        """Whether what is copied of this VM goes into a local image beside the scratch first."""

    def obstacle(self, point: Point, disk_id: str) -> str:
        """Why nothing can be built upon a disk of a point; empty if nothing speaks against it."""

    def distrust(self, disks: frozenset[str]) -> None:
        """From now on, nothing can be built upon these disks."""

    def claim(self, vm: Vm) -> AbstractContextManager["Destination"]:
        """The target for a run, whose plan is made: now it is made where it was not there."""

    def way(self, frame: Frame) -> Way:
        """The way of a run into it."""


class Opening(Protocol):
    """A target that is named, and about to be opened."""

    def found(self, vm: Vm) -> AbstractContextManager[Destination]:
        """What is there, held for the block; nothing is made."""
