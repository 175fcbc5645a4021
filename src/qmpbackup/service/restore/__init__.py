# SPDX-License-Identifier: Apache-2.0
"""Bring disks of a point back, as files or onto a block device: the right bytes, or nothing.

    find the point ─ choose its disks ─ see that nothing is harmed where they go ─ open the images
    files:   pour each into NAME.partial, which proves all that is read
             ─ sizes right, fsync ─ and only when all disks are through: rename
    device:  pour, which proves what can be proved before ─ then writes, zeros too ─ fsync

So damage is found before a name that counts is given.

    request      what is asked for, and what came out
    outputs      where disks may go, and what must not be harmed there
    place        the files and devices that they are poured into
"""

from qmpbackup import interrupt
from qmpbackup.errors import UsageError
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.missing import missing
from qmpbackup.service.restore import place
from qmpbackup.service.restore.outputs import outputs
from qmpbackup.service.restore.request import FORMATS, Outcome, Request, Restored
from qmpbackup.service.show import chosen_disks, find_point
from qmpbackup.targets import opening

__all__ = ["FORMATS", "Outcome", "Request", "Restored", "restore"]


def restore(request: Request) -> Outcome:
    """Restore disks of a point.

    Raises:
        QmpBackupError: nothing was restored, and nothing is left behind; only a block device that
            was already being written to holds part of the data.
    """
    with (
        interrupt.held(),
        opening.entrance(request.target).opened(request.vm) as target,
        target.lock(wait=request.lock_wait),
    ):
        inventory = target.load()
        point = find_point(target, inventory, request.point)
        disks = _chosen(point, request)
        places = outputs(target, request, disks)
        with target.images(inventory.points, point, disks, to_read=False) as opened:
            images = [opened.images[disk.id] for disk in disks]
            if places[0].is_device:
                place.into_device(places[0], disks[0], images[0], request)
            else:
                place.into_files(places, disks, images, request)
    pairs = zip(disks, places, strict=True)
    return Outcome(
        point,
        tuple(Restored(disk.id, at.path, disk.size) for disk, at in pairs),
        # Who names disks wants these; who names none wants the VM.
        () if request.disks else missing(inventory.points, point),
    )


def _chosen(point: Point, request: Request) -> tuple[StoredDisk, ...]:
    chosen = chosen_disks(point, request.disks)
    if request.file is not None and len(chosen) != 1:
        raise UsageError(
            f"Point {point.id} holds several disks, and a file takes one.", "Name one with --disk."
        )
    return chosen
