# SPDX-License-Identifier: Apache-2.0
"""Disks out of a directory: qemu-img copies their chains, and every byte of every file is proved.

open every file of every chain, check lengths, headers and links
files:   copy, reading all digests at the same time
device:  read all digests first ─ then copy, zeros too
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images import merging, qemu_img
from qmpbackup.images.layers import require_unchanged
from qmpbackup.model import Point, StoredDisk
from qmpbackup.process import Child
from qmpbackup.service.restore import place
from qmpbackup.service.restore.outputs import Output
from qmpbackup.service.restore.place import Partial
from qmpbackup.service.restore.request import Request
from qmpbackup.targets.folder import chains
from qmpbackup.targets.folder.chains import OpenFile
from qmpbackup.targets.folder.target import DirectoryTarget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Source:
    """A disk to restore, its files open."""

    disk: StoredDisk
    files: tuple[OpenFile, ...]


def restore(
    target: DirectoryTarget,
    points: Sequence[Point],
    point: Point,
    disks: Sequence[StoredDisk],
    outputs: Sequence[Output],
    request: Request,
) -> None:
    """Restore disks of a point, each to its output.

    Raises:
        QmpBackupError: as `restore.restore` says.
    """
    with ExitStack() as stack:
        sources = [
            _Source(disk, stack.enter_context(chains.opened(target, points, point, disk)))
            for disk in disks
        ]
        if outputs[0].is_device:
            _to_device(target, sources[0], outputs[0], request)
            return

        def fill(number: int, partial: Partial) -> None:
            _fill(target, sources[number], partial, request.file_format)

        needs = [_needed(source) for source in sources]
        place.into_files(outputs, needs, request, fill)


def _needed(source: _Source) -> int:
    """Bytes that a disk takes where it goes, as far as that can be measured."""
    if not source.disk.snapshot:
        with suppress(DamagedError):  # the copy says better what is wrong
            return qemu_img.needed_bytes([file.layer for file in source.files])
    return 0


def _fill(target: DirectoryTarget, source: _Source, partial: Partial, format_: str) -> None:
    disk = source.disk
    log.info("Restoring disk %s to %s", disk.id, partial.path)
    layers = [file.layer for file in source.files]
    running = qemu_img.converting(layers, partial.fd, format_, snapshot=disk.snapshot)
    with running as child:
        _verify(target, source, child)
        _finish(child, source, f"restore disk {disk.id}")
    _fit(partial.fd, format_, disk)
    with storage_errors(f"write {partial.path}"):
        os.fsync(partial.fd)


def _verify(target: DirectoryTarget, source: _Source, child: Child | None = None) -> None:
    """Read the digests of a chain; stop early where the copy has failed for want of room."""
    for file in source.files:
        with chains.marking(target, file.link.disk):
            chains.check_digest(target, file.link.disk, file.layer, _stop_with(child))


def _stop_with(child: Child | None) -> Callable[[], None] | None:
    if child is None:
        return None

    def check() -> None:
        if child.failed:
            error = qemu_img.failure(child.wait(), "restore")
            if isinstance(error, StorageError):
                raise error

    return check


def _finish(child: Child, source: _Source, action: str) -> None:
    """What was copied is what the digests stand for."""
    result = child.wait()
    require_unchanged([file.layer for file in source.files])
    if result.code:
        raise qemu_img.failure(result, action)


def _fit(fd: int, format_: str, disk: StoredDisk) -> None:
    """The output is as large as the disk was; only an internal snapshot can have had another size.

    Raises:
        DamagedError: it is not.
    """
    if disk.snapshot and place.size_of(fd, format_) != disk.size:
        merging.resize(fd, format_, disk.size)
    place.check_size(fd, format_, disk)


def _to_device(target: DirectoryTarget, source: _Source, output: Output, request: Request) -> None:
    disk = source.disk
    with place.device(output, disk, request) as fd:
        log.info("Checking the files of disk %s before %s is written to", disk.id, output.path)
        _verify(target, source)
        layers = [file.layer for file in source.files]
        with place.overwriting(output.path, fd, disk):
            running = qemu_img.converting(layers, fd, "raw", snapshot=disk.snapshot, existing=True)
            with running as child:
                _finish(child, source, f"restore disk {disk.id} to {output.path}")
