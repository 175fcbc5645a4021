# SPDX-License-Identifier: Apache-2.0
"""Locks between processes: flock(2) on a file that stays. The kernel frees them when we die."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import Locked, StorageError
from qmpbackup.ownership import is_private

_POLL_SECONDS = 0.1


@contextmanager
def locked(fd: int, what: str, *, shared: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock on an open file for the block; `what` names the locked thing in the message.

    Raises:
        Locked: somebody else held it for all of `wait` seconds.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            interrupt.check()
            if time.monotonic() >= deadline:
                raise Locked(
                    f"Another run of qmpbackup is using {what}.",
                    "Wait for its end, or let this one wait with --lock-wait SECONDS.",
                ) from None
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on a file that nobody shares.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)  # and with it the lock


@contextmanager
def vm_lock(key: str, wait: float) -> Iterator[None]:
    """Hold the lock of one VM; `key` is what all runs for this VM agree on."""
    name = "".join(c if c.isalnum() or c in "._-" else f"%{ord(c):02x}" for c in key)[-200:]
    with named_lock(name, "this VM", wait):
        yield


@contextmanager
def named_lock(name: str, what: str, wait: float) -> Iterator[None]:
    """Hold a lock of all runs of this user on this host; that of a VM has no blank in its name."""
    folder = runtime_folder()
    with storage_errors(f"make the lock {folder / name}.lock"):
        fd = os.open(
            folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    try:
        with locked(fd, what, wait=wait):
            yield
    finally:
        os.close(fd)


def runtime_folder() -> Path:
    """A folder of ours alone for locks: root's in /run, others' where their session keeps such."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() == 0:
        folder = Path("/run/qmpbackup")
    elif base:
        folder = Path(base) / "qmpbackup"
    else:
        folder = Path(f"/tmp/qmpbackup-{os.geteuid()}")  # noqa: S108 - checked below
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise StorageError(
            f"Cannot make the folder for locks, {folder}: {error.strerror}.",
            f"See that {folder.parent} is there and can be written to"
            + (", or unset XDG_RUNTIME_DIR." if folder.parent == Path(base) else "."),
        ) from error
    if not is_private(state):
        raise StorageError(
            f"The folder for locks, {folder}, is not ours alone.",
            "Remove it; it holds nothing but locks.",
        )
    return folder
