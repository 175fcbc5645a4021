# SPDX-License-Identifier: Apache-2.0
"""Undoing: last first, to the end, whatever fails on the way."""

import subprocess
import sys

from qmpbackup.errors import VmError
from qmpbackup.undo import UndoStack


def test_steps_are_undone_last_first_and_past_one_that_fails() -> None:
    done: list[str] = []
    undo = UndoStack()

    def fail() -> None:
        raise VmError("it is gone.")

    undo.push("close the first", lambda: done.append("first"))
    undo.push("remove the filter", fail)
    undo.push("close the last", lambda: done.append("last"))
    assert undo.run() == ["Could not remove the filter: it is gone."]
    assert done == ["last", "first"]
    assert undo.run() == []
    assert done == ["last", "first"]


def test_steps_that_were_handed_over_lie_on_top() -> None:
    done: list[int] = []
    undo, other = UndoStack(), UndoStack()
    other.push("0", lambda: done.append(0))
    undo.push("1", lambda: done.append(1))
    undo.push("2", lambda: done.append(2))
    undo.move_to(other)
    assert undo.run() == []
    assert other.run() == []
    assert done == [2, 1, 0]


def test_what_is_kept_is_not_undone() -> None:
    undo = UndoStack()
    undo.push("remove the file", lambda: 1 / 0)
    undo.forget()
    assert undo.run() == []


INTERRUPTED = """
import signal
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
from qmpbackup.undo import UndoStack

undo = UndoStack()
undo.push("close the other", lambda: print("closed"))
undo.push("close the one", interrupt.check)
with interrupt.held():
    signal.raise_signal(signal.SIGTERM)
    print(*undo.run())
    try:
        interrupt.check()
    except Interrupted as error:
        print("ends with", error.exit_status)
"""


def test_a_signal_waits_until_all_is_undone() -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True
    )
    first, second, third = run.stdout.splitlines()
    assert first == "closed"
    assert second.startswith("Could not close the one: ")
    assert third == "ends with 143"
