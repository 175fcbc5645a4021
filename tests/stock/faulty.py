# SPDX-License-Identifier: Apache-2.0
"""A storage in memory that fails now and then in ways that pass, and whose listings lag."""

import threading
from collections.abc import Iterator, Sequence

from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import Buffer, File, Kind, Missing, Storage, Temporary


class FaultyStorage(Storage):
    """Each operation fails the first time, and every third time afterwards.

    It fails before anything is done, after everything was done, or, where bytes are read, with a
    part of them. `faults` counts; `lagging` files are in no listing.
    """

    def __init__(self) -> None:
        self._files: dict[File, bytes] = {}
        self._lock = threading.Lock()
        self._calls = 0
        self.faults = 0
        self.lagging: set[File] = set()

    @property
    def name(self) -> str:
        """What messages call it."""
        return "memory"

    def _fault(self) -> int:
        """0: none; 1: before; 2: after."""
        self._calls += 1
        if self._calls % 3 != 1:
            return 0
        self.faults += 1
        return 1 + self.faults % 2

    def _begin(self) -> bool:
        """Whether the operation is to fail at its end."""
        fault = self._fault()
        if fault == 1:
            raise Temporary("The connection was lost.")
        return fault == 2

    @staticmethod
    def _end(failing: bool) -> None:
        if failing:
            raise Temporary("The answer was lost.")

    def create(self) -> None:
        """Nothing is needed."""
        with self._lock:
            self._end(self._begin())

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Keep it."""
        with self._lock:
            failing = self._begin()
            self._files.setdefault(file, b"".join(parts))
            self._end(failing)

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """Give it."""
        with self._lock:
            failing = self._begin()
            data = self._found(file)
            end = len(data) if length is None else offset + length
            if end > len(data):
                raise StorageError(f"{file} is shorter than it should be.")
            self._end(failing)
            return data[offset:end]

    def size(self, file: File) -> int:
        """Its length."""
        with self._lock:
            self._end(self._begin())
            return len(self._found(file))

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """What is there and does not lag; a fault comes in the middle."""
        with self._lock:
            failing = self._begin()
            found = [
                (file.name, len(data))
                for file, data in self._files.items()
                if file.kind is kind and file not in self.lagging
            ]
        yield from found[: len(found) // 2]
        self._end(failing)
        yield from found[len(found) // 2 :]

    def remove(self, file: File) -> None:
        """Forget it."""
        with self._lock:
            failing = self._begin()
            self._found(file)
            del self._files[file]
            self._end(failing)

    def _found(self, file: File) -> bytes:
        if file not in self._files:
            raise Missing(f"{file} is not there.")
        return self._files[file]
