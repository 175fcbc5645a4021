# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder of this machine, laid out as restic's local backend does.

A file is written without a name, made durable, given its name, and its folder made durable: so a name
is there with all its bytes or not at all, and a process that dies leaves nothing. Where the file system
knows no files without a name (open(2), O_TMPFILE), it is written under a temporary one and renamed, as
restic does; such names are no names of files, so listings do not show what a run that died has left.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qmpbackup.durable import storage_error, sync_folder
from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import (
    CONFIG,
    Buffer,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    is_name,
)

_FOLDERS = [kind for kind in Kind if kind is not Kind.CONFIG]
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PREFIX = re.compile(r"[0-9a-f]{2}", re.ASCII)
_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.EPERM})
"""How file systems and old kernels say that there are no files without a name."""

_MOST_PARTS = 512
"""Parts that are written at once; writev(2) takes 1024."""


def is_repository(folder: Path) -> bool:
    """Whether a folder holds all that a repository has (restic, doc/design.rst)."""
    try:
        return (folder / Kind.CONFIG).is_file() and all(
            (folder / kind).is_dir() for kind in _FOLDERS
        )
    except OSError:
        return False


class LocalStorage(Storage):
    """The folder `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    def create(self) -> None:
        """Make the folders; those of packs, too, as restic does."""
        try:
            for kind in _FOLDERS:
                _make(self._path / kind)
            for number in range(256):
                _make(self._path / Kind.DATA / f"{number:02x}")
        except OSError as error:
            raise _failure(f"create {self._path}", error) from error

    def _where(self, file: File) -> Path:
        if file.kind is Kind.DATA:
            return self._path / file.kind / file.name[:2] / file.name
        return self._path / file.kind / file.name

    def save(self, file: File, parts: Sequence[Buffer]) -> None:
        """Write, fsync, give it its name, fsync the folder; a file that is there stays as it is."""
        path = self._where(file)
        try:
            if not path.exists():
                _write(path, parts)
        except OSError as error:
            raise _failure(f"write {path}", error) from error

    def load(self, file: File, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file or a part of it."""
        path = self._where(file)
        try:
            with path.open("rb", buffering=0) as opened:
                wanted = os.fstat(opened.fileno()).st_size - offset if length is None else length
                data = _read(opened.fileno(), offset, wanted)
        except OSError as error:
            raise _failure(f"read {path}", error) from error
        if len(data) != wanted:
            raise StorageError(f"{path} is shorter than it should be.")
        return data

    def size(self, file: File) -> int:
        """The length of a file."""
        path = self._where(file)
        try:
            return path.stat().st_size
        except OSError as error:
            raise _failure(f"look at {path}", error) from error

    def list(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """What lies in the kind's folder, or for packs in the folders below."""
        folder = self._path / kind
        try:
            for each, prefix in self._folders(kind):
                yield from _listed(each, prefix)
        except OSError as error:
            raise _failure(f"read {folder}", error) from error

    def _folders(self, kind: Kind) -> Sequence[tuple[Path, str]]:
        """Folders in which files of a kind lie, and how their names begin there."""
        folder = self._path / kind
        try:
            entries = [*folder.iterdir()]
        except FileNotFoundError:
            # Copies of repositories may lack empty folders; one that went away lacks more.
            if self._where(CONFIG).exists():
                return []
            raise
        if kind is not Kind.DATA:
            return [(folder, "")]
        return [(each, each.name) for each in entries if _PREFIX.fullmatch(each.name)]

    def remove(self, file: File) -> None:
        """Remove a file, durably."""
        path = self._where(file)
        try:
            path.unlink()
            _sync(path.parent)
        except OSError as error:
            raise _failure(f"remove {path}", error) from error


def _listed(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return  # removed meanwhile
    with entries:
        for entry in entries:
            if is_name(entry.name) and entry.name.startswith(prefix):
                with suppress(FileNotFoundError):  # likewise
                    if entry.is_file():
                        yield entry.name, entry.stat().st_size


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_folder(fd)
    finally:
        os.close(fd)


def _write(path: Path, parts: Sequence[Buffer]) -> None:
    if not path.parent.is_dir():
        _make(path.parent)
    if not _write_nameless(path, parts):
        _write_renamed(path, parts)
    _sync(path.parent)


def _write_nameless(path: Path, parts: Sequence[Buffer]) -> bool:
    """Write a file that has no name before it is durable; false where that cannot be done."""
    try:
        fd = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NO_NAMELESS:
            return False
        raise
    try:
        _write_all(fd, parts)
        os.fsync(fd)
        return _named(fd, path)
    finally:
        os.close(fd)


def _named(fd: int, path: Path) -> bool:
    """Give a file without a name one; false where a file cannot come to its name like this.

    There may be no /proc, a policy may forbid links alone, or a link that leads nowhere is there.
    """
    try:
        # A folder's descriptor, unused with an absolute path, has Python call linkat(2), which follows.
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)
    except FileExistsError:
        return path.exists()
    except OSError:
        return False
    return True


def _write_renamed(path: Path, parts: Sequence[Buffer]) -> None:
    temporary = path.with_name(f"{path.name}-tmp-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        try:
            _write_all(fd, parts)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    waiting = [memoryview(part) for part in parts if len(part)]
    while waiting:
        written = os.writev(fd, waiting[:_MOST_PARTS])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = waiting[0][written:]


def _read(fd: int, offset: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length > 0 and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _failure(action: str, error: OSError) -> StorageError:
    said = storage_error(action, error)
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return Missing(said.message, said.hint)
    if error.errno in _REFUSED:
        return Refused(said.message, said.hint)
    return said
