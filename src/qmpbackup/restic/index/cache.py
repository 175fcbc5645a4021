# SPDX-License-Identifier: Apache-2.0
"""Where tables lie: in a folder for caches, or nameless.

A cache holds ids and places in the clear, that is hashes of what was stored, and neither contents
nor keys; its folder is for its user alone. Without a folder the same files lie nameless in the
folder for temporary files. Several processes may share a folder: files never change, and a lock is
held while some are replaced.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from qmpbackup.durable import storage_errors
from qmpbackup.errors import Locked
from qmpbackup.filelock import locked
from qmpbackup.ownership import make_private
from qmpbackup.restic.index.making import Collector, merge
from qmpbackup.restic.index.table import Table, Unusable

_log = logging.getLogger(__name__)

_ENDING: Final = ".places"
_TEMPORARY: Final = ".tmp"
_LOCK_SECONDS: Final = 10.0


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Where caches go: $RESTIC_CACHE_DIR, $XDG_CACHE_HOME or ~/.cache, each with our name."""
    for name in ("RESTIC_CACHE_DIR", "XDG_CACHE_HOME"):
        if environment.get(name, "").startswith("/"):
            return Path(environment[name]) / "qmpbackup"
    home = environment.get("HOME", "")
    return Path(home) / ".cache" / "qmpbackup" if home.startswith("/") else None


class CacheFolder:
    """Where tables lie: in a cache that processes share, or nameless."""

    def __init__(self, path: Path | None, repository: bytes) -> None:
        self._path = path if path is not None and _made(path) else None
        self._repository = repository
        self._paths: dict[Table, Path] = {}
        self._held = False

    def close(self) -> None:
        """Let go of all tables."""
        self._paths.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from changing the cache; if that cannot be, it is left alone meanwhile."""
        with ExitStack() as stack:
            if self._path is not None:
                try:
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    fd = os.open(self._path / "lock", flags, 0o600)
                    stack.callback(os.close, fd)
                    stack.enter_context(locked(fd, "the cache", wait=_LOCK_SECONDS))
                    self._held = True
                except (Locked, OSError) as error:
                    _log.debug("The cache at %s is left alone: %s", self._path, error)
            try:
                yield
            finally:
                self._held = False

    def load(self) -> list[Table]:
        """All usable files of the cache; what is unusable in it is removed."""
        if self._path is None or not self._held:
            return []
        known = set(self._paths.values())
        with suppress(OSError):
            for path in self._path.iterdir():
                if path.suffix == _ENDING and path not in known:
                    self._open(path)
                elif path.suffix == _TEMPORARY:
                    path.unlink(missing_ok=True)
        return list(self._paths)

    def _open(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._paths[Table(fd, self._repository)] = path
        except (OSError, Unusable) as error:
            _log.debug("%s is no usable cache of an index: %s", path, error)
            path.unlink(missing_ok=True)

    def gathered(self, collector: Collector) -> Table:
        """What a collector has, in a nameless file."""
        return self._nameless(lambda fd: collector.write(fd, self._repository))

    def merged(self, sources: Mapping[Table, frozenset[bytes]], *, keep: bool = False) -> Table:
        """What is wanted of several files, in one; `keep` in the cache if that can be.

        Raises:
            Unusable: one of them is damaged.
            StorageError: there is no room for temporary files.
        """

        def fill(fd: int) -> None:
            merge(fd, self._repository, sources)

        if keep and self._held and self._path is not None:
            path = self._path / f"{os.urandom(8).hex()}{_ENDING}"
            try:
                return self._named(path, fill)
            except OSError as error:
                _log.debug("The cache at %s cannot be written: %s", self._path, error)
        return self._nameless(fill)

    def _named(self, path: Path, fill: Callable[[int], None]) -> Table:
        temporary = path.with_suffix(_TEMPORARY)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            table = self._filled(fd, fill)
            temporary.rename(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._paths[table] = path
        return table

    def _nameless(self, fill: Callable[[int], None]) -> Table:
        """A file that goes with us, in the cache's folder if there is one with room."""
        if self._path is not None:
            try:
                return self._filled(_unnamed(self._path), fill)
            except OSError as error:
                _log.debug("There is no room for the index at %s: %s", self._path, error)
        with storage_errors(f"write the index to {tempfile.gettempdir()}"):
            return self._filled(_unnamed(None), fill)

    def _filled(self, fd: int, fill: Callable[[int], None]) -> Table:
        try:
            fill(fd)
        except BaseException:
            os.close(fd)
            raise
        return Table(fd, self._repository)

    def forget(self, table: Table) -> None:
        """Remove a file from the cache; who reads it goes on."""
        path = self._paths.pop(table, None)
        if path is not None and self._held:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _unnamed(folder: Path | None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def _made(path: Path) -> bool:
    """Make the folder of one cache; whether it is there and nobody else's."""
    try:
        make_private(path)
    except OSError as error:
        _log.debug("There is no cache at %s: %s", path, error)
        return False
    return True
