# SPDX-License-Identifier: Apache-2.0
"""One run of a backup, from its plan to its committed point."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import CommandError, JobError, QmpBackupError, StorageError, VmError
from qmpbackup.machine import needed_files, scratch
from qmpbackup.machine.view import Instant, require_present
from qmpbackup.model import Consistency, Disk, Point, StoredDisk, VmConfig
from qmpbackup.plan.levels import DiskPlan, rubbish
from qmpbackup.plan.progress import DiskProgress, Progress, Stage, Watch
from qmpbackup.service.backup.destination import Destination
from qmpbackup.service.backup.request import Outcome, Plan, Request
from qmpbackup.service.backup.rooms import Rooms
from qmpbackup.service.backup.source import Views, VmSource
from qmpbackup.service.backup.way import Frame, Way
from qmpbackup.targets.receiver import Sealed
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)

_REFUSALS = (CommandError, JobError, StorageError)
"""What QEMU says when it will not touch a disk."""

LEAST_FOR_BITMAPS = 16 * 1024 * 1024
"""Bytes that should be free beside an image: a bitmap of 1 TiB takes 2 MiB, of 4 TiB 8 MiB."""


def _warn_of_full_storage(disk: Disk) -> None:
    """QEMU stores change bitmaps in the image when it ends, and drops them where there is no room."""
    folder = Path(disk.filename).parent
    with suppress(OSError):  # QEMU may see folders that we may not look into
        if disk.can_persist and folder.is_dir() and scratch.free_bytes(folder) < LEAST_FOR_BITMAPS:
            log.warning(
                "There is next to no room in %s: when the VM ends, the change bitmap of %s may be "
                "lost, and the next backup of it is a full.",
                folder,
                disk.id,
            )


class Run:
    """One run from its plan to its committed point."""

    def __init__(
        self,
        request: Request,
        source: VmSource,
        destination: Destination,
        plan: Plan,
        watch: Watch | None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._watch = watch
        self._degraded: list[str] = []
        self._rooms = Rooms(source, plan.vm, plan.needs, request.reserve)
        self._frame = Frame(request, plan, UndoStack())
        self._progress = Progress(
            plan.vm.config.identity.name,
            Stage.PREPARE,
            tuple(DiskProgress(each.disk.id, 0, each.bytes_to_copy) for each in plan.disks),
        )

    def execute(self) -> Outcome:
        """All steps; on any failure everything is undone and the failure raised."""
        for plan in self._plan.disks:
            log.info("Disk %s: %s (%s)", plan.disk.id, plan.level, plan.reason)
            _warn_of_full_storage(plan.disk)
        self._show(Stage.PREPARE)
        with self._rooms.marked():
            point = self._make_point()
        self._retire_bitmaps(point)
        return Outcome(point, (*self._degraded, *self._rooms.complaints, *self._plan.unsaved))

    def _make_point(self) -> Point:
        try:
            with self._source.views(self._plan, self._frame.rollback) as views:
                return self._committed(views)
        except _REFUSALS as error:
            self._require_present_still(error)
            raise

    def _committed(self, views: Views) -> Point:
        with self._rooms.kept():
            way = self._destination.way(self._frame)
            way.prepare(views)
            interrupt.check()
            instant, consistency = views.take()
            log.info("The VM stood still for %.1f ms.", instant.pause * 1000)
            self._degraded += views.complaints
            way.copy(views, self._show)
            self._show(Stage.STORE)
            # What a destination writes to the disks, no filter in this QEMU sees.
            require_present(self._source.status())
            self._degraded += views.take_down()
            self._rooms.feed()
            views.close()
            point = self._point(way, instant, consistency)
            interrupt.check()
        way.commit(point)
        self._frame.rollback.forget()
        return point

    def _show(self, stage: Stage, disks: Sequence[DiskProgress] = ()) -> None:
        """Tell who looks on; without disks, they are as far as before."""
        if self._watch is not None:
            disks = tuple(disks) or self._progress.disks
            self._progress = replace(self._progress, stage=stage, disks=disks)
            self._watch(self._progress)

    def _point(self, way: Way, instant: Instant, consistency: Consistency) -> Point:
        stored = self._destination.stored.points
        return Point(
            id=self._plan.point.id,
            sequence=max((point.sequence for point in stored), default=0) + 1,
            time=datetime.fromtimestamp(instant.time, UTC),
            level=self._plan.level,
            parent=self._plan.parent,
            consistency=consistency,
            vm=self._config(),
            disks=tuple(_stored_disk(plan, way.seal(plan)) for plan in self._plan.disks),
            skipped=self._plan.skipped,
            pause=round(instant.pause, 6),
            notes=tuple(self._degraded),
        )

    def _config(self) -> VmConfig:
        vm = self._plan.vm
        return replace(vm.config, files=needed_files.of(vm.config, vm.disks, vm.pid))

    def _retire_bitmaps(self, point: Point) -> None:
        """Remove change bitmaps that no point needs any more; the next run retries what fails."""
        points = (*self._destination.stored.points, point)
        for plan in self._plan.disks:
            for name in rubbish(plan.disk, points, self._plan.target_id):
                try:
                    self._source.retire(plan.disk, name)
                except VmError as error:
                    log.warning("Bitmap %s is superfluous but stays for now: %s", name, error)

    def _require_present_still(self, refusal: QmpBackupError) -> None:
        """Say it where the VM has been migrated away: QEMU then refuses all kinds of commands.

        Raises:
            VmError: it has been.
        """
        status = ""
        with suppress(VmError):
            status = self._source.status()
        try:
            require_present(status)
        except VmError:
            log.warning("%s", refusal)
            raise


def _stored_disk(plan: DiskPlan, sealed: Sealed) -> StoredDisk:
    return StoredDisk(
        id=plan.disk.id,
        level=plan.level,
        file=sealed.file,
        parent=plan.parent,
        size=plan.disk.size,
        file_size=sealed.size,
        digest=sealed.digest,
        source_format=plan.disk.format,
        source_file=plan.disk.filename,
        bitmap=plan.seat.new_bitmap,
        end_mark=plan.end_mark,
        reason=plan.reason,
        label=plan.disk.label,
        underlays=plan.disk.underlays,
    )
