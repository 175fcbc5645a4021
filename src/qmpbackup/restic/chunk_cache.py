# SPDX-License-Identifier: Apache-2.0
"""Blobs that were read and checked, the most recently used of them kept in bounded memory, and as many as
a file may hold (`overflow`).

    get      a blob; who asks for one that is under way waits for that
    ahead    begin to read blobs that will be wanted soon, as far as threads are free
    peek     a blob that is there, or nothing

What failed is not kept: the next who asks has it read again, as storage may come back.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

from qmpbackup.restic.overflow import Overflow

THREADS: Final = 16
"""Blobs that are read at a time: over a distance of 50 ms this is what fetches them, not bandwidth."""

CAPACITY: Final = 64 << 20
"""Bytes of the blobs that are kept. A Linux that boots reads less than this again."""


class ChunkCache:
    """A cache of blobs by id; use as a context manager, or `close` it.

    `load` reads and checks a blob; it is called in threads. Memory is `capacity` and one blob for each
    thread. `folder` is where the file lies, if there is to be one.
    """

    def __init__(
        self,
        load: Callable[[bytes], bytes],
        capacity: int = CAPACITY,
        threads: int = THREADS,
        folder: Path | None = None,
    ) -> None:
        self._load = load
        self._overflow = Overflow(folder)
        self._capacity = capacity
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "chunks")
        self._lock = threading.RLock()  # a read may be over before its callback is set
        self._kept = OrderedDict[bytes, bytes]()
        self._size = 0
        self._under_way: dict[bytes, Future[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Begin no more reads, and wait for those under way."""
        self._pool.shutdown(cancel_futures=True)
        self._overflow.close()

    def peek(self, id_: bytes) -> bytes | None:
        """The blob, if it is kept."""
        with self._lock:
            found = self._kept.get(id_)
            if found is not None:
                self._kept.move_to_end(id_)
            return found

    def get(self, id_: bytes) -> bytes:
        """The blob.

        Raises:
            DamagedError: it is missing or damaged.
            StorageError: the storage fails.
        """
        with self._lock:
            found = self._kept.get(id_)
            if found is not None:
                self._kept.move_to_end(id_)
                return found
            future = self._begin(id_)
        return future.result()

    def ahead(self, ids: Iterable[bytes]) -> None:
        """Begin to read blobs, but for as many as would have others wait."""
        with self._lock:
            for id_ in ids:
                if len(self._under_way) >= self._threads // 2:
                    return
                if id_ not in self._kept:
                    self._begin(id_)

    def _begin(self, id_: bytes) -> Future[bytes]:
        """The read of a blob, begun or under way; the lock is held."""
        future = self._under_way.get(id_)
        if future is None:
            future = self._pool.submit(self._fetch, id_)
            self._under_way[id_] = future
            future.add_done_callback(lambda done: self._keep(id_, done))
        return future

    def _fetch(self, id_: bytes) -> bytes:
        found = self._overflow.get(id_)
        return self._load(id_) if found is None else found

    def _keep(self, id_: bytes, done: Future[bytes]) -> None:
        if done.cancelled() or done.exception() is not None:
            with self._lock:
                self._under_way.pop(id_, None)
            return
        data = done.result()
        self._note(id_, data)
        self._overflow.put(id_, data)  # nobody waits for that any more

    def _note(self, id_: bytes, data: bytes) -> None:
        with self._lock:
            self._under_way.pop(id_, None)
            self._kept[id_] = data
            self._size += len(data)
            while self._size > self._capacity:
                _, dropped = self._kept.popitem(last=False)
                self._size -= len(dropped)
