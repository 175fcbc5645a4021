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
from qmpbackup.process import Child, Result, ours

LONGEST: Final = 48 * 3600.0
"""Seconds after which a command is ended that does not end by itself."""
ENDS_WITHIN: Final = 75.0
"""Seconds that commands get to end in order; systemd gives us 90 by default."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order(Generic[T]):
    """A command that is to be run for something."""

    of: T
    words: Sequence[str]
    environment: Mapping[str, str]


class Workers(Generic[T]):
    """Commands that run; `ended` hands over those that have ended, one after the other."""

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest = longest
        self._running: dict[int, tuple[T, Child]] = {}
        self._done: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        self._last = 0

    @property
    def running(self) -> list[T]:
        """What commands run for."""
        return [of for of, _ in self._running.values()]

    def start(self, order: Order[T]) -> None:
        """Start a command.

        Raises:
            QmpBackupError, Exhausted: it cannot be started.
        """
        child = Child(
            ours(*order.words),
            environment=order.environment,
            at_our_death=signal.SIGTERM,
        )
        self._last += 1
        self._running[self._last] = order.of, child
        wait = _waiting(self._last, child, self._longest, self._done)
        threading.Thread(target=wait, name="waiting", daemon=True).start()

    def ended(self, seconds: float) -> tuple[T, Result] | None:
        """One that has ended; None if none does within so many seconds."""
        try:
            number, result = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        of, _ = self._running.pop(number)
        return of, result

    def end(self) -> list[tuple[T, Result]]:
        """End all of them in order, and those that do not, at once."""
        for _, child in self._running.values():
            with suppress(ProcessLookupError):
                child.ask_to_end()
        deadline = time.monotonic() + ENDS_WITHIN
        found = []
        while self._running:
            left = deadline - time.monotonic()
            one = self.ended(max(left, 0.0))
            if one is not None:
                found.append(one)
            elif left <= 0:
                break
        for of, child in self._running.values():
            child.kill()
            found.append((of, Result("qmpbackup", -int(signal.SIGKILL), b"", "")))
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
