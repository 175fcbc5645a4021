# SPDX-License-Identifier: Apache-2.0
"""Prove that what a target holds is what was written.

report       what is asked for, and what was found
directory    every file is read once, however many points need it
repository   every chunk of every point is there; all packs, or some of them, are read
"""

from qmpbackup import interrupt
from qmpbackup.service import targets
from qmpbackup.service.verify.report import Report, Request, Verdict
from qmpbackup.targets.folder.target import DirectoryTarget

__all__ = ["Report", "Request", "Verdict", "verify"]


def verify(request: Request) -> Report:
    """Verify one point or all of a target.

    Raises:
        QmpBackupError: the target cannot be looked at as a whole.
    """
    with (
        interrupt.held(),
        targets.opened(request.target, request.vm) as target,
        target.lock(wait=request.lock_wait),
    ):
        if isinstance(target, DirectoryTarget):
            from qmpbackup.service.verify import directory

            return directory.verify(target, request)
        from qmpbackup.service.verify import repository

        return repository.verify(target, request)
