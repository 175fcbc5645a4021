# SPDX-License-Identifier: Apache-2.0
"""A repository in an object store (S3, Google Cloud Storage, Azure), through obstore.

Objects are whole or not there: one PUT each, whose answer means that the object is stored. They lie
as restic's default layout has them (`data/ab/ab…`). An overwritten object has the same contents, as
its name is their hash; only `config` is asked to be new.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import (
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Temporary,
    is_name,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_LONGEST_REASON: Final = 300
_LISTED_AT_ONCE: Final = 1000
_STATUS: Final = re.compile(r"status code: (\d{3})")
_QUERY: Final = re.compile(r"(?<!<)\?\S+")
_NOT_THERE: Final = 404
_NOT_ALLOWED: Final = frozenset({401, 403})
_LASTING: Final = frozenset({501, 507})
_PASSING: Final = frozenset({408, 409, 425, 429})
"""What of 4xx may pass; 409 is what stores say of operations that meet each other."""


class ObjectStorage(Storage):
    """The objects of a store; `name` is what messages call it."""

    def __init__(self, store: "ObjectStore", name: str) -> None:
        self._store = store
        self._name = name

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
                obstore.put(self._store, _path(file), data, mode=mode, use_multipart=False)
        except Missing:
            raise StorageError(
                f"Cannot write {file} at {self._name}: there is no such bucket.", "Make it first."
            ) from None
        except _Exists:
            if not new or not self.size(file):
                raise

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """One GET, of a range where a part is wanted."""
        import obstore

        if length == 0:
            return b""
        with self._explained(f"read {file}"):
            if length is not None:
                data = obstore.get_range(self._store, _path(file), start=offset, length=length)
                found = bytes(data)
            else:
                found = bytes(obstore.get(self._store, _path(file)).bytes())[offset:]
        if length is not None and len(found) != length:
            raise StorageError(f"{file} at {self._name} is shorter than it should be.")
        return found

    def size(self, file: File) -> int:
        """One HEAD."""
        import obstore

        with self._explained(f"look at {file}"):
            return obstore.head(self._store, _path(file))["size"]

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """A listing, page by page."""
        import obstore

        with self._explained(f"list {kind}"):
            for page in obstore.list(self._store, f"{kind}/", chunk_size=_LISTED_AT_ONCE):
                for found in page:
                    name = found["path"].rpartition("/")[2]
                    if is_name(name) and found["path"] == _path(File(kind, name)):
                        yield name, found["size"]

    def remove(self, file: File) -> None:
        """One DELETE, after a HEAD: stores say nothing of objects that were not there."""
        import obstore

        self.size(file)
        with self._explained(f"remove {file}"):
            obstore.delete(self._store, _path(file))

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (exceptions.BaseError, OSError, ValueError) as error:
            # Without its cause: in some stores the addresses in it are secrets.
            raise _failure(f"Cannot {action} at {self._name}", error) from None


def _path(file: File) -> str:
    if file.kind is Kind.DATA:
        return f"{file.kind}/{file.name[:2]}/{file.name}"
    return str(file)


class _Exists(Temporary):
    """The store says that it is there already, or that somebody else is at it."""


def _failure(cannot: str, error: Exception) -> StorageError:
    from obstore import exceptions

    status = _status(error)
    if isinstance(error, exceptions.NotFoundError | FileNotFoundError) or status == _NOT_THERE:
        return Missing(f"{cannot}: it is not there.")
    denied = exceptions.PermissionDeniedError | exceptions.UnauthenticatedError | PermissionError
    if isinstance(error, denied) or status in _NOT_ALLOWED:
        return Refused(
            f"{cannot}: the store does not allow it.",
            "Check the keys, and what they are allowed to do.",
        )
    said = f"{cannot}: {_reason(error)}."
    if isinstance(error, exceptions.AlreadyExistsError):
        return _Exists(said)
    if "incorrectly configured region" in said:
        return StorageError(said, "AWS_DEFAULT_REGION names the region of the bucket.")
    passing = status is None or (status >= 500 and status not in _LASTING) or status in _PASSING
    lost = isinstance(error, exceptions.GenericError | TimeoutError | ConnectionError)
    return Temporary(said) if lost and passing else StorageError(said)


def _status(error: Exception) -> int | None:
    """The server's answer, which the library tells in words alone."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str:
    """What the library says, without the chain of causes that it shows for developers, and without
    what follows an address, where Azure's signatures are."""
    said = str(error).partition("\n\nDebug source")[0].strip().splitlines()
    first = _QUERY.sub("?…", said[0]) if said else type(error).__name__
    first = first.partition(": <")[0]  # the answer's XML
    return first[:_LONGEST_REASON].rstrip(".")
