# SPDX-License-Identifier: Apache-2.0
"""A view copied into a local image first, for QEMUs over whose NBD server it must not be read.

QEMU copies what is wanted into a qcow2 file of ours and stores the ledger's bitmaps in it as well.
Then a qemu-nbd of ours shows that file: no client of QEMU is left that could do it harm.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from qmpbackup.errors import VmError
from qmpbackup.images import qemu_nbd
from qmpbackup.images.layers import Layer
from qmpbackup.machine import jobs, push, scratch
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.plan import commands
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import LEDGER, RunNames
from qmpbackup.plan.progress import WatchDisks
from qmpbackup.undo import UndoStack

EXPORT = "staged"


class Staging:
    """The local images of one run, in scratch files of their own."""

    def __init__(
        self, monitor: Monitor, view: View, stages: Sequence[Scratch], names: RunNames
    ) -> None:
        self._monitor = monitor
        self._view = view
        self._stages = {stage.seat.number: stage for stage in stages}
        self._names = names
        self._open = UndoStack()

    def prepare(self, undo: UndoStack) -> None:
        """Make the files qcow2 images that are open in QEMU.

        Raises:
            StorageError: an image could not be created.
            VmError: QEMU refused.
        """
        undo.push("close the staged images", self._let_go)
        options = push.CopyOptions()
        push.create_images(self._monitor, self._images(), self._names, options, self._open)

    def fill(self, speed: int, watch: WatchDisks | None, undo: UndoStack) -> None:
        """Copy the views, at most `speed` bytes a second for each disk (0: no limit). Where that fails,
        `undo` ends it.

        Raises:
            StorageError: a file could not be written.
            JobError: a view broke, or its disk could not be read.
            VmError: QEMU refused.
        """
        seats = [stage.seat for stage in self._stages.values()]
        self._store_marks([seat for seat in seats if seat.shows_marks])
        options = push.CopyOptions(speed=speed)
        images = self._images()
        push.copy_all(self._monitor, images, self._view, self._names, options, undo, watch)
        jobs.sweep(self._monitor, push.job_names(images, self._names))
        self._close()

    def served(self, seat: Seat) -> AbstractContextManager[str]:
        """Serve the image of a disk for the block; gives the socket. The export is `EXPORT`.

        Raises:
            QmpBackupError: qemu-nbd cannot be run.
        """
        layer = Layer.of(self._stages[seat.number].fd, seat.disk.id)
        bitmaps = (self._view.changed_bitmap(seat), self._view.read_bitmap(seat))
        options = [f"--export-name={EXPORT}", *(f"--bitmap={each}" for each in bitmaps if each)]
        return qemu_nbd.serving([layer], options, f"open the staged image of {seat.disk.id}")

    def _images(self) -> list[push.NewImage]:
        return [push.NewImage(stage.seat, stage.fd, stage.path) for stage in self._stages.values()]

    def _store_marks(self, seats: Sequence[Seat]) -> None:
        """Put the bitmaps of ledgers into the images, which QEMU stores when it closes them."""
        actions = []
        for seat in seats:
            image, ledger = (self._names.of(what, seat.number) for what in ("image", LEDGER))
            for bitmap in (self._view.changed_bitmap(seat), self._view.read_bitmap(seat)):
                add = commands.bitmap_add(
                    image, bitmap, persistent=True, disabled=True, granularity=seat.chunk
                )
                actions += [add, commands.bitmap_merge(image, bitmap, ledger, bitmap)]
        if actions:
            self._monitor.execute(commands.transaction(actions))

    def _let_go(self) -> None:
        self._close()
        for stage in self._stages.values():
            scratch.empty(stage.fd)

    def _close(self) -> None:
        failures = self._open.run()
        if failures:
            raise VmError(failures[0], "Run again; nothing was lost.")
