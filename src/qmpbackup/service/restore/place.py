# SPDX-License-Identifier: Apache-2.0
"""Where restored disks go: files that count once all are complete, and block devices.

Knows paths, names and what must not be harmed; must not know where the bytes come from.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup import durable, interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, Interrupted, Locked, QmpBackupError, UsageError
from qmpbackup.filelock import locked
from qmpbackup.model import StoredDisk
from qmpbackup.qemu import images
from qmpbackup.qemu.qcow2 import read_header
from qmpbackup.restic.storage.local import is_repository
from qmpbackup.service.restore.request import Request
from qmpbackup.service.targets import Target
from qmpbackup.target.directory import DirectoryTarget
from qmpbackup.target.names import PARTIAL, folder_name

log = logging.getLogger(__name__)


def output(request: Request, disk: StoredDisk) -> Path:
    """Where a disk goes; refused at once where something is there.

    Raises:
        UsageError: something is there.
    """
    if request.folder is not None:
        path = request.folder / f"{folder_name(disk.id)}.{request.file_format}"
    elif request.file is not None:
        path = request.file
    else:
        raise ValueError("a restore needs a folder or a file to go to")
    if is_device(path):
        return path
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Use --output for folders.")
    if os.path.lexists(path) and not request.force:
        raise UsageError(f"{path} exists already.", "Choose another place, or use --force.")
    return path


def refuse_harm(target: Target, path: Path) -> None:
    """What `--force` does not mean either: a place in the backup itself, an image in use.

    Raises:
        UsageError: it is such a place.
    """
    where = path.parent.resolve()
    above = (where, *where.parents)
    if isinstance(target, DirectoryTarget) and target.path in above:
        raise UsageError(
            f"{path} lies in the target itself, where only backups go.", "Choose another place."
        )
    if any(map(is_repository, above)):
        raise UsageError(
            f"{path} lies in a restic repository, where only backups go.", "Choose another place."
        )
    if images.in_use(path):
        raise UsageError(
            f"{path} is in use, most likely by a VM that runs.",
            "Shut that VM down first, or choose another place.",
        )


def is_device(path: Path) -> bool:
    """Whether a block device is there.

    Raises:
        UsageError: something is there that is neither that nor a file or folder.
    """
    with storage_errors(f"look at {path}"):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return False
        if stat.S_ISBLK(mode):
            return True
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{path} is neither a file nor a block device.", "Choose another.")
        return False


def into_files(
    outputs: Sequence[Path], request: Request, fill: Callable[[int, "Partial"], None]
) -> None:
    """Fill a partial file for each output, and give all of them their names at the end.

    `fill` is called with the number of each output; the bytes must be durable when it returns.

    Raises:
        QmpBackupError: no output has its name, and nothing is left behind.
    """
    with ExitStack() as stack:
        partials: list[Partial] = []
        for number, path in enumerate(outputs):
            partial = stack.enter_context(partial_file(path, request.lock_wait))
            partials.append(partial)
            fill(number, partial)
        interrupt.check()
        for partial in partials:
            partial.finish(request.force)


class Partial:
    """An output file that does not count yet; unless finished, it is removed at the end."""

    def __init__(self, folder: int, path: Path) -> None:
        self._folder = folder
        self.path = path
        self._name = path.name + PARTIAL
        self._finished = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self.fd = os.open(self._name, flags, 0o600, dir_fd=folder)

    def empty(self) -> None:
        """Begin anew where a restore that died has left something; the lock must be held."""
        if not self._is_ours(os.fstat(self.fd)):
            raise Locked(
                f"{self.path}{PARTIAL} belongs to somebody else.",
                "Remove it, or choose another place.",
            )
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, 0)

    def _is_ours(self, state: os.stat_result) -> bool:
        """A plain file of ours that still has the name, and no other: what another restore has just
        finished must not be emptied."""
        named = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        same = (named.st_dev, named.st_ino) == (state.st_dev, state.st_ino)
        plain = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
        return same and plain and state.st_uid == os.geteuid()

    def finish(self, force: bool) -> None:
        """Give the file its name."""
        with storage_errors(f"write {self.path}"):
            if os.path.lexists(self.path) and not force:
                raise UsageError(f"{self.path} has appeared meanwhile.", "Choose another place.")
            os.rename(self._name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._finished = True
            durable.sync_folder(self._folder)

    def discard(self) -> None:
        """Remove the file unless it is finished; the lock must be held."""
        if not self._finished:
            with suppress(OSError):
                os.unlink(self._name, dir_fd=self._folder)


@contextmanager
def partial_file(path: Path, wait: float) -> Iterator[Partial]:
    with ExitStack() as stack:
        with storage_errors(f"write to {path.parent}"):
            _make_folder(path.parent, stack)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            partial = Partial(folder, path)
            stack.callback(os.close, partial.fd)
            stack.enter_context(locked(partial.fd, str(path), wait=wait))
            partial.empty()
            stack.callback(partial.discard)
        yield partial


def _make_folder(path: Path, stack: ExitStack) -> None:
    """Make the folder where it is missing; it goes again at the end if nothing is in it."""
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)

        def remove_if_empty() -> None:
            with suppress(OSError):
                path.rmdir()

        stack.callback(remove_if_empty)


def check_size(fd: int, format_: str, disk: StoredDisk) -> None:
    """What was written is as large as the disk was.

    Raises:
        DamagedError: it is not.
    """
    size = size_of(fd, format_)
    if size != disk.size:
        raise DamagedError(f"Disk {disk.id} came out with {size} bytes instead of {disk.size}.")


def size_of(fd: int, format_: str) -> int:
    """Bytes of the disk that a file holds."""
    if format_ == "raw":
        return os.fstat(fd).st_size
    return read_header(fd, "The restored image").size


@contextmanager
def device(path: Path, disk: StoredDisk, request: Request) -> Iterator[int]:
    """Open a device that nobody uses and that is large enough.

    Raises:
        UsageError: it is not, or an image was asked for, which no device holds.
    """
    if request.format not in {"", "raw"}:
        raise UsageError(f"{path} is a block device.", "Restore to it with --format raw.")
    fd = _open_device(path)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        if size < disk.size:
            raise UsageError(
                f"{path} has {size} bytes, and disk {disk.id} needs {disk.size}.",
                "Use a larger device.",
            )
        if size > disk.size:
            log.warning(
                "%s is larger than disk %s; its last %d bytes stay as they are.",
                path,
                disk.id,
                size - disk.size,
            )
        yield fd
    finally:
        os.close(fd)


@contextmanager
def overwriting(path: Path, fd: int, disk: StoredDisk) -> Iterator[None]:
    """Write to an open device in the block; durable afterwards. Says so if it holds only a part.

    Raises:
        StorageError: it cannot be written to.
    """
    log.info("Restoring disk %s to %s", disk.id, path)
    try:
        with storage_errors(f"write {path}"):
            yield
            os.fsync(fd)
    except (QmpBackupError, Interrupted):
        log.warning("%s holds only part of disk %s now.", path, disk.id)
        raise


def _open_device(path: Path) -> int:
    try:
        # O_EXCL: the kernel refuses devices that are mounted or held by anything else.
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except BlockingIOError:
        busy = True
    except OSError as error:
        import errno

        busy = error.errno == errno.EBUSY
        if not busy:
            raise durable.storage_error(f"open {path}", error) from error
    raise UsageError(f"{path} is in use.", "Unmount it, or end what uses it.")
