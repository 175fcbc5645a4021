# SPDX-License-Identifier: Apache-2.0
"""Reading many blobs at once: in threads, in bounded memory, nothing unverified.

    wanted ──► grouped by pack, near ones joined ──► as many requests under way as the storage is slow
           load │ as many as there are processors: MAC ─ decompress ─ hash ─ deliver

Must not know what blobs are for. Whoever reads must be done with syncing the index.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple, Protocol

from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.pack import BlobType, PackedBlob, open_blob
from qmpbackup.restic.storage.interface import (
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    Temporary,
)
from qmpbackup.restic.threads import Pace, in_threads

_log = logging.getLogger(__name__)

REQUESTS: Final = 16
"""Requests under way at most: over a distance of 50 ms these bring some 500 MiB a second."""

REQUEST: Final = 4 << 20
"""Bytes after which a further blob gets a request of its own."""
_GAP: Final = 256 << 10
"""Bytes not wanted that are rather read than skipped by another request."""
_WINDOW: Final = 16_384
"""Blobs that are looked up and grouped at a time."""

_HINT: Final = 'Run "restic check --read-data" and see restic\'s manual on repairing repositories.'


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
    threads: int = REQUESTS,
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
    pace = Pace(threads)
    in_threads(
        _requests(repository.index, wanted),
        lambda request: _read(repository, request, deliver, pace),
        lambda request: request.memory,
        threads,
        repository.storage.give_up,
        pace,
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
            yield from (_request(pack, joined) for joined in joined(blobs))


def joined(blobs: Iterable[PackedBlob]) -> Iterator[list[PackedBlob]]:
    """Cut blobs, sorted by offset, into runs that are worth one request each."""
    run: list[PackedBlob] = []
    for blob in blobs:
        end = run[-1].offset + run[-1].length if run else 0
        if run and (
            blob.offset > end + _GAP or blob.offset + blob.length > run[0].offset + REQUEST
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


def _read(
    repository: Readable, request: _Request, deliver: Callable[[bytes, bytes], None], pace: Pace
) -> None:
    error: QmpBackupError | None = None
    data = memoryview(b"")
    try:
        with pace.waiting():
            data = memoryview(
                load_part(repository.storage, request.pack, request.offset, request.length)
            )
    except (Temporary, Refused):
        raise
    except (DamagedError, StorageError) as failure:
        error = failure
    with pace.working() as is_wanted:
        if is_wanted:
            _open(repository, request, data, error, deliver)


def _open(
    repository: Readable,
    request: _Request,
    data: memoryview,
    error: QmpBackupError | None,
    deliver: Callable[[bytes, bytes], None],
) -> None:
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
