# SPDX-License-Identifier: Apache-2.0
"""The disks of a point as images that can be read at any offset, whichever kind of target has them.

Knows how each kind is opened; must not know what is done with the images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from qmpbackup import process
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.images.digest import digest
from qmpbackup.images.times import Stamp, stamp
from qmpbackup.model import Point, StoredDisk
from qmpbackup.service import chains
from qmpbackup.service.chains import OpenFile
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.interface import StoredImage
from qmpbackup.targets.repository.target import RepositoryTarget


def _nothing() -> None:
    """There is nothing to let go of."""


def _no_marks(disk: StoredDisk) -> AbstractContextManager[None]:
    """Nothing is found damaged as a whole."""
    del disk
    return nullcontext()


@dataclass(frozen=True, slots=True)
class OpenDisks:
    """Images of disks by disk id.

    `files` are those of each disk whose images give what lies in them, unproved; `prove` proves them,
    and `marking` marks what it finds damaged. `let_go` has reads under way end soon.
    """

    images: Mapping[str, StoredImage]
    files: Mapping[str, Sequence[OpenFile]] = field(default_factory=dict)
    marking: Callable[[StoredDisk], AbstractContextManager[None]] = _no_marks
    let_go: Callable[[], None] = _nothing

    def prove(self, disk_id: str, each: Callable[[], None]) -> None:
        """Read all files of a disk; `each` is called after every MiB, and ends it by raising.

        Raises:
            DamagedError: one is not what its manifest says; it has been marked so.
            StorageError: one cannot be read.
        """
        for file in self.files.get(disk_id, ()):
            disk = file.link.disk
            with self.marking(disk), storage_errors(f"read {disk.file}"):
                found = digest(file.layer.fd, each, file.layer.head)
                if found != disk.digest:
                    raise DamagedError(
                        f"{disk.file} is not what it was when it was written: its digest differs.",
                        "Put back an unharmed copy of it, or use a point that does not need it.",
                    )

    def stamps(self, disk_id: str) -> tuple[Stamp, ...]:
        """What changes when somebody writes to the files of a disk.

        Raises:
            StorageError: one cannot be looked at.
        """
        with storage_errors(f"look at the files of disk {disk_id}"):
            return tuple(stamp(file.layer.fd) for file in self.files.get(disk_id, ()))


@contextmanager
def opened(
    target: DirectoryTarget | RepositoryTarget,
    points: Sequence[Point],
    point: Point,
    disks: Sequence[StoredDisk],
) -> Iterator[OpenDisks]:
    """Open disks of a point for the block. The lock to read must be held.

    Raises:
        DamagedError: what can be looked at cheaply is not what the manifest says.
        StorageError: the target cannot be read.
    """
    way = _of_folder if isinstance(target, DirectoryTarget) else _of_repository
    with way(target, points, point, disks) as found:  # type: ignore[arg-type]
        yield found


@contextmanager
def _of_folder(
    target: DirectoryTarget, points: Sequence[Point], point: Point, disks: Sequence[StoredDisk]
) -> Iterator[OpenDisks]:
    from qmpbackup.targets.folder import image

    with ExitStack() as stack:
        files = {
            disk.id: stack.enter_context(chains.opened(target, points, point, disk))
            for disk in disks
        }
        images = {
            disk.id: stack.enter_context(
                image.opened(
                    [file.layer for file in files[disk.id]], disk.size, disk.id, disk.snapshot
                )
            )
            for disk in disks
        }
        yield OpenDisks(images, files, lambda disk: chains.marking(target, disk))


@contextmanager
def _of_repository(
    target: RepositoryTarget, points: Sequence[Point], point: Point, disks: Sequence[StoredDisk]
) -> Iterator[OpenDisks]:
    from qmpbackup.restic.chunk_cache import ChunkCache
    from qmpbackup.restic.pack import BlobType
    from qmpbackup.targets.repository.image import RepositoryImage

    del points  # each stands for itself
    repository = target.repository
    process.give_memory_back()
    with ChunkCache(lambda chunk: repository.load_blob(BlobType.DATA, chunk)) as cache:
        images = {}
        for disk in disks:
            contents = target.contents(point, disk)
            images[disk.id] = RepositoryImage(contents, contents.with_data(), cache)
        yield OpenDisks(images, let_go=repository.storage.give_up)
