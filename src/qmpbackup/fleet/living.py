# SPDX-License-Identifier: Apache-2.0
"""Which runs live: each holds a lock on a file of its name for as long as it does."""

import fcntl
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from qmpbackup.durable import make_folders
from qmpbackup.filelock import is_locked


def hold(folder: Path, run: str) -> int | None:
    """A file that is locked until it is closed; None where there is no room for one."""
    path = folder / run
    try:
        make_folders(folder)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
            fcntl.flock(fd, fcntl.LOCK_EX)  # it is ours alone, or looked at for a moment
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(fd)):
                    return fd
            os.close(fd)  # before it was locked, another run took it for that of a dead one
    except OSError:
        return None


def let_go(folder: Path, run: str, fd: int) -> None:
    """Live no more."""
    with suppress(OSError):
        (folder / run).unlink()
    os.close(fd)


def lives(folder: Path, run: str) -> bool:
    """Whether a run goes on, as far as we may know."""
    if Path(run).name != run:
        return False
    try:
        return is_locked(folder / run)
    except PermissionError:
        return True
    except OSError:
        return False


def bury(folder: Path, ours: Collection[str]) -> None:
    """Remove the locks of runs that were killed, each held meanwhile: who makes it then sees that it has
    gone."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name not in ours:
                _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(fd)
