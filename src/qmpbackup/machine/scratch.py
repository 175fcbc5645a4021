# SPDX-License-Identifier: Apache-2.0
"""Scratch images: files without a name that keep what the guest overwrites while we copy.

Where QEMU takes descriptors, the file never has a name (open(2), O_TMPFILE), so nothing of it can be
left behind, whoever dies. Else it has a name with our prefix and goes with the teardown.
"""

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import StorageError, lack_of
from qmpbackup.machine.beside import is_image_folder
from qmpbackup.model import Disk
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import RUN_PREFIX
from qmpbackup.plan.sizes import human
from qmpbackup.undo import UndoStack

log = logging.getLogger(__name__)

FALLBACK = Path("/var/tmp")  # noqa: S108 - the place for large temporary files (FHS 5.15)

_PATIENCE = 2.0
"""Seconds after which a write that has not come back is called hanging."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A file of ours for a disk: its open descriptor, and its path, which may have no name any more."""

    seat: Seat
    fd: int
    path: Path


def folder_for(disk: Disk, chosen: Path | None, pid: int | None) -> Path:
    """Where the scratch of a disk goes: as chosen, else beside the disk, else `/var/tmp`.

    `pid` is QEMU's process, as far as it is known (`Monitor.peer_pid`).
    """
    if chosen is not None:
        return chosen
    image = Path(disk.filename)
    with suppress(OSError, ValueError):  # QEMU may see folders that we may not look into
        if is_image_folder(image, pid) and os.access(image.parent, os.W_OK):
            return image.parent
    return FALLBACK


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write there."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def create(seat: Seat, folder: Path, name: str, *, named: bool, undo: UndoStack) -> Scratch:
    """Make a sparse scratch file as long as the disk.

    Raises:
        StorageError: no folder, no right, or no room there.
    """
    path = folder / f".{name}"
    try:
        fd = _open_named(path) if named else _open_nameless(folder, path)
        undo.push(f"close scratch {path}", lambda: os.close(fd))
        if named:
            undo.push(f"remove scratch {path}", lambda: path.unlink(missing_ok=True))
        os.ftruncate(fd, seat.disk.size)
    except OSError as error:
        raise _failure(folder, seat.disk.size, error) from error
    return Scratch(seat, fd, path)


def require_possible(folder: Path, size: int) -> None:
    """Make sure that there can be a scratch of `size` bytes, by making one that vanishes at once.

    Raises:
        StorageError: there cannot.
    """
    try:
        fd = _open_nameless(folder, folder / f".{RUN_PREFIX}probe-{os.getpid()}")
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise _failure(folder, size, error) from error


def _failure(folder: Path, size: int, error: OSError) -> StorageError:
    lacking = lack_of(error)
    if lacking is not None:
        raise lacking from error
    if error.errno == errno.EFBIG:
        return StorageError(
            f"The file system of {folder} has no files of {human(size)}, which the scratch of so large "
            "a disk would be, though next to empty.",
            "Choose a folder on XFS, Btrfs or tmpfs with --scratch DIR; ext4 ends at 16 TiB.",
        )
    return StorageError(
        f"Cannot make a scratch image in {folder}: {error.strerror or error}.",
        "Choose a folder on local storage with --scratch DIR.",
    )


def await_answer(fd: int, path: Path) -> None:
    """Return once the storage of a scratch takes writes again, or refuses them.

    Removing a view whose scratch hangs makes QEMU wait for that scratch with its main loop, and so
    with the guest (seen with 7.2). The view itself does no harm for as long: it is broken, and guest
    writes pass it by. What is asked for here changes nothing, and waits where writes wait.

    Raises:
        Interrupted: a signal came first.
    """
    import threading

    def change() -> None:
        with suppress(OSError):
            os.fchmod(fd, 0o600)

    writer = threading.Thread(target=change, name="scratch", daemon=True)
    writer.start()
    writer.join(_PATIENCE)
    if writer.is_alive():
        log.warning("The storage of the scratch %s hangs; the views stay until it answers.", path)
    while writer.is_alive():
        interrupt.check()
        writer.join(_PATIENCE)


def empty(fd: int) -> None:
    """Give the room back, once QEMU has closed the file: it keeps descriptors for as long as the VM
    does not run. Never before: an image that is cut off while it is open is ejected, and QEMU then
    refuses to list its nodes (seen with 7.2).
    """
    os.ftruncate(fd, 0)


def _open_nameless(folder: Path, path: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        # Not every file system has O_TMPFILE (NFS, some FUSE); there the name goes at once instead.
        fd = _open_named(path)
        with suppress(OSError):
            path.unlink()
        return fd


def _open_named(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
