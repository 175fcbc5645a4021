# SPDX-License-Identifier: Apache-2.0
"""What a piece of work is as a command: its words and its environment, by what is known when it begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from qmpbackup.fleet import secrets
from qmpbackup.fleet.records import OFFLINE, SUCCEEDED, Attempt, Work
from qmpbackup.fleet.run import commands, due
from qmpbackup.fleet.run.agenda import Agenda
from qmpbackup.fleet.run.due import Duty
from qmpbackup.targets import opening

WHOLE: Final = "whole"
"""The level of a verification that reads all of the data."""


@dataclass(frozen=True, slots=True)
class Orders:
    """Commands for what is on an agenda."""

    agenda: Agenda
    _whose: dict[tuple[str, str], str] = field(default_factory=dict)

    def command(self, duty: Duty, attempt: Attempt) -> tuple[list[str], Mapping[str, str]]:
        """The words of a command, and what it is told in its environment.

        Raises:
            QmpBackupError: a secret cannot be had.
        """
        place = self.agenda.place(duty.vm, duty.target.name)
        told, said = opening.entrance(opening.place(place)).handed_on()
        environment = {**secrets.environment(duty.target), **said}
        return self._words(duty, attempt, told, chunked=opening.holds_several(place)), environment

    def _words(self, duty: Duty, attempt: Attempt, place: str, *, chunked: bool) -> list[str]:
        vm = duty.vm
        whose = self._whose_points(duty) if chunked else ""
        match duty.work:
            case Work.SWEEP:
                return commands.sweep(place)
            case Work.FORGET:
                return commands.forget(place, whose, duty.target.keep, sweeps_later=chunked)
            case Work.VERIFY:
                share = 1.0 if attempt.level == WHOLE else duty.target.verify.read_data
                return commands.verify(place, whose, share)
            case Work.DRILL:
                return commands.drill(vm, place, whose)
            case Work.BACKUP if attempt.consistency == OFFLINE:
                return commands.offline(vm, place, whose)
            case Work.BACKUP:
                now = attempt.started
                full = due.wants_full(vm, self._last_full(duty), now) and not chunked
                return commands.backup(vm, place, full=full, chunked=chunked)

    def reads_all(self, duty: Duty, now: datetime) -> bool:
        """Whether a verification reads all of the data, as it does every now and then."""
        if duty.work is not Work.VERIFY:
            return False
        earlier = self.agenda.history.attempts(
            vm=duty.vm_name, target=duty.target.name, work=Work.VERIFY
        )
        wholes = (each for each in earlier if each.level == WHOLE and each.exit_code in SUCCEEDED)
        return due.is_time(duty.target.verify.whole, next(wholes, None), now)

    def learn(self, duty: Duty, output: bytes) -> None:
        """Whose the point is that a backup has made."""
        uuid, host, name = commands.identity(output)
        self._whose[duty.vm_name, duty.target.name] = commands.whose(uuid, host, name)

    def _last_full(self, duty: Duty) -> Attempt | None:
        attempts = self.agenda.history.attempts(
            vm=duty.vm_name, target=duty.target.name, work=Work.BACKUP, limit=1000
        )
        return next((each for each in attempts if each.level == "full" and each.point), None)

    def _whose_points(self, duty: Duty) -> str:
        known = self._whose.get((duty.vm_name, duty.target.name))
        if known is not None or duty.work is Work.SWEEP:
            return known or ""
        holding = self.agenda.holdings.get((duty.vm_name, duty.target.name))
        if holding is None:
            return duty.vm_name
        return commands.whose(holding.uuid, holding.host, duty.vm_name)
