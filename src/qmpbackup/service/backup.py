# SPDX-License-Identifier: Apache-2.0
"""Make a restore point of a running VM in a directory target.

    connect, lock the VM ─ what is there, what did a dead run leave ─ open and lock the target
    plan the level of each disk (pure)                                    --dry-run ends here
    prepare: files, scratch images, images inside QEMU, watchdog
    [freeze] ─ the instant ─ [thaw]
    copy all views ─ dismantle the views ─ close, digest and commit the point
    remove the change bitmaps that the new point has made superfluous

Whatever fails before the commit is undone; the change bitmap of the last point is never touched
until the new point is durable, so a failed run costs nothing but itself.
"""

import logging
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import QuiesceError, UsageError, VmError
from qmpbackup.model import (
    Consistency,
    Disk,
    Level,
    Point,
    Quiesce,
    Skipped,
    StoredDisk,
    Vm,
)
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command
from qmpbackup.plan.levels import (
    DiskPlan,
    change_bitmap_name,
    effective_level,
    end_mark_name,
    plan_disks,
    rubbish,
)
from qmpbackup.plan.names import RunNames
from qmpbackup.plan.selection import Selection
from qmpbackup.qemu import copy, jobs, scratch
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.view import Instant, Seat, View, require_present, status_of
from qmpbackup.qemu.watchdog import Watchdog
from qmpbackup.service import session
from qmpbackup.service.quiesce import Guest
from qmpbackup.service.rebase.settle import settle
from qmpbackup.target.directory import DirectoryTarget, Inventory, Pending
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a run. `speed` is bytes a second for each disk (0: no limit)."""

    address: str
    target: Path
    level: Level
    agent_address: str = ""
    selection: Selection = field(default_factory=Selection)
    quiesce: Quiesce = Quiesce.NO
    pause: bool = False
    compress: bool = False
    speed: int = 0
    monthly: bool = False
    uuid: str = ""
    scratch: Path | None = None
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do, as a value that `--dry-run` prints."""

    vm: Vm
    target: Path
    target_id: str
    point_id: str
    disks: tuple[DiskPlan, ...]
    skipped: tuple[Skipped, ...]
    transaction: tuple[Command, ...]

    @property
    def level(self) -> Level:
        """The level of the point as a whole."""
        return effective_level(self.disks)

    @property
    def parent(self) -> str | None:
        """The newest of the points that the disks build on."""
        bases = [plan.base for plan in self.disks if plan.base is not None]
        return max(bases, key=lambda point: point.sequence).id if bases else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A committed point, and what about the run was not as it should be."""

    point: Point
    degraded: tuple[str, ...] = ()


Watch = jobs.Watch

LEAST_FOR_BITMAPS = 16 * 1024 * 1024
"""Bytes that should be free beside an image: a bitmap of 1 TiB takes 2 MiB, of 4 TiB 8 MiB."""


def back_up(request: Request, watch: Watch | None = None) -> Outcome:
    """Make a point.

    Raises:
        QmpBackupError: no point was made, and what was begun has been undone.
    """
    with interrupt.held(), ExitStack() as stack:
        opened = session.opened(request.address, lock_wait=request.lock_wait, recover=True)
        vm = stack.enter_context(opened)
        _heal(request, vm)
        if DirectoryTarget.peek(_target_path(request)) is None:
            _plan(request, vm.vm, None, Inventory())  # what is impossible leaves no empty target
        target = _open_target(request, vm.vm)
        settle(target, request.lock_wait)
        stack.enter_context(target.lock(write=True, wait=request.lock_wait))
        for done in target.recover():
            log.info("Cleaned up after a run that died: %s.", done)
        stored = target.load()
        plan = _plan(request, vm.vm, target, stored)
        return _Run(request, vm.monitor, target, stored, plan, watch).execute()


def dry_run(request: Request) -> Plan:
    """Decide what a run would do, and change nothing anywhere.

    Raises:
        QmpBackupError: as the run itself would.
    """
    with interrupt.held(), session.opened(request.address, lock_wait=request.lock_wait) as vm:
        target = DirectoryTarget.peek(_target_path(request))
        stored = target.load() if target else Inventory()
        return _plan(request, vm.vm, target, stored)


def _heal(request: Request, vm: session.Session) -> None:
    """Thaw a guest that a run that died left frozen, if we can reach its agent."""
    if not vm.found.was_frozen:
        return
    try:
        for done in Guest(vm.monitor, request.agent_address, Quiesce.TRY).heal():
            log.warning("Cleaned up after a run that died: %s.", done)
    except QuiesceError as error:
        log.warning("A run that died may have left the guest frozen: %s", error)


def _target_path(request: Request) -> Path:
    if request.monthly:
        return request.target / f"{datetime.now(UTC).astimezone():%Y-%m}"
    return request.target


def _open_target(request: Request, vm: Vm) -> DirectoryTarget:
    identity = vm.config.identity
    if not request.monthly:
        return DirectoryTarget.open_or_create(request.target, identity, uuid=request.uuid)
    # All months share one id, so that the first full of a month retires last month's bitmaps.
    whole = DirectoryTarget.open_or_create(request.target, identity, uuid=request.uuid)
    return DirectoryTarget.open_or_create(_target_path(request), identity, id_hint=whole.id)


def _plan(request: Request, vm: Vm, target: DirectoryTarget | None, stored: Inventory) -> Plan:
    require_present(vm.status)
    chosen, skipped = request.selection.apply(vm.disks)
    if not chosen:
        raise UsageError(
            "There is no disk to back up.",
            "`qmpbackup … info --show blockdev` lists the disks and why others are skipped.",
        )
    target_id = target.id if target else request.uuid or secrets.token_hex(4)

    def check(point: Point, disk_id: str) -> str:
        return target.quick_check(point, disk_id, stored.points) if target else ""

    plans = plan_disks(chosen, request.level, stored.points, check)
    now = datetime.now(UTC)
    point_id = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    return Plan(
        vm=vm,
        target=_target_path(request),
        target_id=target_id,
        point_id=point_id,
        disks=plans,
        skipped=(*vm.skipped, *skipped),
        transaction=View.transaction(_seats(plans, target_id, point_id), RunNames("000000")),
    )


def _seats(plans: Sequence[DiskPlan], target_id: str, point_id: str) -> list[Seat]:
    return [
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
        )
        for number, plan in enumerate(plans)
    ]


def _warn_of_full_storage(disk: Disk) -> None:
    """QEMU stores change bitmaps in the image when it ends, and drops them where there is no room."""
    folder = Path(disk.filename).parent
    if disk.can_persist and folder.is_dir() and scratch.free_bytes(folder) < LEAST_FOR_BITMAPS:
        log.warning(
            "There is next to no room in %s: when the VM ends, the change bitmap of %s may be lost, "
            "and the next backup of it is a full.",
            folder,
            disk.id,
        )


class _Run:
    """One run from its plan to its committed point."""

    def __init__(
        self,
        request: Request,
        monitor: Monitor,
        target: DirectoryTarget,
        stored: Inventory,
        plan: Plan,
        watch: Watch | None,
    ) -> None:
        self._request = request
        self._monitor = monitor
        self._target = target
        self._stored = stored
        self._plan = plan
        self._watch = watch
        self._names = RunNames(secrets.token_hex(3))
        self._seats = _seats(plan.disks, plan.target_id, plan.point_id)
        self._options = copy.CopyOptions(request.compress, request.speed)
        self._teardown = UndoStack()
        self._images_open = UndoStack()
        self._rollback = UndoStack()
        self._degraded: list[str] = []
        self._scratches: list[tuple[int, Path]] = []
        self._view = View(
            monitor, self._seats, self._names, teardown=self._teardown, rollback=self._rollback
        )

    def execute(self) -> Outcome:
        """All steps; on any failure everything is undone and the failure raised."""
        for plan in self._plan.disks:
            log.info("Disk %s: %s (%s)", plan.disk.id, plan.level, plan.reason)
            _warn_of_full_storage(plan.disk)
        try:
            pending, images = self._prepare()
            instant, consistency = self._take()
            sources = [
                (self._view.snapshot_node(seat), self._view.copy_bitmap(seat))
                for seat in self._seats
            ]
            copy.copy_all(self._monitor, images, sources, self._names, self._options, self._watch)
            # What a destination writes to the disks, no filter in this QEMU sees.
            require_present(status_of(self._monitor))
            self._dismantle()
            point = self._commit(pending, instant, consistency)
        except BaseException:
            self._undo()
            raise
        self._retire_bitmaps(point)
        return Outcome(point, tuple(self._degraded))

    def _prepare(self) -> tuple[Pending, list[copy.Image]]:
        """Files in the target, scratch images, and all of them opened in QEMU."""
        wanted = [(plan.disk.id, plan.level) for plan in self._plan.disks]
        pending = self._target.begin(self._plan.point_id, wanted, datetime.now(UTC))
        self._rollback.push("remove the files of this run", pending.abort)
        images = [
            self._image(number, plan, pending) for number, plan in enumerate(self._plan.disks)
        ]
        copy.create_images(self._monitor, images, self._names, self._options, self._images_open)
        for seat, plan in zip(self._seats, self._plan.disks, strict=True):
            self._scratches.append(self._scratch(seat, plan))
        self._view.prepare(self._scratches)
        interrupt.check()
        return pending, images

    def _image(self, number: int, plan: DiskPlan, pending: Pending) -> copy.Image:
        file = pending.files[plan.disk.id]
        base = plan.stored_base
        backing = base.file.rpartition("/")[2] if base else ""
        return copy.Image(number, plan.disk.id, file.fd, file.path, plan.disk.size, backing)

    def _scratch(self, seat: Seat, plan: DiskPlan) -> tuple[int, Path]:
        return scratch.create(
            scratch.folder_for(plan.disk, self._request.scratch),
            self._names.of("scratch", seat.number),
            size=plan.disk.size,
            needed=plan.bytes_to_copy,
            named=not self._monitor.passes_descriptors,
            undo=self._teardown,
        )

    def _take(self) -> tuple[Instant, Consistency]:
        running = self._plan.vm.running
        still = self._request.pause or not running
        guest = Guest(self._monitor, self._request.agent_address, self._request.quiesce)
        with (
            guest.connected() as agent,
            Watchdog.start(self._monitor.fileno() if running else None, agent) as watchdog,
            guest.frozen(watchdog),
        ):
            instant = self._view.take(watchdog, running)
        self._degraded += guest.complaints
        log.info("The VM stood still for %.1f ms.", instant.pause * 1000)
        if guest.was_frozen:
            return instant, Consistency.AGENT
        return instant, Consistency.PAUSED if still else Consistency.CRASH

    def _dismantle(self) -> None:
        """Take the views down; leftovers degrade the run and are the next run's to remove."""
        self._await_scratches()
        self._degraded += self._teardown.run()

    def _commit(self, pending: Pending, instant: Instant, consistency: Consistency) -> Point:
        failures = self._images_open.run()
        if failures:
            raise VmError(failures[0], "The images may be incomplete; run again.")
        point = self._point(pending, instant, consistency)
        interrupt.check()
        pending.commit(point)
        self._rollback.forget()
        return point

    def _point(self, pending: Pending, instant: Instant, consistency: Consistency) -> Point:
        return Point(
            id=self._plan.point_id,
            sequence=max((point.sequence for point in self._stored.points), default=0) + 1,
            time=datetime.fromtimestamp(instant.time, UTC),
            level=self._plan.level,
            parent=self._plan.parent,
            consistency=consistency,
            vm=self._plan.vm.config,
            disks=tuple(
                self._stored_disk(seat, plan, pending)
                for seat, plan in zip(self._seats, self._plan.disks, strict=True)
            ),
            skipped=self._plan.skipped,
            pause=round(instant.pause, 6),
            notes=tuple(self._degraded),
        )

    def _stored_disk(self, seat: Seat, plan: DiskPlan, pending: Pending) -> StoredDisk:
        interrupt.check()
        size, digest = pending.seal(plan.disk.id)
        base = plan.stored_base
        return StoredDisk(
            id=plan.disk.id,
            level=plan.level,
            file=pending.files[plan.disk.id].name,
            parent=plan.base.id if plan.base else None,
            size=plan.disk.size,
            file_size=size,
            digest=digest,
            source_format=plan.disk.format,
            source_file=plan.disk.filename,
            bitmap=seat.new_bitmap,
            end_mark=seat.new_end_mark or (base.end_mark if base else ""),
            reason=plan.reason,
        )

    def _retire_bitmaps(self, point: Point) -> None:
        """Remove change bitmaps that no point needs any more; the next run retries what fails."""
        points = (*self._stored.points, point)
        for plan in self._plan.disks:
            for name in rubbish(plan.disk, points, self._plan.target_id):
                try:
                    self._monitor.execute(commands.bitmap_remove(plan.disk.format_node, name))
                except VmError as error:
                    log.warning("Bitmap %s is superfluous but stays for now: %s", name, error)

    def _await_scratches(self) -> None:
        for fd, path in self._scratches:
            scratch.await_answer(fd, path)

    def _undo(self) -> None:
        self._await_scratches()
        for stack in (self._teardown, self._images_open, self._rollback):
            for failure in stack.run():
                log.warning("%s", failure)
