# SPDX-License-Identifier: Apache-2.0
"""A disk in a repository, read at any offset: chunk by chunk, each proved by its code and its hash."""

import threading
from collections.abc import Iterator
from typing import Final

from qmpbackup.errors import DamagedError
from qmpbackup.restic.chunk_cache import ChunkCache
from qmpbackup.targets.interface import Extent
from qmpbackup.targets.repository.chunk_list import CHUNK, ChunkList

_FARTHEST: Final = 8
"""Chunks that are read ahead of somebody who reads on and on."""


class RepositoryImage:
    """See `StoredImage`. `present` has one byte for each chunk, 1 where it is not all zeros.

    Whoever reads one chunk after the other has the next ones read ahead: one, two, four, and so on.
    """

    def __init__(self, contents: ChunkList, present: bytes | bytearray, cache: ChunkCache) -> None:
        self.size = contents.size
        self._contents = contents
        self._present = present
        self._cache = cache
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
