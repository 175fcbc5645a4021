# SPDX-License-Identifier: Apache-2.0
"""What `run` says while it goes on: a line as work begins and one as it ends; at a terminal, a table of
what runs instead of the first."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpbackup.cli.live_table import LiveRow, LiveTable
from qmpbackup.cli.log_fields import Happening, about
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.fleet.records import Attempt
    from qmpbackup.fleet.run.due import Duty
    from qmpbackup.fleet.run.rounds import Begun, Done, Underway
    from qmpbackup.plan.progress import Progress

log = logging.getLogger(__name__)

COLUMNS = ("VM", "TARGET")


class RunReport:
    """What is said of one run."""

    def __init__(self, table: LiveTable) -> None:
        self._table = table
        self._ended = {"done": 0, "failed": 0}

    def __call__(self, event: "Begun | Done | Underway") -> None:
        """Say it."""
        from qmpbackup.fleet.run.rounds import Begun, Underway

        if isinstance(event, Underway):
            self._table.show([_row(*each) for each in event.running], self._counts(event.waiting))
        elif isinstance(event, Begun):
            extra = _about(Happening.BEGIN, event.attempt, for_programs=self._table.is_shown)
            log.info("%s begins.", named(event.duty), extra=extra)
        else:
            self._end(event)

    def _counts(self, waiting: int) -> str:
        counts = {**self._ended, "waiting": waiting}
        return " · ".join(f"{count} {what}" for what, count in counts.items() if count)

    def _end(self, done: "Done") -> None:
        if done.again is None:
            self._ended["done" if done.fine else "failed"] += 1
        attempt, what = done.attempt, named(done.duty)
        about_it = _about(Happening.END if done.fine else Happening.FAILURE, attempt)
        if done.fine and not done.is_degraded:
            log.info("%s: %s", what, _well(done), extra=about_it)
            return
        again = f" Again at {done.again.astimezone():%H:%M}." if done.again else ""
        log.log(
            logging.WARNING if done.fine else logging.ERROR,
            "%s: exit code %s. %s%s",
            what,
            attempt.exit_code,
            attempt.reason,
            again,
            extra=about_it,
        )


def named(duty: "Duty") -> str:
    """What a piece of work is called."""
    vm = f"{duty.vm_name} " if duty.vm_name else ""
    return f"{vm}→ {duty.target.name}: {duty.work}"


def _about(
    event: Happening, attempt: "Attempt", *, for_programs: bool = False
) -> Mapping[str, object]:
    return about(
        event,
        for_programs=for_programs,
        run=attempt.run,
        vm=attempt.vm,
        target=attempt.target,
        work=attempt.work.value,
        point=attempt.point,
        exit_code=attempt.exit_code,
    )


def _row(begun: "Begun", progress: "Progress | None") -> LiveRow:
    duty = begun.duty
    names = duty.vm_name, duty.target.name
    if progress is None:
        return LiveRow(names, duty.work.value)
    return LiveRow(names, progress.stage.value, progress.done, progress.total)


def _well(done: "Done") -> str:
    attempt = done.attempt
    if attempt.exit_code:
        return attempt.reason or "skipped."
    took = f"{(attempt.ended - attempt.started).total_seconds():.0f} s" if attempt.ended else ""
    if not attempt.point:
        return f"done in {took}."
    return (
        f"{attempt.level}, {human(attempt.added)} in {took}, stopped {attempt.pause * 1000:.0f} ms, "
        f"{attempt.consistency}-consistent."
    )
