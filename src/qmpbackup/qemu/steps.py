# SPDX-License-Identifier: Apache-2.0
"""Commands with their undoing, sent together where none needs the answer of another.

Every answer costs a turn of two event loops, and while a VM stands still each turn counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from qmpbackup.errors import CommandError
from qmpbackup.plan.commands import Command
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.undo import UndoStack


@dataclass(frozen=True)
class Step:
    """A command, and how to undo it, with the words for a report."""

    command: Command
    undo_words: str
    undo: Command | Callable[[], object]


def carry_out(monitor: Monitor, steps: Sequence[Step], undo: UndoStack) -> None:
    """Carry out all steps in order; what succeeded is registered for undoing.

    Raises:
        CommandError: QEMU refused a step (the first is raised); later ones were tried all the same.
    """
    results = monitor.execute_each([step.command for step in steps])
    for step, result in zip(steps, results, strict=True):
        if not isinstance(result, CommandError):
            undoing = step.undo
            if isinstance(undoing, Command):
                undoing = partial(monitor.execute, undoing)
            undo.push(step.undo_words, undoing)
    for result in results:
        if isinstance(result, CommandError):
            raise result
