# SPDX-License-Identifier: Apache-2.0
"""A new qcow2 file whose contents are known beforehand: where everything goes, and its metadata.

    header │ refcount table │ L1 │ L2 tables │ refcount blocks │ data, in the guest's order

Once it is known which parts of a disk hold data, every byte of metadata follows, so data can be
written straight to its place, by as many threads as there are and without QEMU. What holds no data
takes no room. Format: docs/interop/qcow2.txt of QEMU (version 3, 64 KiB clusters, 16-bit refcounts).
"""

import os
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Final

CLUSTER: Final = 64 * 1024
"""Bytes of a cluster of every image of ours. A view's filter copies in units of its scratch's: larger ones
make the guest's first writes slower."""

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC: Final = b"QFI\xfb"
_CLUSTER_BITS: Final = 16
_REFCOUNT_ORDER: Final = 4
_ENTRIES: Final = CLUSTER // 8
"""Entries of an L2 table."""
_SPAN: Final = _ENTRIES * CLUSTER
"""Bytes of the disk that one L2 table maps."""
_COUNTS: Final = CLUSTER // 2
"""Refcounts in one block."""
_COPIED: Final = 1 << 63
"""Set in entries whose cluster has exactly one user."""


class Layout:
    """Where everything lies in a new image.

    The disk is looked at in chunks of a fixed size, a multiple of the cluster size that divides 512
    MiB; the last may be short. `present` has one byte a chunk: 1 for those that hold data, whose
    first lies at `data_at` and whose others follow without gaps. The file ends at `length`.
    """

    def __init__(self, size: int, chunk: int, present: bytes | bytearray) -> None:
        if chunk % CLUSTER or _SPAN % chunk or len(present) != -(-size // chunk):
            raise ValueError("chunks must be made of clusters, and be as many as the disk has")
        self._size = size
        self._chunk = chunk
        self._present = present
        last = _clusters(size - (len(present) - 1) * chunk) if present and present[-1] else 0
        full = present.count(1) - bool(last)
        data = full * (chunk // CLUSTER) + last
        self._l1_size = -(-size // _SPAN)
        self._tables = sum(1 for _ in self._used())
        before = 1 + _clusters(self._l1_size * 8) + self._tables
        self._blocks, table = _refcounts(before + data)
        self._table_at = CLUSTER
        self._l1_at = self._table_at + table * CLUSTER
        self._l2_at = self._l1_at + _clusters(self._l1_size * 8) * CLUSTER
        self._blocks_at = self._l2_at + self._tables * CLUSTER
        self.data_at = self._blocks_at + self._blocks * CLUSTER
        self.length = self.data_at + data * CLUSTER

    def write_metadata(self, fd: int) -> None:
        """Make an open file as long as it will be, and write everything that is no data.

        Raises:
            OSError: it could not be written.
        """
        os.ftruncate(fd, self.length)
        l1 = array("Q", bytes(8 * self._l1_size))
        table_at, data_at = self._l2_at, self.data_at
        for number in self._used():
            l1[number] = table_at | _COPIED
            table, data_at = self._table(number, data_at)
            _write(fd, _big_endian(table), table_at)
            table_at += CLUSTER
        _write(fd, _big_endian(l1), self._l1_at)
        self._write_refcounts(fd)
        counts = (self._l1_at - self._table_at) // CLUSTER
        head = header(
            self._size,
            l1_at=self._l1_at,
            l1_size=self._l1_size,
            counts_at=self._table_at,
            counts=counts,
        )
        _write(fd, head, 0)

    def _used(self) -> Iterator[int]:
        """Numbers of the L2 tables that map anything."""
        step = _SPAN // self._chunk
        for number in range(self._l1_size):
            if self._present.find(1, number * step, (number + 1) * step) >= 0:
                yield number

    def _table(self, number: int, data_at: int) -> "tuple[array[int], int]":
        """An L2 table whose first data lies at `data_at`, and where the next one's does."""
        chunks = _SPAN // self._chunk
        entries = self._chunk // CLUSTER
        table = array("Q", bytes(CLUSTER))
        for at in range(min(chunks, len(self._present) - number * chunks)):
            index = number * chunks + at
            if self._present[index]:
                count = min(entries, _clusters(self._size - index * self._chunk))
                end = data_at + count * CLUSTER
                places = range(data_at | _COPIED, end | _COPIED, CLUSTER)
                table[at * entries : at * entries + count] = array("Q", places)
                data_at = end
        return table, data_at

    def _write_refcounts(self, fd: int) -> None:
        end = self._blocks_at + self._blocks * CLUSTER
        places = array("Q", range(self._blocks_at, end, CLUSTER))
        _write(fd, _big_endian(places), self._table_at)
        left = self.length // CLUSTER
        for place in places:
            used = min(left, _COUNTS)
            _write(fd, b"\0\1" * used, place)
            left -= used


def header(size: int, *, l1_at: int, l1_size: int, counts_at: int, counts: int = 1) -> bytes:
    """The header of an image that builds on nothing; `counts` clusters at `counts_at` are the table of
    its refcounts."""
    return _HEADER.pack(
        _MAGIC,
        3,
        *(0, 0),  # no backing file
        _CLUSTER_BITS,
        size,
        0,  # not encrypted
        l1_size,
        l1_at,
        counts_at,
        counts,
        *(0, 0),  # no snapshots
        *(0, 0, 0),  # no features
        _REFCOUNT_ORDER,
        _HEADER.size,
    )


def _clusters(length: int) -> int:
    return -(-length // CLUSTER)


def _refcounts(others: int) -> tuple[int, int]:
    """How many blocks of refcounts, and clusters of their table, a file with so many other clusters
    has; they count themselves."""
    blocks, table = 1, 1
    while True:
        needed = -(-(others + blocks + table) // _COUNTS)
        if needed <= blocks and _clusters(needed * 8) <= table:
            return blocks, table
        blocks, table = max(blocks, needed), max(table, _clusters(needed * 8))


def _big_endian(numbers: "array[int]") -> bytes:
    if sys.byteorder == "little":
        numbers.byteswap()
    data = numbers.tobytes()
    if sys.byteorder == "little":
        numbers.byteswap()
    return data


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
