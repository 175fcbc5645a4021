# SPDX-License-Identifier: Apache-2.0
"""Sorted, immutable files of places: which blob lies where, for more blobs than fit in memory.

A file holds what some index files say. It is read by `pread`, never mapped, so what was looked at
does not count as our memory:

    records     48 bytes each, sorted: id (32), pack's row and type, offset, length, raw length
    files       ids of the index files that are in it
    packs       ids of packs, each with the row of its index file
    buckets     for each value of an id's first bits: where its records begin, and their CRC-32
    trailer     what it is, its repository, how many of each, CRC-32 of all from `files` on

Whatever is not as it was written shows by a CRC, so files need neither fsync nor trust. Numbers are
in the machine's own order: the files never leave it. `making` makes them. Knows nothing of folders and
storages.
"""

import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Self

from qmpbackup.restic.pack import EMPTY_PACK, BlobType, PackedBlob, entry_size

RECORD: Final = struct.Struct("=32sIIII")
PACK: Final = struct.Struct("=32sI")
TRAILER: Final = struct.Struct("=8s32sIIIIQ")
MAGIC: Final = b"qmpbplc1"
_ID: Final = 32
WORDS: Final = RECORD.size // 4
ROW: Final = _ID // 4
TREE: Final = 1 << 31
MOST_BITS: Final = 24
A_PART: Final = 16_384


class Unusable(Exception):
    """The file is not what was written, or cannot be read."""


class Spot(NamedTuple):
    """Where a blob lies: id of the pack, and the place in it as in `PackedBlob`."""

    pack: bytes
    offset: int
    length: int
    raw_length: int

    def packed(self, type_: BlobType, id_: bytes) -> PackedBlob:
        """The same as an entry of the pack."""
        return PackedBlob(type_, id_, self.offset, self.length, self.raw_length)


class PackSize(NamedTuple):
    """How long a pack is by an index."""

    pack: bytes
    size: int

    def compact(self) -> bytes:
        """The same in 40 bytes, for large sets."""
        return self.pack + self.size.to_bytes(8, "big")

    @classmethod
    def of(cls, compact: bytes) -> Self:
        """What `compact` returned, again."""
        return cls(compact[:_ID], int.from_bytes(compact[_ID:], "big"))


