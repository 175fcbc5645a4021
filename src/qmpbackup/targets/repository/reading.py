# SPDX-License-Identifier: Apache-2.0
"""The disks of a point in a repository, open to be read: chunk by chunk, each proved by its reading."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qmpbackup.model import Point, StoredDisk
from qmpbackup.restic.chunk_cache import ChunkCache
from qmpbackup.restic.pack import BlobType
from qmpbackup.targets.repository.image import RepositoryImage, naming
from qmpbackup.targets.repository.points import VmPoints
from qmpbackup.targets.stored_image import OpenDisks


@contextmanager
def opened(target: VmPoints, point: Point, disks: Sequence[StoredDisk]) -> Iterator[OpenDisks]:
    """Open disks of a point for the block; see `Target.images`."""
    repository = target.repository

    def load(chunk: bytes) -> bytes:
        return repository.load_blob(BlobType.DATA, chunk)

    with ChunkCache(load, folder=repository.folder) as cache:
        images = {}
        for disk in disks:
            with naming(disk.id):
                contents = target.contents(point, disk)
            images[disk.id] = RepositoryImage(target, contents, cache, disk.id)
        yield OpenDisks(images, let_go=repository.storage.give_up)
