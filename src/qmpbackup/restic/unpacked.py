# SPDX-License-Identifier: Apache-2.0
"""Files of a repository that are one JSON document each: read within bounds, compressed and again not.

What others have stored is neither believed in its size nor in what it says of its contents. Knows nothing
of keys, nor of what the documents say.
"""

from collections.abc import Iterator
from typing import Final, Protocol

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.restic import config as configs
from qmpbackup.restic import keyfile, lock_file, snapshot
from qmpbackup.restic.crypto import OVERHEAD
from qmpbackup.restic.index import index_file
from qmpbackup.restic.pack import LARGEST_WINDOW
from qmpbackup.restic.storage.interface import (
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    Temporary,
)

_LARGEST: Final = {
    Kind.CONFIG: configs.LARGEST,
    Kind.KEY: keyfile.LARGEST,
    Kind.LOCK: lock_file.LARGEST,
    Kind.SNAPSHOT: snapshot.LARGEST,
    Kind.INDEX: 4 * index_file.LARGEST,
}
"""Bytes of JSON that are believed of each kind."""

_SMALL: Final = 1 << 20
_MOST_RATIO: Final = 64
"""How many bytes of JSON one compressed byte of a file may stand for, beyond what is small."""

_COMPRESSED: Final = b"\x02"
_JSON: Final = (b"{", b"[")
_LEVEL: Final = 3


def called(file: File) -> str:
    """What messages call a file."""
    return f"The file {file}"


def bounded(storage: Storage, file: File, size: int | None = None) -> bytes:
    """A stored file, unless it is too large to be what it says; never more of it than it has by its
    `size`, whatever the storage sends.

    Raises:
        DamagedError: it is too large, too short, or no file.
        Missing: there is none.
        StorageError: it cannot be read.
    """
    size = storage.size(file) if size is None else size
    if size > _LARGEST[file.kind] + OVERHEAD + len(_COMPRESSED):
        raise DamagedError(f"{called(file)} is damaged: it is too large.")
    try:
        return storage.load(file, 0, size)
    except Strange as error:
        raise DamagedError(error.message, error.hint) from error
    except (Missing, Temporary, Refused):
        raise
    except StorageError as error:
        if storage.size(file) < size:
            raise DamagedError(f"{called(file)} is damaged: it is too short.") from error
        raise


class _Lister(Protocol):
    """What lists files."""

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths of all files of a kind."""


def listed(storage: _Lister, kind: Kind) -> list[tuple[str, int]]:
    """Names and sizes in order. A copy of a repository may lack folders in which nothing was."""
    try:
        return sorted(storage.list(kind))
    except Missing:
        return []


def compressed(data: bytes) -> bytes:
    """JSON as a file of version 2 holds it."""
    import zstandard

    return _COMPRESSED + zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def decompressed(plain: bytes, kind: Kind, what: str) -> bytes:
    """The JSON in a file; before version 2, and of version 1, it is not compressed.

    Raises:
        DamagedError: there is none.
    """
    if not plain or plain.startswith(_JSON):
        return plain
    if not plain.startswith(_COMPRESSED):
        raise DamagedError(f"{what} is damaged: it is not of a known form.")
    import zstandard

    most = min(_LARGEST[kind], _SMALL + _MOST_RATIO * len(plain))
    try:
        said = zstandard.get_frame_parameters(plain[1:32]).content_size
        # The frame's own word on its size is a hint of how much to reserve, and no more.
        wanted = min(said if said > 0 else most, most)
        context = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        with context.stream_reader(memoryview(plain)[1:]) as reader:
            data = reader.read(wanted + 1)
    except zstandard.ZstdError as error:
        raise DamagedError(f"{what} is damaged: it cannot be decompressed.") from error
    if len(data) > wanted:
        raise DamagedError(f"{what} is damaged: it is too large.")
    return data
