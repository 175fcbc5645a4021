# SPDX-License-Identifier: Apache-2.0
"""Commands with their undoing, sent together where none needs the answer of another.

Every answer costs a turn of two event loops, and while a VM stands still each turn counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from qmpbackup.errors import CommandError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.commands import Command
from qmpbackup.undo import UndoStack

Item = TypeVar("Item")


@dataclass(frozen=True)
class Step:
    """A command, and how to undo it (`None`: goes with something else), with words for a report."""

    command: Command
    undo_words: str
    undo: Command | Callable[[], object] | None


def carry_out(monitor: Monitor, steps: Sequence[Step], undo: UndoStack) -> None:
    """Carry out all steps in order; what succeeded is registered for undoing.

    Raises:
        CommandError: QEMU refused a step (the first is raised); later ones were tried all the same.
    """
    done = answers(monitor, steps, lambda step: step.command)
    for step, result in done:
        if not isinstance(result, CommandError):
            if isinstance(step.undo, Command):
                undo.push(step.undo_words, partial(monitor.execute, step.undo))
            elif step.undo is not None:
                undo.push(step.undo_words, step.undo)
    for _, result in done:
        if isinstance(result, CommandError):
            raise result


def answers(
    monitor: Monitor, items: Sequence[Item], command: Callable[[Item], Command]
) -> list[tuple[Item, object]]:
    """Carry out a command for each item, sent at once; gives each item with the answer, or with the
    `CommandError` with which QEMU refused it."""
    results = monitor.execute_each([command(item) for item in items])
    return list(zip(items, results, strict=True))
