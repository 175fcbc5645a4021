# SPDX-License-Identifier: Apache-2.0
"""Which blobs a repository has, and where: its index files, gathered in a compact cache.

The cache is a few sorted files (`places.py`), each made of whole index files, whose names are hashes
of their contents: a cache file is right as long as the repository lists the index files in it, and
what is damaged, foreign or outdated is made anew. Measured against sqlite3 (one table WITHOUT ROWID)
with 2.5 million blobs it is built in a third of the time, which grows with their number and not
faster, answers "not there" in half of it, takes 49 bytes a blob where sqlite3 takes 62, and notices
flipped bits; 10 million blobs (bench/index.py): 43 s to build, 3 to 7 µs a question, 81 MiB of memory.

A cache holds ids and places in the clear, that is hashes of what was stored, and neither contents
nor keys; its folder is for its user alone. Without a folder the same files lie nameless in the
folder for temporary files. Several processes may share a folder: files never change, and a lock is
held while some are replaced. Knows nothing of how index files are sealed or stored.
"""

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from stat import S_ISDIR
from typing import Final, Protocol, Self, TypeVar

from qmpbackup import interrupt
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, Locked, StorageError
from qmpbackup.filelock import locked
from qmpbackup.restic import index
from qmpbackup.restic.pack import BlobType, PackedBlob
from qmpbackup.restic.places import Collector, Place, Places, Unusable, merge
from qmpbackup.restic.storage.interface import Kind, Missing, Storage

__all__ = ["BlobIndex", "Place", "Source", "cache_folder"]

_log = logging.getLogger(__name__)

_ENDING: Final = ".places"
_TEMPORARY: Final = ".tmp"
_RUN: Final = 131_072
"""Records that are gathered in memory before they are written."""
_MOST_RUNS: Final = 64
_GROWTH: Final = 3
"""A file stays as it is while it has this many times the records of all smaller ones together."""
_MOST_AHEAD: Final = 8
_BYTES_AHEAD: Final = 4 << 20
"""Index files that are loaded while one is parsed, and their bytes before decompression."""
_ASKED: Final = 65_536
_LOCK_SECONDS: Final = 10.0
_ATTEMPTS: Final = 5
_PAUSE_SECONDS: Final = 0.1

T = TypeVar("T")


