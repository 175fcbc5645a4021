# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder of this machine, laid out as restic's local backend does.

    <path>, followed once and held open ─► keys, locks, …, data ─► data/xx ─► the file

Everything is reached through the descriptor of the repository's folder, and no link below it is
followed: what is unmounted, moved away or replaced meanwhile is never mixed up with what was opened,
and nobody who may write into it can lead us out of it. What has the name of a file and is none (a link,
a pipe, a device) is not opened.
"""

import errno
import os
import re
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qmpbackup.durable import storage_error, sync_folder
from qmpbackup.errors import StorageError
from qmpbackup.ownership import require_ours
from qmpbackup.restic.storage.interface import (
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    is_name,
)
from qmpbackup.restic.storage.plain_file import is_there, opened, plain, read, write

_FOLDERS = [kind for kind in Kind if kind is not Kind.CONFIG]
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PREFIX = re.compile(r"[0-9a-f]{2}", re.ASCII)

_ANY_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER = _ANY_FOLDER | os.O_NOFOLLOW
_NO_LINK = frozenset({errno.ELOOP, errno.ENOTDIR})


def is_repository(folder: Path) -> bool:
    """Whether a folder holds all that a repository has (restic, doc/design.rst)."""
    try:
        return (folder / Kind.CONFIG).is_file() and all(
            (folder / kind).is_dir() for kind in _FOLDERS
        )
    except OSError:
        return False


class LocalStorage(Storage):
    """The folder `path`, which is opened when it is first needed, and stays open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opening = threading.Lock()
        self._fd: int | None = None
        self._found: frozenset[str] = frozenset()
        """The folders that were there when it was opened."""
        self._close: Callable[[], object] = lambda: None

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    def close(self) -> None:
        """Let go of the folder."""
        with self._opening:
            self._fd = None
            self._close()

    @property
    def _top(self) -> int:
        with self._opening:
            if self._fd is None:
                self._fd = os.open(self._path, _ANY_FOLDER)
                self._found = _folders_in(self._fd)
                self._close = weakref.finalize(self, os.close, self._fd)
            return self._fd

    def create(self) -> None:
        """Make the folders; those of packs, too, as restic does."""
        try:
            for path in reversed([self._path, *self._path.parents]):
                if not path.exists():
                    _make_at(path)
            require_ours(self._top, self._path)
            for kind in _FOLDERS:
                _make(kind, self._top)
            with self._folder(Kind.DATA) as data:
                for number in range(256):
                    _make(f"{number:02x}", data)
        except OSError as error:
            raise _failure(f"create {self._path}", error) from error

    def require_same(self) -> None:
        """See that the path still leads to the folder that was opened."""
        opened = os.fstat(self._top)
        try:
            found = self._path.stat()
        except OSError as error:
            raise StorageError(
                f"The repository at {self._path} has gone away: {error.strerror}.", _GONE
            ) from error
        if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
            raise StorageError(
                f"The repository at {self._path} has gone away: something else is there now.", _GONE
            )
        for lost in self._found - _folders_in(self._top):
            raise StorageError(
                f"The repository at {self._path} has gone away: it has no folder {lost} any more.",
                _GONE,
            )

    def require_ours(self) -> None:
        """Refuse folders that others could rearrange while we write into them."""
        try:
            require_ours(self._top, self._path)
            for kind in _FOLDERS:
                for folder in {(kind,), *self._folders(kind)}:
                    with suppress(FileNotFoundError), self._folder(*folder) as fd:
                        require_ours(fd, self._path.joinpath(*folder))
        except OSError as error:
            raise _failure(f"look at {self._path}", error) from error

    def _parts(self, file: File) -> tuple[str, ...]:
        """The folders in which a file lies, below the repository's own."""
        if file.kind is Kind.CONFIG:
            return ()
        return (file.kind, file.name[:2]) if file.kind is Kind.DATA else (file.kind,)

    def _where(self, file: File) -> Path:
        """What messages call a file."""
        return self._path.joinpath(*self._parts(file), _base(file))

    @contextmanager
    def _folder(self, *parts: str, make: bool = False) -> Iterator[int]:
        """A folder below the repository's own, open while the block runs.

        With `make`, one that is missing is made, as copies of repositories may lack empty folders;
        but only beside the repository's config: what has none is no repository any more. One that
        was there at first is not made anew.
        """
        fds: list[int] = []
        try:
            for depth, part in enumerate(parts):
                above = fds[-1] if fds else self._top
                try:
                    fds.append(_open_folder(part, above, self._path.joinpath(*parts[: depth + 1])))
                except FileNotFoundError:
                    lost = depth == 0 and part in self._found
                    if not make or lost or not _exists(Kind.CONFIG, self._top):
                        raise
                    _make(part, above)
                    fds.append(_open_folder(part, above, self._path.joinpath(*parts[: depth + 1])))
            yield fds[-1] if fds else self._top
        finally:
            for fd in fds:
                os.close(fd)

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Write, fsync, give it its name, fsync the folder; a file that is there stays as it is."""
        path = self._where(file)
        try:
            with self._folder(*self._parts(file), make=True) as folder:
                if not is_there(path, folder):
                    write(path, folder, parts)
        except OSError as error:
            raise _failure(f"write {path}", error) from error

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file or a part of it."""
        path = self._where(file)
        try:
            with self._folder(*self._parts(file)) as folder, opened(path, folder) as fd:
                wanted = os.fstat(fd).st_size - offset if length is None else length
                data = read(fd, offset, wanted)
        except OSError as error:
            raise _failure(f"read {path}", error) from error
        if len(data) != wanted:
            raise StorageError(f"{path} is shorter than it should be.")
        return data

    def size(self, file: File) -> int:
        """The length of a file."""
        path = self._where(file)
        try:
            with self._folder(*self._parts(file)) as folder:
                return plain(path, folder).st_size
        except OSError as error:
            raise _failure(f"look at {path}", error) from error

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """What lies in the kind's folder, or for packs in the folders below."""
        try:
            for parts in self._folders(kind):
                with suppress(FileNotFoundError), self._folder(*parts) as folder:
                    yield from _listed(folder, parts[1] if len(parts) > 1 else "")
        except OSError as error:
            raise _failure(f"read {self._path / kind}", error) from error

    def _folders(self, kind: Kind) -> Sequence[tuple[str, ...]]:
        """Folders in which files of a kind lie, by their names below the repository's own."""
        try:
            with self._folder(kind) as folder:
                entries = os.listdir(folder)  # noqa: PTH208 - by descriptor
        except FileNotFoundError:
            # Copies of repositories may lack empty folders; one that went away lacks more.
            if _exists(Kind.CONFIG, self._top):
                return []
            raise
        if kind is not Kind.DATA:
            return [(kind,)]
        return [(kind, each) for each in entries if _PREFIX.fullmatch(each)]

    def remove(self, file: File) -> None:
        """Remove a file, durably."""
        path = self._where(file)
        try:
            with self._folder(*self._parts(file)) as folder:
                os.unlink(path.name, dir_fd=folder)
                sync_folder(folder)
        except OSError as error:
            raise _failure(f"remove {path}", error) from error


