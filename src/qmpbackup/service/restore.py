# SPDX-License-Identifier: Apache-2.0
"""Bring disks of a point back, as files or onto a block device: the right bytes, or nothing.

    find the point ─ open every file of every chain, check lengths, headers and links
    files:   copy each disk into NAME.partial, reading all digests at the same time
             ─ sizes right, fsync ─ and only when all disks are through: rename
    device:  read all digests first ─ then write, zeros too ─ fsync

So damage is found before a name that counts is given, and before a device is touched.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import durable, interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, Locked, QmpBackupError, StorageError, UsageError
from qmpbackup.filelock import locked
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import LATEST
from qmpbackup.process import Child
from qmpbackup.qemu import images
from qmpbackup.qemu.qcow2 import read_header
from qmpbackup.service import chains
from qmpbackup.service.chains import OpenFile
from qmpbackup.service.show import find_point
from qmpbackup.target.directory import DirectoryTarget
from qmpbackup.target.names import PARTIAL, folder_name

log = logging.getLogger(__name__)

FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for. Either `folder` or `file` is set; no `disks` means all.

    No `format` means raw for a block device, else qcow2.
    """

    target: Path
    point: str = LATEST
    disks: tuple[str, ...] = ()
    folder: Path | None = None
    file: Path | None = None
    format: str = ""
    force: bool = False
    lock_wait: float = 0.0

    @property
    def file_format(self) -> str:
        """The format of files that are written."""
        return self.format or "qcow2"


@dataclass(frozen=True, slots=True)
class Restored:
    """A disk that is back: where, and how many bytes the disk has."""

    disk_id: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The point that was restored, and its disks."""

    point: Point
    disks: tuple[Restored, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A disk to restore, its files open."""

    disk: StoredDisk
    files: tuple[OpenFile, ...]


def restore(request: Request) -> Outcome:
    """Restore disks of a point.

    Raises:
        QmpBackupError: nothing was restored, and nothing is left behind; only a block device that
            was already being written to holds part of the data.
    """
    target = DirectoryTarget.open(request.target)
    with interrupt.held(), target.lock(wait=request.lock_wait), ExitStack() as stack:
        inventory = target.load()
        point = find_point(target, inventory, request.point)
        disks = _chosen(point, request)
        outputs = [_output(request, disk) for disk in disks]
        for path in outputs:
            _refuse_harm(target, path)
        sources = [
            _Source(disk, stack.enter_context(chains.opened(target, inventory.points, point, disk)))
            for disk in disks
        ]
        if _is_device(outputs[0]):
            _to_device(target, sources[0], outputs[0], request)
        else:
            _to_files(target, sources, outputs, request)
    done = [Restored(disk.id, path, disk.size) for disk, path in zip(disks, outputs, strict=True)]
    return Outcome(point, tuple(done))


def _chosen(point: Point, request: Request) -> tuple[StoredDisk, ...]:
    known = {disk.id: disk for disk in point.disks}
    unknown = [disk_id for disk_id in request.disks if disk_id not in known]
    if unknown:
        gone = {each.id: each.into for each in point.merged}
        into = gone.get(unknown[0])
        raise UsageError(
            f"Point {point.id} does not hold disk {unknown[0]}."
            + (f" It was merged into point {into}." if into else ""),
            "It holds: " + ", ".join(known) + "." if known else "",
        )
    chosen = tuple(disk for disk in point.disks if not request.disks or disk.id in request.disks)
    if not chosen:
        raise DamagedError(f"Point {point.id} holds no disk any more.", "Restore a later point.")
    if request.file is not None and len(chosen) != 1:
        raise UsageError(
            f"Point {point.id} holds several disks, and a file takes one.", "Name one with --disk."
        )
    return chosen


def _output(request: Request, disk: StoredDisk) -> Path:
    """Where a disk goes; refused at once where something is there."""
    if request.folder is not None:
        path = request.folder / f"{folder_name(disk.id)}.{request.file_format}"
    elif request.file is not None:
        path = request.file
    else:
        raise ValueError("a restore needs a folder or a file to go to")
    if _is_device(path):
        return path
    if os.path.lexists(path) and not request.force:
        raise UsageError(f"{path} exists already.", "Choose another place, or use --force.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Use --output for folders.")
    return path