class Source(Protocol):
    """What of a repository is needed here."""

    @property
    def storage(self) -> Storage:
        """Where its files lie."""

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
        """The JSON of a file, checked."""


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Where caches go: $RESTIC_CACHE_DIR, $XDG_CACHE_HOME or ~/.cache, each with our name."""
    for name in ("RESTIC_CACHE_DIR", "XDG_CACHE_HOME"):
        if environment.get(name, "").startswith("/"):
            return Path(environment[name]) / "qmpbackup"
    home = environment.get("HOME", "")
    return Path(home) / ".cache" / "qmpbackup" if home.startswith("/") else None


class BlobIndex:
    """What is known of a repository's blobs. Any thread may ask, at any time."""

    def __init__(self, folder: "_Folder") -> None:
        self._folder = folder
        self._files: tuple[Places, ...] = ()
        self._changing = threading.RLock()
        self._own: tuple[dict[bytes, Place], ...] = tuple({} for _ in BlobType)
        self._source: Source | None = None
        self._damaged: Callable[[str, DamagedError], None] | None = None

    @classmethod
    def open(cls, cache: Path | None, repository_id: str) -> Self:
        """The index of a repository, empty until `sync`; `cache` holds caches of many of them.

        Where the folder cannot be used, there is no cache, and that is no error.
        """
        path = cache / repository_id if cache is not None else None
        return cls(_Folder(path, bytes.fromhex(repository_id)))

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
        """Places known; a blob that lies in two packs counts twice."""
        return sum(places.count for places in self._files) + sum(map(len, self._own))

    def has(self, type_: BlobType, id_: bytes) -> bool:
        """Whether the repository has a blob.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        return id_ in self._own[type_] or self._ask(
            lambda files: any(places.has(type_, id_) for places in files)
        )

    def find(self, type_: BlobType, id_: bytes) -> Place | None:
        """One place of a blob.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        return self._own[type_].get(id_) or self._ask(
            lambda files: next((p for places in files for p in places.find(type_, id_)), None)
        )

    def find_all(self, type_: BlobType, id_: bytes) -> list[Place]:
        """All places of a blob, each once.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """
        own = self._own[type_].get(id_)
        found = self._ask(lambda files: [p for places in files for p in places.find(type_, id_)])
        return list(dict.fromkeys([own, *found] if own else found))

    def missing(self, type_: BlobType, ids: Iterable[bytes]) -> Iterator[bytes]:
        """Those of many blobs that the repository lacks, in no order; quicker than one by one.

        A blob that is asked for twice may come twice.

        Raises:
            StorageError: the cache was damaged, and could not be made anew.
        """

        def absent(files: tuple[Places, ...]) -> list[bytes]:
            left = sorted(id_ for id_ in piece if id_ not in self._own[type_])
            for places in files:
                left = places.absent(type_, left)
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
            place = Place(pack_id, blob.offset, blob.length, blob.raw_length)
            self._own[blob.type][blob.id] = place

    def indexed(self, name: str, document: bytes) -> None:
        """Take over an index file that this run has stored, so that no `sync` has to load it.

        Raises:
            StorageError: neither the cache nor the folder for temporary files can take it.
        """
        packs = list(index.parse(document, name))
        collector = Collector()
        collector.add(bytes.fromhex(name), packs)
        with self._changing, self._folder.held():
            wanted = {places: frozenset(places.files) for places in self._files}
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
        self, source: Source, damaged: Callable[[str, DamagedError], None] | None = None
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
        source: Source,
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
        source: Source,
        damaged: Callable[[str, DamagedError], None] | None,
        *,
        thorough: bool,
    ) -> None:
        listed = {bytes.fromhex(name): size for name, size in source.storage.list(Kind.INDEX)}
        with self._folder.held():
            wanted = {}
            missing = set(listed)
            known = {*self._files, *self._folder.load()}
            for places in sorted(known, key=lambda each: -each.count):
                keep = missing.intersection(places.files)
                if keep and (not thorough or places.intact()):
                    wanted[places] = frozenset(keep)
                    missing -= keep
                else:
                    self._folder.forget(places)
            fresh = self._gathered(source, [(name, listed[name]) for name in missing], damaged)
            self._files = self._compacted(wanted, fresh)

    def _gathered(
        self,
        source: Source,
        names: list[tuple[bytes, int]],
        damaged: Callable[[str, DamagedError], None] | None,
    ) -> list[Places]:
        """What index files say, in temporary files of places."""
        runs: list[Places] = []
        collector = Collector()
        for name, load in _ahead(source, names):
            try:
                collector.add(name, index.parse(load(), name.hex()))
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
        self, wanted: Mapping[Places, frozenset[bytes]], fresh: list[Places]
    ) -> tuple[Places, ...]:
        """Files that hold just what is wanted, few enough: small ones are merged into one."""
        merging = {places: frozenset(places.files) for places in fresh}
        merging |= {p: keep for p, keep in wanted.items() if len(keep) < len(p.files)}
        staying = sorted((p for p in wanted if p not in merging), key=lambda each: each.count)
        total = sum(places.count for places in merging)
        move = 0
        for number, places in enumerate(staying, 1):
            move = number if places.count < _GROWTH * total else move
            total += places.count
        merging |= {places: wanted[places] for places in staying[:move]}
        del staying[:move]
        if merging:
            staying.append(self._folder.merged(merging, keep=True))
            for places in merging:
                self._folder.forget(places)
        return tuple(sorted(staying, key=lambda each: -each.count))

    def _ask(self, question: Callable[[tuple[Places, ...]], T]) -> T:
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

    def _mend(self, files: tuple[Places, ...]) -> None:
        """Replace what is damaged, unless another thread has done so meanwhile."""
        with self._changing:
            if self._files is not files:
                return
            if self._source is None:
                self._files = tuple(places for places in files if places.intact())
            else:
                self._synced(self._source, self._damaged, thorough=True)


