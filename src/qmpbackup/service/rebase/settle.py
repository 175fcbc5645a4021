# SPDX-License-Identifier: Apache-2.0
"""Bring interrupted merges to an end before anything else is written into a target.

Light, as every backup asks: what a merge needs is imported only where one was interrupted.
"""

import logging

from qmpbackup.durable import storage_errors
from qmpbackup.folder import Folder
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.names import POINTS, is_folder_name

log = logging.getLogger(__name__)

SUFFIX = ".merge"
"""What names a journal in `points/`, behind the name of the disk's folder; in a folder without
manifests it is the whole name."""


def settle(target: DirectoryTarget, wait: float = 0.0) -> None:
    """Bring interrupted merges to an end, if there are any; no lock may be held.

    Raises:
        Locked: somebody else held the target for all of `wait` seconds.
        DamagedError: a merge cannot be finished.
        StorageError: it could not be finished yet; it can be tried again.
    """
    if not interrupted(target):
        return
    from qmpbackup.service.rebase import journal

    with target.lock(remove=True, wait=wait):
        for done in journal.roll_forward(target):
            log.warning("Cleaned up after a run that died: %s.", done)


def merge_hint(target: DirectoryTarget, folder: str) -> str:
    """What to do about a merge that was interrupted."""
    return (
        "The next backup finishes it, and so does "
        f"`qmprestore commit --dir {target.path / folder}`."
    )


def interrupted(target: DirectoryTarget) -> tuple[str, ...]:
    """Names of the folders in which a merge was interrupted, or is under way."""
    with storage_errors(f"read {target.path}"), Folder.open(target.path) as top:
        if not top.exists(POINTS):
            return ()
        with top.sub(POINTS) as points:
            names = points.names()
    found = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
    return tuple(name for name in found if is_folder_name(name))
