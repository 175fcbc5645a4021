# SPDX-License-Identifier: Apache-2.0
"""Serve the disks of a point as read-only NBD exports, until told to end.

    find the point ─ open its disks ─ listen ─ [folder: prove the files meanwhile] ─ serve

The target is held for reading for as long. Out of a repository every chunk is proved as it is read. The
digest of a file in a folder is that of all of it, so there the files are read whole while they are served
already, and again when somebody has written to them; a disk with a damaged file is withdrawn, and the run
ends with that.
"""

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import (
    DamagedError,
    Interrupted,
    Locked,
    QmpBackupError,
    StorageError,
    UsageError,
)
from qmpbackup.filelock import runtime_folder
from qmpbackup.images.times import Stamp
from qmpbackup.machine.sockets import LONGEST_ADDRESS
from qmpbackup.model import Point, StoredDisk
from qmpbackup.nbd.server import Server
from qmpbackup.service.show import chosen_disks, find_point
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address
from qmpbackup.targets.stored_image import OpenDisks

log = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
"""How often is looked whether somebody writes to files that are served."""
_AGAIN_SECONDS = 60.0
"""After which files that could not be read are read again."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to serve, where, and for how long: `until_idle` seconds without a client end it.

    `allocation` offers `base:allocation`, for tools that copy; never for a QEMU that boots.
    """

    target: Address
    point: str
    vm: str = ""
    disks: tuple[str, ...] = ()
    socket: Path | None = None
    until_idle: float | None = None
    allocation: bool = False
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """What is being served. `proved`: nothing unproved is ever read; else files are proved meanwhile."""

    point: Point
    socket: Path
    disks: tuple[StoredDisk, ...]
    proved: bool


def serve(request: Request, announce: Callable[[Served], None]) -> None:
    """Serve until a signal comes, or nobody is there any more; `announce` is told when all is ready.

    Raises:
        DamagedError: a disk was withdrawn, as a file of it is damaged.
        QmpBackupError: nothing could be served.
    """
    with (
        interrupt.held(),
        opening.entrance(request.target).opened(request.vm) as target,
        target.lock(wait=request.lock_wait),
        ExitStack() as stack,
    ):
        found = target.load()
        point = find_point(target, found, request.point)
        disks = chosen_disks(point, request.disks)
        listener, path = stack.enter_context(_listening(request.socket))
        stored = stack.enter_context(target.images(found.points, point, disks))
        server = Server(
            listener,
            stored.images,
            allocation=request.allocation,
            let_go=stored.let_go,
            relayed=stored.servers,
        )
        proof = stack.enter_context(_proving(stored, server))
        announce(Served(point, path, disks, proved=not stored.unproved))
        with suppress(Interrupted):  # which is how somebody ends it
            server.run(request.until_idle)
    if proof.damage is not None:
        raise proof.damage


class _Proof(threading.Thread):
    """Reads the files of disks that are being served, and again those that somebody writes to; withdraws
    a disk whose files are damaged."""

    def __init__(self, stored: OpenDisks, server: Server) -> None:
        super().__init__(name="proof", daemon=True)
        self.damage: QmpBackupError | None = None
        self._stored = stored
        self._server = server
        self._ended = threading.Event()
        self._proved: dict[str, tuple[Stamp, ...]] = {}
        self._failed: dict[str, QmpBackupError] = {}
        self._again = 0.0

    def run(self) -> None:
        """Prove one disk after the other, until the end."""
        left = list(self._stored.unproved)
        try:
            while left:
                left = [disk_id for disk_id in left if self._is_served(disk_id)]
                if self._ended.wait(_LOOK_SECONDS):
                    break
            self._look_back()
        except Interrupted as signal:
            self._server.interrupted(signal)
        except _EndedError:
            self._look_back()
        except Exception as error:  # whatever it is, nothing is served on that nobody proves
            log.debug("The proof failed:", exc_info=error)
            said = f"Nothing is served any more, as its proof failed: {error}."
            self.damage = self.damage or QmpBackupError(said)
            for disk_id in left:
                self._server.withdraw(disk_id)

    def _is_served(self, disk_id: str) -> bool:
        """Whether a disk is to be served on, as its files are proved, or cannot be read just now."""
        if disk_id in self._failed and time.monotonic() < self._again:
            return True
        try:
            self._prove(disk_id)
        except DamagedError as error:
            log.error("Disk %s is served no more: %s", disk_id, error.message)  # noqa: TRY400
            self.damage = error
            self._server.withdraw(disk_id)
            self._proved.pop(disk_id, None)
            return False
        except QmpBackupError as error:
            log.warning("Disk %s could not be proved: %s", disk_id, error.message)
            self._proved.pop(disk_id, None)
            self._failed[disk_id] = error
            self._again = time.monotonic() + _AGAIN_SECONDS
        return True

    def _prove(self, disk_id: str) -> None:
        unproved = self._stored.unproved[disk_id]
        stamps = unproved.stamps()  # what is written from here on makes others
        if self._proved.get(disk_id) == stamps:
            return
        unproved.prove(self._go_on)
        self._proved[disk_id] = stamps
        self._failed.pop(disk_id, None)
        log.info("Disk %s is proved: its files are what the manifests say.", disk_id)

    def _look_back(self) -> None:
        """See whether what was proved has been written to since, and whether all could be."""
        for disk_id, failure in self._failed.items():
            self.damage = self.damage or StorageError(
                f"Disk {disk_id} was served unproved: {failure.message}", failure.hint
            )
        try:
            changed = [
                each
                for each, then in self._proved.items()
                if self._stored.unproved[each].stamps() != then
            ]
        except StorageError as error:
            self.damage = self.damage or error
            return
        if changed:
            self.damage = self.damage or StorageError(
                f"Somebody wrote to the files of disk {changed[0]} while it was served.",
                "What was read last may be wrong. Verify the target.",
            )

    def _go_on(self) -> None:
        if self._ended.is_set():
            raise _EndedError

    def end(self) -> None:
        """End it, wherever it is."""
        self._ended.set()
        self.join()


class _EndedError(Exception):
    """Nobody needs the proof any more."""


@contextmanager
def _proving(stored: OpenDisks, server: Server) -> Iterator[_Proof]:
    proof = _Proof(stored, server)
    proof.start()
    try:
        yield proof
    finally:
        proof.end()


@contextmanager
def _listening(wanted: Path | None) -> Iterator[tuple[socket.socket, Path]]:
    """A socket that listens, for us alone, and is gone after the block.

    Raises:
        UsageError: the path is something else.
        Locked: somebody serves there.
        StorageError: no socket can be made there.
    """
    path = wanted or runtime_folder() / f"nbd-{os.getpid()}"
    if len(os.fsencode(path)) > LONGEST_ADDRESS:
        raise UsageError(
            f"The path {path} is too long for a socket.", f"Use {LONGEST_ADDRESS} bytes at most."
        )
    with storage_errors(f"listen at {path}"), socket.socket(socket.AF_UNIX) as listener:
        _remove_stale(path)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            listener.listen()
            yield listener, path
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that was killed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} is there, and is no socket.", "Choose another path.")
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise Locked(f"Somebody serves at {path} already.", "Choose another path, or end that server.")
