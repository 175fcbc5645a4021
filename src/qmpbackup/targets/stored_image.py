# SPDX-License-Identifier: Apache-2.0
"""A disk of a point as something that is read at any offset, or poured out, whichever target has it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from qmpbackup.images.times import Stamp


class Extent(NamedTuple):
    """A run of bytes of a disk; `zero` if it is known to be zeros."""

    offset: int
    length: int
    zero: bool


class Sink(Protocol):
    """What a stored image is poured into: a new, empty file, which counts only when all is through, or
    a block device, whose contents are lost by the first write."""

    @property
    def fd(self) -> int:
        """It, open for reading and writing."""

    @property
    def path(self) -> Path:
        """What messages call it."""

    @property
    def format(self) -> str:
        """`raw` or `qcow2`: what a file becomes, as which it is as large as the disk. A device is raw."""

    @property
    def is_device(self) -> bool:
        """Whether it is a device, whose bytes are all to be written, zeros too."""

    def writing(self) -> AbstractContextManager[None]:
        """To be held while it is written to, and by no means before; durable afterwards.

        Raises:
            StorageError: in the place of an OSError of the block.
        """


class StoredImage(Protocol):
    """One disk of one point, as something that can be read at any offset, from any thread."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What is known to be zeros and what is not, of the bytes from `start` up to `end`, in order
        and without gaps.

        Raises:
            DamagedError, StorageError: as `read`.
        """

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes of the instant, within the disk.

        Raises:
            DamagedError: they cannot be had, because what holds them is damaged or missing.
            StorageError: the storage fails; it may be asked again.
        """

    def peek(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same where it can be had without waiting for anything, else nothing."""

    def needs(self, format_: str) -> int:
        """Bytes that a file of this format takes into which it is poured, at most; 0 where that cannot
        be told."""

    def pour(self, sink: Sink) -> None:
        """Write all of it, in the fastest way there is.

        All is proved when this returns. Of a device everything that can be is proved before the first
        write; nothing is left of a file that was not poured full.

        Raises:
            DamagedError: it cannot be had, because what holds it is damaged or missing.
            StorageError: a storage fails, the target's or the sink's.
            Interrupted: a signal is waiting.
        """


class Unproved(Protocol):
    """What an image is read from where a read does not prove it: files that can be proved as a whole."""

    def prove(self, each: Callable[[], None]) -> None:
        """Read all of it; `each` is called after every MiB, and ends it by raising.

        Raises:
            DamagedError: it is not what its manifests say; the target knows it from now on.
            StorageError: it cannot be read.
        """

    def stamps(self) -> tuple[Stamp, ...]:
        """What changes when somebody writes to it.

        Raises:
            StorageError: it cannot be looked at.
        """


def _nothing() -> None:
    """There is nothing to let go of."""


@dataclass(frozen=True, slots=True)
class OpenDisks:
    """Images of disks by disk id; `unproved` has what is behind those whose reads prove nothing.
    `servers` are the sockets of programs that show an image by NBD themselves, which is faster than to read
    it here. `let_go` has reads under way end soon."""

    images: Mapping[str, StoredImage]
    unproved: Mapping[str, Unproved] = field(default_factory=dict)
    servers: Mapping[str, str] = field(default_factory=dict)
    let_go: Callable[[], None] = _nothing
