# SPDX-License-Identifier: Apache-2.0
"""Calls of a library that reads what servers say to its end: watched, and broken off in time.

obstore takes in a page of a listing, or what a server says of an error, as a whole and without a
bound. What it takes shows only in what this process takes, so that is looked at while a call lasts. A
call that is broken off is dropped with all that it has read.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from qmpbackup.errors import StorageError

_LOOK_SECONDS: Final = 0.01

_MOST_MEMORY: Final = 128 << 20
"""Bytes of memory below which nothing is broken off."""

_MOST_GROWTH: Final = 48 << 20
"""Bytes by which memory may grow while one call lasts, beside what it asks for."""

T = TypeVar("T")


class Overrun(StorageError):
    """A call took too much memory, and was broken off."""


def twice(call: Callable[[], T]) -> T:
    """Do something once more if it took too much: memory also grows for what other threads do
    meanwhile, but hardly again.

    Raises:
        Overrun: it took too much both times.
    """
    try:
        return call()
    except Overrun:
        return call()


class Guard:
    """Makes asynchronous calls for any thread; `place` is what messages call the server."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._statm = -1

    def call(self, work: Callable[[], Awaitable[T]], expected: int = 0) -> T:
        """Wait for a call; `expected` bytes are what its answer may have.

        Raises:
            Overrun: it took more memory than any answer needs.
            Exception: what `work` raises.
        """
        watched = self._watched(work, expected)
        return asyncio.run_coroutine_threadsafe(watched, self._running()).result()

    def close(self) -> None:
        """End what is under way, and let go of everything."""
        with self._starting:
            if self._loop is None or self._thread is None:
                return
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            os.close(self._statm)
            self._loop = self._thread = None

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="calls", daemon=True
                )
                self._thread.start()
            return self._loop

    async def _watched(self, work: Callable[[], Awaitable[T]], expected: int) -> T:
        before = self._resident()
        task = asyncio.ensure_future(work())
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
                now = self._resident()
                if now > _MOST_MEMORY and now - before > _MOST_GROWTH + 2 * expected:
                    raise Overrun(f"{self._place} answers without end.", "See what this server is.")
            return task.result()
        finally:
            task.cancel()
            with suppress(Exception, asyncio.CancelledError):
                await task

    def _resident(self) -> int:
        """Bytes of memory that this process has (proc(5), statm)."""
        pages = os.pread(self._statm, 256, 0).split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
