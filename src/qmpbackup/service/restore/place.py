# SPDX-License-Identifier: Apache-2.0
"""What restored disks are written to: files that count once all are complete, and block devices.

Knows descriptors and names; must not know which places are right, nor what the images are.
"""

import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import durable, interrupt
from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.errors import (
    DamagedError,
    Interrupted,
    Locked,
    QmpBackupError,
    StorageError,
    UsageError,
)
from qmpbackup.filelock import locked
from qmpbackup.model import StoredDisk
from qmpbackup.plan.room import Need
from qmpbackup.service import room
from qmpbackup.service.restore.outputs import Output, require_replaceable
from qmpbackup.service.restore.request import Request
from qmpbackup.targets.names import PARTIAL
from qmpbackup.targets.pouring import size_of
from qmpbackup.targets.stored_image import StoredImage

log = logging.getLogger(__name__)

_BLKROGET = 0x125E  # linux/fs.h

_ROOM_HINT = "Make room there, choose another place, or keep less free with --reserve SIZE"


def into_files(
    outputs: Sequence[Output],
    disks: Sequence[StoredDisk],
    images: Sequence[StoredImage],
    request: Request,
) -> None:
    """Pour each image into a partial file, and give all of them their names at the end.

    All files are there before the first is filled.

    Raises:
        StorageError: there is not enough room beside the reserve, now or later.
        QmpBackupError: no output has its name, and nothing is left behind.
    """
    format_ = request.file_format
    wanted = [
        (output.real.parent, Need(output.real.name, image.needs(format_)))
        for output, image in zip(outputs, images, strict=True)
    ]
    with ExitStack() as stack:
        stack.enter_context(room.required(wanted, request.reserve, _ROOM_HINT))
        partials = [
            stack.enter_context(partial_file(output.real, request.lock_wait, format_))
            for output in outputs
        ]
        for disk, image, partial in zip(disks, images, partials, strict=True):
            log.info("Restoring disk %s to %s", disk.id, partial.path)
            image.pour(partial)
            _check_size(partial, disk)
        interrupt.check()
        for partial in partials:
            partial.require_free(force=request.force)
        for partial in partials:
            partial.finish(force=request.force)


class Partial:
    """An output file that does not count yet; unless finished, it is removed at the end.

    A `Sink`.
    """

    is_device = False

    def __init__(self, folder: int, path: Path, format_: str) -> None:
        self._folder = folder
        self.path = path
        self.format = format_
        self._name = path.name + PARTIAL
        self._finished = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self.fd = os.open(self._name, flags, 0o600, dir_fd=folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """See `Sink`."""
        with storage_errors(f"write {self.path}"):
            yield
            os.fsync(self.fd)

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
        plain = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
        return plain and state.st_uid == os.geteuid() and self._is_named(self._name)

    def _is_named(self, name: str) -> bool:
        named = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        return os.path.samestat(named, os.fstat(self.fd))

    def require_free(self, *, force: bool) -> None:
        """Nothing has appeared at the name that may not be replaced.

        Raises:
            UsageError: something has.
        """
        with storage_errors(f"write {self.path}"), suppress(FileNotFoundError):
            there = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False)
            if not force:
                raise UsageError(f"{self.path} has appeared meanwhile.", "Choose another place.")
            require_replaceable(self.path, there.st_mode, force=True)

    def finish(self, *, force: bool) -> None:
        """Give the file its name, and see that it has it."""
        self.require_free(force=force)
        with storage_errors(f"write {self.path}"):
            if not self._is_named(self._name):
                raise OSError(errno.ESTALE, "somebody has put another file in its place")
            os.rename(self._name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._finished = True
            durable.sync_folder(self._folder)
            if not self._is_named(self.path.name):
                raise OSError(errno.ESTALE, "somebody has put another file in its place")

    def discard(self) -> None:
        """Remove the file unless it is finished; the lock must be held."""
        if not self._finished:
            with suppress(OSError):
                os.ftruncate(self.fd, 0)
                os.unlink(self._name, dir_fd=self._folder)


@contextmanager
def partial_file(path: Path, wait: float, format_: str) -> Iterator[Partial]:
    with ExitStack() as stack:
        with storage_errors(f"write to {path.parent}"):
            _make_folder(path.parent, stack)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            partial = Partial(folder, path, format_)
            stack.callback(os.close, partial.fd)
            stack.enter_context(locked(partial.fd, str(path), wait=wait))
            partial.empty()
            stack.callback(partial.discard)
        yield partial


def _make_folder(path: Path, stack: ExitStack) -> None:
    """Make the folder where it is missing; it goes again at the end if nothing is in it."""
    if not path.exists():
        make_folders(path)

        def remove_if_empty() -> None:
            with suppress(OSError):
                path.rmdir()

        stack.callback(remove_if_empty)


def _check_size(partial: Partial, disk: StoredDisk) -> None:
    """What was written is as large as the disk was.

    Raises:
        DamagedError: it is not.
    """
    with storage_errors(f"read {partial.path}"):
        size = size_of(partial.fd, partial.format)
    if size != disk.size:
        raise DamagedError(f"Disk {disk.id} came out with {size} bytes instead of {disk.size}.")


def into_device(output: Output, disk: StoredDisk, image: StoredImage, request: Request) -> None:
    """Pour an image onto a device; durable afterwards.

    Raises:
        QmpBackupError: it failed; what was written to the device by then stays there.
    """
    with _device(output, disk, request) as fd:
        image.pour(Device(fd, output.path, disk))


@dataclass(frozen=True, slots=True)
class Device:
    """An open block device that a disk is poured onto: a `Sink`."""

    fd: int
    path: Path
    disk: StoredDisk
    format: str = "raw"
    is_device: bool = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Says so if it holds only a part."""
        log.info("Restoring disk %s to %s", self.disk.id, self.path)
        try:
            with storage_errors(f"write {self.path}"):
                yield
                os.fsync(self.fd)
        except (QmpBackupError, Interrupted):
            log.warning("%s holds only part of disk %s now.", self.path, self.disk.id)
            raise


@contextmanager
def _device(output: Output, disk: StoredDisk, request: Request) -> Iterator[int]:
    """Open a device that nobody uses, that is large enough and can be written to.

    Raises:
        UsageError: it is not, or an image was asked for, which no device holds.
    """
    path = output.path
    if request.format not in {"", "raw"}:
        raise UsageError(f"{path} is a block device.", "Restore to it with --format raw.")
    fd = _open_device(output.real)
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


def _open_device(path: Path) -> int:
    try:
        # O_EXCL: the kernel refuses devices that are mounted or held by anything else.
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise durable.storage_error(f"open {path}", error) from error
        raise UsageError(f"{path} is in use.", "Unmount it, or end what uses it.") from None
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is no block device any more.", "Look at it, and run again.")
    if struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0]:
        os.close(fd)  # root may open such a one for writing, and only each write fails
        raise StorageError(f"{path} is read-only.", "Allow writing: blockdev --setrw DEVICE.")
    return fd
