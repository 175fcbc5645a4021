# SPDX-License-Identifier: Apache-2.0
"""Chunks in, packs and indexes out: the pipeline that fills a repository.

    caller ──► workers: hash ─ known? ─ compress ─ seal ──► pack ──► uploaders: header ─ save ─ index

Every arrow is bounded: a caller waits while all workers have enough to do, a worker waits while
enough packs are on their way, so memory does not depend on how much is written. The first error
stops all stages, and is what the caller gets.

What a run writes counts only once `flush` has returned: packs first, then the indexes that name
them (restic, doc/design.rst, "Snapshots"). Long runs write indexes in between, so that the next run
finds what a run that died had stored.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from qmpbackup import interrupt
from qmpbackup.restic.index import index_file
from qmpbackup.restic.pack import (
    BlobType,
    PackBuilder,
    PackedBlob,
    open_large_blob,
    seal_blob,
    seal_large_blob,
)
from qmpbackup.restic.storage.interface import Buffer, File, Kind

if TYPE_CHECKING:
    from qmpbackup.restic.repository import Repository

PACK_SIZE = 16 * 1024 * 1024
"""Bytes from which a pack is full; restic's own default, which allows 4 to 128 MiB."""

LEVEL = 1
"""Level of zstd: the fastest of its usual ones, and what restic calls `auto` is close to it."""

_UPLOADERS = 2
_PACKS_UNDER_WAY = 3
_CHUNKS_A_WORKER = 4
_POLL_SECONDS = 0.1
_INDEX_SECONDS = 300.0
_INDEX_BLOBS = 50_000
"""After so many seconds, or so many blobs, an index is written while the run goes on."""


