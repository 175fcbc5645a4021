# SPDX-License-Identifier: Apache-2.0
"""Folders for machines that are thrown away, with their overlays and sockets: a drill's, and those in
which files are read."""

import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.filelock import named_lock
from qmpbackup.service.boot_folder import BootFolder

_FOLDER_SECONDS = 60.0
_PLACE = Path("/var/tmp")  # noqa: S108 - folders there are made for us alone


class ThrowawayFolder(BootFolder):
    """A folder for one machine, which has its sockets as well."""

    @property
    def sockets(self) -> Path:
        """Where the user may go whom QEMU runs as."""
        return self.path


@contextmanager
def throwaway_folder(kind: str) -> Iterator[ThrowawayFolder]:
    """A folder with a short path, gone after the block, as are those of this kind whose run was killed.

    One run at a time makes its folder or removes those of others, which would else take a folder that
    is not claimed yet for one whose run was killed."""
    with ExitStack() as stack:
        with named_lock(f"{kind} folders", f"the folders of {kind} runs", _FOLDER_SECONDS):
            _remove_old(kind)
            with storage_errors(f"make a folder in {_PLACE}"):
                path = Path(tempfile.mkdtemp(prefix=_prefix(kind), dir=_PLACE))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            stack.enter_context(BootFolder(path).claimed(kind))
        yield ThrowawayFolder(path)


def _prefix(kind: str) -> str:
    return f"qmpb-{kind}-"


def _remove_old(kind: str) -> None:
    """Remove folders of ours that no run has any more; also what is left of one whose removal was killed,
    which has no lock, as others are made and claimed only while nobody is here."""
    users = {os.geteuid()}
    if os.geteuid() == 0:
        users.add(pwd.getpwnam("nobody").pw_uid)
    for path in _PLACE.glob(f"{_prefix(kind)}*"):
        with suppress(OSError):
            state = path.lstat()
            is_ours = stat.S_ISDIR(state.st_mode) and state.st_uid in users
            if is_ours and not BootFolder(path).is_claimed(kind):
                shutil.rmtree(path, ignore_errors=True)
