# SPDX-License-Identifier: Apache-2.0
"""What a run asks of the way into a target, whichever it is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qmpbackup.machine import jobs, scratch
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.view import Seat, View
from qmpbackup.model import Point, Vm
from qmpbackup.plan.levels import DiskPlan, change_bitmap_name, end_mark_name
from qmpbackup.plan.names import RunNames
from qmpbackup.service.backup.request import Plan, Request
from qmpbackup.targets.inventory import Inventory
from qmpbackup.undo import UndoStack

Watch = jobs.Watch


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a disk: its file in the target, the point that this builds on, how many bytes
    were added, and the digest that proves it."""

    file: str
    parent: str | None
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
    seats: tuple[Seat, ...]
    names: RunNames
    watch: Watch | None
    teardown: UndoStack
    rollback: UndoStack

    def scratch(self, seat: Seat, plan: DiskPlan, what: str = "scratch") -> tuple[int, Path]:
        """Make a scratch file for a disk; `what` tells several of one disk apart."""
        return scratch.create(
            scratch.folder_for(plan.disk, self.request.scratch, self.monitor.peer_pid),
            self.names.of(what, seat.number),
            size=plan.disk.size,
            named=not self.monitor.passes_descriptors,
            undo=self.teardown,
        )


class Way(Protocol):
    """How the disks of one run get into a target."""

    @property
    def view(self) -> View:
        """The view that is copied."""

    def prepare(self, scratches: Sequence[tuple[int, Path]]) -> None:
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
    """An open target, held for the run."""

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

    def way(self, frame: Frame) -> Way:
        """The way of a run into it."""


class Opening(Protocol):
    """A target that is named, and about to be opened."""

    def destination(
        self, vm: Vm, approve: Callable[[Destination], object]
    ) -> AbstractContextManager[Destination]:
        """The target, opened and held. Where it would have to be made, `approve` may refuse before."""


def seats(plans: Sequence[DiskPlan], target_id: str, point_id: str, chunk: int) -> tuple[Seat, ...]:
    """The seats in a view that the disks of a plan take."""
    return tuple(
        Seat(
            disk=plan.disk,
            number=number,
            new_bitmap=(
                change_bitmap_name(target_id, point_id, plan.disk.id) if plan.keeps_bitmap else ""
            ),
            base_bitmap=plan.base_bitmap,
            new_end_mark=(
                end_mark_name(target_id, point_id, plan.disk.id) if plan.needs_end_mark else ""
            ),
            chunk=chunk,
        )
        for number, plan in enumerate(plans)
    )
