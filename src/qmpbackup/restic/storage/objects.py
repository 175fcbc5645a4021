# SPDX-License-Identifier: Apache-2.0
"""A repository in an object store (S3, Google Cloud Storage, Azure), through obstore.

Objects are whole or not there: one PUT each, whose answer means that the object is stored. They lie
as restic's default layout has them (`data/ab/ab…`). An overwritten object has the same contents, as
its name is their hash; only `config` is asked to be new.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
        mode: Literal["create", "overwrite"] = "create" if file.kind is Kind.CONFIG else "overwrite"
        try:
            with self._explained(f"write {file}"), suppress(obstore.exceptions.AlreadyExistsError):
                obstore.put(self._store, _path(file), data, mode=mode, use_multipart=False)
        except Missing as error:
            raise StorageError(
                f"Cannot write {file} at {self._name}: there is no such bucket.", "Make it first."
            ) from error

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
                    if is_name(name):
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
        except (exceptions.NotFoundError, FileNotFoundError) as error:
            raise Missing(f"Cannot {action} at {self._name}: it is not there.") from error
        except (
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
            PermissionError,
        ) as error:
            raise Refused(
                f"Cannot {action} at {self._name}: the store does not allow it.",
                "Check the keys, and what they are allowed to do.",
            ) from error
        except (exceptions.GenericError, TimeoutError, ConnectionError) as error:
            raise Temporary(f"Cannot {action} at {self._name}: {_reason(error)}.") from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise StorageError(f"Cannot {action} at {self._name}: {_reason(error)}.") from error


def _path(file: File) -> str:
    if file.kind is Kind.DATA:
        return f"{file.kind}/{file.name[:2]}/{file.name}"
    return str(file)


def _reason(error: Exception) -> str:
    """What the library says, without the chain of causes that it shows for developers."""
    said = str(error).partition("\n\nDebug source")[0].strip().splitlines()
    return (said[0] if said else type(error).__name__)[:_LONGEST_REASON].rstrip(".")
