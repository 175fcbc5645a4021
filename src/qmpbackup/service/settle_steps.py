# SPDX-License-Identifier: Apache-2.0
"""The steps by which disks of a running VM come off the served point. Each can be done again.

    reopen     the overlay stands on the restored disk in place of the point: QEMU changes it at once
    commit     QEMU copies what the overlay has into that disk, and keeps both alike
    complete   the VM stands still ─ the guest is put on the disk ─ the journal says so ─ the overlay is
               deleted ─ the VM runs on

From when the guest writes to the disk, the overlay on it would be wrong. So the guest does not run
between the moment in which it is put there and the one in which the journal says so for good.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import CommandError, CommandTimeout, JobError, VmError
from qmpbackup.machine import booting, graph
from qmpbackup.machine.graph import Graph
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command
from qmpbackup.service.boot_folder import (
    Boot,
    BootedDisk,
    BootFolder,
    BootPhase,
    base_of,
    overlay_of,
)

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
_COMPLETE_SECONDS = 60.0
_OVER = frozenset({"concluded", "null"})


def reopen(folder: BootFolder, monitor: Monitor, boot: Boot) -> None:
    """Put every overlay onto its restored disk."""
    hangs = Graph.of(monitor.execute(graph.QUESTION))
    nodes = _nodes(monitor)
    for disk in boot.disks:
        if disk.settled or hangs.child(disk.node, "backing") == disk.base_node:
            continue
        if disk.base_node not in nodes:
            monitor.execute(Command("blockdev-add", base_of(folder, disk)))
        overlay = overlay_of(folder, disk)
        overlay |= {"file": overlay["file"]["node-name"], "backing": disk.base_node}
        monitor.execute(Command("blockdev-reopen", {"options": [overlay]}))
        log.info("Disk %s stands on the restored disk.", disk.id)
    for disk in boot.disks:
        with suppress(CommandError):  # most often it has gone by itself
            monitor.execute(Command("blockdev-del", {"node-name": disk.point_node}))


def commit(monitor: Monitor, boot: Boot) -> None:
    """Have QEMU copy what the overlays have; returns when each is like its disk.

    Raises:
        JobError: it cannot be copied. Nothing is lost: the overlays have it.
        Interrupted: a signal is waiting; the copying is ended.
    """
    disks = [disk for disk in boot.disks if not disk.settled]
    _dismiss_failed(monitor, disks)
    there = _jobs(monitor)
    try:
        for disk in disks:
            if _job(disk) not in there and not _is_moved(monitor, disk):
                monitor.execute(_commit(disk))
        while not _all_ready(monitor, disks):
            interrupt.check()
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _cancel(monitor, disks)
        raise


def complete(folder: BootFolder, monitor: Monitor) -> float:
    """Put the guest on the disks; how long it stood still for that, in seconds.

    Also what whoever finds a VM does that a killed `settle` has left standing still.

    Raises:
        JobError: not all disks were moved; those that were are noted, and the VM runs on.
        VmError: it stands still for another reason.
    """
    status = booting.status(monitor)
    if status not in {"running", "paused"}:
        raise VmError(
            f"The VM stands still ({status}), so it is not moved now.",
            "See what its disks lack, such as room where the overlays are, and run settle again.",
        )
    running = status == "running"
    found_still = folder.load().phase is BootPhase.COMPLETING
    boot = folder.enter(BootPhase.COMPLETING)
    began = time.monotonic()
    stopping = running and not all(disk.settled for disk in boot.disks)
    if stopping:
        monitor.execute(Command("stop"))
    failed: list[str] = []
    for disk in boot.disks:
        failed += _complete(monitor, disk)
    disks = tuple(
        replace(disk, settled=disk.settled or _is_moved(monitor, disk)) for disk in boot.disks
    )
    boot = folder.change(boot, disks=disks)
    forget_overlays(folder, boot)
    if stopping or (found_still and not running):
        monitor.execute(Command("cont"))
    stood = time.monotonic() - began
    for disk in boot.disks:
        if disk.settled:
            with suppress(CommandError):  # of `-drive` it goes by itself
                monitor.execute(Command("blockdev-del", {"node-name": disk.node}))
    all_settled = all(disk.settled for disk in disks)
    folder.enter(BootPhase.SETTLED if all_settled else BootPhase.LOCAL)
    if not all_settled:
        raise JobError(f"Not all disks could be moved: {' '.join(failed)}", "Run settle again.")
    return stood


def forget_overlays(folder: BootFolder, boot: Boot) -> None:
    """Delete the overlays of disks that have been moved."""
    with storage_errors(f"remove overlays from {folder.path}"):
        for disk in boot.disks:
            if disk.settled:
                folder.overlay(disk).unlink(missing_ok=True)


def _job(disk: BootedDisk) -> str:
    return f"{booting.NODE}{disk.number}-settle"


def _commit(disk: BootedDisk) -> Command:
    return Command(
        "block-commit",
        {
            "job-id": _job(disk),
            "device": disk.node,
            "top-node": disk.node,
            "base-node": disk.base_node,
            "auto-dismiss": False,
        },
    )


def _nodes(monitor: Monitor) -> frozenset[str]:
    found = monitor.execute(Command("query-named-block-nodes", {"flat": True}))
    return frozenset(each.text("node-name") for each in objects(found, "query-named-block-nodes"))


def _jobs(monitor: Monitor) -> dict[str, Reply]:
    found = monitor.execute(Command("query-jobs"))
    return {each.text("id"): each for each in objects(found, "query-jobs")}


def _is_moved(monitor: Monitor, disk: BootedDisk) -> bool:
    """Whether the guest's device is on the restored disk itself."""
    drives = objects(monitor.execute(Command("query-block")), "query-block")
    inserted = [each.optional("inserted") for each in drives]
    return disk.base_node in {each.text("node-name") for each in inserted if each is not None}


