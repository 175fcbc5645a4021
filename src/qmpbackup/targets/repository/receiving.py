# SPDX-License-Identifier: Apache-2.0
"""A point in the making in a repository: chunks on their way, and the lists that they make up.

    known chunks     keep the ids that the list of what the disk builds on has, until others come
    others           hashed, stored unless the repository has them, entered

Must not know where the chunks come from, nor which ones are worth handing over.
"""

from collections.abc import Callable, Sequence

from qmpbackup.errors import UsageError
from qmpbackup.model import Point
from qmpbackup.plan.sizes import human
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.writer import Writer
from qmpbackup.targets.receiver import Arrival, Buffer, ChunkReceiver, Sealed
from qmpbackup.targets.repository import committing
from qmpbackup.targets.repository.chunk_list import (
    CHUNK,
    ID,
    MOST_BYTES,
    ChunkList,
    count_chunks,
)
from qmpbackup.targets.repository.points import VmPoints


def require_possible(disks: Sequence[Arrival]) -> None:
    """Refuse disks that are too large for one point.

    Raises:
        UsageError: they are.
    """
    size = sum(disk.size for disk in disks)
    if size > MOST_BYTES:
        raise UsageError(
            f"The disks have {human(size)} together, and a point in a repository holds no more "
            f"than {human(MOST_BYTES)}.",
            "Name some of them with --include, or use a folder as target.",
        )


class RepositoryReceiver(ChunkReceiver):
    """See `ChunkReceiver`."""

    def __init__(self, points: VmPoints, *, check: bool) -> None:
        self._points = points
        self._writer = Writer(points.repository, check=check)
        self._disks: dict[str, _ArrivingDisk] = {}
        self._lists: dict[str, ChunkList] = {}

    def begin(self, disk_id: str, size: int, base: Point | None) -> "_ArrivingDisk":
        """Begin with the list of what the disk builds on."""
        stored = base.disk(disk_id) if base else None
        known = self._points.contents(base, stored) if base and stored else None
        self._points.forget_contents(disk_id)
        self._disks[disk_id] = _ArrivingDisk(self._writer, size, known)
        return self._disks[disk_id]

    def drain(self) -> None:
        """Wait for the writer."""
        self._writer.drain()

    def seal(self, disk_id: str) -> Sealed:
        """The list of a disk is complete."""
        disk = self._disks[disk_id]
        self._lists[disk_id] = chunks = disk.contents()
        file = committing.disk_file(self._points.vm, disk_id)
        return Sealed(file, disk.stored, chunks.digest)

    def commit(self, point: Point) -> None:
        """Write trees, packs, indexes and the snapshot."""
        committing.commit(self._points, self._writer, point, self._lists)
        self._writer.stop()

    def abort(self) -> None:
        """End the writing; `prune` removes what no snapshot names."""
        self._writer.abandon()


class _ArrivingDisk:
    """See `ArrivingDisk`: the list of chunks of one disk, while it is being made."""

    def __init__(self, writer: Writer, size: int, base: ChunkList | None) -> None:
        self.count = count_chunks(size)
        self.known = 0
        self.stored = 0
        self._writer = writer
        self._size = size
        self._zeros: dict[int, bytes] = {}
        if base is not None:
            self.known = self.count if base.size == size else base.size // CHUNK
        # A terabyte's list takes 32 MiB: no more passes over it than must be.
        self._chunks = bytearray(memoryview(base.chunks if base else b"")[: ID * self.known])
        self._chunks += bytes(ID * (self.count - self.known))

    @property
    def is_complete(self) -> bool:
        """Whether every chunk has an id."""
        return self._chunks.find(bytes(ID)) < 0

    def put(self, index: int, data: Buffer, done: Callable[[bool], None]) -> None:
        """Hand a chunk to the writer, which enters it when it is stored."""

        def enter(chunk_id: bytes, stored: int) -> None:
            self.stored += stored
            done(self._enter(index, chunk_id))

        self._writer.add(data, enter)

    def zeros(self, first: int, count: int) -> Sequence[int]:
        """Enter chunks of zeros, which are stored when they are first needed."""
        last = first + count - 1
        inner = self._zero(CHUNK) if count > 1 else b""
        others: list[int] = []
        if self.known:
            others = [index for index in range(first, last) if self._enter(index, inner)]
        else:
            self._chunks[ID * first : ID * last] = inner * (count - 1)
        if self._enter(last, self._zero(min(CHUNK, self._size - last * CHUNK))):
            others.append(last)
        return others

    def _zero(self, length: int) -> bytes:
        if length not in self._zeros:
            self._zeros[length] = self._writer.add_now(BlobType.DATA, bytes(length))
        return self._zeros[length]

    def _enter(self, index: int, chunk_id: bytes) -> bool:
        """Whether the chunk was known as another."""
        place = slice(ID * index, ID * (index + 1))
        differs = index < self.known and self._chunks[place] != chunk_id
        self._chunks[place] = chunk_id
        return differs

    def contents(self) -> ChunkList:
        """The complete list; no chunk can be entered any more."""
        contents = ChunkList(self._size, bytes(self._chunks))
        self._chunks = bytearray()  # a terabyte's list takes 32 MiB
        return contents
