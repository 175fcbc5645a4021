# SPDX-License-Identifier: Apache-2.0
"""Remove what no point needs any more from storage that VMs share, once for all of them."""

from qmpbackup import interrupt
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address


def sweep(place: Address, wait: float = 0.0) -> int | None:
    """Sweep a target; gives the bytes that were freed, or None where points share nothing.

    Raises:
        NoSuchTarget, WrongPassword: it does not open.
        Locked: somebody else held it for all of `wait` seconds.
        StorageError: it cannot be changed.
    """
    with interrupt.held():
        return opening.entrance(place).sweep(wait)
