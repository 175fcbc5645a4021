# SPDX-License-Identifier: Apache-2.0
"""Whether views that are read over NBD still stand, asked by reading a sector of each now and then.

A view breaks when its scratch fails, and QEMU tells nobody but who reads it.
"""

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qmpbackup.errors import ConnectionLost, JobError, QmpBackupError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.push import view_broke
from qmpbackup.nbd import client
from qmpbackup.nbd.library import NbdError
from qmpbackup.plan.commands import Command
from qmpbackup.plan.instant import Seat

_SECTOR = 512
_PROBE_SECONDS = 1.0
_PULSE_SECONDS = 5.0

_BROKEN = frozenset({errno.EINVAL, errno.EPERM, errno.EACCES, errno.EIO})
"""What NBD says of a view whose scratch has failed: it has no EACCES (nbd/server.c)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A sector that a view shows as long as it stands."""

    seat: Seat
    path: str
    export: str
    offset: int

    def ask(self) -> None:
        """Read it, over a connection of its own: of disks there may be more than QEMU serves clients.

        Raises:
            JobError: the view broke.
        """
        with explained(self.seat), client.connect(self.path, self.export) as connection:
            connection.read(self.offset, _SECTOR)


class Probing:
    """Asks probes now and then; never while an answer is waited for, which looks at signals as well."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._next = 0.0
        self._asking = False

    def ask(self) -> None:
        """Ask all of them, if it is time to."""
        if self._asking or time.monotonic() < self._next:
            return
        self._asking = True
        try:
            for probe in self._probes:
                probe.ask()
        finally:
            self._asking = False
            self._next = time.monotonic() + _PROBE_SECONDS


class Pulse:
    """Asks now and then whether QEMU still answers its monitor: that nothing comes over NBD is no error,
    since storage may be slow, and a reader would wait for ever for a QEMU that hangs."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._next = time.monotonic() + _PULSE_SECONDS

    def ask(self) -> None:
        """Ask, if it is time to.

        Raises:
            CommandTimeout, ConnectionLost: QEMU does not answer.
        """
        if time.monotonic() >= self._next:
            self._monitor.execute(Command("query-status"))
            self._next = time.monotonic() + _PULSE_SECONDS


@contextmanager
def explained(seat: Seat) -> Iterator[None]:
    """Errors of NBD as those that users meet."""
    try:
        yield
    except NbdError as error:
        raise _explanation(seat, error) from error


def _explanation(seat: Seat, error: NbdError) -> QmpBackupError:
    if not error.number:
        return ConnectionLost(
            f"Disk {seat.disk.id} cannot be read over NBD any more: {error}.",
            "If the VM still runs, run again: the next run cleans up and carries on.",
        )
    if error.number in _BROKEN:
        return view_broke(seat.disk.id, str(error))
    return JobError(f"Disk {seat.disk.id} could not be read: {error}.", "Run again.")
