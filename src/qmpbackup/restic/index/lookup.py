# SPDX-License-Identifier: Apache-2.0
"""Which blobs a repository has, and where: its index files, gathered in a compact cache.

The cache is a few sorted files (`table`), each made of whole index files, whose names are hashes
of their contents: a cache file is right as long as the repository lists the index files in it, and
what is damaged, foreign or outdated is made anew. Measured against sqlite3 (one table WITHOUT ROWID)
with 2.5 million blobs it is built in a third of the time, which grows with their number and not
faster, answers "not there" in half of it, takes 49 bytes a blob where sqlite3 takes 62, and notices
flipped bits; 10 million blobs (bench/index.py): 43 s to build, 3 to 7 µs a question, 81 MiB of memory.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, Self, TypeVar

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.restic.index.cache import CacheFolder
from qmpbackup.restic.index.index_file import parse
from qmpbackup.restic.index.making import Collector
from qmpbackup.restic.index.table import Spot, Table, Unusable
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.storage.interface import Kind, Missing

_log = logging.getLogger(__name__)

_RUN: Final = 131_072
"""Records that are gathered in memory before they are written."""
_MOST_RUNS: Final = 64
_GROWTH: Final = 3
"""A file stays as it is while it has this many times the records of all smaller ones together."""
_MOST_AHEAD: Final = 8
_BYTES_AHEAD: Final = 4 << 20
"""Index files that are loaded while one is parsed, and their bytes before decompression."""
_ASKED: Final = 65_536
_ATTEMPTS: Final = 5
_PAUSE_SECONDS: Final = 0.1

T = TypeVar("T")


class IndexFiles(Protocol):
    """What of a repository is needed here."""

    def files(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths of all files of a kind."""

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
        """The JSON of a file, checked."""