def _refuse_harm(target: DirectoryTarget, path: Path) -> None:
    """What `--force` does not mean either: a place in the backup itself, an image in use."""
    where = path.parent.resolve()
    if where == target.path or target.path in where.parents:
        raise UsageError(
            f"{path} lies in the target itself, where only backups go.", "Choose another place."
        )
    if images.in_use(path):
        raise UsageError(
            f"{path} is in use, most likely by a VM that runs.",
            "Shut that VM down first, or choose another place.",
        )


def _is_device(path: Path) -> bool:
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


def _to_files(
    target: DirectoryTarget, sources: Sequence[_Source], outputs: Sequence[Path], request: Request
) -> None:
    with ExitStack() as stack:
        partials: list[_Partial] = []
        for source, path in zip(sources, outputs, strict=True):
            partial = stack.enter_context(_partial(path, request.lock_wait))
            partials.append(partial)
            _fill(target, source, partial, request.file_format)
        interrupt.check()
        for partial in partials:
            partial.finish(request.force)


class _Partial:
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
def _partial(path: Path, wait: float) -> Iterator[_Partial]:
    with ExitStack() as stack:
        with storage_errors(f"write to {path.parent}"):
            _make_folder(path.parent, stack)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            partial = _Partial(folder, path)
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


def _fill(target: DirectoryTarget, source: _Source, partial: _Partial, format_: str) -> None:
    disk = source.disk
    log.info("Restoring disk %s to %s", disk.id, partial.path)
    layers = [file.layer for file in source.files]
    running = images.converting(layers, partial.fd, format_, snapshot=disk.snapshot)
    with running as child:
        _verify(target, source, child)
        _finish(child, f"restore disk {disk.id}")
    _fit(partial.fd, format_, disk)
    with storage_errors(f"write {partial.path}"):
        os.fsync(partial.fd)


def _verify(target: DirectoryTarget, source: _Source, child: Child | None = None) -> None:
    """Read the digests of a chain; stop early where the copy has failed for want of room."""
    for file in source.files:
        with chains.marking(target, file.link.disk):
            chains.check_digest(target, file.link.disk, file.fd, _stop_with(child))


def _stop_with(child: Child | None) -> Callable[[], None] | None:
    if child is None:
        return None

    def check() -> None:
        if child.failed:
            error = images.failure(child.wait(), "restore")
            if isinstance(error, StorageError):
                raise error

    return check


def _finish(child: Child, action: str) -> None:
    result = child.wait()
    if result.code:
        raise images.failure(result, action)


def _fit(fd: int, format_: str, disk: StoredDisk) -> None:
    """The output is as large as the disk was; only an internal snapshot can have had another size.

    Raises:
        DamagedError: it is not.
    """
    size = _size_of(fd, format_)
    if size != disk.size and disk.snapshot:
        images.resize(fd, format_, disk.size)
        size = _size_of(fd, format_)
    if size != disk.size:
        raise DamagedError(f"Disk {disk.id} came out with {size} bytes instead of {disk.size}.")


def _size_of(fd: int, format_: str) -> int:
    if format_ == "raw":
        return os.fstat(fd).st_size
    return read_header(fd, "The restored image").size


def _to_device(target: DirectoryTarget, source: _Source, device: Path, request: Request) -> None:
    if request.format not in {"", "raw"}:
        raise UsageError(f"{device} is a block device.", "Restore to it with --format raw.")
    disk = source.disk
    with _device(device, disk) as fd:
        log.info("Checking the files of disk %s before %s is written to", disk.id, device)
        _verify(target, source)
        log.info("Restoring disk %s to %s", disk.id, device)
        layers = [file.layer for file in source.files]
        running = images.converting(layers, fd, "raw", snapshot=disk.snapshot, existing=True)
        try:
            with running as child:
                _finish(child, f"restore disk {disk.id} to {device}")
            with storage_errors(f"write {device}"):
                os.fsync(fd)
        except QmpBackupError:
            log.warning("%s holds only part of disk %s now.", device, disk.id)
            raise


@contextmanager
def _device(path: Path, disk: StoredDisk) -> Iterator[int]:
    """Open a device that nobody uses and that is large enough."""
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
