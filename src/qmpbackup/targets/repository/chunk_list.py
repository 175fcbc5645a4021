# SPDX-License-Identifier: Apache-2.0
"""A disk in a repository: the list of its chunks, which of them are zeros, and where the others go.

Pure. Must not know the repository that holds the chunks, nor where the data goes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1024 * 1024
"""Bytes of a chunk, aligned. docs/explanation/restic.md says why, with the measurements."""

ID = 32
"""Bytes of a chunk's id."""

_RUN = 1024
"""Ids that are looked at at once where they are all alike."""

MOST_BYTES = 30 << 40
"""Bytes of all disks of a point: the lists of their chunks make up one tree, which ends at 2 GiB."""


def count_chunks(size: int) -> int:
    """How many chunks a disk of so many bytes has; the last may be short."""
    return -(-size // CHUNK)


@dataclass(frozen=True, slots=True)
class ChunkList:
    """A disk in a repository: its size, and the ids of its chunks one after the other."""

    size: int
    chunks: bytes

    @property
    def digest(self) -> str:
        """What a manifest says of it: the hash of its list of chunks."""
        from blake3 import blake3

        return f"blake3:{blake3(self.chunks).hexdigest()}"

    @property
    def is_whole(self) -> bool:
        """Whether the list is as long as the disk."""
        return len(self.chunks) == ID * count_chunks(self.size)

    def length_of(self, index: int) -> int:
        """Bytes of a chunk; the last may be short."""
        return min(CHUNK, self.size - index * CHUNK)

    def id_of(self, index: int) -> bytes:
        """The id of a chunk."""
        return self.chunks[ID * index : ID * (index + 1)]

    def ids(self) -> Iterator[bytes]:
        """The ids of all chunks, in order."""
        return (self.chunks[at : at + ID] for at in range(0, len(self.chunks), ID))

    def distinct(self) -> Iterator[bytes]:
        """Every id at least once. Long runs of one id, as of zeros, are passed over at once."""
        for start in range(0, len(self.chunks), _RUN * ID):
            block = self.chunks[start : start + _RUN * ID]
            if block == block[:ID] * (len(block) // ID):
                yield block[:ID]
            else:
                yield from ChunkList(0, block).ids()

    def with_data(self) -> bytearray:
        """The map of the chunks that are not all zeros: one byte for each, 1 where it holds data."""
        zeros = hashlib.sha256(bytes(CHUNK)).digest()
        count = len(self.chunks) // ID
        found = bytearray(self.id_of(index) != zeros for index in range(count))
        if count:
            short = hashlib.sha256(bytes(self.length_of(count - 1))).digest()
            found[-1] = self.id_of(count - 1) != short
        return found


def numbers(present: bytearray) -> Iterator[int]:
    """The numbers of the chunks with data."""
    index = present.find(1)
    while index >= 0:
        yield index
        index = present.find(1, index + 1)


def places(
    present: bytearray, first: int = 0, *, packed: bool = False
) -> Iterator[tuple[int, int]]:
    """The chunks with data, each with its offset in an output: as on the disk, or without gaps from
    `first` on."""
    for number, index in enumerate(numbers(present)):
        yield index, first + CHUNK * (number if packed else index)
