# SPDX-License-Identifier: Apache-2.0
"""Scratch images inside QEMU: plain files, or qcow2 images above the disk that they belong to.

Both are ready before the instant; nothing is read from or written to them before.
"""

from collections.abc import Sequence
from functools import partial

from qmpbackup.errors import StorageError
from qmpbackup.images.qcow2_layout import CLUSTER
from qmpbackup.machine import jobs, scratch
from qmpbackup.machine.handover import hand_over
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.steps import Step, carry_out
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import RunNames
from qmpbackup.undo import UndoStack

_OPTIONS: dict[str, Json] = {"discard": "unmap", "cache": {"no-flush": True}}


def open_all(
    monitor: Monitor,
    scratches: Sequence[Scratch],
    names: RunNames,
    undo: UndoStack,
    *,
    readable: bool,
) -> None:
    """Open each scratch as the node `scratch` of its disk.

    Raises:
        StorageError: a qcow2 image could not be created.
        VmError: QEMU refused.
    """
    kind = "fleece" if readable else "scratch"
    steps = []
    for each in scratches:
        name = names.of(kind, each.seat.number)
        filename = hand_over(monitor, each.fd, each.path, name, undo)
        add = commands.blockdev_add(name, "file", filename=filename, **_OPTIONS)
        words = f"close the scratch image of {each.seat.disk.id}"
        steps.append(Step(add, words, partial(_close, monitor, name, each.fd)))
    carry_out(monitor, steps, undo)
    if readable:
        seats = [each.seat for each in scratches]
        _create(monitor, seats, names, undo)
        carry_out(monitor, [_above(seat, names) for seat in seats], undo)


def _close(monitor: Monitor, name: str, fd: int) -> None:
    monitor.execute(commands.blockdev_del(name))
    scratch.empty(fd)


def _create(monitor: Monitor, seats: Sequence[Seat], names: RunNames, undo: UndoStack) -> None:
    created = [names.of("form", seat.number) for seat in seats]
    undo.push("end the creation of scratch images", lambda: jobs.sweep(monitor, created))
    monitor.execute_all([_creation(seat, names) for seat in seats])
    for end in jobs.wait(monitor, created, seconds=jobs.CREATE_SECONDS):
        if end.error:
            raise StorageError(
                f"QEMU could not create a scratch image: {end.error}.",
                "Make room, or choose another folder with --scratch DIR.",
            )


def _creation(seat: Seat, names: RunNames) -> Command:
    options: dict[str, Json] = {
        "driver": "qcow2",
        "file": names.of("fleece", seat.number),
        "size": seat.disk.size,
        "cluster-size": CLUSTER,
    }
    job = names.of("form", seat.number)
    return Command("blockdev-create", {"job-id": job, "options": options})


def _above(seat: Seat, names: RunNames) -> Step:
    name, file = names.of("scratch", seat.number), names.of("fleece", seat.number)
    add = commands.blockdev_add(name, "qcow2", file=file, backing=seat.disk.node, **_OPTIONS)
    return Step(add, f"close the scratch image above {seat.disk.id}", commands.blockdev_del(name))
