# SPDX-License-Identifier: Apache-2.0
"""Scratch images inside QEMU: plain files, or qcow2 images above the disk that they belong to.

Both are ready before the instant; nothing is read from or written to them before.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qmpbackup.errors import StorageError
from qmpbackup.machine import jobs, scratch
from qmpbackup.machine.handover import hand_over
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.steps import Step, carry_out
from qmpbackup.model import Disk
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.names import RunNames
from qmpbackup.undo import UndoStack

CLUSTER = 65536
"""Bytes of a cluster. The filter copies in units of it: larger ones slow the guest down."""

_OPTIONS: dict[str, Json] = {"discard": "unmap", "cache": {"no-flush": True}}


def open_all(
    monitor: Monitor,
    disks: Sequence[tuple[int, Disk]],
    scratches: Sequence[tuple[int, Path]],
    names: RunNames,
    undo: UndoStack,
    *,
    readable: bool,
) -> None:
    """Open the scratch of each (number, disk) as the node `scratch`; a scratch is (descriptor, path).

    Raises:
        StorageError: a qcow2 image could not be created.
        VmError: QEMU refused.
    """
    kind = "fleece" if readable else "scratch"
    steps = []
    for (number, disk), (fd, path) in zip(disks, scratches, strict=True):
        name = names.of(kind, number)
        filename = hand_over(monitor, fd, path, name, undo)
        add = commands.blockdev_add(name, "file", filename=filename, **_OPTIONS)
        words = f"close the scratch image of {disk.id}"
        steps.append(Step(add, words, partial(_close, monitor, name, fd)))
    carry_out(monitor, steps, undo)
    if readable:
        _create(monitor, disks, names, undo)
        carry_out(monitor, [_above(number, disk, names) for number, disk in disks], undo)


def _close(monitor: Monitor, name: str, fd: int) -> None:
    monitor.execute(commands.blockdev_del(name))
    scratch.empty(fd)


def _create(
    monitor: Monitor, disks: Sequence[tuple[int, Disk]], names: RunNames, undo: UndoStack
) -> None:
    created = [names.of("form", number) for number, _ in disks]
    undo.push("end the creation of scratch images", lambda: jobs.sweep(monitor, created))
    monitor.execute_all(
        [
            Command(
                "blockdev-create",
                {
                    "job-id": job,
                    "options": {
                        "driver": "qcow2",
                        "file": names.of("fleece", number),
                        "size": disk.size,
                        "cluster-size": CLUSTER,
                    },
                },
            )
            for job, (number, disk) in zip(created, disks, strict=True)
        ]
    )
    for end in jobs.wait(monitor, created, seconds=jobs.CREATE_SECONDS):
        if end.error:
            raise StorageError(
                f"QEMU could not create a scratch image: {end.error}.",
                "Make room, or choose another folder with --scratch DIR.",
            )


def _above(number: int, disk: Disk, names: RunNames) -> Step:
    name, file = names.of("scratch", number), names.of("fleece", number)
    add = commands.blockdev_add(name, "qcow2", file=file, backing=disk.node, **_OPTIONS)
    return Step(add, f"close the scratch image above {disk.id}", commands.blockdev_del(name))
