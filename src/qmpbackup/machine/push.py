# SPDX-License-Identifier: Apache-2.0
"""The push copy: QEMU itself writes a view into qcow2 files that we opened.

The images are created by QEMU as well (`blockdev-create`), inside the files that were handed over,
so no other program and no path is involved.
"""

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup.errors import (
    CommandError,
    JobError,
    QmpBackupError,
    StorageError,
    VmError,
)
from qmpbackup.images.qcow2_layout import CLUSTER
from qmpbackup.machine import jobs
from qmpbackup.machine.handover import hand_over
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import objects
from qmpbackup.machine.steps import Step, answers, carry_out
from qmpbackup.machine.view import View
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import GUARD, RunNames
from qmpbackup.plan.progress import DiskProgress, WatchDisks
from qmpbackup.plan.speed import JobSpeeds, Speed, unlimited
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)

FIRST_RIGHT_SNAPSHOT_ACCESS = (8, 0)
"""Before 8.0 a read of a view that crosses from an overwritten cluster into an untouched one returns
live data (fixed by QEMU commit a4d5224c); requests of one cluster are right."""

_UNDER_WAY = 64 * CLUSTER
"""Bytes that a job reads or writes at a time."""

_VIEW_BROKEN = frozenset(map(os.strerror, (errno.EACCES, errno.EINVAL)))
"""What QEMU says of a view whose scratch has failed (block/copy-before-write.c)."""

NO_FLUSH: dict[str, Json] = {"no-flush": True}
"""QEMU need not flush the target: we do that once, through our own descriptor, before the commit."""


