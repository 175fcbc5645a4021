# SPDX-License-Identifier: Apache-2.0
"""Making tables: out of what index files say, and out of other tables. See `table` for what is in one.

index files ──► Collector ──► table ┐
index files ──► Collector ──► table ┼─ merge ──► table
                         old tables ┘
"""

import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from qmpbackup.durable import write_all
from qmpbackup.restic.index.table import (
    A_PART,
    MAGIC,
    MOST_BITS,
    PACK,
    RECORD,
    ROW,
    TRAILER,
    TREE,
    WORDS,
    Table,
    first_id,
)
from qmpbackup.restic.pack import PackedBlob

_A_BUCKET: Final = 32
_DROPPED: Final = 0xFFFF_FFFF


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
                row = len(self._packs) // PACK.size
                self._packs += PACK.pack(bytes.fromhex(pack), len(self._files))
                rows = (row, row | TREE)
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


def merge(fd: int, repository: bytes, sources: Mapping[Table, frozenset[bytes]]) -> None:
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
    bits = min(out.bits, (count // A_PART).bit_length())
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
    source: Table, keep: frozenset[bytes], files: list[bytes], packs: bytearray
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
            new.append(len(packs) // PACK.size)
            packs += PACK.pack(pack, numbers[file])
        else:
            new.append(_DROPPED)
    return new


def _moved(data: bytes, rows: "array[int]") -> bytes:
    """Records with their packs' new rows; those of dropped packs are left out."""
    moved = bytearray(data)
    words = memoryview(moved).cast("I")
    old = words[ROW::WORDS].tolist()
    new = [rows[row & ~TREE] for row in old]
    if _DROPPED in new:
        kept = (i * RECORD.size for i, row in enumerate(new) if row != _DROPPED)
        return _moved(b"".join(data[i : i + RECORD.size] for i in kept), rows)
    typed = array("I", [n | (o & TREE) for n, o in zip(new, old, strict=True)])
    words[ROW::WORDS] = memoryview(typed)
    return bytes(moved)


class _Output:
    """A file of places being written, in the order of ids."""

    def __init__(self, fd: int, count: int) -> None:
        """`count` is about how many records will come."""
        self.bits = min(MOST_BITS, (count // _A_BUCKET).bit_length())
        self._fd = fd
        self._starts = array("I", [0])
        self._checks = array("I")

    def write(self, prefix: int, bits: int, records: list[bytes]) -> None:
        """Write the sorted records of all ids whose first `bits` bits are `prefix`."""
        shift = self.bits - bits
        first = 0
        pieces = []
        for bucket in range(prefix << shift, (prefix + 1) << shift):
            end = bisect_left(records, first_id(bucket + 1, self.bits), first)
            pieces.append(b"".join(records[first:end]))
            self._checks.append(zlib.crc32(pieces[-1]))
            self._starts.append(self._starts[-1] + end - first)
            first = end
        write_all(self._fd, pieces)

    def finish(self, repository: bytes, files: list[bytes], packs: bytearray) -> None:
        """Write what comes behind the records."""
        parts = (b"".join(files), bytes(packs), self._starts.tobytes(), self._checks.tobytes())
        check = 0
        for part in parts:
            check = zlib.crc32(part, check)
            write_all(self._fd, [part])
        count = len(packs) // PACK.size
        trailer = (MAGIC, repository, len(files), count, self.bits, check, self._starts[-1])
        write_all(self._fd, [TRAILER.pack(*trailer)])