class BlobIndex:
    """What is known of a repository's blobs. Any thread may ask, at any time."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._files: tuple[Table, ...] = ()
        self._changing = threading.RLock()
        self._own: tuple[dict[bytes, Spot], ...] = tuple({} for _ in BlobType)
        self._source: IndexFiles | None = None
        self._damaged: Callable[[str, DamagedError], None] | None = None

    @classmethod
    def open(cls, cache: Path | None, repository_id: str) -> Self:
        """The index of a repository, empty until `sync`; `cache` holds caches of many of them.

        Where the folder cannot be used, there is no cache, and that is no error.
        """
        path = cache / repository_id if cache is not None else None
        return cls(CacheFolder(path, bytes.fromhex(repository_id)))

    def close(self) -> None:
        """Let go of everything."""
        self._files = ()
        self._own = tuple({} for _ in BlobType)
        self._source = self._damaged = None
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Table known; a blob that lies in two packs counts twice."""
        return sum(table.count for table in self._files) + sum(map(len, self._own))

    def has(self, type_: BlobType, id_: bytes) -> bool:
        """Whether the repository has a blob.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        return id_ in self._own[type_] or self._ask(
            lambda files: any(table.has(type_, id_) for table in files)
        )

    def find(self, type_: BlobType, id_: bytes) -> Spot | None:
        """One place of a blob.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        return self._own[type_].get(id_) or self._ask(
            lambda files: next((p for table in files for p in table.find(type_, id_)), None)
        )

    def find_all(self, type_: BlobType, id_: bytes) -> list[Spot]:
        """All places of a blob, each once.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        own = self._own[type_].get(id_)
        found = self._ask(lambda files: [p for table in files for p in table.find(type_, id_)])
        return list(dict.fromkeys([own, *found] if own else found))

    def missing(self, type_: BlobType, ids: Iterable[bytes]) -> Iterator[bytes]:
        """Those of many blobs that the repository lacks, in no order; quicker than one by one.

        A blob that is asked for twice may come twice.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """

        def absent(files: tuple[Table, ...]) -> list[bytes]:
            left = sorted(id_ for id_ in piece if id_ not in self._own[type_])
            for table in files:
                left = table.absent(type_, left)
            return left

        source = iter(ids)
        while piece := set(islice(source, _ASKED)):
            yield from self._ask(absent)

    def packs(self) -> set[bytes]:
        """All packs that index files name, with their lengths by them, as `PackSize.compact`.

        Takes about 130 bytes of memory a pack.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        return self._ask(lambda files: {p.compact() for each in files for p in each.pack_sizes()})

    def add(self, pack: str, blobs: Iterable[PackedBlob]) -> None:
        """Know the blobs of a pack that this run has stored and no index file names yet."""
        pack_id = bytes.fromhex(pack)
        for blob in blobs:
            place = Spot(pack_id, blob.offset, blob.length, blob.raw_length)
            self._own[blob.type][blob.id] = place

    def indexed(self, name: str, document: bytes) -> None:
        """Take over an index file that this run has stored, so that no `sync` has to load it.

        Raises:
            StorageError: neither the cache nor the folder for temporary files can take it.
        """
        packs = list(parse(document, name))
        collector = Collector()
        collector.add(bytes.fromhex(name), packs)
        with self._changing, self._folder.held():
            wanted = {table: frozenset(table.files) for table in self._files}
            if not any(bytes.fromhex(name) in files for files in wanted.values()):
                self._files = self._compacted(wanted, [self._folder.gathered(collector)])
        for pack, blobs in packs:
            self._disown(bytes.fromhex(pack), blobs)

    def _disown(self, pack: bytes, blobs: Iterable[PackedBlob]) -> None:
        for blob in blobs:
            own = self._own[blob.type].get(blob.id)
            if own is not None and own.pack == pack:
                del self._own[blob.type][blob.id]

    def sync(
        self, source: IndexFiles, damaged: Callable[[str, DamagedError], None] | None = None
    ) -> None:
        """Know exactly what the repository's index files say now, and what `add` was told.

        Only index files that are not in the cache are loaded. `damaged` is told of those that
        cannot be read, which are then left out.

        Raises:
            DamagedError: an index file is damaged, and there is no `damaged`.
            StorageError: the storage fails, or neither cache nor temporary files can be written.
        """
        with self._changing:
            self._source, self._damaged = source, damaged
            self._synced(source, damaged, thorough=False)

    def _synced(
        self,
        source: IndexFiles,
        damaged: Callable[[str, DamagedError], None] | None,
        *,
        thorough: bool,
    ) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                return self._sync(source, damaged, thorough=thorough or attempt > 0)
            except (Missing, Unusable) as error:
                # An index file went between listing and reading: somebody prunes. Or the cache is
                # damaged in a way that its opening does not show.
                _log.debug("The index changed while it was read: %s", error)
                time.sleep(_PAUSE_SECONDS * attempt)
        raise StorageError(
            "The index of the repository cannot be read: it changed each time.",
            "See whether another program is at work on it, and whether the disk is well.",
        )

    def _sync(
        self,
        source: IndexFiles,
        damaged: Callable[[str, DamagedError], None] | None,
        *,
        thorough: bool,
    ) -> None:
        listed = {bytes.fromhex(name): size for name, size in source.files(Kind.INDEX)}
        with self._folder.held():
            wanted = {}
            missing = set(listed)
            known = {*self._files, *self._folder.load()}
            for table in sorted(known, key=lambda each: -each.count):
                keep = missing.intersection(table.files)
                if keep and (not thorough or table.intact()):
                    wanted[table] = frozenset(keep)
                    missing -= keep
                else:
                    self._folder.forget(table)
            fresh = self._gathered(source, [(name, listed[name]) for name in missing], damaged)
            self._files = self._compacted(wanted, fresh)

    def _gathered(
        self,
        source: IndexFiles,
        names: list[tuple[bytes, int]],
        damaged: Callable[[str, DamagedError], None] | None,
    ) -> list[Table]:
        """What index files say, in tables that have no name."""
        runs: list[Table] = []
        collector = Collector()
        for name, load in _ahead(source, names):
            try:
                collector.add(name, parse(load(), name.hex()))
            except DamagedError as error:
                if damaged is None:
                    raise
                damaged(name.hex(), error)
            if collector.count >= _RUN:
                runs.append(self._folder.gathered(collector))
                collector = Collector()
            if len(runs) >= _MOST_RUNS:
                runs = [self._folder.merged({run: frozenset(run.files) for run in runs})]
        if collector.files:
            runs.append(self._folder.gathered(collector))
        return runs

    def _compacted(
        self, wanted: Mapping[Table, frozenset[bytes]], fresh: list[Table]
    ) -> tuple[Table, ...]:
        """Files that hold just what is wanted, few enough: small ones are merged into one."""
        merging = {table: frozenset(table.files) for table in fresh}
        merging |= {p: keep for p, keep in wanted.items() if len(keep) < len(p.files)}
        staying = sorted((p for p in wanted if p not in merging), key=lambda each: each.count)
        total = sum(table.count for table in merging)
        move = 0
        for number, table in enumerate(staying, 1):
            move = number if table.count < _GROWTH * total else move
            total += table.count
        merging |= {table: wanted[table] for table in staying[:move]}
        del staying[:move]
        if merging:
            staying.append(self._folder.merged(merging, keep=True))
            for table in merging:
                self._folder.forget(table)
        return tuple(sorted(staying, key=lambda each: -each.count))

    def _ask(self, question: Callable[[tuple[Table, ...]], T]) -> T:
        for _ in range(_ATTEMPTS):
            files = self._files
            try:
                return question(files)
            except Unusable as error:
                _log.debug("The cache of the index is damaged and is made anew: %s", error)
                self._mend(files)
        raise StorageError(
            "The cache of the index is damaged again and again.",
            "See whether the disk with the folder for caches is well.",
        )

    def _mend(self, files: tuple[Table, ...]) -> None:
        """Replace what is damaged, unless another thread has done so meanwhile."""
        with self._changing:
            if self._files is not files:
                return
            if self._source is None:
                self._files = tuple(table for table in files if table.intact())
            else:
                self._synced(self._source, self._damaged, thorough=True)


def _ahead(
    source: IndexFiles, names: Iterable[tuple[bytes, int]]
) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """Names of index files, each with what waits for its content; some are loaded ahead."""
    with ThreadPoolExecutor(_MOST_AHEAD, "index") as threads:
        waiting = deque[tuple[bytes, int, Callable[[], bytes]]]()
        ahead = 0
        try:
            for name, size in names:
                while waiting and (ahead + size > _BYTES_AHEAD or len(waiting) >= _MOST_AHEAD):
                    first, its_size, load = waiting.popleft()
                    ahead -= its_size
                    yield first, load
                future = threads.submit(source.load_unpacked, Kind.INDEX, name.hex(), size)
                waiting.append((name, size, future.result))
                ahead += size
                interrupt.check()
            while waiting:
                first, _, load = waiting.popleft()
                yield first, load
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
