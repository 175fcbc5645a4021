# SPDX-License-Identifier: Apache-2.0
"""The way into a restic repository: we read what changed over NBD, and store it in chunks.

    unchanged chunks     keep the ids that the parent's list has, unread
    changed chunks       read ─ hash ─ stored unless the repository has them
    samples              unchanged chunks, read again: they must be what the parent says

What is not a chunk of the parent any more, because the disk grew, is read like a change.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import JobError, UnrecordedChanges, UsageError
from qmpbackup.machine.jobs import JobProgress
from qmpbackup.machine.pull import Method, Pull, PulledDisk, method
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import View
from qmpbackup.model import Level, Location, Point, Vm
from qmpbackup.nbd.reader import Chunk, Flow
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.levels import DiskPlan
from qmpbackup.plan.sizes import human
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.repository import Repository as OpenRepository
from qmpbackup.restic.storage.location import is_remote
from qmpbackup.restic.writer import Writer
from qmpbackup.service.backup.request import Request
from qmpbackup.service.backup.way import Frame, Stored
from qmpbackup.targets.inventory import Inventory
from qmpbackup.targets.repository.chunk_list import (
    CHUNK,
    ID,
    MOST_BYTES,
    ChunkList,
    count_chunks,
)
from qmpbackup.targets.repository.committing import disk_file
from qmpbackup.targets.repository.entrance import RepositoryEntrance
from qmpbackup.targets.repository.target import RepositoryTarget

log = logging.getLogger(__name__)


class Repository:
    """A repository with what it holds of the VM."""

    chunk = CHUNK

    def __init__(self, target: RepositoryTarget, stored: Inventory) -> None:
        self.id = target.id
        self.place = target.name
        self.folder = _local(target.name)
        self.stores_plain = False
        self.stored = stored
        self._target = target
        self._distrusted: frozenset[str] = frozenset()

    @staticmethod
    def stages(vm: Vm) -> bool:
        """Whether this QEMU has to copy into a local image, as far as can be told before."""
        return method(vm) is Method.STAGED

    def obstacle(self, point: Point, disk_id: str) -> str:
        """Why nothing can be built upon a disk of a point."""
        if disk_id in self._distrusted:
            return "an audit found changes since that no change bitmap had recorded"
        return self._target.quick_check(point, disk_id, self.stored.points)

    def distrust(self, disks: frozenset[str]) -> None:
        """From now on, nothing can be built upon these disks."""
        self._distrusted |= disks

    def claim(self, vm: Vm) -> AbstractContextManager["Repository"]:
        """It is there and held already."""
        del vm
        return nullcontext(self)

    def way(self, frame: Frame) -> "IntoRepository":
        """The way of a run into it.

        Raises:
            UsageError: the disks are too large for one point.
        """
        size = sum(plan.disk.size for plan in frame.plan.disks)
        if size > MOST_BYTES:
            raise UsageError(
                f"The disks have {human(size)} together, and a point in a repository holds no more "
                f"than {human(MOST_BYTES)}.",
                "Name some of them with --include, or use a folder as target.",
            )
        return IntoRepository(frame, self._target)


class Opening:
    """A repository that is being opened while the VM is looked at."""

    def __init__(self, request: Request, found: Callable[[], OpenRepository]) -> None:
        self._request = request
        self._found = found

    @contextmanager
    def found(self, vm: Vm) -> Iterator[Repository]:
        """Hold it as restic's own backups do, and read what it holds of the VM.

        Raises:
            QmpBackupError: it could not be opened, is not ours to write into, or nobody can say whether
                this VM is one whose points it holds.
        """
        target = RepositoryTarget(self._found(), vm.config.identity)
        target.repository.storage.require_ours()
        with target.lock(write=True, wait=self._request.lock_wait):
            stored = target.load()
            for damage in stored.damaged:
                log.warning("Damaged: %s: %s", damage.path, damage.reason)
            if not self._request.host:
                target.require_known()
            if others := target.namesakes():
                log.warning("%s They count as another VM's.", others)
            yield Repository(target, stored)


def _local(name: str) -> Path | None:
    """The folder of a repository on this machine."""
    path = Path(name)
    return None if is_remote(name) or not path.is_dir() else path


@contextmanager
def opening(request: Request, location: Location) -> Iterator[Opening]:
    """Begin to open the repository.

    Raises:
        UsageError: the request is none for a repository, or there is no password.
    """
    _refuse_what_makes_no_sense(request)
    with RepositoryEntrance(location).ahead() as found:
        yield Opening(request, found)


def _refuse_what_makes_no_sense(request: Request) -> None:
    if request.level is Level.DIFF:
        raise UsageError(
            "In a repository every point is complete, so there are no differentials.",
            "Use --level auto or inc.",
        )
    if request.monthly:
        raise UsageError(
            "A repository has no folders for months.", "`qmpbackup prune` limits what is kept."
        )
    if request.uuid:
        raise UsageError("The id of a repository is its own.", "Leave --uuid out.")
    if request.verify_chain:
        raise UsageError(
            "In a repository no point builds on the files of others.", "Leave --verify-chain out."
        )


class _Disk:
    """The list of chunks of one disk, while it is being made."""

    def __init__(self, size: int, parent: ChunkList | None) -> None:
        self.size = size
        self.count = count_chunks(self.size)
        self.known = 0
        """Chunks that are as in the parent unless something was read."""
        self.chunks = bytearray(ID * self.count)
        self.stored = 0
        if parent is not None:
            self.known = self.count if parent.size == self.size else parent.size // CHUNK
            known = memoryview(parent.chunks)[: ID * self.known]
            self.chunks[: len(known)] = known

    def length(self, index: int) -> int:
        """Bytes of a chunk; the last may be short."""
        return min(CHUNK, self.size - index * CHUNK)

    def id_of(self, index: int) -> bytes:
        """The id that the list has for a chunk."""
        return bytes(self.chunks[ID * index : ID * (index + 1)])

    def put(self, index: int, chunk_id: bytes) -> None:
        """Enter a chunk."""
        self.chunks[ID * index : ID * (index + 1)] = chunk_id

    def contents(self) -> ChunkList:
        """The complete list; no chunk can be entered any more."""
        contents = ChunkList(self.size, bytes(self.chunks))
        self.chunks = bytearray()  # a terabyte's list takes 32 MiB
        return contents


class IntoRepository:
    """One run's chunks on their way into a repository."""

    def __init__(self, frame: Frame, target: RepositoryTarget) -> None:
        self._frame = frame
        self._target = target
        self._writer = Writer(target.repository, check=frame.request.check)
        frame.rollback.push("end the writing", self._writer.abandon)
        self._disks: dict[str, _Disk] = {}
        self._contents: dict[str, ChunkList] = {}
        self._unrecorded: set[str] = set()
        self._zeros: dict[int, bytes] = {}
        self._done: dict[str, JobProgress] = {}
        self.view = View(
            frame.monitor,
            frame.plan.seats,
            frame.plan.names,
            teardown=frame.teardown,
            rollback=frame.rollback,
        )
        self._pull = Pull(
            frame.monitor,
            self.view,
            frame.plan.seats,
            frame.plan.names,
            method(frame.plan.vm),
            teardown=frame.teardown,
        )

    def prepare(self, scratches: Sequence[Scratch]) -> None:
        """Scratch images, the lists of chunks of the parents, and what is to be read anyway."""
        for plan in self._frame.plan.disks:
            base = plan.stored_base
            parent = self._target.contents(plan.base, base) if plan.base and base else None
            self._disks[plan.disk.id] = _Disk(plan.disk.size, parent)
        self._target.forget_contents()
        self._pull.start()
        samples = {seat.number: self._samples(seat) for seat in self._frame.plan.seats}
        self._pull.prepare(scratches, samples, self._stages())

    def _stages(self) -> list[Scratch]:
        staged = self._frame.plan.seats if self._pull.way is Method.STAGED else ()
        return [self._frame.scratch(seat, "stage") for seat in staged]

    def _samples(self, seat: Seat) -> list[int]:
        """Chunks to be read though nothing is known to have changed there."""
        disk = self._disks[seat.disk.id]
        if not seat.base_bitmap:
            return []
        share = self._frame.request.audit
        wanted = min(disk.known, math.ceil(disk.known * share)) if share > 0 else 0
        chosen = random.SystemRandom().sample(range(disk.known), wanted)
        return sorted([*chosen, *range(disk.known, disk.count)])

    def copy(self) -> None:
        """Read all disks and hand their chunks to the writer.

        Raises:
            UnrecordedChanges: an audit found some; the point must not be made.
        """
        speed = self._frame.request.speed
        self._pull.serve(self._frame.watch, speed)
        flow = Flow(speed=0 if self._pull.way is Method.STAGED else speed)
        with self._pull.probing():
            for seat in self._frame.plan.seats:
                with self._pull.open(seat, flow) as pulled:
                    self._read(seat, pulled)
        self._pull.finish()
        if self._unrecorded:
            names = ", ".join(sorted(self._unrecorded))
            raise UnrecordedChanges(
                f"An audit found changes that no change bitmap had recorded: {names}.",
                "Points since the last full may lack them: make a full (--level full), and find out "
                "what wrote to the images past QEMU.",
                frozenset(self._unrecorded),
            )

    def _read(self, seat: Seat, pulled: PulledDisk) -> None:
        disk = self._disks[seat.disk.id]
        done = 0
        for chunk in pulled.chunks():
            if chunk.data is None:
                self._take_zeros(seat, pulled, chunk)
            else:
                self._store(seat, pulled, chunk)
                done += chunk.length
                self._show(seat, done, pulled.bytes_to_read)
        self._writer.drain()
        if disk.chunks.find(bytes(ID)) >= 0:
            raise JobError(f"Disk {seat.disk.id} was not read completely.", "Run again.")
        log.debug("Disk %s: %d bytes read, %d stored.", seat.disk.id, done, disk.stored)

    def _store(self, seat: Seat, pulled: PulledDisk, chunk: Chunk) -> None:
        disk, data = self._disks[seat.disk.id], chunk.data

        def done(chunk_id: bytes, stored: int) -> None:
            chunk.release()
            disk.stored += stored
            self._enter(seat, pulled, chunk.index, chunk_id)

        if data is not None:
            self._writer.add(data, done)

    def _take_zeros(self, seat: Seat, pulled: PulledDisk, chunk: Chunk) -> None:
        disk = self._disks[seat.disk.id]
        last = chunk.index + chunk.count - 1
        inner = self._zero(CHUNK) if chunk.count > 1 else b""
        if seat.base_bitmap:
            for index in range(chunk.index, last):
                self._enter(seat, pulled, index, inner)
        else:
            disk.chunks[ID * chunk.index : ID * last] = inner * (chunk.count - 1)
        self._enter(seat, pulled, last, self._zero(disk.length(last)))

    def _zero(self, length: int) -> bytes:
        """The id of a chunk of zeros, which is stored when it is first needed."""
        if length not in self._zeros:
            self._zeros[length] = self._writer.add_now(BlobType.DATA, bytes(length))
        return self._zeros[length]

    def _enter(self, seat: Seat, pulled: PulledDisk, index: int, chunk_id: bytes) -> None:
        disk = self._disks[seat.disk.id]
        sampled = not pulled.changed[index] and index < disk.known
        if sampled and disk.id_of(index) != chunk_id:
            log.error(
                "Disk %s has changed at %d, which no bitmap recorded.", seat.disk.id, index * CHUNK
            )
            self._unrecorded.add(seat.disk.id)
        disk.put(index, chunk_id)

    def _show(self, seat: Seat, done: int, total: int) -> None:
        if self._frame.watch is not None:
            self._done[seat.disk.id] = JobProgress(seat.disk.id, done, total)
            self._frame.watch(tuple(self._done.values()))

    def close(self) -> None:
        """Nothing of ours is left in QEMU once the view is gone."""

    def stored(self, plan: DiskPlan) -> Stored:
        """What became of a disk."""
        interrupt.check()
        disk = self._disks[plan.disk.id]
        self._contents[plan.disk.id] = contents = disk.contents()
        return Stored(
            file=disk_file(self._target.vm, plan.disk.id),
            size=disk.stored,
            digest=contents.digest,
        )

    def commit(self, point: Point) -> None:
        """Write trees, packs, indexes and the snapshot."""
        self._target.commit(self._writer, point, self._contents)
        self._writer.stop()
