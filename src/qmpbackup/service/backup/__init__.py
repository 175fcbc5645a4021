# SPDX-License-Identifier: Apache-2.0
"""Make a restore point of a running VM.

    connect, lock the VM ─ what is there, what did a dead run leave ─ find and lock the target
    plan the level of each disk (pure)                                    --dry-run ends here
    make the target, if it is a new one ─ prepare: what receives the copy, scratch images, watchdog
    [freeze] ─ the instant ─ [thaw]
    copy all views ─ dismantle the views ─ commit the point
    remove the change bitmaps that the new point has made superfluous

Whatever fails before the commit is undone; the change bitmap of the last point is never touched
until the new point is durable, so a failed run costs nothing but itself.

    request      what is asked for, what is planned, what came out
    run          one run from its plan to its committed point
    rooms        the file systems it takes room on, and a VM that found none
    source       what a run needs of a VM
    live         a QEMU behind its monitor as such a source
    destination  the target: found, made if it is new, and the way into it
    way          what a run asks of the way into a target
    pushed       QEMU writes the views into files itself
    pulled       we read the views over NBD, and hand over what changed
"""

import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import UTC, datetime

from qmpbackup import interrupt
from qmpbackup.errors import QuiesceError, UnrecordedChanges, UsageError, VmError
from qmpbackup.machine.view import require_present
from qmpbackup.model import Absence, Level, Quiesce, Skipped
from qmpbackup.plan.clones import TODO, others_with_uuid
from qmpbackup.plan.levels import NewPoint, plan_disks, rubbish
from qmpbackup.plan.names import RunNames
from qmpbackup.plan.progress import Watch
from qmpbackup.service import offline, room, session
from qmpbackup.service.backup import destination as destinations
from qmpbackup.service.backup import rooms
from qmpbackup.service.backup.destination import Destination, Named
from qmpbackup.service.backup.live import LiveVm
from qmpbackup.service.backup.request import Outcome, Plan, Request
from qmpbackup.service.backup.run import Run, log
from qmpbackup.service.backup.source import VmSource
from qmpbackup.service.quiesce import Guest

__all__ = ["Outcome", "Plan", "Request", "back_up", "dry_run"]


def back_up(request: Request, watch: Watch | None = None) -> Outcome:
    """Make a point.

    Raises:
        QmpBackupError: no point was made, and what was begun has been undone.
    """
    with (
        interrupt.held(),
        destinations.named(request, look_only=False) as target,
        _vm(request) as vm,
    ):
        _heal(request, vm)
        return back_up_from(LiveVm(vm, request), target, request, watch)


def back_up_from(
    source: VmSource, target: Named, request: Request, watch: Watch | None = None
) -> Outcome:
    """Make a point of a source in a target.

    Raises:
        QmpBackupError: no point was made, and what was begun has been undone.
    """
    with ExitStack() as stack:
        found = stack.enter_context(target.found(source.vm))
        plan = _plan(request, source, found)
        destination = stack.enter_context(found.claim(source.vm))
        try:
            return Run(request, source, destination, plan, watch).execute()
        except UnrecordedChanges as alarm:
            _drop_bitmaps(source, destination, alarm.disks)
            if request.level is not Level.AUTO:
                raise
            log.error("%s The disks concerned are now read whole.", alarm.message)
            destination.distrust(alarm.disks)
            again = source.again()
            plan = _plan(request, again, destination)
            outcome = Run(request, again, destination, plan, watch).execute()
            return replace(outcome, alarm=alarm.message)


def _drop_bitmaps(source: VmSource, destination: Destination, disks: frozenset[str]) -> None:
    """Remove change bitmaps that are not to be trusted, so that no later run does."""
    for disk in source.vm.disks:
        if disk.id in disks:
            for name in rubbish(disk, (), destination.id):
                source.retire(disk, name)


def dry_run(request: Request) -> Plan:
    """Decide what a run would do, and change nothing anywhere.

    Raises:
        QmpBackupError: as the run itself would.
    """
    with (
        interrupt.held(),
        destinations.named(request, look_only=True) as target,
        _vm(request, look_only=True) as vm,
        target.found(vm.vm) as destination,
    ):
        return _plan(request, LiveVm(vm, request), destination)


def _vm(request: Request, *, look_only: bool = False) -> AbstractContextManager[session.Session]:
    """The VM, rid of what a run that died left in it, or only looked at; or the images of one that is
    off."""
    if request.offline is not None:
        return offline.opened(request.offline, request.target, request.host)
    return session.opened(
        request.address,
        lock_wait=request.lock_wait,
        recover=not look_only,
        look_only=look_only,
        host=request.host,
    )


def _heal(request: Request, vm: session.Session) -> None:
    """Thaw a guest that a run that died left frozen, if we can reach its agent."""
    if not vm.found.was_frozen:
        return
    try:
        for done in Guest(vm.monitor, request.agent_address, Quiesce.TRY).heal():
            log.warning("Cleaned up after a run that died: %s.", done)
    except QuiesceError as error:
        log.warning("A run that died may have left the guest frozen: %s", error)


def _require_possible(skipped: Sequence[Skipped]) -> None:
    """Say it where there are disks, and none can be backed up.

    Raises:
        VmError: so it is.
    """
    left = [each for each in skipped if each.absence is Absence.IMPOSSIBLE]
    if left:
        named = "; ".join(f"{each.name}: {each.reason}" for each in left)
        raise VmError(f"Nothing of this VM can be backed up ({named}).")


def _plan(request: Request, source: VmSource, destination: Destination) -> Plan:
    vm = source.vm
    require_present(vm.status)
    chosen, skipped = request.selection.apply(vm.disks, vm.skipped)
    if not chosen:
        _require_possible(skipped)
        raise UsageError(
            "There is no disk to back up.",
            "`qmpbackup … info --show blockdev` lists the disks and why others are skipped.",
        )
    point = NewPoint(
        destination.id,
        f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        destination.chunk,
    )
    points, obstacle = destination.stored.points, destination.obstacle
    if clones := others_with_uuid(points, vm.config.identity):
        log.warning("In %s, %s. %s", destination.place, clones, TODO)
    plans = plan_disks(chosen, request.level, points, obstacle, point, vm.config.process)
    needs = rooms.needs(source.files(chosen), vm, plans, destination, request.scratch)
    room.require(needs, request.reserve, rooms.HINT)
    names = RunNames(secrets.token_hex(3))
    return Plan(vm, destination.place, point, names, plans, skipped, tuple(needs))
