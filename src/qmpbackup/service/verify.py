# SPDX-License-Identifier: Apache-2.0
"""Prove that what a target holds is what was written."""

from dataclasses import dataclass

from qmpbackup import interrupt
from qmpbackup.service.show import find_point
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address
from qmpbackup.targets.report import Report

__all__ = ["Report", "Request", "verify"]


@dataclass(frozen=True, slots=True)
class Request:
    """What to verify; no `point` means all, and then also what else lies in the target.

    `read_data` is the share (0 to 1) of the data in a repository that is read; a folder is always
    read whole. `vm` names one of several in a repository.
    """

    target: Address
    point: str = ""
    lock_wait: float = 0.0
    vm: str = ""
    read_data: float = 0.0


def verify(request: Request) -> Report:
    """Verify one point or all of a target.

    Raises:
        QmpBackupError: the target cannot be looked at as a whole.
    """
    with (
        interrupt.held(),
        opening.entrance(request.target).opened(request.vm) as target,
        target.lock(wait=request.lock_wait),
    ):
        found = target.load()
        point = find_point(target, found, request.point) if request.point else None
        return target.prove(found, point, request.read_data)