class Writer:
    """Stores blobs in a repository. `stop` ends it after `flush`, `abandon` at any time."""

    def __init__(
        self, repository: "Repository", *, workers: int = 0, level: int = LEVEL, check: bool = False
    ) -> None:
        """`check` opens each sealed blob again before it is stored, against faulty memory."""
        self._repository = repository
        # Version 1 knows no compression.
        self._level = level if repository.config.version > 1 else None
        self._check = check
        count = workers or min(os.cpu_count() or 1, 8)
        self._workers = ThreadPoolExecutor(count, "seal")
        self._uploaders = ThreadPoolExecutor(_UPLOADERS, "upload")
        self._chunks = threading.Semaphore(count * _CHUNKS_A_WORKER)
        self._chunk_slots = count * _CHUNKS_A_WORKER
        self._packs = threading.Semaphore(_PACKS_UNDER_WAY)
        self._lock = threading.Lock()
        self._building = {kind: PackBuilder() for kind in BlobType}
        self._claimed: set[tuple[BlobType, bytes]] = set()
        self._unindexed: list[tuple[str, tuple[PackedBlob, ...]]] = []
        self._last_index = time.monotonic()
        self._error: BaseException | None = None
        self.stored = 0
        """Bytes of packs written so far."""
        self.new_blobs = 0
        """Blobs that the repository did not have."""
        self.new_bytes = 0
        """Their bytes before compression."""

    def stop(self) -> None:
        """End all stages after `flush`. Harmless when repeated."""
        with self._lock:
            self._error = self._error or RuntimeError("the writer was stopped")
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._uploaders.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """End all stages soon; what is under way is given up. Harmless when repeated."""
        self._repository.storage.give_up()
        self.stop()

    def add(self, chunk: Buffer, done: Callable[[bytes, int], None]) -> None:
        """Store a data blob. A worker calls `done(id, stored)` once the buffer is free again.

        `stored` is how many bytes it takes in its pack, 0 if the repository had it already.

        Raises:
            QmpBackupError: something failed, here or in any stage before.
        """
        self._acquire(self._chunks)
        self._workers.submit(self._guarded, self._chunks, self._add, chunk, done)

    def add_now(self, kind: BlobType, data: Buffer) -> bytes:
        """Store a blob, such as a tree, in this thread; returns its id.

        Raises:
            QmpBackupError: something failed, here or in any stage before.
        """
        self._raise()
        return self._store(kind, data)[0]

    def add_large(self, kind: BlobType, blocks: Callable[[], Iterable[Buffer]]) -> bytes:
        """As `add_now`, for what is better not held in memory whole: `blocks` gives it in blocks, the
        same whenever it is called.

        Raises:
            QmpBackupError: something failed, here or in any stage before.
        """
        self._raise()
        digest, length = hashlib.sha256(), 0
        for block in blocks():
            digest.update(block)
            length += len(block)
        blob_id = digest.digest()
        if self._claim(kind, blob_id):
            sealed, raw_length = seal_large_blob(
                self._repository.key, blocks(), length, self._level
            )
            self._put(kind, blob_id, length, sealed, raw_length)
        return blob_id

    def drain(self) -> None:
        """Wait until every chunk given so far has been taken care of by a worker.

        Raises:
            QmpBackupError: something failed in any stage.
        """
        for _ in range(self._chunk_slots):
            self._acquire(self._chunks)
        self._chunks.release(self._chunk_slots)

    def flush(self) -> None:
        """Make all that was added durable: the last packs, then the indexes.

        Raises:
            QmpBackupError: something failed in any stage; nothing may refer to what was added.
        """
        self.drain()
        with self._lock:
            full = [(kind, self._swap(kind)) for kind in BlobType]
        for kind, builder in full:
            self._upload(kind, builder)
        for _ in range(_PACKS_UNDER_WAY):
            self._acquire(self._packs)
        self._packs.release(_PACKS_UNDER_WAY)
        self._raise()
        self._write_indexes()

    def _acquire(self, slots: threading.Semaphore) -> None:
        """Wait for a free slot; signals and errors end the wait."""
        while not slots.acquire(timeout=_POLL_SECONDS):
            self._raise()
            interrupt.check()
        if self._error is not None:
            slots.release()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        # What other threads wait for is of no use any more.
        self._repository.storage.give_up()

    def _guarded(
        self, slots: threading.Semaphore, work: Callable[..., None], *arguments: object
    ) -> None:
        """Run one stage's work; give its slot back, and stop all stages if it fails."""
        try:
            if self._error is None:
                work(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._fail(error)
        finally:
            slots.release()

    def _add(self, chunk: Buffer, done: Callable[[bytes, int], None]) -> None:
        done(*self._store(BlobType.DATA, chunk))

    def _store(self, kind: BlobType, data: Buffer) -> tuple[bytes, int]:
        """Put a blob into a pack unless it is known; returns its id and the bytes it takes there."""
        blob_id = hashlib.sha256(data).digest()
        if not self._claim(kind, blob_id):
            return blob_id, 0
        sealed, raw_length = seal_blob(self._repository.key, data, self._level)
        self._put(kind, blob_id, len(data), sealed, raw_length)
        return blob_id, len(sealed)

    def _put(
        self, kind: BlobType, blob_id: bytes, length: int, sealed: bytes, raw_length: int
    ) -> None:
        """Put a sealed blob of so many bytes into a pack."""
        if self._check:
            packed = PackedBlob(kind, blob_id, 0, len(sealed), raw_length)
            for _ in open_large_blob(self._repository.key, sealed, packed):
                pass
        full = None
        with self._lock:
            builder = self._building[kind]
            builder.add(kind, blob_id, sealed, raw_length)
            self.new_blobs += 1
            self.new_bytes += length
            if builder.size >= PACK_SIZE:
                full = self._swap(kind)
        if full is not None:
            self._upload(kind, full)

    def _claim(self, kind: BlobType, blob_id: bytes) -> bool:
        """Whether this blob is ours to store: neither in the repository nor under way."""
        if self._repository.index.has(kind, blob_id):
            return False
        with self._lock:
            if (kind, blob_id) in self._claimed:
                return False
            # Between the two questions its pack may have been finished.
            ours = not self._repository.index.has(kind, blob_id)
            if ours:
                self._claimed.add((kind, blob_id))
        return ours

    def _swap(self, kind: BlobType) -> PackBuilder:
        builder, self._building[kind] = self._building[kind], PackBuilder()
        return builder

    def _upload(self, kind: BlobType, builder: PackBuilder) -> None:
        if builder.count:
            self._acquire(self._packs)
            self._uploaders.submit(self._guarded, self._packs, self._save, kind, builder)

    def _save(self, kind: BlobType, builder: PackBuilder) -> None:
        name, parts, blobs = builder.finish(self._repository.key)
        self._repository.storage.save(File(Kind.DATA, name), parts)
        self._repository.index.add(name, blobs)
        due = None
        with self._lock:
            self.stored += sum(len(part) for part in parts)
            self._unindexed.append((name, blobs))
            self._claimed -= {(kind, blob.id) for blob in blobs}
            waiting = sum(len(each) for _, each in self._unindexed)
            late = time.monotonic() - self._last_index > _INDEX_SECONDS
            if late or waiting >= _INDEX_BLOBS:
                due = self._take_unindexed()
        if due:
            self._write_index(due)

    def _take_unindexed(self) -> list[tuple[str, tuple[PackedBlob, ...]]]:
        self._last_index = time.monotonic()
        taken, self._unindexed = self._unindexed, []
        return taken

    def _write_indexes(self) -> None:
        with self._lock:
            due = self._take_unindexed()
        if due:
            self._write_index(due)

    def _write_index(self, packs: list[tuple[str, tuple[PackedBlob, ...]]]) -> None:
        for document in index_file.encode(packs):
            name = self._repository.save_unpacked(Kind.INDEX, document)
            self._repository.index.indexed(name, document)
