# SPDX-License-Identifier: Apache-2.0
"""A repository: its key and configuration, and on them its files, snapshots, blobs and locks.

What is read is checked before anybody sees it: the name is the hash of what is stored, the
authentication code fits, and nothing grows beyond its bounds when it is decompressed. Snapshots that
were read once are kept in a cache. Knows nothing of how a storage stores, nor what trees mean.
"""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final, Self, TypeVar

from qmpbackup.errors import DamagedError, QmpBackupError, StorageError
from qmpbackup.restic import config as configs
from qmpbackup.restic import keyfile, lock, snapshot, tree
from qmpbackup.restic.ahead import Ahead
from qmpbackup.restic.cache import Cache
from qmpbackup.restic.config import Config
from qmpbackup.restic.crypto import Key, seal, unseal
from qmpbackup.restic.index.cache import cache_folder
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.pack import BlobType, PackedBlob, open_blob, open_large_blob
from qmpbackup.restic.reader import load_part
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.snapshots import read_all
from qmpbackup.restic.storage.interface import (
    CONFIG,
    File,
    Kind,
    Missing,
    Storage,
)
from qmpbackup.restic.threads import PROCESSORS
from qmpbackup.restic.tree import Node
from qmpbackup.restic.unlocking import enter, make
from qmpbackup.restic.unpacked import bounded, called, compressed, decompressed, listed

T = TypeVar("T")

_log = logging.getLogger(__name__)

_UNNOTICED: Final = 16 << 10
"""Bytes of a stored snapshot that is read beside others; restic's have half a kilobyte."""


