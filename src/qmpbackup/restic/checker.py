# SPDX-License-Identifier: Apache-2.0
"""Checking packs: what is not as it must be is told, and the check goes on.

    structure   the packs that the index names are there, as long as they must be
    content     every byte: a pack's hash is its name, its header is what the index says, every blob opens

Must not know what blobs are for. Whoever checks must be done with syncing the index.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.index.table import PackSize, Spot
from qmpbackup.restic.pack import EMPTY_PACK, PackedBlob, open_blob, read_header
from qmpbackup.restic.reader import REQUEST, Readable, joined, load_part
from qmpbackup.restic.storage.interface import Kind, Missing, Refused, Temporary
from qmpbackup.restic.threads import THREADS, in_threads


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be, in one pack."""

    pack: str
    what: str

    def __str__(self) -> str:
        return f"Pack {self.pack}: {self.what}"


def find_structure_problems(repository: Readable) -> Iterator[Problem]:
    """Compare the packs that the index names with those that are there, by names and lengths.

    Packs that no index names are no problem: what wrote them died before it named them.

    Raises:
        StorageError: the storage fails.
    """
    named = repository.index.packs()
    for name, size in repository.storage.list(Kind.DATA):
        named.discard(PackSize(bytes.fromhex(name), size).compact())
    if not named:
        return
    # Among these may be packs that one index names in part and another as a whole, or in two parts.
    odd = {PackSize.of(entry).pack for entry in named}
    listing = ((bytes.fromhex(name), size) for name, size in repository.storage.list(Kind.DATA))
    stored = {pack: size for pack, size in listing if pack in odd}
    everything = sorted(map(PackSize.of, repository.index.packs()))
    for pack, group in groupby(everything, key=lambda entry: entry.pack):
        if pack in odd:
            yield from _size_problems(pack, stored.get(pack), [entry.size for entry in group])


def _size_problems(pack: bytes, size: int | None, sizes: list[int]) -> Iterator[Problem]:
    whole = sum(sizes) - EMPTY_PACK * (len(sizes) - 1)
    if size is None:
        yield Problem(pack.hex(), "It is missing.")
    elif size not in {*sizes, whole}:
        yield Problem(pack.hex(), f"It has {size} bytes, and must have {whole} by the index.")


def check_packs(
    repository: Readable,
    packs: Iterable[tuple[str, int]],
    report: Callable[[Problem], None],
    checked: Callable[[int], None],
    *,
    threads: int = THREADS,
) -> None:
    """Check whole packs, given by name and length, byte for byte; both callbacks come from threads.

    `report` is told of problems, and `checked` of each pack's length once it was read.

    Raises:
        StorageError: the storage fails.
        Interrupted: a signal is waiting.
    """

    def check(pack: tuple[str, int]) -> None:
        try:
            for problem in check_pack(repository, *pack):
                report(problem)
        except (Temporary, Refused):
            raise
        except StorageError as error:  # a bad sector: the other packs are checked all the same
            report(Problem(pack[0], error.message))
        checked(pack[1])

    in_threads(packs, check, lambda _: 3 * REQUEST, threads, repository.storage.give_up)


def check_pack(repository: Readable, name: str, size: int) -> Iterator[Problem]:
    """Read a pack from end to end: its hash is its name, its header is what the index says, and
    every blob opens.

    That the index says nothing more of it shows in its length (`find_structure_problems`).

    Raises:
        StorageError: the storage fails.
    """
    pack = bytes.fromhex(name)
    try:
        blobs = read_header(repository.storage, repository.key, name, size)
        yield from _index_problems(repository.index, pack, blobs)
    except DamagedError as error:
        blobs = ()
        yield Problem(name, error.message)
    except Missing:
        yield Problem(name, "It is missing.")
        return
    digest = hashlib.sha256()
    try:
        for offset, length, run in _spans(blobs, size):
            data = memoryview(load_part(repository.storage, pack, offset, length))
            digest.update(data)
            yield from _blob_problems(repository.key, name, data, offset, run)
    except DamagedError as error:
        yield Problem(name, error.message)
        return
    if digest.digest() != pack:
        yield Problem(name, "Its content is not what its name says.")


def _spans(blobs: tuple[PackedBlob, ...], size: int) -> Iterator[tuple[int, int, list[PackedBlob]]]:
    """All of a pack in ranges, each with the blobs that lie in it; blobs follow one another."""
    end = 0
    for run in joined(blobs):
        start, end = run[0].offset, run[-1].offset + run[-1].length
        yield start, end - start, run
    for offset in range(end, size, REQUEST):
        yield offset, min(REQUEST, size - offset), []


def _index_problems(
    index: BlobIndex, pack: bytes, blobs: tuple[PackedBlob, ...]
) -> Iterator[Problem]:
    for blob in blobs:
        place = Spot(pack, blob.offset, blob.length, blob.raw_length)
        if place not in index.find_all(blob.type, blob.id):
            yield Problem(pack.hex(), f"The index does not say that the {blob} is in it.")


def _blob_problems(
    key: Key, name: str, data: memoryview, offset: int, blobs: list[PackedBlob]
) -> Iterator[Problem]:
    for blob in blobs:
        start = blob.offset - offset
        try:
            open_blob(key, data[start : start + blob.length], blob)
        except DamagedError as error:
            yield Problem(name, error.message)
