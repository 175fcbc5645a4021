# SPDX-License-Identifier: Apache-2.0
"""Jobs that are done in threads, in bounded memory, until the first error.

    Pace   how many are under way where each first waits for a storage and then works on what came

Must not know what the jobs are.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

from qmpbackup import interrupt

THREADS: Final = 4
MEMORY: Final = 64 << 20
"""Bytes that all jobs under way may take together; one that needs more is done alone."""

_POLL_SECONDS: Final = 0.2
_GUESS_SECONDS: Final = 0.01
"""What work is thought to take before any was done."""
PROCESSORS: Final = min(8, len(os.sched_getaffinity(0)))
_SHARE: Final = 0.25
"""How much the newest measurement counts."""

T = TypeVar("T")


class Pace:
    """As many jobs under way as keep those busy that work: one each, and as many more as are waiting for
    the storage meanwhile (Little's law). So a storage on this machine is asked for little at a time, which
    is worked on while the processor still has it, and one far away for much.
    """

    def __init__(self, most: int) -> None:
        """`most` jobs at a time."""
        self._most = most
        # One more than there are processors, as each has to wait for Python's lock at times.
        self._workers = min(most, PROCESSORS + 1)
        self._turn = threading.BoundedSemaphore(self._workers)
        self._waited = 0.0
        self._worked = 0.0
        self.is_over = False

    @property
    def width(self) -> int:
        """How many jobs may be under way."""
        if not self._waited:
            return min(self._most, 3 * self._workers)
        behind = self._waited / (self._worked or _GUESS_SECONDS)
        return min(self._most, self._workers + max(1, math.ceil(self._workers * behind)))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the storage in the block."""
        started = time.monotonic()
        yield
        self.note(waited=time.monotonic() - started)

    @contextmanager
    def working(self) -> Iterator[bool]:
        """Work in the block, which is entered by as many as there are processors; false where another
        job has failed meanwhile."""
        with self._turn:
            started = time.monotonic()
            yield not self.is_over
            self.note(worked=time.monotonic() - started)

    def note(self, waited: float = 0.0, worked: float = 0.0) -> None:
        """Take notice of how many seconds a job waited for the storage, or worked."""
        self._waited = _mixed(self._waited, waited)
        self._worked = _mixed(self._worked, worked)


def _mixed(before: float, now: float) -> float:
    if not now:
        return before
    return before + _SHARE * (now - before) if before else now


def in_threads(
    jobs: Iterable[T],
    work: Callable[[T], None],
    memory: Callable[[T], int],
    threads: int,
    give_up: Callable[[], None] = lambda: None,
    pace: Pace | None = None,
) -> None:
    """Do all jobs, as many at a time as there are threads, room in `MEMORY` for, and the `pace` allows.

    Jobs are taken from their source in this thread. The first error ends all in order: nothing else
    is begun, `give_up` is called to break off what is under way, and its end is waited for.

    Raises:
        Interrupted: a signal is waiting.
        Exception: the first that a job or the source of jobs raised.
    """
    room = _Room(MEMORY, pace)
    with ThreadPoolExecutor(threads, "read") as pool:
        try:
            for job in jobs:
                amount = room.take(memory(job))
                pool.submit(_guarded, room, amount, work, job)
            room.take(MEMORY)
        except BaseException as error:
            room.fail(error)
            give_up()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _guarded(room: "_Room", amount: int, work: Callable[[T], None], job: T) -> None:
    try:
        if not room.failed:
            work(job)
    except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
        room.fail(error)
    finally:
        room.give(amount)


class _Room:
    """Memory that threads share, and the first error of any of them."""

    def __init__(self, size: int, pace: Pace | None) -> None:
        self._size = self._free = size
        self._pace = pace
        self._under_way = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def take(self, amount: int) -> int:
        """Wait for room; returns how much was taken, at most all there is.

        Raises:
            Interrupted: a signal is waiting.
            Exception: the error that was told to `fail`.
        """
        amount = min(amount, self._size)
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                interrupt.check()
                if self._free >= amount and self._is_due():
                    self._free -= amount
                    self._under_way += 1
                    return amount
                self._changed.wait(_POLL_SECONDS)

    def _is_due(self) -> bool:
        """Whether a further job is to be begun."""
        return self._pace is None or self._under_way < self._pace.width

    def give(self, amount: int) -> None:
        with self._changed:
            self._free += amount
            self._under_way -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            if self._pace is not None:
                self._pace.is_over = True
            self._changed.notify_all()
