# SPDX-License-Identifier: Apache-2.0
"""The way of a run where QEMU itself writes the views into qcow2 files that the target has made."""

from collections.abc import Sequence

from qmpbackup import interrupt
from qmpbackup.errors import VmError
from qmpbackup.machine import push
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.model import Point
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.service.backup.way import Frame
from qmpbackup.targets.receiver import FileReceiver, Sealed
from qmpbackup.undo import UndoStack


class Pushed:
    """See `Way`: one run's files, and the images in them as QEMU has them open."""

    def __init__(self, frame: Frame, files: FileReceiver) -> None:
        self._frame = frame
        self._options = push.CopyOptions(frame.request.compress, frame.request.speed)
        self._images: list[push.NewImage] = []
        self._images_open = UndoStack()
        self._files = files
        self._stuck = False
        frame.rollback.push("remove the files of this run", self._abort)
        frame.rollback.push("close the images of this run", self._close_images)
        self.view = View(
            frame.monitor,
            frame.plan.seats,
            frame.plan.names,
            teardown=frame.teardown,
            rollback=frame.rollback,
        )

    def prepare(self, scratches: Sequence[Scratch]) -> None:
        """Images in the files, and scratch images, all of them opened in QEMU."""
        frame = self._frame
        self._images += [self._image(plan) for plan in frame.plan.disks]
        push.create_images(
            frame.monitor, self._images, frame.plan.names, self._options, self._images_open
        )
        self.view.prepare(scratches)

    def _image(self, plan: DiskPlan) -> push.NewImage:
        file = self._files.file(plan.disk.id)
        base = plan.stored_base
        backing = base.name if base else ""
        return push.NewImage(plan.seat, file.fd, file.path, backing)

    def copy(self) -> None:
        """Have QEMU copy all views."""
        frame, names = self._frame, self._frame.plan.names
        push.copy_all(
            frame.monitor,
            self._images,
            self.view,
            names,
            self._options,
            frame.teardown,
            frame.watch,
        )

    def _close_images(self) -> None:
        failures = self._images_open.run()
        if failures:
            self._stuck = True
            raise VmError(failures[0], "The images may be incomplete; run again.")

    def _abort(self) -> None:
        # A file that is cut off while QEMU has it open as an image is ejected there (see `scratch`).
        self._files.abort(closed=not self._stuck)

    def close(self) -> None:
        """Close the images in QEMU."""
        self._close_images()

    def seal(self, plan: DiskPlan) -> Sealed:
        """Make a file durable, and say what it is."""
        interrupt.check()
        return self._files.seal(plan.disk.id)

    def commit(self, point: Point) -> None:
        """Name the files, and write the manifest."""
        self._files.commit(point)
