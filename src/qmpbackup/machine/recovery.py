# SPDX-License-Identifier: Apache-2.0
"""Cleaning up inside QEMU what a run of ours left when it died.

Everything of a run carries its prefix, so this needs no record. The order is that of a teardown:
let the VM run again, jobs, exports, views, devices back to their nodes, nodes from the top down,
descriptor sets, temporary bitmaps, a VM that found no room, markers. Change bitmaps are none of its
business: which of them are rubbish only the manifests of a target can say.
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qmpbackup.errors import CommandError, StorageError
from qmpbackup.machine import inventory as inventories
from qmpbackup.machine import jobs, nbd_server, overlays, starved
from qmpbackup.machine.inventory import FoundVm
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import objects
from qmpbackup.model import Disk, Vm
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import FROZEN_MARKER, RUN_PREFIX, STOPPED_MARKER

_RUN = re.compile(re.escape(RUN_PREFIX) + r"[0-9a-f]+-")
_VIEW = re.compile(re.escape(RUN_PREFIX) + r"[0-9a-f]+-snap[0-9]+")
_FILE = re.compile(rf"({re.escape(RUN_PREFIX)}[0-9a-f]+-)(file|fleece|scratch)([0-9]+)")
"""Nodes that are plain files, unless it is a scratch above a `fleece`."""


def recover(monitor: Monitor, inventory: FoundVm) -> list[str]:
    """Clean up; return one sentence for each thing done.

    Raises:
        VmError: something of ours could not be removed.
        StorageError: the VM stands still for want of room where the run had taken some.
    """
    return list(_steps(monitor, inventory))


def _steps(monitor: Monitor, inventory: FoundVm) -> Iterator[str]:
    left = inventory.leftovers
    yield from _continue(monitor, inventory.vm, left.markers)
    if left.jobs:
        jobs.sweep(monitor, left.jobs)
        yield from (f"ended job {job}" for job in left.jobs)
    nbd_server.end_exports(monitor, left.exports)
    yield from (f"ended export {export}" for export in left.exports)
    yield from nbd_server.recover(monitor, left.markers)
    # A view above its filter keeps the device from going back below the filter, so views go first.
    views = [node for node in left.nodes if _VIEW.fullmatch(node)]
    yield from _remove_nodes(monitor, views)
    for disk in inventory.vm.disks:
        yield from _reattach(monitor, disk)
    scratches = _named_scratches(monitor) if left.nodes else []
    if left.nodes:
        yield from overlays.release(monitor, lambda node: node.startswith(RUN_PREFIX))
    files = list(_files(left.nodes))
    others = [node for node in left.nodes if node not in {*views, *files}]
    yield from _remove_nodes(monitor, others)
    _empty(monitor, files)
    yield from _remove_nodes(monitor, files)
    yield from _remove_files(scratches)
    for number in _descriptor_sets(monitor) if inventory.run_died else left.descriptor_sets:
        monitor.execute(Command("remove-fd", {"fdset-id": number}))
        yield f"took back descriptor set {number}"
    for disk in inventory.vm.disks:
        for name in _temporary(disk):
            monitor.execute(commands.bitmap_remove(disk.format_node, name))
            yield f"removed temporary bitmap {name}"
    yield from _feed(monitor, left.markers)
    # The marker of a freeze stays until somebody with the agent's socket has seen to the guest.
    for marker in left.markers:
        if marker != FROZEN_MARKER:
            monitor.execute(Command("object-del", {"id": marker}))
            yield f"removed marker {marker}"


def _continue(monitor: Monitor, vm: Vm, markers: Iterable[str]) -> Iterator[str]:
    if STOPPED_MARKER in markers and vm.status == "paused":
        monitor.execute(Command("cont"))
        yield "let the VM run again, which a run that died had stopped"


def _descriptor_sets(monitor: Monitor) -> list[int]:
    """All of ours, also those of a VM that stands still, which alone do not tell of a run that died."""
    return list(inventories.descriptor_sets(monitor.execute(Command("query-fdsets"))))


def _feed(monitor: Monitor, markers: Iterable[str]) -> Iterator[str]:
    """Let a VM run again that had stopped for want of the room which is free now.

    Raises:
        StorageError: there is still none. The mark stays, so that a later recovery can do it.
    """
    devices = starved.devices_of(markers)
    found = starved.feed(monitor, devices) if devices else None
    if found is not None and not found.runs:
        raise StorageError(f"Over a run that died, {found}.", starved.advice(found))
    if found is not None:
        yield f"let the VM run again, whose disk {', '.join(found.disks)} had found no room"


def _files(nodes: Collection[str]) -> Iterator[str]:
    for match in filter(None, map(_FILE.fullmatch, nodes)):
        run, what, number = match.groups()
        if what != "scratch" or f"{run}fleece{number}" not in nodes:
            yield match[0]


def _empty(monitor: Monitor, files: Iterable[str]) -> None:
    """Give the room of files back at once, over QEMU, which alone has them open: QEMU 7.x keeps
    descriptors for as long as the VM stands still, and it may stand still for want of that room. Files
    of a point that counts are closed before it does.
    """
    for node in files:
        with suppress(CommandError):
            monitor.execute(Command("block_resize", {"node-name": node, "size": 0}))


def _reattach(monitor: Monitor, disk: Disk) -> Iterator[str]:
    """Put a device that sits on a filter of ours back on what is below it."""
    if disk.node.startswith(RUN_PREFIX):
        monitor.execute(commands.attach(disk.qom_path, disk.below_ours))
        yield f"put disk {disk.id} back on {disk.below_ours}"


def _remove_nodes(monitor: Monitor, nodes: Iterable[str]) -> Iterator[str]:
    """Remove nodes, users before what they use: as many rounds as the graph is deep."""
    left = list(nodes)
    while left:
        refused: list[tuple[str, CommandError]] = []
        for node in left:
            try:
                monitor.execute(commands.blockdev_del(node))
                yield f"removed node {node}"
            except CommandError as error:
                refused.append((node, error))
        if len(refused) == len(left):
            raise refused[0][1]
        left = [node for node, _ in refused]


def _named_scratches(monitor: Monitor) -> list[Path]:
    """Scratch files that have a name, as they do over TCP; it begins like that of their node."""
    nodes = monitor.execute(Command("query-named-block-nodes", {"flat": True}))
    files = {
        node.text("node-name"): Path(node.text("file", ""))
        for node in objects(nodes, "query-named-block-nodes")
    }
    return sorted(
        {
            file
            for name, file in files.items()
            if (run := _RUN.match(name)) and file.name.startswith(f".{run[0]}")
        }
    )


def _remove_files(paths: Iterable[Path]) -> Iterator[str]:
    """Remove files of ours; what is not ours, or not there, as with a QEMU elsewhere, stays."""
    for path in paths:
        with suppress(OSError):
            file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                state = os.fstat(file)
                if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
                    continue
                os.ftruncate(file, 0)  # the room comes back although QEMU may keep the file open
            finally:
                os.close(file)
            path.unlink()
            yield f"removed scratch {path}"


def _temporary(disk: Disk) -> list[str]:
    return [bitmap.name for bitmap in disk.bitmaps if bitmap.name.startswith(RUN_PREFIX)]
