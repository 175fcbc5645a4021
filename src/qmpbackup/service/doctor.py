# SPDX-License-Identifier: Apache-2.0
"""Look at everything a backup needs, change nothing, and say what to do about what is not well."""

import re
from collections.abc import Generator, Iterator
from pathlib import Path

from qmpbackup.errors import QmpBackupError, StorageError
from qmpbackup.machine import push, scratch, starved
from qmpbackup.machine.inventory import Leftovers
from qmpbackup.model import Absence, Bitmap, Disk, Skipped, Vm
from qmpbackup.plan.clones import TODO, others_with_uuid
from qmpbackup.plan.finding import Finding, Health
from qmpbackup.plan.levels import (
    SMALL,
    bitmap_obstacle,
    is_end_mark,
    last_point,
    obstacle_in_vm,
)
from qmpbackup.plan.names import parse_bitmap
from qmpbackup.plan.sizes import human
from qmpbackup.plan.vm_states import OBSTACLES
from qmpbackup.service import room_findings, session
from qmpbackup.service.backup import rooms
from qmpbackup.service.backup.destination import require_new
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Found
from qmpbackup.targets.inventory import Inventory

__all__ = ["Finding", "Health", "examine"]

FIRST_WITHOUT_EXPORT_BUG = (8, 2)

_ADVISED_FREE = 64 * 1024 * 1024
"""Bytes for a scratch below which it is said that a busy guest may need more."""


def examine(
    address: str,
    agent_address: str = "",
    target: Address | None = None,
    scratch_dir: Path | None = None,
    lock_wait: float = 0.0,
    host: str = "",
) -> Iterator[Finding]:
    """Findings one by one, from the VM outwards.

    Raises:
        VmError: the VM cannot be reached at all, or its QEMU is too old.
        Locked: a run had the VM for all of `lock_wait` seconds.
    """
    with session.opened(address, lock_wait=lock_wait, look_only=True, host=host) as opened:
        vm, leftovers = opened.vm, opened.found.leftovers
        dirty, died = opened.found.needs_recovery, opened.found.run_died
        pid = opened.monitor.peer_pid
        hungry = starved.find(opened.monitor) if vm.status == starved.STOPPED else None
        files = rooms.files_of(opened.monitor, vm.disks)
    yield from _qemu(vm)
    if hungry:
        yield room_findings.of_hungry(hungry, leftovers)
    if died:
        yield _left_behind(leftovers)
    elif dirty:
        text = "QEMU shows descriptors of runs that ended while the VM stood still"
        yield Finding("leftovers", Health.FINE, f"{text}; the next backup takes them back")
    for disk in vm.disks:
        yield from _disk(disk)
        yield from _scratch(disk, scratch.folder_for(disk, scratch_dir, pid))
    for skipped in vm.skipped:
        yield _skipped(skipped)
    yield _agent(agent_address)
    if target is not None:
        yield from _target(vm, files, target, scratch_dir, lock_wait, strict=not host)


def _target(
    vm: Vm,
    files: rooms.Files,
    target: Address,
    scratch_dir: Path | None,
    lock_wait: float,
    *,
    strict: bool,
) -> Iterator[Finding]:
    """Whether a target is well, and what the next backup into it will be."""
    entrance = opening.entrance(target)
    if entrance.chunk:
        yield from _reading(vm)
    found = yield from entrance.advice(vm.config.identity, lock_wait, strict=strict)
    if found is not None and (yield from _is_where_it_was(found, vm)):
        ground, stored = found.ground, found.stored
        if clones := others_with_uuid(stored.points, vm.config.identity):
            yield Finding("UUID", Health.PROBLEM, f"in {ground.name}, {clones}", TODO)
        yield from _next_backup(vm, stored, ground.name)
        yield from room_findings.of_next_backup(vm, files, ground, stored, scratch_dir)


def _is_where_it_was(found: Found, vm: Vm) -> Generator[Finding, None, bool]:
    """Whether the target is there, or was never; only then anything else can be said of it."""
    try:
        require_new(found, vm)
    except StorageError as error:
        yield Finding("target", Health.PROBLEM, error.message, error.hint)
        return False
    if found.earlier:
        text = f"{found.ground.name} holds no points yet; the first run makes it"
        yield Finding("target", Health.FINE, text)
    return True


