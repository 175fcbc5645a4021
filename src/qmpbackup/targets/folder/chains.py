# SPDX-License-Identifier: Apache-2.0
"""Open the files that a disk of a point is made of, ready for qemu-img and for their digests.

What restore, verify and backup share. Knows target and images; must not know where the data goes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.images.digest import digest
from qmpbackup.images.layers import Layer, check_link
from qmpbackup.images.qcow2 import Header
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import Link, chain
from qmpbackup.targets.folder.files import StoredFiles

SMALL = 64 * 1024 * 1024
"""Bytes of a file that is read whole before a backup builds on it: below a second from most disks."""

_HINT = "Put back an unharmed copy of it, or restore a point that does not need it."


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of a chain, open for reading."""

    link: Link
    layer: Layer


@contextmanager
def opened(
    target: StoredFiles, points: Sequence[Point], point: Point, disk: StoredDisk
) -> Iterator[tuple[OpenFile, ...]]:
    """Open all files of a disk's chain, the one that stands alone first, and check their headers.

    Raises:
        DamagedError: one is missing, or not what its manifest says, as far as its header and its
            length show it.
        StorageError: one cannot be opened.
    """
    links = chain(points, point, disk.id)
    allow_open_files(len(links))
    with ExitStack() as stack:
        files: list[OpenFile] = []
        for link in links:
            with marking(target, link.disk):
                fd = target.open_file(link.disk.file)
                stack.callback(os.close, fd)
                check_length(target, link.disk, fd)
                with storage_errors(f"read {target.path / link.disk.file}"):
                    layer = Layer.of(fd, link.disk.name)
            files.append(OpenFile(link, layer))
        _check_links(target, files, disk)
        yield tuple(files)


def _check_links(target: StoredFiles, files: Sequence[OpenFile], disk: StoredDisk) -> None:
    """The links inside the images are those of the manifests, and the last is the disk's size."""
    parent = ""
    for file in files:
        with marking(target, file.link.disk):
            header = check_link(file.layer, parent)
            parent = file.layer.name
            if file is files[-1]:
                _check_size(header, disk)


def _check_size(header: Header, disk: StoredDisk) -> None:
    """The image is as large as the disk was; an internal snapshot may have had another size."""
    if not disk.snapshot and header.size != disk.size:
        raise DamagedError(
            f"{disk.file} is an image of {header.size} bytes instead of {disk.size}.", _HINT
        )


@contextmanager
def marking(target: StoredFiles, disk: StoredDisk) -> Iterator[None]:
    """Mark the file of a disk in the target if the block finds it damaged.

    In the middle of a merge files are missing that are not lost; that is said instead. The lock to
    read must be held.
    """
    try:
        yield
    except DamagedError as error:
        folder = disk.folder
        if folder in target.interrupted():
            raise DamagedError(
                f"{error.message} A merge in {folder} was interrupted.", target.merge_hint(folder)
            ) from error
        target.mark_damaged(disk, error.message)
        raise


def fault(
    target: StoredFiles,
    points: Iterable[Point],
    point: Point,
    disk_id: str,
    limit: int | None = SMALL,
) -> str:
    """Why the files of a disk of a point cannot be built upon, as far as a look inside is cheap.

    All headers are read, and the whole of the newest file if that has `limit` bytes at most: an
    incremental mostly has, and then reading it costs about what writing it did. Without a limit all
    files are read. Empty if nothing speaks against them.
    """
    try:
        links = chain(points, point, disk_id)
        parent = ""
        for link in links:
            whole = limit is None or (link is links[-1] and link.disk.file_size <= limit)
            _check_inside(target, link.disk, parent, whole=whole)
            parent = link.disk.name
    except (DamagedError, StorageError) as error:
        return error.message.removesuffix(".")
    return ""


def _check_inside(target: StoredFiles, disk: StoredDisk, parent: str, *, whole: bool) -> None:
    fd = target.open_file(disk.file)
    try:
        check_length(target, disk, fd)
        with storage_errors(f"read {target.path / disk.file}"):
            layer = Layer.of(fd, disk.name)
        _check_size(check_link(layer, parent), disk)
        if whole:
            check_digest(target, disk, layer)
    finally:
        os.close(fd)


def check_length(target: StoredFiles, disk: StoredDisk, fd: int) -> None:
    """The file is as long as its manifest says.

    Raises:
        DamagedError: it is not.
    """
    found = os.fstat(fd).st_size
    if found != disk.file_size:
        raise DamagedError(
            f"{target.path / disk.file} has {found} bytes instead of {disk.file_size}.", _HINT
        )


def check_digest(
    target: StoredFiles,
    disk: StoredDisk,
    layer: Layer,
    each: Callable[[], None] | None = None,
) -> None:
    """Read a whole file, but for its head, which was read, and compare it with its manifest; `each` is
    called now and then.

    Raises:
        DamagedError: its contents are others.
        StorageError: it cannot be read.
    """
    path = target.path / disk.file
    with storage_errors(f"read {path}"):
        found = digest(layer.fd, each, layer.head)
    if found != disk.digest:
        raise DamagedError(f"The contents of {path} are not those that were written.", _HINT)


def allow_open_files(layers: int) -> None:
    """Raise our limit of open files, as far as that is allowed, for a long chain: each layer is a file
    and its head."""
    import resource

    count = 2 * layers + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
