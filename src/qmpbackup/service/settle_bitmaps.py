# SPDX-License-Identifier: Apache-2.0
"""Change bitmaps of a point on the disks restored from it, so that the next backup is an incremental.

    the disk is what the point holds ─ its bitmap starts in the file ─ QEMU marks in it all that it writes

A disk that has just been restored equals its point, and nothing writes to it before it is noted as
`restored`. Until then, and only then, the change bitmap that the point has named can be started anew:
what QEMU commits into the disk and what the guest writes later is marked, as the file is never written
but by programs that load it with its bitmaps. Killed on the way, a bitmap that was in use is
inconsistent (qcow2 says so), and the next backup is a full.
"""

import json
import logging
import os
from pathlib import Path

from qmpbackup.errors import QmpBackupError, StorageError
from qmpbackup.images import layers
from qmpbackup.process import run
from qmpbackup.service.boot_folder import Boot, BootedDisk, BootFolder

log = logging.getLogger(__name__)

_LEDGER = "end"
_SECTOR = 512


def start_bitmaps(folder: BootFolder, boot: Boot) -> None:
    """Start the bitmaps of those disks that have them; where that fails, the next backup is a full."""
    for disk in boot.disks:
        if not disk.bitmap or not disk.end_mark:
            continue
        try:
            _start(folder.base(disk), disk)
        except QmpBackupError as error:
            log.warning("The next backup of disk %s will be a full: %s", disk.id, error.message)


def _start(base: Path, disk: BootedDisk) -> None:
    """Add the change bitmap and its end mark (see `plan.levels`) to a disk."""
    there = _bitmaps(base)
    if disk.end_mark not in there:
        _add_end_mark(base, disk)
    if disk.bitmap not in there:
        _tool("qemu-img", "bitmap", "--add", "-f", "qcow2", str(base), disk.bitmap)


def _add_end_mark(base: Path, disk: BootedDisk) -> None:
    """A disabled bitmap in which the end of the disk is marked: QEMU marks it in an image that is as long,
    and copies the mark. That image lies in memory, where nobody waits for it to be durable."""
    ledger = os.memfd_create("qmpbackup-ledger", os.MFD_CLOEXEC)
    try:
        path = layers.path(ledger)
        _tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(disk.size), given=ledger)
        _tool("qemu-img", "bitmap", "--add", "-f", "qcow2", path, _LEDGER, given=ledger)
        at = (disk.size - 1) // _SECTOR * _SECTOR
        write = f"write -q -z {at} {_SECTOR}"
        _tool("qemu-io", "-f", "qcow2", "-c", write, path, given=ledger)
        _tool(
            *("qemu-img", "bitmap", "--add", "--disable", "--merge", _LEDGER, "-f", "qcow2"),
            *("-b", path, "-F", "qcow2", str(base), disk.end_mark),
            given=ledger,
        )
    finally:
        os.close(ledger)


def _bitmaps(image: Path) -> set[str]:
    said = _tool("qemu-img", "info", "-f", "qcow2", "--output", "json", str(image))
    try:
        specific = json.loads(said)["format-specific"]["data"]
        return {str(each["name"]) for each in specific.get("bitmaps", ())}
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"What qemu-img says of {image} is not understood: {error}.") from error


def _tool(*command: str, given: int | None = None) -> bytes:
    """Run a program, with an open file that its command names."""
    done = run(command, pass_fds=() if given is None else (given,))
    if done.code:
        raise StorageError(f"{command[0]} failed: {done.reason}.")
    return done.output
