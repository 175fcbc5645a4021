# SPDX-License-Identifier: Apache-2.0
"""Clean up in a VM what a run of ours left when it died. Each backup does this first by itself."""

import logging
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.model import Quiesce
from qmpbackup.plan import commands
from qmpbackup.plan.levels import rubbish
from qmpbackup.qemu import recovery
from qmpbackup.qemu.inventory import Inventory
from qmpbackup.service import session
from qmpbackup.service.quiesce import Guest
from qmpbackup.service.rebase.settle import settle
from qmpbackup.service.session import Session
from qmpbackup.target.directory import DirectoryTarget

log = logging.getLogger(__name__)


def recover(
    address: str,
    *,
    agent_address: str = "",
    target: Path | None = None,
    dry_run: bool = False,
    lock_wait: float = 0.0,
) -> list[str]:
    """Remove what is left of dead runs; return a clause for each thing done (or to be done).

    With a `target`, also its unfinished points and the change bitmaps that belong to none.

    Raises:
        QmpBackupError: something could not be removed.
    """
    with interrupt.held(), session.opened(address, lock_wait=lock_wait) as vm:
        if dry_run:
            return _left(vm.found)
        done = recovery.recover(vm.monitor, vm.found)
        if vm.found.was_frozen:
            done += Guest(vm.monitor, agent_address, Quiesce.TRY).heal()
        if target is not None:
            done += _recover_target(vm, DirectoryTarget.open(target), lock_wait)
        return done


def _left(found: Inventory) -> list[str]:
    left = found.leftovers
    names = (*left.jobs, *left.exports, *left.nodes, *left.markers)
    sets = tuple(f"descriptor set {number}" for number in left.descriptor_sets)
    return [f"would remove {name}" for name in (*names, *sets)]


def _recover_target(vm: Session, target: DirectoryTarget, lock_wait: float) -> list[str]:
    settle(target, lock_wait)
    with target.lock(write=True, wait=lock_wait):
        done = target.recover()
        points = target.load().points
        for disk in vm.vm.disks:
            for name in rubbish(disk, points, target.id):
                vm.monitor.execute(commands.bitmap_remove(disk.format_node, name))
                done.append(f"removed bitmap {name} of disk {disk.id}")
    return done
