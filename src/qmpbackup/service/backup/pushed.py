# SPDX-License-Identifier: Apache-2.0
"""The way of a run where the VM itself has the views written into qcow2 files that the target has made."""

from functools import partial

from qmpbackup import interrupt
from qmpbackup.machine.push import NewImage
from qmpbackup.model import Point
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.plan.progress import Stage
from qmpbackup.service.backup.source import Views
from qmpbackup.service.backup.way import Frame, Show
from qmpbackup.targets.receiver import FileReceiver, Sealed


class Pushed:
    """See `Way`: one run's files."""

    def __init__(self, frame: Frame, files: FileReceiver) -> None:
        self._frame = frame
        self._files = files
        self._views: Views | None = None
        frame.rollback.push("remove the files of this run", self._abort)

    def prepare(self, views: Views) -> None:
        """Have the files filled."""
        self._views = views
        images = [self._image(plan) for plan in self._frame.plan.disks]
        views.fill(images, compress=self._frame.request.compress)

    def _image(self, plan: DiskPlan) -> NewImage:
        file = self._files.file(plan.disk.id)
        base = plan.stored_base
        backing = base.name if base else ""
        return NewImage(plan.seat, file.fd, file.path, backing)

    def copy(self, views: Views, show: Show) -> None:
        """Have all views copied."""
        views.copy(partial(show, Stage.COPY))

    def _abort(self) -> None:
        # A file that is cut off while QEMU has it open as an image is ejected there (see `scratch`).
        self._files.abort(closed=not (self._views and self._views.holds_files))

    def seal(self, plan: DiskPlan) -> Sealed:
        """Make a file durable, and say what it is."""
        interrupt.check()
        return self._files.seal(plan.disk.id)

    def commit(self, point: Point) -> None:
        """Name the files, and write the manifest."""
        self._files.commit(point)
