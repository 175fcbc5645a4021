# SPDX-License-Identifier: Apache-2.0
"""A storage that remembers files instead of storing them, for tests of what is built on storages."""

import threading
from collections.abc import Iterator, Sequence

from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import Buffer, File, Kind, Missing, Refused, Storage


class Remembered(Storage):
    """All its files are in `files`. `is_read_only` takes the right to save and to remove."""

    def __init__(self) -> None:
        self.files: dict[File, bytes] = {}
        self.is_read_only = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """A name for messages."""
        return "memory"

    def create(self) -> None:
        """Nothing is needed."""

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Remember a file, unless it is known."""
        self._require_right()
        with self._lock:
            self.files.setdefault(file, b"".join(parts))

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """A file or a part of it."""
        data = self._file(file)
        found = data[offset:] if length is None else data[offset : offset + length]
        if length not in {None, len(found)}:
            raise StorageError(f"{file} is shorter than it should be.")
        return found

    def size(self, file: File) -> int:
        """The length of a file."""
        return len(self._file(file))

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths."""
        with self._lock:
            files = [
                (file.name, len(data)) for file, data in self.files.items() if file.kind is kind
            ]
        yield from files

    def remove(self, file: File) -> None:
        """Forget a file."""
        self._require_right()
        self._file(file)
        with self._lock:
            self.files.pop(file, None)

    def _file(self, file: File) -> bytes:
        with self._lock:
            if file not in self.files:
                raise Missing(f"There is no {file}.")
            return self.files[file]

    def _require_right(self) -> None:
        if self.is_read_only:
            raise Refused("Nobody may write here.")
