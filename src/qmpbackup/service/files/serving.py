# SPDX-License-Identifier: Apache-2.0
"""What serves a point while its files are read: kept alive, and asked for the reason when a read fails.

To the appliance's kernel everything that cannot be read is the same I/O error.
"""

import time

from qmpbackup.errors import DamagedError, QmpBackupError, StorageError, VmError
from qmpbackup.machine.confining import hand_over
from qmpbackup.service.boot_folder import Boot, BootFolder
from qmpbackup.service.boot_keeper import PointServer

_LOOK_SECONDS = 0.5


class WatchedServer:
    """What serves the point, for as long as it is read."""

    def __init__(self, server: PointServer, boot: Boot, folder: BootFolder) -> None:
        self._server = server
        self._boot = boot
        self._folder = folder
        self._was_lost = False
        self._last = time.monotonic()

    def see_to(self) -> None:
        """Serve the point again, where its server was lost; looked at not more often than needed.

        Raises:
            DamagedError: a disk was withdrawn.
        """
        if time.monotonic() - self._last < _LOOK_SECONDS:
            return
        self._last = time.monotonic()
        self._server.require_served()
        if self._server.ensure(self._boot):
            self._was_lost = True
            hand_over(self._folder.path)

    def cause_of(self, error: QmpBackupError) -> QmpBackupError:
        """Why something failed in the appliance, by what the server of the point says: it is damaged, or its
        target could not be read; else that is a matter of the guest's."""
        point = f"point {self._boot.point}"
        try:
            self._server.require_whole()
        except DamagedError as damage:
            return DamagedError(
                f"Not all of {point} can be read. {damage.message}", f"So: {error.message}"
            )
        trouble = self._server.trouble(waiting=isinstance(error, VmError))
        was_lost, self._was_lost = self._was_lost, False
        if was_lost and not trouble:
            trouble = "its server was lost."
        if not trouble:
            return error
        return StorageError(
            f"Not all of {point} could be read: {trouble}",
            f"Try again once the target can be read. So: {error.message}",
        )
