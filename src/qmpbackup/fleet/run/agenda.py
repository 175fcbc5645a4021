# SPDX-License-Identifier: Apache-2.0
"""What of a configuration is due: what `due` decides of each VM and target, by what is known of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from qmpbackup.fleet.config import host_name
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Holding, Work
from qmpbackup.fleet.run import due
from qmpbackup.fleet.run.due import Duty, Past
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings
from qmpbackup.targets import opening

CannotTell = Callable[[Duty, Exception], None]
"""Is told of what nobody can say whether it is due."""


def _give_up(_duty: Duty, error: Exception) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class Agenda:
    """What is to be done. `asked` are names of VMs that somebody wants backed up now (all of them where
    `all_vms`)."""

    configuration: Configuration
    history: History
    holdings: Mapping[tuple[str, str], Holding]
    asked: frozenset[str] = frozenset()
    all_vms: bool = False

    @property
    def is_asked(self) -> bool:
        """Whether somebody asked for it, in place of the schedules."""
        return bool(self.asked) or self.all_vms

    def plan(self, now: datetime, cannot_tell: CannotTell = _give_up) -> list[Duty]:
        """What is due now, in the order of its urgency."""
        found = list(self.backups(now, cannot_tell))
        if not self.is_asked:
            found += self._proofs(now, cannot_tell)
        return sorted(found, key=lambda each: (list(Work).index(each.work), -each.urgency))

    def backups(self, now: datetime, cannot_tell: CannotTell) -> Iterator[Duty]:
        """Backups that are due now."""
        for vm in self.configuration.vms:
            if self.asked and vm.name not in self.asked:
                continue
            for name in vm.targets:
                target = self.configuration.target(name)
                try:
                    past = self._past(vm, target)
                    found = due.backup_due(vm, target, past, now, asked=self.is_asked)
                except Exception as error:  # noqa: BLE001 - it is this VM's alone
                    cannot_tell(Duty(Work.BACKUP, target, vm), error)
                    continue
                if found is not None:
                    yield found

    def _past(self, vm: VmSettings, target: TargetSettings) -> Past:
        last = self.history.last(vm.name, target.name, Work.BACKUP)
        good = self.history.last(vm.name, target.name, Work.BACKUP, succeeded=True)
        took = (good.ended - good.started).total_seconds() if good and good.ended else 0.0
        failures = self.history.failures_in_a_row(vm.name, target.name)
        holding = self.holdings.get((vm.name, target.name))
        newest = holding.newest_id if holding else ""
        is_noted = self.history.made(vm.name, target.name, newest) is not None
        return Past(last, failures, took, holding, is_noted)

    def _proofs(self, now: datetime, cannot_tell: CannotTell) -> Iterator[Duty]:
        """Sweeps, verifications and drills whose time has come; none where nobody would know of them
        afterwards, as each run would read all data again."""
        if self.history.trouble:
            return
        swept: set[str] = set()
        for vm in self.configuration.vms:
            for name in vm.targets if vm.enabled else ():
                try:
                    yield from [*self._sweeps(vm, name, now, swept), *self._of_vm(vm, name, now)]
                except Exception as error:  # noqa: BLE001 - likewise
                    cannot_tell(Duty(Work.VERIFY, self.configuration.target(name), vm), error)

    def _sweeps(self, vm: VmSettings, name: str, now: datetime, swept: set[str]) -> Iterator[Duty]:
        target, place = self.configuration.target(name), self.place(vm, name)
        if opening.holds_several(place) and target.keep and place not in swept:
            swept.add(place)
            last = self.history.last("", name, Work.SWEEP)
            if due.is_time(target.sweep.every, last, now):
                yield Duty(Work.SWEEP, target, vm)

    def _of_vm(self, vm: VmSettings, name: str, now: datetime) -> Iterator[Duty]:
        target, holding = self.configuration.target(name), self.holdings.get((vm.name, name))
        for work, every in ((Work.VERIFY, target.verify.every), (Work.DRILL, vm.drill.every)):
            last = self.history.last(vm.name, name, work)
            if due.is_to_be_proved(every, last, holding, now):
                yield Duty(work, target, vm, is_long=True)

    def place(self, vm: VmSettings, target: str) -> str:
        """Where the points of a VM are in a target."""
        return self.configuration.target(target).place(vm, host_name())
