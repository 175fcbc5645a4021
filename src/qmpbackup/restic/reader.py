# SPDX-License-Identifier: Apache-2.0
"""Reading many blobs at once, and checking packs: in threads, in bounded memory, nothing unverified.

    wanted ──► grouped by pack, near ones joined ──► threads: load ─ MAC ─ decompress ─ hash ─ deliver

Must not know what blobs are for. Whoever reads must be done with syncing the index.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Final, NamedTuple, Protocol, TypeVar

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.index.table import PackSize, Spot
from qmpbackup.restic.pack import EMPTY_PACK, BlobType, PackedBlob, open_blob, read_header
from qmpbackup.restic.storage.interface import (
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    Temporary,
)

_log = logging.getLogger(__name__)

THREADS: Final = 4
MEMORY: Final = 64 << 20
"""Bytes that all requests under way may take together; one larger blob is read alone."""

_REQUEST: Final = 4 << 20
"""Bytes after which a further blob gets a request of its own."""
_GAP: Final = 256 << 10
"""Bytes not wanted that are rather read than skipped by another request."""
_WINDOW: Final = 16_384
"""Blobs that are looked up and grouped at a time."""
_POLL_SECONDS: Final = 0.2

_HINT: Final = 'Run "restic check --read-data" and see restic\'s manual on repairing repositories.'

T = TypeVar("T")


class Readable(Protocol):
    """What of a repository is needed here."""

    @property
    def storage(self) -> Storage:
        """Where its files lie."""

    @property
    def key(self) -> Key:
        """What its files are sealed with."""

    @property
    def index(self) -> BlobIndex:
        """Where its blobs lie."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be, in one pack."""

    pack: str
    what: str

    def __str__(self) -> str:
        return f"Pack {self.pack}: {self.what}"


class _Request(NamedTuple):
    pack: bytes
    offset: int
    length: int
    blobs: tuple[PackedBlob, ...]

    @property
    def memory(self) -> int:
        return self.length + max(blob.length + blob.plain_length for blob in self.blobs)


def read_blobs(
    repository: Readable,
    wanted: Iterable[tuple[BlobType, bytes]],
    deliver: Callable[[bytes, bytes], None],
    *,
    threads: int = THREADS,
) -> None:
    """Read blobs and hand each, as id and content, to `deliver`, in any order and from any thread.

    A blob wanted again soon after is delivered once: remember all places that need it. A blob whose
    place is damaged is read from another place, if there is one.

    Raises:
        DamagedError: a blob is nowhere, or damaged in all places; nothing more is delivered.
        StorageError: the storage fails.
        Interrupted: a signal is waiting.
        Exception: what `deliver` or `wanted` raised.
    """
    in_threads(
        _requests(repository.index, wanted),
        lambda request: _read(repository, request, deliver),
        lambda request: request.memory,
        threads,
        repository.storage.give_up,
    )


def _requests(index: BlobIndex, wanted: Iterable[tuple[BlobType, bytes]]) -> Iterator[_Request]:
    source = iter(wanted)
    while window := dict.fromkeys(islice(source, _WINDOW)):
        packs: dict[bytes, list[PackedBlob]] = {}
        for type_, id_ in window:
            place = index.find(type_, id_)
            if place is None:
                name = f"{type_.name.lower()} blob {id_.hex()}"
                raise DamagedError(f"The repository lacks the {name}.", _HINT)
            packs.setdefault(place.pack, []).append(place.packed(type_, id_))
        for pack, blobs in packs.items():
            blobs.sort(key=lambda blob: blob.offset)
            yield from (_request(pack, joined) for joined in _joined(blobs))


def _joined(blobs: Iterable[PackedBlob]) -> Iterator[list[PackedBlob]]:
    """Cut blobs, sorted by offset, into runs that are worth one request each."""
    run: list[PackedBlob] = []
    for blob in blobs:
        end = run[-1].offset + run[-1].length if run else 0
        if run and (
            blob.offset > end + _GAP or blob.offset + blob.length > run[0].offset + _REQUEST
        ):
            yield run
            run = []
        run.append(blob)
    if run:
        yield run


def _request(pack: bytes, blobs: list[PackedBlob]) -> _Request:
    offset = blobs[0].offset
    end = max(blob.offset + blob.length for blob in blobs)
    return _Request(pack, offset, end - offset, tuple(blobs))


