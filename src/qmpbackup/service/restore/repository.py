# SPDX-License-Identifier: Apache-2.0
"""Disks out of a repository: chunks are read in threads, each is proved and written at once.

    the lists of chunks are what the manifest says (digest)
    files:   lay out the image ─ read every chunk that is not zeros, check its authentication code
             and its hash, write it wherever the list has it ─ fsync
    device:  first see that all chunks and packs are there ─ zeros, then chunks as above

Nothing that is not proved is ever written, so a device that turns out to lack something holds right
bytes in part, and what it held before in the rest.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError
from qmpbackup.images.qcow2_layout import Layout
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.chunk_map import runs
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.reader import read_blobs
from qmpbackup.service.restore import blocks, place
from qmpbackup.service.restore.outputs import Output
from qmpbackup.service.restore.place import Partial
from qmpbackup.service.restore.request import Request
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList, places
from qmpbackup.targets.repository.points import HINT
from qmpbackup.targets.repository.target import RepositoryTarget

log = logging.getLogger(__name__)

_PIECE: Final = 64 * 1024
"""Bytes of zeros within a chunk from which on they are left out of a file."""
_ZEROS: Final = bytes(_PIECE)
_AT_ONCE: Final = 64
"""Places that a chunk is written to before signals are looked at."""


def restore(
    target: RepositoryTarget,
    point: Point,
    disks: Sequence[StoredDisk],
    outputs: Sequence[Output],
    request: Request,
) -> None:
    """Restore disks of a point, each to its output.

    Raises:
        QmpBackupError: as `restore.restore` says.
    """
    sources: list[ChunkList] = []
    for disk in disks:
        with _naming(disk):
            sources.append(target.contents(point, disk))
    if outputs[0].is_device:
        _to_device(target, disks[0], sources[0], outputs[0], request)
        return

    def fill(number: int, partial: Partial) -> None:
        with _naming(disks[number]):
            _fill(target, disks[number], sources[number], partial, request.file_format)

    needs = [_needed(contents) for contents in sources]
    place.into_files(outputs, needs, request, fill)


def _needed(contents: ChunkList) -> int:
    """Bytes that a disk takes where it goes, at most: zeros within chunks are left out."""
    return min(contents.size, contents.with_data().count(1) * CHUNK)


@contextmanager
def _naming(disk: StoredDisk) -> Iterator[None]:
    """Name the disk in what is said about damage."""
    try:
        yield
    except DamagedError as error:
        if error.message.startswith(f"Disk {disk.id} "):
            raise
        raise DamagedError(f"Disk {disk.id}: {error.message}", error.hint) from error


def _fill(
    target: RepositoryTarget, disk: StoredDisk, contents: ChunkList, partial: Partial, format_: str
) -> None:
    log.info("Restoring disk %s to %s", disk.id, partial.path)
    present = contents.with_data()
    with storage_errors(f"write {partial.path}"):
        if format_ == "raw":
            os.ftruncate(partial.fd, contents.size)
            where = places(present)
        else:
            layout = Layout(contents.size, CHUNK, present)
            layout.write_metadata(partial.fd)
            where = places(present, layout.data_at, packed=True)
        _pour(target, contents, where, partial.fd, sparse=True)
        place.check_size(partial.fd, format_, disk)
        os.fsync(partial.fd)


def _to_device(
    target: RepositoryTarget,
    disk: StoredDisk,
    contents: ChunkList,
    output: Output,
    request: Request,
) -> None:
    with place.device(output, disk, request) as fd, _naming(disk):
        target.require_packs(contents)
        present = contents.with_data()
        with place.overwriting(output.path, fd, disk):
            for first, count in runs(present, 0):
                end = min((first + count) * CHUNK, contents.size)
                blocks.write_zeros(fd, first * CHUNK, end - first * CHUNK, interrupt.check)
            _pour(target, contents, places(present), fd, sparse=False)


def _pour(
    target: RepositoryTarget,
    contents: ChunkList,
    places: Iterable[tuple[int, int]],
    fd: int,
    *,
    sparse: bool,
) -> None:
    """Write chunks, each at its place.

    Raises:
        DamagedError: one is missing or damaged.
        StorageError: the repository cannot be read.
        OSError: the output cannot be written.
    """
    stream = _Stream(contents, places, fd, sparse=sparse)
    read_blobs(target.repository, stream.wanted(), stream.deliver)
    stream.finish()


class _Stream:
    """Tells which chunks are wanted, and writes each wherever it belongs.

    The places of a chunk are noted before it is asked for, and it is asked for once for each: so the
    reader, which leaves out what it has been asked for just before, delivers it at least once after
    the last place was noted, and memory holds only places of what is under way. Where a chunk stands
    very often, the thread that asks, which looks at signals, writes it.
    """

    def __init__(
        self, contents: ChunkList, places: Iterable[tuple[int, int]], fd: int, *, sparse: bool
    ) -> None:
        self._contents = contents
        self._places = places
        self._fd = fd
        self._sparse = sparse
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[int, int]]] = {}
        self._often = deque[tuple[bytes, list[tuple[int, int]]]]()

    def wanted(self) -> Iterator[tuple[BlobType, bytes]]:
        """The chunks to be read, in the order of their places."""
        for index, offset in self._places:
            self._write_often()
            chunk_id = self._contents.id_of(index)
            with self._lock:
                found = self._waiting.setdefault(chunk_id, [])
                found.append((offset, self._contents.length_of(index)))
            yield BlobType.DATA, chunk_id

    def deliver(self, chunk_id: bytes, data: bytes) -> None:
        """Write a chunk to all places where it is waited for; from any thread."""
        with self._lock:
            found = self._waiting.pop(chunk_id, [])
        if any(length != len(data) for _, length in found):
            raise DamagedError(
                f"The chunk {chunk_id.hex()} has {len(data)} bytes, which is wrong.", HINT
            )
        for offset, _ in found[:_AT_ONCE]:
            self._write(data, offset)
        if len(found) > _AT_ONCE:
            self._often.append((data, found[_AT_ONCE:]))

    def _write_often(self) -> None:
        while self._often:
            data, found = self._often.popleft()
            for offset, _ in found:
                interrupt.check()
                self._write(data, offset)

    def _write(self, data: bytes, offset: int) -> None:
        if self._sparse:
            self._write_data(data, offset)
        else:
            blocks.write(self._fd, data, offset)
        blocks.start_writeback(self._fd, offset, len(data))

    def _write_data(self, data: bytes, offset: int) -> None:
        """Write all of a chunk but its longer zeros, into a file that reads as zeros there."""
        view = memoryview(data)
        start = 0
        for at in range(0, len(data), _PIECE):
            if data.startswith(_ZEROS, at):
                blocks.write(self._fd, view[start:at], offset + start)
                start = at + _PIECE
        blocks.write(self._fd, view[start:], offset + start)

    def finish(self) -> None:
        """Write what is left; then nothing is waited for any more.

        Raises:
            DamagedError: something is.
        """
        self._write_often()
        if self._waiting:
            name = next(iter(self._waiting)).hex()
            raise DamagedError(f"The chunk {name} did not arrive.", HINT)
