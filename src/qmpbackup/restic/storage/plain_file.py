# SPDX-License-Identifier: Apache-2.0
"""A file of a repository in an open folder of this machine: looked at, read, written.

A file is written without a name, made durable, given its name, and its folder made durable: so a name
is there with all its bytes or not at all, and a process that dies leaves nothing. Where the file system
knows no files without a name (open(2), O_TMPFILE), it is written under a temporary one and renamed, as
restic does; such names are no names of files, so listings do not show what a run that died has left.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qmpbackup.durable import sync_folder, write_all
from qmpbackup.restic.storage.interface import Buffer, Strange

_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.EPERM})
"""How file systems and old kernels say that there are no files without a name."""


def is_there(path: Path, folder: int) -> bool:
    try:
        plain(path, folder)
    except FileNotFoundError:
        return False
    return True


def plain(path: Path, folder: int) -> os.stat_result:
    """The state of a plain file.

    Raises:
        Strange: it is none.
    """
    state = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISREG(state.st_mode):
        raise strange(path)
    return state


def strange(path: Path) -> Strange:
    return Strange(f"{path} is not a plain file (a link, a pipe, a device).", "Remove it.")


@contextmanager
def opened(path: Path, folder: int) -> Iterator[int]:
    """A plain file, open for reading while the block runs."""
    plain(path, folder)  # first, as the mere opening of a device or a pipe can have an effect
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path.name, flags, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise strange(path)
        yield fd
    finally:
        os.close(fd)


def write(path: Path, folder: int, parts: Sequence[Buffer]) -> None:
    if not _write_nameless(path, folder, parts):
        _write_renamed(path, folder, parts)
    sync_folder(folder)


def _write_nameless(path: Path, folder: int, parts: Sequence[Buffer]) -> bool:
    """Write a file that has no name before it is durable; false where that cannot be done."""
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return False
        raise
    try:
        write_all(fd, parts)
        os.fsync(fd)
        return _named(fd, path, folder)
    finally:
        os.close(fd)


def _named(fd: int, path: Path, folder: int) -> bool:
    """Give a file without a name one; false where a file cannot come to its name like this.

    There may be no /proc, or a policy may forbid links alone.
    """
    try:
        # A folder's descriptor has Python call linkat(2), which follows.
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder)
    except FileExistsError:
        return is_there(path, folder)
    except OSError:
        return False
    return True


def _write_renamed(path: Path, folder: int, parts: Sequence[Buffer]) -> None:
    temporary = f"{path.name}-tmp-{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        try:
            write_all(fd, parts)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def read(fd: int, offset: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length > 0 and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