def _reading(vm: Vm) -> Iterator[Finding]:
    from qmpbackup.machine.pull import Method, method

    if method(vm) is Method.STAGED:
        yield Finding(
            "reading",
            Health.ADVICE,
            "this QEMU with iothreads cannot be read over NBD safely; what changed is copied to the "
            "scratch's folder first",
            "QEMU 9.0 or later is read directly.",
        )


def _qemu(vm: Vm) -> Iterator[Finding]:
    yield Finding("QEMU", Health.FINE, f"version {vm.config.qemu_version}, VM is {vm.status}")
    obstacle = OBSTACLES.get(vm.status)
    if obstacle is not None:
        yield Finding("VM", Health.PROBLEM, obstacle.reason, obstacle.todo)
    if vm.version[:2] < push.FIRST_RIGHT_SNAPSHOT_ACCESS:
        yield Finding(
            "QEMU",
            Health.ADVICE,
            "before 8.0, views return wrong data to large reads; they are read in small pieces",
            "Backups are right, only slower; QEMU 8.0 or later copies faster.",
        )
    if vm.has_iothreads and vm.version[:2] < FIRST_WITHOUT_EXPORT_BUG:
        yield Finding(
            "iothreads",
            Health.ADVICE,
            "before 8.2, a QEMU with iothreads can die when an NBD client leaves",
            "Backups into a folder use no NBD and are safe.",
        )


def _left_behind(leftovers: Leftovers) -> Finding:
    names = (*leftovers.nodes, *leftovers.jobs, *leftovers.markers)
    return Finding(
        "leftovers",
        Health.PROBLEM,
        f"a run that died left {', '.join(names) or 'descriptors or bitmaps'} in the VM",
        "The next backup removes them by itself.",
    )


def _skipped(skipped: Skipped) -> Finding:
    if skipped.absence is not Absence.IMPOSSIBLE:
        return Finding(skipped.name, Health.FINE, f"skipped: {skipped.reason}")
    return Finding(
        skipped.name,
        Health.ADVICE,
        f"in no backup: {skipped.reason}",
        "Save what it holds by other means, and say that it is known, as each backup ends with 3 else: "
        f"`backup --exclude {skipped.name}`.",
    )


_NETWORK = re.compile(
    r"(?:nbd|rbd|iscsi|ssh|gluster|nfs|https?|sheepdog)(?:\+\w+)?:|json:.*\"driver\": "
    r"\"(?:nbd|rbd|iscsi|ssh|gluster|nfs|https?)\""
)
"""How QEMU names an image that it reaches over a network itself."""


def is_reached_over_a_network(filename: str) -> bool:
    """Whether an image lies behind a server that may have other clients, of which QEMU knows nothing."""
    return _NETWORK.match(filename) is not None


def _network(disk: Disk) -> Iterator[Finding]:
    if is_reached_over_a_network(disk.filename):
        yield Finding(
            disk.id,
            Health.ADVICE,
            "on a server; whether other clients write there, nobody here can tell",
            "If any do, use --level full: their writes are in no change bitmap.",
        )