def _all_ready(monitor: Monitor, disks: Sequence[BootedDisk]) -> bool:
    there = _jobs(monitor)
    for disk in disks:
        job = there.get(_job(disk))
        state = job.text("status") if job is not None else "null"
        if state in _OVER and not _is_moved(monitor, disk):
            why = job.text("error", "") if job is not None else ""
            raise JobError(
                f"Disk {disk.id} could not be moved: {why or 'the job is gone'}.",
                "Nothing is lost. Look at the storage, and run settle again.",
            )
        if state not in {"ready", "standby", *_OVER}:
            return False
    return True


def _dismiss_failed(monitor: Monitor, disks: Sequence[BootedDisk]) -> None:
    there = _jobs(monitor)
    for disk in disks:
        job = there.get(_job(disk))
        if job is not None and job.text("status") == "concluded":
            monitor.execute(Command("job-dismiss", {"id": _job(disk)}))


def _cancel(monitor: Monitor, disks: Sequence[BootedDisk]) -> None:
    """End the copying, and wait for that; what cannot be ended now, the next run deals with."""
    with suppress(Exception):
        for disk in disks:
            if _job(disk) in _jobs(monitor):
                with suppress(CommandError):
                    monitor.execute(Command("job-cancel", {"id": _job(disk)}))
                _await_end(monitor, disk)


def _complete(monitor: Monitor, disk: BootedDisk) -> list[str]:
    """Put the guest on a disk whose overlay is like it; why not, if not."""
    job = _jobs(monitor).get(_job(disk))
    if job is None:
        return []
    try:
        if job.text("status") in {"ready", "standby"}:
            monitor.execute(Command("job-complete", {"id": _job(disk)}))
        why = _await_end(monitor, disk)
    except CommandError as error:
        return [f"{disk.id}: {error.description}."]
    return [f"{disk.id}: {why}."] if why else []


def _await_end(monitor: Monitor, disk: BootedDisk) -> str:
    """Wait for the end of a job without looking at signals, and dismiss it; its error."""
    deadline = time.monotonic() + _COMPLETE_SECONDS
    while (job := _jobs(monitor).get(_job(disk))) is not None:
        if job.text("status") == "concluded":
            monitor.execute(Command("job-dismiss", {"id": _job(disk)}))
            return job.text("error", "")
        if time.monotonic() > deadline:
            raise CommandTimeout(f"QEMU does not finish moving disk {disk.id}.")
        time.sleep(_POLL_SECONDS)
    return ""