_GONE = "Was it unmounted, moved or replaced meanwhile? Put it back, and run again."


def _base(file: File) -> str:
    return file.name or str(file.kind)


def _open_folder(name: str, above: int, path: Path) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=above)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        raise Strange(
            f"{path} is no folder of its own (a link, or a file).",
            "Links in a repository are not followed: put the folder itself there.",
        ) from None


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _folders_in(top: int) -> frozenset[str]:
    return frozenset(str(kind) for kind in _FOLDERS if _exists(kind, top))


def _listed(folder: int, prefix: str) -> Iterator[tuple[str, int]]:
    """Names and lengths. What is no plain file passes for one of a byte: reading it says why not."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_name(entry.name) and entry.name.startswith(prefix):
                with suppress(FileNotFoundError):  # removed meanwhile
                    state = entry.stat(follow_symlinks=False)
                    yield entry.name, state.st_size if stat.S_ISREG(state.st_mode) else 1


def _make(name: str, above: int) -> None:
    """Make a folder that is ours alone, whatever the umask; one that is there stays as it is."""
    try:
        os.mkdir(name, 0o700, dir_fd=above)
    except FileExistsError:
        return
    fd = os.open(name, _FOLDER, dir_fd=above)
    try:
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)
    sync_folder(above)


def _make_at(path: Path) -> None:
    above = os.open(path.parent, _ANY_FOLDER)
    try:
        _make(path.name, above)
    finally:
        os.close(above)


def _failure(action: str, error: OSError) -> StorageError:
    said = storage_error(action, error)
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return Missing(said.message, said.hint)
    if error.errno in _REFUSED:
        return Refused(said.message, said.hint)
    return said
