# SPDX-License-Identifier: Apache-2.0
"""The view of one instant: every disk as it was at one moment, readable while the guest writes on.

For each disk a copy-before-write filter is put between the guest's device and its node. It saves
the old contents of what the guest is about to overwrite in a scratch image, and a snapshot-access
node shows the disk as it was (QEMU docs/interop/live-block-operations; block/copy-before-write.c,
block/snapshot-access.c). If the scratch fails, the view breaks and never the guest's write
(`on-cbw-error: break-snapshot`).

    guest device                            guest device
         │                                       │
    active node          at the instant      cbw ──── target ──► scratch
         │                  ──────►           │  └─ snapshot-access ──► the copy reads here
    format node                          active node
                                              │
                                         format node   (bitmaps live here)

A disk whose changes are read by ourselves over NBD (`Seat.chunk`) needs three things more. The marks
are widened to whole chunks before the filter gets them, for the filter protects what is marked and
nothing else. They are kept in a *ledger*, a node as long as the disk that has bitmaps and no data,
where anybody may look at them and no iothread has a part. And where snapshot-access cannot be read
(see `pull`), the scratch is a qcow2 image above the active node, which then shows the disk as it was:
the old contents where they were saved, else what is still there.

All disks are switched while the VM stands still for a few milliseconds, after the new bitmaps were
started in one transaction (`plan.instant`).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qmpbackup.errors import (
    CommandError,
    CommandTimeout,
    ConnectionLost,
    MonitorProtocolError,
    VmError,
)
from qmpbackup.machine import scratch_nodes
from qmpbackup.machine.graph import active_nodes, children
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.steps import Step, carry_out
from qmpbackup.machine.watchdog import Watchdog
from qmpbackup.model import Disk
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command
from qmpbackup.plan.instant import Seat, transaction
from qmpbackup.plan.names import LEDGER, SAMPLES, STOPPED_MARKER, RunNames
from qmpbackup.plan.vm_states import GONE, OBSTACLES
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)

CBW_TIMEOUT_SECONDS = 45
"""Longest that a hanging scratch can hold up a guest write, once; then the view breaks instead."""

CBW_TIMEOUT_SECONDS_OF_OLD = 4
"""The same before QEMU 9.1, which keeps the nanoseconds in 32 bits: 45 s are 2 s there, 5 s 0.7 s
(seen with 7.2)."""

STOP_SECONDS = 10.0
"""After this long the watchdog lets the VM run again and the run is given up."""

_CONTINUED = "Somebody else let the VM run while the instant was taken."


@dataclass(frozen=True, slots=True)
class Instant:
    """When the view was taken (seconds since the epoch) and how long the VM stood still."""

    time: float
    pause: float


class View:
    """The nodes of one run's view.

    `teardown` takes what must go in any case; `rollback` what must go only if the run fails, which
    are the new change bitmaps.
    """

    def __init__(
        self,
        monitor: Monitor,
        seats: Sequence[Seat],
        names: RunNames,
        *,
        teardown: UndoStack,
        rollback: UndoStack,
    ) -> None:
        self._monitor = monitor
        self._seats = seats
        self._names = names
        self._undo = teardown
        self._rollback = rollback
        self._places: dict[str, str] | None = None

    def snapshot_node(self, seat: Seat) -> str:
        """The node to read: the disk as it was at the instant."""
        return self._names.of("snap", seat.number)

    def scratch_node(self, seat: Seat) -> str:
        """The scratch image; prepared `readable`, it shows the disk as well, until the view breaks."""
        return self._names.of("scratch", seat.number)

    def copy_bitmap(self, seat: Seat) -> str:
        """The bitmap on the snapshot node that says what to copy; empty for everything."""
        return self._names.of("inc", seat.number) if seat.base_bitmap else ""

    def changed_bitmap(self, seat: Seat) -> str:
        """The bitmap on the ledger that holds what has changed; empty for everything."""
        return self._names.of("changed", seat.number) if seat.shows_marks else ""

    def read_bitmap(self, seat: Seat) -> str:
        """The bitmap on the ledger that holds what the view protects: changes and samples."""
        return self._names.of("read", seat.number) if seat.shows_marks else ""

    def prepare(self, scratches: Sequence[Scratch], *, readable: bool = False) -> None:
        """Open the scratch image and the ledger of each disk, and mark the ends of disks.

        A scratch is a raw file, or, to be `readable` as the disk at the instant, a qcow2 image above
        the active node.

        Raises:
            StorageError: a scratch image could not be created.
            VmError: QEMU refused.
        """
        scratch_nodes.open_all(self._monitor, scratches, self._names, self._undo, readable=readable)
        self._open_ledgers([seat for seat in self._seats if seat.new_end_mark or seat.shows_marks])
        ends = [(seat.number, seat.disk.size) for seat in self._seats if seat.new_end_mark]
        if ends:
            from qmpbackup.machine.end_mark import mark_ends

            mark_ends(self._monitor, ends, self._names, self._undo)
        self._monitor.execute_all(
            [
                commands.bitmap_add(
                    self._names.of(LEDGER, seat.number),
                    self._names.of(SAMPLES, seat.number),
                    granularity=seat.chunk,
                )
                for seat in self._seats
                if seat.shows_marks
            ]
        )

    def _open_ledgers(self, seats: Sequence[Seat]) -> None:
        steps = []
        for seat in seats:
            name = self._names.of(LEDGER, seat.number)
            add = commands.blockdev_add(name, "null-co", size=seat.disk.size, read_zeroes=True)
            words = f"remove the ledger of {seat.disk.id}"
            steps.append(Step(add, words, commands.blockdev_del(name)))
        carry_out(self._monitor, steps, self._undo)

    def take(self, watchdog: Watchdog, running: bool) -> Instant:
        """Take the instant: new bitmaps and the views of all disks, while the VM stands still.

        `running` is what was found when the run was planned.

        Raises:
            VmError: some step failed; what was done is on the undo stack and the VM runs again.
        """
        self._require_places()
        taken = time.time()
        with self._standstill(watchdog, running) as pause:
            self._start_bitmaps()
            carry_out(
                self._monitor,
                [step for seat in self._seats for step in self._insertion(seat)],
                self._undo,
            )
        self._copy_marks()
        return Instant(taken, pause[0])

    def _require_places(self) -> None:
        """Moving a device past what somebody put above its node would cut that out for good: an
        overlay, or the filter with which a mirror sees the guest's writes."""
        places = active_nodes(self._monitor)
        for seat in self._seats:
            if places.get(seat.disk.qom_path) != seat.disk.node:
                raise VmError(
                    f"Disk {seat.disk.id} does not sit on its node {seat.disk.node}: a snapshot or "
                    "job of another program came between, or it was removed.",
                    "If the VM has a job such as a mirror, wait for its end; then run again.",
                )

    def _start_bitmaps(self) -> None:
        actions = transaction(self._seats, self._names)
        if not actions:
            return
        self._monitor.execute(commands.transaction(actions))
        for seat in self._seats:
            node = seat.disk.format_node
            for name in filter(None, (seat.new_bitmap, seat.new_end_mark)):
                self._remove_later(self._rollback, node, name)
            if seat.base_bitmap:
                self._remove_later(self._undo, node, self.copy_bitmap(seat))

    def _remove_later(self, stack: UndoStack, node: str, name: str) -> None:
        remove = commands.bitmap_remove(node, name)
        stack.push(f"remove bitmap {name}", lambda: self._monitor.execute(remove))

    def _insertion(self, seat: Seat) -> Iterator[Step]:
        """The filter, the device moved onto it, and the node that shows the disk as it was."""
        disk, cbw, snap = seat.disk, self._names.of("cbw", seat.number), self.snapshot_node(seat)
        bitmap = {"node": disk.format_node, "name": self.copy_bitmap(seat)}
        add_filter = commands.blockdev_add(
            cbw,
            "copy-before-write",
            file=disk.node,
            target=self._names.of("scratch", seat.number),
            on_cbw_error="break-snapshot",
            cbw_timeout=cbw_timeout(self._monitor.version),
            **({"bitmap": bitmap} if seat.base_bitmap else {}),
        )
        add_snap = commands.blockdev_add(snap, "snapshot-access", file=cbw)
        yield Step(add_filter, f"remove the filter from {disk.id}", commands.blockdev_del(cbw))
        yield Step(
            commands.attach(disk.qom_path, cbw),
            f"put {disk.id} back on its node",
            lambda: self._detach(disk, cbw),
        )
        yield Step(add_snap, f"remove the view of {disk.id}", commands.blockdev_del(snap))

    def _detach(self, disk: Disk, cbw: str) -> None:
        """Put the device back, if it still sits on our filter; else somebody took a snapshot."""
        if self._places is None:
            self._places = active_nodes(self._monitor)
        if self._places.get(disk.qom_path) == cbw:
            # Another program's job may have put a filter of its own below ours.
            below = children(self._monitor).get(cbw, disk.node)
            self._monitor.execute(commands.attach(disk.qom_path, below))
            return
        from qmpbackup.machine import overlays

        for done in overlays.release(self._monitor, cbw.__eq__):
            log.warning("%s.", done.capitalize())

    def _copy_marks(self) -> None:
        """Give each snapshot node a copy of the marks that say what to copy of it."""
        actions: list[Command] = []
        for seat in self._seats:
            if seat.base_bitmap:
                snap, name = self.snapshot_node(seat), self.copy_bitmap(seat)
                actions.append(commands.bitmap_add(snap, name, disabled=True))
                actions.append(commands.bitmap_merge(snap, name, seat.disk.format_node, name))
        if actions:
            self._monitor.execute(commands.transaction(actions))

    @contextmanager
    def _standstill(self, watchdog: Watchdog, running: bool) -> Iterator[list[float]]:
        """The VM stands still inside the block; yields a list that then holds for how long.

        A VM that was not running is left as it is. What it does may have changed since the plan:
        somebody who has paused it meanwhile wants it paused.

        Raises:
            VmError: the VM does not do what it did, or it ran inside the block.
        """
        pause = [0.0]
        if not running:
            _require_running(self._monitor, wanted=False)
            yield pause
            _require_running(self._monitor, wanted=False)
            return
        marker = {"qom-type": "throttle-group", "id": STOPPED_MARKER}
        self._monitor.execute(Command("object-add", marker))
        try:
            _require_running(self._monitor, wanted=True)
            watchdog.arm_stop(STOP_SECONDS)
            yield from self._stopped(watchdog, pause)
        finally:
            self._monitor.execute(Command("object-del", {"id": STOPPED_MARKER}))

    def _stopped(self, watchdog: Watchdog, pause: list[float]) -> Iterator[list[float]]:
        started = time.monotonic()
        try:
            self._monitor.execute(Command("stop"), STOP_SECONDS)
            yield pause
        finally:
            found = self._continue()
            pause[0] = time.monotonic() - started
            watchdog.disarm_stop()
        require_present(found)
        if found == "running":
            raise VmError(_CONTINUED, "Run again.")

    def _continue(self) -> str:
        """Let the VM run again, over another connection if ours is gone: nobody else will."""
        try:
            return _let_run(self._monitor)
        except ConnectionLost:
            with suppress(VmError), Monitor.connect(self._monitor.address) as fresh:
                _let_run(fresh)
                fresh.execute(Command("object-del", {"id": STOPPED_MARKER}))
            raise


