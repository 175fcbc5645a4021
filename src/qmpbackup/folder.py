# SPDX-License-Identifier: Apache-2.0
"""An open folder: everything in it is reached through its descriptor, and no link is followed.

So whoever can write into a target cannot make us read, write or remove anything outside it. Knows
files and folders; must not know what a target keeps in them.
"""

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpbackup import durable
from qmpbackup.durable import storage_error
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.ownership import require_ours

_PROBE_BYTES = 4096
_ONLY_IN_ORDER = frozenset(
    {errno.ESPIPE, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
)
"""What file systems say that take only whole files, one byte after the other (seen with rclone)."""


class Folder:
    """A folder by its descriptor; a context manager that closes it.

    Methods raise `OSError` as the system does (callers say what it means), and `DamagedError` where
    something is not a plain file or folder.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open by path; the last component must be no link."""
        return cls(os.open(path, _FOLDER_FLAGS), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def sub(self, name: str, *, create: bool = False) -> "Folder":
        """Open a folder in this one; with `create`, make it (0700) where it is missing."""
        path = self.path / name
        if create:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fd)
        try:
            return Folder(os.open(name, _FOLDER_FLAGS, dir_fd=self.fd), path)
        except OSError as error:
            if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
                raise
            raise DamagedError(
                f"{path} is not a folder of its own (a link, or a file).", "Remove it."
            ) from None

    def open_file(self, name: str, *, write: bool = False) -> int:
        """Open a plain file for reading, or for writing too."""
        flags = os.O_RDWR if write else os.O_RDONLY
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._refuse_special(name)
        fd = os.open(name, flags, dir_fd=self.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._special(name)
        return fd

    def create_file(self, name: str) -> int:
        """Create a file that was not there, mode 0600, open for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def open_lock(self, name: str) -> int:
        """Open the file that a lock is on, creating it where it is missing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def require_random_access(self) -> None:
        """Make sure that files here can be written as qcow2 images are: back and forth, and read.

        Raises:
            StorageError: they cannot.
        """
        try:
            self._write_at_random()
        except OSError as error:
            if error.errno not in _ONLY_IN_ORDER:
                raise storage_error(f"write into {self.path}", error) from error
            raise StorageError(
                f"Files in {self.path} cannot be written at random, as backups are "
                f"({error.strerror}).",
                "With rclone, mount it with --vfs-cache-mode writes; or use a restic repository: "
                "--target restic:LOCATION.",
            ) from error

    def _write_at_random(self) -> None:
        name = ""
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            fd = os.open(f"/proc/self/fd/{self.fd}", flags, 0o600)
        except OSError:  # not every file system has files without a name
            name = f".probe-{secrets.token_hex(4)}{durable.TEMPORARY}"
            fd = self.create_file(name)
        try:
            try:
                # In order at first: rclone creates a file into which nothing was written only
                # after it was closed, which may be after it was removed.
                for offset in (0, 2 * _PROBE_BYTES, _PROBE_BYTES):
                    os.pwrite(fd, bytes(_PROBE_BYTES), offset)
                os.pread(fd, _PROBE_BYTES, _PROBE_BYTES)
                os.ftruncate(fd, _PROBE_BYTES)
            finally:
                os.close(fd)
        finally:
            if name:
                self.remove(name)

    def read(self, name: str, largest: int) -> bytes:
        """The contents of a plain file of at most `largest` bytes; a larger one is damage."""
        fd = self.open_file(name)
        with os.fdopen(fd, "rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise DamagedError(f"{self.path / name} is larger than {largest} bytes.", "Remove it.")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file, durably."""
        durable.write_file(self.fd, name, data)

    def size(self, name: str) -> int:
        """Bytes of a plain file."""
        state = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        if not stat.S_ISREG(state.st_mode):
            raise self._special(name)
        return state.st_size

    def exists(self, name: str) -> bool:
        """Whether anything has this name, be it a link to nowhere."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def require_named(self, name: str, fd: int) -> None:
        """Make sure that a name is still that of an open file, and of no other."""
        named, found = os.stat(name, dir_fd=self.fd, follow_symlinks=False), os.fstat(fd)
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise OSError(errno.ESTALE, "somebody has put another file in its place")

    def is_folder(self, name: str) -> bool:
        """Whether this name is a folder, and no link to one."""
        return stat.S_ISDIR(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode)

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        return sorted(os.listdir(self.fd))  # noqa: PTH208 - by descriptor

    def rename(self, old: str, new: str) -> None:
        """Rename within the folder."""
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> bool:
        """Remove a file or link; `False` where there was none."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def remove_folder(self, name: str) -> bool:
        """Remove an empty folder; `False` where it is missing or holds something."""
        try:
            os.rmdir(name, dir_fd=self.fd)
        except OSError:
            return False
        return True

    def sync(self) -> None:
        """Make all entries durable."""
        durable.sync_folder(self.fd)

    def require_ours(self) -> None:
        """Refuse a folder that others could rearrange while we write into it.

        Raises:
            StorageError: it is somebody else's, or others may write into it.
        """
        require_ours(self.fd, self.path)

    def _refuse_special(self, name: str) -> None:
        # Before opening: the mere opening of a device or a pipe can have an effect.
        self.size(name)

    def _special(self, name: str) -> DamagedError:
        return DamagedError(f"{self.path / name} is not a plain file.", "Remove it.")


_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
