# SPDX-License-Identifier: Apache-2.0
"""A QEMU behind its monitor as the source of a run: one that runs, or ours with the images of a VM that
is off."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace

from qmpbackup.errors import VmError
from qmpbackup.machine import kept_descriptors, push, scratch, starved
from qmpbackup.machine.bystander import standing_by
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.pull import Method, Pull, PulledDisk, method
from qmpbackup.machine.push import CopyOptions, NewImage
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.starved import Starved
from qmpbackup.machine.view import Instant, View, status_of
from qmpbackup.machine.watchdog import Watchdog
from qmpbackup.model import Consistency, Disk, Vm
from qmpbackup.nbd.reader import Flow
from qmpbackup.plan import commands
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.progress import WatchDisks
from qmpbackup.plan.speed import lower
from qmpbackup.service.backup import rooms
from qmpbackup.service.backup.request import Plan, Request
from qmpbackup.service.backup.rooms import Files
from qmpbackup.service.quiesce import Guest
from qmpbackup.service.session import Session
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)


class LiveVm:
    """The VM of a session."""

    def __init__(self, session: Session, request: Request) -> None:
        self._session = session
        self._monitor = session.monitor
        self._request = request

    @property
    def vm(self) -> Vm:
        """The VM as it was found."""
        return self._session.vm

    def again(self) -> "LiveVm":
        """The same, looked at once more."""
        return LiveVm(self._session.again(), self._request)

    def status(self) -> str:
        """What the VM does now."""
        return status_of(self._monitor)

    def files(self, disks: Sequence[Disk]) -> Files:
        """The files below disks, by format node."""
        return rooms.files_of(self._monitor, disks)

    @contextmanager
    def views(self, plan: Plan, rollback: UndoStack) -> Iterator["LiveViews"]:
        """The views of a run; where it fails, they and what is on the stack go."""
        views = LiveViews(self._monitor, self._request, plan, rollback)
        try:
            yield views
        except BaseException:
            for failure in (*views.undo(), *rollback.run()):
                log.warning("%s", failure)
            raise

    def retire(self, disk: Disk, bitmap: str) -> None:
        """Remove a bitmap."""
        self._monitor.execute(commands.bitmap_remove(disk.format_node, bitmap))

    def mark(self, devices: frozenset[int]) -> None:
        """Note in QEMU on which file systems room is taken."""
        self._monitor.execute(starved.mark(devices))

    def unmark(self, devices: frozenset[int]) -> None:
        """Remove that note."""
        self._monitor.execute(starved.unmark(starved.mark(devices)))

    def feed(self, devices: frozenset[int]) -> Starved | None:
        """Let the VM run again if it stands still for want of room that is free now."""
        return starved.feed(self._monitor, devices)


class LiveViews:
    """The views of one run in QEMU: `machine.view`, and what copies or shows them."""

    def __init__(self, monitor: Monitor, request: Request, plan: Plan, rollback: UndoStack) -> None:
        self._monitor = monitor
        self._request = request
        self._plan = plan
        self._rollback = rollback
        self._teardown = UndoStack()
        self._scratches: list[Scratch] = []
        self._images: Sequence[NewImage] = ()
        self._images_open = UndoStack()
        self._options = CopyOptions(speed=request.speed, limit=request.limit)
        self._view = View(
            monitor, plan.seats, plan.names, teardown=self._teardown, rollback=rollback
        )
        self._pull: Pull | None = None
        self.complaints: list[str] = []
        self.holds_files = False

    def fill(self, files: Sequence[NewImage], *, compress: bool) -> None:
        """Images in the files, and scratch images, all of them opened in QEMU."""
        self._images = files
        self._options = replace(self._options, compress=compress)
        self._rollback.push("close the images of this run", self.close)
        scratches = self._make_scratches()
        names, images_open = self._plan.names, self._images_open
        push.create_images(self._monitor, files, names, self._options, images_open)
        self._view.prepare(scratches)

    def show(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Scratch images, and whatever the way needs that is right with this QEMU."""
        seats, names = self._plan.seats, self._plan.names
        scratches = self._make_scratches()
        way = method(self._plan.vm)
        self._pull = pull = Pull(
            self._monitor, self._view, seats, names, way, teardown=self._teardown
        )
        pull.start()
        staged = seats if pull.way is Method.STAGED else ()
        pull.prepare(scratches, samples, [self._scratch(seat, "stage") for seat in staged])

    def _make_scratches(self) -> Sequence[Scratch]:
        for seat in self._plan.seats:
            self._scratches.append(self._scratch(seat, "scratch"))
        return self._scratches

    def _scratch(self, seat: Seat, what: str) -> Scratch:
        """Make a scratch file for a disk; `what` tells several of one disk apart."""
        return scratch.create(
            seat,
            scratch.folder_for(seat.disk, self._request.scratch, self._monitor.peer_pid),
            self._plan.names.of(what, seat.number),
            named=not self._monitor.passes_descriptors,
            undo=self._teardown,
        )

    def take(self) -> tuple[Instant, Consistency]:
        """[freeze] ─ the instant ─ [thaw]."""
        running = self._plan.vm.running
        still = self._request.pause or not running
        guest = Guest(self._monitor, self._request.agent_address, self._request.quiesce)
        server = self._pull.server if self._pull else None
        with (
            standing_by(self._monitor, self._plan.vm, self._plan.names, server),
            guest.connected() as agent,
            Watchdog.start(self._monitor.fileno() if running else None, agent) as watchdog,
            guest.frozen(watchdog),
        ):
            instant = self._view.take(watchdog, running)
        self.complaints += guest.complaints
        if guest.was_frozen:
            return instant, Consistency.AGENT
        return instant, Consistency.PAUSED if still else Consistency.CRASH

    def copy(self, watch: WatchDisks | None) -> None:
        """Have QEMU copy all views."""
        names, options = self._plan.names, self._options
        push.copy_all(
            self._monitor, self._images, self._view, names, options, self._teardown, watch
        )

    @contextmanager
    def reading(self, watch: WatchDisks | None) -> Iterator[None]:
        """The views as exports, asked now and then whether they still stand."""
        pull = self._shown()
        pull.serve(watch, self._request.speed)
        with pull.probing():
            yield
        pull.finish()

    def open(self, seat: Seat) -> AbstractContextManager[PulledDisk]:
        """Open a disk for reading."""
        pull = self._shown()
        own = (
            0 if pull.way is Method.STAGED else self._request.speed
        )  # the VM's disks were copied at it
        limit = self._request.limit
        return pull.open(seat, Flow(speed=lambda: lower(own, limit())))

    def _shown(self) -> Pull:
        if self._pull is None:
            raise ValueError("these views were not prepared to be read")
        return self._pull

    def take_down(self) -> list[str]:
        """Take the views down; leftovers are the next run's to remove."""
        failures = self.undo()
        with suppress(VmError):
            if kept_descriptors.are_left(self._monitor):
                log.warning("%s", kept_descriptors.SAID)
        return failures

    def undo(self) -> list[str]:
        """Take down what there is, once the storage of the scratches answers."""
        for each in self._scratches:
            scratch.await_answer(each.fd, each.path)
        failures = self._teardown.run()
        self._scratches.clear()
        return failures

    def close(self) -> None:
        """Close the images in QEMU."""
        failures = self._images_open.run()
        if failures:
            self.holds_files = True
            raise VmError(failures[0], "The images may be incomplete; run again.")
