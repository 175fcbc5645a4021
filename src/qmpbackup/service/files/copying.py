# SPDX-License-Identifier: Apache-2.0
"""Copying files of a guest to this host, where no word of theirs is believed.

    a hidden folder beside the destination ─ one member of the archive after the other ─ its final name

Each name is opened below the one before, and no link is ever followed; nothing that is there is
replaced. What could harm this host is left out and named: devices, sockets, and links that lead out of
what is copied. Files are the caller's, without setuid, unless root asks for more. Either all of the rest
is there at the end, or nothing.
"""

import hashlib
import logging
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors, write_all
from qmpbackup.errors import StorageError, UsageError
from qmpbackup.filelock import locked
from qmpbackup.plan.room import Space, given_up
from qmpbackup.service.files.archives import (
    FILE,
    FOLDER,
    HARD_LINK,
    SYMBOLIC_LINK,
    Archive,
    ArchiveMember,
    Parts,
)
from qmpbackup.service.files.reading import Place
from qmpbackup.service.room import space

log = logging.getLogger(__name__)

_LOOK_BYTES = 32 * 1024 * 1024
_LOOK_FILES = 500
_MOST_NAMED = 20
_DEEPEST = 500
"""Folders below each other: more can hardly be named, and each file costs a look at all of them."""

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_COPY = "copy"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for beside the files: `preserve` is for root; `reserve` as for a backup."""

    recursive: bool = False
    preserve: bool = False
    links: bool = False
    reserve: int | None = None


def copy(pieces: Iterable[bytes], place: Place, destination: Path, wishes: Wishes) -> int:
    """Copy what an archive holds to a destination; how much was left out.

    Raises:
        UsageError: the destination is there, or the source is a folder and was not asked for.
        StorageError: it cannot be written, or the reserve would be touched; nothing is left of it.
    """
    require_possible(destination, wishes)
    final = _final(place, destination)
    with _beside(final) as (folder, fd):
        writer = _Writer(fd, wishes, _Meter(folder, wishes.reserve))
        writer.write(Archive(pieces))
        _put(folder / _COPY, final)
    if writer.left_out > _MOST_NAMED:
        log.warning("%d of %s were left out in all.", writer.left_out, place.shown)
    return writer.left_out


def require_possible(destination: Path, wishes: Wishes) -> None:
    """Look at what can be known before anything is read.

    Raises:
        UsageError: nothing can be copied there, or not as it is wished.
    """
    if wishes.preserve and os.geteuid() != 0:
        raise UsageError("Only root can give files to their owners.", "Leave out --preserve.")
    if not destination.is_dir():
        _require_new(destination)


def _final(place: Place, destination: Path) -> Path:
    """What the copy is to be called."""
    if destination.is_dir():
        name = posixpath.basename(posixpath.normpath(place.path)).lstrip("/")
        destination /= name if name not in {"", ".", ".."} else place.system.name.replace("/", "-")
    _require_new(destination)
    return destination


def _require_new(path: Path) -> None:
    if os.path.lexists(path):
        raise UsageError(f"{path} is there.", "Choose another name.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}.")


@contextmanager
def _beside(final: Path) -> Iterator[tuple[Path, int]]:
    """A hidden folder beside the destination, gone after the block; so is one of a run that was killed."""
    name = hashlib.sha256(os.fsencode(final.name)).hexdigest()[:12]
    folder = final.parent / f".qmpbackup-{name}"
    with storage_errors(f"write to {final.parent}"):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        fd = os.open(folder, _FOLDER_FLAGS)
    try:
        with locked(fd, f"{final} as a destination"):
            _empty(folder)
            try:
                yield folder, fd
            finally:
                _remove(folder)
    finally:
        os.close(fd)


def _empty(folder: Path) -> None:
    with storage_errors(f"empty {folder}"):
        for each in folder.iterdir():
            _remove(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def _put(made: Path, final: Path) -> None:
    """Give a copy its name, and replace nothing by it."""
    with storage_errors(f"make {final}"):
        if not os.path.lexists(made):
            raise UsageError("There is nothing to copy: it is neither a file nor a folder.")
        if made.is_dir() and not made.is_symlink():
            state = made.lstat()
            made.chmod(0o700)  # else it could not be moved to another folder
            made.rename(final)  # over nothing but an empty folder
            final.chmod(stat.S_IMODE(state.st_mode))
            os.utime(final, ns=(state.st_atime_ns, state.st_mtime_ns))
        else:
            os.link(made, final, follow_symlinks=False)


def _remove(folder: Path) -> None:
    """Remove a folder with all that is in it, whatever its modes, and however deep: each round takes one level
    away, as what is in the folders below moves up."""
    with suppress(OSError):
        top = os.open(folder, _FOLDER_FLAGS)
        try:
            while names := os.listdir(top):  # noqa: PTH208 - by a descriptor
                for name in names:
                    _raise_up(top, name)
        finally:
            os.close(top)
        folder.rmdir()


def _raise_up(top: int, name: str) -> None:
    """Remove a file, or a folder, whose folders go where it was."""
    if not _is_folder(top, name):
        os.unlink(name, dir_fd=top)
        return
    os.chmod(name, 0o700, dir_fd=top)
    below = os.open(name, _FOLDER_FLAGS, dir_fd=top)
    try:
        for each in os.listdir(below):  # noqa: PTH208 - by a descriptor
            if _is_folder(below, each):
                os.chmod(each, 0o700, dir_fd=below)  # else it could not be moved
                os.rename(each, os.urandom(16).hex(), src_dir_fd=below, dst_dir_fd=top)
            else:
                os.unlink(each, dir_fd=below)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=top)


def _is_folder(above: int, name: str) -> bool:
    return stat.S_ISDIR(os.lstat(name, dir_fd=above).st_mode)


class _Meter:
    """Looks whether there is room left for others, every now and then."""

    def __init__(self, folder: Path, wanted: int | None) -> None:
        self._folder = folder
        self._space: Space | None = None if wanted == 0 else space(folder)
        self._reserve = self._space.reserve(wanted) if self._space else 0
        self._bytes = 0
        self._files = 0
        self._look()

    def count(self, data: int = 0, files: int = 0) -> None:
        """Count what is written next.

        Raises:
            StorageError: it would touch the reserve.
        """
        interrupt.check()
        self._bytes += data
        self._files += files
        if self._bytes >= _LOOK_BYTES or self._files >= _LOOK_FILES:
            self._bytes = self._files = 0
            self._look()

    def _look(self) -> None:
        found = space(self._folder) if self._space else None
        if found is not None and found.free < self._reserve:
            raise StorageError(
                given_up(found, self._reserve, found.free),
                "Make room, or copy to another file system; nothing is left of the copy.",
            )


@dataclass(frozen=True, slots=True)
class _Open:
    """A folder that is being filled: its attributes come last, as writing changes them."""

    parts: Parts
    member: ArchiveMember


class _Writer:
    """Writes members below an open folder, as `copy` and what is in that."""

    def __init__(self, top: int, wishes: Wishes, meter: _Meter) -> None:
        self.left_out = 0
        self._top = top
        self._wishes = wishes
        self._meter = meter
        self._open: list[_Open] = []
        self._mask = os.umask(0o077)
        os.umask(self._mask)
        self._is_tree = False
        self._last: tuple[Parts, int] | None = None
        """The folder that was opened last, as most files are in that of the file before."""

    def write(self, archive: Archive) -> None:
        """Write all of an archive."""
        try:
            for number, member in enumerate(archive.members()):
                if number == 0:
                    self._begin(member)
                parts = (_COPY.encode(), *(member.parts if self._is_tree else ()))
                self._close_but(parts)
                self._meter.count(files=1)
                shown = os.fsdecode(b"/".join(member.parts)) or "it"
                with storage_errors(f"write {shown!a}"):
                    self._one(archive, member, parts)
            self._close_but(())
        finally:
            self._let_go()

    def _begin(self, member: ArchiveMember) -> None:
        self._is_tree = member.kind == FOLDER and not member.parts
        if self._is_tree and not self._wishes.recursive:
            raise UsageError("It is a folder.", "Copy it with -r.")

    def _one(self, archive: Archive, member: ArchiveMember, parts: Parts) -> None:
        if max(len(parts), len(member.linked)) > _DEEPEST:
            self._leave_out(parts, "it lies too deep")
        elif member.kind == FOLDER:
            os.mkdir(parts[-1], 0o700, dir_fd=self._folder(parts[:-1]))
            self._open.append(_Open(parts, member))
        elif member.kind == FILE:
            self._file(archive, member, parts)
        elif member.kind == HARD_LINK and self._is_tree:
            self._hard_link(member, parts)
        elif member.kind == SYMBOLIC_LINK:
            self._symbolic_link(member, parts)
        else:
            self._leave_out(parts, "it is a device or a pipe")

    def _file(self, archive: Archive, member: ArchiveMember, parts: Parts) -> None:
        fd = os.open(parts[-1], _NEW_FILE, 0o600, dir_fd=self._folder(parts[:-1]))
        try:
            if member.extents is None:
                for piece in archive.data():
                    self._meter.count(len(piece))
                    write_all(fd, [piece])
            else:
                self._with_holes(fd, archive, member)
            self._attributes(fd, member)
        finally:
            os.close(fd)

    def _with_holes(self, fd: int, archive: Archive, member: ArchiveMember) -> None:
        extents = iter(member.extents or ())
        at, left = 0, 0
        for piece in archive.data():
            self._meter.count(len(piece))
            while piece:
                while not left:
                    at, left = next(extents)
                    os.lseek(fd, at, os.SEEK_SET)
                now = piece[:left]
                write_all(fd, [now])
                left -= len(now)
                piece = piece[len(now) :]  # noqa: PLW2901 - what is left of it
        os.ftruncate(fd, member.size)

    def _hard_link(self, member: ArchiveMember, parts: Parts) -> None:
        first = (_COPY.encode(), *member.linked)
        there = self._opened(first[:-1])
        try:
            if not stat.S_ISREG(os.lstat(first[-1], dir_fd=there).st_mode):
                self._leave_out(parts, "it is a link to what is no file")
                return
            above = self._folder(parts[:-1])
            os.link(first[-1], parts[-1], src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False)
        finally:
            os.close(there)

    def _symbolic_link(self, member: ArchiveMember, parts: Parts) -> None:
        if not (self._wishes.links or stays_inside(member.target, len(parts) - 2)):
            self._leave_out(parts, f"it is a link to {os.fsdecode(member.target)!a}")
            return
        os.symlink(member.target, parts[-1], dir_fd=self._folder(parts[:-1]))

    def _leave_out(self, parts: Parts, why: str) -> None:
        self.left_out += 1
        if self.left_out <= _MOST_NAMED:
            log.warning("%s is left out: %s.", os.fsdecode(b"/".join(parts[1:])) or "It", why)

    def _folder(self, parts: Parts) -> int:
        """A folder below ours, on the way to which no link is followed; open until the next is asked for."""
        if self._last is None or self._last[0] != parts:
            fd = self._opened(parts)
            self._let_go()
            self._last = parts, fd
        return self._last[1]

    def _opened(self, parts: Parts) -> int:
        fd = os.dup(self._top)
        try:
            for each in parts:
                below = os.open(each, _FOLDER_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _let_go(self) -> None:
        if self._last is not None:
            os.close(self._last[1])
            self._last = None

    def _close_but(self, parts: Parts) -> None:
        """Give the folders their attributes that are left."""
        while self._open and parts[: len(self._open[-1].parts)] != self._open[-1].parts:
            done = self._open.pop()
            with storage_errors("give a folder its attributes"):
                self._attributes(self._folder(done.parts), done.member)

    def _attributes(self, fd: int, member: ArchiveMember) -> None:
        mode = member.mode & 0o777 & ~self._mask
        if self._wishes.preserve:
            os.fchown(fd, member.user, member.group)
            self._xattrs(fd, member)
            mode = member.mode
        os.fchmod(fd, mode)
        with suppress(OverflowError, ValueError, OSError):  # a time that this host cannot have
            os.utime(fd, (member.time, member.time))

    def _xattrs(self, fd: int, member: ArchiveMember) -> None:
        for name, value in member.xattrs.items():
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                log.debug("%s cannot be set: %s", name, error)
                self._leave_out((b"", *member.parts), f"{name} cannot be set here, of it alone")


def stays_inside(target: bytes, depth: int) -> bool:
    """Whether a symbolic link `depth` folders below the top leads to nothing above it.

    Upwards only at its beginning: there the folders are real ones. Behind a name, which may be another
    link, nobody knows where upwards is.
    """
    parts = [each for each in target.split(b"/") if each not in {b"", b"."}]
    ups = 0
    while ups < len(parts) and parts[ups] == b"..":
        ups += 1
    return not target.startswith(b"/") and ups <= depth and b".." not in parts[ups:]
