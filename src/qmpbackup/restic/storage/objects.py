# SPDX-License-Identifier: Apache-2.0
"""A repository in an object store (S3, Google Cloud Storage, Azure), through obstore.

Objects are whole or not there: one PUT each, whose answer means that the object is stored. They lie
as restic's default layout has them (`data/ab/ab…`). An overwritten object has the same contents, as
its name is their hash; only `config` is asked to be new.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.causes import DENIED, asks_for_keys, cause
from qmpbackup.restic.storage.guarded import Guard, Overrun, twice
from qmpbackup.restic.storage.interface import (
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Temporary,
    Unanswered,
    is_name,
)
from qmpbackup.restic.storage.listing import Listing

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

_LARGEST_WHOLE: Final = 64 << 20
"""Bytes of a file that is asked for without a length; what is read in a run has one always."""

_PIECE: Final = 256 << 10
_PAGE_SECONDS: Final = 150.0
"""How long names may not come: the library asks for page after page while there is nothing on them."""

_LISTED_AT_ONCE: Final = 1000
_STATUS: Final = re.compile(r"status code: (\d{3})")
_NOT_THERE: Final = 404
_NOT_ALLOWED: Final = frozenset({401, 403})
_LASTING: Final = frozenset({501, 507})
_NOT_UNDERSTOOD: Final = ("Got invalid", "missing from response")
_PASSING: Final = frozenset({408, 409, 425, 429})
"""What of 4xx may pass; 409 is what stores say of operations that meet each other."""


class ObjectStorage(Storage):
    """The objects of a store; `name` is what messages call it."""

    def __init__(self, store: "ObjectStore", name: str) -> None:
        self._store = store
        self._name = name
        self._guard = Guard(name)

    @property
    def name(self) -> str:
        """The location, without secrets."""
        return self._name

    def create(self) -> None:
        """Nothing is needed: there are no folders. The bucket must be there."""

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """One PUT."""
        import obstore

        data = b"".join(parts)
        new = file.kind is Kind.CONFIG
        try:
            with self._explained(f"write {file}"):
                mode: Literal["create", "overwrite"] = "create" if new else "overwrite"
                self._call(
                    lambda: obstore.put_async(
                        self._store, _path(file), data, mode=mode, use_multipart=False
                    )
                )
        except Missing:
            raise StorageError(
                f"Cannot write {file} at {self._name}: there is no such bucket.", "Make it first."
            ) from None
        except _Exists:
            if not new or not self.size(file):
                raise

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """One GET, of a range where a part is wanted."""
        if length == 0:
            return b""
        most = _LARGEST_WHOLE if length is None else length
        with self._explained(f"read {file}"):
            found = self._call(lambda: self._read(file, offset, length, most), most)
        if length is None and len(found) > most:
            raise StorageError(f"{file} at {self._name} is too large.")
        if length is not None and len(found) < length:
            raise StorageError(f"{file} at {self._name} is shorter than it should be.")
        return found[:most]

    async def _read(self, file: File, offset: int, length: int | None, most: int) -> bytes:
        """What a file has, and no more of it than is wanted, whatever the server goes on to say."""
        import obstore

        wanted: GetOptions = {}
        if offset or length is not None:
            wanted["range"] = {"offset": offset} if length is None else (offset, offset + length)
        answer = await obstore.get_async(self._store, _path(file), options=wanted)
        pieces: list[bytes] = []
        size = 0
        async for piece in answer.stream(min_chunk_size=_PIECE):
            pieces.append(bytes(piece))
            size += len(piece)
            if size > most:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, file: File) -> int:
        """One HEAD."""
        import obstore

        with self._explained(f"look at {file}"):
            return self._call(lambda: obstore.head_async(self._store, _path(file)))["size"]

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """A listing, page by page."""
        with self._explained(f"list {kind}"):
            return iter(twice(lambda: self._listed(kind)))

    def _listed(self, kind: Kind) -> Listing:
        import obstore

        pages = aiter(obstore.list(self._store, f"{kind}/", chunk_size=_LISTED_AT_ONCE))

        async def page() -> "Sequence[ObjectMeta]":
            try:
                return await asyncio.wait_for(anext(pages, []), _PAGE_SECONDS)
            except TimeoutError:
                raise Overrun(f"{self._name} lists nothing, and has no end.") from None

        listing = Listing(kind, self._name)
        while objects := self._guard.call(page):
            for found in objects:
                name = found["path"].rpartition("/")[2]
                is_right = is_name(name) and found["path"] == _path(File(kind, name))
                listing.add(name if is_right else "", found["size"])
        return listing

    def remove(self, file: File) -> None:
        """One DELETE, after a HEAD: stores say nothing of objects that were not there."""
        import obstore

        self.size(file)
        with self._explained(f"remove {file}"):
            self._call(lambda: obstore.delete_async(self._store, _path(file)))

    def close(self) -> None:
        """Let go of the connections."""
        self._guard.close()

    def _call(self, work: Callable[[], Awaitable[T]], expected: int = 0) -> T:
        return twice(lambda: self._guard.call(work, expected))

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (exceptions.BaseError, OSError, ValueError) as error:
            # Without its cause: in some stores the addresses in it are secrets.
            scheme = self._name.partition(":")[0]
            raise _failure(f"Cannot {action} at {self._name}", error, scheme) from None


def _path(file: File) -> str:
    if file.kind is Kind.DATA:
        return f"{file.kind}/{file.name[:2]}/{file.name}"
    return str(file)


class _Exists(Temporary):
    """The store says that it is there already, or that somebody else is at it."""


def _failure(cannot: str, error: Exception, scheme: str) -> StorageError:
    from obstore import exceptions

    text, status = str(error), _status(error)
    missing = isinstance(error, exceptions.NotFoundError | FileNotFoundError)
    if (missing or status == _NOT_THERE) and not asks_for_keys(text):
        return Missing(f"{cannot}: it is not there.")
    denied = exceptions.PermissionDeniedError | exceptions.UnauthenticatedError | PermissionError
    found = DENIED if isinstance(error, denied) else cause(text, scheme)
    said = f"{cannot}: {found.said}."
    if found is DENIED or status in _NOT_ALLOWED:
        return Refused(said, found.hint)
    if isinstance(error, exceptions.AlreadyExistsError):
        return _Exists(said, found.hint)
    passing = status is None or (status >= 500 and status not in _LASTING) or status in _PASSING
    passing = passing and found.passes and not any(sign in text for sign in _NOT_UNDERSTOOD)
    lost = isinstance(error, exceptions.GenericError | TimeoutError | ConnectionError)
    if not (lost and passing):
        return StorageError(said, found.hint)
    return (Temporary if found.answers else Unanswered)(said, found.hint)


def _status(error: Exception) -> int | None:
    """The server's answer, which the library tells in words alone."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None
