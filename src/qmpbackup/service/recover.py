# SPDX-License-Identifier: Apache-2.0
"""Clean up in a VM what a run of ours left when it died. Each backup does this first by itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qmpbackup import interrupt
from qmpbackup.machine import recovery, starved
from qmpbackup.machine.inventory import Inventory
from qmpbackup.model import Location, Place, Quiesce
from qmpbackup.plan import commands
from qmpbackup.plan.levels import rubbish
from qmpbackup.service import session
from qmpbackup.service.quiesce import Guest
from qmpbackup.service.session import Session
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.inventory import Inventory as Stored

if TYPE_CHECKING:
    from qmpbackup.targets.repository.target import RepositoryTarget

log = logging.getLogger(__name__)


def recover(
    address: str,
    *,
    agent_address: str = "",
    target: Place | None = None,
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
        if isinstance(target, Location):
            done += _recover_repository(vm, target, lock_wait)
        elif target is not None:
            done += _recover_folder(vm, DirectoryTarget.open(target), lock_wait)
        return done


def _hungry(vm: Session) -> list[str]:
    """A VM that a run which died has left without room."""
    devices = starved.devices_of(vm.found.leftovers.markers)
    if not devices or starved.find(vm.monitor, devices) is None:
        return []
    return ["would let the VM run again, which had found no room"]


def _left(found: Inventory) -> list[str]:
    left = found.leftovers
    names = (*left.jobs, *left.exports, *left.nodes, *left.markers)
    sets = tuple(f"descriptor set {number}" for number in left.descriptor_sets)
    return [f"would remove {name}" for name in (*names, *sets)]


def _left_in(vm: Session, place: Place | None, lock_wait: float) -> list[str]:
    """What there is to do in a target, and for it in the VM."""
    if place is None:
        return []
    if isinstance(place, Location):
        with _repository(vm, place) as repository, repository.lock(wait=lock_wait):
            return _left_bitmaps(vm, repository.load(), repository.id)
    folder = DirectoryTarget.open(place)
    with folder.lock(wait=lock_wait):
        merges = [f"would finish the merge in {name}" for name in folder.interrupted()]
        return merges + folder.left() + _left_bitmaps(vm, folder.load(), folder.id)


def _left_bitmaps(vm: Session, stored: Stored, target_id: str) -> list[str]:
    return [
        f"would remove bitmap {name} of disk {disk.id}"
        for disk in vm.vm.disks
        for name in rubbish(disk, stored.points, target_id)
    ]


def _recover_folder(vm: Session, target: DirectoryTarget, lock_wait: float) -> list[str]:
    target.settle(lock_wait)
    with target.lock(write=True, wait=lock_wait):
        done = target.recover()
        return done + _remove_rubbish(vm, target.load(), target.id)


def _recover_repository(vm: Session, place: Location, lock_wait: float) -> list[str]:
    """What a dead run stored there no snapshot names; `prune` removes it."""
    with _repository(vm, place) as target, target.lock(wait=lock_wait):
        return _remove_rubbish(vm, target.load(), target.id)


@contextmanager
def _repository(vm: Session, place: Location) -> "Iterator[RepositoryTarget]":
    from qmpbackup.service import targets
    from qmpbackup.targets.repository.target import RepositoryTarget

    with targets.repository(place) as repository:
        yield RepositoryTarget(repository, vm.vm.config.identity)


def _remove_rubbish(vm: Session, stored: Stored, target_id: str) -> list[str]:
    done = []
    for disk in vm.vm.disks:
        for name in rubbish(disk, stored.points, target_id):
            vm.monitor.execute(commands.bitmap_remove(disk.format_node, name))
            done.append(f"removed bitmap {name} of disk {disk.id}")
    return done
