# SPDX-License-Identifier: Apache-2.0
"""Commands of ours that run side by side, each as a process that ends in order when we die.

A process is started by the main thread, as the kernel tells it of the end of the thread that did; a
thread for each only waits.
"""

import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from qmpbackup.errors import Exhausted, QmpBackupError
from qmpbackup.fleet.run.following import Followed
from qmpbackup.plan.progress import Progress
from qmpbackup.process import Child, Result, ours

LONGEST: Final = 48 * 3600.0
"""Seconds after which a command is ended that does not end by itself."""
ENDS_WITHIN: Final = 75.0
"""Seconds that commands get to end in order; systemd gives us 90 by default."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order(Generic[T]):
    """A command that is to be run for something. With a `limit` it is a `backup`, which is followed
    while it runs, and begins with so many bytes a second (0: as fast as it can)."""

    of: T
    words: Sequence[str]
    environment: Mapping[str, str]
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class _Running(Generic[T]):
    of: T
    child: Child
    followed: Followed | None


class Workers(Generic[T]):
    """Commands that run; `ended` hands over those that have ended, one after the other."""

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest = longest
        self._running: dict[int, _Running[T]] = {}
        self._done: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        self._last = 0

    @property
    def running(self) -> list[T]:
        """What commands run for."""
        return [each.of for each in self._running.values()]

    def look(self) -> list[tuple[T, Progress | None]]:
        """The same, with how far each is, as far as it has told."""
        return [
            (each.of, each.followed.look() if each.followed else None)
            for each in self._running.values()
        ]

    def limit(self, limit_of: Callable[[T], int]) -> None:
        """Have backups that run go as fast as this says of each, in bytes a second (0: no limit)."""
        for each in self._running.values():
            if each.followed:
                each.followed.limit(limit_of(each.of))

    def start(self, order: Order[T]) -> None:
        """Start a command.

        Raises:
            QmpBackupError, Exhausted: it cannot be started.
        """
        followed = Followed(order.limit) if order.limit is not None else None
        try:
            child = Child(
                ours(*order.words, *(followed.words if followed else ())),
                pass_fds=followed.descriptors if followed else (),
                environment=order.environment,
                at_our_death=signal.SIGTERM,
            )
        except BaseException:
            if followed:
                followed.close()
            raise
        finally:
            if followed:
                followed.started()
        self._last += 1
        self._running[self._last] = _Running(order.of, child, followed)
        wait = _waiting(self._last, child, self._longest, self._done)
        threading.Thread(target=wait, name="waiting", daemon=True).start()

    def ended(self, seconds: float) -> tuple[T, Result] | None:
        """One that has ended; None if none does within so many seconds."""
        try:
            number, result = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        running = self._running.pop(number)
        if running.followed:
            running.followed.close()
        return running.of, result

    def end(self) -> list[tuple[T, Result]]:
        """End all of them in order, and those that do not, at once."""
        for each in self._running.values():
            with suppress(ProcessLookupError):
                each.child.ask_to_end()
        deadline = time.monotonic() + ENDS_WITHIN
        found = []
        while self._running:
            left = deadline - time.monotonic()
            one = self.ended(max(left, 0.0))
            if one is not None:
                found.append(one)
            elif left <= 0:
                break
        for each in self._running.values():
            each.child.kill()
            found.append((each.of, Result("qmpbackup", -int(signal.SIGKILL), b"", "")))
        self._running.clear()
        return found


def _waiting(
    number: int, child: Child, longest: float, done: "queue.SimpleQueue[tuple[int, Result]]"
) -> Callable[[], None]:
    def wait() -> None:
        result = Result("qmpbackup", 1, b"", "error: It could not be waited for.")
        try:
            with child:
                result = child.wait(longest)
        except (QmpBackupError, Exhausted) as error:
            result = Result("qmpbackup", 1, b"", f"error: {error}")
        finally:  # or its slot would be taken for ever
            done.put((number, result))

    return wait
