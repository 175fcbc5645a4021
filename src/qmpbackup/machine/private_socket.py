# SPDX-License-Identifier: Apache-2.0
"""Sockets that listen and have no name: nobody can connect but who holds the descriptor.

A socket gets its name in a private folder, which is gone again before anybody could connect: all that
stays is a descriptor of the file (open(2), O_PATH), and `/proc/self/fd/N` leads there. So nothing is
left in `$TMPDIR`, whoever dies, nobody else can put anything in its place, and its path may be as long
as it likes, which unix(7) bounds to 107 bytes.

Over TCP no socket can be handed over, so QEMU makes its own, by a path in a folder of ours that lasts
as long as the run. What a run that died has left of that is removed only if it is ours, and never
through a link.
"""

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmpbackup.errors import VmError
from qmpbackup.machine.sockets import LONGEST_ADDRESS
from qmpbackup.ownership import is_private

_NAME = "qmpbackup-nbd"
_LISTENING = 0x10000
"""The flag of a socket that takes connections in /proc/net/unix (SO_ACCEPTCON, linux/net.h)."""


class PrivateSocket:
    """A socket that listens; `path` leads to it in this process, for as long as it is open.

    `inode` is its number, which no other socket has while it lives.
    """

    def __init__(self, prefix: str) -> None:
        """`prefix` begins the name of the folder that is there for a moment.

        Raises:
            VmError: there is no folder for it.
        """
        self.listener = socket.socket(socket.AF_UNIX)
        self._place = -1
        try:
            with _folder(prefix) as (path, folder):
                self.listener.bind(_short(path, folder))
                self.listener.listen()
                self._place = os.open(_NAME, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
        except OSError as error:
            self.close()
            raise no_socket(error) from error
        self.inode = os.fstat(self.listener.fileno()).st_ino
        self.path = f"/proc/self/fd/{self._place}"

    def close(self) -> None:
        """Let go of it; who has a descriptor of the listening socket keeps that."""
        self.listener.close()
        if self._place >= 0:
            os.close(self._place)
        self._place = -1


@contextmanager
def _folder(prefix: str) -> Iterator[tuple[Path, int]]:
    """A folder of ours for a moment, by its path and by its descriptor."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield path, folder
        finally:
            with suppress(FileNotFoundError):
                os.unlink(_NAME, dir_fd=folder)
            os.close(folder)
    finally:
        path.rmdir()


def _short(path: Path, folder: int) -> str:
    """A name for a socket in a folder. When QEMU closes the socket, it removes the file of that name,
    which is gone, and must not be another one by then."""
    name = str(path / _NAME)
    return (
        name
        if len(os.fsencode(name)) <= LONGEST_ADDRESS
        else f"/proc/{os.getpid()}/fd/{folder}/{_NAME}"
    )


def no_socket(error: OSError) -> VmError:
    """What to say where no socket can be made."""
    return VmError(
        f"Cannot make a socket in {tempfile.gettempdir()}: {error.strerror or error}.",
        "Set TMPDIR to a folder to which you may write.",
    )


def named(prefix: str) -> str:
    """A path in a new folder of ours where QEMU itself can make a socket.

    Raises:
        VmError: there is no folder for it, or its path is too long.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise no_socket(error) from error
    path = folder / _NAME
    if len(os.fsencode(path)) > LONGEST_ADDRESS:
        folder.rmdir()
        raise VmError(
            f"Cannot have QEMU make a socket in {folder.parent}: its path is too long.",
            f"Set TMPDIR to a folder with a shorter path: a socket's may have {LONGEST_ADDRESS} bytes.",
        )
    return str(path)


def remove(prefix: str) -> None:
    """Remove what `named` has made, or a run that died; what is not ours stays, whatever it is."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove(folder)


def _remove(path: Path) -> None:
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not is_private(os.fstat(folder)):
                return
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(_NAME, dir_fd=folder, follow_symlinks=False).st_mode):
                    os.unlink(_NAME, dir_fd=folder)
        finally:
            os.close(folder)
        path.rmdir()


def is_held(inode: int, pid: int | None) -> bool:
    """Whether a process has this socket open, or, where we may not see that, anybody listens at it."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir()) if pid else []
    except OSError:
        descriptors = []
    for descriptor in descriptors:
        with suppress(OSError):
            if str(descriptor.readlink()) == f"socket:[{inode}]":
                return True
    return not descriptors and any(int(fields[6]) == inode for fields in _listening())


def is_listened_at(prefix: str) -> bool:
    """Whether anybody listens at what `named` has made for a run."""
    return any(f"/{prefix}" in fields[7] for fields in _listening() if len(fields) == 8)


def _listening() -> Iterator[list[str]]:
    with suppress(OSError, ValueError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) >= 7 and int(fields[3], 16) & _LISTENING:
                yield fields