def _ahead(
    source: Source, names: Iterable[tuple[bytes, int]]
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
                if threading.current_thread() is threading.main_thread():
                    interrupt.check()
            while waiting:
                first, _, load = waiting.popleft()
                yield first, load
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


class _Folder:
    """Where files of places lie: in a cache that processes share, or nameless."""

    def __init__(self, path: Path | None, repository: bytes) -> None:
        self._path = path if path is not None and _made(path) else None
        self._repository = repository
        self._paths: dict[Places, Path] = {}
        self._held = False

    def close(self) -> None:
        self._paths.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from changing the cache; if that cannot be, it is left alone meanwhile."""
        with ExitStack() as stack:
            if self._path is not None:
                try:
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    fd = os.open(self._path / "lock", flags, 0o600)
                    stack.callback(os.close, fd)
                    stack.enter_context(locked(fd, "the cache", wait=_LOCK_SECONDS))
                    self._held = True
                except (Locked, OSError) as error:
                    _log.debug("The cache at %s is left alone: %s", self._path, error)
            try:
                yield
            finally:
                self._held = False

    def load(self) -> list[Places]:
        """All usable files of the cache; what is unusable in it is removed."""
        if self._path is None or not self._held:
            return []
        known = set(self._paths.values())
        with suppress(OSError):
            for path in self._path.iterdir():
                if path.suffix == _ENDING and path not in known:
                    self._open(path)
                elif path.suffix == _TEMPORARY:
                    path.unlink(missing_ok=True)
        return list(self._paths)

    def _open(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._paths[Places(fd, self._repository)] = path
        except (OSError, Unusable) as error:
            _log.debug("%s is no usable cache of an index: %s", path, error)
            path.unlink(missing_ok=True)

    def gathered(self, collector: Collector) -> Places:
        """What a collector has, in a nameless file."""
        return self._nameless(lambda fd: collector.write(fd, self._repository))

    def merged(self, sources: Mapping[Places, frozenset[bytes]], *, keep: bool = False) -> Places:
        """What is wanted of several files, in one; `keep` in the cache if that can be.

        Raises:
            Unusable: one of them is damaged.
            StorageError: there is no room for temporary files.
        """

        def fill(fd: int) -> None:
            merge(fd, self._repository, sources)

        if keep and self._held and self._path is not None:
            path = self._path / f"{os.urandom(8).hex()}{_ENDING}"
            try:
                return self._named(path, fill)
            except OSError as error:
                _log.debug("The cache at %s cannot be written: %s", self._path, error)
        return self._nameless(fill)

    def _named(self, path: Path, fill: Callable[[int], None]) -> Places:
        temporary = path.with_suffix(_TEMPORARY)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            places = self._filled(fd, fill)
            temporary.rename(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._paths[places] = path
        return places

    def _nameless(self, fill: Callable[[int], None]) -> Places:
        """A file that goes with us, in the cache's folder if there is one with room."""
        if self._path is not None:
            try:
                return self._filled(_unnamed(self._path), fill)
            except OSError as error:
                _log.debug("There is no room for the index at %s: %s", self._path, error)
        with storage_errors(f"write the index to {tempfile.gettempdir()}"):
            return self._filled(_unnamed(None), fill)

    def _filled(self, fd: int, fill: Callable[[int], None]) -> Places:
        try:
            fill(fd)
        except BaseException:
            os.close(fd)
            raise
        return Places(fd, self._repository)

    def forget(self, places: Places) -> None:
        """Remove a file from the cache; who reads it goes on."""
        path = self._paths.pop(places, None)
        if path is not None and self._held:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _unnamed(folder: Path | None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def _made(path: Path) -> bool:
    """Make the folder of one cache; whether it is there and nobody else's."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        state = path.lstat()
        if not S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise PermissionError("others may write there")
        path.chmod(0o700)
    except OSError as error:
        _log.debug("There is no cache at %s: %s", path, error)
        return False
    return True
