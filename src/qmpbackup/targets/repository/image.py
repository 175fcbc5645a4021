# SPDX-License-Identifier: Apache-2.0
"""A disk in a repository, read at any offset: chunk by chunk, each proved by its code and its hash.

    read   out of a cache, with what comes next read ahead
    pour   chunks are read in threads, in the order of their packs, and each is written once it is proved

Nothing that is not proved is ever written, so a device that turns out to lack something holds right
bytes in part, and what it held before in the rest.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError
from qmpbackup.restic.chunk_cache import ChunkCache
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.reader import read_blobs
from qmpbackup.targets import blocks, pouring
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList
from qmpbackup.targets.repository.points import HINT, VmPoints
from qmpbackup.targets.stored_image import Extent, Sink

_FARTHEST: Final = 8
"""Chunks that are read ahead of somebody who reads on and on."""

_AT_ONCE: Final = 64
"""Places that a chunk is written to before signals are looked at."""


class RepositoryImage:
    """See `StoredImage`; `name` is what messages call the disk.

    Whoever reads one chunk after the other has the next ones read ahead: one, two, four, and so on.
    """

    def __init__(self, target: VmPoints, contents: ChunkList, cache: ChunkCache, name: str) -> None:
        self.size = contents.size
        self._target = target
        self._contents = contents
        self._present = contents.with_data()
        self._cache = cache
        self._name = name
        self._lock = threading.Lock()
        self._last = -1
        self._ahead = 0

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """Runs of chunks with and without data."""
        while start < end:
            index = start // CHUNK
            kind = self._present[index]
            other = self._present.find(1 - kind, index, -(-end // CHUNK))
            stop = end if other < 0 else min(end, other * CHUNK)
            yield Extent(start, stop - start, not kind)
            start = stop

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes, proved."""
        self._read_ahead(offset // CHUNK, (offset + length - 1) // CHUNK)
        return _joined([self._part(at, size) for at, size in _parts(offset, length)])

    def peek(self, offset: int, length: int) -> bytes | memoryview | None:
        """The bytes, if they are zeros or in the cache."""
        index = offset // CHUNK
        if (offset + length - 1) // CHUNK != index:
            return None
        if not self._present[index]:
            return bytes(length)
        found = self._cache.peek(self._id(index))
        return None if found is None else self._within(index, found, offset % CHUNK, length)

    def needs(self, format_: str) -> int:
        """At most: zeros within chunks are left out."""
        del format_  # metadata is in proportion, and small
        return min(self.size, self._present.count(1) * CHUNK)

    def pour(self, sink: Sink) -> None:
        """Read every chunk that is not zeros, and write it wherever the list has it."""
        with naming(self._name):
            if sink.is_device:
                self._target.repository.settle_lock()
                self._target.require_packs(self._contents)
            with sink.writing():
                places = pouring.laid_out(sink, self.size, CHUNK, self._present)
                stream = _Stream(self._contents, places, sink)
                read_blobs(self._target.repository, stream.wanted(), stream.deliver)
                stream.finish()
            self._target.repository.settle_lock()

    def _part(self, offset: int, length: int) -> bytes | memoryview:
        """Bytes within one chunk."""
        index, start = divmod(offset, CHUNK)
        if not self._present[index]:
            return bytes(length)
        return self._within(index, self._cache.get(self._id(index)), start, length)

    def _within(self, index: int, chunk: bytes, start: int, length: int) -> memoryview:
        """Part of a chunk, which must have the length that it has on the disk."""
        if len(chunk) != self._contents.length_of(index):
            raise DamagedError(
                f"The chunk {self._id(index).hex()} has {len(chunk)} bytes, which is wrong.",
                'Run "restic check --read-data".',
            )
        return memoryview(chunk)[start : start + length]

    def _id(self, index: int) -> bytes:
        return self._contents.id_of(index)

    def _read_ahead(self, first: int, last: int) -> None:
        with self._lock:
            if first > self._last + self._ahead + 1 or last < self._last:
                self._ahead = 0
            elif last > self._last:
                self._ahead = min(_FARTHEST, 2 * self._ahead or 1)
            self._last = last
            ahead = self._ahead
        if ahead:
            end = min(last + 1 + ahead, len(self._present))
            self._cache.ahead(
                self._id(index) for index in range(last + 1, end) if self._present[index]
            )


def _parts(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """A range, cut at the borders of chunks."""
    end = offset + length
    while offset < end:
        size = min(end, (offset // CHUNK + 1) * CHUNK) - offset
        yield offset, size
        offset += size


def _joined(parts: list[bytes | memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def naming(disk_id: str) -> Iterator[None]:
    """Name the disk in what is said about damage."""
    try:
        yield
    except DamagedError as error:
        if error.message.startswith(f"Disk {disk_id} "):
            raise
        raise DamagedError(f"Disk {disk_id}: {error.message}", error.hint) from error


class _Stream:
    """Tells which chunks are wanted, and writes each wherever it belongs.

    The places of a chunk are noted before it is asked for, and it is asked for once for each: so the
    reader, which leaves out what it has been asked for just before, delivers it at least once after
    the last place was noted, and memory holds only places of what is under way. Where a chunk stands
    very often, the thread that asks, which looks at signals, writes it.
    """

    def __init__(self, contents: ChunkList, places: Iterable[tuple[int, int]], sink: Sink) -> None:
        self._contents = contents
        self._places = places
        self._sink = sink
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
        pouring.write(self._sink, data, offset)
        blocks.start_writeback(self._sink.fd, offset, len(data))

    def finish(self) -> None:
        """Write what is left; then nothing is waited for any more.

        Raises:
            DamagedError: something is.
        """
        self._write_often()
        if self._waiting:
            name = next(iter(self._waiting)).hex()
            raise DamagedError(f"The chunk {name} did not arrive.", HINT)
