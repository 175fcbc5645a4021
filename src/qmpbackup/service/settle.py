# SPDX-License-Identifier: Apache-2.0
"""Move a booted VM to local storage while it runs, so that nothing depends on the backup any more.

    restore the disks beside (every byte proved), with change bitmaps from there on ─ reopen the overlays on them ─ the server ends
    ─ commit the overlays ─ the guest stands still for a moment and goes on on the disks

QEMU's block-stream is not used: it gives a guest wrong data when the connection to the point is lost.
After any kill, of us, of QEMU or of the host, the same command goes on where the journal says.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import StorageError, VmError
from qmpbackup.images import qemu_img
from qmpbackup.machine import booting
from qmpbackup.process import run
from qmpbackup.service.boot_folder import Boot, BootFolder, BootPhase
from qmpbackup.service.restore import Request as Restore
from qmpbackup.service.restore import restore
from qmpbackup.service.settle_bitmaps import start_bitmaps
from qmpbackup.service.settle_steps import commit, complete, forget_overlays, reopen
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Settled:
    """A VM that depends on no backup; `stood_still` is for how many seconds the guest did."""

    folder: BootFolder
    boot: Boot
    stood_still: float = 0.0


def settle(
    folder: BootFolder,
    *,
    target: Address | None = None,
    lock_wait: float = 0.0,
    reserve: int | None = None,
) -> Settled:
    """Move a booted VM, running or not, to the disks in its folder; `target` is the one that its journal
    names, where it is open to us already.

    Raises:
        QmpBackupError: it is not there yet; nothing is lost, and the same command goes on.
    """
    with interrupt.held(), folder.claimed(wait=lock_wait):
        boot = folder.load()
        if boot.phase is BootPhase.POINT:
            place = opening.place(boot.target) if target is None else target
            _restore(folder, boot, place, lock_wait, reserve)
            start_bitmaps(folder, boot)
            boot = folder.enter(BootPhase.RESTORED)
        stood = 0.0
        if boot.phase is not BootPhase.SETTLED:
            stood = _move(folder, boot)
        return Settled(folder, folder.load(), stood)


def _restore(
    folder: BootFolder, boot: Boot, place: Address, lock_wait: float, reserve: int | None
) -> None:
    """Restore those disks that are not there; a file has its name only once it is whole."""
    lacking = tuple(disk.id for disk in boot.disks if not folder.base(disk).exists())
    if lacking:
        wanted = Restore(
            target=place,
            point=boot.point,
            disks=lacking,
            folder=folder.path,
            vm=boot.vm if opening.entrance(place).holds_several else "",
            lock_wait=lock_wait,
            reserve=reserve,
        )
        restore(wanted)


def _move(folder: BootFolder, boot: Boot) -> float:
    monitor = booting.reach(folder.monitor("settle"), _ANSWER_SECONDS)
    if monitor is None:
        _move_without_vm(folder, boot)
        return 0.0
    with monitor:
        reopen(folder, monitor, boot)
        boot = folder.enter(BootPhase.LOCAL if boot.phase is BootPhase.RESTORED else boot.phase)
        commit(monitor, boot)
        return complete(folder, monitor)


def _move_without_vm(folder: BootFolder, boot: Boot) -> None:
    """The same for a VM that is off. An overlay is deleted only when all of it is in the disk."""
    if any(map(qemu_img.in_use, filter(Path.exists, map(folder.overlay, boot.disks)))):
        # Before the journal says so: a VM that runs may need the point still.
        raise VmError("The VM runs, and does not answer.", "End it, and run settle again.")
    boot = folder.enter(BootPhase.LOCAL)
    for disk in boot.disks:
        if disk.settled or not folder.overlay(disk).exists():
            continue
        overlay, base = str(folder.overlay(disk)), str(folder.base(disk))
        _image_tool("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
        _image_tool("commit", "-q", "-d", "-f", "qcow2", overlay)
    disks = tuple(replace(each, settled=True) for each in boot.disks)
    forget_overlays(folder, folder.change(boot, disks=disks))
    folder.enter(BootPhase.SETTLED)


def _image_tool(*arguments: str) -> None:
    done = run(["qemu-img", *arguments])
    if done.code:
        raise StorageError(f"qemu-img {arguments[0]} failed: {done.reason}.", "Run settle again.")
