# SPDX-License-Identifier: Apache-2.0
"""What speaks against work before it is even tried: a target that was given up, or is not there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from qmpbackup.fleet import secrets
from qmpbackup.fleet.records import Work, mark_of
from qmpbackup.fleet.run import presence
from qmpbackup.fleet.run.agenda import Agenda
from qmpbackup.fleet.run.choosing import Reach
from qmpbackup.fleet.run.due import Duty
from qmpbackup.fleet.run.presence import Hindrance
from qmpbackup.fleet.settings import WhenGone
from qmpbackup.targets import opening

_ANSWERS_FOR: Final = 300.0
"""Seconds for which a server that has answered is not asked again."""


@dataclass(frozen=True, slots=True)
class Obstacles:
    """Obstacles of one run. `clock` is one that nobody sets."""

    agenda: Agenda
    reach: Reach
    clock: Callable[[], float]
    _answered: dict[str, float] = field(default_factory=dict)
    _silent: dict[str, Hindrance] = field(default_factory=dict)

    def before(self, duty: Duty, made: int) -> Hindrance | None:
        """Why a piece of work is not to be tried, if anything speaks against it; `made` points have been
        made for it in this run.

        Raises:
            Interrupted: a signal is waiting.
            QmpBackupError: a secret cannot be had.
        """
        name = duty.target.name
        if name in self.reach.given_up:
            said = self.reach.given_up[name]
            return Hindrance(
                f"The target was given up for this run, as two VMs could not use it. {said}"
            )
        if name in self._silent:
            return self._silent[name]
        place = self.agenda.place(duty.vm, name)
        if not self._is_to_be_asked(duty, place):
            return None
        found = presence.look(place, secrets.environment(duty.target))
        obstacle = presence.obstacle(duty, place, found, made + self._held(duty, place))
        if obstacle is None:
            self._answered[place] = self.clock()
        elif obstacle.is_gone and obstacle.is_silent:
            self._silent[name] = obstacle
        return obstacle

    def _is_to_be_asked(self, duty: Duty, place: str) -> bool:
        """Whether only a look tells what work itself would not, or not in time."""
        may_be_gone = duty.target.when_gone is WhenGone.SKIP
        if not opening.holds_several(place):
            return may_be_gone or duty.work is Work.BACKUP
        asked = self._answered.get(place)
        return may_be_gone and (asked is None or self.clock() - asked >= _ANSWERS_FOR)

    def _held(self, duty: Duty, place: str) -> int:
        """How many points of a VM were seen there last."""
        holding = self.agenda.holdings.get((duty.vm.name, duty.target.name))
        if holding is None or holding.place not in {"", mark_of(place)}:
            return 0
        return holding.points