class Repository:
    """An open repository. All methods may be called from several threads; `look` and what lists, from one."""

    def __init__(
        self,
        storage: Storage,
        key: Key,
        config: Config,
        cache: Path | None,
        ahead: Ahead | None = None,
    ) -> None:
        self._storage = storage
        self._ahead = ahead or Ahead(storage)
        self.key = key
        self.config = config
        self.folder = cache
        self._cache = Cache(cache / config.id / "files" if cache else None, key)
        self._index: BlobIndex | None = None
        self._opening = threading.Lock()
        self._turn = threading.BoundedSemaphore(PROCESSORS + 1)  # see `Pace`
        self._one_large = threading.Lock()
        self._held: lock.Held | None = None

    @property
    def storage(self) -> Storage:
        """Where it lies."""
        return self._storage

    @classmethod
    def create(
        cls,
        storage: Storage,
        password: str,
        *,
        cost: keyfile.Scrypt | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Self:
        """Make a repository of version 2 with one key.

        `cost` is what scrypt may cost on this machine unless given; `environment` says where caches
        are.

        Raises:
            UsageError: there is a repository, or what is left of one.
            StorageError: it could not be written.
        """
        key, config = make(storage, password, cost)
        return cls(storage, key, config, cache_folder(environment))

    @classmethod
    def open(
        cls,
        storage: Storage,
        password: str,
        *,
        environment: Mapping[str, str] = os.environ,
        to_read: bool = False,
    ) -> Self:
        """Open a repository. `environment` says where caches are, and which key to try first. Locks are
        listed meanwhile, and what is `to_read`.

        Raises:
            NoSuchTarget: there is none.
            WrongPassword: no key is for this password.
            DamagedError: its configuration or its keys are damaged.
            UsageError: its version is not known here.
        """
        with ExitStack() as stack:
            ahead = Ahead(storage)
            stack.callback(ahead.close)
            key, config = enter(
                storage, ahead, password, environment.get("RESTIC_KEY_HINT", ""), to_read=to_read
            )
            stack.pop_all()
        return cls(storage, key, config, cache_folder(environment), ahead)

    def close(self) -> None:
        """Let go of the index; the storage stays open, as it was opened by others."""
        self._ahead.close()
        with self._opening:
            if self._index is not None:
                self._index.close()
                self._index = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Listings, and files that are one JSON document each

    def look(self) -> None:
        """Begin to list what is there now: what is listed next is as new as this call."""
        self._ahead.look()

    def files(self, kind: Kind) -> Iterator[tuple[str, int]]:
        """Names and lengths of files of a kind: as when they were last begun to be listed, or now."""
        return self._ahead.list(kind)

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
        """The JSON of an index, a snapshot or a lock. `size` is its length where it is known.

        Raises:
            DamagedError: it is not what was stored under its name.
            Missing: there is no such file.
            StorageError: it cannot be read.
        """
        file = File(kind, name)
        stored = bounded(self.storage, file, size)
        if hashlib.sha256(stored).hexdigest() != name:
            raise DamagedError(f"{called(file)} is damaged: its hash is not its name.")
        return decompressed(unseal(self.key, stored, called(file)), kind, called(file))

    def seal_unpacked(self, kind: Kind, data: bytes) -> tuple[str, bytes]:
        """Name and bytes of a file with this JSON.

        It is opened again before anybody may store it, as in restic: a bit that fell over in memory
        shows here.

        Raises:
            DamagedError: this machine's memory or processor fails.
        """
        plain = compressed(data) if self.config.version > 1 else data
        sealed = seal(self.key, plain)
        what = f"What was to be stored in {kind}"
        if decompressed(unseal(self.key, sealed, what), kind, what) != data:
            raise DamagedError(f"{what} is not what went into it.", "Test this machine's memory.")
        return hashlib.sha256(sealed).hexdigest(), sealed

    def save_unpacked(self, kind: Kind, data: bytes) -> str:
        """Store JSON as a file; returns its name.

        Raises:
            StorageError: it could not be stored, or the lock that we had is lost.
        """
        name, sealed = self.seal_unpacked(kind, data)
        self.require_lock()
        self.storage.save(File(kind, name), [sealed])
        return name

    # Snapshots

    def snapshots(
        self,
        damaged: Callable[[str, DamagedError], None] | None = None,
        wanted: Callable[[Snapshot], bool] = lambda _: True,
    ) -> list[Snapshot]:
        """All `wanted` snapshots, oldest first. `damaged` is told of those that cannot be read.

        Raises:
            DamagedError: one is damaged, and there is no `damaged`.
            StorageError: the storage fails.
        """
        return read_all(listed(self._ahead, Kind.SNAPSHOT), self.snapshot, damaged, wanted)

    def snapshot(self, name: str, size: int | None = None, *, keep: bool = True) -> Snapshot:
        """One snapshot, by its whole name, from the cache; unless it is not to be kept there.

        Raises:
            DamagedError: it is damaged.
            Missing: there is no such snapshot.
        """
        cached = self.cached(f"snapshot-{name}") if keep else None
        if cached is not None:
            with suppress(DamagedError):
                return snapshot.parse(cached, name)
        size = self.storage.size(File(Kind.SNAPSHOT, name)) if size is None else size
        with self._one_large if size > _UNNOTICED else nullcontext():
            data = self.load_unpacked(Kind.SNAPSHOT, name, size)
            found = snapshot.parse(data, name)
        if keep:
            self.cache(f"snapshot-{name}", data)
        return found

    def save_snapshot(self, new: Snapshot) -> str:
        """Store a snapshot; all that it refers to must be durable. Returns its name.

        Raises:
            StorageError: it could not be stored, or the lock that we had is lost.
        """
        data = snapshot.encode(new)
        name, sealed = self.seal_unpacked(Kind.SNAPSHOT, data)
        self.require_lock()
        self.require_same()
        file = File(Kind.SNAPSHOT, name)
        try:
            self.storage.save(file, [sealed])
        except BaseException:
            # It may be there all the same, where only the answer was lost.
            self.storage.give_up()
            with suppress(QmpBackupError):
                self.storage.remove(file)
            raise
        self.cache(f"snapshot-{name}", data)
        return name

    def remove_snapshot(self, name: str) -> None:
        """Forget a snapshot; what it alone needs stays until somebody prunes.

        Raises:
            Missing: there is no such snapshot.
            StorageError: the storage does not allow it, or the lock that we had is lost.
        """
        self.require_lock()
        self.storage.remove(File(Kind.SNAPSHOT, name))

    # Blobs

    @property
    def index(self) -> BlobIndex:
        """Which blobs there are; empty until `load_index`."""
        with self._opening:
            if self._index is None:
                self._index = BlobIndex.open(self.folder, self.config.id)
            return self._index

    def load_index(self) -> None:
        """Know all blobs that the index files name now. To be called after snapshots are listed.

        Raises:
            DamagedError: an index is damaged.
            StorageError: the storage fails.
        """
        self.index.sync(self)

    def load_blob(self, kind: BlobType, id_: bytes) -> bytes:
        """A blob, checked; where it lies in several packs, from the first that has it whole.

        Raises:
            DamagedError: it is missing or damaged in all of them.
            StorageError: the storage fails.
        """
        return self._opened(kind, id_, lambda sealed, blob: open_blob(self.key, sealed, blob))

    def _opened(self, kind: BlobType, id_: bytes, open_: Callable[[bytes, PackedBlob], T]) -> T:
        error = DamagedError(
            f"The {kind.name.lower()} blob {id_.hex()} is missing.", "`restic check` tells more."
        )
        for place in self.index.find_all(kind, id_):
            try:
                sealed = load_part(self.storage, place.pack, place.offset, place.length)
                with self._turn:
                    return open_(sealed, place.packed(kind, id_))
            except DamagedError as found:
                error = found
        raise error

    def load_tree(self, id_: bytes) -> list[Node]:
        """The nodes of a tree.

        Raises:
            DamagedError: it is missing or damaged.
            StorageError: the storage fails.
        """
        what = f"The tree {id_.hex()}"
        return self._opened(
            BlobType.TREE,
            id_,
            lambda sealed, blob: tree.parse(open_large_blob(self.key, sealed, blob), what),
        )

    def tree_begins(self, id_: bytes, pattern: re.Pattern[bytes]) -> bool:
        """Whether a tree's JSON begins like this; it may be very large, and no more of it is kept.

        Raises:
            DamagedError: it is missing or damaged.
            StorageError: the storage fails.
        """
        first = self._opened(
            BlobType.TREE,
            id_,
            lambda sealed, blob: next(open_large_blob(self.key, sealed, blob), b""),
        )
        return pattern.match(first) is not None

    # Locks

    @contextmanager
    def lock(
        self,
        *,
        exclusive: bool = False,
        early: bool = False,
        wait: float = 0.0,
        timing: lock.Timing = lock.USUAL,
    ) -> Iterator[None]:
        """Hold the repository for the block, alone or with others; see `lock.hold`.

        Raises:
            Locked: others held it for all of `wait` seconds.
        """
        with lock.hold(self, exclusive=exclusive, early=early, wait=wait, timing=timing) as held:
            before, self._held = self._held, held
            try:
                yield
            finally:
                self._held = before

    def settle_lock(self) -> None:
        """Be sure that those who hold the repository beside us are such as we may share it with; before
        anything is done, or said, that counts.

        Raises:
            Locked: somebody else had it.
        """
        if self._held is not None:
            self._held.settle()

    def require_lock(self) -> None:
        """See that the lock that we hold is still ours; who holds none is not asked for one.

        Raises:
            StorageError: it is lost, or the storage let us have none: we may only read.
        """
        if self._held is not None:
            self._held.require()

    def require_same(self) -> None:
        """See that what lies at this place is still the repository that was opened there.

        Raises:
            StorageError: it is not: unmounted, moved away, or another one put in its place.
        """
        self._storage.require_same()
        try:
            sealed = bounded(self._storage, CONFIG, None)
            found = configs.parse(unseal(self.key, sealed, "The repository's config")).id
        except (Missing, DamagedError):
            found = ""
        if found != self.config.id:
            raise StorageError(
                f"The repository at {self._storage.name} has gone away: "
                + ("another one is there now." if found else "its config is not there any more."),
                "Was it moved or replaced meanwhile? Put it back, and run again.",
            )

    # What is slow to fetch or to work out

    def cached(self, name: str) -> bytes | None:
        """What `cache` was given under this name, by this run or an earlier one; maybe nothing."""
        return self._cache.get(name)

    def cache(self, name: str, data: bytes) -> None:
        """Keep something, sealed, where this user keeps caches."""
        self._cache.put(name, data)
