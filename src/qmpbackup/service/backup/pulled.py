# SPDX-License-Identifier: Apache-2.0
"""The way of a run where we read what changed over NBD, and hand it to the target in chunks.

    unchanged chunks     are those of the point that the disk builds on, unread
    changed chunks       read ─ handed over
    samples              unchanged chunks, read again: they must be what the target has

What is not a chunk of that point, because the disk grew, is read like a change.
"""

import logging
import math
import random
from functools import partial

from qmpbackup import interrupt
from qmpbackup.errors import JobError, UnrecordedChanges
from qmpbackup.model import Point
from qmpbackup.nbd.reader import Chunk
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.plan.progress import DiskProgress, Stage
from qmpbackup.service.backup.source import ReadableDisk, Views
from qmpbackup.service.backup.way import Frame, Show
from qmpbackup.targets.receiver import ArrivingDisk, Buffer, ChunkReceiver, Sealed

log = logging.getLogger(__name__)


class Pulled:
    """See `Way`: one run's chunks on their way into a target."""

    def __init__(self, frame: Frame, chunks: ChunkReceiver) -> None:
        self._frame = frame
        self._chunks = chunks
        frame.rollback.push("end the writing", chunks.abort)
        self._disks: dict[str, ArrivingDisk] = {}
        self._unrecorded: set[str] = set()
        self._done = {
            each.disk.id: DiskProgress(each.disk.id, 0, each.bytes_to_copy)
            for each in frame.plan.disks
        }

    def prepare(self, views: Views) -> None:
        """What is known of the disks, and what is to be read anyway."""
        for plan in self._frame.plan.disks:
            disk = plan.disk
            self._disks[disk.id] = self._chunks.begin(disk.id, disk.size, plan.base)
        views.show({seat.number: self._samples(seat) for seat in self._frame.plan.seats})

    def _samples(self, seat: Seat) -> list[int]:
        """Chunks to be read though nothing is known to have changed there."""
        disk = self._disks[seat.disk.id]
        if not seat.base_bitmap:
            return []
        share = self._frame.request.audit
        wanted = min(disk.known, math.ceil(disk.known * share)) if share > 0 else 0
        chosen = random.SystemRandom().sample(range(disk.known), wanted)
        return sorted([*chosen, *range(disk.known, disk.count)])

    def copy(self, views: Views, show: Show) -> None:
        """Read all disks and hand their chunks over.

        Raises:
            UnrecordedChanges: an audit found some; the point must not be made.
        """
        with views.reading(partial(show, Stage.STAGE)):
            for seat in self._frame.plan.seats:
                with views.open(seat) as disk:
                    self._read(seat, disk, show)
        if self._unrecorded:
            names = ", ".join(sorted(self._unrecorded))
            raise UnrecordedChanges(
                f"An audit found changes that no change bitmap had recorded: {names}.",
                "Points since the last full may lack them: make a full (--level full), and find out "
                "what wrote to the images past QEMU.",
                frozenset(self._unrecorded),
            )

    def _read(self, seat: Seat, pulled: ReadableDisk, show: Show) -> None:
        disk = self._disks[seat.disk.id]
        done = 0
        self._show(show, seat, done, pulled.bytes_to_read)
        for chunk in pulled.chunks():
            if chunk.data is None:
                for index in disk.zeros(chunk.index, chunk.count):
                    self._note(seat, pulled, index)
            else:
                self._put(seat, pulled, chunk, chunk.data)
                done += chunk.length
                self._show(show, seat, done, pulled.bytes_to_read)
        self._chunks.drain()
        if not disk.is_complete:
            raise JobError(f"Disk {seat.disk.id} was not read completely.", "Run again.")
        log.debug("Disk %s: %d bytes read, %d stored.", seat.disk.id, done, disk.stored)

    def _put(self, seat: Seat, pulled: ReadableDisk, chunk: Chunk, data: Buffer) -> None:
        def done(differs: bool) -> None:
            chunk.release()
            if differs:
                self._note(seat, pulled, chunk.index)

        self._disks[seat.disk.id].put(chunk.index, data, done)

    def _note(self, seat: Seat, pulled: ReadableDisk, index: int) -> None:
        """A chunk is not what it was; if no bitmap says so, that is an alarm."""
        if not pulled.changed[index]:
            place = index * seat.chunk
            log.error("Disk %s has changed at %d, which no bitmap recorded.", seat.disk.id, place)
            self._unrecorded.add(seat.disk.id)

    def _show(self, show: Show, seat: Seat, done: int, total: int) -> None:
        self._done[seat.disk.id] = DiskProgress(seat.disk.id, done, total)
        show(Stage.COPY, tuple(self._done.values()))

    def seal(self, plan: DiskPlan) -> Sealed:
        """All of a disk is stored."""
        interrupt.check()
        return self._chunks.seal(plan.disk.id)

    def commit(self, point: Point) -> None:
        """Make the point appear."""
        self._chunks.commit(point)
