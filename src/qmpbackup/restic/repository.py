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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final, Self, TypeVar

from qmpbackup import interrupt
from qmpbackup.errors import (
    DamagedError,
    NoSuchTarget,
    QmpBackupError,
    StorageError,
    UsageError,
    WrongPassword,
)
from qmpbackup.restic import config as configs
from qmpbackup.restic import keyfile, lock, snapshot, tree
from qmpbackup.restic.cache import Cache
from qmpbackup.restic.config import Config
from qmpbackup.restic.crypto import OVERHEAD, Key, seal, unseal
from qmpbackup.restic.index import index_file
from qmpbackup.restic.index.cache import cache_folder
from qmpbackup.restic.index.lookup import BlobIndex
from qmpbackup.restic.pack import (
    LARGEST_WINDOW,
    BlobType,
    PackedBlob,
    open_blob,
    open_large_blob,
)
from qmpbackup.restic.reader import load_part
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.interface import (
    CONFIG,
    File,
    Kind,
    Missing,
    Refused,
    Storage,
    Strange,
    Temporary,
)
from qmpbackup.restic.tree import Node

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LARGEST: Final = {
    Kind.CONFIG: configs.LARGEST,
    Kind.KEY: keyfile.LARGEST,
    Kind.LOCK: lock.LARGEST,
    Kind.SNAPSHOT: snapshot.LARGEST,
    Kind.INDEX: 4 * index_file.LARGEST,
}
"""Bytes of JSON that are believed of each kind."""

_MOST_KEYS: Final = 20
"""Key files that are tried; as many as restic tries."""

_SMALL: Final = 1 << 20
_MOST_RATIO: Final = 64
"""How many bytes of JSON one compressed byte of a file may stand for, beyond what is small."""

_UNNOTICED: Final = 16 << 10
"""Bytes of a stored snapshot that is read beside others; restic's have half a kilobyte."""

_COMPRESSED: Final = b"\x02"
_JSON: Final = (b"{", b"[")
_LEVEL: Final = 3
_AT_ONCE: Final = 8
_LARGE: Final = 64 << 10
"""Bytes of a stored snapshot above which it is not read beside others."""


class Repository:
    """An open repository. All methods may be called from several threads."""

    def __init__(self, storage: Storage, key: Key, config: Config, cache: Path | None) -> None:
        self._storage = storage
        self.key = key
        self.config = config
        self._folder = cache
        self._cache = Cache(cache / config.id / "files" if cache else None, key)
        self._index: BlobIndex | None = None
        self._opening = threading.Lock()
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
        _refuse_existing(storage)
        storage.create()
        key, config = Key.random(), configs.create()
        data = keyfile.create(key, password, cost)
        file = File(Kind.KEY, hashlib.sha256(data).hexdigest())
        sealed = seal(key, configs.encode(config))
        storage.save(file, [data])
        try:
            storage.save(CONFIG, [sealed])
            # Saving changes nothing where somebody else was quicker.
            if _bounded(storage, CONFIG) != sealed:
                _refuse_existing(storage)
        except BaseException:
            with suppress(QmpBackupError):
                storage.remove(file)
            raise
        return cls(storage, key, config, cache_folder(environment))

    @classmethod
    def open(
        cls, storage: Storage, password: str, *, environment: Mapping[str, str] = os.environ
    ) -> Self:
        """Open a repository. `environment` says where caches are, and which key to try first.

        Raises:
            NoSuchTarget: there is none.
            WrongPassword: no key is for this password.
            DamagedError: its configuration or its keys are damaged.
            UsageError: its version is not known here.
        """
        try:
            sealed = _bounded(storage, CONFIG)
        except Missing as error:
            raise NoSuchTarget(
                f"There is no repository at {storage.name}.", "Make one: qmpbackup init."
            ) from error
        key = _unlock(storage, password, environment.get("RESTIC_KEY_HINT", ""))
        config = configs.parse(unseal(key, sealed, "The repository's config"))
        return cls(storage, key, config, cache_folder(environment))

    def close(self) -> None:
        """Let go of the index; the storage stays open, as it was opened by others."""
        with self._opening:
            if self._index is not None:
                self._index.close()
                self._index = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # Files that are one JSON document each

    def load_unpacked(self, kind: Kind, name: str, size: int | None = None) -> bytes:
        """The JSON of an index, a snapshot or a lock. `size` is its length where it is known.

        Raises:
            DamagedError: it is not what was stored under its name.
            Missing: there is no such file.
            StorageError: it cannot be read.
        """
        file = File(kind, name)
        stored = _bounded(self.storage, file, size)
        if hashlib.sha256(stored).hexdigest() != name:
            raise DamagedError(f"{_called(file)} is damaged: its hash is not its name.")
        return _decompress(unseal(self.key, stored, _called(file)), kind, _called(file))

    def seal_unpacked(self, kind: Kind, data: bytes) -> tuple[str, bytes]:
        """Name and bytes of a file with this JSON.

        It is opened again before anybody may store it, as in restic: a bit that fell over in memory
        shows here.

        Raises:
            DamagedError: this machine's memory or processor fails.
        """
        plain = data
        if self.config.version > 1:
            import zstandard

            plain = _COMPRESSED + zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        sealed = seal(self.key, plain)
        what = f"What was to be stored in {kind}"
        if _decompress(unseal(self.key, sealed, what), kind, what) != data:
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
        listed = _list(self.storage, Kind.SNAPSHOT)
        found: list[Snapshot] = []
        large = threading.Lock()

        def read(name: str, size: int) -> Snapshot | None:
            """One snapshot, if it is wanted; such as name very many paths one after the other."""
            with large if size > _LARGE else nullcontext():
                one = self.snapshot(name, size)
                return one if wanted(one) else None

        with ThreadPoolExecutor(_AT_ONCE, "snapshots") as threads:
            try:
                waiting = [threads.submit(read, *each) for each in listed]
                for (name, _), future in zip(listed, waiting, strict=True):
                    interrupt.check()
                    try:
                        one = future.result()
                    except Missing:
                        continue  # somebody forgot it meanwhile
                    except DamagedError as error:
                        if damaged is None:
                            raise
                        damaged(name, error)
                    else:
                        found += [one] if one is not None else []
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
        return sorted(found, key=lambda each: (each.time, each.id))

    def snapshot(self, name: str, size: int | None = None) -> Snapshot:
        """One snapshot, by its whole name.

        Raises:
            DamagedError: it is damaged.
            Missing: there is no such snapshot.
        """
        cached = self.cached(f"snapshot-{name}")
        if cached is not None:
            with suppress(DamagedError):
                return snapshot.parse(cached, name)
        size = self.storage.size(File(Kind.SNAPSHOT, name)) if size is None else size
        with self._one_large if size > _UNNOTICED else nullcontext():
            data = self.load_unpacked(Kind.SNAPSHOT, name, size)
            found = snapshot.parse(data, name)
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
                self._index = BlobIndex.open(self._folder, self.config.id)
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
        self, *, exclusive: bool = False, wait: float = 0.0, timing: lock.Timing = lock.USUAL
    ) -> Iterator[None]:
        """Hold the repository for the block, alone or with others; see `lock.hold`.

        Raises:
            Locked: others held it for all of `wait` seconds.
        """
        with lock.hold(self, exclusive=exclusive, wait=wait, timing=timing) as held:
            before, self._held = self._held, held
            try:
                yield
            finally:
                self._held = before

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
            sealed = _bounded(self._storage, CONFIG, None)
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