def _read(repository: Readable, request: _Request, deliver: Callable[[bytes, bytes], None]) -> None:
    error: QmpBackupError | None = None
    data = memoryview(b"")
    try:
        data = memoryview(
            load_part(repository.storage, request.pack, request.offset, request.length)
        )
    except (Temporary, Refused):
        raise
    except (DamagedError, StorageError) as failure:
        error = failure
    for blob in request.blobs:
        start = blob.offset - request.offset
        try:
            if error is not None:
                raise error
            plain = open_blob(repository.key, data[start : start + blob.length], blob)
        except (DamagedError, StorageError) as failure:
            plain = _rescued(repository, request.pack, blob, failure)
        deliver(blob.id, plain)


def _rescued(repository: Readable, pack: bytes, blob: PackedBlob, error: QmpBackupError) -> bytes:
    """Read a blob by itself, from wherever it lies; the place that failed comes last.

    Raises:
        DamagedError: it is damaged everywhere.
        StorageError: the storage fails.
    """
    places = repository.index.find_all(blob.type, blob.id)
    for place in sorted(places, key=lambda each: each.pack == pack):
        try:
            sealed = load_part(repository.storage, place.pack, place.offset, place.length)
            plain = open_blob(repository.key, sealed, place.packed(blob.type, blob.id))
        except (Temporary, Refused):
            raise
        except (DamagedError, StorageError):
            continue
        _log.warning("%s It was read again, from pack %s.", error.message, place.pack.hex())
        return plain
    if isinstance(error, DamagedError):
        raise DamagedError(f"{error.message} It lies in pack {pack.hex()}.", _HINT) from error
    raise error


def load_part(storage: Storage, pack: bytes, offset: int, length: int) -> bytes:
    """Read from a pack; one that is missing or too short is damage, not failing storage.

    Raises:
        DamagedError: it is.
        StorageError: the storage fails.
    """
    file = File(Kind.DATA, pack.hex())
    try:
        return storage.load(file, offset, length)
    except Missing as error:
        raise DamagedError(f"The pack {file.name}, which the index names, is missing.") from error
    except Strange as error:
        raise DamagedError(error.message, error.hint) from error
    except (Temporary, Refused):
        raise
    except StorageError as error:
        if storage.size(file) < offset + length:
            raise DamagedError(f"The pack {file.name} is damaged: it is too short.") from error
        raise


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

    in_threads(packs, check, lambda _: 3 * _REQUEST, threads, repository.storage.give_up)


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
    for run in _joined(blobs):
        start, end = run[0].offset, run[-1].offset + run[-1].length
        yield start, end - start, run
    for offset in range(end, size, _REQUEST):
        yield offset, min(_REQUEST, size - offset), []


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


def in_threads(
    jobs: Iterable[T],
    work: Callable[[T], None],
    memory: Callable[[T], int],
    threads: int,
    give_up: Callable[[], None] = lambda: None,
) -> None:
    """Do all jobs, as many at a time as there are threads and room in `MEMORY` for.

    Jobs are taken from their source in this thread. The first error ends all in order: nothing else
    is begun, `give_up` is called to break off what is under way, and its end is waited for.

    Raises:
        Interrupted: a signal is waiting.
        Exception: the first that a job or the source of jobs raised.
    """
    room = _Room(MEMORY)
    with ThreadPoolExecutor(threads, "read") as pool:
        try:
            for job in jobs:
                amount = room.take(memory(job))
                pool.submit(_guarded, room, amount, work, job)
            room.take(MEMORY)
        except BaseException as error:
            room.fail(error)
            give_up()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _guarded(room: "_Room", amount: int, work: Callable[[T], None], job: T) -> None:
    try:
        if not room.failed:
            work(job)
    except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
        room.fail(error)
    finally:
        room.give(amount)


class _Room:
    """Memory that threads share, and the first error of any of them."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def take(self, amount: int) -> int:
        """Wait for room; returns how much was taken, at most all there is.

        Raises:
            Interrupted: a signal is waiting.
            Exception: the error that was told to `fail`.
        """
        amount = min(amount, self._size)
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                interrupt.check()
                if self._free >= amount:
                    self._free -= amount
                    return amount
                self._changed.wait(_POLL_SECONDS)

    def give(self, amount: int) -> None:
        with self._changed:
            self._free += amount
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
