# SPDX-License-Identifier: Apache-2.0
"""Pouring an image of chunks into a file or a device: where each chunk goes, and what is written of it.

    raw file   │ hole, or chunk, at its place …                    zeros of a chunk are left out
    qcow2 file │ metadata │ the chunks with data, without gaps …   likewise
    device     │ zeros, or chunk, at its place …                   all is written

Knows descriptors; must not know where the bytes come from.
"""

import os
from collections.abc import Iterator
from typing import Final, Protocol

from qmpbackup import interrupt
from qmpbackup.images.qcow2 import read_header
from qmpbackup.images.qcow2_layout import Layout
from qmpbackup.plan.chunk_map import runs
from qmpbackup.targets import blocks
from qmpbackup.targets.stored_image import Extent, Sink

_PIECE: Final = 64 * 1024
"""Bytes of zeros within a chunk from which on they are left out of a file."""
_ZEROS: Final = bytes(_PIECE)


def laid_out(
    sink: Sink, size: int, chunk: int, present: bytes | bytearray
) -> Iterator[tuple[int, int]]:
    """Write everything of a sink but its data, and tell the chunks with data, each with its offset.

    `present` has one byte for each chunk: 1 where it holds data.

    Raises:
        OSError: it cannot be written.
        Interrupted: a signal is waiting.
    """
    if sink.is_device:
        for first, count in runs(present, 0):
            end = min((first + count) * chunk, size)
            blocks.write_zeros(sink.fd, first * chunk, end - first * chunk, interrupt.check)
    elif sink.format == "raw":
        os.ftruncate(sink.fd, size)
    else:
        layout = Layout(size, chunk, present)
        layout.write_metadata(sink.fd)
        return _places(present, chunk, layout.data_at)
    return _places(present, chunk)


def _places(
    present: bytes | bytearray, chunk: int, packed_at: int | None = None
) -> Iterator[tuple[int, int]]:
    """As on the disk, or without gaps from `packed_at` on."""
    number, index = 0, present.find(1)
    while index >= 0:
        yield index, chunk * index if packed_at is None else packed_at + chunk * number
        number, index = number + 1, present.find(1, index + 1)


def write(sink: Sink, data: bytes, offset: int) -> None:
    """Write a chunk: all of it, or all but its longer zeros where the sink reads as zeros anyway.

    Raises:
        OSError: it could not be written.
    """
    view = memoryview(data)
    if sink.is_device:
        blocks.write(sink.fd, view, offset)
        return
    start = 0
    for at in range(0, len(view), _PIECE):
        if data.startswith(_ZEROS, at):
            blocks.write(sink.fd, view[start:at], offset + start)
            start = at + _PIECE
    blocks.write(sink.fd, view[start:], offset + start)


class _Readable(Protocol):
    """What of a stored image is read here."""

    @property
    def size(self) -> int:
        """Its length."""

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What holds data."""

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """Its bytes."""


CHUNK: Final = 1024 * 1024
"""Bytes that are read at a time."""


def present_in(image: _Readable) -> bytearray:
    """The map of the chunks of an image that hold data, by its extents."""
    present = bytearray(-(-image.size // CHUNK))
    for extent in image.extents(0, image.size):
        if not extent.zero and extent.length:
            first, last = extent.offset // CHUNK, (extent.offset + extent.length - 1) // CHUNK
            present[first : last + 1] = b"\1" * (last + 1 - first)
    return present


def pour(image: _Readable, sink: Sink) -> None:
    """Pour by reading, one chunk after the other: for images that have no faster way.

    Raises:
        QmpBackupError: as `StoredImage.pour`.
    """
    present = present_in(image)
    with sink.writing():
        for index, offset in laid_out(sink, image.size, CHUNK, present):
            interrupt.check()
            start = index * CHUNK
            write(sink, bytes(image.read(start, min(CHUNK, image.size - start))), offset)


def size_of(fd: int, format_: str) -> int:
    """Bytes of the disk that a file of this format holds.

    Raises:
        DamagedError: it is none.
    """
    if format_ == "raw":
        return os.fstat(fd).st_size
    return read_header(fd, "The restored image").size
