# SPDX-License-Identifier: Apache-2.0
"""Undoing as a stack: each step registers how to undo it once it has succeeded.

Unlike `contextlib.ExitStack`, a failing step never keeps the others from running and never replaces
the error that made us undo: its sentence is collected and reported.
"""

from collections.abc import Callable

from qmpbackup import interrupt
from qmpbackup.errors import Interrupted


class UndoStack:
    """Steps to undo, last registered first."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def push(self, what: str, step: Callable[[], object]) -> None:
        """Register the undoing of a step that has succeeded; `what` names it in reports."""
        self._steps.append((what, step))

    def run(self) -> list[str]:
        """Undo everything, last first; return one sentence a step that failed.

        A signal that ended a step is sent to ourselves again in the end.
        """
        failures: list[str] = []
        signals: set[int] = set()
        while self._steps:
            what, step = self._steps.pop()
            try:
                step()
            except Exception as error:  # noqa: BLE001 - teardown continues past any failing step
                failures.append(f"Could not {what}: {error}")
                if isinstance(error, Interrupted):
                    signals.add(error.signal_number)
        for number in signals:
            interrupt.put_back(number)
        return failures

    def move_to(self, other: "UndoStack") -> None:
        """Hand all steps over to another stack, on top of what that has."""
        other._steps += self._steps  # noqa: SLF001 - its own class
        self._steps.clear()

    def forget(self) -> None:
        """Keep what was done: nothing registered so far will be undone."""
        self._steps.clear()
