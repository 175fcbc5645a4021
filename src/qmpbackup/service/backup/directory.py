# SPDX-License-Identifier: Apache-2.0
"""The way into a directory: QEMU itself writes the views into qcow2 files that we opened."""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import VmError
from qmpbackup.machine import push
from qmpbackup.machine.view import View
from qmpbackup.model import Point, Vm
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.service.backup.request import Request
from qmpbackup.service.backup.way import Destination, Frame, Stored
from qmpbackup.targets.folder.target import DirectoryTarget, Pending
from qmpbackup.targets.inventory import Inventory
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)


class Directory:
    """A directory target that is there or, for a plan, could be."""

    chunk = 0

    def __init__(
        self, path: Path, target: DirectoryTarget | None, stored: Inventory, request: Request
    ) -> None:
        self.place = str(path)
        self.folder = path
        self.stores_plain = not request.compress
        self.stored = stored
        self.id = target.id if target else request.uuid or secrets.token_hex(4)
        self._target = target
        self._verify_chain = request.verify_chain

    @staticmethod
    def stages(_vm: Vm) -> bool:
        """QEMU copies straight into it."""
        return False

    def obstacle(self, point: Point, disk_id: str) -> str:
        """Why the files of a disk of a point cannot be built upon."""
        if self._target is None:
            return ""
        reason = self._target.quick_check(point, disk_id, self.stored.points)
        if reason:
            return reason
        from qmpbackup.service import chains

        limit = None if self._verify_chain else chains.SMALL
        return chains.fault(self._target, self.stored.points, point, disk_id, limit)

    def distrust(self, disks: frozenset[str]) -> None:
        """QEMU copies; there is nothing to audit."""
        raise NotImplementedError(disks)

    def way(self, frame: Frame) -> "IntoDirectory":
        """The way of a run into it."""
        if self._target is None:
            raise ValueError("a target that was only looked at takes no point")
        return IntoDirectory(frame, self._target)


class Opening:
    """A folder that is named, and about to be opened; with `look_only`, nothing is made or changed."""

    def __init__(self, request: Request, folder: Path, *, look_only: bool) -> None:
        self._request = request
        self._folder = folder
        self._look_only = look_only

    @contextmanager
    def destination(self, vm: Vm, approve: Callable[[Destination], object]) -> Iterator[Directory]:
        """The target, held for writing after what a run that died has left was cleared up, or only
        looked at. What is impossible leaves no empty target: that is what `approve` says before."""
        request, path = self._request, _path(self._request, self._folder)
        target = DirectoryTarget.peek(path)
        if self._look_only:
            yield Directory(path, target, target.load() if target else Inventory(), request)
            return
        if target is None:
            approve(Directory(path, None, Inventory(), request))
        target = _open(request, self._folder, vm)
        target.settle(request.lock_wait)
        with target.lock(write=True, wait=request.lock_wait):
            for done in target.recover():
                log.info("Cleaned up after a run that died: %s.", done)
            stored = target.load()
            target.require_points(vm.config.identity, stored)
            yield Directory(path, target, stored, request)


def _path(request: Request, folder: Path) -> Path:
    return folder / f"{datetime.now(UTC).astimezone():%Y-%m}" if request.monthly else folder


def _open(request: Request, folder: Path, vm: Vm) -> DirectoryTarget:
    identity = vm.config.identity
    whole = DirectoryTarget.open_or_create(folder, identity, uuid=request.uuid)
    if not request.monthly:
        return whole
    # All months share one id, so that the first full of a month retires last month's bitmaps.
    return DirectoryTarget.open_or_create(_path(request, folder), identity, id_hint=whole.id)


class IntoDirectory:
    """One run's files in a directory, and the images in them as QEMU has them open."""

    def __init__(self, frame: Frame, target: DirectoryTarget) -> None:
        self._frame = frame
        self._options = push.CopyOptions(frame.request.compress, frame.request.speed)
        self._images: list[push.NewImage] = []
        self._images_open = UndoStack()
        wanted = [(plan.disk.id, plan.level) for plan in frame.plan.disks]
        self._pending: Pending = target.begin(frame.plan.point_id, wanted, datetime.now(UTC))
        self._stuck = False
        frame.rollback.push("remove the files of this run", self._abort)
        frame.rollback.push("close the images of this run", self._close_images)
        self.view = View(
            frame.monitor,
            frame.seats,
            frame.names,
            teardown=frame.teardown,
            rollback=frame.rollback,
        )

    def prepare(self, scratches: Sequence[tuple[int, Path]]) -> None:
        """Images in the files, and scratch images, all of them opened in QEMU."""
        frame = self._frame
        self._images += [self._image(*each) for each in enumerate(frame.plan.disks)]
        push.create_images(
            frame.monitor, self._images, frame.names, self._options, self._images_open
        )
        self.view.prepare(scratches)

    def _image(self, number: int, plan: DiskPlan) -> push.NewImage:
        file = self._pending.files[plan.disk.id]
        base = plan.stored_base
        backing = base.file.rpartition("/")[2] if base else ""
        return push.NewImage(number, plan.disk.id, file.fd, file.path, plan.disk.size, backing)

    def copy(self) -> None:
        """Have QEMU copy all views."""
        frame = self._frame
        sources = [
            (self.view.snapshot_node(seat), self.view.copy_bitmap(seat)) for seat in frame.seats
        ]
        push.copy_all(frame.monitor, self._images, sources, frame.names, self._options, frame.watch)

    def _close_images(self) -> None:
        failures = self._images_open.run()
        if failures:
            self._stuck = True
            raise VmError(failures[0], "The images may be incomplete; run again.")

    def _abort(self) -> None:
        # A file that is cut off while QEMU has it open as an image is ejected there (see `scratch`).
        self._pending.abort(closed=not self._stuck)

    def close(self) -> None:
        """Close the images in QEMU."""
        self._close_images()

    def stored(self, plan: DiskPlan) -> Stored:
        """Make a file durable, and say what it is."""
        interrupt.check()
        size, digest = self._pending.seal(plan.disk.id)
        name = self._pending.files[plan.disk.id].name
        return Stored(name, plan.base.id if plan.base else None, size, digest)

    def commit(self, point: Point) -> None:
        """Write the manifest."""
        self._pending.commit(point)
