# SPDX-License-Identifier: Apache-2.0
"""The way into a directory: QEMU itself writes the views into qcow2 files that we opened."""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import StorageError, VmError
from qmpbackup.machine import push
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.model import Point, Vm
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.service.backup.request import Request
from qmpbackup.service.backup.way import Frame, Stored
from qmpbackup.targets.folder.target import DirectoryTarget, Pending
from qmpbackup.targets.inventory import Inventory
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)


class Directory:
    """A directory target: held, only looked at, or one that is yet to be made."""

    chunk = 0

    def __init__(
        self, opening: "Opening", path: Path, target: DirectoryTarget | None, stored: Inventory
    ) -> None:
        self.place = str(path)
        self.folder = path
        self.stores_plain = not opening.request.compress
        self.stored = stored
        self.id = target.id if target else opening.new_id()
        self._opening = opening
        self._target = target

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
        from qmpbackup.targets.folder import chains

        limit = None if self._opening.request.verify_chain else chains.SMALL
        return chains.fault(self._target, self.stored.points, point, disk_id, limit)

    def distrust(self, disks: frozenset[str]) -> None:
        """QEMU copies; there is nothing to audit."""
        raise NotImplementedError(disks)

    def claim(self, vm: Vm) -> AbstractContextManager["Directory"]:
        """The target of a run, made where it was not there."""
        return nullcontext(self) if self._target else self._opening.made(vm, self.id)

    def way(self, frame: Frame) -> "IntoDirectory":
        """The way of a run into it."""
        if self._target is None:
            raise ValueError("a target that was only looked at takes no point")
        return IntoDirectory(frame, self._target)


class Opening:
    """A folder that is named, and about to be opened; with `look_only`, nothing is made or changed."""

    def __init__(self, request: Request, folder: Path, *, look_only: bool) -> None:
        self.request = request
        self._folder = folder
        self._look_only = look_only

    @contextmanager
    def found(self, vm: Vm) -> Iterator[Directory]:
        """The target, held for writing after what a run that died has left was cleared up, or only
        looked at. Where there is none, none is made: what is impossible leaves no empty target."""
        path = self._path()
        target = DirectoryTarget.peek(path)
        if target is None or self._look_only:
            yield Directory(self, path, target, target.load() if target else Inventory())
            return
        with self._held(vm) as held:
            yield held

    @contextmanager
    def made(self, vm: Vm, target_id: str) -> Iterator[Directory]:
        """A new target, held for writing, with the id that was planned.

        Raises:
            StorageError: somebody else has made it meanwhile.
        """
        with self._held(vm, target_id) as held:
            if held.id != target_id or held.stored.points:
                raise StorageError(
                    f"The target {held.place} was made by somebody else just now.", "Run again."
                )
            yield held

    @contextmanager
    def _held(self, vm: Vm, new_id: str = "") -> Iterator[Directory]:
        target, wait = self._open(vm, new_id), self.request.lock_wait
        target.settle(wait)
        with target.lock(write=True, wait=wait):
            for done in target.recover():
                log.info("Cleaned up after a run that died: %s.", done)
            stored = target.load()
            target.require_points(vm.config.identity, stored)
            yield Directory(self, target.path, target, stored)

    def _open(self, vm: Vm, new_id: str) -> DirectoryTarget:
        identity, uuid = vm.config.identity, self.request.uuid
        whole = DirectoryTarget.open_or_create(self._folder, identity, uuid=uuid, id_hint=new_id)
        if not self.request.monthly:
            return whole
        # All months share one id, so that the first full of a month retires last month's bitmaps.
        return DirectoryTarget.open_or_create(self._path(), identity, id_hint=whole.id)

    def new_id(self) -> str:
        """The id that a new target gets."""
        whole = DirectoryTarget.peek(self._folder) if self.request.monthly else None
        return (whole.id if whole else "") or self.request.uuid or secrets.token_hex(4)

    def _path(self) -> Path:
        if not self.request.monthly:
            return self._folder
        return self._folder / f"{datetime.now(UTC).astimezone():%Y-%m}"


class IntoDirectory:
    """One run's files in a directory, and the images in them as QEMU has them open."""

    def __init__(self, frame: Frame, target: DirectoryTarget) -> None:
        self._frame = frame
        self._options = push.CopyOptions(frame.request.compress, frame.request.speed)
        self._images: list[push.NewImage] = []
        self._images_open = UndoStack()
        wanted = [(plan.disk.id, plan.level) for plan in frame.plan.disks]
        self._pending: Pending = target.begin(frame.plan.point.id, wanted, datetime.now(UTC))
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
        file = self._pending.files[plan.disk.id]
        base = plan.stored_base
        backing = base.file.rpartition("/")[2] if base else ""
        return push.NewImage(plan.seat, file.fd, file.path, backing)

    def copy(self) -> None:
        """Have QEMU copy all views."""
        frame, names = self._frame, self._frame.plan.names
        push.copy_all(frame.monitor, self._images, self.view, names, self._options, frame.watch)

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
        return Stored(name, size, digest)

    def commit(self, point: Point) -> None:
        """Write the manifest."""
        self._pending.commit(point)