@dataclass(frozen=True, slots=True)
class NewImage:
    """A qcow2 file to be filled with a disk: open descriptor, and path.

    `backing` is the relative name of the file it builds on (empty: none); QEMU only records it.
    """

    seat: Seat
    fd: int
    path: Path
    backing: str = ""

    @property
    def disk_id(self) -> str:
        """The disk that it is filled with."""
        return self.seat.disk.id

    @property
    def number(self) -> int:
        """The place of that disk in the run."""
        return self.seat.number


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy: compression with zstd, and limits in bytes a second for each disk (0: none), and for
    all of them together."""

    compress: bool = False
    speed: int = 0
    limit: Speed = unlimited


def create_images(
    monitor: Monitor,
    images: Sequence[NewImage],
    names: RunNames,
    options: CopyOptions,
    undo: UndoStack,
) -> None:
    """Make every file an empty qcow2 image and open it in QEMU as a target.

    Raises:
        StorageError: an image could not be created.
    """
    carry_out(monitor, [_file(monitor, image, names, undo) for image in images], undo)
    _create(monitor, images, names, options, undo)
    carry_out(monitor, [_image(image, names) for image in images], undo)
    _require_own_data(monitor, images, names)


def _require_own_data(monitor: Monitor, images: Sequence[NewImage], names: RunNames) -> None:
    """QEMU parses the head of a file when it opens it, and what is behind the target may have exchanged
    that since the image was made (NFS, CIFS): then it has another file open now, for the guest's data.

    Raises:
        StorageError: it is so; nothing was written there.
    """
    ours = {names.of("image", image.number): image for image in images}
    what = "query-named-block-nodes"
    for node in objects(monitor.execute(Command(what, {"flat": True})), what):
        image = ours.get(node.text("node-name"))
        details = node.nested("image").optional("format-specific") if image else None
        if image and details and "data-file" in details.nested("data"):
            raise StorageError(
                f"{image.path} was changed while QEMU opened it, and names another file for its data.",
                "Somebody else writes to the target: look at its storage.",
            )


def copy_all(
    monitor: Monitor,
    images: Sequence[NewImage],
    view: View,
    names: RunNames,
    options: CopyOptions,
    undo: UndoStack,
    watch: WatchDisks | None = None,
) -> None:
    """Copy the view of every disk into its image.

    However it goes, the jobs are there until `undo` ends them: see `jobs`. Until then QEMU refuses to
    migrate the VM, or to save it to a file.

    Raises:
        StorageError: a target could not be written.
        JobError: a view broke, or its disk could not be read.
        VmError: QEMU did not begin a copy, as when a disk has just been resized.
        Interrupted, OutcomeUnknown: see `Monitor`.
    """
    started = job_names(images, names)
    _keep_here(monitor, names, undo)
    undo.push("end the copying", lambda: jobs.sweep(monitor, started))
    speeds = JobSpeeds(options.speed, options.limit, len(images))
    options = replace(options, speed=speeds.each)
    sent = answers(monitor, images, lambda image: _backup(monitor, names, image, view, options))
    for image, answer in sent:
        if isinstance(answer, CommandError):
            raise _refused(image.disk_id, answer)
    shown = _named(watch, images, names)
    ends = {end.job: end for end in jobs.wait_until_still(monitor, started, shown, speeds)}
    for image in images:
        end = ends[names.of("job", image.number)]
        if end.error:
            raise _failure(image, end)


def job_names(images: Sequence[NewImage], names: RunNames) -> list[str]:
    """The jobs that fill images."""
    return [names.of("job", image.number) for image in images]


def _named(
    watch: WatchDisks | None, images: Sequence[NewImage], names: RunNames
) -> jobs.Watch | None:
    """Who looks at disks looks at jobs, which go by other names."""
    if watch is None:
        return None
    disks = {names.of("job", image.number): image.disk_id for image in images}
    return lambda found: watch(
        [DiskProgress(disks[each.job], each.done, each.total) for each in found]
    )


def _keep_here(monitor: Monitor, names: RunNames, undo: UndoStack) -> None:
    """Have QEMU refuse to migrate or save the VM, by a node that keeps a right to write.

    At the end of either QEMU lets go of all images, which fails if a node would go on writing. A view
    would, to its scratch; but QEMU begins at nodes that it knows by themselves, and never comes to a view
    that only a job uses (`bdrv_inactivate_all` in block.c). It would say that the VM was migrated, and go
    on using its images.
    """
    name = names.of(GUARD, 0)
    add = commands.blockdev_add(
        name, "blkdebug", image={"driver": "null-co"}, take_child_perms=["write"]
    )
    step = Step(add, "let the VM be migrated again", commands.blockdev_del(name))
    try:
        carry_out(monitor, [step], undo)
    except CommandError as error:  # a QEMU that was built without this driver
        log.debug("This VM can be migrated or saved during the run: %s", error)


def _refused(disk_id: str, error: CommandError) -> VmError:
    """The error for a copy that QEMU does not begin."""
    if "different sizes" not in error.description:  # block/backup.c
        return error
    return VmError(
        f"Disk {disk_id} was resized while the backup began.", "Run again; nothing was lost."
    )


def _file(monitor: Monitor, image: NewImage, names: RunNames, undo: UndoStack) -> Step:
    name = names.of("file", image.number)
    filename = hand_over(monitor, image.fd, image.path, name, undo)
    add = commands.blockdev_add(name, "file", filename=filename, discard="unmap", cache=NO_FLUSH)
    return Step(add, f"close {image.path}", commands.blockdev_del(name))


def _image(image: NewImage, names: RunNames) -> Step:
    name, file = names.of("image", image.number), names.of("file", image.number)
    add = commands.blockdev_add(
        name, "qcow2", file=file, backing=None, discard="unmap", cache=NO_FLUSH
    )
    return Step(add, f"close image {image.path}", commands.blockdev_del(name))


def _create(
    monitor: Monitor,
    images: Sequence[NewImage],
    names: RunNames,
    options: CopyOptions,
    undo: UndoStack,
) -> None:
    created = [names.of("create", image.number) for image in images]
    undo.push("end the creation of images", lambda: jobs.sweep(monitor, created))
    monitor.execute_all([_creation(image, names, options) for image in images])
    ends = {end.job: end for end in jobs.wait(monitor, created, seconds=jobs.CREATE_SECONDS)}
    for image in images:
        end = ends[names.of("create", image.number)]
        if end.error:
            raise StorageError(
                f"QEMU could not create {image.path}: {end.error}.",
                "Check free space and rights on the target.",
            )


def _creation(image: NewImage, names: RunNames, options: CopyOptions) -> Command:
    created: dict[str, Json] = {
        "driver": "qcow2",
        "file": names.of("file", image.number),
        "size": image.seat.disk.size,
        "cluster-size": CLUSTER,
    }
    if image.backing:
        created |= {"backing-file": image.backing, "backing-fmt": "qcow2"}
    if options.compress:
        created["compression-type"] = "zstd"
    job = names.of("create", image.number)
    return Command("blockdev-create", {"job-id": job, "options": created})


def _backup(
    monitor: Monitor, names: RunNames, image: NewImage, view: View, options: CopyOptions
) -> Command:
    arguments: dict[str, Json] = {
        "job-id": names.of("job", image.number),
        "device": view.snapshot_node(image.seat),
        "target": names.of("image", image.number),
        "auto-dismiss": False,
        "auto-finalize": False,
        "on-source-error": "stop",
        "on-target-error": "report",
        **_options(options, view.copy_bitmap(image.seat)),
    }
    arguments["x-perf"] = _sizes(monitor.version, options.speed)
    return Command("blockdev-backup", arguments)


def _sizes(version: tuple[int, int, int], speed: int) -> dict[str, Json]:
    """Size and number of requests: 4 MiB under way, in pieces of 256 KiB where these are right.

    Measured (1 GiB of files): on QEMU 10 pieces of a MiB take a fifth longer than of 256 KiB, on a disk and
    in memory. How many clusters are under way on 7.2 counts only where others work beside: the kernel lets
    one write to a file at a time.

    With a limit a job reads something in each second, down to one cluster: a view that broke is seen
    when the job reads.
    """
    chunk = CLUSTER if version[:2] < FIRST_RIGHT_SNAPSHOT_ACCESS else 4 * CLUSTER
    workers = _UNDER_WAY // chunk
    if speed:
        chunk = max(CLUSTER, min(chunk, speed // CLUSTER * CLUSTER))
        workers = max(1, min(workers, speed // chunk))
    return {"max-chunk": chunk, "max-workers": workers}


def _options(options: CopyOptions, bitmap: str) -> dict[str, Json]:
    # "never" leaves the bitmap as it is in every outcome: a failed job must cost nothing.
    sync: dict[str, Json] = {"sync": "full"}
    if bitmap:
        sync = {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}
    if options.compress:
        sync["compress"] = True
    if options.speed:
        sync["speed"] = options.speed
    return sync


def _failure(image: NewImage, end: jobs.JobEnd) -> QmpBackupError:
    if end.operation == "write":
        return StorageError(
            f"The backup of disk {image.disk_id} could not be written to {image.path.parent}: "
            f"{end.error}.",
            "Make room or repair the target, then run again; nothing was lost.",
        )
    # Once a view is broken, already the question what there is to read fails, without an event.
    if end.operation == "read" or end.error in _VIEW_BROKEN:
        return view_broke(image.disk_id, end.error)
    return JobError(
        f"The backup of disk {image.disk_id} failed: {end.error}.",
        "Run again; nothing was lost.",
    )


def view_broke(disk_id: str, reason: str) -> JobError:
    """The error of a view that can be read no more."""
    return JobError(
        f"The view of disk {disk_id} broke while it was copied: {reason}.",
        "Its scratch image was full, failing or too slow (or the disk has read errors): make "
        "room there or choose another place with --scratch, then run again; nothing was lost.",
    )
