# SPDX-License-Identifier: Apache-2.0
"""How long to wait for the answers of a monitor that has left one out.

A command may take its time, since QEMU waits for storage. But once one was not answered, all that come
after it share what is left: a run that ends takes dozens of steps back, and must not wait for each.
"""

import time
from collections.abc import Callable

TOTAL_SECONDS = 20.0


class Patience:
    """The time that commands to one monitor may take."""

    def __init__(
        self, total: float = TOTAL_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._clock = clock
        self._until: float | None = None
        self.unanswered = ""
        """The command that was left without an answer first, as the cause of all that follows."""

    def left(self, wanted: float) -> float:
        """Seconds to wait for the next answer; 0: do not even ask."""
        if self._until is None:
            return wanted
        return min(wanted, max(0.0, self._until - self._clock()))

    def answered(self) -> None:
        """An answer has come: whatever held the monitor up is over."""
        self._until = None

    def gave_up(self, command: str) -> None:
        """No answer to a command has come."""
        if self._until is None:
            self._until = self._clock() + self._total
            self.unanswered = command
