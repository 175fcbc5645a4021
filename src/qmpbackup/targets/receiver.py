# SPDX-License-Identifier: Apache-2.0
"""A point in the making: files that somebody else fills, or chunks that are handed over."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from qmpbackup.model import Level, Point

Buffer = bytes | bytearray | memoryview


class Arrival(NamedTuple):
    """A disk that a point is to hold."""

    disk_id: str
    level: Level
    size: int


class Sealed(NamedTuple):
    """What became of a disk: its file in the target, how many bytes were added, and the digest that
    proves it."""

    file: str
    size: int
    digest: str


class NewFile(Protocol):
    """An open file that is to be filled, and where it is."""

    @property
    def fd(self) -> int: ...

    @property
    def path(self) -> Path: ...


class FileReceiver(ABC):
    """A point in the making, of files that somebody else fills; ends with `commit` or `abort`."""

    @abstractmethod
    def file(self, disk_id: str) -> NewFile:
        """The file of a disk."""

    @abstractmethod
    def seal(self, disk_id: str) -> Sealed:
        """Make a filled file durable, and say what it is.

        Raises:
            StorageError: it could not be written or read.
        """

    @abstractmethod
    def commit(self, point: Point) -> None:
        """Make the point exist, all at once and for good.

        Raises:
            StorageError: it does not exist; call `abort`.
        """

    @abstractmethod
    def abort(self, *, closed: bool = True) -> None:
        """Remove everything; `closed`: nobody else has the files open."""


class ArrivingDisk(Protocol):
    """The chunks of one disk on their way; those that are `known` are as in what it builds on until
    others are put in their place."""

    @property
    def count(self) -> int:
        """How many chunks it has; the last may be short."""

    @property
    def known(self) -> int:
        """How many of them, from the first on, are known."""

    @property
    def stored(self) -> int:
        """Bytes that were added for it."""

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is there."""

    def put(self, index: int, data: Buffer, done: Callable[[bool], None]) -> None:
        """Take a chunk. `done` is called, by any thread, when `data` is not needed any more, and told
        whether the chunk was known as another."""

    def zeros(self, first: int, count: int) -> Sequence[int]:
        """Enter chunks of zeros; returns those that were known as something else."""


class ChunkReceiver(ABC):
    """A point in the making, of chunks that are handed over; ends with `commit` or `abort`."""

    @abstractmethod
    def begin(self, disk_id: str, size: int, base: Point | None) -> ArrivingDisk:
        """Begin a disk, which builds on that of `base`, if given.

        Raises:
            DamagedError: that cannot be read.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait until all that was put is stored.

        Raises:
            StorageError: something could not be.
        """

    @abstractmethod
    def seal(self, disk_id: str) -> Sealed:
        """Say what a disk is that is complete; nothing can be put any more."""

    @abstractmethod
    def commit(self, point: Point) -> None:
        """Make the point exist, all at once and for good.

        Raises:
            QmpBackupError: it does not exist; call `abort`.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the writing; nothing refers to what was stored."""


Receiver = FileReceiver | ChunkReceiver
