# SPDX-License-Identifier: Apache-2.0
"""Prove that a repository holds every point whole, as far as is asked.

    always   index files, snapshots, trees and manifests are read; lists of chunks are what manifests
             say; the index names every chunk; the packs that it names are there, as long as it says
    share    the packs that the points need, or a random share of them, are read: each once, whole

What is found of a pack concerns the points that need a chunk of it which is nowhere else. Those chunks
are read one by one, so that a point is called damaged exactly if it cannot be restored.
"""

import logging
import math
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError
from qmpbackup.model import Point, StoredDisk
from qmpbackup.plan.sizes import human
from qmpbackup.restic.checker import Problem, check_packs, find_structure_problems
from qmpbackup.restic.index.index_file import LARGEST
from qmpbackup.restic.pack import BlobType
from qmpbackup.restic.storage.interface import Kind, Missing
from qmpbackup.restic.threads import in_threads
from qmpbackup.targets.inventory import Damage, Inventory
from qmpbackup.targets.report import Proved, Report
from qmpbackup.targets.repository.chunk_list import CHUNK, ID, ChunkList
from qmpbackup.targets.repository.points import VmPoints

log = logging.getLogger(__name__)

_THREADS: Final = 4
_BLOCK: Final = 1024 * ID
"""Bytes of a list that are compared at a time."""


def prove(target: VmPoints, found: Inventory, point: Point | None, share: float) -> Report:
    """Prove one point or all of a VM's, reading a share of the packs that they need.

    Raises:
        QmpBackupError: it cannot be looked at as a whole.
    """
    check = _Verification(target, (point,) if point else found.points)
    check.look_at_indexes()
    check.look_at_points()
    check.look_at_packs(only_needed=point is not None)
    if share:
        check.read(share)
    check.find_broken_chunks()
    damaged = {each.path: each for each in (() if point else found.damaged)}
    damaged |= {each.path: each for each in check.damaged()}
    return Report(
        verdicts=tuple(Proved(each, check.problems_of(each)) for each in check.points),
        damaged=tuple(damaged.values()),
        files=len(check.needed),
        size=check.needed_size,
        read_files=check.read_files,
        read_size=check.read_size,
    )


