# SPDX-License-Identifier: Apache-2.0
"""Prove that what a target holds is what was written, and that nothing else lies there.

Every file is read once, however many points need it: length, digest, links inside the images, and
QEMU's own check of their metadata. Nothing is changed but marks: files found damaged get one, those
found whole lose it.
"""

import logging
import os
from collections.abc import Callable, Sequence

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, QmpBackupError
from qmpbackup.images import qemu_img
from qmpbackup.images.layers import Layer, check_link, require_unchanged
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import chain
from qmpbackup.targets.folder import chains
from qmpbackup.targets.folder.files import StoredFiles
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.names import epoch_of
from qmpbackup.targets.report import Proved, Report

log = logging.getLogger(__name__)


def prove(files: StoredFiles, points: Sequence[Point], point: Point) -> Report:
    """Prove one of the points.

    Raises:
        QmpBackupError: it cannot be looked at as a whole.
    """
    check = _Verification(files, points)
    verdict = Proved(point, check.problems_of(point))
    return Report((verdict,), (), (), (), check.files, check.size, check.files, check.size)


def prove_all(files: StoredFiles, load: Callable[[], Inventory]) -> Report:
    """Prove all points, and find what else lies there; `load` reads the manifests.

    Raises:
        QmpBackupError: it cannot be looked at as a whole.
    """
    # Names first and manifests last: a backup that commits meanwhile then leaves nothing that looks
    # as if no manifest named it.
    names = files.stored_names()
    unfinished = files.unfinished_files()
    found = load()
    check = _Verification(files, found.points)
    verdicts = tuple(Proved(point, check.problems_of(point)) for point in found.points)
    if not found.damaged:  # else nobody knows what is needed
        check.forget_stale_marks()
    extra, foreign = _unnamed(names, unfinished, found.points)
    count, size = check.files, check.size
    return Report(verdicts, found.damaged, extra, foreign, count, size, count, size)


def _unnamed(
    names: Sequence[str], unfinished: Sequence[str], points: Sequence[Point]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that no manifest knows: those called like backups, and the others."""
    known = {disk.file for point in points for disk in point.disks} | set(unfinished)
    left = [name for name in names if name not in known]
    extra = [name for name in left if epoch_of(name.rpartition("/")[2]) is not None]
    return tuple(extra), tuple(name for name in left if name not in set(extra))


class _Verification:
    """Remembers what was found about each file, so that none is read twice."""

    def __init__(self, target: StoredFiles, points: Sequence[Point]) -> None:
        self._target = target
        self._points = points
        self._seen: dict[tuple[str, int, str, str], str] = {}
        self._damaged: set[str] = set()
        self.files = 0
        self.size = 0

    def problems_of(self, point: Point) -> tuple[str, ...]:
        """Everything that keeps a point from being restored, each as a sentence."""
        log.info("Verifying point %s", point.id)
        found: dict[str, None] = {}
        for disk in point.disks:
            for problem in self._disk(point, disk):
                found[problem] = None
        return tuple(found)

    def _disk(self, point: Point, disk: StoredDisk) -> list[str]:
        try:
            links = chain(self._points, point, disk.id)
        except DamagedError as error:
            return [error.message]
        problems: list[str] = []
        parent = ""
        for link in links:
            problems.append(self._file(link.disk, parent))
            parent = link.disk.name
        if not any(problems):
            problems.append(self._state(disk))
        return [problem for problem in problems if problem]

    def _file(self, disk: StoredDisk, parent: str) -> str:
        key = (disk.file, disk.file_size, disk.digest, parent)
        if key not in self._seen:
            self._seen[key] = self._guarded(disk, parent)
            self.files += 1
            self.size += disk.file_size
        return self._seen[key]

    def _guarded(self, disk: StoredDisk, parent: str) -> str:
        try:
            with chains.marking(self._target, disk):
                self._check(disk, parent)
        except QmpBackupError as error:
            if isinstance(error, DamagedError):
                self._damaged.add(disk.file)
            return error.message
        if disk.file not in self._damaged:
            self._target.remove_mark(disk.file)
        return ""

    def forget_stale_marks(self) -> None:
        """Remove marks of files that no point needs any more."""
        known = {disk.file for point in self._points for disk in point.disks}
        for file in set(self._target.marked_files()) - known:
            self._target.remove_mark(file)

    def _check(self, disk: StoredDisk, parent: str) -> None:
        fd = self._target.open_file(disk.file)
        try:
            self._check_open(disk, fd, parent)
        finally:
            os.close(fd)

    def _check_open(self, disk: StoredDisk, fd: int, parent: str) -> None:
        chains.check_length(self._target, disk, fd)
        with storage_errors(f"read {self._target.path / disk.file}"):
            layer = Layer.of(fd, disk.name)
        chains.check_digest(self._target, disk, layer)
        check_link(layer, parent)
        result = qemu_img.check(layer)
        require_unchanged([layer])
        if result.errors:
            said = result.message or f"{result.errors} errors"
            raise DamagedError(f"qemu-img check finds {disk.file} damaged: {said}.")
        if result.leaks:
            log.warning("%s wastes %d clusters; it can be restored.", disk.file, result.leaks)

    def _state(self, disk: StoredDisk) -> str:
        """Whether the last file of a chain, which is whole, holds the state that is meant."""
        try:
            fd = self._target.open_file(disk.file)
            try:
                with storage_errors(f"read {disk.file}"):
                    layer = Layer.of(fd, disk.name)
                return _state_fault(layer, disk)
            finally:
                os.close(fd)
        except QmpBackupError as error:
            return error.message


def _state_fault(layer: Layer, disk: StoredDisk) -> str:
    if disk.snapshot:
        names = qemu_img.snapshot_names(layer)
        return "" if disk.snapshot in names else f"{disk.file} has no snapshot {disk.snapshot!r}."
    size = layer.header.size
    return "" if size == disk.size else f"{disk.file} is of {size} bytes instead of {disk.size}."