def _disk(disk: Disk) -> Iterator[Finding]:
    yield from _network(disk)
    label = f"libvirt's {disk.label}, " if disk.label else ""
    shown = f"{label}{disk.format}, {human(disk.size)}, {disk.filename}"
    if disk.size <= SMALL:
        yield Finding(disk.id, Health.FINE, f"{shown}; small, copied whole each time")
    elif disk.other_writers:
        yield Finding(
            disk.id,
            Health.ADVICE,
            f"{shown}; a full each time: {disk.other_writers}, and no change bitmap sees that",
            "What others write while a backup copies may be in the point, too. Give the disk to this VM "
            "alone, or stop the others for the backup.",
        )
    elif disk.can_persist:
        yield Finding(disk.id, Health.FINE, f"{shown}; incremental, also after a restart of the VM")
    else:
        yield Finding(
            disk.id,
            Health.ADVICE,
            f"{shown}; incremental until QEMU restarts, then one full",
            "Only qcow2 of version 3 keeps bitmaps: `qemu-img amend -o compat=1.1`, or qcow2 with an "
            "external data file for raw disks and volumes.",
        )
    if disk.encrypted:
        yield Finding(
            disk.id,
            Health.ADVICE,
            "encrypted by QEMU; points hold what the guest sees, in plain text",
            "Keep the target on encrypted storage.",
        )
    if disk.snapshots:
        yield Finding(
            disk.id,
            Health.ADVICE,
            f"its image has internal snapshots ({', '.join(disk.snapshots)}); QEMU loads none while "
            "change bitmaps of ours are in the VM, and leaves the VM stopped when it refuses",
            "Before `loadvm` or `snapshot-load`: `qmpbackup … cleanup --remove-bitmaps`; the next "
            "backup is then a full.",
        )
    for bitmap in disk.bitmaps:
        yield from _bitmap(disk, bitmap)


def _bitmap(disk: Disk, bitmap: Bitmap) -> Iterator[Finding]:
    if parse_bitmap(bitmap.name) is None:
        yield Finding(disk.id, Health.FINE, f"bitmap {bitmap.name} is another tool's; it stays")
    elif is_end_mark(bitmap.name) and not bitmap.inconsistent:
        text = "was shrunk, the next backup is a full" if bitmap.count == 0 else "was not shrunk"
        yield Finding(disk.id, Health.FINE, f"end mark {bitmap.name}: the disk {text}")
    elif bitmap_obstacle(disk, bitmap.name):
        yield Finding(
            disk.id,
            Health.ADVICE,
            f"bitmap {bitmap.name}: {bitmap_obstacle(disk, bitmap.name)}",
            "`--level auto` makes a full of this disk and removes the bitmap.",
        )
    else:
        text = f"bitmap {bitmap.name} is well, {human(bitmap.count)} changed"
        yield Finding(disk.id, Health.FINE, text)


def _scratch(disk: Disk, folder: Path) -> Iterator[Finding]:
    try:
        scratch.require_possible(folder, disk.size)
        free = scratch.free_bytes(folder)
    except StorageError as error:
        yield Finding(disk.id, Health.PROBLEM, error.message, error.hint)
        return
    if free < min(disk.size, max(_ADVISED_FREE, disk.size // 10)):
        yield Finding(
            disk.id,
            Health.ADVICE,
            f"only {human(free)} free for scratch in {folder}",
            "A guest that overwrites more than that during a backup makes it fail (the guest is not "
            "harmed): make room, or choose another folder with --scratch DIR.",
        )


def _agent(address: str) -> Finding:
    if not address:
        return Finding(
            "guest agent",
            Health.ADVICE,
            "not asked, as no --agent-socket was given",
            "With it, --quiesce makes points that need no file system repair.",
        )
    from qmpbackup.machine.agent import Agent

    try:
        agent = Agent.connect(address)
        try:
            frozen = agent.frozen()
        finally:
            agent.close()
    except QmpBackupError as error:
        return Finding("guest agent", Health.PROBLEM, error.message, error.hint)
    if frozen:
        return Finding(
            "guest agent",
            Health.PROBLEM,
            "the guest's file systems are frozen right now",
            "Find out who froze them, or thaw them: guest-fsfreeze-thaw.",
        )
    return Finding("guest agent", Health.FINE, "answers, file systems are not frozen")


def _next_backup(vm: Vm, stored: Inventory, place: str) -> Iterator[Finding]:
    """Disks of which the next backup cannot be an incremental."""
    for disk in vm.disks:
        base = last_point(stored.points, disk.id)
        stored_base = base.disk(disk.id) if base else None
        if disk.size > SMALL and base and stored_base and not disk.other_writers:
            same = base.vm.process == vm.config.process != ""
            obstacle = obstacle_in_vm(disk, stored_base, same)
            if obstacle:
                yield Finding(
                    disk.id,
                    Health.ADVICE,
                    f"the next backup into {place} is a full: {obstacle}",
                    "Nothing to do; `--level auto` sees to it.",
                )
