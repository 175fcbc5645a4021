# SPDX-License-Identifier: Apache-2.0
"""Who may use a folder at once: readers and one writer; whoever removes or changes points is alone.

Knows two files that are locked; must not know what is done meanwhile.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.filelock import locked
from qmpbackup.folder import Folder
from qmpbackup.targets.names import REMOVER_LOCK, WRITER_LOCK


@contextmanager
def held(path: Path, *, write: bool, remove: bool, wait: float) -> Iterator[None]:
    """Hold the target in a folder for the block; see `DirectoryTarget.lock`."""
    wanted = []
    if write or remove:
        wanted.append((WRITER_LOCK, False))
    if remove or not write:
        wanted.append((REMOVER_LOCK, not remove))
    with ExitStack() as stack:
        for name, shared in wanted:
            fd = _open_lock(path, name, required=not shared)
            if fd is not None:
                stack.callback(_close_lock, fd)
                what = f"the target {path}"
                stack.enter_context(locked(fd, what, shared=shared, wait=wait))
        yield


def _open_lock(path: Path, name: str, *, required: bool) -> int | None:
    with storage_errors(f"lock {path}"), Folder.open(path) as top:
        try:
            return top.open_lock(name)
        except OSError:
            if required:
                raise
        # Media that we may only read: a lock that is there still counts.
        try:
            return top.open_file(name)
        except OSError:
            return None


def _close_lock(fd: int) -> None:
    """Nothing was written there, whatever a file system says that takes only whole files."""
    with suppress(OSError):
        os.close(fd)
