# SPDX-License-Identifier: Apache-2.0
"""Making a bitmap whose only mark is the last cluster of a disk (why: see `plan.levels`).

QEMU has no command that sets a bit. But a bitmap marks what is written to its node, and our ledger
(see `view`) is as long as the disk and ours to write to: a job of one cluster writes its end, and the
mark is merged from there to the disk.
"""

from collections.abc import Sequence

from qmpbackup.errors import VmError
from qmpbackup.machine import jobs
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.steps import Step, carry_out
from qmpbackup.plan import commands
from qmpbackup.plan.commands import BITMAP_GRANULARITY, Command
from qmpbackup.plan.names import END, LEDGER, RunNames
from qmpbackup.undo import UndoStack

JOB_SECONDS = 60.0


def mark_ends(
    monitor: Monitor, sizes: Sequence[tuple[int, int]], names: RunNames, teardown: UndoStack
) -> None:
    """Give ledgers a bitmap named after `END` with the mark; `sizes` are (number, disk size).

    Raises:
        VmError: a mark could not be made.
    """
    undo = UndoStack()
    try:
        steps = [step for number, size in sizes for step in _nodes(number, size, names)]
        carry_out(monitor, steps, undo)
        started = [names.of("mark", number) for number, _ in sizes]
        teardown.push("end the marking of ends", lambda: jobs.sweep(monitor, started))
        monitor.execute_all([_job(number, names) for number, _ in sizes])
        for end in jobs.wait(monitor, started, seconds=JOB_SECONDS):
            if end.error:
                raise VmError(f"The end of a disk could not be marked: {end.error}.", "Run again.")
        # Other things may yet be written to a ledger.
        marks = [(names.of(LEDGER, number), names.of(END, number)) for number, _ in sizes]
        monitor.execute_all([commands.bitmap_disable(*mark) for mark in marks])
    finally:
        undo.run()


def _nodes(number: int, size: int, names: RunNames) -> list[Step]:
    ledger, zeroes, tail = (names.of(what, number) for what in (LEDGER, "zero", "tail"))
    length = size % BITMAP_GRANULARITY or BITMAP_GRANULARITY
    bitmap = names.of(END, number)
    add_zeroes = commands.blockdev_add(zeroes, "null-co", size=length, read_zeroes=True)
    add_tail = commands.blockdev_add(tail, "raw", file=ledger, offset=size - length, size=length)
    return [
        Step(commands.bitmap_add(ledger, bitmap), "", None),
        Step(add_zeroes, f"remove {zeroes}", commands.blockdev_del(zeroes)),
        Step(add_tail, f"remove {tail}", commands.blockdev_del(tail)),
    ]


def _job(number: int, names: RunNames) -> Command:
    return Command(
        "blockdev-backup",
        {
            "job-id": names.of("mark", number),
            "device": names.of("zero", number),
            "target": names.of("tail", number),
            "sync": "full",
            "auto-dismiss": False,
        },
    )
