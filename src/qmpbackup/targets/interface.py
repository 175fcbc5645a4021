# SPDX-License-Identifier: Apache-2.0
"""What the kinds of target have in common for those who read points."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Extent(NamedTuple):
    """A run of bytes of a disk; `zero` if it is known to be zeros."""

    offset: int
    length: int
    zero: bool


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
