# SPDX-License-Identifier: Apache-2.0
"""Open the files that a disk of a point is made of, ready for qemu-img and for their digests.

What restore and verify share. Knows target and images; must not know where the data goes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chain import Link, chain
from qmpbackup.qemu import images
from qmpbackup.qemu.images import Layer
from qmpbackup.target.digest import digest
from qmpbackup.target.directory import DirectoryTarget

_HINT = "Put back an unharmed copy of it, or restore a point that does not need it."


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of a chain, open for reading."""

    link: Link
    fd: int

    @property
    def layer(self) -> Layer:
        """As qemu-img needs it."""
        return Layer(self.fd, self.link.disk.file.rpartition("/")[2])


@contextmanager
def opened(
    target: DirectoryTarget, points: Sequence[Point], point: Point, disk: StoredDisk
) -> Iterator[tuple[OpenFile, ...]]:
    """Open all files of a disk's chain, the one that stands alone first, and check their headers.

    Raises:
        DamagedError: one is missing, or not what its manifest says, as far as its header and its
            length show it.
        StorageError: one cannot be opened.
    """
    links = chain(points, point, disk.id)
    allow_open_files(len(links) + 64)
    with ExitStack() as stack:
        files: list[OpenFile] = []
        for link in links:
            fd = target.open_file(link.disk.file)
            stack.callback(os.close, fd)
            check_length(target, link.disk, fd)
            files.append(OpenFile(link, fd))
        with storage_errors(f"read the files of disk {disk.id}"):
            check_links(files, disk)
        yield tuple(files)


def check_links(files: Sequence[OpenFile], disk: StoredDisk) -> None:
    """The links inside the images are those of the manifests, and the last is the disk's size.

    Raises:
        DamagedError: they are not.
    """
    headers = images.check_chain([file.layer for file in files])
    if not disk.snapshot and headers[-1].size != disk.size:
        raise DamagedError(
            f"{disk.file} is an image of {headers[-1].size} bytes instead of {disk.size}.", _HINT
        )


def check_length(target: DirectoryTarget, disk: StoredDisk, fd: int) -> None:
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
    target: DirectoryTarget, disk: StoredDisk, fd: int, each: Callable[[], None] | None = None
) -> None:
    """Read a whole file and compare it with its manifest; `each` is called now and then.

    Raises:
        DamagedError: its contents are others.
        StorageError: it cannot be read.
    """
    path = target.path / disk.file
    with storage_errors(f"read {path}"):
        found = digest(fd, each)
    if found != disk.digest:
        raise DamagedError(f"The contents of {path} are not those that were written.", _HINT)


def allow_open_files(count: int) -> None:
    """Raise our limit of open files, as far as that is allowed, for a long chain."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
