# SPDX-License-Identifier: Apache-2.0
"""What doctor finds about room: whether the next backup fits, and a VM that stands still for want of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.machine import starved
from qmpbackup.machine.inventory import Leftovers
from qmpbackup.model import Level, Vm
from qmpbackup.plan import room as plan_room
from qmpbackup.plan.finding import Finding, Health
from qmpbackup.plan.levels import NewPoint, plan_disks
from qmpbackup.service import room
from qmpbackup.service.backup import rooms
from qmpbackup.targets.interface import Ground
from qmpbackup.targets.inventory import Inventory


def of_hungry(hungry: starved.Starved, leftovers: Leftovers) -> Finding:
    """A VM that stands still for want of room, and whose doing that is."""
    over = starved.devices_of(leftovers.markers)
    todo = starved.advice(hungry)
    if over:
        todo = "A run that died had taken room: `qmpbackup recover` gives it back, and lets the VM run."
    return Finding("VM", Health.PROBLEM, str(hungry), todo)


@dataclass(frozen=True, slots=True)
class _Taker:
    """What the next backup takes room for."""

    ground: Ground

    @property
    def folder(self) -> Path | None:
        return self.ground.folder

    @property
    def stores_plain(self) -> bool:
        return self.ground.stores_plain

    def stages(self, vm: Vm) -> bool:
        from qmpbackup.machine.pull import Method, method

        return self.ground.chunk > 0 and method(vm) is Method.STAGED


def of_next_backup(
    vm: Vm, files: rooms.Files, ground: Ground, stored: Inventory, scratch_dir: Path | None
) -> Iterator[Finding]:
    """Whether the next backup fits beside the images of running VMs."""
    new, process = NewPoint("", "next"), vm.config.process
    plans = plan_disks(vm.disks, Level.AUTO, stored.points, lambda *_: "", new, process)
    for space, here in room.by_space(rooms.needs(files, vm, plans, _Taker(ground), scratch_dir)):
        missing = plan_room.shortage(space, here, None)
        if missing:
            yield Finding("room", Health.PROBLEM, missing, f"{rooms.HINT}.")
