# SPDX-License-Identifier: Apache-2.0
"""Clean up in a VM what a run of ours left when it died. Each backup does this first by itself."""

import logging
from contextlib import AbstractContextManager

from qmpbackup import interrupt
from qmpbackup.machine import recovery, starved
from qmpbackup.machine.inventory import FoundVm
from qmpbackup.model import Quiesce
from qmpbackup.plan import commands
from qmpbackup.plan.levels import rubbish
from qmpbackup.service import session
from qmpbackup.service.quiesce import Guest
from qmpbackup.service.session import Session
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Target
from qmpbackup.targets.inventory import Inventory

log = logging.getLogger(__name__)


def recover(
    address: str,
    *,
    agent_address: str = "",
    target: Address | None = None,
    dry_run: bool = False,
    lock_wait: float = 0.0,
    host: str = "",
) -> list[str]:
    """Remove what is left of dead runs; return a clause for each thing done (or to be done).

    With a `target`, also its unfinished points and the change bitmaps that belong to none.

    Raises:
        QmpBackupError: something could not be removed.
    """
    looking = session.opened(address, lock_wait=lock_wait, look_only=dry_run, host=host)
    with interrupt.held(), looking as vm:
        if dry_run:
            return _hungry(vm) + _left(vm.found) + _left_in(vm, target, lock_wait)
        done = recovery.recover(vm.monitor, vm.found)
        if vm.found.was_frozen:
            done += Guest(vm.monitor, agent_address, Quiesce.TRY).heal()
        if target is not None:
            with _opened(vm, target) as found, found.writing(lock_wait) as cleared:
                done += cleared + _remove_rubbish(vm, found.load(), found.id)
        return done


def _opened(vm: Session, target: Address) -> AbstractContextManager[Target]:
    return opening.entrance(target).of(vm.vm.config.identity)


def _hungry(vm: Session) -> list[str]:
    """A VM that a run which died has left without room."""
    devices = starved.devices_of(vm.found.leftovers.markers)
    if not devices or starved.find(vm.monitor, devices) is None:
        return []
    return ["would let the VM run again, which had found no room"]


def _left(found: FoundVm) -> list[str]:
    left = found.leftovers
    names = (*left.jobs, *left.exports, *left.nodes, *left.markers)
    sets = tuple(f"descriptor set {number}" for number in left.descriptor_sets)
    return [f"would remove {name}" for name in (*names, *sets)]


def _left_in(vm: Session, target: Address | None, lock_wait: float) -> list[str]:
    """What there is to do in a target, and for it in the VM."""
    if target is None:
        return []
    with _opened(vm, target) as found, found.lock(wait=lock_wait):
        return found.left() + _left_bitmaps(vm, found.load(), found.id)


def _left_bitmaps(vm: Session, stored: Inventory, target_id: str) -> list[str]:
    return [
        f"would remove bitmap {name} of disk {disk.id}"
        for disk in vm.vm.disks
        for name in rubbish(disk, stored.points, target_id)
    ]


def _remove_rubbish(vm: Session, stored: Inventory, target_id: str) -> list[str]:
    done = []
    for disk in vm.vm.disks:
        for name in rubbish(disk, stored.points, target_id):
            vm.monitor.execute(commands.bitmap_remove(disk.format_node, name))
            done.append(f"removed bitmap {name} of disk {disk.id}")
    return done
