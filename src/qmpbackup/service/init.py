# SPDX-License-Identifier: Apache-2.0
"""Make a target, where that has to be done before the first backup."""

from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address, Made

__all__ = ["Made", "init"]


def init(place: Address) -> Made:
    """Make a repository, with location and password as restic takes them.

    Raises:
        UsageError: the place is a folder, there is a repository already, or there is no password.
        StorageError: it could not be written.
    """
    return opening.entrance(place).make()
