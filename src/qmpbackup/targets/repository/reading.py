# SPDX-License-Identifier: Apache-2.0
"""The disks of a point in a repository, open to be read: chunk by chunk, each proved by its reading."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qmpbackup import process
from qmpbackup.model import Point, StoredDisk
from qmpbackup.restic.chunk_cache import ChunkCache
from qmpbackup.restic.pack import BlobType
from qmpbackup.targets.interface import OpenDisks
from qmpbackup.targets.repository.image import RepositoryImage
from qmpbackup.targets.repository.points import VmPoints


@contextmanager
def opened(target: VmPoints, point: Point, disks: Sequence[StoredDisk]) -> Iterator[OpenDisks]:
    """Open disks of a point for the block; see `Target.images`."""
    repository = target.repository
    process.give_memory_back()
    with ChunkCache(lambda chunk: repository.load_blob(BlobType.DATA, chunk)) as cache:
        images = {}
        for disk in disks:
            contents = target.contents(point, disk)
            images[disk.id] = RepositoryImage(contents, contents.with_data(), cache)
        yield OpenDisks(images, let_go=repository.storage.give_up)
