# SPDX-License-Identifier: Apache-2.0
"""The one recipe by which a file becomes durable, and the translation of its failures.

Knows descriptors and names; must not know what is in the files. A file counts once its bytes, its
name and the folder's entry are on stable storage: write under a temporary name, fsync, rename,
fsync the folder. Folders are passed as descriptors, so that nobody can move them under us.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qmpbackup.errors import Exhausted, StorageError, Unreachable, lack_of

TEMPORARY = ".tmp"
"""What a name ends with while its file is being written."""

_MOST_PARTS = 512
"""Parts that are written at once; writev(2) takes 1024."""

_AWAY = "See that it is mounted and whole, and run again."

HINTS = {
    errno.ENOENT: "See that it is still there: mounted, and under this name.",
    errno.ESTALE: _AWAY,
    errno.ENOTCONN: _AWAY,  # a FUSE file system whose program has ended
    errno.ENODEV: _AWAY,
    errno.ENXIO: _AWAY,
    errno.ESHUTDOWN: _AWAY,  # XFS and ext4 that were shut down
    errno.ETIMEDOUT: "See that its server can be reached.",
    errno.EHOSTDOWN: "See that its server can be reached.",
    errno.EHOSTUNREACH: "See that its server can be reached.",
    errno.ENETUNREACH: "See that its server can be reached.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "Something on the path is a link that leads nowhere.",
    errno.EBUSY: "End what uses it, and run again.",
    errno.ENOSPC: "Make room there, and run again.",
    errno.EDQUOT: "Make room there or raise the quota, and run again.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.EACCES: "Run as a user who may, or change the permissions.",
    errno.EPERM: "Run as a user who may, or change the permissions.",
    errno.ENOTDIR: "Something on the path is a file, not a folder.",
    errno.EIO: "Look at the storage itself: the kernel's log says more.",
}

_ABSENT = frozenset(
    {
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ENODEV,
        errno.ENXIO,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)
"""What is said of something that is away, and whole where it is."""


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a sentence: "Cannot <action>: <why>.".

    Raises:
        StorageError: in the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(action, error) from error


def storage_error(action: str, error: OSError) -> StorageError:
    """The error for a failed action on storage, with what to do about it.

    Raises:
        Exhausted: it is not the storage that failed.
    """
    why = error.strerror or str(error)
    lacking = lack_of(error)
    if lacking is not None:
        raise Exhausted(f"Cannot {action}: {why}.", lacking.hint) from error
    kind = Unreachable if is_absence(error) else StorageError
    return kind(f"Cannot {action}: {why}.", HINTS.get(error.errno or 0, ""))


def is_absence(error: BaseException) -> bool:
    """Whether an error says that something is away, in place of what is wrong with it: a disk that was
    taken out, a server that does not answer."""
    if isinstance(error, ConnectionRefusedError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _ABSENT


def sync_folder(fd: int) -> None:
    """Make the entries of an open folder durable.

    Some network and FUSE file systems know no fsync of folders and say EINVAL; their entries are
    as durable as their server makes them.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise


def make_folders(path: Path) -> None:
    """Make a folder, and those above it that are missing; nobody else may write into them, whatever the
    umask.

    Raises:
        OSError: it could not be made, or something else is there.
    """
    for each in reversed(path.parents):
        if not each.exists():
            each.mkdir(mode=0o755, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)


def write_all(fd: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """Write parts one after the other into an open file, all of them: the kernel may take fewer bytes.

    Raises:
        OSError: not all could be written.
    """
    waiting = [memoryview(part) for part in parts if len(part)]
    while waiting:
        written = os.writev(fd, waiting[:_MOST_PARTS])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = waiting[0][written:]


@contextmanager
def syncing(fd: int) -> Iterator[None]:
    """Make an open file durable while the block reads it, which costs less than one after the other.

    Raises:
        OSError: it could not be made durable.
    """
    import threading

    failures: list[OSError] = []

    def sync() -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=sync, name="fsync")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def write_file(folder: int, name: str, data: bytes, *, mode: int = 0o600) -> None:
    """Put a file with these contents into an open folder, durably, replacing any other.

    Raises:
        OSError: nothing of the new file is left, unless the very last step (the fsync of the
            folder) failed; then the file is there and may vanish in a crash.
    """
    temporary = name + TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=folder)
    try:
        _write_new(folder, temporary, data, mode)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    sync_folder(folder)


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """The same, by a path.

    Raises:
        OSError: as `write_file`, or its folder is not there.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_file(folder, path.name, data, mode=mode)
    finally:
        os.close(folder)


def _write_new(folder: int, name: str, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.fchmod(fd, mode)
        write_all(fd, [data])
        os.fsync(fd)
    finally:
        os.close(fd)
