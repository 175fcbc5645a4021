# SPDX-License-Identifier: Apache-2.0
"""Blobs that were read and checked, and for which memory has no room: in a file without a name.

    put   seal a blob and append it, until there are so many bytes
    get   the blob; nothing where it is not there, or not what was put

What is in the file is sealed with a key that nobody but this process ever has, so a guest's data lies on no
disk in the clear, and what the disk, or who may write to it, makes of the file is found out. Blobs are only
added, never replaced: nothing that is read can be overwritten meanwhile. Where the file cannot be, it is as
if it were full.
"""

import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import IO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qmpbackup.ownership import make_private

_log = logging.getLogger(__name__)

MOST: Final = 4 << 30
"""Bytes of the file at most."""
_SHARE: Final = 8
"""It takes one in so many of the bytes that are free when it is made."""


class Overflow:
    """See above; for any thread. `close` it."""

    def __init__(self, folder: Path | None, most: int = MOST) -> None:
        """`folder` is where caches lie; None for a file that takes nothing."""
        self._folder = folder
        self._left = most if folder else 0
        self._seal = AESGCM(AESGCM.generate_key(256))
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._end = 0
        self._places: dict[bytes, tuple[int, int]] = {}

    def close(self) -> None:
        """Forget all."""
        with self._lock:
            self._left = 0
            self._places.clear()
            if self._file is not None:
                self._file.close()

    def put(self, id_: bytes, data: bytes) -> None:
        """Keep a blob, if there is room."""
        if not self._left or id_ in self._places:
            return
        try:
            with self._lock:
                place = self._take(len(data))
                if place is None or self._file is None:
                    return
                sealed = self._seal.encrypt(_nonce(place), data, id_)
                if os.pwrite(self._file.fileno(), sealed, place) == len(sealed):
                    self._places[id_] = place, len(sealed)
        except OSError as error:
            _log.debug("No more blobs are kept in %s: %s", self._folder, error)
            self._left = 0

    def get(self, id_: bytes) -> bytes | None:
        """The blob, if it is there."""
        found = self._places.get(id_)
        if found is None or self._file is None:
            return None
        place, length = found
        try:
            sealed = os.pread(self._file.fileno(), length, place)
            return self._seal.decrypt(_nonce(place), sealed, id_)
        except (OSError, ValueError, InvalidTag) as error:
            _log.warning("What was kept in %s is of no use any more: %s", self._folder, error)
            self._places.pop(id_, None)
            return None

    def _take(self, length: int) -> int | None:
        """A place for a blob, which is never given again; nothing if there is no room.

        Raises:
            OSError: the file cannot be made.
        """
        if self._file is None:
            self._make()
        length += _TAG
        if length > self._left:
            self._left = 0
            return None
        place, self._end, self._left = self._end, self._end + length, self._left - length
        return place

    def _make(self) -> None:
        if self._folder is None:
            return
        make_private(self._folder)
        state = os.statvfs(self._folder)
        self._left = min(self._left, state.f_bavail * state.f_frsize // _SHARE)
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - see close


_TAG: Final = 16


def _nonce(place: int) -> bytes:
    """Never twice the same, as no place is given twice."""
    return place.to_bytes(12, "big")
