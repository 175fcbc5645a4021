# SPDX-License-Identifier: Apache-2.0
"""Where restored disks may go: all places are looked at before anything is written to one.

    --output FOLDER     a new file for each disk; a regular file of before only with --force
    --output-file FILE  likewise, or a block device, also by a link of root's or our own to one

No other link is followed or replaced, nor anything special, with `--force` neither: whoever may put a
name into a folder would choose else what we write to. Knows paths; must not know how they are filled.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import StorageError, UsageError
from qmpbackup.images import qemu_img
from qmpbackup.model import StoredDisk
from qmpbackup.ownership import refuse_planted_links
from qmpbackup.service.restore.request import Request
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Target
from qmpbackup.targets.names import folder_name

_ANOTHER = "Choose another place."


@dataclass(frozen=True, slots=True)
class Output:
    """Where a disk goes: a file that is to be, or a block device that is there.

    `path` is what was asked for, `real` where it really is.
    """

    path: Path
    real: Path
    is_device: bool = False


def outputs(target: Target, request: Request, disks: Sequence[StoredDisk]) -> tuple[Output, ...]:
    """Where disks go; nothing is there that would be harmed, and all can be written to.

    Raises:
        UsageError: something is there, or the place is one where only backups go.
        StorageError: a place cannot be written to.
    """
    folder = _path(request, disks[0]).parent
    with storage_errors(f"look at {folder}"):
        refuse_planted_links(folder)
    found = tuple(_look(request, disk) for disk in disks)
    for each in found:
        _refuse_harm(target, each.real)
    for folder in {each.real.parent for each in found if not each.is_device}:
        _require_writable(folder)
    return found


def _look(request: Request, disk: StoredDisk) -> Output:
    path = _path(request, disk)
    with storage_errors(f"look at {path}"):
        try:
            state = path.lstat()
        except FileNotFoundError:
            return Output(path, path)
        if stat.S_ISLNK(state.st_mode):
            return _through_link(request, path, state)
    if stat.S_ISBLK(state.st_mode):
        if request.file is None:
            raise UsageError(f"{path} is a block device.", "Only --output-file writes to one.")
        return Output(path, path, is_device=True)
    require_replaceable(path, state.st_mode, force=request.force)
    return Output(path, path)


def _path(request: Request, disk: StoredDisk) -> Path:
    if request.folder is not None:
        return request.folder / f"{folder_name(disk.id)}.{request.file_format}"
    if request.file is None:
        raise ValueError("a restore needs a folder or a file to go to")
    return request.file


def _through_link(request: Request, path: Path, link: os.stat_result) -> Output:
    """Volumes have links for names, which root makes: `/dev/vg/lv`, `/dev/disk/by-id/…`."""
    try:
        leads_to_device = stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        leads_to_device = False
    ours = link.st_uid in {0, os.geteuid()}
    if request.file is not None and leads_to_device and ours:
        return Output(path, path.resolve(strict=True), is_device=True)
    raise UsageError(
        f"{path} is a link, which a restore neither follows nor replaces.",
        "Name the place itself, or remove the link.",
    )


def require_replaceable(path: Path, mode: int, *, force: bool) -> None:
    """Refuse to put a file where something of this mode is.

    Raises:
        UsageError: it is no regular file, or none that may be replaced.
    """
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder.", "Use --output for folders.")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is neither a file nor a block device.", _ANOTHER)
    if not force:
        raise UsageError(f"{path} exists already.", "Choose another place, or use --force.")


def _refuse_harm(target: Target, path: Path) -> None:
    """What `--force` does not mean either: a place in the backup itself, an image in use."""
    where = path.parent.resolve()
    above = (where, *where.parents)
    if opening.is_inside_repository(above):
        raise UsageError(f"{path} lies in a restic repository, where only backups go.", _ANOTHER)
    if target.folder in above:
        raise UsageError(f"{path} lies in the target itself, where only backups go.", _ANOTHER)
    if qemu_img.in_use(path):
        raise UsageError(
            f"{path} is in use, most likely by a VM that runs.",
            "Shut that VM down first, or choose another place.",
        )


def _require_writable(folder: Path) -> None:
    """Refuse early what could only fail: making files in a folder, or the folder in the one above."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if os.access(there, os.W_OK | os.X_OK, effective_ids=True) or not there.is_dir():
        return  # what is no folder is told where it is opened
    with storage_errors(f"look at {there}"):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    why = "Read-only file system" if read_only else "Permission denied"
    raise StorageError(f"Cannot write to {there}: {why}.", _ANOTHER)
