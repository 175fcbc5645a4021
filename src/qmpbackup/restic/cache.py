# SPDX-License-Identifier: Apache-2.0
"""A folder of small things that are slow to fetch, such as snapshots: sealed, and never believed blindly.

Whatever is wrong with it, it is as if it were not there. Its files are sealed with the repository's
key together with their names, so who can read or change them learns and forges nothing.
"""

import hashlib
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpbackup.errors import DamagedError
from qmpbackup.ownership import make_private
from qmpbackup.restic.crypto import Key, seal, unseal

_log = logging.getLogger(__name__)

_MOST_FILES: Final = 16_384
_LARGEST: Final = 64 << 20
_TEMPORARY: Final = ".tmp"
_NAME = re.compile(r"[a-z0-9-]{1,100}", re.ASCII)


class Cache:
    """The cache of one repository. Any thread and any process may use it at any time."""

    def __init__(self, folder: Path | None, key: Key) -> None:
        """`folder` is made when it is first needed; None is a cache that forgets at once."""
        self._folder = folder
        self._key = key
        self._ready = False

    def get(self, name: str) -> bytes | None:
        """What was put under this name, or None."""
        path = self._path(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                sealed = file.read(_LARGEST + 1)
            found = unseal(self._key, sealed, name)
        except (OSError, DamagedError) as error:
            if not isinstance(error, FileNotFoundError):
                _log.debug("%s in the cache is of no use: %s", name, error)
            return None
        return found[32:] if found[:32] == _binding(name) else None

    def put(self, name: str, data: bytes) -> None:
        """Keep something; where that cannot be, nothing happens."""
        path = self._path(name)
        if path is None or len(data) > _LARGEST // 2 or not self._prepare():
            return
        temporary = path.with_suffix(f".{os.urandom(4).hex()}{_TEMPORARY}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(seal(self._key, _binding(name) + data))
            temporary.rename(path)
        except OSError as error:
            _log.debug("%s cannot be kept in the cache: %s", name, error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name for a file of a cache")
        return self._folder / name if self._folder is not None else None

    def _prepare(self) -> bool:
        """Whether the folder is there, for us alone, and has room; asked once."""
        if self._folder is not None and not self._ready:
            try:
                make_private(self._folder)
                _limit(self._folder)
                self._ready = True
            except OSError as error:
                _log.debug("There is no cache at %s: %s", self._folder, error)
                self._folder = None
        return self._ready


def _binding(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _limit(folder: Path) -> None:
    """Remove the older half of the files once there are too many."""
    with os.scandir(folder) as entries:
        files = sorted((entry.stat().st_mtime, entry.path) for entry in entries)
    if len(files) > _MOST_FILES:
        for _, path in files[: len(files) // 2]:
            Path(path).unlink(missing_ok=True)
