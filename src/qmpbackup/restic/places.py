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
in the machine's own order: the files never leave it. Knows nothing of folders and storages.
"""

import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self

from qmpbackup.restic.pack import EMPTY_PACK, BlobType, PackedBlob, entry_size

RECORD: Final = struct.Struct("=32sIIII")
_PACK: Final = struct.Struct("=32sI")
_TRAILER: Final = struct.Struct("=8s32sIIIIQ")
_MAGIC: Final = b"qmpbplc1"
_ID: Final = 32
_WORDS: Final = RECORD.size // 4
_ROW: Final = _ID // 4
_TREE: Final = 1 << 31
_A_BUCKET: Final = 32
_MOST_BITS: Final = 24
_A_PART: Final = 16_384
_DROPPED: Final = 0xFFFF_FFFF


class Unusable(Exception):
    """The file is not what was written, or cannot be read."""


class Place(NamedTuple):
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


class Places:
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
        if size < _TRAILER.size:
            raise Unusable("it is too short")
        trailer = self._read(size - _TRAILER.size, _TRAILER.size)
        magic, owner, files, packs, bits, crc, records = _TRAILER.unpack(trailer)
        if magic != _MAGIC or owner != repository or bits > _MOST_BITS:
            raise Unusable("it is another kind of file")
        lengths = (files * _ID, packs * _PACK.size, 4 * ((1 << bits) + 1), 4 << bits)
        footer = records * RECORD.size
        if footer + sum(lengths) + _TRAILER.size != size:
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

    def find(self, type_: BlobType, id_: bytes) -> Iterator[Place]:
        """All places of a blob.

        Raises:
            Unusable: the file is damaged there.
        """
        data = self._bucket(int.from_bytes(id_[:4], "big") >> (32 - self._bits))
        for _, row, offset, length, raw_length in _records_of(data, id_):
            if row >> 31 == type_:
                at = self._packs_at + (row & ~_TREE) * _PACK.size
                pack, _ = _PACK.unpack(self._read(at, _PACK.size))
                yield Place(pack, offset, length, raw_length)

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
            first = bisect_left(ids, _start(prefix, bits), key=lambda i: data[i : i + _ID])
            end = bisect_left(ids, _start(prefix + 1, bits), key=lambda i: data[i : i + _ID])
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
            data = self._read(self._packs_at + first * _PACK.size, count * _PACK.size)
            yield from _PACK.iter_unpack(data)

    def pack_sizes(self) -> Iterator[PackSize]:
        """Its packs, each with the bytes that it has if it is made of the blobs here.

        Raises:
            Unusable: the file is damaged.
        """
        sizes = array("Q", [EMPTY_PACK]) * self._packs
        for prefix in self._parts():
            words = memoryview(self.checked_records(*prefix)).cast("I")
            columns = (words[column::_WORDS] for column in (_ROW, _ROW + 2, _ROW + 3))
            for row, length, raw_length in zip(*columns, strict=True):
                sizes[row & ~_TREE] += length + entry_size(raw_length)
        for row, (pack, _) in enumerate(self.packs()):
            yield PackSize(pack, sizes[row])

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Prefixes, each with its bits, that cut the records into parts of a moderate size."""
        bits = min(self._bits, (self.count // _A_PART).bit_length())
        return ((prefix, bits) for prefix in range(1 << bits))

    def _read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise Unusable(str(error)) from error
        if len(data) != length:
            raise Unusable("it is too short")
        return data


class Collector:
    """Takes what index files say, in memory, until it is written into a file of places."""

    def __init__(self) -> None:
        self._files: list[bytes] = []
        self._packs = bytearray()
        self._records: list[bytes] = []

    @property
    def files(self) -> tuple[bytes, ...]:
        """Ids of the index files in it."""
        return tuple(self._files)

    @property
    def count(self) -> int:
        """Records in it; each takes about 100 bytes of memory."""
        return len(self._records)

    def add(self, name: bytes, packs: Iterable[tuple[str, Sequence[PackedBlob]]]) -> None:
        """Take an index file's content; if `packs` raises, nothing of it is taken."""
        kept = len(self._packs), len(self._records)
        try:
            for pack, blobs in packs:
                row = len(self._packs) // _PACK.size
                self._packs += _PACK.pack(bytes.fromhex(pack), len(self._files))
                rows = (row, row | _TREE)
                self._records += [
                    RECORD.pack(b.id, rows[b.type], b.offset, b.length, b.raw_length) for b in blobs
                ]
        except BaseException:
            del self._packs[kept[0] :]
            del self._records[kept[1] :]
            raise
        self._files.append(name)

    def write(self, fd: int, repository: bytes) -> None:
        """Write it all into an empty file.

        Raises:
            OSError: it cannot be written.
        """
        self._records.sort()
        out = _Output(fd, len(self._records))
        out.write(0, 0, self._records)
        out.finish(repository, self._files, self._packs)


def merge(fd: int, repository: bytes, sources: Mapping[Places, frozenset[bytes]]) -> None:
    """Write into an empty file what the sources have of the index files named with each.

    Memory does not depend on the number of blobs, but for 36 bytes a pack.

    Raises:
        Unusable: a source is damaged.
        OSError: the file cannot be written.
    """
    files: list[bytes] = []
    packs = bytearray()
    rows = [(source, _take_packs(source, keep, files, packs)) for source, keep in sources.items()]
    count = sum(source.count for source in sources)
    out = _Output(fd, count)
    bits = min(out.bits, (count // _A_PART).bit_length())
    for prefix in range(1 << bits):
        parts = [_moved(source.checked_records(prefix, bits), new) for source, new in rows]
        records = [
            part[i : i + RECORD.size] for part in parts for i in range(0, len(part), RECORD.size)
        ]
        if len(rows) > 1:
            records.sort()
        out.write(prefix, bits, records)
    out.finish(repository, files, packs)


def _take_packs(
    source: Places, keep: frozenset[bytes], files: list[bytes], packs: bytearray
) -> "array[int]":
    """Add a source's packs to the tables; returns the new row of each, or `_DROPPED`."""
    numbers = {}
    for row, name in enumerate(source.files):
        if name in keep:
            numbers[row] = len(files)
            files.append(name)
    new: array[int] = array("I")
    for pack, file in source.packs():
        if file in numbers:
            new.append(len(packs) // _PACK.size)
            packs += _PACK.pack(pack, numbers[file])
        else:
            new.append(_DROPPED)
    return new


def _moved(data: bytes, rows: "array[int]") -> bytes:
    """Records with their packs' new rows; those of dropped packs are left out."""
    moved = bytearray(data)
    words = memoryview(moved).cast("I")
    old = words[_ROW::_WORDS].tolist()
    new = [rows[row & ~_TREE] for row in old]
    if _DROPPED in new:
        kept = (i * RECORD.size for i, row in enumerate(new) if row != _DROPPED)
        return _moved(b"".join(data[i : i + RECORD.size] for i in kept), rows)
    typed = array("I", [n | (o & _TREE) for n, o in zip(new, old, strict=True)])
    words[_ROW::_WORDS] = memoryview(typed)
    return bytes(moved)


class _Output:
    """A file of places being written, in the order of ids."""

    def __init__(self, fd: int, count: int) -> None:
        """`count` is about how many records will come."""
        self.bits = min(_MOST_BITS, (count // _A_BUCKET).bit_length())
        self._fd = fd
        self._starts = array("I", [0])
        self._checks = array("I")

    def write(self, prefix: int, bits: int, records: list[bytes]) -> None:
        """Write the sorted records of all ids whose first `bits` bits are `prefix`."""
        shift = self.bits - bits
        first = 0
        pieces = []
        for bucket in range(prefix << shift, (prefix + 1) << shift):
            end = bisect_left(records, _start(bucket + 1, self.bits), first)
            pieces.append(b"".join(records[first:end]))
            self._checks.append(zlib.crc32(pieces[-1]))
            self._starts.append(self._starts[-1] + end - first)
            first = end
        _write(self._fd, b"".join(pieces))

    def finish(self, repository: bytes, files: list[bytes], packs: bytearray) -> None:
        """Write what comes behind the records."""
        parts = (b"".join(files), bytes(packs), self._starts.tobytes(), self._checks.tobytes())
        check = 0
        for part in parts:
            check = zlib.crc32(part, check)
            _write(self._fd, part)
        count = len(packs) // _PACK.size
        trailer = (_MAGIC, repository, len(files), count, self.bits, check, self._starts[-1])
        _write(self._fd, _TRAILER.pack(*trailer))


def _records_of(data: bytes, id_: bytes) -> list[tuple[bytes, int, int, int, int]]:
    """The records of one blob among others."""
    found = []
    position = data.find(id_)
    while position >= 0:
        if position % RECORD.size == 0:
            found.append(RECORD.unpack_from(data, position))
        position = data.find(id_, position + 1)
    return found


def _start(prefix: int, bits: int) -> bytes:
    """What sorts before all ids with these first bits, and behind all below them."""
    if prefix >> bits:
        return b"\xff" * (_ID + 1)
    return (prefix << (32 - bits)).to_bytes(4, "big")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