class _Verification:
    """What was found so far, about these points and all that they need."""

    def __init__(self, target: VmPoints, points: Sequence[Point]) -> None:
        self.points = points
        self.needed: set[bytes] = set()
        """The packs that the points need."""
        self.read_files = 0
        self.read_size = 0
        self._target = target
        self._repository = target.repository
        self._lock = threading.Lock()
        self._problems: dict[str, dict[str, None]] = {point.id: {} for point in points}
        self._indexes: dict[str, str] = {}
        self._sizes: dict[bytes, int] = {}
        self._bad: dict[bytes, str] = {}
        """Packs with something wrong, and what."""
        self._broken: dict[bytes, str] = {}
        """Chunks that can be read from nowhere, and why, in sentences; none if no index names them."""

    @property
    def needed_size(self) -> int:
        """Bytes of the packs that the points need, as far as they are there."""
        return sum(self._sizes.values())

    def damaged(self) -> Iterator[Damage]:
        """Everything wrong that is no point."""
        for name, reason in self._indexes.items():
            yield Damage(f"{Kind.INDEX}/{name}", reason)
        for pack, reason in self._bad.items():
            yield Damage(f"{Kind.DATA}/{pack.hex()}", reason)

    def problems_of(self, point: Point) -> tuple[str, ...]:
        """Everything that keeps a point from being restored, each as a sentence."""
        return tuple(self._problems[point.id])

    def look_at_indexes(self) -> None:
        """Read all index files: what is known of them may come from a cache."""

        def look(name: str) -> None:
            try:
                self._repository.load_unpacked(Kind.INDEX, name)
            except Missing:
                pass  # somebody has replaced it meanwhile
            except DamagedError as error:
                with self._lock:
                    self._indexes[name] = error.message

        storage = self._repository.storage
        names = [name for name, _ in storage.list(Kind.INDEX)]
        in_threads(names, look, lambda _: 2 * LARGEST, _THREADS, storage.give_up)

    def look_at_points(self) -> None:
        """Read what describes the points, and ask the index for all their chunks."""
        lists = _Lists(self._target)
        for point in self.points:
            interrupt.check()
            log.info("Verifying point %s", point.id)
            try:
                self._look_at_description(point)
            except (DamagedError, Missing) as error:
                self._problems[point.id][error.message] = None
                continue
            for disk in point.disks:
                try:
                    for chunk_id, length in lists.news(point, disk):
                        self._need(BlobType.DATA, chunk_id, length)
                except DamagedError as error:
                    self._problems[point.id][error.message] = None

    def _look_at_description(self, point: Point) -> None:
        self._repository.load_unpacked(Kind.SNAPSHOT, self._target.snapshot_of(point).id)
        for kind, blob_id in self._target.description(point):
            self._need(kind, blob_id)
            if kind is BlobType.DATA:  # of trees and manifest, the manifest was not read yet
                self._repository.load_blob(kind, blob_id)

    def _need(self, kind: BlobType, blob_id: bytes, length: int | None = None) -> None:
        place = self._repository.index.find(kind, blob_id)
        if place is not None:
            self.needed.add(place.pack)
            if length is not None and place.packed(kind, blob_id).plain_length != length:
                raise DamagedError(f"Its chunk {blob_id.hex()} is not as long as it must be.")
        else:
            self._broken[blob_id] = ""

    def look_at_packs(self, *, only_needed: bool) -> None:
        """Compare the packs that are there with the index."""
        for problem in find_structure_problems(self._repository):
            if not only_needed or bytes.fromhex(problem.pack) in self.needed:
                self._note(problem)
        for name, size in self._repository.storage.list(Kind.DATA):
            if bytes.fromhex(name) in self.needed:
                self._sizes[bytes.fromhex(name)] = size

    def _note(self, problem: Problem) -> None:
        with self._lock:
            self._bad.setdefault(bytes.fromhex(problem.pack), problem.what)

    def read(self, share: float) -> None:
        """Read the packs that the points need, or a random share of them."""
        packs = sorted(pack for pack in self._sizes if pack not in self._bad)
        if share < 1:
            packs = random.SystemRandom().sample(packs, math.ceil(len(packs) * share))
        log.info("Reading %d packs, %s", len(packs), human(sum(self._sizes[p] for p in packs)))

        def checked(size: int) -> None:
            with self._lock:
                self.read_files += 1
                self.read_size += size

        jobs = ((pack.hex(), self._sizes[pack]) for pack in packs)
        check_packs(self._repository, jobs, self._note, checked, threads=_THREADS)

    def find_broken_chunks(self) -> None:
        """Find out which points suffer from what was found."""
        if self._bad:
            self._try_chunks_of_bad_packs()
        if self._broken:
            for point in self.points:
                self._blame(point)

    def _try_chunks_of_bad_packs(self) -> None:
        lists = _Lists(self._target)
        tried: set[bytes] = set()
        for point in self.points:
            for disk in point.disks:
                for chunk_id, _ in lists.news_if_whole(point, disk):
                    place = self._repository.index.find(BlobType.DATA, chunk_id)
                    if place and place.pack in self._bad and chunk_id not in tried:
                        tried.add(chunk_id)
                        self._try(chunk_id, place.pack.hex())

    def _try(self, chunk_id: bytes, pack: str) -> None:
        interrupt.check()
        try:
            self._repository.load_blob(BlobType.DATA, chunk_id)
        except DamagedError as error:
            where = "" if pack in error.message else f" It lies in pack {pack}."
            self._broken[chunk_id] = error.message + where

    def _blame(self, point: Point) -> None:
        for disk in point.disks:
            found = _Lists(self._target).news_if_whole(point, disk)
            broken = dict.fromkeys(chunk_id for chunk_id, _ in found if chunk_id in self._broken)
            if broken:
                first = next(iter(broken))
                reason = self._broken[first] or f"No index names the data blob {first.hex()}."
                sentence = f"Disk {disk.id} lacks {len(broken)} of its chunks. {reason}"
                self._problems[point.id][sentence] = None


class _Lists:
    """The lists of chunks of points in their order, each looked at only where it differs from the
    list of the same disk before it."""

    def __init__(self, target: VmPoints) -> None:
        self._target = target
        self._before: dict[str, bytes] = {}

    def news(self, point: Point, disk: StoredDisk) -> Iterator[tuple[bytes, int]]:
        """Ids of chunks that this disk did not have at the same places before, some repeatedly, and
        how long each must be.

        Raises:
            DamagedError: the list cannot be read, or is not what the manifest says.
        """
        contents = self._target.contents(point, disk)
        before = self._before.get(disk.id, b"")
        # Without a last one that is short, which a disk that has grown must have longer.
        self._before[disk.id] = contents.chunks[: contents.size // CHUNK * ID]
        return _differences(before, contents)

    def news_if_whole(self, point: Point, disk: StoredDisk) -> Iterator[tuple[bytes, int]]:
        """The same; nothing where the list cannot be read."""
        try:
            return self.news(point, disk)
        except DamagedError:
            return iter(())


def _differences(before: bytes, contents: ChunkList) -> Iterator[tuple[bytes, int]]:
    now = contents.chunks
    whole = contents.size // CHUNK * ID
    last = b""
    for start in range(0, whole, _BLOCK):
        interrupt.check()
        end = min(start + _BLOCK, whole)
        if now[start:end] == before[start:end]:
            continue
        for at in range(start, end, ID):
            chunk_id = now[at : at + ID]
            if chunk_id not in {last, before[at : at + ID]}:
                last = chunk_id
                yield chunk_id, CHUNK
    if whole < len(now):
        yield now[whole:], contents.size % CHUNK
