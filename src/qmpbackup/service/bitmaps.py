# SPDX-License-Identifier: Apache-2.0
"""Removing change bitmaps from a VM on request. Only ours: those of other tools stay."""

from qmpbackup import interrupt
from qmpbackup.plan import commands
from qmpbackup.plan.names import parse_bitmap
from qmpbackup.service import session


def remove_bitmaps(address: str, uuid: str | None = None, lock_wait: float = 0.0) -> list[str]:
    """Remove our bitmaps from all disks, or those of the target named `uuid`; return their names.

    The next backup into a target whose bitmaps are gone is a full.

    Raises:
        VmError: the VM cannot be reached, or a bitmap is in use.
    """
    removed: list[str] = []
    with interrupt.held(), session.opened(address, lock_wait=lock_wait, recover=True) as vm:
        for disk in vm.vm.disks:
            for bitmap in disk.bitmaps:
                name = parse_bitmap(bitmap.name)
                if name is None or uuid not in {None, name.target}:
                    continue
                vm.monitor.execute(commands.bitmap_remove(disk.format_node, bitmap.name))
                removed.append(bitmap.name)
    return removed
