# SPDX-License-Identifier: Apache-2.0
"""What the list of chunks of a disk in a repository says: which of them are zeros, where the others lie.

What restore and verify share. Knows lists and the index; must not know where the data goes.
"""

import hashlib
from collections.abc import Iterator

from qmpbackup.errors import DamagedError
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.storage.interface import Kind
from qmpbackup.targets.repository.target import CHUNK, ID, Contents, RepositoryTarget

HINT = 'Run "restic check --read-data" and see restic\'s manual on repairing repositories.'


def length_of(contents: Contents, index: int) -> int:
    """Bytes of a chunk; the last may be short."""
    return min(CHUNK, contents.size - index * CHUNK)


def id_of(contents: Contents, index: int) -> bytes:
    """The id of a chunk."""
    return contents.chunks[ID * index : ID * (index + 1)]


def with_data(contents: Contents) -> bytearray:
    """The map of the chunks that are not all zeros: one byte for each, 1 where it holds data."""
    zeros = hashlib.sha256(bytes(CHUNK)).digest()
    count = len(contents.chunks) // ID
    found = bytearray(id_of(contents, index) != zeros for index in range(count))
    if count:
        short = hashlib.sha256(bytes(length_of(contents, count - 1))).digest()
        found[-1] = id_of(contents, count - 1) != short
    return found


def require_packs(target: RepositoryTarget, contents: Contents) -> None:
    """See that the index names all chunks of a disk, and that the packs that it names are there.

    Raises:
        DamagedError: something is missing.
        StorageError: the repository cannot be read.
    """
    packs: dict[bytes, int] = {}
    for index in _numbers(with_data(contents)):
        place = target.repository.index.find(BlobType.DATA, id_of(contents, index))
        if place is None:
            name = id_of(contents, index).hex()
            raise DamagedError(f"Its chunk {name} is missing in the repository.", HINT)
        if place.packed(BlobType.DATA, b"").plain_length != length_of(contents, index):
            name = id_of(contents, index).hex()
            raise DamagedError(f"Its chunk {name} is not as long as it must be.", HINT)
        packs[place.pack] = max(packs.get(place.pack, 0), place.offset + place.length)
    for name, size in target.repository.storage.list(Kind.DATA):
        if size >= packs.get(bytes.fromhex(name), 0):
            packs.pop(bytes.fromhex(name), None)
    if packs:
        name = next(iter(packs)).hex()
        raise DamagedError(f"The pack {name} is missing or too short.", HINT)


def _numbers(present: bytearray) -> Iterator[int]:
    index = present.find(1)
    while index >= 0:
        yield index
        index = present.find(1, index + 1)


def places(
    present: bytearray, first: int = 0, *, packed: bool = False
) -> Iterator[tuple[int, int]]:
    """The chunks with data, each with its offset in an output: as on the disk, or without gaps from
    `first` on."""
    for number, index in enumerate(_numbers(present)):
        yield index, first + CHUNK * (number if packed else index)