def _called(file: File) -> str:
    return f"The file {file}"


def _bounded(storage: Storage, file: File, size: int | None = None) -> bytes:
    """A stored file, unless it is too large to be what it says; never more of it than it has by its
    `size`, whatever the storage sends."""
    size = storage.size(file) if size is None else size
    if size > _LARGEST[file.kind] + OVERHEAD + len(_COMPRESSED):
        raise DamagedError(f"{_called(file)} is damaged: it is too large.")
    try:
        return storage.load(file, 0, size)
    except Strange as error:
        raise DamagedError(error.message, error.hint) from error
    except (Missing, Temporary, Refused):
        raise
    except StorageError as error:
        if storage.size(file) < size:
            raise DamagedError(f"{_called(file)} is damaged: it is too short.") from error
        raise


def _list(storage: Storage, kind: Kind) -> list[tuple[str, int]]:
    """Names and sizes in order. A copy of a repository may lack folders in which nothing was."""
    try:
        return sorted(storage.list(kind))
    except Missing:
        return []


def _decompress(plain: bytes, kind: Kind, what: str) -> bytes:
    """The JSON in a file; before version 2, and of version 1, it is not compressed."""
    if not plain or plain.startswith(_JSON):
        return plain
    if not plain.startswith(_COMPRESSED):
        raise DamagedError(f"{what} is damaged: it is not of a known form.")
    import zstandard

    most = min(_LARGEST[kind], _SMALL + _MOST_RATIO * len(plain))
    try:
        said = zstandard.get_frame_parameters(plain[1:32]).content_size
        # The frame's own word on its size is a hint of how much to reserve, and no more.
        wanted = min(said if said > 0 else most, most)
        context = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        with context.stream_reader(memoryview(plain)[1:]) as reader:
            data = reader.read(wanted + 1)
    except zstandard.ZstdError as error:
        raise DamagedError(f"{what} is damaged: it cannot be decompressed.") from error
    if len(data) > wanted:
        raise DamagedError(f"{what} is damaged: it is too large.")
    return data


def _refuse_existing(storage: Storage) -> None:
    try:
        storage.size(CONFIG)
        found = "a repository"
    except Missing:
        kinds = (Kind.KEY, Kind.SNAPSHOT, Kind.INDEX)
        left = [kind for kind in kinds if _list(storage, kind)]
        found = f"something of a repository ({', '.join(left)})" if left else ""
    if found:
        raise UsageError(
            f"There is {found} at {storage.name} already.", "Choose another place, or use it."
        )


def _unlock(storage: Storage, password: str, hint: str) -> Key:
    """The master key, by the first key file that the password opens."""
    listed = _list(storage, Kind.KEY)
    if hint:
        listed.sort(key=lambda each: not each[0].startswith(hint))
    damaged: DamagedError | None = None
    for name, size in listed[:_MOST_KEYS]:
        interrupt.check()
        try:
            data = _bounded(storage, File(Kind.KEY, name), size)
            if hashlib.sha256(data).hexdigest() != name:
                raise DamagedError(f"The key {name} is damaged: its hash is not its name.")
            key = keyfile.unlock(keyfile.parse(data, name), password, name)
        except Missing:
            continue
        except DamagedError as error:
            damaged = error
            continue
        if key is not None:
            return key
    if damaged is not None:
        raise damaged
    if not listed:
        raise DamagedError(f"The repository at {storage.name} has no key.")
    raise WrongPassword(
        f"No key of the repository at {storage.name} is for this password.",
        f"Only {_MOST_KEYS} of its keys were tried; RESTIC_KEY_HINT names the one to try first."
        if len(listed) > _MOST_KEYS
        else "Look at RESTIC_PASSWORD, RESTIC_PASSWORD_FILE and RESTIC_PASSWORD_COMMAND.",
    )
