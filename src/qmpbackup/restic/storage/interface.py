# SPDX-License-Identifier: Apache-2.0
"""What a repository asks of a place that stores files, and what it may rely on.

The promises, which the contract suite puts to every backend:

- `save` returns once the file is durable, and is all or nothing: a reader sees the whole file or
  none. Names are hashes of contents (all but `config`), so saving a name again changes nothing.
- `load` returns exactly the bytes asked for, or raises; never fewer.
- `list` yields every file that was there before the call and was not removed since, each once. A
  file saved or removed meanwhile may or may not be in it, and an object store's listing may lag.
  What is not named as the format names files is left out.
- All calls may come from several threads at once.

Layout and names: restic, doc/design.rst ("Repository Layout").
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from qmpbackup.errors import StorageError, Unreachable

_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)

Buffer = bytes | bytearray | memoryview


class Kind(StrEnum):
    """The kinds of files; the values are the names of their folders (`config` is a single file)."""

    CONFIG = "config"
    KEY = "keys"
    LOCK = "locks"
    SNAPSHOT = "snapshots"
    INDEX = "index"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class File:
    """One file: its kind, and its name of 64 hexadecimal digits (empty for `config`).

    Raises:
        ValueError: no file of a repository has such a name.
    """

    kind: Kind
    name: str = ""

    def __post_init__(self) -> None:
        if not (is_name(self.name) if self.kind is not Kind.CONFIG else self.name == ""):
            raise ValueError(f"{self.name!r} is not the name of a file of a repository")

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}" if self.name else str(self.kind)


CONFIG = File(Kind.CONFIG)


def is_name(name: str) -> bool:
    """Whether a name is one that files of a repository have (a SHA-256 in lower-case digits)."""
    return _NAME.fullmatch(name) is not None


class Missing(StorageError):
    """There is no such file."""


class Temporary(StorageError):
    """It failed for a reason that may pass (a timeout, a lost connection, 5xx): worth a retry."""


class Unanswered(Temporary, Unreachable):
    """The same, and nobody answered at all."""


class Refused(StorageError):
    """The storage does not allow it (no right, append-only, read-only)."""


class Strange(StorageError):
    """What has the name of a file is none, or lies behind a link; it was not opened."""


class Storage(ABC):
    """A place that stores files.

    Every method raises `Missing`, `Temporary`, `Refused`, `Strange` or another `StorageError`, and
    nothing else on account of the storage.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it: its location, with every secret masked."""

    @abstractmethod
    def create(self) -> None:
        """Make what an empty repository needs, such as folders; no harm where they are there."""

    @abstractmethod
    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Store a file made of these parts, durably. A file that is there already stays as it is."""

    @abstractmethod
    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or `length` bytes of it from `offset`.

        Raises:
            Missing: there is no such file.
            StorageError: also where the file is shorter than asked for.
        """

    @abstractmethod
    def size(self, file: File) -> int:
        """The length of a file in bytes.

        Raises:
            Missing: there is no such file.
        """

    @abstractmethod
    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths of all files of a kind (not `config`), in no order."""

    @abstractmethod
    def remove(self, file: File) -> None:
        """Remove a file, durably.

        Raises:
            Missing: there is no such file.
        """

    @property
    def impatient(self) -> "Storage":
        """The same storage, but what fails is not tried again."""
        return self

    def require_same(self) -> None:  # noqa: B027 - a server's files tell, see `Repository`
        """See that the place still leads to what was opened there.

        Raises:
            StorageError: it was unmounted, moved or replaced.
        """

    def require_ours(self) -> None:  # noqa: B027 - a server's folders are the server's
        """Refuse a place in which others could exchange things while we write into it.

        Raises:
            StorageError: it is somebody else's, or others may write into it.
        """

    def give_up(self) -> None:  # noqa: B027 - most do not wait
        """From now on, nothing is waited for that may pass: what fails, fails at once."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of connections; nothing may be called afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