class Table:
    """One file of places. Any thread may look up."""

    def __init__(self, fd: int, repository: bytes) -> None:
        """Take over an open file.

        Raises:
            Unusable: it is no such file of this repository; the descriptor is closed.
        """
        self._fd = fd
        self.count: int = 0
        """Records in it."""
        self.files: tuple[bytes, ...] = ()
        """Ids of the index files in it."""
        try:
            self._load(repository)
        except BaseException:
            self.close()
            raise

    def _load(self, repository: bytes) -> None:
        size = os.fstat(self._fd).st_size
        if size < TRAILER.size:
            raise Unusable("it is too short")
        trailer = self._read(size - TRAILER.size, TRAILER.size)
        magic, owner, files, packs, bits, crc, records = TRAILER.unpack(trailer)
        if magic != MAGIC or owner != repository or bits > MOST_BITS:
            raise Unusable("it is another kind of file")
        lengths = (files * _ID, packs * PACK.size, 4 * ((1 << bits) + 1), 4 << bits)
        footer = records * RECORD.size
        if footer + sum(lengths) + TRAILER.size != size:
            raise Unusable("it has a wrong length")
        self._packs_at = footer + lengths[0]
        self._packs: int = packs
        self._bits: int = bits
        self.count = records
        check = 0
        parts = []
        for length in lengths:
            parts.append(self._read(footer, length))
            check = zlib.crc32(parts[-1], check)
            footer += length
        if check != crc:
            raise Unusable("its tables are damaged")
        self.files = tuple(parts[0][i : i + _ID] for i in range(0, lengths[0], _ID))
        self._starts, self._checks = array("I", parts[2]), array("I", parts[3])

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # Threads may still look up in files that were replaced: the last of them closes.
        self.close()

    def has(self, type_: BlobType, id_: bytes) -> bool:
        """Whether a blob is in it.

        Raises:
            Unusable: the file is damaged there.
        """
        return not self.absent(type_, (id_,))

    def absent(self, type_: BlobType, ids: Iterable[bytes]) -> list[bytes]:
        """Which of the blobs are not in it; asking for sorted ids together saves reading twice.

        Raises:
            Unusable: the file is damaged there.
        """
        shift = 32 - self._bits
        bucket = -1
        data = b""
        found: list[bytes] = []
        for id_ in ids:
            number = int.from_bytes(id_[:4], "big") >> shift
            if number != bucket:
                bucket, data = number, self._bucket(number)
            if not any(type_ == record[1] >> 31 for record in _records_of(data, id_)):
                found.append(id_)
        return found

    def find(self, type_: BlobType, id_: bytes) -> Iterator[Spot]:
        """All places of a blob.

        Raises:
            Unusable: the file is damaged there.
        """
        data = self._bucket(int.from_bytes(id_[:4], "big") >> (32 - self._bits))
        for _, row, offset, length, raw_length in _records_of(data, id_):
            if row >> 31 == type_:
                at = self._packs_at + (row & ~TREE) * PACK.size
                pack, _ = PACK.unpack(self._read(at, PACK.size))
                yield Spot(pack, offset, length, raw_length)

    def _bucket(self, bucket: int) -> bytes:
        data = self.records(self._starts[bucket], self._starts[bucket + 1])
        if zlib.crc32(data) != self._checks[bucket]:
            raise Unusable("its records are damaged")
        return data

    def records(self, first: int, end: int) -> bytes:
        """The records of these numbers.

        Raises:
            Unusable: the file is too short, or cannot be read.
        """
        return self._read(first * RECORD.size, max(0, end - first) * RECORD.size)

    def checked_records(self, prefix: int, bits: int) -> bytes:
        """The records of all ids whose first `bits` bits are `prefix`.

        Raises:
            Unusable: the file is damaged there.
        """
        if bits > self._bits:
            data = self._bucket(prefix >> (bits - self._bits))
            ids = range(0, len(data), RECORD.size)
            first = bisect_left(ids, first_id(prefix, bits), key=lambda i: data[i : i + _ID])
            end = bisect_left(ids, first_id(prefix + 1, bits), key=lambda i: data[i : i + _ID])
            return data[first * RECORD.size : end * RECORD.size]
        shift = self._bits - bits
        buckets = range(prefix << shift, (prefix + 1) << shift)
        base = self._starts[buckets.start]
        data = self.records(base, self._starts[buckets.stop])
        view = memoryview(data)
        for bucket in buckets:
            first, end = self._starts[bucket] - base, self._starts[bucket + 1] - base
            if zlib.crc32(view[first * RECORD.size : end * RECORD.size]) != self._checks[bucket]:
                raise Unusable("its records are damaged")
        return data

    def intact(self) -> bool:
        """Whether all of it is as it was written."""
        try:
            for prefix in self._parts():
                self.checked_records(*prefix)
        except Unusable:
            return False
        return True

    def packs(self) -> Iterator[tuple[bytes, int]]:
        """Ids of its packs, each with the row of its index file in `files`, by their own rows.

        Raises:
            Unusable: the file cannot be read.
        """
        step = 4096
        for first in range(0, self._packs, step):
            count = min(step, self._packs - first)
            data = self._read(self._packs_at + first * PACK.size, count * PACK.size)
            yield from PACK.iter_unpack(data)

    def pack_sizes(self) -> Iterator[PackSize]:
        """Its packs, each with the bytes that it has if it is made of the blobs here.

        Raises:
            Unusable: the file is damaged.
        """
        sizes = array("Q", [EMPTY_PACK]) * self._packs
        for prefix in self._parts():
            words = memoryview(self.checked_records(*prefix)).cast("I")
            columns = (words[column::WORDS] for column in (ROW, ROW + 2, ROW + 3))
            for row, length, raw_length in zip(*columns, strict=True):
                sizes[row & ~TREE] += length + entry_size(raw_length)
        for row, (pack, _) in enumerate(self.packs()):
            yield PackSize(pack, sizes[row])

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Prefixes, each with its bits, that cut the records into parts of a moderate size."""
        bits = min(self._bits, (self.count // A_PART).bit_length())
        return ((prefix, bits) for prefix in range(1 << bits))

    def _read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise Unusable(str(error)) from error
        if len(data) != length:
            raise Unusable("it is too short")
        return data


def _records_of(data: bytes, id_: bytes) -> list[tuple[bytes, int, int, int, int]]:
    """The records of one blob among others."""
    found = []
    position = data.find(id_)
    while position >= 0:
        if position % RECORD.size == 0:
            found.append(RECORD.unpack_from(data, position))
        position = data.find(id_, position + 1)
    return found


def first_id(prefix: int, bits: int) -> bytes:
    """What sorts before all ids with these first bits, and behind all below them."""
    if prefix >> bits:
        return b"\xff" * (_ID + 1)
    return (prefix << (32 - bits)).to_bytes(4, "big")