def cbw_timeout(version: tuple[int, int, int]) -> int:
    """Seconds that a guest write may wait for a scratch that hangs."""
    return CBW_TIMEOUT_SECONDS if version[:2] >= (9, 1) else CBW_TIMEOUT_SECONDS_OF_OLD


def require_present(status: str) -> None:
    """Refuse a VM whose disks are not its own, or about to change as a whole.

    Raises:
        VmError: it has been migrated away, or the like.
    """
    obstacle = OBSTACLES.get(status)
    if obstacle is not None:
        raise VmError(obstacle.reason, obstacle.todo)


def status_of(monitor: Monitor) -> str:
    """What the VM does, such as `running` or `paused`."""
    state = monitor.execute(Command("query-status"), STOP_SECONDS)
    return Reply(state, "query-status").text("status")


def _require_running(monitor: Monitor, *, wanted: bool) -> None:
    status = status_of(monitor)
    require_present(status)
    if wanted and status != "running":
        raise VmError("Somebody else stopped the VM just before the instant.", "Run again.")
    if not wanted and status == "running":
        raise VmError(_CONTINUED, "Run again.")


def _let_run(monitor: Monitor) -> str:
    """Let the VM run again, and return what it did before.

    Never one that has been migrated away: two QEMUs would write to the same disks. Whatever else is
    wrong with the answer, the VM is to run.
    """
    status = ""
    with suppress(CommandError, CommandTimeout, MonitorProtocolError):
        status = status_of(monitor)
    if status not in GONE:
        monitor.execute(Command("cont"))
    return status
